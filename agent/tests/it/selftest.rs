//! `offshoot selftest` on a machine in a directory, and on machines that are not sound.

use std::fs;

use bootloader_glue::protocol::{Boot, Mark};
use offshoot::decide::{Consent, Download, Step, Why, decide};
use offshoot::device::Device;
use offshoot::selftest::{self, Ending, Question, Report};

use crate::machine::Machine;

const IDENTITY: &str = "0123456789abcdef0123456789abcdef\n";

/// A machine with all that a unit has when it leaves the line.
async fn unit() -> Machine {
    let machine = Machine::new();
    let _server = machine.server().await;
    for directory in ["root/etc", "watchdog0"] {
        fs::create_dir_all(machine.path(directory)).unwrap();
    }
    fs::write(machine.path("root/etc/machine-id"), IDENTITY).unwrap();
    for (attribute, value) in [
        ("identity", "a dog"),
        ("timeout", "30"),
        ("state", "active"),
    ] {
        fs::write(
            machine.path("watchdog0").join(attribute),
            format!("{value}\n"),
        )
        .unwrap();
    }
    machine
}

fn failed(report: &Report) -> Vec<Question> {
    assert_eq!(
        report.passed,
        report.answers.iter().all(|answer| answer.passed)
    );
    let answers = report.answers.iter().filter(|answer| !answer.passed);
    answers.map(|answer| answer.question).collect()
}

fn finished(ending: Option<Ending>) -> Report {
    match ending {
        Some(Ending::Finished(report)) => report,
        other => panic!("{other:?}"),
    }
}

/// Everything on the device that a test might have changed.
fn state(machine: &Machine) -> impl PartialEq + std::fmt::Debug {
    (
        machine.record(),
        machine.environment(),
        machine.deployments(),
    )
}

#[tokio::test]
async fn a_sound_unit_passes_and_is_left_as_it_was() {
    let machine = unit().await;
    let config = machine.config();
    let before = state(&machine);
    let report = selftest::look(&config).await.unwrap();
    assert_eq!(failed(&report), []);
    assert_eq!(state(&machine), before);

    assert!(matches!(
        selftest::rehearse(&config, false).await.unwrap(),
        Ending::Reboot
    ));
    assert!(selftest::rehearse(&config, false).await.is_err());
    assert_eq!(machine.power_on().mark, Mark::Trial { tries: 1 });
    // What else runs on such a boot leaves the trial to the rehearsal.
    machine.confirm();
    assert!(machine.armed());
    let (device, _) = Device::open(&config).unwrap();
    let facts = device
        .observe(None, |_, _| Download::Allowed, |_| Consent::Given)
        .await
        .unwrap()
        .facts;
    assert_eq!(decide(device.record(), &facts), Step::Wait(Why::Rehearsing));

    assert!(matches!(
        selftest::resume(&config).unwrap(),
        Some(Ending::Reboot)
    ));
    assert!(matches!(machine.power_on().mark, Mark::Fallback(_)));
    let report = finished(selftest::resume(&config).unwrap());
    assert_eq!(failed(&report), []);
    assert!(report.rehearsed);
    let rehearsed = report.answers.iter().map(|answer| answer.question);
    assert!(
        rehearsed
            .collect::<Vec<_>>()
            .ends_with(&[Question::EnvironmentShared, Question::CounterFallsBack])
    );
    assert_eq!(selftest::last(&config).unwrap(), Some(report));
    assert_eq!(state(&machine), before);
    assert!(selftest::resume(&config).unwrap().is_none());
    assert_eq!(machine.power_on().mark, Mark::Normal);
}

#[tokio::test]
async fn a_power_cut_between_any_two_steps_of_a_rehearsal_does_no_harm() {
    let machine = unit().await;
    let config = machine.config();
    let before = state(&machine);
    selftest::rehearse(&config, false).await.unwrap();
    // The stage was kept and the counter not yet armed.
    config.bootloader().settle().unwrap();
    assert_eq!(machine.power_on().mark, Mark::Normal);
    assert!(matches!(
        selftest::resume(&config).unwrap(),
        Some(Ending::Reboot)
    ));
    // Twice more before anything could run.
    machine.power_on();
    assert_eq!(machine.power_on().mark, Mark::Trial { tries: 2 });
    selftest::resume(&config).unwrap();
    machine.power_on();
    let report = finished(selftest::resume(&config).unwrap());
    assert_eq!(failed(&report), []);
    assert_eq!(state(&machine), before);
}

