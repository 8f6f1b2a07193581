//! The base OS: Debian, as described by the files in `qemu-tests/os/`.
//!
//! Owns the recipe's way to a root file system. It is the same for all releases; [`crate::release`] adds what differs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::board::Board;
use crate::cache::{Cache, Ingredients};
use crate::host;

const SUITE: &str = "trixie";

/// The base tree, owned by root, with its kernel and initramfs in `/usr/lib/modules/<version>`.
pub fn base_tree(cache: &Cache, board: Board) -> Result<PathBuf> {
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("os");
    let architecture = board.architecture();
    let ingredients = Ingredients::default()
        .text(SUITE)
        .text(architecture)
        .path(&recipe)?;
    let name = match board {
        Board::Pc => "base",
        Board::Virt(_) => "base-arm64",
    };
    let entry = cache.entry(name, ingredients, |directory| {
        host::timed(&format!("building the base OS for {architecture}"), || {
            bootstrap(
                &recipe,
                architecture,
                &Packages::default(),
                &directory.join("tree"),
            )
        })
    })?;
    Ok(entry.join("tree"))
}

/// Which of Debian's packages an OS is made of, beside those of the recipe.
#[derive(Clone, Copy, Default)]
pub struct Packages<'a> {
    pub more: &'a [&'a str],
    /// As in sources.list; without any, the main archive.
    pub sources: &'a [&'a str],
    /// As in apt_preferences(5).
    pub preferences: &'a str,
}

/// Another tree like the base tree for a PC, of other packages.
pub fn tree_of(cache: &Cache, name: &str, packages: &Packages<'_>) -> Result<PathBuf> {
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("os");
    let ingredients = [packages.more, packages.sources, &[packages.preferences]].concat();
    let ingredients = (ingredients.iter())
        .fold(Ingredients::default().text(SUITE), |all, text| {
            all.text(text)
        })
        .path(&recipe)?;
    let entry = cache.entry(name, ingredients, |directory| {
        host::timed(&format!("building {name}"), || {
            bootstrap(&recipe, "amd64", packages, &directory.join("tree"))
        })
    })?;
    Ok(entry.join("tree"))
}

/// The version of the only kernel in `tree`.
pub fn kernel_version(tree: &Path) -> Result<String> {
    let modules = tree.join("usr/lib/modules");
    let mut versions = fs::read_dir(&modules)
        .with_context(|| format!("reading {}", modules.display()))?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<Vec<_>>>()?;
    anyhow::ensure!(
        versions.len() == 1,
        "{}: expected one kernel, found {versions:?}",
        modules.display()
    );
    Ok(versions.remove(0))
}

/// Programs of another architecture run under qemu-user, when the kernel is told so. Where no systemd has done it, as in a container, this does.
fn let_foreign_programs_run(architecture: &str) -> Result<()> {
    const KERNEL: &str = "/proc/sys/fs/binfmt_misc";
    if host::run(Command::new("arch-test").arg(architecture)).is_ok() {
        return Ok(());
    }
    if !Path::new(KERNEL).join("register").exists() {
        host::run(Command::new("mount").args(["-t", "binfmt_misc", "binfmt_misc", KERNEL]))?;
    }
    let format = "/usr/lib/binfmt.d/qemu-aarch64.conf";
    let format = fs::read(format).with_context(|| format!("reading {format}"))?;
    fs::write(Path::new(KERNEL).join("register"), format)
        .with_context(|| format!("telling {KERNEL} how arm64 programs are run"))
}

fn bootstrap(recipe: &Path, architecture: &str, more: &Packages<'_>, tree: &Path) -> Result<()> {
    if architecture == "arm64" {
        let_foreign_programs_run(architecture)?;
    }
    let packages = fs::read_to_string(recipe.join("packages"))?
        + &fs::read_to_string(recipe.join(format!("packages.{architecture}")))?;
    let packages: Vec<&str> = packages
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .chain(more.more.iter().copied())
        .collect();
    let preferences = tempfile::NamedTempFile::new()?;
    fs::write(preferences.path(), more.preferences)?;
    let preferences = preferences.path().display();
    host::run(
        Command::new("mmdebstrap")
            .arg("--variant=minbase")
            .arg(format!("--arch={architecture}"))
            .arg(format!("--include={}", packages.join(",")))
            .arg("--aptopt=Apt::Install-Recommends \"false\"")
            .arg(format!("--dpkgopt={}", recipe.join("dpkg.cfg").display()))
            .arg(format!(
                "--customize-hook={}",
                recipe.join("customize").display()
            ))
            // Only while it is made.
            .arg(format!(
                "--setup-hook=install -Dm644 {preferences} \"$1/etc/apt/preferences.d/bench\""
            ))
            .arg("--customize-hook=rm \"$1/etc/apt/preferences.d/bench\"")
            .arg(SUITE)
            .arg(tree)
            .args(more.sources)
            // The one initramfs is built by `customize`, when everything that goes into it is there.
            .env("INITRD", "No"),
    )?;
    Ok(())
}
