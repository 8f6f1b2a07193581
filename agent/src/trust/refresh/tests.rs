use std::collections::BTreeMap;
use std::fs;

use super::*;
use crate::trust::Refusal;
use crate::trust::Release;
use crate::trust::fixture::{
    self, ROOT_KEYS, Repository, SNAPSHOT_KEY, TIMESTAMP_KEY, at, carry_out, commit, newest, now,
    sign, version,
};
use crate::trust::goal::Newest;
use crate::trust::schema::{MetaFile, Version};

/// A device with a store, that has seen nothing but its image's root.
struct Device {
    directory: tempfile::TempDir,
    store: Store,
    channel: &'static str,
    now: Time,
    /// Whether the server answers `not modified`.
    conditional: bool,
    requests: Vec<String>,
}

impl Device {
    fn new(repository: &Repository) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path(), repository.file("1.root.json")).unwrap();
        Self {
            directory,
            store,
            channel: "stable",
            now: now(),
            conditional: true,
            requests: Vec::new(),
        }
    }

    fn restart(&mut self, repository: &Repository) {
        self.store = Store::open(self.directory.path(), repository.file("1.root.json")).unwrap();
    }

    fn start(&self) -> Refresh<Newest> {
        Refresh::new(
            &self.store,
            newest(self.channel),
            self.now,
            at("2020-01-01T00:00:00Z"),
        )
    }

    fn refresh(&mut self, repository: &Repository) -> Result<Found, Refusal> {
        self.refresh_from(&repository.files)
    }

    fn refresh_from(&mut self, files: &BTreeMap<String, Vec<u8>>) -> Result<Found, Refusal> {
        self.requests.clear();
        let refresh = self.start();
        let held = self.store.files().timestamp.clone();
        let refresh = carry_out(refresh, &mut self.store, |path, conditional| {
            self.requests.push(path.to_owned());
            match files.get(path) {
                None => Reply::NotFound,
                body if self.conditional && conditional && body == held.as_ref() => {
                    Reply::NotModified
                }
                Some(body) => Reply::Body(body.clone()),
            }
        })?;
        Ok(refresh.finish(&mut self.store).unwrap())
    }

    fn requested(&self) -> Vec<&str> {
        self.requests
            .iter()
            .map(|path| path.strip_prefix("metadata/").unwrap_or("manifest"))
            .collect()
    }

    /// Names and contents, to see what was written.
    fn disk(&self) -> BTreeMap<String, Vec<u8>> {
        let entries = fs::read_dir(self.directory.path())
            .unwrap()
            .map(Result::unwrap);
        entries
            .map(|entry| {
                (
                    entry.file_name().into_string().unwrap(),
                    fs::read(entry.path()).unwrap(),
                )
            })
            .collect()
    }
}

type Found = Outcome<Verified<Release>>;

fn release(outcome: Result<Found, Refusal>) -> Result<Option<String>, Refusal> {
    outcome.map(|outcome| {
        outcome
            .found
            .map(|release| release.manifest.version.to_string())
    })
}

fn rolled_back<T>(role: &str, have: u64, got: u64) -> Result<T, Refusal> {
    Err(Refusal::RolledBack {
        role: role.into(),
        have,
        got,
    })
}

#[test]
fn a_first_refresh_asks_for_the_roots_before_it_judges_anything() {
    let repository = Repository::new();
    let mut device = Device::new(&repository);
    let outcome = device.refresh(&repository).unwrap();
    assert!(!outcome.unchanged);
    assert_eq!(
        outcome.found.map(|release| release.manifest.commit),
        Some(commit("1.0"))
    );
    assert_eq!(
        device.requested(),
        [
            "timestamp.json",
            "2.root.json",
            "1.snapshot.json",
            "1.targets.json",
            "1.stable.json",
            "manifest"
        ]
    );
    let disk = device.disk();
    for (file, path) in [
        ("timestamp.json", "metadata/timestamp.json"),
        ("snapshot.json", "metadata/1.snapshot.json"),
        ("targets.json", "metadata/1.targets.json"),
        ("stable.json", "metadata/1.stable.json"),
        ("manifest", device.requests.last().unwrap()),
    ] {
        assert_eq!(disk[file], repository.files[path], "{file}");
    }
    assert_eq!(disk.len(), 6, "these and the floors: {:?}", disk.keys());
}

