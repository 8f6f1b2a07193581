//! A release with nothing wrong.

use bootloader_glue::protocol::Environment;
use offshoot::decide::Why;
use offshoot::events;
use offshoot::record::{Phase, Reason};
use offshoot::status::Boot;
use qemu_tests::bench::{Bench, Web};
use qemu_tests::release::{ETC_FILE, ODD_ATTRIBUTE, ODD_CAPABILITY, ODD_FILE, ODD_STAT, Release};
use qemu_tests::vm::{Options, PATIENCE};

#[test]
fn a_good_release_is_confirmed_after_one_boot_and_given_up_when_it_cannot_be_loaded() {
    let mut bench = Bench::start(Web::Nginx, Options::default()).unwrap();
    bench.configure("").unwrap();
    let Bench { vm, .. } = &mut bench;

    // The device's own: a file that no release has, one that a release has, and something in /var.
    vm.write_file("/etc/bench-own", b"of this device").unwrap();
    vm.write_file("/etc/issue", b"changed by the operator")
        .unwrap();
    vm.write_file("/var/lib/bench", b"data").unwrap();
    let var = vm
        .ask(["stat", "--format=%i %Y %Z", "/var/lib/bench"])
        .unwrap();

    let release = Release {
        own_initramfs: true,
        ..Release::good("1.1.0")
    };
    let target = bench.publish(&release).unwrap();
    let Bench {
        vm, server, first, ..
    } = &mut bench;
    for event in [
        events::STAGED,
        events::FETCHED,
        events::APPLIED,
        events::ARMED,
        events::DEPLOYED,
    ] {
        vm.wait_for_event(event, PATIENCE).unwrap();
    }
    for event in [events::HEALTHY, events::CONFIRMING, events::CONFIRMED] {
        let event = vm.wait_for_event(event, PATIENCE).unwrap();
        if let Some(commit) = event.field("COMMIT") {
            assert_eq!(commit, target.to_string());
        }
    }
    assert_eq!(vm.resets(), 1);

    assert_eq!(vm.booted_commit().unwrap(), target);
    assert!(matches!(
        vm.environment().unwrap(),
        Environment::Valid { counter, damaged: false } if !counter.upgrade_available && !counter.rollback
    ));
    let status = vm.status().unwrap();
    assert_eq!(status.phase, Phase::Idle);
    assert_eq!(status.rejections, []);
    let deployed: Vec<_> = status.deployments.iter().map(|one| one.commit).collect();
    assert_eq!(deployed, [target, *first]);

    assert_eq!(vm.ask(["cat", "/etc/bench-own"]).unwrap(), "of this device");
    assert_eq!(
        vm.ask(["cat", "/etc/issue"]).unwrap(),
        "changed by the operator"
    );
    assert_eq!(vm.ask(["cat", ETC_FILE]).unwrap(), "1.1.0");
    assert_eq!(
        vm.ask(["stat", "--format=%i %Y %Z", "/var/lib/bench"])
            .unwrap(),
        var
    );
    assert_eq!(
        vm.ask(["stat", "--format=%a %u:%g", ODD_FILE]).unwrap(),
        ODD_STAT
    );
    let attributes = [
        "getfattr",
        "--absolute-names",
        "--dump",
        "--match=-",
        "--encoding=hex",
        ODD_FILE,
    ];
    assert_eq!(
        vm.ask(attributes).unwrap(),
        format!(
            "# file: {ODD_FILE}\nsecurity.capability={ODD_CAPABILITY}\nuser.bench={ODD_ATTRIBUTE}"
        )
    );

    // Nothing is to be done now: a poll is one small request.
    vm.wait_for_event(events::POLLED, PATIENCE).unwrap();
    let before = server.requests().unwrap().len();
    for _ in 0..3 {
        vm.wait_for_event(events::POLLED, PATIENCE).unwrap();
    }
    let polls = server.requests().unwrap().split_off(before);
    assert!((2..=4).contains(&polls.len()), "{polls:?}");
    for poll in polls {
        assert_eq!(
            (poll.http.as_str(), poll.path.as_str()),
            ("HTTP/2.0", "/metadata/timestamp.json")
        );
        assert_eq!((poll.status, poll.bytes), (304, 0));
    }

    // Nothing is on trial, and the default cannot be loaded any more: the one before it runs, and the default is given up.
    let kernel = "mount -o remount,rw /boot && rm \"$(sed -n 's/^linux //;T;s,^,/boot,p' /boot/loader/entries/ostree-2.conf)\"";
    vm.ask(["/bin/sh", "-c", kernel]).unwrap();
    vm.start(&["systemctl", "reboot"]).unwrap();
    let rejected = vm.wait_for_event(events::REJECTED, PATIENCE).unwrap();
    assert_eq!(rejected.field("COMMIT"), Some(target.to_string().as_str()));
    vm.wait_for_event(events::UNDEPLOYED, PATIENCE).unwrap();
    vm.wait_for_event(events::WAITING, PATIENCE).unwrap();
    assert_eq!(vm.booted_commit().unwrap(), *first);
    let status = vm.status().unwrap();
    assert_eq!(
        (status.boot, status.why),
        (Boot::Unloadable, Some(Why::Rejected))
    );
    assert_eq!(status.rejections[0].reason, Reason::Unloadable);
    let deployed: Vec<_> = status.deployments.iter().map(|one| one.commit).collect();
    assert_eq!(deployed, [*first]);
}
