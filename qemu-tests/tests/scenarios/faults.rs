//! Releases that go wrong: each ends on the former deployment by itself, and the device remembers why.

use bootloader_glue::protocol::{Counter, Environment};
use offshoot::decide::Why;
use offshoot::events;
use offshoot::record::{Phase, Reason};
use offshoot::status::Boot;
use qemu_tests::bench::{Bench, Web};
use qemu_tests::release::{Fault, Release};
use qemu_tests::vm::{Options, PATIENCE};

#[test]
fn a_kernel_that_panics_falls_back_after_three_tries() {
    let bench = rejects(
        Options::default(),
        Fault::KernelPanics,
        3,
        Reason::Unconfirmed,
    );
    assert_eq!(bench.vm.resets(), 4);
}

#[test]
fn a_required_health_check_that_fails_falls_back_at_once_and_says_which() {
    let checks = vec!["50-bench".to_owned()];
    let bench = rejects(
        Options::default(),
        Fault::HealthCheckFails,
        3,
        Reason::Unhealthy { checks },
    );
    assert_eq!(bench.vm.resets(), 2);
}

#[test]
fn an_agent_that_does_not_start_is_not_kept() {
    let checks = vec!["10-offshoot".to_owned()];
    let bench = rejects(
        Options::default(),
        Fault::DaemonDoesNotStart,
        3,
        Reason::Unhealthy { checks },
    );
    assert_eq!(bench.vm.resets(), 2);
}

#[test]
fn a_root_file_system_that_does_not_mount_falls_back() {
    let bench = rejects(
        Options::default(),
        Fault::RootDoesNotMount,
        2,
        Reason::Unconfirmed,
    );
    assert_eq!(bench.vm.resets(), 3);
}

#[test]
fn a_hang_is_ended_by_the_watchdog() {
    let mut bench = rejects(
        Options::default(),
        Fault::PidOneFreezes,
        1,
        Reason::Unconfirmed,
    );
    assert_eq!(bench.vm.resets(), 2);
    bench.vm.wait_for_watchdog(PATIENCE).unwrap();
}

#[test]
fn a_start_that_never_finishes_is_ended_by_the_deadline() {
    let bench = rejects(
        Options::default(),
        Fault::StartNeverFinishes,
        1,
        Reason::Unconfirmed,
    );
    assert_eq!(bench.vm.resets(), 2);
}

#[test]
fn a_release_without_our_programs_is_ended_by_the_deadline() {
    let bench = rejects(
        Options::default(),
        Fault::NoPrograms,
        1,
        Reason::Unconfirmed,
    );
    assert_eq!(bench.vm.resets(), 2);
}

/// A device that is offered a release with `fault` and gives it `tries` boots comes back, and leaves it alone from then on.
pub(super) fn rejects(options: Options, fault: Fault, tries: u8, reason: Reason) -> Bench {
    let mut bench = Bench::start(Web::Fleet, options).unwrap();
    let target = bench.publish(&Release::bad("1.1.0", fault)).unwrap();
    let deadline = "/etc/systemd/system/offshoot-deadline.timer.d";
    bench
        .configure_with(&format!("[bootloader]\ntries = {tries}\n"), |vm| {
            if !matches!(fault, Fault::StartNeverFinishes | Fault::NoPrograms) {
                return Ok(());
            }
            // Ten minutes are for devices. What is tested here never comes up, so that one is enough; a slow machine's healthy boot takes more.
            vm.ask(["mkdir", "-p", deadline])?;
            vm.write_file(
                &format!("{deadline}/bench.conf"),
                b"[Timer]\nOnBootSec=\nOnBootSec=60s\n",
            )
        })
        .unwrap();
    let Bench { vm, first, .. } = &mut bench;
    let rejected = vm.wait_for_event(events::REJECTED, 4 * PATIENCE).unwrap();
    assert_eq!(rejected.field("COMMIT"), Some(target.to_string().as_str()));
    for event in [events::UNDEPLOYED, events::SETTLED, events::WAITING] {
        vm.wait_for_event(event, PATIENCE).unwrap();
    }
    // Offered again with every poll, and refused.
    for _ in 0..2 {
        vm.wait_for_event(events::POLLED, PATIENCE).unwrap();
    }
    assert_eq!(vm.booted_commit().unwrap(), *first);
    assert_eq!(
        vm.environment().unwrap(),
        Environment::Valid {
            counter: Counter {
                upgrade_available: false,
                bootcount: 0,
                bootlimit: tries,
                rollback: false,
            },
            damaged: false,
        }
    );
    let status = vm.status().unwrap();
    assert_eq!(status.boot, Boot::Exhausted);
    assert_eq!(
        (status.phase, status.why),
        (Phase::Idle, Some(Why::Rejected))
    );
    assert_eq!(status.offer.map(|offer| offer.commit), Some(target));
    let rejections: Vec<_> = status
        .rejections
        .into_iter()
        .map(|rejected| (rejected.commit, rejected.reason))
        .collect();
    assert_eq!(rejections, [(target, reason)]);
    let deployed: Vec<_> = status.deployments.iter().map(|one| one.commit).collect();
    assert_eq!(deployed, [*first]);
    assert_eq!(vm.events(events::STAGED).len(), 1);
    bench
}
