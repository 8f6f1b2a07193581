//! One release of the test OS: the base tree plus what this release brings, committed to an OSTree repository.
//!
//! Owns what a good release contains and every way in which a release can be bad. The faults are real: a kernel that
//! panics, a root that does not mount, a PID 1 that freezes, and so on down to a health check that says no.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use offshoot::commit::Commit;

use crate::cache::{Cache, Ingredients};
use crate::{host, os, run};

/// What a release does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The kernel finds no init it can run and panics.
    KernelPanics,
    /// The initramfs cannot prepare the root file system and never gets further.
    RootDoesNotMount,
    /// PID 1 crashes and freezes: no reboot, no panic, and nobody pets the watchdog.
    PidOneFreezes,
    /// A service that everything waits for never comes up.
    StartNeverFinishes,
    /// A required health check says no.
    HealthCheckFails,
    /// The agent is not in the release.
    NoAgent,
}

/// A release to be composed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Release {
    /// Told by `/usr/lib/bench-release`.
    pub version: String,
    pub fault: Option<Fault>,
}

impl Release {
    /// A release with nothing wrong.
    pub fn good(version: &str) -> Self {
        Self {
            version: version.to_owned(),
            fault: None,
        }
    }

    /// A release that goes wrong in the way of `fault`.
    pub fn bad(version: &str, fault: Fault) -> Self {
        Self {
            version: version.to_owned(),
            fault: Some(fault),
        }
    }

    /// Writes what this release adds to `base` into `overlay`, an empty directory.
    pub fn write_overlay(&self, base: &Path, overlay: &Path) -> Result<()> {
        let tree = Overlay(overlay);
        tree.file("usr/lib/bench-release", &format!("{}\n", self.version))?;
        match self.fault {
            None => Ok(()),
            Some(Fault::KernelPanics) => tree.initramfs(base, "init", b"#!/nonexistent\n"),
            Some(Fault::RootDoesNotMount) => tree.initramfs(
                base,
                "usr/lib/ostree/ostree-prepare-root",
                b"#!/usr/bin/bash\nexit 1\n",
            ),
            Some(Fault::PidOneFreezes) => {
                tree.unit("bench-freeze", "/usr/bin/kill -SEGV 1", "multi-user.target")
            }
            Some(Fault::StartNeverFinishes) => {
                tree.unit("bench-hang", "/usr/bin/sleep infinity", "sysinit.target")
            }
            Some(Fault::HealthCheckFails) => tree.executable(
                "usr/lib/offshoot/health/required.d/50-bench",
                b"#!/bin/sh\necho the bench says no\nexit 1\n",
            ),
            // Nothing to add: the agent's files are left out where they would be added.
            Some(Fault::NoAgent) => Ok(()),
        }
    }
}

/// A repository with the base tree under the ref `base`, from which releases are made.
pub fn base_repository(cache: &Cache) -> Result<PathBuf> {
    let tree = os::base_tree(cache)?;
    let key = tree.to_string_lossy().into_owned();
    let entry = cache.entry("repository", Ingredients::default().text(&key), |entry| {
        host::timed("committing the base OS", || {
            let repository = entry.join("repo");
            run!(
                "ostree",
                "init",
                "--mode=archive",
                format!("--repo={}", repository.display())
            )?;
            run!(
                "ostree",
                "commit",
                format!("--repo={}", repository.display()),
                "--branch=base",
                "--no-bindings",
                "--timestamp=2026-01-01 00:00:00 UTC",
                format!("--tree=dir={}", tree.display()),
            )?;
            Ok(())
        })
    })?;
    Ok(entry.join("repo"))
}

/// Commits `release` to `repository`, which has the ref `base`, under the ref `release/<version>`.
pub fn commit(cache: &Cache, repository: &Path, release: &Release) -> Result<Commit> {
    let base = os::base_tree(cache)?;
    let overlay = tempfile::tempdir()?;
    fs::set_permissions(overlay.path(), fs::Permissions::from_mode(0o755))?;
    release.write_overlay(&base, overlay.path())?;
    let commit = run!(
        "ostree",
        "commit",
        format!("--repo={}", repository.display()),
        format!("--branch=release/{}", release.version),
        "--timestamp=2026-01-01 00:00:00 UTC",
        "--tree=ref=base",
        format!("--tree=dir={}", overlay.path().display()),
        format!("--add-metadata-string=version={}", release.version),
    )?;
    Ok(commit.trim().parse()?)
}

/// A copy of `repository` that shares its objects.
pub fn copy_repository(repository: &Path, to: &Path) -> Result<()> {
    host::run(Command::new("cp").arg("-al").arg(repository).arg(to))?;
    // Only objects are never rewritten in place.
    run!("rm", "-rf", to.join("refs"))?;
    run!("cp", "-a", repository.join("refs"), to.join("refs"))?;
    run!(
        "cp",
        "-a",
        "--remove-destination",
        repository.join("config"),
        to.join("config")
    )?;
    Ok(())
}

/// A directory that is laid over the base tree.
struct Overlay<'a>(&'a Path);

impl Overlay<'_> {
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

    /// A oneshot that runs `command` before `target` is reached.
    fn unit(&self, name: &str, command: &str, target: &str) -> Result<()> {
        self.file(
            &format!("usr/lib/systemd/system/{name}.service"),
            &format!(
                "[Unit]\nDescription=Break this release\nDefaultDependencies=no\nAfter=local-fs.target\n\
                 Before={target}\n\n[Service]\nType=oneshot\nExecStart={command}\nTimeoutStartSec=infinity\n"
            ),
        )?;
        let wants = self
            .0
            .join(format!("usr/lib/systemd/system/{target}.wants"));
        fs::create_dir_all(&wants)?;
        symlink(
            format!("../{name}.service"),
            wants.join(format!("{name}.service")),
        )?;
        Ok(())
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
