//! The base OS: Debian, as described by the files in `qemu-tests/os/`.
//!
//! Owns the recipe's way to a root file system. It is the same for all releases; [`crate::release`] adds what differs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::cache::{Cache, Ingredients};
use crate::host;

const SUITE: &str = "trixie";

/// The base tree, owned by root, with its kernel and initramfs in `/usr/lib/modules/<version>`.
pub fn base_tree(cache: &Cache) -> Result<PathBuf> {
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("os");
    let ingredients = Ingredients::default().text(SUITE).path(&recipe)?;
    let entry = cache.entry("base", ingredients, |directory| {
        host::timed("building the base OS", || {
            bootstrap(&recipe, &directory.join("tree"))
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

fn bootstrap(recipe: &Path, tree: &Path) -> Result<()> {
    let packages = fs::read_to_string(recipe.join("packages"))?;
    let packages: Vec<&str> = packages
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .collect();
    host::run(
        Command::new("mmdebstrap")
            .arg("--variant=minbase")
            .arg(format!("--include={}", packages.join(",")))
            .arg("--aptopt=Apt::Install-Recommends \"false\"")
            .arg(format!("--dpkgopt={}", recipe.join("dpkg.cfg").display()))
            .arg(format!(
                "--customize-hook={}",
                recipe.join("customize").display()
            ))
            .arg(SUITE)
            .arg(tree)
            // The one initramfs is built by `customize`, when everything that goes into it is there.
            .env("INITRD", "No"),
    )?;
    Ok(())
}
