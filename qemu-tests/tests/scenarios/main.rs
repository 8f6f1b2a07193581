//! Scenarios on real machines: each boots the OS under the real bootloader, does something to it, and asks what is left.

use qemu_tests::cache::Cache;
use qemu_tests::image;
use qemu_tests::vm::{PATIENCE, STARTUP_FINISHED, Vm};

#[test]
fn a_power_cut_leaves_the_deployment_that_the_factory_installed() {
    let cache = Cache::open().unwrap();
    let image = image::factory(&cache).unwrap();
    let mut vm = Vm::boot(&image.disk).unwrap();
    for _ in 0..2 {
        vm.wait_for_event(STARTUP_FINISHED, PATIENCE).unwrap();
        assert_eq!(vm.booted_commit().unwrap(), image.commit);
        assert_eq!(vm.ask(["cat", "/usr/lib/bench/release"]).unwrap(), "1.0.0");
        assert_eq!(vm.run(["touch", "/usr/lib/x"]).unwrap().status, 1);
        assert_eq!(
            vm.ask(["findmnt", "--noheadings", "--output=SOURCE", "/boot"])
                .unwrap(),
            "/dev/vda2"
        );
        assert_eq!(
            vm.ask(["findmnt", "--noheadings", "--output=SOURCE", "/efi"])
                .unwrap(),
            "/dev/vda1"
        );
        vm.cut_power().unwrap();
        vm.power_on().unwrap();
    }
}
