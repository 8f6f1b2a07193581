//! A directory that takes a release to devices without a network: on a USB stick, a share, an installer's laptop.
//!
//! It is laid out as `public` is, with the newest release of one channel and hardware: every root, the metadata that leads to the
//! release, and of its content the deltas that are asked for, or the objects. A device trusts it as little as a server.
//!
//! **Across a power cut.** It is written beside its place as `.<name>.part`, synced, verified as a device does it, and renamed: there is
//! a whole one or none. The next bundle of that name removes what a cut has left.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp as Time;
use offshoot::commit::Commit;
use offshoot::route;
use offshoot::trust::schema::{
    Delta, Digested, HardwareId, Manifest, ReleaseVersion, RoleName, time,
};
use serde::Serialize;

use crate::content::{self, Contents, Files};
use crate::directory::Fleet;
use crate::publication::{Publication, Release, releases};
use crate::publish::DeltaSummary;
use crate::verify;
use crate::writer::{Writer, make_directory};
use crate::{delta, objects};

/// What the operator asks for.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub output: PathBuf,
    pub channel: RoleName,
    pub hardware: HardwareId,
    /// What the devices run; empty: anything that there is a delta from.
    pub from: Vec<Commit>,
    /// Also every object.
    pub objects: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Summary {
    pub output: PathBuf,
    pub version: ReleaseVersion,
    pub commit: Commit,
    pub deltas: Vec<DeltaSummary>,
    pub objects: Option<objects::Summary>,
    pub files: usize,
    pub bytes: u64,
    /// Devices refuse it from then on.
    #[serde(with = "time")]
    pub until: Time,
}

pub(crate) fn bundle(fleet: &Fleet, request: &Request, now: Time) -> Result<Summary> {
    let part = part(&request.output)?;
    bundle_with(fleet, request, now, &Writer::new(&part))
}

/// Where it is made.
fn part(output: &Path) -> Result<PathBuf> {
    let name = output.file_name().and_then(OsStr::to_str);
    let name = name.with_context(|| {
        format!(
            "--output {}: name a directory that there is not yet",
            output.display()
        )
    })?;
    Ok(output.with_file_name(format!(".{name}.part")))
}

fn bundle_with(fleet: &Fleet, request: &Request, now: Time, writer: &Writer) -> Result<Summary> {
    let Request {
        output,
        channel,
        hardware,
        ..
    } = request;
    let _lock = fleet.lock()?;
    ensure!(
        fs::symlink_metadata(output).is_err(),
        "{} exists, and nothing is overwritten: remove it, or name another directory (on a stick, one below where it is mounted)",
        output.display()
    );
    let publication = Publication::read(fleet)?;
    let mut all = releases(channel, publication.channel(channel)?)?;
    all.retain(|release| release.hardware == *hardware);
    let release = all.pop().with_context(|| {
        format!("{channel} has no release for {hardware}: publish one, or correct --hardware")
    })?;
    let public = fleet.public();
    let contents = content::of_release(&public, channel, &release)?;
    let chosen = choose(request, &release, &contents)?;
    let metadata = metadata(&publication, channel);
    let files = chosen.files(channel, &release)?;

    let part = part(output)?;
    if part.exists() {
        fs::remove_dir_all(&part).with_context(|| format!("removing {}", part.display()))?;
    }
    make_directory(&part).with_context(|| format!("making {}", part.display()))?;
    let mut bytes = 0;
    for (path, want) in &files {
        let got = writer.put(&public.join(path), path)?;
        ensure!(
            got == *want,
            "{} is not what was signed: `offshoot-fleet fsck` says more",
            public.join(path).display()
        );
        bytes += want.length;
    }
    for path in &metadata {
        bytes += writer.put(&public.join(path), path)?.length;
    }
    writer.settle()?;
    check(&part, channel, &release, &files, now)?;
    writer.name(&part, output)?;
    let deltas = chosen.deltas.iter().copied().map(DeltaSummary::of);
    Ok(Summary {
        output: output.clone(),
        version: release.version,
        commit: release.commit,
        deltas: deltas.collect::<Result<_>>()?,
        objects: chosen.objects.map(objects::Summary::of),
        files: files.len() + metadata.len(),
        bytes,
        until: publication.believed_until(channel),
    })
}

