//! Releases that nobody needs any more, and the files that only they name.
//!
//! What a channel says is published first, without the releases that go; then files are removed that nothing names any more. Of the
//! metadata the version before the published one stays, for a device that is in the middle of a poll.
//!
//! **Across a power cut.** Before the publication: the former one. After it: files that nothing names, which the next run removes. A
//! delta goes superblock first, so that one without a part is not taken for a whole one.
//!
//! Does not look into the OSTree repository: `ostree prune` does.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp as Time;
use offshoot::trust::schema::{HardwareId, ReleaseVersion, RoleName};
use serde::Serialize;

use crate::directory::Fleet;
use crate::publication::{Publication, releases};
use crate::writer::Writer;
use crate::{publish, refresh};

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Summary {
    pub releases: Vec<Gone>,
    /// How many files were removed, and their size.
    pub files: usize,
    pub bytes: u64,
    pub warnings: Vec<String>,
}

/// A release that is published no more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Gone {
    pub channel: RoleName,
    pub hardware: HardwareId,
    pub version: ReleaseVersion,
}

/// Of each channel and hardware, the `keep` newest releases stay.
pub(crate) fn prune(fleet: &Fleet, keep: usize, now: Time) -> Result<Summary> {
    prune_with(fleet, keep, now, &Writer::new(&fleet.public()))
}

fn prune_with(fleet: &Fleet, keep: usize, now: Time, writer: &Writer) -> Result<Summary> {
    ensure!(
        keep > 0,
        "--keep 0 would leave devices nothing: keep 1 or more"
    );
    let _lock = fleet.lock()?;
    let mut publication = Publication::read(fleet)?;
    publication.keep_root(fleet)?;
    let mut draft = publication.draft();
    let mut gone = Vec::new();
    let mut warnings = Vec::new();
    for (channel, document) in &publication.channels {
        let all = releases(channel, document)?;
        for release in &all {
            let newer = |other: &&_| is_newer(other, release);
            if all.iter().filter(newer).count() < keep {
                continue;
            }
            let entries = &mut draft
                .channels
                .get_mut(channel)
                .context("the channel is gone")?
                .targets;
            for end in ["commit", "manifest.json"] {
                entries.remove(&format!(
                    "{channel}/{}/{}.{end}",
                    release.hardware, release.version
                ));
            }
            draft.change(channel.as_str());
            gone.push(Gone {
                channel: channel.clone(),
                hardware: release.hardware.clone(),
                version: release.version.clone(),
            });
        }
    }
    writer.clear_parts()?;
    if !gone.is_empty() {
        refresh::renew(fleet, &publication, &mut draft, now, &mut warnings)?;
        let signed = draft.sign(&fleet.keys(), &fleet.settings.lifetimes, now, now)?;
        signed.write(writer, fleet)?;
        publication = signed.publication;
    }
    let named = named(fleet, &publication)?;
    let mut summary = Summary {
        releases: gone,
        files: 0,
        bytes: 0,
        warnings,
    };
    for folder in ["metadata", "targets", "deltas"] {
        sweep(
            &fleet.public(),
            &fleet.public().join(folder),
            &named,
            &mut summary,
        )?;
    }
    Ok(summary)
}

fn is_newer(other: &crate::publication::Release, release: &crate::publication::Release) -> bool {
    other.hardware == release.hardware && other.serial > release.serial
}

/// Every file that a device may ask for, below `public`.
fn named(fleet: &Fleet, publication: &Publication) -> Result<BTreeSet<PathBuf>> {
    let mut named = BTreeSet::from([PathBuf::from("metadata/timestamp.json")]);
    for (role, version, _) in publication.roles() {
        let first = match &*role {
            // The way from any former root.
            "root" => 1,
            _ => version.number().saturating_sub(1),
        };
        for version in first..=version.number() {
            named.insert(format!("metadata/{version}.{role}.json").into());
        }
    }
    for (channel, document) in &publication.channels {
        for release in releases(channel, document)? {
            let folder = format!("targets/{channel}/{}", release.hardware);
            let (commit, version, digest) =
                (release.commit, &release.version, release.manifest.sha256);
            named.insert(format!("{folder}/{commit}.{version}.commit").into());
            named.insert(format!("{folder}/{digest}.{version}.manifest.json").into());
            for delta in publish::manifest(fleet, channel, &release)?.deltas {
                for file in delta.parts.iter().chain([&delta.superblock]) {
                    named.insert(file.path.as_str().into());
                }
            }
        }
    }
    Ok(named)
}

