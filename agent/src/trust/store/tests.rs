use std::path::Path;

use super::*;
use crate::commit::Commit;
use crate::trust::fixture::{self, ROOT_KEYS, Repository, at, commit, hardware, now, version};
use crate::trust::refresh::{Refresh, Reply, Want};

fn open(directory: &Path) -> Store {
    Store::open(directory, Repository::new().file("1.root.json")).unwrap()
}

/// A directory that has seen this repository's stable channel.
fn filled(repository: &Repository) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let mut store = open(directory.path());
    refresh(repository, &mut store).unwrap();
    directory
}

fn refresh(repository: &Repository, store: &mut Store) -> Result<(), Refusal> {
    let mut refresh = Refresh::new(store, fixture::channel("stable"), hardware(), now(), now());
    loop {
        let reply = match refresh.want() {
            Want::Poll { path, .. } => Reply::Body(repository.files[path].clone()),
            Want::File { path, .. } => repository
                .files
                .get(&path)
                .cloned()
                .map_or(Reply::NotFound, Reply::Body),
            Want::KeepRoot(bytes) => {
                store.persist_root(bytes).unwrap();
                Reply::Kept
            }
            Want::Done => break,
        };
        refresh = refresh.supply(reply)?;
    }
    refresh.finish(store).unwrap();
    Ok(())
}

fn copy(from: &Path) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        fs::copy(entry.path(), directory.path().join(entry.file_name())).unwrap();
    }
    directory
}

fn accepted(store: &Store) -> Option<Commit> {
    let release = store
        .accepted(&fixture::channel("stable"), &hardware())
        .unwrap();
    release.map(|release| release.manifest.commit)
}

fn set_aside(store: &Store) -> Vec<&str> {
    store
        .set_aside()
        .iter()
        .map(|aside| aside.file.as_str())
        .collect()
}

#[test]
fn what_was_accepted_before_a_restart_is_accepted_after_it() {
    let directory = filled(&Repository::new());
    let store = open(directory.path());
    assert_eq!(accepted(&store), Some(commit("1.0")));
    assert_eq!(set_aside(&store), [] as [&str; 0]);
    assert_eq!(
        store.accepted(&fixture::channel("beta"), &hardware()),
        Ok(None)
    );
    assert_eq!(
        store.accepted(&fixture::channel("stable"), &"other".parse().unwrap()),
        Ok(None)
    );
}

type Spoil = fn(&[u8]) -> Vec<u8>;

const SPOILS: [Spoil; 4] = [
    |bytes| bytes[..bytes.len() / 2].to_vec(),
    |_| Vec::new(),
    |bytes| {
        bytes
            .iter()
            .map(|byte| if byte.is_ascii_digit() { b'7' } else { *byte })
            .collect()
    },
    |_| vec![b' '; 5 << 20],
];

/// Each file in turn cut off, emptied, changed, and far too long: the floors stand, the file is set aside, the next refresh heals.
#[test]
fn no_single_corrupt_file_lowers_a_floor() {
    let mut repository = Repository::new();
    let old = repository.clone();
    repository.root.version = version(2);
    repository.publish_root(&ROOT_KEYS);
    repository.release("stable", "2.0", 2);
    repository.publish();
    let filled = filled(&repository);
    let floors = open(filled.path()).floors().clone();
    for file in [
        "root.json",
        "timestamp.json",
        "snapshot.json",
        "targets.json",
        "stable.json",
        "floors",
        "manifest",
    ] {
        for (index, spoil) in SPOILS.into_iter().enumerate() {
            let directory = copy(filled.path());
            let path = directory.path().join(file);
            let good = fs::read(&path).unwrap();
            let bad = spoil(&good);
            fs::write(&path, &bad).unwrap();
            let mut store = open(directory.path());
            assert_eq!(store.floors(), &floors, "{file} {index}");
            let quiet = match (file, index) {
                // Not what is announced, or announced by what is above it: nobody's fault, and fetched again.
                ("snapshot.json" | "targets.json" | "stable.json" | "manifest", 0..=2) => true,
                _ => false,
            };
            assert_eq!(
                set_aside(&store),
                if quiet { vec![] } else { vec![file] },
                "{file} {index}"
            );
            if !quiet {
                assert_eq!(
                    fs::read(directory.path().join(format!("{file}.corrupt"))).unwrap(),
                    bad
                );
            }
            assert!(
                matches!(refresh(&old, &mut store), Err(Refusal::RolledBack { .. })),
                "{file} {index}"
            );
            assert_eq!(refresh(&repository, &mut store), Ok(()), "{file} {index}");
            assert_eq!(accepted(&store), Some(commit("2.0")));
            let store = open(directory.path());
            assert_eq!(
                (accepted(&store), store.floors()),
                (Some(commit("2.0")), &floors),
                "{file} {index}"
            );
            if file != "floors" {
                assert_eq!(fs::read(&path).unwrap(), good, "{file} {index}");
            }
        }
    }
}

