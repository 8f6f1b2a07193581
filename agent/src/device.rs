//! The device: what is observed of it, and the one step that is done to it.
//!
//! Owns the record, the spool, the boot environment and every call of `offshoot-deployer`. [`Device::observe`] reads and changes
//! nothing; [`Device::perform`] carries out one [`Step`]. What a power cut between the writes of a step leaves is a state that
//! [`crate::decide`] has a row for, so nothing here repairs anything. The writes of a step, in their order:
//!
//! | step | writes |
//! |---|---|
//! | `Stage`, `Abandon`, `BeginTrial`, `Confirmed`, `Reject` | the record, once |
//! | `Fetch` | files in the spool (its header says how) |
//! | `Apply`, `Deploy` | the record (the attempt), then the repository or the sysroot, by the deployer |
//! | `Prune`, `Undeploy` | the sysroot, by the deployer |
//! | `Arm`, `Settle` | the boot environment, one write, read back |
//!
//! Before `BeginTrial` records the trial it removes an older verdict on the same commit, which an operator has allowed again. The spool is
//! cleared of everything but the target whenever the record changes; a cut before that leaves files that the next change removes.
//!
//! Knows no server, no policy and no clock but the one it is given.

mod way;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use bootloader_glue::{Bootloader, Error as BootloaderError};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::io::AsyncReadExt as _;

use crate::commit::Commit;
use crate::config::{Config, Paths};
use crate::decide::{Consent, Download, Facts, Step, Verdict};
use crate::delta::Mismatch;
use crate::deployment::{Deployments, Done, Failure};
use crate::fetch::{FetchError, Source, Spool, SpoolError};
use crate::health;
use crate::record::{Damage, FailedWays, Phase, Record, Rejection, Store};
use crate::selftest;
use crate::trust::{Release, Verified};

pub use way::{Kind, Plan};

/// Room in the spool's file system beside what is fetched.
const SPOOL_MARGIN: u64 = 16 << 20;

/// The longest that one run of the deployer may take: a full release on slow flash takes minutes.
const DEPLOYER_LIMIT: Duration = Duration::from_secs(3600);

/// More than any answer of the deployer.
const ANSWER_LIMIT: u64 = 1 << 20;

pub struct Device {
    paths: Paths,
    tries: u8,
    reboot_command: Vec<String>,
    bootloader: Bootloader,
    spool: Spool,
    store: Store,
    record: Record,
}

/// The facts, and what they were read from, for `status`.
#[derive(Clone, Debug)]
pub struct Observed {
    pub facts: Facts,
    pub deployments: Deployments,
    /// Why the boot counter cannot be relied on.
    pub unprotected: Option<BootloaderError>,
    /// Of the release that is to be fetched.
    pub plan: Option<Plan>,
}

/// Why a step was not done.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error(transparent)]
    Delta(#[from] Mismatch),
    /// The deployer's own word.
    #[error(transparent)]
    Deployer(#[from] Failure),
    #[error(transparent)]
    Bootloader(#[from] BootloaderError),
    #[error(
        "the release has no delta from {from} or from nothing, and no objects: publish one (offshoot-fleet publish --full)"
    )]
    NoRoute { from: Commit },
    #[error("{}: {needed} bytes are needed for the download, {free} are free: free some", path.display())]
    NoSpace {
        path: PathBuf,
        needed: u64,
        free: u64,
    },
    #[error(transparent)]
    Other(#[from] anyhow::Error),
}

impl StepError {
    /// As in JSON and the journal's `FAULT`.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Fetch(error) => error.fault.name(),
            Self::Delta(_) => "delta-mismatch",
            Self::Deployer(failure) => failure.kind.name(),
            Self::Bootloader(_) => "bootloader",
            Self::NoRoute { .. } => "no-route",
            Self::NoSpace { .. } => "no-space",
            Self::Other(_) => "device",
        }
    }
}

impl From<SpoolError> for StepError {
    fn from(error: SpoolError) -> Self {
        Self::Other(error.into())
    }
}

