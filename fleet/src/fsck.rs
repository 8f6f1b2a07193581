//! Whether everything that a device may ask for is there, and is what was signed. Reads only: all of it.
//!
//! The metadata is verified by the device's own code, from the first root on; then every file that any release names is matched to
//! its digest. Looks at what is published, not into the repository that it came from (`ostree fsck` does), and not at keys ([`crate::status`]).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp as Time;
use offshoot::commit::Commit;
use offshoot::delta as superblock;
use offshoot::route::goal;
use offshoot::trust::schema::{Delta, Digested, HardwareId, RoleName};
use offshoot::trust::verify::{accept_root, trusted_root};
use serde::Serialize;

use crate::content::{self, Files};
use crate::directory::Fleet;
use crate::publication::{Publication, releases};
use crate::verify::{self, Fault};
use crate::{delta, objects};

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Report {
    pub releases: usize,
    /// What was read, and is what was signed.
    pub files: usize,
    pub bytes: u64,
    pub problems: Vec<Problem>,
    /// What no device asks for: `prune` removes it.
    pub unreferenced: Unreferenced,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Unreferenced {
    pub paths: Vec<String>,
    pub bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Problem {
    pub kind: ProblemKind,
    /// Below the directory that is published.
    pub path: String,
    pub text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum ProblemKind {
    /// The chain of roots is broken.
    Root,
    /// Metadata is not there, or does not verify.
    Metadata,
    /// Metadata that devices believe no more.
    Expired,
    /// A device does not get the newest release from it.
    Refused,
    Missing,
    WrongLength,
    WrongDigest,
    /// A file is the one that was signed, and devices cannot use it.
    Malformed,
}

pub(crate) fn fsck(fleet: &Fleet, public: &Path, now: Time) -> Result<Report> {
    let _lock = fleet.lock()?;
    let mut check = Check {
        public,
        problems: Vec::new(),
        files: Files::new(),
        deltas: BTreeMap::new(),
        whole: true,
    };
    let mut releases = 0;
    let mut unreferenced = Unreferenced::default();
    let mut read = (0, 0);
    if let Err(error) = roots(fleet, public) {
        check.problem(ProblemKind::Root, "metadata", format!("{error:#}"));
    }
    match Publication::read_from(fleet, public) {
        Err(error) => check.problem(ProblemKind::Metadata, "metadata", format!("{error:#}")),
        Ok(publication) => {
            check.metadata(&publication, now)?;
            releases = check.contents(&publication)?;
            read = check.digests()?;
            if check.whole {
                let named: BTreeSet<_> = content::of_metadata(&publication)
                    .into_iter()
                    .chain(check.files.keys().cloned())
                    .collect();
                beside(public, public, &named, &mut unreferenced)?;
            }
        }
    }
    Ok(Report {
        releases,
        files: read.0,
        bytes: read.1,
        problems: check.problems,
        unreferenced,
    })
}

/// Each root leads to the next, from the first one to the operator's, and on to the newest.
fn roots(fleet: &Fleet, public: &Path) -> Result<()> {
    let own =
        fs::read(fleet.root()).with_context(|| format!("reading {}", fleet.root().display()))?;
    let last = trusted_root(&own).with_context(|| format!("reading {}", fleet.root().display()))?;
    let file = |version| public.join(format!("metadata/{version}.root.json"));
    let mut root = None;
    for version in 1.. {
        let path = file(version);
        if version > last.version.number() && !path.exists() {
            break;
        }
        let reading = || format!("reading {}", path.display());
        let bytes = fs::read(&path).with_context(reading)?;
        root = Some(match &root {
            None => trusted_root(&bytes).with_context(reading)?,
            Some(root) => accept_root(root, &bytes).with_context(reading)?,
        });
        ensure!(
            version != last.version.number() || bytes == own,
            "{} is not {}: put back the one that devices know",
            path.display(),
            fleet.root().display()
        );
    }
    Ok(())
}

struct Check<'a> {
    public: &'a Path,
    problems: Vec<Problem>,
    files: Files,
    /// Each delta by the path of its superblock, and where it leads.
    deltas: BTreeMap<String, (Delta, Commit)>,
    /// Everything that names files could be read.
    whole: bool,
}

impl Check<'_> {
    fn problem(&mut self, kind: ProblemKind, path: &str, text: String) {
        self.problems.push(Problem {
            kind,
            path: path.to_owned(),
            text,
        });
    }

    /// It verifies: it is fresh, and a new device of each kind gets the newest release.
    fn metadata(&mut self, publication: &Publication, now: Time) -> Result<()> {
        for (role, version, expires) in publication.roles() {
            if expires <= now {
                let path = match &*role {
                    "timestamp" => "metadata/timestamp.json".to_owned(),
                    _ => format!("metadata/{version}.{role}.json"),
                };
                let text = format!("it expired at {expires}: run `offshoot-fleet refresh`");
                self.problem(ProblemKind::Expired, &path, text);
            }
        }
        if !self.problems.is_empty() {
            return Ok(());
        }
        let path = self.public.join("metadata/1.root.json");
        let root = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        for (channel, document) in &publication.channels {
            let mut newest = BTreeMap::new();
            for release in releases(channel, document)? {
                newest.insert(release.hardware, release.commit);
            }
            for (hardware, commit) in newest {
                self.device(&root, channel, &hardware, commit, now);
            }
        }
        Ok(())
    }

    fn device(
        &mut self,
        root: &[u8],
        channel: &RoleName,
        hardware: &HardwareId,
        commit: Commit,
        now: Time,
    ) {
        let why = match verify::offered(self.public, root, channel, hardware, now) {
            Ok(Some(release)) if release.entry.commit == commit => return,
            Ok(found) => format!("a device is offered {found:?} instead of {commit}"),
            Err(error) => format!("{error:#}"),
        };
        self.problem(ProblemKind::Refused, &format!("{channel}/{hardware}"), why);
    }

    /// Finds every file that a release names; how many releases there are.
    fn contents(&mut self, publication: &Publication) -> Result<usize> {
        let mut count = 0;
        for (channel, document) in &publication.channels {
            for release in releases(channel, document)? {
                count += 1;
                let entry = content::of_entry(channel, &release);
                let [_, (manifest, digested)] = entry.clone();
                for file in entry {
                    self.name(file);
                }
                let Some(found) = self.readable(
                    &manifest,
                    &digested,
                    content::manifest(self.public, channel, &release),
                )?
                else {
                    continue;
                };
                for delta in &found.deltas {
                    for file in delta::files(delta) {
                        self.name(content::of_file(file));
                    }
                    let path = delta.superblock.path.to_string();
                    self.deltas
                        .insert(path, (delta.clone(), goal(&found, delta)));
                }
                if let Some(named) = &found.objects {
                    let (path, digested) = content::of_file(&named.index);
                    self.name((path.clone(), digested));
                    let objects = objects::read(self.public, release.commit, &named.index);
                    for object in self.readable(&path, &digested, objects)?.iter().flatten() {
                        self.name(content::of_object(object));
                    }
                }
            }
        }
        Ok(count)
    }

    fn name(&mut self, file: (String, Digested)) {
        let path = file.0.clone();
        if let Err(error) = content::add(&mut self.files, file) {
            self.problem(ProblemKind::Malformed, &path, format!("{error:#}"));
        }
    }

    /// What could not be read, although it is the file that was signed, is a problem of its own.
    fn readable<T>(&mut self, path: &str, want: &Digested, read: Result<T>) -> Result<Option<T>> {
        match read {
            Ok(read) => Ok(Some(read)),
            Err(error) => {
                self.whole = false;
                if verify::fault(self.public, path, want)?.is_none() {
                    self.problem(ProblemKind::Malformed, path, format!("{error:#}"));
                }
                Ok(None)
            }
        }
    }

    /// Reads every file; how many are right, and their bytes.
    fn digests(&mut self) -> Result<(usize, u64)> {
        let (mut count, mut bytes) = (0, 0);
        let total: u64 = self.files.values().map(|file| file.length).sum();
        let label = format!("reading {} files, {total} bytes", self.files.len());
        let faults = delta::with_progress(&label, || {
            let mut faults = Vec::new();
            for (path, want) in &self.files {
                match verify::fault(self.public, path, want)? {
                    Some(fault) => faults.push((path.clone(), fault)),
                    None => {
                        count += 1;
                        bytes += want.length;
                    }
                }
            }
            Ok(faults)
        })?;
        for (path, fault) in faults {
            let kind = match fault {
                Fault::Missing => ProblemKind::Missing,
                Fault::WrongLength { .. } => ProblemKind::WrongLength,
                Fault::WrongDigest { .. } => ProblemKind::WrongDigest,
            };
            self.deltas.remove(&path);
            let text = format!("{fault}: put it back from a backup");
            self.problem(kind, &path, text);
        }
        for (path, (delta, to)) in std::mem::take(&mut self.deltas) {
            let file = self.public.join(&path);
            let bytes = fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
            if let Err(mismatch) = superblock::check(&bytes, &delta, to) {
                self.problem(ProblemKind::Malformed, &path, mismatch.to_string());
            }
        }
        Ok((count, bytes))
    }
}

/// What is there and is not named.
fn beside(
    public: &Path,
    directory: &Path,
    named: &BTreeSet<String>,
    found: &mut Unreferenced,
) -> Result<()> {
    let reading = || format!("reading {}", directory.display());
    let mut entries = Vec::new();
    for entry in fs::read_dir(directory).with_context(reading)? {
        entries.push(entry.with_context(reading)?.path());
    }
    entries.sort();
    for path in entries {
        let meta = fs::symlink_metadata(&path).with_context(reading)?;
        let below = path.strip_prefix(public).unwrap_or(&path);
        let below = below.to_string_lossy().into_owned();
        if meta.is_dir() {
            beside(public, &path, named, found)?;
        } else if !named.contains(&below) {
            found.bytes += meta.len();
            found.paths.push(below);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use offshoot::commit::Sha256;
    use offshoot::trust::schema::{Custom, FORMAT, TargetFile};

    use super::*;
    use crate::bench::{Bench, days, files, now, request};
    use crate::prune::prune;
    use crate::publish::publish;
    use crate::rotate::rotate;
    use crate::writer::Writer;

    fn kinds(report: &Report) -> Vec<(ProblemKind, &str)> {
        let problems = report.problems.iter();
        problems
            .map(|problem| (problem.kind, problem.path.as_str()))
            .collect()
    }

    fn two_releases() -> Bench {
        let bench = Bench::new();
        publish(&bench.fleet(), &request("1.1.0"), now(2)).unwrap();
        rotate(
            &bench.fleet(),
            &crate::bench::replacing("snapshot", None),
            now(3),
        )
        .unwrap();
        bench
    }

    #[test]
    fn what_is_published_is_whole_and_what_nothing_names_is_listed() {
        let bench = two_releases();
        let fleet = bench.fleet();
        let report = fsck(&fleet, &fleet.public(), now(4)).unwrap();
        assert_eq!(kinds(&report), []);
        assert_eq!(
            report.unreferenced.paths,
            [
                "metadata/1.snapshot.json",
                "metadata/1.stable.json",
                "metadata/2.snapshot.json"
            ]
        );
        assert_eq!(report.releases, 2);
        prune(&fleet, 2, crate::prepared::Goal::Publish, now(5)).unwrap();
        let report = fsck(&fleet, &fleet.public(), now(6)).unwrap();
        assert_eq!(report.unreferenced, Unreferenced::default());
        // Each file is read: all but the metadata.
        let all = files(&fleet.public());
        let content = all
            .iter()
            .filter(|path| !path.starts_with(fleet.public().join("metadata")));
        assert_eq!(report.files, content.count());
        // What was left by others.
        fs::write(fleet.public().join("objects/stray"), "12345").unwrap();
        let report = fsck(&fleet, &fleet.public(), now(6)).unwrap();
        assert_eq!(report.unreferenced.paths, ["objects/stray"]);
        assert_eq!(report.unreferenced.bytes, 5);
    }

    #[test]
    fn every_file_that_is_gone_or_changed_is_found() {
        let bench = two_releases();
        let fleet = bench.fleet();
        prune(&fleet, 2, crate::prepared::Goal::Publish, now(4)).unwrap();
        let public = fleet.public();
        let former = content::of_metadata(&Publication::read(&fleet).unwrap());
        let published = |path: &str| {
            // What stays for a device in the middle of a poll is read by nobody else.
            let (version, role) = path.rsplit('/').next().unwrap().split_once('.').unwrap();
            role == "root.json"
                || !former.contains(&format!(
                    "metadata/{}.{role}",
                    version.parse::<u64>().unwrap_or(9) + 1
                ))
        };
        for path in files(&public) {
            let below = path.strip_prefix(&public).unwrap().to_str().unwrap();
            if below.starts_with("metadata/") && !published(below) {
                continue;
            }
            let bytes = fs::read(&path).unwrap();
            let mut other = bytes.clone();
            let middle = other.len() / 2;
            other[middle] ^= 1;
            for (content, kind) in [
                (Some(&bytes[1..]), ProblemKind::WrongLength),
                (Some(&other[..]), ProblemKind::WrongDigest),
                (None, ProblemKind::Missing),
            ] {
                // Not in place: it may be the repository's file too.
                fs::remove_file(&path).unwrap();
                if let Some(content) = content {
                    fs::write(&path, content).unwrap();
                }
                let report = fsck(&fleet, &public, now(5)).unwrap();
                let found = kinds(&report);
                if below.starts_with("metadata/") {
                    assert!(!found.is_empty(), "{below} {kind:?}");
                    let kind = if below.ends_with("root.json") {
                        ProblemKind::Root
                    } else {
                        ProblemKind::Metadata
                    };
                    assert_eq!(found[0], (kind, "metadata"), "{below}");
                } else if below.ends_with("1.1.0.manifest.json") {
                    // What a new device asks for at once.
                    let refused = (ProblemKind::Refused, "stable/qemu-x86_64");
                    assert_eq!(found, [refused, (kind, below)]);
                } else {
                    assert_eq!(found, [(kind, below)]);
                }
            }
            fs::write(&path, bytes).unwrap();
        }
        assert_eq!(kinds(&fsck(&fleet, &public, now(5)).unwrap()), []);
    }

    #[test]
    fn what_has_expired_is_not_what_devices_believe() {
        let bench = two_releases();
        let fleet = bench.fleet();
        let report = fsck(&fleet, &fleet.public(), now(days(31))).unwrap();
        assert_eq!(
            kinds(&report),
            [
                (ProblemKind::Expired, "metadata/timestamp.json"),
                (ProblemKind::Expired, "metadata/4.snapshot.json")
            ]
        );
    }

    /// The newest release once more, with another manifest.
    fn sign_manifest(fleet: &Fleet, bytes: &[u8]) {
        let channel: RoleName = "stable".parse().unwrap();
        let publication = Publication::read(fleet).unwrap();
        let release = releases(&channel, publication.channel(&channel).unwrap())
            .unwrap()
            .pop()
            .unwrap();
        let digested = Digested {
            length: bytes.len() as u64,
            sha256: Sha256::of(bytes),
        };
        let folder = format!("stable/{}", release.hardware);
        let named = format!("{}.{}.manifest.json", digested.sha256, release.version);
        let writer = Writer::new(&fleet.public());
        writer
            .write(&format!("targets/{folder}/{named}"), bytes)
            .unwrap();
        let mut draft = publication.draft();
        let targets = &mut draft.channels.get_mut(&channel).unwrap().targets;
        let entry = targets
            .get_mut(&format!("{folder}/{}.commit", release.version))
            .unwrap();
        let custom = Custom {
            format: FORMAT,
            version: release.version.clone(),
            serial: release.serial,
            hardware: vec![release.hardware.clone()],
            manifest: digested,
        };
        *entry = entry.clone().with_custom(&custom).unwrap();
        targets.insert(
            format!("{folder}/{}.manifest.json", release.version),
            TargetFile::of(bytes),
        );
        draft.change("stable");
        let signed = draft
            .sign(&fleet.keys(), &fleet.settings.lifetimes, now(4), now(4))
            .unwrap();
        signed.write(&writer, fleet).unwrap();
    }

    #[test]
    fn what_was_signed_by_mistake_is_found_too() {
        let bench = two_releases();
        let channel: RoleName = "stable".parse().unwrap();
        let publication = Publication::read(&bench.fleet()).unwrap();
        let release = releases(&channel, publication.channel(&channel).unwrap())
            .unwrap()
            .pop()
            .unwrap();
        let good = content::manifest(&bench.fleet().public(), &channel, &release).unwrap();

        // The delta from nothing, as one from the release before.
        let fleet = bench.copy("fleet", "swapped");
        let mut manifest = good.clone();
        manifest.deltas.retain(|delta| delta.to.is_none());
        let [one, other] = &mut manifest.deltas[..] else {
            panic!("{manifest:?}");
        };
        std::mem::swap(&mut one.from, &mut other.from);
        sign_manifest(&fleet, &manifest.to_bytes().unwrap());
        let report = fsck(&fleet, &fleet.public(), now(5)).unwrap();
        let [one, other] = &good.deltas[..2] else {
            panic!("{good:?}");
        };
        let mut paths = [one, other].map(|delta| delta.superblock.path.as_str());
        paths.sort_unstable();
        assert_eq!(
            kinds(&report),
            paths.map(|path| (ProblemKind::Malformed, path))
        );

        // A manifest of another release; devices refuse it.
        let fleet = bench.copy("fleet", "other");
        let mut manifest = good.clone();
        manifest.version = "1.2.0".parse().unwrap();
        let bytes = manifest.to_bytes().unwrap();
        sign_manifest(&fleet, &bytes);
        let report = fsck(&fleet, &fleet.public(), now(5)).unwrap();
        let path = format!(
            "targets/stable/qemu-x86_64/{}.1.1.0.manifest.json",
            Sha256::of(&bytes)
        );
        assert_eq!(
            kinds(&report),
            [
                (ProblemKind::Refused, "stable/qemu-x86_64"),
                (ProblemKind::Malformed, path.as_str())
            ]
        );
        assert_eq!(report.unreferenced, Unreferenced::default());

        // An index that is not one, and a file that is signed as two.
        let fleet = bench.copy("fleet", "index");
        let mut manifest = good.clone();
        let index = &mut manifest.objects.as_mut().unwrap().index;
        index.path = "objects/bad.index".parse().unwrap();
        index.length = 3;
        index.sha256 = Sha256::of(b"bad");
        fs::write(fleet.public().join("objects/bad.index"), "bad").unwrap();
        manifest.deltas[0].parts[0].length += 1;
        sign_manifest(&fleet, &manifest.to_bytes().unwrap());
        let report = fsck(&fleet, &fleet.public(), now(5)).unwrap();
        let part = good.deltas[0].parts[0].path.as_str();
        let found = kinds(&report);
        assert!(found.contains(&(ProblemKind::Malformed, "objects/bad.index")));
        assert!(
            found.contains(&(ProblemKind::WrongLength, part)),
            "{found:?}"
        );
    }
}
