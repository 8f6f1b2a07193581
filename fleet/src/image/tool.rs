//! The build host's programs, run so that what they make depends on nothing but what they are given.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

/// Each program, and the package of Debian that has it.
const PACKAGES: [(&str, &str); 9] = [
    ("mke2fs", "e2fsprogs"),
    ("debugfs", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    ("mkfs.vfat", "dosfstools"),
    ("mmd", "mtools"),
    ("mcopy", "mtools"),
    ("sfdisk", "fdisk"),
    ("grub-mkimage", "grub-common and grub-efi-amd64-bin"),
    ("mkimage", "u-boot-tools"),
];

/// A directory for what is being made, and the time that everything made says it was made at.
pub(super) struct Workshop {
    directory: PathBuf,
    pub time: u64,
}

impl Workshop {
    /// In `directory`, which exists.
    pub(super) fn new(directory: &Path, time: u64) -> Self {
        Self {
            directory: directory.to_owned(),
            time,
        }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    pub(super) fn tool(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        // Where file systems are made is not on an ordinary user's path.
        let mut path = std::env::var_os("PATH").unwrap_or_default();
        path.push(":/usr/sbin:/sbin");
        command
            .env_clear()
            .env("PATH", path)
            .env("LC_ALL", "C")
            .env("TZ", "UTC")
            .env("TMPDIR", &self.directory)
            .env("SOURCE_DATE_EPOCH", self.time.to_string())
            .env("E2FSPROGS_FAKE_TIME", self.time.to_string())
            .env("MTOOLSRC", "/dev/null")
            // It compares a file system's size with the one that a partition table there might say.
            .env("MTOOLS_SKIP_CHECK", "1")
            .current_dir(&self.directory);
        command
    }

    /// Runs a program that reads `input`, which must succeed. What it says on standard error.
    pub(super) fn run(&self, command: &mut Command, input: &[u8]) -> Result<Vec<u8>> {
        let program = command.get_program().to_string_lossy().into_owned();
        let order = self.path("input");
        fs::write(&order, input).with_context(|| format!("writing {}", order.display()))?;
        let file =
            fs::File::open(&order).with_context(|| format!("reading {}", order.display()))?;
        let output = command.stdin(file).stdout(Stdio::null()).output();
        let output = output.with_context(|| {
            let package = PACKAGES.iter().find(|(name, _)| *name == program);
            let package = package.map_or(program.as_str(), |(_, package)| package);
            format!("starting {program}: install {package}")
        })?;
        ensure!(
            output.status.success(),
            "{program}: {}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(output.stderr)
    }
}