#[test]
fn a_lost_root_is_found_again_before_anything_is_believed() {
    let mut repository = Repository::new();
    let former = repository.clone();
    // The new root takes the timestamp's key away: the image's root, which has it, may not stand in for it.
    repository.root.version = version(2);
    repository.root.keys.extend(fixture::keys(&[11]));
    repository
        .root
        .roles
        .insert("timestamp".into(), fixture::signers(&[11], 1));
    repository.publish_root(&ROOT_KEYS);
    repository.timestamp_key = 11;
    repository.publish();
    let directory = filled(&repository);
    fs::write(directory.path().join("root.json"), "{}").unwrap();
    let mut store = open(directory.path());
    assert_eq!(set_aside(&store), ["root.json", "timestamp.json"]);
    assert_eq!(store.root().version, version(1));
    assert_eq!(
        refresh(&former, &mut store),
        Err(Refusal::RolledBack {
            role: "root".into(),
            have: 2,
            got: 1
        })
    );
    assert_eq!(store.floors().timestamp, 2);
    assert_eq!(refresh(&repository, &mut store), Ok(()));
}

#[test]
fn the_newer_of_the_images_root_and_the_stored_one_counts() {
    let mut repository = Repository::new();
    let directory = filled(&repository);
    let mut roots = vec![repository.file("1.root.json").to_vec()];
    for number in 2..=3 {
        repository.root.version = version(number);
        repository.publish_root(&ROOT_KEYS);
        roots.push(repository.file(&format!("{number}.root.json")).to_vec());
    }
    open(directory.path()).persist_root(&roots[1]).unwrap();
    for (shipped, want) in [(0, 2), (1, 2), (2, 3), (0, 2)] {
        let store = Store::open(directory.path(), &roots[shipped]).unwrap();
        assert_eq!(
            (store.root().version, accepted(&store)),
            (version(want), Some(commit("1.0")))
        );
    }
    assert!(Store::open(directory.path(), b"{}").is_err());
}

#[test]
fn a_root_that_takes_an_online_key_away_takes_its_floors_too() {
    let mut repository = Repository::new();
    let filled = filled(&repository);
    repository.root.version = version(2);
    repository.root.keys.extend(fixture::keys(&[11]));
    repository
        .root
        .roles
        .insert("timestamp".into(), fixture::signers(&[11], 1));
    repository.publish_root(&ROOT_KEYS);
    let root = repository.file("2.root.json");
    let fallen = Floors {
        root: 2,
        ..Floors::default()
    };

    let directory = copy(filled.path());
    let mut store = open(directory.path());
    store.persist_root(root).unwrap();
    assert_eq!((store.floors(), accepted(&store)), (&fallen, None));
    fs::remove_file(directory.path().join("root.json")).unwrap();
    assert_eq!(open(directory.path()).floors().root, 2);

    // The same root in a newer image.
    let store = Store::open(filled.path(), root).unwrap();
    assert_eq!((store.floors(), accepted(&store)), (&fallen, None));
}

#[test]
fn a_root_that_the_trusted_one_does_not_lead_to_is_not_kept() {
    let mut repository = Repository::new();
    let directory = filled(&repository);
    let mut store = open(directory.path());
    repository.root.version = version(3);
    repository.publish_root(&ROOT_KEYS);
    let kept = store.persist_root(repository.file("3.root.json"));
    assert_eq!(
        kept.unwrap_err().downcast_ref(),
        Some(&Refusal::RootNotSequential { have: 1, got: 3 })
    );
    assert!(!directory.path().join("root.json").exists());
}

