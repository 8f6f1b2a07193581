//! The objects of a release, one by one, for devices that no delta is for.
//!
//! `public/objects/<2>/<62>.<kind>` are files of the archive repository, linked, or copied where they cannot be. `objects/<commit>.index`
//! lists those of one release with the digests that devices ask for ([`offshoot::objects`] is its format), and the manifest names it.
//! libostree may compress the same object to other bytes another time, so a file that an index names is never replaced by another one.
//!
//! **Across a power cut.** Nothing names the objects before the index is there, and they are on the disk before it is written: thousands
//! of files, which are not synced one by one but all at once. A file that was left without an index is taken again from the repository.
//!
//! Does not look into what libostree has written: `ostree fsck` does.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use offshoot::commit::{Commit, Sha256};
use offshoot::objects::{self, Kind, Object};
use offshoot::trust::schema;
use ostree::{ObjectType, Repo, RepoMode};
use serde::Serialize;

use crate::directory::Fleet;
use crate::publish::NONE;
use crate::writer::{Writer, digest_of};

/// What an index names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Summary {
    pub count: usize,
    /// What a device downloads that has none of them.
    pub download: u64,
    /// What they take in its repository.
    pub usize: u64,
}

/// What the indexes that are published say of each object.
pub(crate) type Signed = BTreeMap<(Kind, Sha256), Object>;

impl Summary {
    pub(crate) fn of(objects: &[Object]) -> Self {
        let sum = |size: fn(&Object) -> u64| {
            objects
                .iter()
                .fold(0, |sum: u64, object| sum.saturating_add(size(object)))
        };
        Self {
            count: objects.len(),
            download: sum(|object| object.length),
            usize: sum(|object| object.usize),
        }
    }
}

/// Publishes the objects of a commit and their index. `signed` is what must stay as it is.
pub(crate) fn publish(
    repo: &Repo,
    fleet: &Fleet,
    writer: &Writer,
    commit: Commit,
    signed: &Signed,
) -> Result<(schema::Objects, Summary)> {
    ensure!(
        repo.mode() == RepoMode::Archive,
        "{} is not an archive repository, whose objects can be served: say --no-objects, or pull the commit into one",
        fleet.repo().display()
    );
    let names = repo
        .traverse_commit(&commit.to_string(), 0, NONE)
        .with_context(|| format!("listing the objects of {commit}"))?;
    let mut all = Vec::with_capacity(names.len());
    for name in names {
        let kind = match name.object_type() {
            ObjectType::Commit => Kind::Commit,
            ObjectType::File => Kind::File,
            ObjectType::DirMeta => Kind::DirMeta,
            ObjectType::DirTree => Kind::DirTree,
            other => bail!(
                "commit {commit} has an object that devices do not know: {other:?} {}",
                name.checksum()
            ),
        };
        let checksum: Sha256 = name.checksum().parse()?;
        let signed = signed.get(&(kind, checksum));
        all.push(one(repo, fleet, writer, kind, checksum, signed)?);
    }
    writer.settle()?;
    let summary = Summary::of(&all);
    let bytes = objects::write(all);
    let path = index_path(commit);
    let length = bytes.len() as u64;
    ensure!(
        length <= objects::INDEX_LIMIT,
        "the index of {} objects has {length} bytes, and devices read {}: say --no-objects, and publish with --full",
        summary.count,
        objects::INDEX_LIMIT
    );
    // One that is there was signed, and is the same.
    let place = fleet.public().join(&path);
    if !place.exists()
        || fs::read(&place).with_context(|| format!("reading {}", place.display()))? != bytes
    {
        writer.write(&path, &bytes)?;
    }
    let index = schema::File {
        path: path.parse()?,
        length,
        sha256: Sha256::of(&bytes),
    };
    Ok((schema::Objects { index }, summary))
}

pub(crate) fn index_path(commit: Commit) -> String {
    format!("objects/{commit}.index")
}

