//! The operator's side: a directory of `offshoot-fleet`, and what is published from it.
//!
//! Owns no format: everything is done by the real programs, `offshoot-fleet` and `ostree`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use offshoot::commit::Commit;

use crate::board::Board;
use crate::cache::Cache;
use crate::release::{Fault, Release, Trust};
use crate::server::Server;
use crate::{host, os, run};

/// What the devices of the test bed follow.
pub const CHANNEL: &str = "stable";

pub struct Fleet {
    board: Board,
    directory: PathBuf,
}

impl Fleet {
    /// A new fleet: keys, an empty repository, metadata without releases, a server's authority.
    pub fn init(board: Board, directory: &Path) -> Result<Self> {
        let fleet = Self {
            board,
            directory: directory.to_owned(),
        };
        host::run(
            fleet
                .command()?
                .args(["init", "--channel", CHANNEL])
                .args(["--hardware", board.hardware()]),
        )?;
        // The authority is made when it serves for the first time.
        drop(Server::of_fleet(directory)?);
        Ok(fleet)
    }

    /// A copy of the fleet in `from`, in `to`; it shares its objects.
    pub fn copy(board: Board, from: &Path, to: &Path) -> Result<Self> {
        fs::create_dir(to)?;
        copy_all(from, to, &["repo", "public"])?;
        // What is published is never rewritten in place.
        run!("cp", "-al", from.join("public"), to.join("public"))?;
        let (from, repository) = (from.join("repo"), to.join("repo"));
        fs::create_dir(&repository)?;
        copy_all(&from, &repository, &["objects"])?;
        // Only objects are never rewritten in place.
        run!(
            "cp",
            "-al",
            from.join("objects"),
            repository.join("objects")
        )?;
        Ok(Self {
            board,
            directory: to.to_owned(),
        })
    }

    /// For images.
    fn trust(&self) -> Result<Trust> {
        let read = |path: &str| {
            let path = self.directory.join(path);
            fs::read(&path).with_context(|| format!("reading {}", path.display()))
        };
        Ok(Trust {
            root: read("root.json")?,
            ca: read("keys/serve-ca.pem")?,
        })
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    pub fn repository(&self) -> PathBuf {
        self.directory.join("repo")
    }

    /// What a web server serves.
    pub fn public(&self) -> PathBuf {
        self.directory.join("public")
    }

    /// Composes `release` from a whole root file system.
    pub fn compose(&self, cache: &Cache, release: &Release) -> Result<Commit> {
        let scratch = cache.scratch()?;
        let tree = scratch.path().join("tree");
        let base = os::base_tree(cache, self.board)?;
        release.write_tree(self.board, &base, &self.trust()?, &tree)?;
        let composed = host::run(
            self.command()?
                .args(["compose", "--timestamp", "1767225600"])
                .args(["--branch", &self.branch()])
                .args(["--release", &release.version])
                .arg("--tree")
                .arg(tree),
        )?;
        let composed: serde_json::Value =
            serde_json::from_str(&composed).context("reading what compose says")?;
        commit(&composed["commit"])
    }

    /// Commits `release` as a difference from the last one that was composed: all that a broken one needs, in a tenth of the time.
    pub fn commit_difference(&self, cache: &Cache, release: &Release) -> Result<Commit> {
        let overlay = cache.scratch()?;
        let base = os::base_tree(cache, self.board)?;
        release.write_overlay(self.board, &base, &self.trust()?, overlay.path())?;
        // Where compose puts it.
        fs::rename(overlay.path().join("etc"), overlay.path().join("usr/etc"))?;
        let commit = run!(
            "ostree",
            "commit",
            format!("--repo={}", self.repository().display()),
            format!("--branch=difference/{}", release.version),
            "--timestamp=2026-01-01 00:00:00 UTC",
            format!("--tree=ref={}", self.branch()),
            format!("--tree=dir={}", overlay.path().display()),
            format!("--add-metadata-string=version={}", release.version),
        )?;
        Ok(commit.trim().parse()?)
    }

    /// Composes `release` and publishes it, with a delta from the release before it.
    pub fn publish(&self, cache: &Cache, release: &Release) -> Result<Commit> {
        let commit = match release.fault {
            // What is missing cannot be laid over anything.
            None | Some(Fault::NoPrograms) => self.compose(cache, release)?,
            Some(_) => self.commit_difference(cache, release)?,
        };
        host::run(
            self.command()?
                .args(["publish", "--channel", CHANNEL])
                .args(["--hardware", self.board.hardware()])
                .args(["--release", &release.version, "--deltas", "1"])
                .arg(commit.to_string()),
        )?;
        Ok(commit)
    }

    fn branch(&self) -> String {
        format!("os/{CHANNEL}/{}", self.board.hardware())
    }

    /// `offshoot-fleet` in this directory, answering in JSON.
    pub(crate) fn command(&self) -> Result<Command> {
        let mut command = Command::new(host::program("offshoot-fleet")?);
        command.arg("--json").arg("--fleet").arg(&self.directory);
        Ok(command)
    }
}

fn copy_all(from: &Path, to: &Path, except: &[&str]) -> Result<()> {
    for entry in fs::read_dir(from).with_context(|| format!("reading {}", from.display()))? {
        let entry = entry?;
        if except.iter().all(|name| entry.file_name() != *name) {
            run!("cp", "-a", entry.path(), to)?;
        }
    }
    Ok(())
}

fn commit(value: &serde_json::Value) -> Result<Commit> {
    Ok(value
        .as_str()
        .with_context(|| format!("{value} is no commit"))?
        .parse()?)
}