#[test]
fn clause_5_3_an_idle_poll_is_one_request_and_writes_nothing() {
    let repository = Repository::new();
    let mut device = Device::new(&repository);
    let first = device.refresh(&repository).unwrap();
    // The directory is gone, so whatever is written fails.
    let disk = device.disk();
    fs::remove_dir_all(device.directory.path()).unwrap();
    for conditional in [true, false] {
        device.conditional = conditional;
        let outcome = device.refresh(&repository);
        assert_eq!(
            outcome,
            Ok(Outcome {
                unchanged: true,
                ..first.clone()
            })
        );
        assert_eq!(device.requested(), ["timestamp.json"]);
    }
    fs::create_dir(device.directory.path()).unwrap();
    for (name, bytes) in disk {
        fs::write(device.directory.path().join(name), bytes).unwrap();
    }
    device.restart(&repository);
    assert_eq!(
        device.refresh(&repository),
        Ok(Outcome {
            unchanged: true,
            ..first
        })
    );
    assert_eq!(device.requested(), ["timestamp.json"]);
}

#[test]
fn a_frozen_server_is_noticed_when_the_timestamp_expires() {
    let repository = Repository::new();
    let mut device = Device::new(&repository);
    device.refresh(&repository).unwrap();
    device.now = at("2026-02-08T00:00:00Z");
    let expired = Refusal::Expired {
        role: "timestamp".into(),
        expires: device.now,
        now: device.now,
    };
    assert_eq!(device.refresh(&repository), Err(expired));
    assert_eq!(device.requested(), ["timestamp.json", "2.root.json"]);
}

#[test]
fn what_expired_on_the_device_and_is_still_announced_is_not_fetched_again() {
    let mut repository = Repository::new();
    repository.timestamp.expires = at("2029-01-01T00:00:00Z");
    repository.publish_timestamp();
    for (role, expires) in [
        ("snapshot", "2026-03-01T00:00:00Z"),
        ("targets", "2027-01-01T00:00:00Z"),
        ("stable", "2026-04-01T00:00:00Z"),
    ] {
        let mut repository = repository.clone();
        for other in [
            &mut repository.snapshot.expires,
            &mut repository.targets.expires,
        ] {
            *other = at("2029-01-01T00:00:00Z");
        }
        for (channel, _) in repository.channels.values_mut() {
            channel.expires = at("2029-01-01T00:00:00Z");
        }
        match role {
            "snapshot" => repository.snapshot.expires = at(expires),
            "targets" => repository.targets.expires = at(expires),
            _ => repository.channels.get_mut("stable").unwrap().0.expires = at(expires),
        }
        repository.publish();
        let mut device = Device::new(&repository);
        device.refresh(&repository).unwrap();
        device.now = at(expires);
        let expired = Refusal::Expired {
            role: role.into(),
            expires: device.now,
            now: device.now,
        };
        assert_eq!(device.refresh(&repository), Err(expired));
        assert_eq!(device.requested(), ["timestamp.json", "2.root.json"]);
    }
}

#[test]
fn only_what_is_announced_anew_is_fetched() {
    let mut repository = Repository::new();
    let mut device = Device::new(&repository);
    let first = device.refresh(&repository).unwrap();
    repository.publish_timestamp();
    assert_eq!(
        device.refresh(&repository),
        Ok(Outcome {
            unchanged: false,
            ..first
        })
    );
    assert_eq!(device.requested(), ["timestamp.json", "2.root.json"]);

    repository.release("stable", "2.0", 2);
    repository.publish();
    assert_eq!(release(device.refresh(&repository)), Ok(Some("2.0".into())));
    assert_eq!(
        device.requested(),
        [
            "timestamp.json",
            "2.root.json",
            "2.snapshot.json",
            "2.targets.json",
            "2.stable.json",
            "manifest"
        ]
    );
}

