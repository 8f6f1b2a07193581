use serde_json::json;

use super::delegations::{Scope, matches};
use super::floors::online_keys;
use super::*;
use crate::trust::fixture::{
    self, BETA_KEY, ROOT_KEYS, Repository, STABLE_KEY, TARGETS_KEY, TIMESTAMP_KEY, at, commit,
    hardware, keyid, now, sign, version,
};
use crate::trust::schema::{Delegation, Digested, Signature, TargetFile, Version};

/// Everything up to the channel, of the repository as it was first published.
struct Chain {
    root: CurrentRoot,
    timestamp: Verified<Timestamp>,
    snapshot: Verified<Snapshot>,
    targets: Verified<Targets>,
}

fn chain(repository: &Repository) -> Chain {
    let root = current_root(trusted_root(repository.file("1.root.json")).unwrap(), now()).unwrap();
    let timestamp =
        accept_timestamp(&root, &Floors::default(), repository.file("timestamp.json")).unwrap();
    let snapshot = accept_snapshot(
        &root,
        &timestamp,
        &Floors::default(),
        repository.file("1.snapshot.json"),
    )
    .unwrap();
    let targets = accept_targets(&root, &snapshot, repository.file("1.targets.json")).unwrap();
    Chain {
        root,
        timestamp,
        snapshot,
        targets,
    }
}

impl Chain {
    fn channel(&self, name: &str, bytes: &[u8]) -> Result<Channel, Refusal> {
        accept_channel(
            &self.root,
            &self.snapshot,
            &self.targets,
            &fixture::channel(name),
            bytes,
        )
    }
}

/// A channel of these targets, whose metadata nobody needs to have signed.
fn unsigned_channel(name: &str, paths: &[&str], targets: &Targets) -> Channel {
    let role = Role {
        name: name.to_owned(),
        scope: Scope::Paths(paths.iter().map(|path| (*path).to_owned()).collect()),
        targets: Verified(targets.clone()),
    };
    Channel::new(fixture::channel(name), role)
}

fn below(role: &str, have: u64, need: u64) -> Refusal {
    Refusal::BelowThreshold {
        role: role.into(),
        have,
        need,
    }
}

fn rolled_back(role: &str, have: u64, got: u64) -> Refusal {
    Refusal::RolledBack {
        role: role.into(),
        have,
        got,
    }
}

fn expired(role: &str, expires: &str, now: Time) -> Refusal {
    Refusal::Expired {
        role: role.into(),
        expires: at(expires),
        now,
    }
}

#[test]
fn honest_metadata_leads_to_the_release() {
    let repository = Repository::new();
    let chain = chain(&repository);
    let channel = chain
        .channel("stable", repository.file("1.stable.json"))
        .unwrap();
    let entry = channel.newest(&hardware()).unwrap().unwrap();
    assert_eq!(
        (entry.commit, entry.serial, entry.version.as_str()),
        (commit("1.0"), 1, "1.0")
    );
    assert_eq!(entry.path.as_str(), "stable/qemu-x86_64/1.0.commit");
    assert_eq!(
        channel.find(&hardware(), commit("1.0")),
        Ok(Some(entry.clone()))
    );
    assert_eq!(channel.find(&hardware(), commit("1.1")), Ok(None));
    assert_eq!(channel.newest(&"other".parse().unwrap()), Ok(None));
    let manifest = &repository.files[&format!(
        "targets/stable/qemu-x86_64/{}.1.0.manifest.json",
        entry.manifest.sha256
    )];
    let release = accept_manifest(&entry, manifest).unwrap();
    assert_eq!(
        (&release.entry, release.manifest.commit),
        (&*entry, commit("1.0"))
    );
}

#[test]
fn clause_5_2_the_first_root_is_signed_by_its_own_threshold() {
    let root = Repository::new().root;
    for (seeds, want) in [
        (&[1, 2][..], Ok(())),
        (&[3, 1], Ok(())),
        (&[1], Err(below("root", 1, 2))),
        (&[], Err(below("root", 0, 2))),
        (&[1, TIMESTAMP_KEY], Err(below("root", 1, 2))),
        (&[1, 99], Err(below("root", 1, 2))),
    ] {
        assert_eq!(
            trusted_root(&sign(&root, seeds)).map(|_| ()),
            want,
            "{seeds:?}"
        );
    }
}

#[test]
fn clause_5_3_6_the_expiry_of_a_root_is_judged_when_it_is_the_newest() {
    let mut root = Repository::new().root;
    root.expires = at("2020-01-01T00:00:00Z");
    let old = trusted_root(&sign(&root, &ROOT_KEYS)).unwrap();
    assert_eq!(
        current_root(old.clone(), now()).map(|_| ()),
        Err(expired("root", "2020-01-01T00:00:00Z", now()))
    );
    root.version = version(2);
    assert!(accept_root(&old, &sign(&root, &ROOT_KEYS)).is_ok());
}

#[test]
fn clause_5_3_10_what_expires_now_has_expired() {
    let root = trusted_root(Repository::new().file("1.root.json")).unwrap();
    let expires = root.expires;
    assert_eq!(
        current_root(root.clone(), expires).map(|_| ()),
        Err(expired("root", "2030-01-01T00:00:00Z", expires))
    );
    assert!(current_root(root, expires - jiff::Span::new().seconds(1)).is_ok());
}

