//! The health checks of a boot, and the confirmation after them.
//!
//! `offshoot health` runs before `boot-complete.target`, `offshoot confirm` after it. Both are offline: no network, no clock, no
//! daemon. Checks are executables in `required.d` and `wanted.d` below the health directories; of two with the same name the
//! later directory's counts, and a link to `/dev/null` masks one. Each has a hard timeout, and all of them together another.
//!
//! On a trial boot a failed required check ends the trial at once. Writes, in the order that a power cut may interrupt:
//! 1. `verdict.json` (fsynced): why. Cut here: the next boot counts on, and may still succeed.
//! 2. the counter is exhausted (one environment write): the bootloader falls back from now on.
//! 3. reboot.
//!
//! On any other boot a failure is only reported: a fallback never reboots for its health.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result};
use bootloader_glue::protocol::Mark;
use rustix::process::{Pid, Signal, kill_process_group};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout_at};

use crate::commit::Commit;
use crate::config::Config;
use crate::decide::Verdict;
use crate::record::{self, Phase};
use crate::selftest;

/// What the checks said on one boot: `/run/offshoot/health.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    pub commit: Option<Commit>,
    pub healthy: bool,
    pub checks: Vec<Check>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Check {
    pub name: String,
    pub required: bool,
    pub outcome: Outcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Outcome {
    Passed,
    Failed { code: i32 },
    Killed { signal: i32 },
    TimedOut,
    NotStarted { error: String },
}

impl Report {
    pub fn failed(&self) -> Vec<String> {
        let failed = self
            .checks
            .iter()
            .filter(|check| check.required && check.outcome != Outcome::Passed);
        failed.map(|check| check.name.clone()).collect()
    }
}

/// What `offshoot health` ended with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    Healthy,
    /// Unhealthy, and nothing to do about it: this boot is not on trial.
    Unhealthy,
    /// Unhealthy on trial: the counter is exhausted and the device is to reboot now.
    FallBack,
}

/// Runs the checks, reports, and on a trial that failed gives the word to the bootloader. The caller reboots.
pub async fn run(config: &Config) -> Result<(Ending, Report)> {
    let booted = booted(&config.paths.root)?;
    let mark = mark(&config.paths.kernel_command_line)?;
    let each = Duration::from_secs(config.health.check_timeout);
    let report = Report::gather(
        booted,
        &config.paths.health,
        each,
        Duration::from_secs(config.health.timeout),
    )
    .await?;
    fs::create_dir_all(&config.paths.run)
        .with_context(|| format!("creating {}", config.paths.run.display()))?;
    record::replace(
        &config.paths.run.join("health.json"),
        &serde_json::to_vec(&report)?,
    )?;
    if report.healthy {
        return Ok((Ending::Healthy, report));
    }
    // A rehearsal puts a good system on trial, to see it given up.
    if selftest::is_rehearsing(&config.paths.state) {
        return Ok((Ending::Unhealthy, report));
    }
    let on_trial = match (mark, record::peek(&config.paths.state)?.phase) {
        (Mark::Trial { .. }, Phase::Trial { target, .. }) => {
            booted.is_none_or(|booted| booted == target)
        }
        // The record is lost: the bootloader alone says that this is a trial.
        (Mark::Trial { .. }, Phase::Idle | Phase::Staging { .. }) => true,
        (Mark::Normal | Mark::Fallback(_), _) => false,
    };
    if !on_trial {
        return Ok((Ending::Unhealthy, report));
    }
    if let Some(commit) = booted {
        let verdict = Verdict {
            commit,
            checks: report.failed(),
        };
        record::replace(
            &config.paths.state.join("verdict.json"),
            &serde_json::to_vec(&verdict)?,
        )?;
    }
    config
        .bootloader()
        .exhaust()
        .context("exhausting the boot counter")?;
    Ok((Ending::FallBack, report))
}

/// The trial is kept: one environment write. Not an error when nothing is on trial; what a rehearsal has armed is not a trial to be kept.
pub fn confirm(config: &Config) -> Result<bootloader_glue::Confirmed> {
    if selftest::is_rehearsing(&config.paths.state) {
        return Ok(bootloader_glue::Confirmed::NotArmed);
    }
    config
        .bootloader()
        .confirm()
        .context("confirming the trial in the boot environment")
}