#[test]
fn a_new_channel_is_fetched_although_nothing_changed_and_replaces_the_former() {
    let repository = Repository::new();
    let mut device = Device::new(&repository);
    device.refresh(&repository).unwrap();
    device.channel = "beta";
    assert_eq!(release(device.refresh(&repository)), Ok(Some("1.1".into())));
    assert_eq!(
        device.requested(),
        ["timestamp.json", "1.beta.json", "manifest"]
    );
    assert!(device.disk().contains_key("beta.json") && !device.disk().contains_key("stable.json"));
    device.channel = "gamma";
    assert_eq!(
        device.refresh(&repository),
        Err(Refusal::NoSuchChannel {
            channel: "gamma".into()
        })
    );
}

#[test]
fn a_channel_without_a_release_for_the_hardware_is_no_error() {
    let mut repository = Repository::new();
    let mut device = Device::new(&repository);
    device.refresh(&repository).unwrap();
    repository
        .channels
        .get_mut("stable")
        .unwrap()
        .0
        .targets
        .clear();
    repository.publish();
    assert_eq!(
        device.refresh(&repository),
        Ok(Outcome {
            found: None,
            unchanged: false
        })
    );
    assert_eq!(
        device.refresh(&repository),
        Ok(Outcome {
            found: None,
            unchanged: true
        })
    );
    assert!(!device.disk().contains_key("manifest"));
}

#[test]
fn clause_5_3_8_5_3_9_roots_are_walked_one_by_one_and_each_is_kept() {
    let mut repository = Repository::new();
    let mut device = Device::new(&repository);
    repository.root.version = version(2);
    repository.root.keys.extend(fixture::keys(&[4, 5]));
    repository
        .root
        .roles
        .insert("root".into(), fixture::signers(&[4, 5], 2));
    repository.publish_root(&[1, 2, 4, 5]);
    repository.root.version = version(3);
    repository.root.keys.extend(fixture::keys(&[11]));
    repository
        .root
        .roles
        .insert("timestamp".into(), fixture::signers(&[11], 1));
    repository.publish_root(&[4, 5]);
    repository.timestamp_key = 11;
    repository.publish_timestamp();
    assert_eq!(release(device.refresh(&repository)), Ok(Some("1.0".into())));
    assert_eq!(
        device.requested()[..4],
        [
            "timestamp.json",
            "2.root.json",
            "3.root.json",
            "4.root.json"
        ]
    );
    assert_eq!(device.disk()["root.json"], repository.file("3.root.json"));
    device.restart(&repository);
    assert_eq!(device.store.root().version, version(3));

    // Roots that were accepted stay, although what follows is refused.
    repository.root.version = version(4);
    repository.publish_root(&[4, 5]);
    repository.timestamp_key = TIMESTAMP_KEY;
    repository.publish_timestamp();
    assert_eq!(
        device.refresh(&repository),
        Err(Refusal::BelowThreshold {
            role: "timestamp".into(),
            have: 0,
            need: 1
        })
    );
    assert_eq!(
        device.requested(),
        ["timestamp.json", "4.root.json", "5.root.json"]
    );
    assert_eq!(device.disk()["root.json"], repository.file("4.root.json"));
}

#[test]
fn clause_5_3_3_a_refresh_takes_a_bounded_number_of_roots_and_the_next_one_goes_on() {
    let mut repository = Repository::new();
    let mut device = Device::new(&repository);
    for number in 2..=40 {
        repository.root.version = version(number);
        repository.publish_root(&ROOT_KEYS);
    }
    assert_eq!(release(device.refresh(&repository)), Ok(Some("1.0".into())));
    assert_eq!(device.store.root().version, version(33));
    repository.publish_timestamp();
    device.refresh(&repository).unwrap();
    assert_eq!(device.store.root().version, version(40));
}

