//! One release of the test OS: the base OS, Offshoot itself, and what this release brings.
//!
//! Owns what a good release contains and every way in which a release can be bad. The faults are real: a kernel that
//! panics, a root that does not mount, a PID 1 that freezes, and so on down to a health check that says no.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;

use anyhow::{Context as _, Result};

use crate::board::Board;
use crate::{os, run};

/// What a release does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Its init ends at once, and the kernel panics.
    KernelPanics,
    /// The initramfs cannot prepare the root file system and never gets further.
    RootDoesNotMount,
    /// PID 1 crashes and freezes: no reboot, no panic, and nobody pets the watchdog.
    PidOneFreezes,
    /// A service that everything waits for never comes up.
    StartNeverFinishes,
    /// A required health check says no.
    HealthCheckFails,
    /// The daemon does not start, so that this would be the last release the device ever takes.
    DaemonDoesNotStart,
    /// Offshoot's programs are not in the release; its deadline, which is systemd's alone, is.
    NoPrograms,
}

/// A release to be composed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Release {
    /// Told by `/usr/lib/bench/release`.
    pub version: String,
    pub fault: Option<Fault>,
    /// It has another initramfs than the base OS, and so files of its own in /boot.
    pub own_initramfs: bool,
    /// Megabytes that compress to no less.
    pub payload: usize,
}

/// What a device believes from the factory on: the TUF root, and who signs the server's certificate.
pub struct Trust {
    pub root: Vec<u8>,
    pub ca: Vec<u8>,
}

/// A file in every release that an operator may change; the release's says which release it is of.
pub const ETC_FILE: &str = "/etc/bench-release";

/// A file in every release whose owner, mode and extended attributes are anything but ordinary.
pub const ODD_FILE: &str = "/usr/lib/bench/odd";
/// What `stat` and `getfattr` say of it.
pub const ODD_STAT: &str = "6755 1234:5678";
pub const ODD_CAPABILITY: &str = "0x0100000200200000000000000000000000000000";
pub const ODD_ATTRIBUTE: &str = "0x617320636f6d706f736564";

/// The configuration that the image ships. The device's own, in /etc, names the server.
fn config(board: Board) -> String {
    format!(
        "[server]\nurl = \"https://updates.invalid/\"\nca = \"/usr/lib/offshoot/ca.pem\"\n\n\
         [device]\nhardware = \"{}\"\nchannel = \"stable\"\n{}",
        board.hardware(),
        board.configuration()
    )
}

/// Unit, and where systemd looks for who wants it. In /usr, so that a release that drops a unit drops its link, too.
const UNITS: &[(&str, Option<&str>)] = &[
    ("offshoot.service", Some("multi-user.target.wants")),
    (
        "offshoot-health.service",
        Some("boot-complete.target.requires"),
    ),
    ("offshoot-confirm.service", Some("multi-user.target.wants")),
    ("offshoot-selftest.service", Some("multi-user.target.wants")),
    ("offshoot-deadline.timer", Some("sysinit.target.wants")),
    ("offshoot-deadline.service", None),
];

impl Release {
    /// A release with nothing wrong.
    pub fn good(version: &str) -> Self {
        Self {
            version: version.to_owned(),
            fault: None,
            own_initramfs: false,
            payload: 0,
        }
    }

    /// A release that goes wrong in the way of `fault`.
    pub fn bad(version: &str, fault: Fault) -> Self {
        Self {
            fault: Some(fault),
            ..Self::good(version)
        }
    }