/// What the bootloader told this boot.
pub fn mark(kernel_command_line: &Path) -> Result<Mark> {
    let path = kernel_command_line;
    let line = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    Mark::from_kernel_command_line(&line).with_context(|| format!("reading {}", path.display()))
}

/// The commit of the running deployment, found as libostree finds it: the deployment directory that *is* the root directory.
/// `None` when the root is not a deployment.
pub fn booted(root: &Path) -> Result<Option<Commit>> {
    let deployments = root.join("sysroot/ostree/deploy");
    let root = fs::metadata(root).with_context(|| format!("reading {}", root.display()))?;
    for os in list(&deployments)? {
        for deployment in list(&os.join("deploy"))? {
            let name = deployment
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or("");
            let Some(Ok(commit)) = name
                .split_once('.')
                .map(|(commit, _)| commit.parse::<Commit>())
            else {
                continue;
            };
            let found = fs::metadata(&deployment)
                .with_context(|| format!("reading {}", deployment.display()))?;
            if found.is_dir() && (found.dev(), found.ino()) == (root.dev(), root.ino()) {
                return Ok(Some(commit));
            }
        }
    }
    Ok(None)
}

impl Report {
    /// Runs every check below `directories`, required ones first, one after the other.
    pub async fn gather(
        commit: Option<Commit>,
        directories: &[PathBuf],
        each: Duration,
        all: Duration,
    ) -> Result<Self> {
        let end = Instant::now() + all;
        let mut checks = Vec::new();
        for (kind, required) in [("required.d", true), ("wanted.d", false)] {
            for (name, path) in executables(directories, kind)? {
                let deadline = end.min(Instant::now() + each);
                checks.push(Check {
                    name,
                    required,
                    outcome: check(&path, deadline).await,
                });
            }
        }
        let healthy = checks
            .iter()
            .all(|check| !check.required || check.outcome == Outcome::Passed);
        Ok(Self {
            commit,
            healthy,
            checks,
        })
    }
}

fn executables(directories: &[PathBuf], kind: &str) -> Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    for directory in directories {
        for path in list(&directory.join(kind))? {
            let Some(name) = path
                .file_name()
                .map(|name| name.to_string_lossy().into_owned())
            else {
                continue;
            };
            // A dangling link is a check that cannot start, not one that may be skipped.
            let runs = match fs::metadata(&path) {
                Ok(meta) if meta.is_file() => meta.permissions().mode() & 0o111 != 0,
                Ok(_) => false,
                Err(_) => true,
            };
            if runs {
                found.insert(name, path);
            } else {
                found.remove(&name);
            }
        }
    }
    Ok(found)
}

async fn check(path: &Path, deadline: Instant) -> Outcome {
    let mut command = tokio::process::Command::new(path);
    // Its own process group, so that what it started ends with it.
    command
        .stdin(Stdio::null())
        .process_group(0)
        .kill_on_drop(true);
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            return Outcome::NotStarted {
                error: error.to_string(),
            };
        }
    };
    let group = child
        .id()
        .and_then(|id| i32::try_from(id).ok())
        .and_then(Pid::from_raw);
    let ended = timeout_at(deadline, child.wait()).await;
    if let Some(group) = group
        && let Err(error) = kill_process_group(group, Signal::KILL)
        && error != rustix::io::Errno::SRCH
    {
        tracing::warn!(check = %path.display(), %error, "could not end what the check left running");
    }
    match ended {
        Err(_) => Outcome::TimedOut,
        Ok(Err(error)) => Outcome::NotStarted {
            error: error.to_string(),
        },
        Ok(Ok(status)) => match (status.code(), status.signal()) {
            (Some(0), _) => Outcome::Passed,
            (Some(code), _) => Outcome::Failed { code },
            (None, signal) => Outcome::Killed {
                signal: signal.unwrap_or(0),
            },
        },
    }
}

