//! The same stories on an arm64 board under U-Boot, counted by the script and by U-Boot.

use bootloader_glue::protocol::Environment;
use bootloader_glue::uboot::Count;
use offshoot::events;
use offshoot::record::{Phase, Reason};
use qemu_tests::bench::{Bench, Web};
use qemu_tests::board::Board;
use qemu_tests::release::{Fault, Release};
use qemu_tests::vm::{Options, PATIENCE};

use super::faults::rejects;

fn virt(count: Count) -> Options {
    Options {
        board: Board::Virt(count),
        ..Options::default()
    }
}

#[test]
fn a_good_release_is_confirmed_under_a_script_that_counts() {
    confirms(Count::Script);
}

#[test]
fn a_good_release_is_confirmed_under_a_uboot_that_counts() {
    confirms(Count::Bootcount);
}

#[test]
fn a_kernel_that_panics_falls_back_under_a_script_that_counts() {
    let fault = Fault::KernelPanics;
    let bench = rejects(virt(Count::Script), fault, 3, Reason::Unconfirmed);
    assert_eq!(bench.vm.resets(), 4);
}

#[test]
fn a_kernel_that_panics_falls_back_under_a_uboot_that_counts() {
    let fault = Fault::KernelPanics;
    let bench = rejects(virt(Count::Bootcount), fault, 3, Reason::Unconfirmed);
    assert_eq!(bench.vm.resets(), 4);
}

fn confirms(count: Count) {
    let mut bench = Bench::start(Web::Fleet, virt(count)).unwrap();
    let target = bench.publish(&Release::good("1.1.0")).unwrap();
    bench.configure("").unwrap();
    let Bench { vm, first, .. } = &mut bench;
    for event in [events::ARMED, events::DEPLOYED, events::REBOOTING] {
        vm.wait_for_event(event, PATIENCE).unwrap();
    }
    vm.wait_for_serial("offshoot: trial 1 of 3, booting entry 0", PATIENCE)
        .unwrap();
    for event in [events::HEALTHY, events::CONFIRMING, events::CONFIRMED] {
        vm.wait_for_event(event, PATIENCE).unwrap();
    }
    assert_eq!(vm.resets(), 1);
    assert_eq!(vm.booted_commit().unwrap(), target);
    assert!(matches!(
        vm.environment().unwrap(),
        Environment::Valid { counter, damaged: false } if !counter.upgrade_available && !counter.rollback
    ));
    let status = vm.status().unwrap();
    assert_eq!((status.phase, status.protected), (Phase::Idle, true));
    let deployed: Vec<_> = status.deployments.iter().map(|one| one.commit).collect();
    assert_eq!(deployed, [target, *first]);
    // The administrator's tool sees the same environment.
    let printed = vm.ask(["fw_printenv", "-n", "offshoot_count"]).unwrap();
    assert_eq!(printed, count.name());
}