    /// Writes what this release adds to `base`, a root file system, into `overlay`, an empty directory.
    pub fn write_overlay(
        &self,
        board: Board,
        base: &Path,
        trust: &Trust,
        overlay: &Path,
    ) -> Result<()> {
        let tree = Overlay(overlay);
        tree.offshoot(board, trust, self.fault != Some(Fault::NoPrograms))?;
        tree.file("usr/lib/bench/release", &format!("{}\n", self.version))?;
        tree.file(
            ETC_FILE.trim_start_matches('/'),
            &format!("{}\n", self.version),
        )?;
        tree.odd_file(&self.version)?;
        if self.own_initramfs {
            tree.initramfs(base, "usr/lib/bench-release", self.version.as_bytes())?;
        }
        if self.payload > 0 {
            tree.write("usr/lib/bench/payload", &noise(self.payload << 20), 0o644)?;
        }
        match self.fault {
            None | Some(Fault::NoPrograms) => Ok(()),
            Some(Fault::KernelPanics) => tree.initramfs(base, "init", b"#!/usr/bin/bash\nexit 1\n"),
            Some(Fault::RootDoesNotMount) => tree.initramfs(
                base,
                "usr/lib/ostree/ostree-prepare-root",
                b"#!/usr/bin/bash\nexit 1\n",
            ),
            Some(Fault::PidOneFreezes) => tree.unit(
                "bench-freeze",
                "/usr/bin/bash -c \"kill -SEGV 1\"",
                "multi-user.target",
            ),
            Some(Fault::StartNeverFinishes) => {
                tree.unit("bench-hang", "/usr/bin/sleep infinity", "sysinit.target")
            }
            Some(Fault::HealthCheckFails) => tree.executable(
                "usr/lib/offshoot/health/required.d/50-bench",
                b"#!/bin/sh\necho the bench says no\nexit 1\n",
            ),
            Some(Fault::DaemonDoesNotStart) => tree.file(
                "usr/lib/systemd/system/offshoot.service.d/bench.conf",
                "[Service]\nExecStartPre=/bin/false\n",
            ),
        }
    }

    /// The whole root file system: `base` with the overlay, in `tree`, which shares the files of `base`.
    pub fn write_tree(&self, board: Board, base: &Path, trust: &Trust, tree: &Path) -> Result<()> {
        let overlay = tempfile::tempdir()?;
        fs::set_permissions(overlay.path(), fs::Permissions::from_mode(0o755))?;
        self.write_overlay(board, base, trust, overlay.path())?;
        run!("cp", "-al", base, tree)?;
        run!(
            "cp",
            "-a",
            "--remove-destination",
            overlay.path().join("."),
            tree
        )?;
        Ok(())
    }
}

/// A directory that is laid over the base tree.
struct Overlay<'a>(&'a Path);

