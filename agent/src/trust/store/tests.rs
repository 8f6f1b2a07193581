use std::path::Path;

use super::*;
use crate::commit::Commit;
use crate::trust::fixture::{
    self, ROOT_KEYS, Repository, at, carry_out, commit, hardware, newest, now, version,
};
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
    let refresh = Refresh::new(store, newest("stable"), now(), now());
    let refresh = carry_out(refresh, store, |path, _| answer(repository, path))?;
    refresh.finish(store).unwrap();
    Ok(())
}

fn answer(repository: &Repository, path: &str) -> Reply {
    let file = repository.files.get(path).cloned();
    file.map_or(Reply::NotFound, Reply::Body)
}

fn copy(from: &Path) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        fs::copy(entry.path(), directory.path().join(entry.file_name())).unwrap();
    }
    directory
}

fn accepted(store: &Store) -> Option<Commit> {
    let release = store.accepted(&fixture::channel("stable"), &hardware());
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
    assert_eq!(store.accepted(&fixture::channel("beta"), &hardware()), None);
    assert_eq!(
        store.accepted(&fixture::channel("stable"), &"other".parse().unwrap()),
        None
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
                // Perhaps of another release, and nobody's fault: fetched again.
                ("manifest", 0..=2) => true,
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
    open(directory.path()).keep_root(&roots[1]).unwrap();
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
fn clause_5_3_11_a_root_that_takes_an_online_key_away_takes_its_floors_too() {
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
    let fallen = |store: &Store| {
        let floors = store.floors();
        let set = (floors.root, floors.timestamp, floors.snapshot);
        assert_eq!(
            (set, floors.roles.len(), floors.clock),
            ((2, 0, 0), 0, None)
        );
        // The keys of the targets and of the channel stand.
        assert_eq!(accepted(store), Some(commit("1.0")));
    };

    // As it should be, and cut off at each step.
    for step in 0..4 {
        let directory = copy(filled.path());
        let floors = fs::read(directory.path().join("floors")).unwrap();
        let online = ["timestamp.json", "snapshot.json"];
        let online = online.map(|file| (file, fs::read(directory.path().join(file)).unwrap()));
        let mut store = open(directory.path());
        store.keep_root(root).unwrap();
        fallen(&store);
        if step < 3 {
            fs::write(directory.path().join("floors"), floors).unwrap();
        }
        for (file, bytes) in online.into_iter().skip(step) {
            fs::write(directory.path().join(file), bytes).unwrap();
        }
        let store = open(directory.path());
        fallen(&store);
        assert_eq!(store.timestamp(), None);
        assert!(!directory.path().join("snapshot.json").exists());
        fs::remove_file(directory.path().join("root.json")).unwrap();
        assert_eq!(
            open(directory.path()).floors().root,
            if step < 3 { 1 } else { 2 }
        );
    }

    // The same root in a newer image.
    let store = Store::open(filled.path(), root).unwrap();
    fallen(&store);
    assert_eq!(store.timestamp(), None);
}

#[test]
fn a_root_that_the_trusted_one_does_not_lead_to_is_not_kept() {
    let mut repository = Repository::new();
    let directory = filled(&repository);
    let mut store = open(directory.path());
    repository.root.version = version(3);
    repository.publish_root(&ROOT_KEYS);
    let kept = store.keep_root(repository.file("3.root.json"));
    assert_eq!(
        kept.unwrap_err().downcast_ref(),
        Some(&Refusal::RootNotSequential { have: 1, got: 3 })
    );
    assert!(!directory.path().join("root.json").exists());
}

/// What a power cut leaves at each write of a release: all that was written before it, and perhaps half of the file beside its place.
#[test]
fn a_cut_at_any_write_leaves_a_device_that_goes_on() {
    let mut repository = Repository::new();
    let directory = filled(&repository);
    repository.release("stable", "2.0", 2);
    repository.publish();
    let mut store = open(directory.path());
    let mut states = vec![copy(directory.path())];
    let mut refresh_once = Refresh::new(&store, newest("stable"), now(), now());
    loop {
        let reply = match refresh_once.want() {
            Want::Poll { path, .. } => answer(&repository, path),
            Want::File { path, .. } => answer(&repository, &path),
            Want::Keep => {
                let floors = fs::read(directory.path().join("floors")).unwrap();
                let reply = refresh_once.keep(&mut store).unwrap();
                if fs::read(directory.path().join("floors")).unwrap() != floors {
                    // The floors follow the file that raises them.
                    let between = copy(directory.path());
                    fs::write(between.path().join("floors"), floors).unwrap();
                    states.push(between);
                }
                states.push(copy(directory.path()));
                reply
            }
            Want::Done => break,
        };
        refresh_once = refresh_once.supply(reply).unwrap();
    }
    // timestamp, floors, snapshot, floors, targets, channel, manifest.
    assert_eq!(states.len(), 8);
    for (written, state) in states.iter().enumerate() {
        for file in ["timestamp.json", "floors", "stable.json", "manifest"] {
            fs::write(state.path().join(format!("{file}.part")), "{").unwrap();
        }
        let mut store = open(state.path());
        assert_eq!(set_aside(&store), [] as [&str; 0], "{written}");
        let raised = |from: usize| if written < from { 1 } else { 2 };
        assert_eq!(store.floors().timestamp, raised(1), "{written}");
        assert_eq!(store.floors().roles["stable.json"], raised(3), "{written}");
        // The former release stays accepted until the new one is.
        let want = if written < 7 { "1.0" } else { "2.0" };
        assert_eq!(accepted(&store), Some(commit(want)), "{written}");
        assert_eq!(refresh(&repository, &mut store), Ok(()), "{written}");
        assert_eq!(accepted(&open(state.path())), Some(commit("2.0")));
    }
}

#[test]
fn a_release_that_its_channel_no_longer_lists_is_not_accepted_any_more() {
    let mut repository = Repository::new();
    let directory = filled(&repository);
    let manifest = |path: &str| path.ends_with("manifest.json");
    repository.release("stable", "2.0", 2);
    repository.publish();
    repository.files.retain(|path, _| !manifest(path));
    let mut store = open(directory.path());
    assert!(matches!(
        refresh(&repository, &mut store),
        Err(Refusal::Missing { path }) if manifest(&path)
    ));
    assert_eq!(accepted(&store), Some(commit("1.0")));
    let (stable, _) = repository.channels.get_mut("stable").unwrap();
    stable.targets.retain(|path, _| path.contains("2.0"));
    repository.publish();
    assert!(refresh(&repository, &mut store).is_err());
    assert_eq!(accepted(&store), None);
    assert_eq!(accepted(&open(directory.path())), None);
}

/// What a refusal leaves on the disk is read at the next start, and must not prevent it.
#[test]
fn files_of_two_publications_are_no_error() {
    type Publish = fn(&mut Repository);
    let cases: [(Publish, Option<&str>); 4] = [
        // A release that says it is for another hardware, beside the accepted one.
        (
            |repository| {
                repository.release("stable", "2.0", 2);
                let (stable, _) = repository.channels.get_mut("stable").unwrap();
                let file = stable
                    .targets
                    .get_mut("stable/qemu-x86_64/2.0.commit")
                    .unwrap();
                file.custom.as_mut().unwrap()["offshoot"]["hardware"] = serde_json::json!(["b"]);
                repository.publish();
            },
            Some("1.0"),
        ),
        // The channel is no more.
        (
            |repository| {
                let delegations = repository.targets.delegations.as_mut().unwrap();
                delegations.roles.remove(0);
                repository.publish();
            },
            None,
        ),
        // The channel has another key, and what that signed is not there yet.
        (
            |repository| {
                let delegations = repository.targets.delegations.as_mut().unwrap();
                delegations.keys.extend(fixture::keys(&[41]));
                delegations.roles[0].signers = fixture::signers(&[41], 1);
                repository.publish();
                repository.files.remove("metadata/2.stable.json");
            },
            None,
        ),
        // Only the targets are newer, and what the channel says is not there yet.
        (
            |repository| {
                repository.publish();
                repository.files.remove("metadata/2.stable.json");
            },
            Some("1.0"),
        ),
    ];
    for (index, (publish, want)) in cases.into_iter().enumerate() {
        let mut repository = Repository::new();
        let directory = filled(&repository);
        let mut store = open(directory.path());
        publish(&mut repository);
        assert!(refresh(&repository, &mut store).is_err(), "{index}");
        let want = want.map(commit);
        assert_eq!(accepted(&store), want, "{index}");
        assert_eq!(accepted(&open(directory.path())), want, "{index}");
    }
}

#[test]
fn a_role_has_one_file_name() {
    for (name, file) in [
        ("stable", "stable"),
        ("../a", "..%2Fa"),
        ("50%", "50%25"),
        ("\u{fc}", "%C3%BC"),
    ] {
        assert_eq!(quoted(name), file);
        assert_eq!(unquoted(file).as_deref(), Some(name));
    }
    for file in ["%73table", "..%2fa", "50%", "50%2", "a b", "%FF", "%+1"] {
        assert_eq!(unquoted(file), None, "{file}");
    }
}

#[test]
fn a_failed_write_leaves_a_store_that_can_be_written_again() {
    let mut repository = Repository::new();
    let filled = filled(&repository);
    repository.release("stable", "2.0", 2);
    repository.publish();
    for file in [
        "timestamp.json",
        "floors",
        "snapshot.json",
        "targets.json",
        "stable.json",
        "manifest",
    ] {
        let directory = copy(filled.path());
        let mut store = open(directory.path());
        // A directory where the temporary file would be.
        let block = directory.path().join(format!("{file}.part"));
        fs::create_dir(&block).unwrap();
        let mut refresh_once = Refresh::new(&store, newest("stable"), now(), now());
        loop {
            let reply = match refresh_once.want() {
                Want::Poll { path, .. } => answer(&repository, path),
                Want::File { path, .. } => answer(&repository, &path),
                Want::Keep => match refresh_once.keep(&mut store) {
                    Ok(kept) => kept,
                    Err(_) => break,
                },
                Want::Done => unreachable!("{file} was written"),
            };
            refresh_once = refresh_once.supply(reply).unwrap();
        }
        fs::remove_dir(&block).unwrap();
        assert_eq!(refresh(&repository, &mut store), Ok(()));
        assert_eq!(accepted(&open(directory.path())), Some(commit("2.0")));
    }
}

#[test]
fn clause_5_1_the_clock_is_never_before_the_image_nor_before_what_was_signed() {
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
        roles: BTreeMap::from([("\n\".json".into(), 5), ("stable.json".into(), 4)]),
        clock: Some(at("2026-01-31T00:00:00Z")),
        keys: BTreeSet::from(["timestamp ed25519 00".into()]),
    };
    let body = r#"{"format":1,"root":1,"timestamp":2,"snapshot":3,"roles":{"\n\".json":5,"stable.json":4},"clock":"2026-01-31T00:00:00Z","keys":["timestamp ed25519 00"]}"#;
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