/// The objects that an index below `public` names.
pub(crate) fn read(public: &Path, commit: Commit, index: &schema::File) -> Result<Vec<Object>> {
    let path = public.join(index.path.as_str());
    let read = || -> Result<Vec<Object>> {
        let bytes = fs::read(&path)?;
        ensure!(
            Sha256::of(&bytes) == index.sha256,
            "it is not the file that was signed: put it back from a backup"
        );
        let all = objects::parse(&bytes)?;
        ensure!(
            all.iter()
                .any(|object| object.kind == Kind::Commit && object.checksum == commit.0),
            "it does not have the commit {commit}: publish the release again"
        );
        Ok(all)
    };
    read().with_context(|| format!("reading {}", path.display()))
}

/// One object, published.
fn one(
    repo: &Repo,
    fleet: &Fleet,
    writer: &Writer,
    kind: Kind,
    checksum: Sha256,
    signed: Option<&Object>,
) -> Result<Object> {
    let mut object = Object {
        kind,
        checksum,
        length: 0,
        usize: 0,
        sha256: checksum,
    };
    let path = object.path();
    let (source, place) = (fleet.repo().join(&path), fleet.public().join(&path));
    let found = match fs::symlink_metadata(&place) {
        Ok(found) => Some(found),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(error).with_context(|| format!("reading {}", place.display())),
    };
    if let Some(signed) = signed
        && found
            .as_ref()
            .is_some_and(|found| found.len() == signed.length)
    {
        return Ok(*signed);
    }
    let held = fs::metadata(&source).with_context(|| {
        format!(
            "reading {}: pull or compose the commit again",
            source.display()
        )
    })?;
    object.length = held.len();
    object.usize = held.len();
    if kind == Kind::File {
        let (length, sha256) = digest_of(&source)?;
        let (_, info, _) = repo
            .load_file(&checksum.to_string(), NONE)
            .with_context(|| format!("reading {}", source.display()))?;
        (object.length, object.sha256) = (length, sha256);
        object.usize = u64::try_from(info.size()).context("a file's size is negative")?;
    }
    ensure!(
        signed.is_none_or(|signed| *signed == object),
        "{} is damaged, and {} is another file: put it back from a backup",
        place.display(),
        source.display()
    );
    if !found.is_some_and(|found| is_same(&found, &held)) {
        writer.link(&source, &path)?;
    }
    Ok(object)
}