#[test]
fn clause_5_3_5_the_next_root_has_exactly_the_next_version() {
    let mut root = Repository::new().root;
    root.version = version(3);
    let trusted = trusted_root(&sign(&root, &ROOT_KEYS)).unwrap();
    for got in [1, 2, 3, 5, u64::MAX] {
        root.version = version(got);
        let want = Err(Refusal::RootNotSequential { have: 3, got });
        assert_eq!(
            accept_root(&trusted, &sign(&root, &ROOT_KEYS)).map(|_| ()),
            want
        );
    }
    root.version = version(4);
    assert_eq!(
        accept_root(&trusted, &sign(&root, &ROOT_KEYS)).map(|root| root.version),
        Ok(version(4))
    );
    root.version = version(u64::MAX);
    let last = trusted_root(&sign(&root, &ROOT_KEYS)).unwrap();
    root.version = Version::FIRST;
    assert_eq!(
        accept_root(&last, &sign(&root, &ROOT_KEYS)).map(|_| ()),
        Err(Refusal::RootNotSequential {
            have: u64::MAX,
            got: 1
        })
    );
}

#[test]
fn clause_5_3_4_the_next_root_is_signed_by_the_old_threshold_and_by_the_new() {
    let mut root = Repository::new().root;
    let trusted = trusted_root(&sign(&root, &ROOT_KEYS)).unwrap();
    root.version = version(2);
    root.keys.extend(fixture::keys(&[4, 5]));
    root.roles
        .insert("root".into(), fixture::signers(&[4, 5], 2));
    for (seeds, want) in [
        (&[1, 2, 4, 5][..], Ok(())),
        (&[1, 2, 3], Err(below("root", 0, 2))),
        (&[4, 5], Err(below("root", 0, 2))),
        (&[1, 2, 4], Err(below("root", 1, 2))),
        (&[1, 4, 5], Err(below("root", 1, 2))),
    ] {
        assert_eq!(
            accept_root(&trusted, &sign(&root, seeds)).map(|_| ()),
            want,
            "{seeds:?}"
        );
    }
}

#[test]
fn clause_4_3_a_root_without_a_role_is_refused() {
    for name in ["root", "timestamp", "snapshot", "targets"] {
        let mut root = Repository::new().root;
        root.roles.remove(name);
        assert_eq!(
            trusted_root(&sign(&root, &ROOT_KEYS)).map(|_| ()),
            Err(Refusal::NoSuchRole { role: name.into() })
        );
    }
}

/// The root itself is believed, so that the next one can correct it.
#[test]
fn clause_5_3_4_a_role_that_nobody_can_sign_for_is_refused_when_it_is_its_turn() {
    let repository = Repository::new();
    let with = |name: &str, signers: RoleKeys| {
        let mut root = repository.root.clone();
        root.roles.insert(name.into(), signers);
        trusted_root(&sign(&root, &ROOT_KEYS))
    };
    let timestamp = |signers: RoleKeys| {
        let root = current_root(with("timestamp", signers).unwrap(), now()).unwrap();
        accept_timestamp(&root, &Floors::default(), repository.file("timestamp.json")).map(|_| ())
    };
    for (seeds, threshold) in [(&[7][..], 0), (&[7], 2), (&[], 1), (&[], 0)] {
        let want = |role: &str| Refusal::BadThreshold {
            role: role.into(),
            threshold,
            keys: seeds.len(),
        };
        let signers = || fixture::signers(seeds, threshold);
        assert_eq!(with("root", signers()).map(|_| ()), Err(want("root")));
        assert_eq!(timestamp(signers()), Err(want("timestamp")));
    }
    let want = Refusal::DuplicateKeyId {
        role: "timestamp".into(),
        keyid: keyid(TIMESTAMP_KEY),
    };
    let twice = fixture::signers(&[TIMESTAMP_KEY, TIMESTAMP_KEY], 1);
    assert_eq!(timestamp(twice), Err(want));
}

#[test]
fn clause_5_3_4_one_key_under_two_key_ids_counts_once() {
    let mut root = Repository::new().root;
    let mut twin = fixture::key(1);
    twin.keyval.public.make_ascii_uppercase();
    root.keys.insert("twin".into(), twin);
    root.roles.insert(
        "root".into(),
        RoleKeys {
            keyids: vec![keyid(1), "twin".into()],
            threshold: 2,
        },
    );
    let mut envelope = Envelope::unsigned(&root).unwrap();
    let signature = fixture::signature(&envelope, 1);
    envelope.signatures = vec![
        signature.clone(),
        Signature {
            keyid: "twin".into(),
            ..signature
        },
    ];
    assert_eq!(
        trusted_root(&envelope.to_bytes().unwrap()).map(|_| ()),
        Err(below("root", 1, 2))
    );
}