/// Removes what is not named, and directories that are empty then.
fn sweep(
    public: &Path,
    directory: &Path,
    named: &BTreeSet<PathBuf>,
    summary: &mut Summary,
) -> Result<()> {
    if !directory.exists() {
        return Ok(());
    }
    let reading = || format!("reading {}", directory.display());
    let mut entries = Vec::new();
    for entry in fs::read_dir(directory).with_context(reading)? {
        entries.push(entry.with_context(reading)?.path());
    }
    // The superblock of a delta first.
    entries.sort_by_key(|path| !path.ends_with("superblock"));
    for path in entries {
        let meta = fs::symlink_metadata(&path).with_context(reading)?;
        if meta.is_dir() {
            sweep(public, &path, named, summary)?;
            continue;
        }
        let below = path.strip_prefix(public).unwrap_or(&path);
        if named.contains(below) {
            continue;
        }
        fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
        summary.files += 1;
        summary.bytes += meta.len();
    }
    let is_empty = fs::read_dir(directory)
        .with_context(reading)?
        .next()
        .is_none();
    if is_empty {
        fs::remove_dir(directory).with_context(|| format!("removing {}", directory.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{Bench, now, request, seen};
    use crate::publish::publish;

    fn files(directory: &Path) -> BTreeSet<PathBuf> {
        let mut all = BTreeSet::new();
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                all.append(&mut files(&path));
            } else {
                all.insert(path);
            }
        }
        all
    }

    #[test]
    fn what_only_a_former_release_names_goes_and_devices_do_not_notice() {
        let bench = Bench::new();
        let fleet = bench.fleet();
        publish(&fleet, &request("1.1.0"), now(2)).unwrap();
        let before = files(&fleet.public());
        assert_eq!(prune(&fleet, 2, now(3)).unwrap().releases, []);
        // The metadata of before the last publication, but for roots.
        let after = files(&fleet.public());
        let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
        let gone: Vec<_> = before.difference(&after).map(name).collect();
        assert_eq!(gone, ["1.snapshot.json", "1.stable.json"]);

        for steps in 0.. {
            let fleet = bench.copy("fleet", &format!("cut-{steps}"));
            let mut device = bench.device(&format!("device-{steps}"));
            let writer = Writer::cut_after(&fleet.public(), steps);
            let done = prune_with(&fleet, 1, now(4), &writer).is_ok();
            assert_eq!(seen(&mut device, &fleet.public(), now(5)).unwrap(), "1.1.0");
            prune(&fleet, 1, now(6)).unwrap();
            assert_eq!(seen(&mut device, &fleet.public(), now(7)).unwrap(), "1.1.0");
            let left = files(&fleet.public());
            let named: BTreeSet<_> = named(&fleet, &Publication::read(&fleet).unwrap()).unwrap();
            assert!(
                left.iter()
                    .all(|path| named.contains(path.strip_prefix(fleet.public()).unwrap()))
            );
            // 1.1.0 from 1.0.0 and from nothing, its commit and manifest.
            assert_eq!(
                left.iter()
                    .filter(|path| !path.to_str().unwrap().contains("/metadata/"))
                    .count(),
                6
            );
            if done {
                assert_eq!(steps, 3 * 4);
                break;
            }
        }
        // What went may come again, as another release.
        let fleet = bench.copy("fleet", "again");
        prune(&fleet, 1, now(4)).unwrap();
        let summary = publish(&fleet, &request("1.0.0"), now(5)).unwrap();
        assert_eq!(summary.serial, 3);
        assert_eq!(
            seen(&mut bench.device("again-device"), &fleet.public(), now(6)).unwrap(),
            "1.0.0"
        );
    }

    #[test]
    fn nothing_is_removed_while_a_release_cannot_be_read() {
        let bench = Bench::new();
        let fleet = bench.fleet();
        publish(&fleet, &request("1.1.0"), now(2)).unwrap();
        prune(&fleet, 0, now(3)).unwrap_err();
        let manifest = files(&fleet.public())
            .into_iter()
            .find(|path| path.to_str().unwrap().ends_with("1.1.0.manifest.json"));
        fs::write(manifest.unwrap(), "{}").unwrap();
        let before = files(&fleet.public());
        prune(&fleet, 2, now(3)).unwrap_err();
        assert_eq!(files(&fleet.public()), before);
    }
}
