//! The way to the target, and the steps on it: what is here, what is fetched next, how it gets into the repository.
//!
//! [`crate::route`] chooses by sizes; here they are read from the spool and asked of the deployer. Nothing is remembered but which ways have
//! failed, in the record.

use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::{Device, SPOOL_MARGIN, StepError};
use crate::commit::Commit;
use crate::decide::Progress;
use crate::delta::{self, Mismatch};
use crate::deployment::{Deployments, Done, Missing, Stored};
use crate::fetch::{Name, Source, Wanted};
use crate::objects::{self, Object};
use crate::record::{FailedWays, Phase};
use crate::route::{self, Chain};
use crate::trust::schema::{Delta, File, Manifest};
use crate::trust::{Release, Verified};

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

impl Device {
    pub(super) async fn progress(
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
        let Phase::Staging { target, failed, .. } = self.record.phase else {
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
        let hopeful = from_here.as_ref().filter(|_| !failed.from_here);
        let objects = match &manifest.objects {
            Some(objects) => match self.objects(target, &objects.index).await? {
                Way::Index(index) if !route::asks_for_index(index.length, hopeful) => None,
                way => Some(way),
            },
            None => None,
        };
        let deltas = |chain| Way::deltas(chain, manifest);
        let ways = [
            from_here.and_then(deltas),
            objects,
            from_nothing.and_then(deltas),
        ];
        let (given_up, left): (Vec<_>, Vec<_>) =
            (ways.into_iter().flatten()).partition(|way| way.among(failed) == failed);
        let missing = |way: &Way<'_>| way.plan().missing;
        let best = left.into_iter().min_by_key(missing);
        // When all have failed, the last resort is tried again and again: the server may be repaired.
        Ok(best.or_else(|| given_up.into_iter().max_by_key(missing)))
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

    pub(super) async fn fetch(
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
        self.preflight(&way, way.objects()).await?;
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
                // The first file of a delta says how many objects the others bring.
                if let (Way::Deltas { to, .. }, true) = (&way, done == files[0].length) {
                    let path = self.spool.slot(to, Name::Superblock).path();
                    let superblock =
                        fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
                    self.preflight(&way, delta::objects(&superblock)).await?;
                }
            }
            fetched
        };
        if let Err(error) = fetched {
            if error.is_of_the_file() {
                self.give_up(&way)?;
            }
            return Err(error.into());
        }
        Ok(())
    }

    async fn preflight(&self, way: &Way<'_>, objects: u64) -> Result<(), StepError> {
        let (unpacked, objects) = (way.unpacked().to_string(), objects.to_string());
        let arguments = ["preflight", "--unpacked", &unpacked, "--objects", &objects];
        self.deployer::<Done>(&arguments).await.map(drop)
    }

    /// What is wrong with the delta itself counts as an attempt, too: it is as wrong the next time.
    pub(super) async fn apply(
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
            self.give_up(&way)?;
            return outcome;
        }
        // Stored: the spool is room for others.
        let on_the_way = matches!(way, Way::Deltas { to, .. } if to != target);
        self.spool.retain(on_the_way.then_some(&target))?;
        if on_the_way {
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

    /// Another way from now on, if there is one: remembered across reboots.
    fn give_up(&mut self, way: &Way<'_>) -> Result<()> {
        self.change(|record| {
            if let Phase::Staging { failed, .. } = &mut record.phase {
                *failed = way.among(*failed);
            }
        })
    }

    /// Which of the commits are complete in the repository, and held.
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

    /// `ways`, and this one.
    fn among(&self, mut ways: FailedWays) -> FailedWays {
        match self {
            Self::Deltas { from: Some(_), .. } => ways.from_here = true,
            Self::Deltas { from: None, .. } => ways.from_nothing = true,
            Self::Index(_) | Self::Objects { .. } => ways.objects = true,
        }
        ways
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

    /// Objects that the next step adds to the repository, as far as they are known.
    fn objects(&self) -> u64 {
        match self {
            Self::Deltas { .. } | Self::Index(_) => 0,
            Self::Objects { objects, .. } => objects.len() as u64,
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
