//! `offshoot health` and `offshoot confirm` as systemd runs them, on a device that is a directory.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Output};

use bootloader_glue::Bootloader;
use bootloader_glue::protocol::{Counter, Environment};
use offshoot::commit::{Commit, Sha256};
use offshoot::decide::Verdict;
use offshoot::record::{Phase, Record, Store};

struct Device {
    temp: tempfile::TempDir,
    booted: Commit,
}

impl Device {
    /// On the first boot of a trial of the running deployment.
    fn on_trial(check: &str) -> Self {
        let device = Self {
            temp: tempfile::tempdir().unwrap(),
            booted: Commit(Sha256::of(b"target")),
        };
        let root = device.temp.path();
        let at = |path: &str| root.join(path).display().to_string();
        for directory in [
            "etc/offshoot",
            "efi",
            "state",
            "health/required.d",
            "sysroot/ostree/deploy/os/deploy",
        ] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        let deployment = root.join(format!(
            "sysroot/ostree/deploy/os/deploy/{}.0",
            device.booted
        ));
        std::os::unix::fs::symlink(root, deployment).unwrap();
        let config = format!(
            "[server]\nurl = 'https://a/'\n[device]\nhardware = 'x'\nchannel = 'stable'\n\
             [install]\nreboot_command = ['touch', '{}']\n[bootloader]\nenvironment = '{}'\n\
             [paths]\nstate = '{}'\nrun = '{}'\nroot = '{}'\nkernel_command_line = '{}'\nhealth = ['{}']\n",
            at("rebooted"),
            at("efi"),
            at("state"),
            at("run"),
            at(""),
            at("cmdline"),
            at("health"),
        );
        fs::write(root.join("etc/offshoot/config.toml"), config).unwrap();
        let check_path = root.join("health/required.d/app");
        fs::write(&check_path, format!("#!/bin/sh\n{check}\n")).unwrap();
        fs::set_permissions(&check_path, fs::Permissions::from_mode(0o755)).unwrap();
        device.mark("offshoot.trial=1");
        device.bootloader().arm(3).unwrap();
        device.phase(device.booted);
        device
    }

    fn mark(&self, mark: &str) {
        fs::write(
            self.temp.path().join("cmdline"),
            format!("root=LABEL=root {mark}\n"),
        )
        .unwrap();
    }

    fn phase(&self, target: Commit) {
        let (mut store, _, _) = Store::open(&self.temp.path().join("state")).unwrap();
        let from = Commit(Sha256::of(b"from"));
        store
            .save(&Record {
                phase: Phase::Trial {
                    from,
                    target,
                    attempts: 1,
                },
                ..Record::default()
            })
            .unwrap();
    }

    fn bootloader(&self) -> Bootloader {
        Bootloader::Grub {
            environment: self.temp.path().join("efi"),
            boot: self.temp.path().join("boot"),
        }
    }

    fn counter(&self) -> Counter {
        match self.bootloader().read().unwrap() {
            Environment::Valid {
                counter,
                damaged: false,
            } => counter,
            other => panic!("{other:?}"),
        }
    }

    fn offshoot(&self, verb: &str) -> Output {
        let program = env!("CARGO_BIN_EXE_offshoot");
        Command::new(program)
            .arg("--root")
            .arg(self.temp.path())
            .args(["--json", verb])
            .output()
            .unwrap()
    }

    fn rebooted(&self) -> bool {
        self.temp.path().join("rebooted").exists()
    }

    fn verdict(&self) -> Option<Verdict> {
        let path = self.temp.path().join("state/verdict.json");
        path.exists()
            .then(|| serde_json::from_slice(&fs::read(path).unwrap()).unwrap())
    }
}

fn ended(output: &Output, field: &str) -> (Option<i32>, serde_json::Value) {
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    (output.status.code(), answer[field].clone())
}

#[test]
fn a_healthy_trial_is_confirmed_with_one_write() {
    let device = Device::on_trial("exit 0");
    assert_eq!(
        ended(&device.offshoot("health"), "ending"),
        (Some(0), "healthy".into())
    );
    assert!(device.counter().upgrade_available);
    assert_eq!(
        ended(&device.offshoot("confirm"), "confirmed"),
        (Some(0), true.into())
    );
    assert!(!device.counter().upgrade_available);
    assert_eq!(
        ended(&device.offshoot("confirm"), "confirmed"),
        (Some(0), false.into())
    );
    assert_eq!((device.rebooted(), device.verdict()), (false, None));
}

#[test]
fn an_unhealthy_trial_leaves_its_verdict_exhausts_the_counter_and_reboots() {
    let device = Device::on_trial("exit 1");
    assert_eq!(
        ended(&device.offshoot("health"), "ending"),
        (Some(3), "unhealthy-trial".into())
    );
    assert_eq!(
        device.verdict(),
        Some(Verdict {
            commit: device.booted,
            checks: vec!["app".to_owned()]
        })
    );
    let exhausted = Counter {
        upgrade_available: true,
        bootcount: 3,
        bootlimit: 3,
        rollback: false,
    };
    assert_eq!((device.counter(), device.rebooted()), (exhausted, true));
}

#[test]
fn nothing_but_the_trial_itself_reboots_for_its_health() {
    for (mark, target) in [
        ("", None),
        ("offshoot.fallback=exhausted", None),
        ("offshoot.trial=1", Some(b"another")),
    ] {
        let device = Device::on_trial("exit 1");
        device.mark(mark);
        if let Some(target) = target {
            device.phase(Commit(Sha256::of(target)));
        }
        assert_eq!(
            ended(&device.offshoot("health"), "ending"),
            (Some(3), "unhealthy".into())
        );
        let counter = Counter {
            upgrade_available: true,
            bootcount: 0,
            bootlimit: 3,
            rollback: false,
        };
        assert_eq!(
            (device.counter(), device.rebooted(), device.verdict()),
            (counter, false, None)
        );
    }
}
