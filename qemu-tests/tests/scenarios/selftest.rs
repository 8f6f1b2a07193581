//! A unit tested where it is made.

use bootloader_glue::protocol::Environment;
use offshoot::selftest::Report;
use qemu_tests::bench::{Bench, Web};
use qemu_tests::vm::{Options, PATIENCE, STARTUP_FINISHED};

#[test]
fn a_unit_rehearses_its_fallback_and_its_watchdog_and_is_left_as_it_was() {
    let mut bench = Bench::start(Web::Fleet, Options::default()).unwrap();
    bench.configure("").unwrap();
    let Bench { vm, first, .. } = &mut bench;
    vm.start(&["offshoot", "selftest", "--rehearse"]).unwrap();
    // Into the trial, and out of it.
    for _ in 0..2 {
        vm.wait_for_reset(PATIENCE).unwrap();
    }
    vm.wait_for_watchdog(PATIENCE).unwrap();
    vm.wait_for_reset(PATIENCE).unwrap();
    // The boots before it may have ended before their startup was finished.
    let boot = vm.ask(["cat", "/proc/sys/kernel/random/boot_id"]).unwrap();
    let boot = boot.trim().replace('-', "");
    while vm
        .wait_for_event(STARTUP_FINISHED, PATIENCE)
        .unwrap()
        .field("_BOOT_ID")
        != Some(boot.as_str())
    {}
    let report = vm
        .ask(["offshoot", "selftest", "--result", "--json"])
        .unwrap();
    let report: Report = serde_json::from_str(&report).unwrap();
    assert!(report.passed && report.rehearsed, "{report:?}");
    assert_eq!(vm.booted_commit().unwrap(), *first);
    assert!(matches!(
        vm.environment().unwrap(),
        Environment::Valid { counter, damaged: false } if !counter.upgrade_available && !counter.rollback
    ));
}