/// The entries of a directory that need not exist, in order.
fn list(directory: &Path) -> Result<Vec<PathBuf>> {
    let read = || -> io::Result<Vec<PathBuf>> {
        fs::read_dir(directory)?
            .map(|entry| Ok(entry?.path()))
            .collect()
    };
    match read() {
        Ok(mut paths) => {
            paths.sort();
            Ok(paths)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| format!("reading {}", directory.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commit::Sha256;

    fn script(directory: &Path, path: &str, text: &str) {
        let path = directory.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        // By another process: a child of another test may inherit our descriptor, and what is open for writing cannot be run.
        let written = std::process::Command::new("sh")
            .args([
                "-c",
                "printf '#!/bin/sh\\n%s\\n' \"$1\" > \"$0\" && chmod 755 \"$0\"",
            ])
            .arg(&path)
            .arg(text)
            .status();
        assert!(written.unwrap().success());
    }

    async fn gather(directory: &Path, each: Duration) -> Report {
        let directories = [directory.join("usr"), directory.join("etc")];
        Report::gather(None, &directories, each, Duration::from_secs(60))
            .await
            .unwrap()
    }

    #[tokio::test]
    async fn only_a_required_check_decides_and_every_outcome_is_told_apart() {
        let temp = tempfile::tempdir().unwrap();
        script(temp.path(), "usr/required.d/10-good", "exit 0");
        script(temp.path(), "usr/wanted.d/bad", "exit 7");
        let report = gather(temp.path(), Duration::from_secs(30)).await;
        let check = |name: &str, required, outcome| Check {
            name: name.to_owned(),
            required,
            outcome,
        };
        let good = check("10-good", true, Outcome::Passed);
        let bad = check("bad", false, Outcome::Failed { code: 7 });
        assert_eq!(
            report,
            Report {
                commit: None,
                healthy: true,
                checks: vec![good.clone(), bad.clone()]
            }
        );

        script(temp.path(), "etc/required.d/20-killed", "kill -9 $$");
        script(
            temp.path(),
            "etc/required.d/30-hangs",
            "exec cat /dev/zero > /dev/null",
        );
        let report = gather(temp.path(), Duration::from_millis(300)).await;
        let killed = check("20-killed", true, Outcome::Killed { signal: 9 });
        let hangs = check("30-hangs", true, Outcome::TimedOut);
        assert_eq!(report.checks, [good, killed, hangs, bad]);
        assert_eq!(
            (report.healthy, report.failed()),
            (false, vec!["20-killed".to_owned(), "30-hangs".to_owned()])
        );
    }

    #[tokio::test]
    async fn the_operator_overrides_and_masks_the_images_checks_by_name() {
        let temp = tempfile::tempdir().unwrap();
        script(temp.path(), "usr/required.d/a", "exit 1");
        script(temp.path(), "usr/required.d/b", "exit 1");
        script(temp.path(), "etc/required.d/a", "exit 0");
        std::os::unix::fs::symlink("/dev/null", temp.path().join("etc/required.d/b")).unwrap();
        let report = gather(temp.path(), Duration::from_secs(30)).await;
        assert_eq!(
            report.checks,
            [Check {
                name: "a".to_owned(),
                required: true,
                outcome: Outcome::Passed
            }]
        );
    }

    #[tokio::test]
    async fn a_required_check_that_cannot_start_fails() {
        let temp = tempfile::tempdir().unwrap();
        fs::create_dir_all(temp.path().join("usr/required.d")).unwrap();
        std::os::unix::fs::symlink("/nowhere", temp.path().join("usr/required.d/a")).unwrap();
        assert_eq!(
            gather(temp.path(), Duration::from_secs(30)).await.failed(),
            ["a"]
        );
    }

    #[test]
    fn the_booted_deployment_is_the_directory_that_is_the_root() {
        let temp = tempfile::tempdir().unwrap();
        let commit = Commit(Sha256::of(b"x"));
        assert_eq!(booted(temp.path()).unwrap(), None);
        let deploy = temp.path().join("sysroot/ostree/deploy/debian/deploy");
        fs::create_dir_all(&deploy).unwrap();
        fs::create_dir(deploy.join(format!("{}.0", Commit(Sha256::of(b"y"))))).unwrap();
        fs::write(deploy.join(format!("{commit}.0.origin")), "").unwrap();
        assert_eq!(booted(temp.path()).unwrap(), None);
        // A bind mount makes them one directory on a device; a link does here.
        std::os::unix::fs::symlink(temp.path(), deploy.join(format!("{commit}.0"))).unwrap();
        assert_eq!(booted(temp.path()).unwrap(), Some(commit));
    }
}