/// The files of one publication over those of another, up to any of them: what a power cut leaves.
#[test]
fn a_cut_between_any_two_writes_leaves_a_device_that_goes_on() {
    let mut repository = Repository::new();
    let (former, before) = (
        filled(&repository),
        open(filled(&repository).path()).floors().clone(),
    );
    repository.release("stable", "2.0", 2);
    repository.publish();
    let newer = filled(&repository);
    let order = [
        "stable.json",
        "manifest",
        "targets.json",
        "snapshot.json",
        "timestamp.json",
        "floors",
    ];
    for written in 0..=order.len() {
        let directory = tempfile::tempdir().unwrap();
        for (index, file) in order.iter().enumerate() {
            let from = if index < written { &newer } else { &former };
            fs::copy(from.path().join(file), directory.path().join(file)).unwrap();
        }
        fs::write(directory.path().join("timestamp.json.part"), "{").unwrap();
        let mut store = open(directory.path());
        assert_eq!(set_aside(&store), [] as [&str; 0], "{written}");
        // The timestamp is what makes it count.
        assert_eq!(
            store.floors().timestamp,
            if written < 5 { before.timestamp } else { 2 },
            "{written}"
        );
        let want = match written {
            0 => Some(commit("1.0")),
            5.. => Some(commit("2.0")),
            _ => None,
        };
        assert_eq!(accepted(&store), want, "{written}");
        assert_eq!(refresh(&repository, &mut store), Ok(()), "{written}");
        assert_eq!(
            accepted(&open(directory.path())),
            Some(commit("2.0")),
            "{written}"
        );
    }
}

#[test]
fn a_failed_write_leaves_a_store_that_can_be_written_again() {
    let mut repository = Repository::new();
    let directory = filled(&repository);
    let mut store = open(directory.path());
    repository.release("stable", "2.0", 2);
    repository.publish();
    // A directory where the temporary file would be.
    let block = directory.path().join("snapshot.json.part");
    fs::create_dir(&block).unwrap();
    let mut refresh_once =
        Refresh::new(&store, fixture::channel("stable"), hardware(), now(), now());
    while refresh_once.want() != Want::Done {
        let path = match refresh_once.want() {
            Want::Poll { path, .. } => path.to_owned(),
            Want::File { path, .. } => path,
            Want::KeepRoot(_) | Want::Done => unreachable!(),
        };
        refresh_once = refresh_once
            .supply(
                repository
                    .files
                    .get(&path)
                    .cloned()
                    .map_or(Reply::NotFound, Reply::Body),
            )
            .unwrap();
    }
    assert!(refresh_once.finish(&mut store).is_err());
    fs::remove_dir(&block).unwrap();
    assert_eq!(refresh(&repository, &mut store), Ok(()));
    assert_eq!(accepted(&open(directory.path())), Some(commit("2.0")));
}

#[test]
fn the_clock_is_never_before_the_image_nor_before_what_was_signed() {
    let (old, built, issued, late) = (
        at("1970-01-01T00:00:00Z"),
        at("2025-01-01T00:00:00Z"),
        at("2026-01-31T00:00:00Z"),
        at("2026-06-01T00:00:00Z"),
    );
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    assert_eq!(
        (store.now(old, built), store.now(late, built)),
        (built, late)
    );
    let directory = filled(&Repository::new());
    let store = open(directory.path());
    assert_eq!(
        (
            store.now(old, built),
            store.now(late, built),
            store.now(old, late)
        ),
        (issued, late, late)
    );
}

#[test]
fn the_floors_file_has_one_form() {
    let floors = Floors {
        root: 1,
        timestamp: 2,
        snapshot: 3,
        roles: BTreeMap::from([("stable.json".into(), 4)]),
        clock: Some(at("2026-01-31T00:00:00Z")),
        keys: BTreeSet::from(["timestamp ed25519 00".into()]),
    };
    let body = r#"{"clock":"2026-01-31T00:00:00Z","format":1,"keys":["timestamp ed25519 00"],"roles":{"stable.json":4},"root":1,"snapshot":3,"timestamp":2}"#;
    let file = format!("{}\n{body}", Sha256::of(body.as_bytes()));
    assert_eq!(
        String::from_utf8(floors_bytes(&floors).unwrap()).unwrap(),
        file
    );
    assert_eq!(parse_floors(file.as_bytes()), Ok(floors));
    for at in 0..file.len() {
        let mut spoiled = file.clone().into_bytes();
        spoiled[at] ^= 1;
        assert!(parse_floors(&spoiled).is_err(), "{at}");
        assert!(parse_floors(&file.as_bytes()[..at]).is_err(), "{at}");
    }
}
