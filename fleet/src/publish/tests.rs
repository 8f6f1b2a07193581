//! What a device sees of a publication that is cut off after any write.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::*;
use crate::device::{Device, checked};
use crate::{compose, init};

const HARDWARE: &str = "qemu-x86_64";

struct Bench {
    temp: tempfile::TempDir,
}

impl Bench {
    /// A fleet with the release 1.0.0, and the commit of 1.1.0.
    fn new() -> Self {
        let bench = Self {
            temp: tempfile::tempdir().unwrap(),
        };
        let directory = bench.path("fleet");
        let (channel, hardware) = ("stable".parse().unwrap(), HARDWARE.parse().unwrap());
        init::init(&directory, &[channel], &[hardware], (1, 1), now(0)).unwrap();
        for version in ["1.0.0", "1.1.0"] {
            let tree = bench.path(version);
            for (path, text) in [
                ("usr/lib/modules/6.12/vmlinuz", "kernel"),
                ("usr/lib/modules/6.12/initramfs.img", "initramfs"),
                ("usr/bin/tool", version),
            ] {
                let path = tree.join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            compose::compose(&tree, &directory.join("repo"), version, version, 1).unwrap();
        }
        let fleet = Fleet::open(&directory).unwrap();
        publish(&fleet, &request("1.0.0"), now(1)).unwrap();
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }

    /// A copy of the fleet, as a power cut would leave it alone.
    fn copy(&self, from: &str, to: &str) -> Fleet {
        copy(&self.path(from), &self.path(to));
        Fleet::open(&self.path(to)).unwrap()
    }

    fn device(&self, name: &str) -> Device {
        Device::new(&self.path(name), &self.path("fleet/root.json"))
    }
}

fn copy(from: &Path, to: &Path) {
    let status = Command::new("cp")
        .arg("-a")
        .args([from, to])
        .status()
        .unwrap();
    assert!(status.success());
}

fn request(version: &str) -> Request {
    Request {
        channel: "stable".parse().unwrap(),
        hardware: HARDWARE.parse().unwrap(),
        version: version.parse().unwrap(),
        rev: version.to_owned(),
        deltas: None,
        full: true,
        again: false,
    }
}

fn now(seconds: i64) -> Time {
    Time::from_second(1_800_000_000 + seconds).unwrap()
}

fn seen(device: &mut Device, public: &Path) -> String {
    let release = device.poll(public, now(9)).unwrap().release.unwrap();
    checked(public, &release)
}

#[test]
fn a_device_sees_the_former_release_or_the_new_one_after_a_cut_at_any_write() {
    let bench = Bench::new();
    seen(&mut bench.device("held"), &bench.path("fleet/public"));
    let mut history = Vec::new();
    loop {
        let steps = history.len();
        let fleet = bench.copy("fleet", &format!("cut-{steps}"));
        let public = fleet.public();
        let writer = Writer::cut_after(&public, steps);
        let published = publish_with(&fleet, &request("1.1.0"), now(2), &writer).is_ok();
        copy(&bench.path("held"), &bench.path(&format!("held-{steps}")));
        let mut devices = [
            bench.device(&format!("held-{steps}")),
            bench.device(&format!("fresh-{steps}")),
        ];
        let [held, fresh] = devices.each_mut().map(|device| seen(device, &public));
        assert_eq!(held, fresh, "after {steps} steps");
        history.push(held);

        let again = publish(&fleet, &request("1.1.0"), now(3)).unwrap();
        assert_eq!(
            (again.serial, again.deltas.len()),
            (2, 2),
            "after {steps} steps"
        );
        assert_eq!(
            devices.each_mut().map(|device| seen(device, &public)),
            ["1.1.0", "1.1.0"]
        );
        let parts = Command::new("find")
            .arg(&public)
            .args(["-name", "*.part"])
            .output()
            .unwrap();
        assert_eq!(parts.stdout, b"");
        if published {
            break;
        }
    }
    // Two deltas of two files, commit object, manifest, channel, snapshot, timestamp: four steps each. The last rename publishes.
    assert_eq!(history.len(), 9 * 4 + 1);
    let former = history
        .iter()
        .take_while(|version| *version == "1.0.0")
        .count();
    assert_eq!(former, 9 * 4 - 1);
    assert!(history[former..].iter().all(|version| version == "1.1.0"));
}

#[test]
fn a_device_that_polls_while_it_is_published_sees_one_release_or_the_other() {
    let bench = Bench::new();
    seen(&mut bench.device("held"), &bench.path("fleet/public"));
    let fleet = bench.copy("fleet", "after");
    publish(&fleet, &request("1.1.0"), now(2)).unwrap();
    for start in ["held", "none"] {
        for switch in 0..8 {
            let name = format!("{start}-{switch}");
            if start == "held" {
                copy(&bench.path("held"), &bench.path(&name));
            }
            let public = |request| {
                let side = if request < switch { "fleet" } else { "after" };
                bench.path(side).join("public")
            };
            let outcome = bench.device(&name).poll_moving(public, now(9)).unwrap();
            let want = if switch == 0 { "1.1.0" } else { "1.0.0" };
            assert_eq!(
                checked(&fleet.public(), &outcome.release.unwrap()),
                want,
                "{name}"
            );
        }
    }
}

#[test]
fn two_publishers_do_not_meet() {
    let bench = Bench::new();
    let fleet = bench.copy("fleet", "copy");
    let lock = fleet.lock().unwrap();
    let error = publish(&fleet, &request("1.1.0"), now(2)).unwrap_err();
    assert!(error.is::<crate::directory::Busy>(), "{error:#}");
    drop(lock);
    publish(&fleet, &request("1.1.0"), now(2)).unwrap();
}

#[test]
fn a_clock_behind_the_last_publication_signs_nothing() {
    let bench = Bench::new();
    let fleet = bench.copy("fleet", "copy");
    let before = fs::read(fleet.metadata("timestamp.json")).unwrap();
    publish(&fleet, &request("1.1.0"), now(0)).unwrap_err();
    assert_eq!(fs::read(fleet.metadata("timestamp.json")).unwrap(), before);
}
