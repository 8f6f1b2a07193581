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
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp as Time;
use offshoot::trust::schema::{HardwareId, ReleaseVersion, RoleName};
use serde::Serialize;

use crate::directory::Fleet;
use crate::prepared::{Done, Goal};
use crate::publication::{Publication, releases};
use crate::writer::{Swept, Writer};
use crate::{content, refresh};

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Summary {
    pub releases: Vec<Gone>,
    /// How many files were removed, and their size.
    pub files: usize,
    pub bytes: u64,
    /// The files to sign, before any file is removed by the next run.
    pub prepared: Vec<PathBuf>,
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
pub(crate) fn prune(fleet: &Fleet, keep: usize, goal: Goal, now: Time) -> Result<Summary> {
    prune_with(fleet, keep, goal, now, &Writer::new(&fleet.public()))
}

fn prune_with(
    fleet: &Fleet,
    keep: usize,
    goal: Goal,
    now: Time,
    writer: &Writer,
) -> Result<Summary> {
    ensure!(
        keep > 0,
        "--keep 0 would leave devices nothing: keep 1 or more"
    );
    let _lock = fleet.lock()?;
    let mut publication = Publication::read(fleet)?;
    publication.keep_root(fleet)?;
    let mut draft = publication.draft();
    // What a release that is prepared names is not named by what is published.
    Goal::Prepare.check(fleet, &draft, None)?;
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
        match goal.reach(fleet, draft, writer, now, now)? {
            Done::Published(published) => publication = *published,
            Done::Prepared(prepared) => {
                return Ok(Summary {
                    releases: gone,
                    files: 0,
                    bytes: 0,
                    prepared,
                    warnings,
                });
            }
        }
    }
    let named = named(fleet, &publication)?;
    let mut swept = Swept::default();
    for folder in ["metadata", "targets", "deltas", "objects"] {
        swept += writer.sweep(&fleet.public().join(folder), |path| named.contains(path))?;
    }
    Ok(Summary {
        releases: gone,
        files: swept.files,
        bytes: swept.bytes,
        prepared: Vec::new(),
        warnings,
    })
}

fn is_newer(other: &crate::publication::Release, release: &crate::publication::Release) -> bool {
    other.hardware == release.hardware && other.serial > release.serial
}

/// Every file that a device may ask for, below `public`.
fn named(fleet: &Fleet, publication: &Publication) -> Result<BTreeSet<String>> {
    let content = content::of_releases(&fleet.public(), publication)?;
    let all = content::of_metadata(publication).into_iter();
    Ok(all.chain(content.into_keys()).collect())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;
    use std::process::Command;

    use super::*;
    use crate::bench::{Bench, files, now, request, seen};
    use crate::publish::{Request, publish};
    use crate::rotate::rotate;

    #[test]
    fn what_only_a_former_release_names_goes_and_devices_do_not_notice() {
        let bench = Bench::new();
        let mut fleet = bench.fleet();
        fleet.settings.chain = 0;
        publish(&fleet, &request("1.1.0"), now(2)).unwrap();
        let before = files(&fleet.public());
        assert_eq!(
            prune(&fleet, 2, Goal::Publish, now(3)).unwrap().releases,
            []
        );
        // The metadata of before the last publication, but for roots.
        let after = files(&fleet.public());
        let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
        let gone: Vec<_> = before.difference(&after).map(name).collect();
        assert_eq!(gone, ["1.snapshot.json", "1.stable.json"]);

        // A device that has only the first root follows.
        rotate(&fleet, &crate::bench::replacing("timestamp", None), now(4)).unwrap();
        let whole = prune(&bench.copy("fleet", "whole"), 1, Goal::Publish, now(5)).unwrap();
        for steps in 0.. {
            let fleet = bench.copy("fleet", &format!("cut-{steps}"));
            let public = fleet.public();
            let mut device = bench.device(&format!("device-{steps}"));
            let writer = Writer::cut_after(&public, steps);
            let done = prune_with(&fleet, 1, Goal::Publish, now(5), &writer).is_ok();
            assert_eq!(seen(&mut device, &public, now(6)).unwrap(), "1.1.0");
            // What went may come again, as another release, also when it went in part.
            let mut again = bench.copy(&format!("cut-{steps}"), &format!("again-{steps}"));
            again.settings.deltas = 0;
            let request = Request {
                again: true,
                ..request("1.0.0")
            };
            assert_eq!(publish(&again, &request, now(7)).unwrap().serial, 3);
            assert_eq!(seen(&mut device, &again.public(), now(8)).unwrap(), "1.0.0");

            prune(&fleet, 1, Goal::Publish, now(9)).unwrap();
            let left = files(&public);
            let published = Publication::read(&fleet).unwrap();
            let named = named(&fleet, &published).unwrap();
            let below = |path: &PathBuf| path.strip_prefix(&public).unwrap().to_owned();
            assert!(
                left.iter()
                    .all(|path| named.contains(below(path).to_str().unwrap()))
            );
            // 1.1.0 from 1.0.0 and from nothing, its commit and manifest, and its objects.
            let content = left
                .iter()
                .filter(|path| !below(path).starts_with("metadata"));
            let objects = Command::new("ostree")
                .arg(format!("--repo={}", fleet.repo().display()))
                .args(["ls", "--recursive", "--checksum", "1.1.0"])
                .output()
                .unwrap();
            let text = String::from_utf8(objects.stdout).unwrap();
            let kinds = text.lines().flat_map(|line| {
                let checksums = line.split_ascii_whitespace().skip(4);
                let hex = |word: &&str| word.len() == 64;
                let kind = line.starts_with('d');
                checksums
                    .take_while(hex)
                    .map(move |checksum| (checksum, kind))
            });
            let objects = kinds.collect::<BTreeSet<_>>().len() + 1;
            assert_eq!(content.count(), 6 + objects + 1);
            if done {
                // Channel, snapshot, timestamp, and each file that went.
                assert_eq!(steps, 3 * 4 + whole.files);
                break;
            }
        }
    }

    #[test]
    fn nothing_is_removed_while_a_release_cannot_be_read() {
        let bench = Bench::new();
        let fleet = bench.fleet();
        publish(&fleet, &request("1.1.0"), now(2)).unwrap();
        prune(&fleet, 0, Goal::Publish, now(3)).unwrap_err();
        let manifest = files(&fleet.public())
            .into_iter()
            .find(|path| path.to_str().unwrap().ends_with("1.1.0.manifest.json"));
        fs::write(manifest.unwrap(), "{}").unwrap();
        let before = files(&fleet.public());
        prune(&fleet, 2, Goal::Publish, now(3)).unwrap_err();
        assert_eq!(files(&fleet.public()), before);
    }
}