#[tokio::test]
async fn a_bootloader_with_another_environment_or_none_is_found() {
    let machine = unit().await;
    let config = machine.config();
    let before = state(&machine);
    let boots_as = |mark| {
        machine.start(Boot {
            entry: 0,
            mark,
            saved: None,
        })
    };
    selftest::rehearse(&config, false).await.unwrap();
    boots_as(Mark::Normal);
    let report = finished(selftest::resume(&config).unwrap());
    assert_eq!(failed(&report), [Question::EnvironmentShared]);
    assert_eq!(state(&machine), before);

    // It counts, and not where the system reads it.
    selftest::rehearse(&config, false).await.unwrap();
    boots_as(Mark::Trial { tries: 1 });
    let report = finished(selftest::resume(&config).unwrap());
    assert_eq!(failed(&report), [Question::EnvironmentShared]);
    assert_eq!(state(&machine), before);

    // It counts and never gives up.
    selftest::rehearse(&config, false).await.unwrap();
    machine.power_on();
    selftest::resume(&config).unwrap();
    boots_as(Mark::Trial { tries: 4 });
    let report = finished(selftest::resume(&config).unwrap());
    assert_eq!(failed(&report), [Question::CounterFallsBack]);
    assert_eq!(state(&machine), before);

    selftest::rehearse(&config, false).await.unwrap();
    machine.power_on();
    assert!(selftest::abandon(&config).unwrap());
    assert!(!selftest::abandon(&config).unwrap());
    assert_eq!(state(&machine), before);
}

#[tokio::test]
async fn each_fault_of_a_unit_has_its_question() {
    let machine = unit().await;
    let config = machine.config();
    let look = async || failed(&selftest::look(&config).await.unwrap());
    let spoil = |path: &str, content: &str| {
        let path = machine.path(path);
        let was = fs::read(&path).unwrap();
        fs::write(&path, content).unwrap();
        (path, was)
    };
    let mend = |(path, was): (std::path::PathBuf, Vec<u8>)| fs::write(path, was).unwrap();

    let spoilt = spoil("root/etc/machine-id", "uninitialized\n");
    assert_eq!(look().await, [Question::Identity]);
    mend(spoilt);
    // The image carries an identity, which all of its units would share.
    fs::write(machine.path("root/usr/etc/machine-id"), IDENTITY).unwrap();
    assert_eq!(look().await, [Question::Identity]);
    fs::remove_file(machine.path("root/usr/etc/machine-id")).unwrap();

    let spoilt = spoil("watchdog0/state", "inactive\n");
    assert_eq!(look().await, [Question::Watchdog]);
    mend(spoilt);
    fs::rename(machine.path("watchdog0"), machine.path("no-watchdog")).unwrap();
    assert_eq!(look().await, [Question::Watchdog]);
    fs::rename(machine.path("no-watchdog"), machine.path("watchdog0")).unwrap();

    let spoilt = spoil("sysroot/boot/loader/grub.cfg", "menuentry\n");
    assert_eq!(look().await, [Question::BootCounter]);
    mend(spoilt);
    let spoilt = spoil("efi/env.0", "");
    assert_eq!(look().await, [Question::BootEnvironment]);
    mend(spoilt);
    config.bootloader().arm(3).unwrap();
    assert_eq!(look().await, [Question::BootEnvironment]);
    config.bootloader().settle().unwrap();

    let root = fs::read_to_string(machine.path("root.json")).unwrap();
    let spoilt = spoil("root.json", &root.replace("2100", "2101"));
    assert!(look().await.contains(&Question::TrustedRoot));
    mend(spoilt);
    assert_eq!(look().await, []);

    // A unit that does not pass the look is not rehearsed.
    let _spoilt = spoil("root/etc/machine-id", "");
    let ending = selftest::rehearse(&config, false).await.unwrap();
    assert_eq!(failed(&finished(Some(ending))), [Question::Identity]);
    assert!(!machine.armed());
}
