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

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use bootloader_glue::{Bootloader, Error as BootloaderError};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt as _;

use crate::commit::Commit;
use crate::config::{Config, Paths};
use crate::decide::{Consent, Download, Facts, Progress, Step, Verdict};
use crate::delta::{self, Mismatch};
use crate::deployment::{Deployments, Done, Failure, Missing, Stored};
use crate::fetch::{FetchError, Name, Source, Spool, SpoolError, Wanted};
use crate::health;
use crate::objects::{self, Object};
use crate::record::{Damage, Phase, Record, Rejection, Store};
use crate::route::{self, Chain};
use crate::selftest;
use crate::trust::schema::{Delta, File, Manifest};
use crate::trust::{Release, Verified};

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

/// How the target would be fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    pub way: Kind,
    /// The deployment that the next delta starts from; none: from nothing, or objects.
    pub from: Option<Commit>,
    /// Bytes of the whole download, and those that are not here yet.
    pub total: u64,
    pub missing: u64,
}

/// What is fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    Deltas,
    Objects,
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
                way: 0,
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
                    record.rejections.insert(
                        *target,
                        Rejection {
                            reason: reason.clone(),
                            at: now.as_second(),
                        },
                    );
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

    async fn progress(
        &self,
        offer: Option<&Verified<Release>>,
        deployments: &Deployments,
    ) -> Result<(Progress, Option<Plan>)> {
        let Phase::Staging { target, .. } = self.record.phase else {
            return Ok((Progress::Missing, None));
        };
        if !self.stored(&[target]).await?.is_empty() {
            return Ok((Progress::Stored, None));
        }
        let Some(way) = self.way(offer, deployments).await? else {
            return Ok((Progress::Missing, None));
        };
        let (files, plan) = (self.files(target, &way), way.plan());
        // An index is not yet what it names.
        if matches!(way, Way::Index(_)) {
            return Ok((Progress::Missing, Some(plan)));
        }
        for file in files {
            if !file.slot.holds(file.length, &file.sha256)? {
                return Ok((Progress::Missing, Some(plan)));
            }
        }
        Ok((Progress::Spooled, Some(plan)))
    }

    /// How the recorded target is reached from what is here, past the ways that have failed.
    async fn way<'a>(
        &self,
        offer: Option<&'a Verified<Release>>,
        deployments: &Deployments,
    ) -> Result<Option<Way<'a>>> {
        let Phase::Staging { target, way, .. } = self.record.phase else {
            return Ok(None);
        };
        let Some(offer) = offer.filter(|offer| offer.entry.commit == target) else {
            return Ok(None);
        };
        let manifest = &offer.manifest;
        // Releases on the way that a delta has led to before.
        let between: Vec<Commit> = manifest
            .deltas
            .iter()
            .filter_map(|delta| delta.to)
            .collect();
        let between = self.stored(&between).await?;
        let has = |commit: Commit| {
            let mut deployed = deployments.deployments.iter();
            between.contains(&commit) || deployed.any(|deployment| deployment.commit == commit)
        };
        let mut missing = Vec::new();
        for delta in &manifest.deltas {
            let here = self.present(route::goal(manifest, delta), delta)?;
            missing.push(delta.download().unwrap_or(u64::MAX).saturating_sub(here));
        }
        let [from_here, from_nothing] = route::chains(manifest, has, &missing);
        let objects = match &manifest.objects {
            Some(objects) if from_here.is_none() || way > 0 => {
                Some(self.objects(target, &objects.index).await?)
            }
            Some(_) | None => None,
        };
        let deltas = |chain| Way::deltas(chain, manifest);
        let mut ways: Vec<_> = from_here.and_then(deltas).into_iter().collect();
        let mut rest: Vec<_> = objects.into_iter().collect();
        rest.extend(from_nothing.and_then(deltas));
        // The fewer bytes first; an index alone is worth it where it is small beside the delta.
        rest.sort_by_key(|way| way.plan().missing);
        ways.extend(rest);
        let last = ways.len().saturating_sub(1);
        Ok(ways.into_iter().nth(usize::from(way).min(last)))
    }

    /// The objects of the index that are not in the repository, or the index, if it is not here.
    async fn objects<'a>(&self, target: Commit, index: &'a File) -> Result<Way<'a>> {
        let slot = self.spool.slot(&target, Name::Index);
        if index.length > objects::INDEX_LIMIT || !slot.holds(index.length, &index.sha256)? {
            return Ok(Way::Index(index));
        }
        let path = slot.path();
        let bytes = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        let all = objects::parse(&bytes)?;
        let answer: Missing = self.deployer(&["missing", "--index", text(&path)?]).await?;
        let missing = answer
            .of(all.len())
            .context("the deployer speaks of another index")?;
        let objects: Vec<_> = all
            .into_iter()
            .zip(missing)
            .filter_map(|(object, missing)| missing.then_some(object))
            .collect();
        let mut here = 0;
        for object in &objects {
            let slot = self
                .spool
                .slot(&target, Name::Object(object.kind, object.checksum));
            here += slot.present()?.min(object.length);
        }
        Ok(Way::Objects { objects, here })
    }

    fn present(&self, to: Commit, delta: &Delta) -> Result<u64> {
        let mut present = 0;
        for (name, file) in delta_files(delta) {
            present += self.spool.slot(&to, name).present()?.min(file.length);
        }
        Ok(present)
    }

    /// What the next step on the way needs in the spool.
    fn files(&self, target: Commit, way: &Way<'_>) -> Vec<Wanted> {
        let wanted = |to: Commit, name: Name, path: String, length, sha256| Wanted {
            path,
            length,
            sha256,
            slot: self.spool.slot(&to, name),
        };
        match way {
            Way::Deltas { to, hop, .. } => delta_files(hop)
                .map(|(name, file)| {
                    wanted(*to, name, file.path.to_string(), file.length, file.sha256)
                })
                .collect(),
            Way::Index(index) => vec![wanted(
                target,
                Name::Index,
                index.path.to_string(),
                index.length,
                index.sha256,
            )],
            Way::Objects { objects, .. } => objects
                .iter()
                .map(|object| {
                    let name = Name::Object(object.kind, object.checksum);
                    wanted(target, name, object.path(), object.length, object.sha256)
                })
                .collect(),
        }
    }

    async fn fetch(
        &mut self,
        from: Commit,
        target: Commit,
        offer: Option<&Verified<Release>>,
        source: &mut Source,
        progress: &mut (dyn FnMut(u64, u64) + Send),
    ) -> Result<(), StepError> {
        let deployments: Deployments = self.deployer(&["status"]).await?;
        let way = self.way(offer, &deployments).await?;
        let way = way.ok_or(StepError::NoRoute { from })?;
        if let Way::Index(index) = &way
            && index.length > objects::INDEX_LIMIT
        {
            return Err(anyhow::anyhow!(
                "the index of objects has {} bytes, and at most {} are read: publish a delta from nothing",
                index.length,
                objects::INDEX_LIMIT
            )
            .into());
        }
        let Plan { total, missing, .. } = way.plan();
        let unpacked = way.unpacked().to_string();
        self.deployer::<Done>(&["preflight", "--unpacked", &unpacked])
            .await?;
        self.has_room(missing)?;
        let files = self.files(target, &way);
        let fetched = if let Way::Objects { here, .. } = &way {
            let mut done = *here;
            let count = &mut |length| {
                done += length;
                progress(done.min(total), total);
            };
            // A whole file with a wrong content is known by now: it would be here for ever.
            for file in &files {
                if file.slot.path().exists() && !file.slot.holds(file.length, &file.sha256)? {
                    fs::remove_file(file.slot.path()).context("removing a corrupt file")?;
                }
            }
            source.many(&files, count).await
        } else {
            let before = total - files.iter().map(|file| file.length).sum::<u64>().min(total);
            let mut done = 0;
            let mut fetched = Ok(());
            for file in &files {
                let told = &mut |here| progress(before + done + here, total);
                fetched = source
                    .part(&file.path, file.length, &file.sha256, &file.slot, told)
                    .await;
                if fetched.is_err() {
                    break;
                }
                done += file.length;
            }
            fetched
        };
        if let Err(error) = fetched {
            if error.is_of_the_file() {
                self.give_way_up()?;
            }
            return Err(error.into());
        }
        Ok(())
    }

    /// What is wrong with the delta itself counts as an attempt, too: it is as wrong the next time.
    async fn apply(
        &mut self,
        from: Commit,
        target: Commit,
        offer: Option<&Verified<Release>>,
    ) -> Result<(), StepError> {
        let deployments: Deployments = self.deployer(&["status"]).await?;
        let way = self.way(offer, &deployments).await?;
        let way = way.ok_or(StepError::NoRoute { from })?;
        self.count_attempt()?;
        let outcome = self.store_release(target, &way).await;
        if outcome.is_err() {
            self.give_way_up()?;
            return outcome;
        }
        // Stored: the spool is room for others.
        self.spool.retain(None)?;
        if matches!(way, Way::Deltas { to, .. } if to != target) {
            // A release on the way; what comes after it has its own attempts.
            self.change(|record| {
                if let Phase::Staging { attempts, .. } = &mut record.phase {
                    *attempts = 0;
                }
            })?;
        }
        Ok(())
    }

    async fn store_release(&self, target: Commit, way: &Way<'_>) -> Result<(), StepError> {
        let commit = target.to_string();
        match way {
            Way::Index(_) => Err(anyhow::anyhow!("the objects are not here").into()),
            Way::Objects { .. } => {
                let spool = self.spool.directory(&target);
                let index = self.spool.slot(&target, Name::Index).path();
                let arguments = [
                    "import",
                    "--index",
                    text(&index)?,
                    "--spool",
                    text(&spool)?,
                    "--commit",
                    &commit,
                ];
                self.deployer::<Done>(&arguments).await.map(drop)
            }
            Way::Deltas { hop, to, .. } => {
                if hop.superblock.length > delta::SUPERBLOCK_LIMIT {
                    return Err(StepError::Delta(Mismatch::TooLong {
                        length: hop.superblock.length,
                        limit: delta::SUPERBLOCK_LIMIT,
                    }));
                }
                let path = self.spool.slot(to, Name::Superblock).path();
                let superblock =
                    fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
                delta::check(&superblock, hop, *to)?;
                drop(superblock);
                let (spool, to) = (self.spool.directory(to), to.to_string());
                let arguments = ["apply", "--spool", text(&spool)?, "--commit", &to];
                self.deployer::<Done>(&arguments).await.map(drop)
            }
        }
    }

    /// The next best way from now on, if there is one: remembered across reboots.
    fn give_way_up(&mut self) -> Result<()> {
        self.change(|record| {
            if let Phase::Staging { way, .. } = &mut record.phase {
                *way = way.saturating_add(1);
            }
        })
    }

    /// Which of the commits are complete in the repository.
    async fn stored(&self, commits: &[Commit]) -> Result<Vec<Commit>, StepError> {
        if commits.is_empty() {
            return Ok(Vec::new());
        }
        let commits: Vec<String> = commits.iter().map(Commit::to_string).collect();
        let mut arguments = vec!["stored"];
        for commit in &commits {
            arguments.extend(["--commit", commit]);
        }
        let stored: Stored = self.deployer(&arguments).await?;
        Ok(stored.complete)
    }

    fn has_room(&self, missing: u64) -> Result<(), StepError> {
        let path = &self.paths.state;
        let stat = rustix::fs::statvfs(path)
            .map_err(io::Error::from)
            .with_context(|| format!("reading {}", path.display()))?;
        let (needed, free) = (
            missing.saturating_add(SPOOL_MARGIN),
            stat.f_bavail.saturating_mul(stat.f_frsize),
        );
        if free < needed {
            let path = path.clone();
            return Err(StepError::NoSpace { path, needed, free });
        }
        Ok(())
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

/// A way to the target, and where on it the device is.
enum Way<'a> {
    /// `hop` is the next delta, to `to`; the sizes are of all that follow, too.
    Deltas {
        from: Option<Commit>,
        to: Commit,
        hop: &'a Delta,
        total: u64,
        missing: u64,
    },
    Index(&'a File),
    /// Those that are not in the repository; `here` of their bytes are in the spool.
    Objects {
        objects: Vec<Object>,
        here: u64,
    },
}

impl<'a> Way<'a> {
    fn deltas(chain: Chain<'a>, manifest: &Manifest) -> Option<Self> {
        let hop = *chain.hops.first()?;
        Some(Self::Deltas {
            from: hop.from,
            to: route::goal(manifest, hop),
            hop,
            total: chain.total,
            missing: chain.missing,
        })
    }

    fn plan(&self) -> Plan {
        match self {
            Self::Deltas {
                from,
                total,
                missing,
                ..
            } => Plan {
                way: Kind::Deltas,
                from: *from,
                total: *total,
                missing: *missing,
            },
            Self::Index(index) => Plan {
                way: Kind::Objects,
                from: None,
                total: index.length,
                missing: index.length,
            },
            Self::Objects { objects, here } => {
                let total = objects
                    .iter()
                    .fold(0u64, |sum, object| sum.saturating_add(object.length));
                Plan {
                    way: Kind::Objects,
                    from: None,
                    total,
                    missing: total.saturating_sub(*here),
                }
            }
        }
    }

    /// Bytes that the next step adds to the repository.
    fn unpacked(&self) -> u64 {
        match self {
            Self::Deltas { hop, .. } => hop.usize,
            Self::Index(_) => 0,
            Self::Objects { objects, .. } => objects
                .iter()
                .fold(0u64, |sum, object| sum.saturating_add(object.usize)),
        }
    }
}

fn delta_files(delta: &Delta) -> impl Iterator<Item = (Name, &File)> {
    let superblock = (Name::Superblock, &delta.superblock);
    let parts = (0..)
        .zip(&delta.parts)
        .map(|(number, part)| (Name::Part(number), part));
    std::iter::once(superblock).chain(parts)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))
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