fn is_same(one: &Metadata, other: &Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp as Time;
    use offshoot::trust::schema::Manifest;

    use super::*;
    use crate::bench::{Bench, now, request, seen};
    use crate::device::indexed;
    use crate::publication::{Publication, releases};
    use crate::publish::{Request, publish};
    use crate::{content, init};

    fn newest(fleet: &Fleet, channel: &str) -> Manifest {
        let channel = channel.parse().unwrap();
        let publication = Publication::read(fleet).unwrap();
        let mut all = releases(&channel, publication.channel(&channel).unwrap()).unwrap();
        content::manifest(&fleet.public(), &channel, &all.pop().unwrap()).unwrap()
    }

    /// 1.0.0 once more, in another channel.
    fn once_more(fleet: &Fleet, now: Time) -> Result<Manifest> {
        let request = Request {
            channel: "beta".parse().unwrap(),
            ..request("1.0.0")
        };
        publish(fleet, &request, now)?;
        Ok(newest(fleet, "beta"))
    }

    #[test]
    fn the_index_says_what_the_objects_are_and_they_are_the_repositorys() {
        let bench = Bench::new();
        let fleet = bench.fleet();
        let all = indexed(&fleet.public(), &newest(&fleet, "stable"));
        let mut kinds: Vec<_> = all.iter().map(|object| object.kind).collect();
        kinds.dedup();
        assert_eq!(
            kinds,
            [Kind::Commit, Kind::File, Kind::DirMeta, Kind::DirTree]
        );
        let mut sizes = Vec::new();
        for object in &all {
            let [place, source] =
                [fleet.public(), fleet.repo()].map(|base| base.join(object.path()));
            let held = fs::metadata(&place).unwrap();
            assert!(is_same(&held, &fs::metadata(&source).unwrap()));
            assert_eq!(held.mode() & 0o777, 0o644);
            assert_eq!(digest_of(&place).unwrap(), (object.length, object.sha256));
            match object.kind {
                Kind::File => sizes.push(object.usize),
                _ => assert_eq!(
                    (object.usize, object.sha256),
                    (object.length, object.checksum)
                ),
            }
        }
        // Links have no content; of the files, initramfs, kernel, tool, and what makes the directories.
        for text in ["initramfs", "kernel", "1.0.0"] {
            assert!(sizes.contains(&(text.len() as u64)), "{sizes:?}");
        }
    }

    #[test]
    fn a_file_that_is_signed_is_never_another_one_and_is_mended_if_it_can_be() {
        let bench = Bench::new();
        init::add_channel(
            &bench.fleet(),
            &"beta".parse().unwrap(),
            crate::prepared::Goal::Publish,
            now(2),
        )
        .unwrap();
        let signed = newest(&bench.fleet(), "stable").objects;
        let objects = indexed(&bench.fleet().public(), &newest(&bench.fleet(), "stable"));
        let object = objects
            .iter()
            .find(|object| object.kind == Kind::File)
            .unwrap();
        for (place, source, mends) in [
            (None, None, true),
            (Some("half"), None, true),
            (None, Some("another"), false),
            // The signed one is there; what the repository has now does not matter.
            (Some(""), Some("another"), true),
        ] {
            let fleet = bench.copy("fleet", &format!("{place:?}-{source:?}-{mends}"));
            let path = |base: &Path| base.join(object.path());
            let (held, original) = (path(&fleet.public()), path(&fleet.repo()));
            match place {
                None => fs::remove_file(&held).unwrap(),
                Some("") => {
                    let bytes = fs::read(&held).unwrap();
                    fs::remove_file(&held).unwrap();
                    fs::write(&held, bytes).unwrap();
                }
                Some(text) => {
                    fs::remove_file(&held).unwrap();
                    fs::write(&held, text).unwrap();
                }
            }
            if let Some(text) = source {
                // What another libostree may have made of it: more bytes behind the same content.
                let bytes = [&fs::read(&original).unwrap(), text.as_bytes()].concat();
                fs::remove_file(&original).unwrap();
                fs::write(&original, bytes).unwrap();
            }
            let outcome = once_more(&fleet, now(3));
            assert_eq!(outcome.is_ok(), mends, "{place:?} {source:?} {outcome:?}");
            if mends {
                assert_eq!(outcome.unwrap().objects, signed);
                assert_eq!(digest_of(&held).unwrap(), (object.length, object.sha256));
                let mut device = bench.device("device");
                assert_eq!(seen(&mut device, &fleet.public(), now(4)).unwrap(), "1.0.0");
            }
        }
    }

    #[test]
    fn what_no_index_names_is_taken_again_from_the_repository() {
        let bench = Bench::new();
        let mut fleet = bench.fleet();
        let plain = Request {
            objects: Some(false),
            ..request("1.1.0")
        };
        assert_eq!(publish(&fleet, &plain, now(2)).unwrap().objects, None);
        assert_eq!(newest(&fleet, "stable").objects, None);
        // Left by whatever it was.
        let commit = newest(&fleet, "stable").commit;
        let object = Object {
            kind: Kind::Commit,
            checksum: commit.0,
            length: 0,
            usize: 0,
            sha256: commit.0,
        };
        let place = fleet.public().join(object.path());
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        fs::write(&place, "garbage").unwrap();
        init::add_channel(
            &fleet,
            &"beta".parse().unwrap(),
            crate::prepared::Goal::Publish,
            now(3),
        )
        .unwrap();
        fleet.settings.full = true;
        let request = Request {
            channel: "beta".parse().unwrap(),
            ..request("1.1.0")
        };
        let published = publish(&fleet, &request, now(4)).unwrap();
        let all = indexed(&fleet.public(), &newest(&fleet, "beta"));
        assert_eq!(published.objects, Some(Summary::of(&all)));
        assert_eq!(Sha256::of(&fs::read(place).unwrap()), commit.0);
        // A repository of another kind has no such files.
        let other = bench.copy("fleet", "bare");
        fs::remove_dir_all(other.repo()).unwrap();
        let made = std::process::Command::new("ostree")
            .arg(format!("--repo={}", other.repo().display()))
            .args(["init", "--mode=bare-user"])
            .status();
        assert!(made.unwrap().success());
        let repo = crate::publish::open_repo(&other.repo()).unwrap();
        let writer = Writer::new(&other.public());
        super::publish(&repo, &other, &writer, commit, &Signed::new()).unwrap_err();
    }
}