#[test]
fn clause_5_3_4_keys_and_signatures_that_cannot_be_checked_do_not_count_and_do_not_harm() {
    let good = Repository::new().root;
    let signed = |root: &Root, spoil: &dyn Fn(&mut Vec<Signature>)| {
        let mut envelope = Envelope::unsigned(root).unwrap();
        envelope.signatures = ROOT_KEYS
            .iter()
            .map(|&seed| fixture::signature(&envelope, seed))
            .collect();
        spoil(&mut envelope.signatures);
        trusted_root(&envelope.to_bytes().unwrap()).map(|_| ())
    };
    assert_eq!(
        signed(&good, &|signatures| signatures[0].sig =
            "not hexadecimal".into()),
        Ok(())
    );
    assert_eq!(
        signed(&good, &|signatures| signatures[0].sig.truncate(126)),
        Ok(())
    );
    assert_eq!(
        signed(&good, &|signatures| signatures[0].keyid = "unknown".into()),
        Ok(())
    );
    let first_two = |signatures: &mut Vec<Signature>| {
        signatures[0].sig = "00".repeat(64);
        signatures[1].sig.clear();
    };
    assert_eq!(signed(&good, &first_two), Err(below("root", 1, 2)));

    // A kind that is not known, a scheme that is not known, and the weak key for which anybody can sign.
    let spoil: [fn(&mut Key); 3] = [
        |key| key.keytype = "rsa".into(),
        |key| key.scheme = "ed25519-made-up".into(),
        |key| key.keyval.public = format!("01{}", "00".repeat(31)),
    ];
    for spoil in spoil {
        let mut root = good.clone();
        spoil(root.keys.get_mut(&keyid(1)).unwrap());
        assert_eq!(signed(&root, &|_| {}), Ok(()));
        spoil(root.keys.get_mut(&keyid(2)).unwrap());
        assert_eq!(signed(&root, &|_| {}), Err(below("root", 1, 2)));
    }
    let mut weak = good.clone();
    for seed in [1, 2] {
        weak.keys.get_mut(&keyid(seed)).unwrap().keyval.public = format!("01{}", "00".repeat(31));
    }
    // R = A = the identity, S = 0: valid for every message under the lenient equation.
    let forged = format!("01{}", "00".repeat(63));
    let forge = |signatures: &mut Vec<Signature>| {
        signatures
            .iter_mut()
            .take(2)
            .for_each(|signature| signature.sig = forged.clone())
    };
    assert_eq!(signed(&weak, &forge), Err(below("root", 1, 2)));
}

#[test]
fn clause_4_1_a_signature_covers_fields_that_are_unknown_here() {
    let mut envelope = Envelope::unsigned(&Repository::new().root).unwrap();
    envelope.signed["x-later"] = json!({"b": 1, "a": [null, "é\n"]});
    envelope.signatures = ROOT_KEYS
        .iter()
        .map(|&seed| fixture::signature(&envelope, seed))
        .collect();
    assert!(trusted_root(&envelope.to_bytes().unwrap()).is_ok());
    envelope.signed["x-later"]["b"] = json!(2);
    assert_eq!(
        trusted_root(&envelope.to_bytes().unwrap()).map(|_| ()),
        Err(below("root", 0, 2))
    );
}

#[test]
fn clause_4_2_1_a_key_id_is_any_unique_string() {
    let mut root = Repository::new().root;
    root.keys.insert("the key of Alice".into(), fixture::key(1));
    root.roles.insert(
        "root".into(),
        RoleKeys {
            keyids: vec!["the key of Alice".into()],
            threshold: 1,
        },
    );
    let mut envelope = Envelope::unsigned(&root).unwrap();
    envelope.signatures = vec![Signature {
        keyid: "the key of Alice".into(),
        ..fixture::signature(&envelope, 1)
    }];
    assert!(trusted_root(&envelope.to_bytes().unwrap()).is_ok());
}

#[test]
fn clause_4_1_json_that_two_readers_could_understand_differently_is_refused() {
    let bytes = String::from_utf8(Repository::new().file("1.root.json").to_vec()).unwrap();
    for (from, to, want) in [
        (
            r#""version":1"#,
            r#""version":1,"version":2"#,
            Refusal::DuplicateKey {
                key: "version".into(),
            },
        ),
        (
            r#""version":1"#,
            r#""version":1.0"#,
            Refusal::NotAnInteger { number: "1".into() },
        ),
        (
            r#""signatures":"#,
            r#""signatures":[],"signatures":"#,
            Refusal::DuplicateKey {
                key: "signatures".into(),
            },
        ),
    ] {
        assert_eq!(
            trusted_root(bytes.replacen(from, to, 1).as_bytes()).map(|_| ()),
            Err(want)
        );
    }
}

#[test]
fn clause_4_3_a_document_of_another_type_or_specification_is_refused() {
    let repository = Repository::new();
    let chain = chain(&repository);
    // The one key signs for both roles.
    let mut root = repository.root.clone();
    root.roles
        .insert("snapshot".into(), fixture::signers(&[TIMESTAMP_KEY], 1));
    let root = current_root(trusted_root(&sign(&root, &ROOT_KEYS)).unwrap(), now()).unwrap();
    let snapshot = sign(&*chain.snapshot, &[TIMESTAMP_KEY]);
    assert_eq!(
        accept_timestamp(&root, &Floors::default(), &snapshot).map(|_| ()),
        Err(Refusal::WrongType {
            role: "timestamp".into(),
            want: "timestamp".into(),
            got: "snapshot".into()
        }),
    );
    for (got, ok) in [
        ("1.0.34", true),
        ("1.0", true),
        ("1.99.0", true),
        ("2.0.0", false),
        ("1", false),
        ("1.", false),
        ("1.x", false),
        ("10.0", false),
    ] {
        let timestamp = Timestamp {
            spec_version: got.into(),
            ..chain.timestamp.0.clone()
        };
        let want = if ok {
            Ok(())
        } else {
            Err(Refusal::UnknownSpec {
                role: "timestamp".into(),
                got: got.into(),
            })
        };
        assert_eq!(
            accept_timestamp(
                &root,
                &Floors::default(),
                &sign(&timestamp, &[TIMESTAMP_KEY])
            )
            .map(|_| ()),
            want,
            "{got}"
        );
    }
}