#[test]
fn a_root_that_expired_on_the_device_is_replaced_even_when_nothing_else_is_new() {
    let mut repository = Repository::new();
    repository.root.expires = at("2026-02-02T00:00:00Z");
    repository.publish_root(&ROOT_KEYS);
    let mut device = Device::new(&repository);
    let first = device.refresh(&repository).unwrap();
    device.now = at("2026-02-03T00:00:00Z");
    let expired = Refusal::Expired {
        role: "root".into(),
        expires: at("2026-02-02T00:00:00Z"),
        now: device.now,
    };
    assert_eq!(device.refresh(&repository), Err(expired));
    repository.root.version = version(2);
    repository.root.expires = at("2030-01-01T00:00:00Z");
    repository.publish_root(&ROOT_KEYS);
    assert_eq!(
        device.refresh(&repository),
        Ok(Outcome {
            unchanged: true,
            ..first
        })
    );
    assert_eq!(
        device.requested(),
        ["timestamp.json", "2.root.json", "3.root.json"]
    );
}

#[test]
fn clause_5_4_3_an_older_repository_is_refused_also_after_a_restart() {
    let mut repository = Repository::new();
    let mut device = Device::new(&repository);
    let old = repository.files.clone();
    repository.publish();
    device.refresh(&repository).unwrap();
    for _ in 0..2 {
        assert_eq!(device.refresh_from(&old), rolled_back("timestamp", 2, 1));
        device.restart(&repository);
    }
}

#[test]
fn a_role_that_goes_back_under_a_new_snapshot_is_refused() {
    let mut repository = Repository::new();
    let mut device = Device::new(&repository);
    repository.publish();
    device.refresh(&repository).unwrap();
    let before = device.disk();
    repository.channels.get_mut("beta").unwrap().0.version = Version::FIRST;
    repository.publish();
    assert_eq!(device.refresh(&repository), rolled_back("beta", 2, 1));
    repository.channels.remove("beta");
    repository.publish();
    assert_eq!(
        device.refresh(&repository),
        Err(Refusal::RoleVanished {
            role: "beta".into(),
            have: 2
        })
    );
    let after = device.disk();
    for file in ["snapshot.json", "targets.json", "stable.json", "manifest"] {
        assert_eq!(after[file], before[file], "{file}");
    }
}

/// 5.4.5, 5.5.7, 5.6.6: and the release that was accepted before stays accepted.
#[test]
fn clause_5_4_5_5_5_7_5_6_6_what_was_accepted_is_kept_although_the_refresh_stops_later() {
    let mut repository = Repository::new();
    let mut first = Device::new(&repository);
    first.refresh(&repository).unwrap();
    let before = first.disk();
    repository.release("stable", "2.0", 2);
    repository.publish();
    let manifest = repository
        .files
        .keys()
        .find(|path| path.ends_with(".2.0.manifest.json"))
        .unwrap()
        .clone();
    let files = [
        ("timestamp.json", "metadata/timestamp.json"),
        ("snapshot.json", "metadata/2.snapshot.json"),
        ("targets.json", "metadata/2.targets.json"),
        ("stable.json", "metadata/2.stable.json"),
        ("manifest", &manifest),
    ];
    for (index, (_, missing)) in files.iter().enumerate() {
        let mut device = Device::new(&Repository::new());
        device.refresh(&Repository::new()).unwrap();
        let mut left = repository.files.clone();
        left.remove(*missing);
        for _ in 0..2 {
            assert_eq!(
                device.refresh_from(&left),
                Err(Refusal::Missing {
                    path: (*missing).into()
                })
            );
            // Nobody waits for a newer timestamp to learn of a newer root.
            let top_level = matches!(index, 1 | 2);
            assert!(!top_level || device.requested().contains(&"2.root.json"));
            let disk = device.disk();
            for (kept, (file, path)) in files.iter().enumerate() {
                let want = if kept < index {
                    &repository.files[*path]
                } else {
                    &before[*file]
                };
                assert_eq!(&disk[*file], want, "{file} without {missing}");
            }
            let accepted = device
                .store
                .accepted(&fixture::channel("stable"), &fixture::hardware());
            let version = |release: Verified<Release>| release.manifest.version.to_string();
            assert_eq!(accepted.map(version), Some("1.0".into()));
            device.restart(&repository);
        }
        assert_eq!(release(device.refresh(&repository)), Ok(Some("2.0".into())));
    }
}

