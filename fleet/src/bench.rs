//! A fleet in a temporary directory, and devices that poll it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use jiff::Timestamp as Time;

use crate::device::{Device, checked};
use crate::directory::Fleet;
use crate::keys::passphrase::Passphrases;
use crate::prepared::Goal;
use crate::publish::{Request, publish};
use crate::{compose, init, rotate};

pub(crate) const HARDWARE: &str = "qemu-x86_64";

pub(crate) struct Bench {
    temp: tempfile::TempDir,
}

impl Bench {
    /// A fleet with the release 1.0.0, and the commit of 1.1.0.
    pub(crate) fn new() -> Self {
        Self::with_root_keys(1, 1)
    }

    pub(crate) fn with_root_keys(keys: u32, threshold: u32) -> Self {
        let bench = Self {
            temp: tempfile::tempdir().unwrap(),
        };
        let directory = bench.path("fleet");
        let (channel, hardware) = ("stable".parse().unwrap(), HARDWARE.parse().unwrap());
        let keys = init::NewKeys {
            root: (keys, threshold),
            encrypt: false,
            passphrases: Passphrases::default(),
        };
        init::init(&directory, &[channel], &[hardware], keys, now(0)).unwrap();
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
        publish(&bench.fleet(), &request("1.0.0"), now(1)).unwrap();
        bench
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }

    pub(crate) fn fleet(&self) -> Fleet {
        Fleet::open(&self.path("fleet")).unwrap()
    }

    /// A copy, which is what a power cut would leave alone.
    pub(crate) fn copy(&self, from: &str, to: &str) -> Fleet {
        copy(&self.path(from), &self.path(to));
        Fleet::open(&self.path(to)).unwrap()
    }

    /// A device with the first root, and what it has seen before under this name.
    pub(crate) fn device(&self, name: &str) -> Device {
        Device::new(
            &self.path(name),
            &self.path("fleet/public/metadata/1.root.json"),
        )
    }
}

pub(crate) fn copy(from: &Path, to: &Path) {
    let status = Command::new("cp")
        .arg("-a")
        .args([from, to])
        .status()
        .unwrap();
    assert!(status.success());
}

pub(crate) fn request(version: &str) -> Request {
    Request {
        channel: "stable".parse().unwrap(),
        hardware: HARDWARE.parse().unwrap(),
        version: version.parse().unwrap(),
        rev: version.to_owned(),
        deltas: None,
        full: true,
        objects: None,
        again: false,
        prepare: false,
    }
}

/// A key of a role is replaced by one that is made here.
pub(crate) fn replacing(role: &str, key: Option<&str>) -> rotate::Request {
    rotate::Request {
        role: role.to_owned(),
        change: rotate::Change::Replace(key.map(str::to_owned)),
        public: None,
        threshold: None,
        goal: Goal::Publish,
    }
}

/// So many seconds after the fleet was made.
pub(crate) fn now(seconds: i64) -> Time {
    Time::from_second(1_800_000_000 + seconds).unwrap()
}

pub(crate) const fn days(days: i64) -> i64 {
    days * 24 * 60 * 60
}

/// The version that a device is offered.
pub(crate) fn seen(device: &mut Device, public: &Path, now: Time) -> anyhow::Result<String> {
    let release = device.poll(public, now)?.found.unwrap();
    Ok(checked(public, &release))
}

/// Each file below a directory.
pub(crate) fn files(directory: &Path) -> BTreeSet<PathBuf> {
    let mut all = BTreeSet::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.append(&mut files(&path));
        } else {
            all.insert(path);
        }
    }
    all
}
