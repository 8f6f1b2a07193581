//! Power cuts.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bootloader_glue::protocol::Environment;
use offshoot::decide::Why;
use offshoot::events;
use offshoot::record::Phase;
use qemu_tests::bench::{Bench, Web};
use qemu_tests::release::{Random, Release};
use qemu_tests::vm::{Options, PATIENCE, Vm};

/// Enough to hit fetching, storing, deploying and the trial in most runs. Each costs a boot.
const CUTS: usize = 5;

#[test]
fn a_power_cut_at_any_moment_of_an_update_leaves_the_former_release_or_the_new_one() {
    is_cut(Options::default());
}

#[cfg(feature = "all")]
#[test]
fn power_cuts_right_after_each_step_of_an_update_cost_no_byte_twice() {
    let mut bench = Bench::start(Web::Nginx, Options::default()).unwrap();
    let target = bench.publish(&Release::good("1.1.0")).unwrap();
    bench.configure("[bootloader]\ntries = 9\n").unwrap();
    let Bench { vm, server, .. } = &mut bench;
    for step in [
        events::STAGED,
        events::FETCHED,
        events::APPLIED,
        events::ARMED,
        events::DEPLOYED,
    ] {
        vm.wait_for_event(step, PATIENCE).unwrap();
        vm.cut_power().unwrap();
        vm.power_on().unwrap();
    }
    vm.wait_for_event(events::CONFIRMED, PATIENCE).unwrap();
    assert_eq!(vm.booted_commit().unwrap(), target);
    let requests = server.requests().unwrap();
    let files = requests
        .iter()
        .filter(|request| request.path.starts_with("/deltas/"));
    let mut files: Vec<_> = files.map(|request| &request.path).collect();
    files.sort();
    let all = files.len();
    files.dedup();
    assert_eq!((all, all > 1), (files.len(), true), "{requests:?}");
}

pub(super) fn is_cut(options: Options) {
    let seed = match std::env::var("OFFSHOOT_SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => u64::from(
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap()
                .subsec_nanos(),
        ),
    };
    eprintln!("OFFSHOOT_SEED={seed} cuts at the same places again");
    let mut random = Random(seed);
    let mut bench = Bench::start(Web::Fleet, options).unwrap();
    let release = Release {
        own_initramfs: true,
        ..Release::good("1.1.0")
    };
    let target = bench.publish(&release).unwrap();
    // A cut on trial is a try.
    bench.configure("[bootloader]\ntries = 9\n").unwrap();
    let Bench { vm, first, .. } = &mut bench;
    drain(vm, Instant::now());
    for cut in 1..=CUTS {
        // Lines, not seconds: a machine that is slower gets as far.
        let lines = random.below(30);
        let pause = Duration::from_millis(random.below(2000));
        eprintln!("cut {cut}: {pause:?} after {lines} lines");
        for _ in 0..lines {
            vm.next_line(Instant::now() + PATIENCE).unwrap().unwrap();
        }
        drain(vm, Instant::now() + pause);
        vm.cut_power().unwrap();
        vm.power_on().unwrap();
    }
    // Asked after every poll: that it waits is told once, and a moment before the status says so.
    let deadline = Instant::now() + 2 * PATIENCE;
    let status = loop {
        vm.wait_for_event(events::POLLED, PATIENCE).unwrap();
        if let Ok(status) = vm.status() {
            if status.booted.commit == target && status.why == Some(Why::UpToDate) {
                break status;
            }
            assert!(Instant::now() < deadline, "{status:#?}");
        }
    };
    let (target, first) = (target.to_string(), first.to_string());
    for started in vm.events(events::STARTED) {
        let ran = started.field("COMMIT").unwrap();
        assert!(ran == target || ran == first, "it ran {ran}");
    }
    assert_eq!(vm.booted_commit().unwrap().to_string(), target);
    assert_eq!((status.phase, status.rejections), (Phase::Idle, vec![]));
    assert!(matches!(
        vm.environment().unwrap(),
        Environment::Valid { counter, damaged: false } if !counter.upgrade_available && !counter.rollback
    ));
}

/// Passes over everything that is said until `end`.
fn drain(vm: &mut Vm, end: Instant) {
    while vm.next_line(end).unwrap().is_some() {}
}