#[test]
fn clause_5_4_2_a_timestamp_is_signed_by_the_timestamp_key() {
    let chain = chain(&Repository::new());
    for (seeds, want) in [
        (&[TIMESTAMP_KEY][..], Ok(())),
        (&[1, 2, 3, STABLE_KEY], Err(below("timestamp", 0, 1))),
        (&[], Err(below("timestamp", 0, 1))),
    ] {
        let bytes = sign(&*chain.timestamp, seeds);
        assert_eq!(
            accept_timestamp(&chain.root, &Floors::default(), &bytes).map(|_| ()),
            want
        );
    }
}

#[test]
fn clause_5_4_3_a_timestamp_is_not_older_than_the_last_and_names_no_older_snapshot() {
    let chain = chain(&Repository::new());
    let accept = |floors: &Floors, got: u64, snapshot: u64| {
        let mut timestamp = Timestamp {
            version: version(got),
            ..chain.timestamp.0.clone()
        };
        timestamp.meta.get_mut("snapshot.json").unwrap().version = version(snapshot);
        accept_timestamp(&chain.root, floors, &sign(&timestamp, &[TIMESTAMP_KEY])).map(|_| ())
    };
    let floors = Floors {
        timestamp: 5,
        snapshot: 3,
        ..Floors::default()
    };
    assert_eq!(accept(&floors, 4, 3), Err(rolled_back("timestamp", 5, 4)));
    assert_eq!(accept(&floors, 5, 3), Ok(()));
    assert_eq!(accept(&floors, 6, 2), Err(rolled_back("snapshot", 3, 2)));
    assert_eq!(accept(&floors, u64::MAX, 4), Ok(()));
}

#[test]
fn clause_5_4_4_a_frozen_timestamp_is_refused_when_it_expires() {
    let repository = Repository::new();
    for (now, want) in [
        (at("2026-02-07T23:59:59Z"), Ok(())),
        (
            at("2026-02-08T00:00:00Z"),
            Err(expired(
                "timestamp",
                "2026-02-08T00:00:00Z",
                at("2026-02-08T00:00:00Z"),
            )),
        ),
    ] {
        let root =
            current_root(trusted_root(repository.file("1.root.json")).unwrap(), now).unwrap();
        assert_eq!(
            accept_timestamp(&root, &Floors::default(), repository.file("timestamp.json"))
                .map(|_| ()),
            want
        );
    }
}

#[test]
fn a_timestamp_that_expires_before_it_is_issued_is_refused() {
    let chain = chain(&Repository::new());
    let timestamp = Timestamp {
        issued: Some(chain.timestamp.expires),
        ..chain.timestamp.0.clone()
    };
    let refused = accept_timestamp(
        &chain.root,
        &Floors::default(),
        &sign(&timestamp, &[TIMESTAMP_KEY]),
    );
    assert!(matches!(refused, Err(Refusal::Malformed { role, .. }) if role == "timestamp"));
}

#[test]
fn clause_5_5_2_5_5_4_a_snapshot_is_the_one_that_the_timestamp_names() {
    let repository = Repository::new();
    let chain = chain(&repository);
    let bytes = repository.file("1.snapshot.json");
    let accept = |timestamp: &Timestamp, bytes: &[u8]| {
        accept_snapshot(
            &chain.root,
            &Verified(timestamp.clone()),
            &Floors::default(),
            bytes,
        )
        .map(|_| ())
    };
    let mut timestamp = chain.timestamp.0.clone();
    let file = |timestamp: &mut Timestamp, change: &dyn Fn(&mut MetaFile)| {
        change(timestamp.meta.get_mut("snapshot.json").unwrap())
    };

    let spaced = [bytes, b" "].concat();
    let (want, got) = (bytes.len() as u64, bytes.len() as u64 + 1);
    assert_eq!(
        accept(&timestamp, &spaced),
        Err(Refusal::WrongLength {
            role: "snapshot".into(),
            want,
            got
        })
    );
    file(&mut timestamp, &|file| file.length = None);
    let (want, got) = (
        Sha256::of(bytes).to_string(),
        Sha256::of(&spaced).to_string(),
    );
    assert_eq!(
        accept(&timestamp, &spaced),
        Err(Refusal::WrongDigest {
            role: "snapshot".into(),
            want,
            got
        })
    );
    file(&mut timestamp, &|file| file.hashes = None);
    assert_eq!(accept(&timestamp, &spaced), Ok(()));
    file(&mut timestamp, &|file| file.version = version(2));
    assert_eq!(
        accept(&timestamp, bytes),
        Err(Refusal::WrongVersion {
            role: "snapshot".into(),
            want: 2,
            got: 1
        })
    );
    file(&mut timestamp, &|file| {
        file.hashes = Some(BTreeMap::from([("md5".into(), "00".into())]))
    });
    assert_eq!(
        accept(&timestamp, bytes),
        Err(Refusal::UnknownHash {
            role: "snapshot".into(),
            algorithm: "md5".into()
        })
    );
    let sha512 = sha2::Sha512::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect::<String>();
    file(&mut timestamp, &|file| {
        file.version = version(1);
        file.hashes = Some(BTreeMap::from([
            ("sha256".into(), Sha256::of(bytes).to_string()),
            ("sha512".into(), sha512.clone()),
        ]));
    });
    assert_eq!(accept(&timestamp, bytes), Ok(()));
    timestamp.meta.clear();
    assert!(
        matches!(accept(&timestamp, bytes), Err(Refusal::Malformed { role, .. }) if role == "timestamp")
    );
}