impl Overlay<'_> {
    /// Offshoot as a distribution would install it.
    fn offshoot(&self, board: Board, trust: &Trust, programs: bool) -> Result<()> {
        if programs {
            for (name, directory) in [
                ("offshoot", "usr/bin"),
                ("offshoot-deployer", "usr/libexec"),
                ("ostree-grub-generator", "usr/lib/ostree"),
            ] {
                let program = board.program(name)?;
                let content =
                    fs::read(&program).with_context(|| format!("reading {}", program.display()))?;
                self.executable(&format!("{directory}/{name}"), &content)?;
            }
        }
        let agent = Path::new(env!("CARGO_MANIFEST_DIR")).join("../agent");
        let copy = |from: &str, to: &str, mode: u32| {
            let from = agent.join(from);
            let content = fs::read(&from).with_context(|| format!("reading {}", from.display()))?;
            self.write(to, &content, mode)
        };
        for (unit, wanted_by) in UNITS {
            let path = format!("usr/lib/systemd/system/{unit}");
            copy(&format!("units/{unit}"), &path, 0o644)?;
            if let Some(directory) = wanted_by {
                self.link(
                    &format!("../{unit}"),
                    &format!("usr/lib/systemd/system/{directory}/{unit}"),
                )?;
            }
        }
        let check = "health/required.d/10-offshoot";
        copy(check, &format!("usr/lib/offshoot/{check}"), 0o755)?;
        self.file("usr/lib/offshoot/config.toml", &config(board))?;
        self.write("usr/lib/offshoot/root.json", &trust.root, 0o644)?;
        self.write("usr/lib/offshoot/ca.pem", &trust.ca, 0o644)
    }

    /// See [`ODD_FILE`]. Its content is the release's, so that no device has it already.
    fn odd_file(&self, version: &str) -> Result<()> {
        self.write(ODD_FILE.trim_start_matches('/'), version.as_bytes(), 0o644)?;
        let path = self.0.join(ODD_FILE.trim_start_matches('/'));
        // Changing the owner drops set-user-id bits and capabilities.
        run!("chown", "1234:5678", &path)?;
        run!("chmod", "6755", &path)?;
        run!(
            "setfattr",
            "-nuser.bench",
            format!("-v{ODD_ATTRIBUTE}"),
            &path
        )?;
        run!(
            "setfattr",
            "-nsecurity.capability",
            format!("-v{ODD_CAPABILITY}"),
            &path
        )?;
        Ok(())
    }

    fn file(&self, path: &str, content: &str) -> Result<()> {
        self.write(path, content.as_bytes(), 0o644)
    }

    fn executable(&self, path: &str, content: &[u8]) -> Result<()> {
        self.write(path, content, 0o755)
    }

    fn write(&self, path: &str, content: &[u8], mode: u32) -> Result<()> {
        let path = self.0.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&path, content).with_context(|| format!("writing {}", path.display()))?;
        Ok(fs::set_permissions(
            &path,
            fs::Permissions::from_mode(mode),
        )?)
    }

    fn link(&self, target: &str, path: &str) -> Result<()> {
        let path = self.0.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        symlink(target, &path).with_context(|| format!("linking {}", path.display()))
    }

    /// A oneshot that runs `command` before `target` is reached.
    fn unit(&self, name: &str, command: &str, target: &str) -> Result<()> {
        self.file(
            &format!("usr/lib/systemd/system/{name}.service"),
            &format!(
                "[Unit]\nDescription=Break this release\nDefaultDependencies=no\nAfter=local-fs.target\n\
                 Before={target}\n\n[Service]\nType=oneshot\nExecStart={command}\nTimeoutStartSec=infinity\n"
            ),
        )?;
        self.link(
            &format!("../{name}.service"),
            &format!("usr/lib/systemd/system/{target}.wants/{name}.service"),
        )
    }

    /// The base initramfs with one file replaced: the kernel unpacks archives that follow each other over each other.
    fn initramfs(&self, base: &Path, name: &str, content: &[u8]) -> Result<()> {
        let path = format!(
            "usr/lib/modules/{}/initramfs.img",
            os::kernel_version(base)?
        );
        let mut archive = fs::read(base.join(&path)).with_context(|| format!("reading {path}"))?;
        // An uncompressed archive starts on a multiple of four; zeros between archives are skipped.
        archive.resize(archive.len().next_multiple_of(512), 0);
        push_cpio(&mut archive, name, 0o100_755, content);
        push_cpio(&mut archive, "TRAILER!!!", 0, b"");
        self.write(&path, &archive, 0o600)
    }
}

/// Bytes that do not compress, the same at every call.
fn noise(length: usize) -> Vec<u8> {
    let mut random = Random(1);
    std::iter::repeat_with(|| random.next().to_le_bytes())
        .flatten()
        .take(length)
        .collect()
}

/// Numbers that look random, from a seed that can be told and given again (splitmix64).
pub struct Random(pub u64);

impl Random {
    #[allow(
        clippy::should_implement_trait,
        reason = "it never ends, so there is nothing to iterate over"
    )]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// Appends one member in cpio's "newc" format; `archive` is aligned to four bytes before and after.
fn push_cpio(archive: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]) {
    // inode, mode, uid, gid, links, mtime, size, device and special device (major, minor), name with its NUL, checksum.
    let fields = [
        1,
        mode as usize,
        0,
        0,
        1,
        0,
        content.len(),
        0,
        0,
        0,
        0,
        name.len() + 1,
        0,
    ];
    archive.extend_from_slice(b"070701");
    for field in fields {
        archive.extend_from_slice(format!("{field:08X}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend_from_slice(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpio_member_has_a_110_byte_header_and_is_padded_to_four() {
        let mut archive = Vec::new();
        push_cpio(&mut archive, "init", 0o100_755, b"#!/x\n");
        assert_eq!(archive.len(), 116 + 8);
        assert_eq!(&archive[..14], b"07070100000001");
        assert_eq!(&archive[14..22], b"000081ED");
        assert_eq!(&archive[54..62], b"00000005");
        assert_eq!(&archive[110..], b"init\0\0#!/x\n\0\0\0");
    }
}
