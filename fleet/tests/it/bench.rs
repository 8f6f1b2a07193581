//! An operator at work in a temporary directory.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

use crate::device::Device;

pub(crate) struct Bench {
    temp: tempfile::TempDir,
}

impl Bench {
    /// An empty directory.
    pub(crate) fn empty() -> Self {
        Self {
            temp: tempfile::tempdir().unwrap(),
        }
    }

    /// With a fleet of the channels stable and beta, without releases.
    pub(crate) fn new() -> Self {
        let bench = Self::empty();
        bench.run(&[
            "init",
            "--channel=stable",
            "--channel=beta",
            "--hardware=qemu-x86_64",
        ]);
        bench
    }

    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.temp.path().join(path)
    }

    pub(crate) fn public(&self) -> PathBuf {
        self.path("fleet/public")
    }

    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_offshoot-fleet"));
        command
            .args(["--json", "--fleet", "fleet"])
            .current_dir(self.temp.path());
        command
    }

    pub(crate) fn output(&self, arguments: &[&str]) -> Output {
        self.command().args(arguments).output().unwrap()
    }

    /// What it answers.
    pub(crate) fn run(&self, arguments: &[&str]) -> Value {
        let output = self.output(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Fails with this code, says why, and leaves `public` as it was.
    pub(crate) fn fails(&self, arguments: &[&str], code: i32) {
        let before = files(&self.public());
        let output = self.output(arguments);
        assert_eq!(
            output.status.code(),
            Some(code),
            "{arguments:?}: {output:?}"
        );
        assert!(
            output.stdout.is_empty() && !output.stderr.is_empty(),
            "{output:?}"
        );
        assert_eq!(files(&self.public()), before, "{arguments:?}");
    }

    /// Composes a release, whose branch is its version.
    pub(crate) fn compose(&self, version: &str, large: usize) -> String {
        let tree = self.path("tree");
        for (path, bytes) in [
            ("usr/lib/modules/6.12/vmlinuz", b"kernel".to_vec()),
            ("usr/lib/modules/6.12/initramfs.img", b"initramfs".to_vec()),
            ("usr/bin/tool", version.as_bytes().to_vec()),
            ("usr/share/large", noise(large)),
        ] {
            let path = tree.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        let release = format!("--release={version}");
        let branch = format!("--branch={version}");
        let composed = self.run(&["compose", "--tree=tree", &branch, &release]);
        composed["commit"].as_str().unwrap().to_owned()
    }

    /// The arguments that publish it.
    pub(crate) fn publishing<'a>(
        channel: &'a str,
        release: &'a str,
        more: &[&'a str],
    ) -> Vec<&'a str> {
        let mut arguments = vec!["publish", "--hardware=qemu-x86_64", "--channel", channel];
        arguments.extend(["--release", release, release]);
        arguments.extend(more);
        arguments
    }

    pub(crate) fn publish(&self, channel: &str, version: &str, more: &[&str]) -> Value {
        self.run(&Self::publishing(channel, version, more))
    }

    pub(crate) fn device(&self) -> Device {
        Device::new(&self.path("device"), &self.path("fleet/root.json"))
    }

    pub(crate) fn ostree(&self, arguments: &[&str]) -> String {
        let output = Command::new("ostree")
            .args(arguments)
            .current_dir(self.temp.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }
}

/// Bytes that do not compress, the same each time.
pub(crate) fn noise(length: usize) -> Vec<u8> {
    let mut state = 1u64;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 56) as u8
    };
    (0..length).map(|_| next()).collect()
}

/// Each file below a directory, when it was written and how long it is.
pub(crate) fn files(directory: &Path) -> Vec<(PathBuf, std::time::SystemTime, u64)> {
    let mut all = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let meta = fs::symlink_metadata(&path).unwrap();
        if meta.is_dir() {
            all.extend(files(&path));
        } else {
            all.push((path, meta.modified().unwrap(), meta.len()));
        }
    }
    all.sort();
    all
}