/// What of a release goes into the bundle.
struct Chosen<'a> {
    deltas: Vec<&'a Delta>,
    objects: Option<&'a [offshoot::objects::Object]>,
    manifest: &'a Manifest,
}

fn choose<'a>(request: &Request, release: &Release, contents: &'a Contents) -> Result<Chosen<'a>> {
    let Contents { manifest, objects } = contents;
    let all: Vec<_> = manifest.deltas.iter().collect();
    let deltas = if request.from.is_empty() {
        // With objects, every device is served.
        if request.objects { Vec::new() } else { all }
    } else {
        let sizes: Vec<_> = manifest
            .deltas
            .iter()
            .map(|delta| delta.download().unwrap_or(u64::MAX))
            .collect();
        let mut ways: Vec<&Delta> = Vec::new();
        for from in &request.from {
            // The one that a device takes.
            let [way, _] = route::chains(manifest, |commit| commit == *from, &sizes);
            match way {
                Some(way) => ways.extend(way.hops),
                None => ensure!(
                    request.objects || *from == release.commit,
                    "no delta leads from {from} to {}: say --objects, or publish with more --deltas",
                    release.version
                ),
            }
        }
        let mut known = BTreeSet::new();
        ways.retain(|delta| known.insert(delta.superblock.path.clone()));
        ways
    };
    let wants_objects = request.objects || (request.from.is_empty() && deltas.is_empty());
    let objects = match objects {
        Some(objects) if wants_objects => Some(objects.as_slice()),
        None if request.objects => {
            anyhow::bail!(
                "{} was published without its objects: publish the next release with them (`objects` in fleet.toml)",
                release.version
            )
        }
        Some(_) | None => None,
    };
    ensure!(
        !deltas.is_empty() || objects.is_some() || !request.from.is_empty(),
        "{} has no deltas and no objects, so a bundle would update no device: publish the next release with one of them",
        release.version
    );
    Ok(Chosen {
        deltas,
        objects,
        manifest,
    })
}

impl Chosen<'_> {
    fn files(&self, channel: &RoleName, release: &Release) -> Result<Files> {
        let mut files = Files::new();
        for file in content::of_entry(channel, release) {
            content::add(&mut files, file)?;
        }
        for file in self.deltas.iter().copied().flat_map(delta::files) {
            content::add(&mut files, content::of_file(file))?;
        }
        if let (Some(objects), Some(named)) = (self.objects, &self.manifest.objects) {
            content::add(&mut files, content::of_file(&named.index))?;
            for object in objects {
                content::add(&mut files, content::of_object(object))?;
            }
        }
        Ok(files)
    }
}

/// What leads a device with any root to the channel.
fn metadata(publication: &Publication, channel: &RoleName) -> Vec<String> {
    let mut files = Vec::new();
    for (role, version, _) in publication.roles() {
        match &*role {
            "root" => {
                files.extend((1..=version.number()).map(|n| format!("metadata/{n}.root.json")));
            }
            "timestamp" => files.push("metadata/timestamp.json".to_owned()),
            "snapshot" | "targets" => files.push(format!("metadata/{version}.{role}.json")),
            other if other == channel.as_str() => {
                files.push(format!("metadata/{version}.{role}.json"));
            }
            _another_channel => {}
        }
    }
    files
}