#[test]
fn clause_5_4_3_1_a_second_timestamp_of_one_version_is_not_believed() {
    let mut repository = Repository::new();
    let mut device = Device::new(&repository);
    let first = device.refresh(&repository).unwrap();
    repository.timestamp.version = Version::FIRST;
    repository.timestamp.expires = at("2029-01-01T00:00:00Z");
    repository.release("stable", "2.0", 2);
    repository.publish();
    repository.timestamp.version = Version::FIRST;
    repository.publish_timestamp();
    assert_eq!(
        device.refresh(&repository),
        Ok(Outcome {
            unchanged: true,
            ..first
        })
    );
    device.now = at("2026-02-08T00:00:00Z");
    let expired = Refusal::Expired {
        role: "timestamp".into(),
        expires: device.now,
        now: device.now,
    };
    assert_eq!(device.refresh(&repository), Err(expired));
}

/// Versions near the last 64-bit number, signed by a stolen key, are forgotten with that key.
#[test]
fn clause_5_3_11_a_rotated_online_key_recovers_from_a_fast_forward() {
    for (role, stolen, fresh) in [
        ("timestamp", TIMESTAMP_KEY, 11),
        ("snapshot", SNAPSHOT_KEY, 21),
    ] {
        let honest = Repository::new();
        let mut device = Device::new(&honest);
        let mut attacked = honest.clone();
        match role {
            "timestamp" => {
                attacked.timestamp.version = version(u64::MAX - 1);
                attacked.timestamp.expires = at("2099-01-02T00:00:00Z");
                attacked.timestamp.issued = Some(at("2099-01-01T00:00:00Z"));
                attacked.publish_timestamp();
            }
            _ => {
                attacked.snapshot.version = version(u64::MAX - 1);
                attacked.publish();
            }
        }
        device.refresh(&attacked).unwrap();

        let mut recovered = honest.clone();
        recovered.publish();
        let refused = device.refresh(&recovered);
        match role {
            "timestamp" => assert!(
                matches!(refused, Err(Refusal::Expired { role, .. }) if role == "root"),
                "by a clock in 2099"
            ),
            _ => assert_eq!(refused, rolled_back("snapshot", u64::MAX - 1, 2)),
        }
        recovered.root.version = version(2);
        recovered.root.keys.remove(&fixture::keyid(stolen));
        recovered.root.keys.extend(fixture::keys(&[fresh]));
        recovered
            .root
            .roles
            .insert(role.into(), fixture::signers(&[fresh], 1));
        recovered.publish_root(&ROOT_KEYS);
        match role {
            "timestamp" => recovered.timestamp_key = fresh,
            _ => recovered.snapshot_key = fresh,
        }
        recovered.publish();
        device.restart(&honest);
        assert_eq!(
            release(device.refresh(&recovered)),
            Ok(Some("1.0".into())),
            "{role}"
        );
        assert_eq!(device.store.floors().timestamp, 3);
        assert_eq!(device.store.now(now(), now()), now());
        assert_eq!(
            device.refresh_from(&honest.files),
            Err(Refusal::BelowThreshold {
                role: role.into(),
                have: 0,
                need: 1
            })
            .or_else(|refusal: Refusal| match role {
                "timestamp" => Err(refusal),
                // The timestamp's key stands, and so does the floor that it has set since.
                _ => rolled_back("timestamp", 3, 1),
            })
        );
    }
}