#[test]
fn clause_5_5_5_a_snapshot_keeps_every_role_and_lowers_none() {
    let repository = Repository::new();
    let chain = chain(&repository);
    let accept = |floors: &[(&str, u64)]| {
        let roles = floors
            .iter()
            .map(|(file, version)| ((*file).to_owned(), *version))
            .collect();
        let floors = Floors {
            roles,
            ..Floors::default()
        };
        accept_snapshot(
            &chain.root,
            &chain.timestamp,
            &floors,
            repository.file("1.snapshot.json"),
        )
        .map(|_| ())
    };
    assert_eq!(
        accept(&[("targets.json", 1), ("stable.json", 1), ("beta.json", 1)]),
        Ok(())
    );
    assert_eq!(accept(&[("beta.json", 2)]), Err(rolled_back("beta", 2, 1)));
    assert_eq!(
        accept(&[("targets.json", 2)]),
        Err(rolled_back("targets", 2, 1))
    );
    assert_eq!(
        accept(&[("gone.json", 1)]),
        Err(Refusal::RoleVanished {
            role: "gone".into(),
            have: 1
        })
    );
}

#[test]
fn clause_5_5_6_5_6_5_every_document_expires() {
    let repository = Repository::new();
    let valid = chain(&repository);
    let later = |text: &str| {
        let root = current_root(valid.root.root.clone(), at(text)).unwrap();
        Chain {
            root,
            timestamp: valid.timestamp.clone(),
            snapshot: valid.snapshot.clone(),
            targets: valid.targets.clone(),
        }
    };
    let (snapshot, targets, channel) = (
        "2026-03-01T00:00:00Z",
        "2027-01-01T00:00:00Z",
        "2026-04-01T00:00:00Z",
    );
    let chain = later(snapshot);
    assert_eq!(
        accept_snapshot(
            &chain.root,
            &chain.timestamp,
            &Floors::default(),
            repository.file("1.snapshot.json")
        )
        .map(|_| ()),
        Err(expired("snapshot", snapshot, at(snapshot)))
    );
    let chain = later(channel);
    assert_eq!(
        chain.channel("stable", repository.file("1.stable.json")),
        Err(expired("stable", channel, at(channel)))
    );
    let chain = later(targets);
    assert_eq!(
        accept_targets(
            &chain.root,
            &chain.snapshot,
            repository.file("1.targets.json")
        )
        .map(|_| ()),
        Err(expired("targets", targets, at(targets)))
    );
}

#[test]
fn clause_5_1_what_was_fresh_when_it_was_accepted_is_not_expired_again() {
    let repository = Repository::new();
    let root = stored_root(trusted_root(repository.file("1.root.json")).unwrap());
    let mut old = repository.timestamp.clone();
    old.expires = at("2026-02-01T00:00:01Z");
    assert!(accept_timestamp(&root, &Floors::default(), &sign(&old, &[TIMESTAMP_KEY])).is_ok());
}

#[test]
fn clause_5_5_2_5_6_2_files_of_two_publications_do_not_mix() {
    let mut repository = Repository::new();
    let first = chain(&repository);
    repository.release("stable", "2.0", 2);
    repository.publish();
    let timestamp = accept_timestamp(
        &first.root,
        &Floors::default(),
        repository.file("timestamp.json"),
    )
    .unwrap();
    let wrong = |role: &str, want: &str, got: &str| {
        let length = |name| repository.file(name).len() as u64;
        match length(want) == length(got) {
            true => Refusal::WrongDigest {
                role: role.into(),
                want: Sha256::of(repository.file(want)).to_string(),
                got: Sha256::of(repository.file(got)).to_string(),
            },
            false => Refusal::WrongLength {
                role: role.into(),
                want: length(want),
                got: length(got),
            },
        }
    };
    assert_eq!(
        accept_snapshot(
            &first.root,
            &timestamp,
            &Floors::default(),
            repository.file("1.snapshot.json")
        )
        .map(|_| ()),
        Err(wrong("snapshot", "2.snapshot.json", "1.snapshot.json"))
    );
    assert_eq!(
        accept_targets(
            &first.root,
            &first.snapshot,
            repository.file("2.targets.json")
        )
        .map(|_| ()),
        Err(wrong("targets", "1.targets.json", "2.targets.json"))
    );
    assert_eq!(
        first.channel("stable", repository.file("2.stable.json")),
        Err(wrong("stable", "1.stable.json", "2.stable.json"))
    );
}

#[test]
fn clause_5_6_7_a_channel_is_signed_by_the_key_that_the_targets_give_it() {
    let repository = Repository::new();
    let mut chain = chain(&repository);
    // A snapshot without digests, as some repositories have: the signature alone decides.
    for file in chain.snapshot.0.meta.values_mut() {
        (file.length, file.hashes) = (None, None);
    }
    let (stable, _) = &repository.channels["stable"];
    let signed = |seed| {
        sign(
            &Targets {
                version: Version::FIRST,
                ..stable.clone()
            },
            &[seed],
        )
    };
    assert!(chain.channel("stable", &signed(STABLE_KEY)).is_ok());
    assert_eq!(
        chain.channel("stable", &signed(BETA_KEY)),
        Err(below("stable", 0, 1))
    );
    assert_eq!(
        chain.channel("stable", repository.file("1.beta.json")),
        Err(below("stable", 0, 1))
    );
    let listed = chain.snapshot.0.meta.remove("stable.json").unwrap();
    assert_eq!(
        chain.channel("stable", &signed(STABLE_KEY)),
        Err(Refusal::NotInSnapshot {
            role: "stable".into()
        })
    );
    chain.snapshot.0.meta.insert("stable.json".into(), listed);
    chain
        .targets
        .0
        .delegations
        .as_mut()
        .unwrap()
        .roles
        .remove(0);
    assert_eq!(
        chain.channel("stable", &signed(STABLE_KEY)),
        Err(Refusal::NoSuchChannel {
            channel: "stable".into()
        })
    );
    chain.targets.0.delegations = None;
    assert_eq!(
        chain.channel("beta", &signed(BETA_KEY)),
        Err(Refusal::NoSuchChannel {
            channel: "beta".into()
        })
    );
}