/// A device takes it.
fn check(
    bundle: &Path,
    channel: &RoleName,
    release: &Release,
    files: &Files,
    now: Time,
) -> Result<()> {
    let path = bundle.join("metadata/1.root.json");
    let root = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    let found = verify::offered(bundle, &root, channel, &release.hardware, now)
        .context("a device would refuse the bundle")?;
    ensure!(
        found.is_some_and(|found| found.entry.commit == release.commit),
        "a device would not be offered {} by the bundle: `offshoot-fleet fsck` says more",
        release.version
    );
    for (path, want) in files {
        let want: &Digested = want;
        if let Some(fault) = verify::fault(bundle, path, want)? {
            anyhow::bail!(
                "{}, which was written just now: {fault}; the disk is broken, or not what it says",
                bundle.join(path).display()
            );
        }
    }
    // What was read is what is on the disk, as far as the disk can be asked.
    File::open(bundle)
        .and_then(|directory| directory.sync_all())
        .with_context(|| format!("syncing {}", bundle.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{Bench, HARDWARE, days, files, now, request};
    use crate::publish::publish;
    use crate::rotate::rotate;

    fn asked(bench: &Bench, name: &str, from: &[Commit], objects: bool) -> Request {
        Request {
            output: bench.path(name),
            channel: "stable".parse().unwrap(),
            hardware: HARDWARE.parse().unwrap(),
            from: from.to_vec(),
            objects,
        }
    }

    fn two_releases() -> (Bench, Commit) {
        let bench = Bench::new();
        let fleet = bench.fleet();
        let channel: RoleName = "stable".parse().unwrap();
        let publication = Publication::read(&fleet).unwrap();
        let first = releases(&channel, publication.channel(&channel).unwrap()).unwrap();
        publish(&fleet, &self::request("1.1.0"), now(2)).unwrap();
        crate::init::add_channel(
            &fleet,
            &"beta".parse().unwrap(),
            crate::prepared::Goal::Publish,
            now(3),
        )
        .unwrap();
        rotate(&fleet, &crate::bench::replacing("timestamp", None), now(4)).unwrap();
        (bench, first[0].commit)
    }

    #[test]
    fn there_is_a_whole_bundle_or_none_after_a_cut_at_any_write() {
        let (bench, first) = two_releases();
        let fleet = bench.fleet();
        let before = files(&fleet.public());
        for steps in 0.. {
            let name = format!("bundle-{steps}");
            let request = asked(&bench, &name, &[first], false);
            let part = part(&request.output).unwrap();
            let done =
                bundle_with(&fleet, &request, now(5), &Writer::cut_after(&part, steps)).is_ok();
            let there = request.output.exists();
            assert!(there || !done);
            if !there {
                bundle(&fleet, &request, now(5)).unwrap();
            }
            assert!(!part.exists());
            let mut device = bench.device(&format!("device-{steps}"));
            let found = device.poll(&request.output, now(6)).unwrap().found;
            assert_eq!(found.unwrap().entry.version.as_str(), "1.1.0");
            if done {
                // Two roots, the other four; the commit, the manifest, a delta of two: put, named, and both synced; then all is named.
                assert_eq!(steps, 10 * 2 + 2 + 2);
                break;
            }
        }
        assert_eq!(files(&fleet.public()), before);
    }

    #[test]
    fn what_is_asked_for_is_in_it_and_nothing_else() {
        let (bench, first) = two_releases();
        let fleet = bench.fleet();
        let run = |name: &str, from: &[Commit], objects| {
            let summary = bundle(&fleet, &asked(&bench, name, from, objects), now(5))?;
            let content = files(&bench.path(name));
            assert_eq!(summary.files, content.len());
            let size = |path: &PathBuf| fs::metadata(path).unwrap().len();
            assert_eq!(summary.bytes, content.iter().map(size).sum::<u64>());
            let directory = |path: &PathBuf| {
                let below = path.strip_prefix(bench.path(name)).unwrap();
                below.iter().next().unwrap().to_str().unwrap().to_owned()
            };
            let count = |wanted: &str| {
                content
                    .iter()
                    .filter(|path| directory(path) == wanted)
                    .count()
            };
            assert_eq!((count("metadata"), count("targets")), (6, 2));
            anyhow::Ok((summary.deltas.len(), count("deltas"), count("objects")))
        };
        let whole = publish(&fleet, &request("1.1.0"), now(5)).unwrap();
        let objects = whole.objects.unwrap().count + 1;
        // From 1.0.0, from nothing, and to 1.0.0 from nothing.
        assert_eq!(run("all", &[], false).unwrap(), (3, 6, 0));
        assert_eq!(run("from", &[first], false).unwrap(), (1, 2, 0));
        assert_eq!(run("objects", &[], true).unwrap(), (0, 0, objects));
        assert_eq!(run("both", &[first], true).unwrap(), (1, 2, objects));
        // What the devices run already needs nothing; what nothing leads on from needs the objects.
        assert_eq!(
            run("newest", &[whole.commit, first], false).unwrap(),
            (1, 2, 0)
        );
        let unknown = "0".repeat(64).parse().unwrap();
        run("unknown", &[unknown], false).unwrap_err();
        assert_eq!(run("rest", &[unknown], true).unwrap(), (0, 0, objects));

        let bare = crate::publish::Request {
            deltas: Some(0),
            full: false,
            version: "1.1.0".parse().unwrap(),
            channel: "beta".parse().unwrap(),
            ..request("1.1.0")
        };
        publish(&fleet, &bare, now(6)).unwrap();
        let beta = |name: &str| Request {
            channel: "beta".parse().unwrap(),
            ..asked(&bench, name, &[], false)
        };
        let summary = bundle(&fleet, &beta("beta"), now(7)).unwrap();
        assert_eq!((summary.deltas.len(), summary.objects), (0, whole.objects));
    }

    #[test]
    fn what_would_update_no_device_is_not_written() {
        let (bench, _) = two_releases();
        let fleet = bench.fleet();
        let refused = |request: &Request, now| {
            bundle(&fleet, request, now).unwrap_err();
            assert!(!request.output.exists());
        };
        let good = asked(&bench, "bundle", &[], false);
        refused(
            &Request {
                channel: "nightly".parse().unwrap(),
                ..good.clone()
            },
            now(5),
        );
        refused(
            &Request {
                channel: "beta".parse().unwrap(),
                ..good.clone()
            },
            now(5),
        );
        let nowhere = Request {
            output: "/".into(),
            ..good.clone()
        };
        bundle(&fleet, &nowhere, now(5)).unwrap_err();
        // Expired.
        refused(&good, now(days(8)));
        // A file that is not what was signed.
        let part = files(&fleet.public().join("deltas")).pop_first().unwrap();
        let bytes = fs::read(&part).unwrap();
        let mut other = bytes.clone();
        other[0] ^= 1;
        fs::write(&part, other).unwrap();
        refused(&good, now(5));
        fs::write(&part, bytes).unwrap();
        let summary = bundle(&fleet, &good, now(5)).unwrap();
        assert_eq!(summary.until, now(4 + days(7)));
        // And nothing is overwritten.
        let before = files(&good.output);
        bundle(&fleet, &good, now(5)).unwrap_err();
        assert_eq!(files(&good.output), before);
        // Without deltas and objects there is nothing to take.
        let bare = crate::publish::Request {
            deltas: Some(0),
            full: false,
            objects: Some(false),
            channel: "beta".parse().unwrap(),
            ..request("1.1.0")
        };
        publish(&fleet, &bare, now(6)).unwrap();
        let beta = Request {
            channel: "beta".parse().unwrap(),
            ..asked(&bench, "beta", &[], false)
        };
        bundle(&fleet, &beta, now(7)).unwrap_err();
        bundle(
            &fleet,
            &Request {
                objects: true,
                ..beta
            },
            now(7),
        )
        .unwrap_err();
    }
}
