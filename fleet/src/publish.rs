//! A commit becomes a release of a channel.
//!
//! Content first (deltas, objects, the commit object, the manifest), then the metadata that names it, `timestamp.json` last. A cut anywhere before
//! leaves the former publication as it was; the same command again completes it, and does not make finished deltas again.
//!
//! Does not remove what former releases left: a device may be half-way through one, and [`crate::prune`] does when it is told to.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use jiff::Timestamp as Time;
use offshoot::commit::{Commit, Sha256};
use offshoot::trust::schema::{
    Custom, Delta, Digested, FORMAT, HardwareId, Manifest, ReleaseVersion, RoleName, TargetFile,
};
use offshoot::trust::verify::MANIFEST_LIMIT;
use ostree::gio::{self, Cancellable};
use ostree::{ObjectType, Repo, RepoCommitState, glib};
use serde::Serialize;

use crate::directory::Fleet;
use crate::prepared::Goal;
use crate::publication::{Publication, Release, releases};
use crate::refresh;
use crate::writer::Writer;
use crate::{content, delta, objects};

pub(crate) const NONE: Option<&Cancellable> = None;

/// What the operator asks for.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub channel: RoleName,
    pub hardware: HardwareId,
    pub version: ReleaseVersion,
    /// A commit or a branch.
    pub rev: String,
    /// From how many former releases there are to be deltas; what the settings say if `None`.
    pub deltas: Option<usize>,
    pub full: bool,
    /// Whether its objects are published one by one; what the settings say if `None`.
    pub objects: Option<bool>,
    /// Make a former release the newest again.
    pub again: bool,
    /// Others sign it, and `offshoot-fleet complete` publishes it.
    pub prepare: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Summary {
    pub channel: RoleName,
    pub hardware: HardwareId,
    pub version: ReleaseVersion,
    pub serial: u64,
    pub commit: Commit,
    /// It was published before; nothing was done.
    pub unchanged: bool,
    pub manifest: Digested,
    pub deltas: Vec<DeltaSummary>,
    pub objects: Option<objects::Summary>,
    /// The files to sign; empty if it is published.
    pub prepared: Vec<PathBuf>,
    pub warnings: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct DeltaSummary {
    pub from: Option<Commit>,
    /// A former release, on the way to this one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<Commit>,
    /// What a device downloads.
    pub download: u64,
    /// What it unpacks to.
    pub usize: u64,
    pub parts: usize,
}

impl DeltaSummary {
    pub(crate) fn of(delta: &Delta) -> Result<Self> {
        Ok(Self {
            from: delta.from,
            to: delta.to,
            download: delta
                .download()
                .context("a delta's size does not fit 64 bits")?,
            usize: delta.usize,
            parts: delta.parts.len(),
        })
    }
}

pub(crate) fn publish(fleet: &Fleet, request: &Request, now: Time) -> Result<Summary> {
    publish_with(fleet, request, now, &Writer::new(&fleet.public()))
}

pub(crate) fn publish_with(
    fleet: &Fleet,
    request: &Request,
    now: Time,
    writer: &Writer,
) -> Result<Summary> {
    let lock = fleet.lock()?;
    let former = Publication::read(fleet)?;
    former.keep_root(fleet)?;
    writer.clear_parts()?;
    let Request {
        channel,
        hardware,
        version,
        ..
    } = request;
    fleet.knows(hardware)?;
    let document = former.channel(channel)?;
    let repo = open_repo(&fleet.repo())?;
    let commit = resolve(&repo, &request.rev)?;
    let object = commit_object(&repo, commit, version)?;

    let mut held = releases(channel, document)?;
    held.retain(|release| release.hardware == *hardware);
    let newest = held.last().map_or(0, |release| release.serial);
    if let Some(release) = held.iter().find(|release| release.version == *version) {
        ensure!(
            release.commit == commit,
            "{channel} already has {version} for {hardware}, and it is the commit {}: a version is never used twice, publish {commit} under a new one",
            release.commit
        );
        if release.serial == newest {
            return unchanged(fleet, request, release);
        }
        ensure!(
            request.again,
            "{channel} had {version} for {hardware} before {}: say --again to make it the newest again",
            held.last().map_or("", |newest| newest.version.as_str())
        );
    }

    let mut warnings = Vec::new();
    let mut draft = former.draft();
    draft.change(channel.as_str());
    refresh::renew(fleet, &former, &mut draft, now, &mut warnings)?;
    let goal = Goal::of(request.prepare);
    goal.check(fleet, &draft, None)?;

    let scratch = fleet.scratch(&lock)?;
    let mut deltas = Vec::new();
    for (from, label) in sources(fleet, request, &repo, &held, commit, &mut warnings)? {
        let label = format!("delta {label} to {version}");
        deltas.push(delta::publish(
            &repo,
            &fleet.public(),
            writer,
            &scratch,
            (from, commit),
            &label,
        )?);
    }
    let objects = if request.objects.unwrap_or(fleet.settings.objects) {
        let signed = content::signed_objects(&fleet.public(), &former).context(
            "looking for the objects that are published: say --no-objects to do without",
        )?;
        Some(objects::publish(&repo, fleet, writer, commit, &signed)?)
    } else {
        None
    };
    if deltas.is_empty() && objects.is_none() {
        warnings.push(format!(
            "no device can download {version}, it has no delta and no objects: only devices that were provisioned with it run it"
        ));
    }
    let (objects, summary) = objects.unzip();

    let mut former_manifests = Vec::new();
    for release in held.iter().rev() {
        match content::manifest(&fleet.public(), channel, release) {
            Ok(manifest) => former_manifests.push(manifest),
            Err(error) => warnings.push(format!(
                "no delta of {} is named: {error:#}",
                release.version
            )),
        }
    }
    let chain = delta::chain(
        &fleet.public(),
        commit,
        &deltas,
        &former_manifests,
        fleet.settings.chain,
        &mut warnings,
    );
    let mut manifest = Manifest {
        format: FORMAT,
        commit,
        version: version.clone(),
        hardware: hardware.clone(),
        deltas,
        objects,
    };
    let bytes = fill(&mut manifest, chain, &mut warnings)?;
    let digested = Digested {
        length: bytes.len() as u64,
        sha256: Sha256::of(&bytes),
    };
    let folder = format!("{channel}/{hardware}");
    writer.write(
        &format!("targets/{folder}/{commit}.{version}.commit"),
        &object,
    )?;
    writer.write(
        &format!(
            "targets/{folder}/{}.{version}.manifest.json",
            digested.sha256
        ),
        &bytes,
    )?;

    let serial = newest
        .checked_add(1)
        .context("there is no greater serial")?;
    let custom = Custom {
        format: FORMAT,
        version: version.clone(),
        serial,
        hardware: vec![hardware.clone()],
        manifest: digested,
    };
    let targets = draft
        .channels
        .get_mut(channel)
        .context("the channel is gone")?;
    let entries = &mut targets.targets;
    entries.insert(
        format!("{folder}/{version}.commit"),
        TargetFile::of(&object).with_custom(&custom)?,
    );
    entries.insert(
        format!("{folder}/{version}.manifest.json"),
        TargetFile::of(&bytes),
    );
    let done = goal.reach(fleet, draft, writer, now, now)?;
    Ok(Summary {
        channel: channel.clone(),
        hardware: hardware.clone(),
        version: version.clone(),
        serial,
        commit,
        unchanged: false,
        manifest: digested,
        deltas: manifest
            .deltas
            .iter()
            .map(DeltaSummary::of)
            .collect::<Result<_>>()?,
        objects: summary,
        prepared: done.into_files(),
        warnings,
    })
}

/// The manifest's bytes, with as much of the chain as there is room for.
fn fill(manifest: &mut Manifest, chain: Vec<Delta>, warnings: &mut Vec<String>) -> Result<Vec<u8>> {
    let bytes = manifest.to_bytes()?;
    let mut room = MANIFEST_LIMIT
        .checked_sub(bytes.len() as u64)
        .with_context(|| {
            format!(
                "the manifest has {} bytes, and devices read {MANIFEST_LIMIT}: publish with fewer --deltas",
                bytes.len()
            )
        })?;
    let whole = chain.len();
    let mut named = 0;
    for delta in chain {
        // And a comma.
        let size = serde_json::to_vec(&delta)?.len() as u64 + 1;
        let Some(left) = room.checked_sub(size) else {
            break;
        };
        room = left;
        named += 1;
        manifest.deltas.push(delta);
    }
    if named < whole {
        warnings.push(format!(
            "the manifest has room for {named} of the {whole} deltas to former releases, the newest: devices that are further behind need a delta from nothing, or the objects"
        ));
    }
    let bytes = manifest.to_bytes()?;
    ensure!(
        bytes.len() as u64 <= MANIFEST_LIMIT,
        "the manifest has {} bytes, and devices read {MANIFEST_LIMIT}: set a smaller `chain` in fleet.toml",
        bytes.len()
    );
    Ok(bytes)
}

fn unchanged(fleet: &Fleet, request: &Request, release: &Release) -> Result<Summary> {
    let content::Contents { manifest, objects } =
        content::of_release(&fleet.public(), &request.channel, release)?;
    Ok(Summary {
        channel: request.channel.clone(),
        hardware: release.hardware.clone(),
        version: release.version.clone(),
        serial: release.serial,
        commit: release.commit,
        unchanged: true,
        manifest: release.manifest,
        deltas: manifest
            .deltas
            .iter()
            .map(DeltaSummary::of)
            .collect::<Result<_>>()?,
        objects: objects.as_deref().map(objects::Summary::of),
        prepared: Vec::new(),
        warnings: Vec::new(),
    })
}

/// What devices may come from: the last releases, newest first, and nothing.
fn sources(
    fleet: &Fleet,
    request: &Request,
    repo: &Repo,
    held: &[Release],
    commit: Commit,
    warnings: &mut Vec<String>,
) -> Result<Vec<(Option<Commit>, String)>> {
    let mut sources: Vec<(Option<Commit>, String)> = Vec::new();
    let most = request.deltas.unwrap_or(fleet.settings.deltas);
    for release in held.iter().rev() {
        if sources.len() == most {
            break;
        }
        let from = release.commit;
        if from == commit || sources.iter().any(|(held, _)| *held == Some(from)) {
            continue;
        }
        if is_complete(repo, from)? {
            sources.push((Some(from), format!("from {}", release.version)));
        } else {
            warnings.push(format!(
                "there is no delta from {}: its commit {from} is not in {}",
                release.version,
                fleet.repo().display()
            ));
        }
    }
    if request.full || fleet.settings.full {
        sources.push((None, "from nothing".to_owned()));
    }
    Ok(sources)
}

/// The repository that releases come from.
pub(crate) fn open_repo(path: &Path) -> Result<Repo> {
    let repo = Repo::new(&gio::File::for_path(path));
    repo.open(NONE)
        .with_context(|| format!("opening {}", path.display()))?;
    Ok(repo)
}

fn resolve(repo: &Repo, rev: &str) -> Result<Commit> {
    if let Ok(commit) = rev.parse() {
        return Ok(commit);
    }
    // Not `resolve_rev`: to that a branch named 7 is a commit that begins so.
    let branches = repo.list_refs(None, NONE);
    let branches = branches.with_context(|| format!("looking for the branch {rev}"))?;
    let Some(found) = branches.get(rev) else {
        bail!(
            "the repository has no branch {rev}: name one (`ostree refs` lists them) or a whole commit checksum"
        );
    };
    Ok(found.parse()?)
}

/// There, with everything below it that a delta reads.
pub(crate) fn is_complete(repo: &Repo, commit: Commit) -> Result<bool> {
    let checksum = commit.to_string();
    if !repo.has_object(ObjectType::Commit, &checksum, NONE)? {
        return Ok(false);
    }
    let (_, state) = repo.load_commit(&checksum)?;
    Ok(!state.contains(RepoCommitState::PARTIAL))
}

/// The bytes of the commit, which must be the release that it is published as.
fn commit_object(repo: &Repo, commit: Commit, version: &ReleaseVersion) -> Result<Vec<u8>> {
    ensure!(
        is_complete(repo, commit)?,
        "commit {commit} is not in the repository, or only in part: compose it or pull it first"
    );
    let object = repo
        .load_variant(ObjectType::Commit, &commit.to_string())
        .with_context(|| format!("reading commit {commit}"))?;
    let metadata = glib::VariantDict::new(Some(&object.child_value(0)));
    let named = metadata.lookup::<String>("version").unwrap_or(None);
    if let Some(named) = named
        && named != version.as_str()
    {
        bail!(
            "commit {commit} says that it is version {named:?}: publish it as --release {named}, or compose it as {version}"
        );
    }
    let bytes = object.data().to_vec();
    ensure!(
        Commit(Sha256::of(&bytes)) == commit,
        "commit {commit} is damaged in the repository: `ostree fsck` says more"
    );
    Ok(bytes)
}

#[cfg(test)]
mod tests;