impl Device {
    /// Reads the record; tells what of it had to be set aside.
    pub fn open(config: &Config) -> Result<(Self, Damage)> {
        let (store, record, damage) = Store::open(&config.paths.state)?;
        let spool = Spool::open(config.paths.state.join("spool"))?;
        let device = Self {
            paths: config.paths.clone(),
            tries: config.bootloader.tries,
            reboot_command: config.install.reboot_command.clone(),
            bootloader: config.bootloader(),
            spool,
            store,
            record,
        };
        Ok((device, damage))
    }

    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Makes what `change` makes of the record the record, on disk and here, or leaves both.
    pub fn change(&mut self, change: impl FnOnce(&mut Record)) -> Result<()> {
        let mut record = self.record.clone();
        change(&mut record);
        if record != self.record {
            self.store.save(&record).context("saving the record")?;
            self.record = record;
        }
        Ok(())
    }

    /// Reads everything that [`crate::decide`] asks about. `offer` is the newest verified release; `download` and `consent` say what may
    /// be fetched and installed now.
    pub async fn observe(
        &self,
        offer: Option<&Verified<Release>>,
        download: impl Fn(Commit, &Plan) -> Download,
        consent: impl Fn(Commit) -> Consent,
    ) -> Result<Observed> {
        let deployments: Deployments = self
            .deployer(&["status"])
            .await
            .context("reading the deployments")?;
        let booted = health::booted(&self.paths.root)?.with_context(|| {
            format!(
                "{} is not a deployment: Offshoot updates systems that libostree has deployed",
                self.paths.root.display()
            )
        })?;
        let target = self.target();
        let unprotected = self.bootloader.probe().err();
        let (progress, plan) = self.progress(offer, &deployments).await?;
        let facts = Facts {
            booted,
            deployed: deployments
                .deployments
                .iter()
                .map(|deployment| deployment.commit)
                .collect(),
            spare: deployments.deployments.iter().any(|deployment| {
                let needed = [Some(booted), target].contains(&Some(deployment.commit));
                !needed && !deployment.pinned
            }),
            mark: health::mark(&self.paths.kernel_command_line)?,
            environment: self
                .bootloader
                .read()
                .context("reading the boot environment")?,
            verdict: self.verdict()?,
            offer: offer.map(|offer| offer.entry.commit),
            progress,
            download: match (target, &plan) {
                (Some(target), Some(plan)) => download(target, plan),
                (Some(_), None) | (None, _) => Download::NoRoute,
            },
            consent: target.map_or(Consent::AwaitsOperator, consent),
            protected: unprotected.is_none(),
            rehearsing: selftest::is_rehearsing(&self.paths.state),
        };
        Ok(Observed {
            facts,
            deployments,
            unprotected,
            plan,
        })
    }

    /// Does one step. `progress` hears the bytes of the download that are here, and all of them. A step that fails has changed nothing that
    /// `decide` looks at, except for the attempt that it counted first.
    pub async fn perform(
        &mut self,
        step: &Step,
        offer: Option<&Verified<Release>>,
        source: &mut Source,
        now: jiff::Timestamp,
        progress: &mut (dyn FnMut(u64, u64) + Send),
    ) -> Result<(), StepError> {
        match step {
            Step::Wait(_) => {}
            Step::Stage { from, target } => self.enter(Phase::Staging {
                from: *from,
                target: *target,
                attempts: 0,
                failed: FailedWays::default(),
            })?,
            Step::Abandon | Step::Confirmed { .. } => self.enter(Phase::Idle)?,
            Step::Fetch { from, target } => {
                self.fetch(*from, *target, offer, source, progress).await?;
            }
            Step::Apply { from, target } => self.apply(*from, *target, offer).await?,
            Step::Prune { target } => {
                self.deployer::<Done>(&["prune", "--keep", &target.to_string()])
                    .await?;
            }
            Step::BeginTrial { from, target } => {
                self.forget_verdict(*target)?;
                self.enter(Phase::Trial {
                    from: *from,
                    target: *target,
                    attempts: 0,
                })?;
            }
            Step::Arm => self.bootloader.arm(self.tries)?,
            Step::Deploy { target } => {
                self.count_attempt()?;
                self.deployer::<Done>(&["deploy", "--commit", &target.to_string()])
                    .await?;
            }
            Step::Reboot => reboot(&self.reboot_command).await?,
            Step::Reject { target, reason } => {
                self.change(|record| {
                    record.phase = Phase::Idle;
                    let (reason, at) = (reason.clone(), now.as_second());
                    record.reject(*target, Rejection { reason, at });
                })?;
                self.spool.retain(None)?;
            }
            Step::Undeploy { commit } => {
                self.deployer::<Done>(&["undeploy", "--commit", &commit.to_string()])
                    .await?;
            }
            Step::Settle => self.bootloader.settle()?,
        }
        Ok(())
    }