#[test]
fn a_channel_cannot_sign_outside_of_its_folder() {
    let mut repository = Repository::new();
    repository.release("stable", "9.0", 9);
    let (stable, _) = repository.channels["stable"].clone();
    // Beta lists stable's releases: they are nothing to beta, and stable does not see them.
    assert_eq!(
        unsigned_channel("beta", &["beta/*/*"], &stable).newest(&hardware()),
        Ok(None)
    );
    let path = "stable/qemu-x86_64/1.0.commit".to_owned();
    for paths in [
        &["beta/*/*"][..],
        &[],
        &["stable/*"],
        &["*"],
        &["stable/*/*/*"],
        &["stable/other/*"],
    ] {
        let want = Refusal::NotDelegated {
            channel: "stable".into(),
            path: path.clone(),
        };
        assert_eq!(
            unsigned_channel("stable", paths, &stable).newest(&hardware()),
            Err(want),
            "{paths:?}"
        );
    }
    let newest = unsigned_channel("stable", &["beta/*/*", "stable/qemu-*/*"], &stable)
        .newest(&hardware())
        .unwrap();
    assert_eq!(newest.map(|entry| entry.serial), Some(9));
}

#[test]
fn the_newest_entry_has_the_greatest_serial_and_not_the_greatest_version() {
    let mut repository = Repository::new();
    repository.release("stable", "0.9", 12);
    repository.release("stable", "0.10", 3);
    let (stable, _) = &mut repository.channels.get_mut("stable").unwrap();
    let newest =
        |stable: &Targets| unsigned_channel("stable", &["stable/*/*"], stable).newest(&hardware());
    assert_eq!(newest(stable).unwrap().unwrap().version.as_str(), "0.9");
    let custom = |stable: &mut Targets, version: &str, field: &str, value: Value| {
        let file = stable
            .targets
            .get_mut(&format!("stable/qemu-x86_64/{version}.commit"))
            .unwrap();
        file.custom.as_mut().unwrap()["offshoot"][field] = value;
    };
    // A later format is for later devices.
    custom(stable, "0.9", "format", json!(2));
    assert_eq!(newest(stable).unwrap().unwrap().version.as_str(), "0.10");
    custom(stable, "1.0", "serial", json!(3));
    assert_eq!(
        newest(stable),
        Err(Refusal::AmbiguousSerial {
            path: "stable/qemu-x86_64/0.10.commit".into(),
            other: "stable/qemu-x86_64/1.0.commit".into(),
            serial: 3
        })
    );
}

#[test]
fn an_entry_says_the_same_as_its_path() {
    let path = "stable/qemu-x86_64/1.0.commit";
    let spoiled = |spoil: &dyn Fn(&mut TargetFile)| {
        let (mut stable, _) = Repository::new().channels["stable"].clone();
        spoil(stable.targets.get_mut(path).unwrap());
        unsigned_channel("stable", &["stable/*/*"], &stable).newest(&hardware())
    };
    let offshoot = |file: &mut TargetFile, field: &str, value: Value| {
        file.custom.as_mut().unwrap()["offshoot"][field] = value
    };
    let mixed_up = |what, want: &str, got: &str| Refusal::MixedUp {
        path: path.into(),
        what,
        want: want.into(),
        got: got.into(),
    };
    assert_eq!(
        spoiled(&|file| offshoot(file, "version", json!("1.1"))),
        Err(mixed_up("version", "stable/qemu-x86_64/1.1.commit", path))
    );
    assert_eq!(
        spoiled(&|file| offshoot(file, "hardware", json!(["a", "b"]))),
        Err(mixed_up("hardware", "qemu-x86_64", "a b"))
    );
    let broken: [&dyn Fn(&mut TargetFile); 7] = [
        &|file| file.custom = None,
        &|file| file.custom = Some(json!({})),
        &|file| offshoot(file, "format", json!(null)),
        &|file| offshoot(file, "serial", json!(-1)),
        &|file| offshoot(file, "version", json!("../1.0")),
        &|file| file.hashes.clear(),
        &|file| file.hashes = BTreeMap::from([("sha256".into(), "00".into())]),
    ];
    for (index, spoil) in broken.into_iter().enumerate() {
        assert!(
            matches!(spoiled(spoil), Err(Refusal::Malformed { role, .. }) if role == path),
            "{index}"
        );
    }
}