/// The timestamp that was signed beside the stolen snapshot key is forgotten with it: a new one may have the same version.
#[test]
fn clause_5_3_11_a_timestamp_is_forgotten_with_the_snapshots_key() {
    let honest = Repository::new();
    let mut device = Device::new(&honest);
    let mut attacked = honest.clone();
    attacked.snapshot.version = version(u64::MAX - 1);
    attacked.publish();
    device.refresh(&attacked).unwrap();
    let mut recovered = honest;
    recovered.root.version = version(2);
    recovered.root.keys.extend(fixture::keys(&[21]));
    recovered
        .root
        .roles
        .insert("snapshot".into(), fixture::signers(&[21], 1));
    recovered.publish_root(&ROOT_KEYS);
    recovered.snapshot_key = 21;
    recovered.release("stable", "2.0", 2);
    recovered.publish();
    assert_eq!(device.store.floors().timestamp, 2);
    assert_eq!(release(device.refresh(&recovered)), Ok(Some("2.0".into())));
    assert_eq!(device.store.floors().timestamp, 2);
}

#[test]
fn a_key_that_was_taken_away_and_given_back_has_lost_its_floors() {
    let mut repository = Repository::new();
    let mut device = Device::new(&repository);
    repository.timestamp.version = version(9);
    repository.publish_timestamp();
    device.refresh(&repository).unwrap();
    repository.root.keys.extend(fixture::keys(&[11]));
    for (number, key) in [(2, 11), (3, TIMESTAMP_KEY)] {
        repository.root.version = version(number);
        repository
            .root
            .roles
            .insert("timestamp".into(), fixture::signers(&[key], 1));
        repository.publish_root(&ROOT_KEYS);
    }
    repository.timestamp.version = version(4);
    repository.publish_timestamp();
    assert_eq!(release(device.refresh(&repository)), Ok(Some("1.0".into())));
    assert_eq!(device.store.floors().timestamp, 4);
}

#[test]
fn clause_5_3_3_5_4_1_5_5_1_5_6_1_a_body_beyond_its_limit_is_refused() {
    let repository = Repository::new();
    for path in [
        "metadata/timestamp.json",
        "metadata/2.root.json",
        "metadata/1.snapshot.json",
        "metadata/1.targets.json",
        "metadata/1.stable.json",
    ] {
        let mut device = Device::new(&repository);
        let mut files = repository.files.clone();
        let limit = match (path, files.get(path)) {
            ("metadata/timestamp.json", _) => verify::TIMESTAMP_LIMIT,
            (_, None) => verify::ROOT_LIMIT,
            (_, Some(body)) => body.len() as u64,
        };
        files.insert(path.into(), vec![b' '; usize::try_from(limit).unwrap() + 1]);
        assert_eq!(
            device.refresh_from(&files),
            Err(Refusal::TooLong {
                role: path.into(),
                limit
            })
        );
    }
}

#[test]
fn the_limit_is_told_to_the_transport() {
    let repository = Repository::new();
    let device = Device::new(&repository);
    let refresh = device.start();
    assert_eq!(
        refresh.want(),
        Want::Poll {
            path: "metadata/timestamp.json",
            limit: verify::TIMESTAMP_LIMIT,
            conditional: false
        }
    );
    let refresh = refresh
        .supply(Reply::Body(repository.file("timestamp.json").to_vec()))
        .unwrap();
    assert_eq!(
        refresh.want(),
        Want::File {
            path: "metadata/2.root.json".into(),
            limit: verify::ROOT_LIMIT,
            missing_is_ok: true
        }
    );
    let refresh = refresh.supply(Reply::NotFound).unwrap();
    assert_eq!(refresh.want(), Want::Keep);
    let refresh = refresh.supply(Reply::Kept).unwrap();
    let limit = repository.file("1.snapshot.json").len() as u64;
    assert_eq!(
        refresh.want(),
        Want::File {
            path: "metadata/1.snapshot.json".into(),
            limit,
            missing_is_ok: false
        }
    );
}

