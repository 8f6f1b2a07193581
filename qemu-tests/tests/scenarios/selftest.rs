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
    for _ in 0..3 {
        vm.wait_for_reset(PATIENCE).unwrap();
    }
    vm.wait_for_watchdog(PATIENCE).unwrap();
    // The third boot from here on is the one after the watchdog; it is up when the test has come to its end.
    for _ in 0..3 {
        vm.wait_for_event(STARTUP_FINISHED, PATIENCE).unwrap();
    }
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