#[test]
fn a_manifest_is_the_one_that_the_entry_names_and_speaks_of_its_release() {
    let repository = Repository::new();
    let chain = chain(&repository);
    let channel = chain
        .channel("stable", repository.file("1.stable.json"))
        .unwrap();
    let entry = channel.newest(&hardware()).unwrap().unwrap();
    let path = "stable/qemu-x86_64/1.0.manifest.json".to_owned();
    let good = repository.files[&format!(
        "targets/stable/qemu-x86_64/{}.1.0.manifest.json",
        entry.manifest.sha256
    )]
        .clone();
    let swapped = String::from_utf8(good.clone())
        .unwrap()
        .replace("qemu-x86_64", "qemu-x86_65")
        .into_bytes();
    let want = Refusal::WrongDigest {
        role: path.clone(),
        want: Sha256::of(&good).to_string(),
        got: Sha256::of(&swapped).to_string(),
    };
    assert_eq!(accept_manifest(&entry, &swapped), Err(want));
    let (want, got) = (good.len() as u64, good.len() as u64 - 1);
    assert_eq!(
        accept_manifest(&entry, &good[1..]),
        Err(Refusal::WrongLength {
            role: path.clone(),
            want,
            got
        })
    );

    let signed = |bytes: &[u8]| {
        let manifest = Digested {
            length: bytes.len() as u64,
            sha256: Sha256::of(bytes),
        };
        accept_manifest(
            &Verified(Entry {
                manifest,
                ..entry.0.clone()
            }),
            bytes,
        )
        .map(|_| ())
    };
    let text = String::from_utf8(good).unwrap();
    let mixed_up = |what, want: &str, got: &str| Refusal::MixedUp {
        path: path.clone(),
        what,
        want: want.into(),
        got: got.into(),
    };
    let (this, other) = (commit("1.0").to_string(), commit("1.1").to_string());
    assert_eq!(signed(text.as_bytes()), Ok(()));
    for (from, to, want) in [
        (
            r#""format":1"#,
            r#""format":2"#,
            Refusal::UnknownFormat {
                path: path.clone(),
                want: 1,
                got: 2,
            },
        ),
        (
            r#""version":"1.0""#,
            r#""version":"1.1""#,
            mixed_up("version", "1.0", "1.1"),
        ),
        (
            r#""hardware":"qemu-x86_64""#,
            r#""hardware":"other""#,
            mixed_up("hardware", "qemu-x86_64", "other"),
        ),
        (
            &format!(r#"{{"commit":"{this}""#),
            &format!(r#"{{"commit":"{other}""#),
            mixed_up("commit", &this, &other),
        ),
    ] {
        assert!(text.contains(from));
        assert_eq!(signed(text.replace(from, to).as_bytes()), Err(want));
    }
    for (from, to) in [
        (r#""format":1"#, r#""format":1,"more":1"#),
        (r#""path":"deltas"#, r#""path":"../deltas"#),
        (r#""format":1,"#, ""),
    ] {
        assert!(
            matches!(signed(text.replace(from, to).as_bytes()), Err(Refusal::Malformed { role, .. }) if role == path)
        );
    }
}

#[test]
fn clause_5_5_1_5_6_1_an_announced_length_is_the_limit_unless_it_is_absurd() {
    let mut chain = chain(&Repository::new());
    let announce = |chain: &mut Chain, length| {
        chain
            .timestamp
            .0
            .meta
            .get_mut("snapshot.json")
            .unwrap()
            .length = length;
        chain
            .snapshot
            .0
            .meta
            .get_mut("targets.json")
            .unwrap()
            .length = length;
        (
            snapshot_limit(&chain.timestamp),
            targets_limit(&chain.snapshot, "targets"),
        )
    };
    assert_eq!(announce(&mut chain, Some(100)), (Ok(100), Ok(100)));
    assert_eq!(
        announce(&mut chain, None),
        (Ok(SNAPSHOT_LIMIT), Ok(TARGETS_LIMIT))
    );
    assert_eq!(
        announce(&mut chain, Some(u64::MAX)),
        (
            Err(Refusal::TooLong {
                role: "snapshot".into(),
                limit: SNAPSHOT_LIMIT
            }),
            Err(Refusal::TooLong {
                role: "targets".into(),
                limit: TARGETS_LIMIT
            })
        )
    );
    // Without a hash the length promises nothing about the content.
    chain
        .snapshot
        .0
        .meta
        .get_mut("targets.json")
        .unwrap()
        .hashes = None;
    assert_eq!(announce(&mut chain, None).1, Ok(UNANNOUNCED_LIMIT));
    assert_eq!(
        announce(&mut chain, Some(UNANNOUNCED_LIMIT + 1)).1,
        Err(Refusal::TooLong {
            role: "targets".into(),
            limit: UNANNOUNCED_LIMIT
        })
    );
}

#[test]
fn clause_5_3_11_floors_rise_and_fall_only_when_an_online_key_is_taken_away() {
    let mut repository = Repository::new();
    let first = chain(&repository);
    let floors =
        Floors::default().raised_by(&first.root, Some(&first.timestamp), Some(&first.snapshot));
    let roles = ["beta.json", "stable.json", "targets.json"]
        .map(|file| (file.to_owned(), 1))
        .into();
    let issued = first.timestamp.issued;
    assert_eq!(
        floors,
        Floors {
            root: 1,
            timestamp: 1,
            snapshot: 1,
            roles,
            clock: issued,
            keys: online_keys(&first.root)
        }
    );
    assert_eq!(
        floors
            .clone()
            .raised_by(&first.root, Some(&first.timestamp), None),
        floors
    );

    let root = |repository: &Repository| Verified(repository.root.clone());
    repository.root.roles.insert(
        "timestamp".into(),
        fixture::signers(&[TIMESTAMP_KEY, 11], 2),
    );
    repository.root.keys.extend(fixture::keys(&[11, 12]));
    assert_eq!(
        floors.clone().under(&root(&repository)),
        floors,
        "a key more is no reason to forget"
    );
    repository
        .root
        .roles
        .insert("targets".into(), fixture::signers(&[12], 1));
    assert_eq!(
        floors.clone().under(&root(&repository)),
        floors,
        "targets are not online"
    );
    for role in ["timestamp", "snapshot"] {
        let mut rotated = Repository::new();
        rotated.root.keys.extend(fixture::keys(&[11]));
        rotated
            .root
            .roles
            .insert(role.into(), fixture::signers(&[11], 1));
        assert_eq!(
            floors.clone().under(&root(&rotated)),
            Floors {
                root: 1,
                ..Floors::default()
            },
            "{role}"
        );
    }
}

#[test]
fn clause_5_6_7_1_a_role_has_no_target_outside_of_its_scope() {
    let (stable, _) = Repository::new().channels["stable"].clone();
    let path = "stable/qemu-x86_64/1.0.commit";
    let found = |scope| {
        let role = Role {
            name: "stable".to_owned(),
            scope,
            targets: Verified(stable.clone()),
        };
        assert_eq!(role.target("stable/qemu-x86_64/9.9.commit"), None);
        role.target(path).map(|target| target.0.path)
    };
    let paths = |pattern: &str| Scope::Paths(vec![pattern.to_owned()]);
    for scope in [Scope::All, paths("stable/*/*")] {
        assert_eq!(found(scope), Some(path.to_owned()));
    }
    for scope in [
        paths("beta/*/*"),
        Scope::Paths(vec![]),
        Scope::HashPrefixes(vec!["zz".into()]),
    ] {
        assert_eq!(found(scope), None);
    }
}

#[test]
fn clause_4_5_a_role_is_delegated_to_once_in_one_way_and_by_a_name_that_is_free() {
    let repository = Repository::new();
    let mut chain = chain(&repository);
    let file = chain.snapshot.0.meta.get_mut("targets.json").unwrap();
    (file.length, file.hashes) = (None, None);
    let accept = |change: &dyn Fn(&mut Vec<Delegation>)| {
        let mut targets = (*chain.targets).clone();
        change(&mut targets.delegations.as_mut().unwrap().roles);
        let bytes = sign(&targets, &[TARGETS_KEY]);
        accept_targets(&chain.root, &chain.snapshot, &bytes).map(|_| ())
    };
    assert_eq!(accept(&|_| {}), Ok(()));
    let role = || "targets".to_owned();
    assert_eq!(
        accept(&|roles| roles[1].name = "stable".into()),
        Err(Refusal::DuplicateDelegation {
            role: role(),
            name: "stable".into()
        })
    );
    assert_eq!(
        accept(&|roles| roles[1].path_hash_prefixes = vec!["00".into()]),
        Err(Refusal::TwoScopes {
            role: role(),
            name: "beta".into()
        })
    );
    let long = "a".repeat(65);
    assert_eq!(accept(&|roles| roles[1].name = long[1..].into()), Ok(()));
    for name in [
        "",
        "root",
        "timestamp",
        "snapshot",
        "targets",
        "mirrors",
        &long,
    ] {
        assert_eq!(
            accept(&|roles| roles[1].name = name.into()),
            Err(Refusal::BadRoleName {
                role: role(),
                name: name.into()
            })
        );
    }
    // In neither way, a role may sign for nothing.
    assert_eq!(accept(&|roles| roles[1].paths.clear()), Ok(()));
    assert!(!Scope::Paths(vec![]).contains("a"));
}

/// sha256("a") begins ca97.
#[test]
fn clause_4_5_a_hash_prefix_is_of_the_sha256_of_the_path() {
    for (prefix, want) in [
        ("c", true),
        ("ca97", true),
        ("", true),
        ("ca98", false),
        ("CA97", false),
    ] {
        let scope = Scope::HashPrefixes(vec!["00".into(), prefix.into()]);
        assert_eq!(scope.contains("a"), want, "{prefix}");
    }
}

#[test]
fn clause_5_7_3_a_target_without_a_hash_is_refused() {
    let mut target = Target {
        path: "file".into(),
        file: TargetFile::of(b"hello"),
    };
    let accept = |target: &Target| accept_target(&Verified(target.clone()), b"hello");
    assert_eq!(accept(&target), Ok(()));
    target.file.length = 4;
    let want = Refusal::WrongLength {
        role: "file".into(),
        want: 4,
        got: 5,
    };
    assert_eq!(accept(&target), Err(want));
    target.file.length = 5;
    target.file.hashes.clear();
    let want = Refusal::NoHash {
        role: "file".into(),
    };
    assert_eq!(accept(&target), Err(want));
}

#[test]
fn clause_4_5_patterns_stop_at_slashes() {
    for (pattern, path, want) in [
        ("stable/*/*", "stable/hw/1.commit", true),
        ("stable/*/*", "stable/hw/a/b", false),
        ("stable/*/*", "stable/hw", false),
        ("*", "a", true),
        ("*", "a/b", false),
        ("a*b*c", "aXbXbc", true),
        ("a*b*c", "aXbXb", false),
        ("?", "a", true),
        ("?", "", false),
        ("?", "/", false),
        ("a", "a", true),
        ("a", "ab", false),
        ("", "", true),
        ("[ab]", "a", false),
    ] {
        assert_eq!(matches(pattern, path), want, "{pattern} {path}");
    }
    assert!(!matches(&"*a".repeat(500), &"a".repeat(499)));
}