    /// The release that the record is in the middle of.
    fn target(&self) -> Option<Commit> {
        match self.record.phase {
            Phase::Idle => None,
            Phase::Staging { target, .. } | Phase::Trial { target, .. } => Some(target),
        }
    }

    fn enter(&mut self, phase: Phase) -> Result<(), StepError> {
        self.change(|record| record.phase = phase)?;
        Ok(self.spool.retain(self.target().as_ref())?)
    }

    fn count_attempt(&mut self) -> Result<()> {
        self.change(|record| match &mut record.phase {
            Phase::Staging { attempts, .. } | Phase::Trial { attempts, .. } => {
                *attempts = attempts.saturating_add(1);
            }
            Phase::Idle => {}
        })
    }

    /// A verdict that cannot be read is one that says nothing: the rejection then has the bootloader's reason.
    fn verdict(&self) -> Result<Option<Verdict>> {
        let path = self.verdict_path();
        match fs::read(&path) {
            Ok(bytes) => match serde_json::from_slice(&bytes) {
                Ok(verdict) => Ok(Some(verdict)),
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "the verdict is corrupt and says nothing");
                    Ok(None)
                }
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
        }
    }

    fn forget_verdict(&self, target: Commit) -> Result<()> {
        if self
            .verdict()?
            .is_some_and(|verdict| verdict.commit == target)
        {
            let path = self.verdict_path();
            fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
        }
        Ok(())
    }

    fn verdict_path(&self) -> PathBuf {
        self.paths.state.join("verdict.json")
    }

    /// One run of `offshoot-deployer`. Nothing ends it early: a step that is given up goes on to its end, and the next one waits for its lock.
    async fn deployer<T: DeserializeOwned>(&self, arguments: &[&str]) -> Result<T, StepError> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Answer<T> {
            Failed { error: Failure },
            Done(T),
        }
        let program = &self.paths.deployer;
        let what = || format!("{} {}", program.display(), arguments.join(" "));
        let run = async {
            let mut child = tokio::process::Command::new(program)
                .arg("--sysroot")
                .arg(&self.paths.sysroot)
                .arg("--bootloader-generator")
                .arg(&self.paths.bootloader_generator)
                .args(arguments)
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .spawn()
                .with_context(|| format!("starting {}", program.display()))?;
            let mut answer = Vec::new();
            if let Some(stdout) = child.stdout.take() {
                stdout
                    .take(ANSWER_LIMIT)
                    .read_to_end(&mut answer)
                    .await
                    .with_context(|| format!("reading from {}", what()))?;
            }
            let status = child
                .wait()
                .await
                .with_context(|| format!("waiting for {}", what()))?;
            anyhow::Ok((answer, status))
        };
        let Ok(ended) = tokio::time::timeout(DEPLOYER_LIMIT, run).await else {
            return Err(anyhow::anyhow!("{} runs for more than an hour", what()).into());
        };
        let (answer, status) = ended?;
        match serde_json::from_slice::<Answer<T>>(&answer) {
            Ok(Answer::Done(done)) if status.success() => Ok(done),
            Ok(Answer::Failed { error }) => Err(StepError::Deployer(error)),
            // A crash, the memory limit, the OOM killer: one operation is lost, and tried again.
            Ok(Answer::Done(_)) | Err(_) => {
                Err(anyhow::anyhow!("{} ended with {status}", what()).into())
            }
        }
    }
}

/// Asks for the reboot, and does not wait for it.
pub async fn reboot(command: &[String]) -> Result<()> {
    let [program, arguments @ ..] = command else {
        bail!("install.reboot_command is empty: name the program that reboots the device");
    };
    let status = tokio::process::Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .status()
        .await
        .with_context(|| format!("starting {program}"))?;
    if !status.success() {
        bail!("{program} ended with {status}, so the device is not rebooting");
    }
    Ok(())
}

/// The record's files that were set aside, for whoever reports it.
pub fn damaged(damage: &Damage, state: &Path) -> Vec<PathBuf> {
    match damage {
        Damage::None => Vec::new(),
        Damage::OneCopy(path) => vec![path.clone()],
        Damage::BothCopies => (0..2)
            .map(|copy| state.join(format!("record.{copy}.corrupt")))
            .collect(),
    }
}