#[test]
fn an_answer_to_another_question_is_refused() {
    let repository = Repository::new();
    let device = Device::new(&repository);
    for reply in [Reply::NotModified, Reply::Kept] {
        let want = TIMESTAMP.to_owned();
        let name = if reply == Reply::Kept {
            "kept"
        } else {
            "not modified"
        };
        assert_eq!(
            device.start().supply(reply).map(|_| ()),
            Err(Refusal::OutOfTurn { want, reply: name })
        );
    }
    let unfinished = device.start().finish(&mut Device::new(&repository).store);
    assert!(unfinished.is_err());
}

#[test]
fn clause_5_3_12_a_repository_without_consistent_snapshots_has_plain_names() {
    let mut repository = Repository::new();
    repository.root.consistent_snapshot = false;
    repository.publish_root(&ROOT_KEYS);
    let mut device = Device::new(&repository);
    for name in ["snapshot", "targets", "stable"] {
        let body = repository
            .files
            .remove(&format!("metadata/1.{name}.json"))
            .unwrap();
        repository
            .files
            .insert(format!("metadata/{name}.json"), body);
    }
    let manifest = repository
        .files
        .keys()
        .find(|path| path.ends_with(".1.0.manifest.json"))
        .unwrap()
        .clone();
    let body = repository.files.remove(&manifest).unwrap();
    repository
        .files
        .insert("targets/stable/qemu-x86_64/1.0.manifest.json".into(), body);
    assert_eq!(release(device.refresh(&repository)), Ok(Some("1.0".into())));
}

#[test]
fn a_repository_that_announces_versions_only_is_enough() {
    let mut repository = Repository::new();
    let versions_only = |meta: &mut BTreeMap<String, MetaFile>| {
        for file in meta.values_mut() {
            (file.length, file.hashes) = (None, None);
        }
    };
    versions_only(&mut repository.snapshot.meta);
    repository.snapshot.version = Version::FIRST;
    repository.files.insert(
        "metadata/1.snapshot.json".into(),
        sign(&repository.snapshot, &[SNAPSHOT_KEY]),
    );
    repository
        .timestamp
        .meta
        .get_mut("snapshot.json")
        .unwrap()
        .version = Version::FIRST;
    versions_only(&mut repository.timestamp.meta);
    repository.publish_timestamp();
    let mut device = Device::new(&repository);
    assert_eq!(release(device.refresh(&repository)), Ok(Some("1.0".into())));
    repository.publish_timestamp();
    assert_eq!(release(device.refresh(&repository)), Ok(Some("1.0".into())));
    assert_eq!(device.requested(), ["timestamp.json", "2.root.json"]);
}

#[test]
fn clause_5_1_a_clock_that_went_back_is_lifted_by_what_was_signed() {
    let mut repository = Repository::new();
    let mut device = Device::new(&repository);
    device.refresh(&repository).unwrap();
    device.now = at("1970-01-01T00:00:00Z");
    assert!(device.refresh(&repository).is_ok());
    // Signed on the last of January; a repository that had expired by then stays refused.
    repository.timestamp.expires = at("2026-01-30T00:00:00Z");
    repository.timestamp.issued = None;
    repository.publish_timestamp();
    let expired = Refusal::Expired {
        role: "timestamp".into(),
        expires: at("2026-01-30T00:00:00Z"),
        now: at("2026-01-31T00:00:00Z"),
    };
    assert_eq!(device.refresh(&repository), Err(expired));
}

#[test]
fn clause_5_1_a_clock_that_was_wrong_in_the_future_is_forgotten() {
    let repository = Repository::new();
    let mut device = Device::new(&repository);
    device.now = at("2099-01-01T00:00:00Z");
    assert!(
        matches!(device.refresh(&repository), Err(Refusal::Expired { role, .. }) if role == "root")
    );
    device.now = now();
    device.restart(&repository);
    assert_eq!(release(device.refresh(&repository)), Ok(Some("1.0".into())));
}
