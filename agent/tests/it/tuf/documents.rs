//! Root, timestamp, snapshot and targets: the order of requests, versions, expiry, digests, and what is kept.

use offshoot::trust::Refusal;
use serde_json::{Value, json};

use super::peer::{Device, Peer, missing, rolled_back};

const PAST: &str = "2029-12-31T00:00:00+00:00";

fn expired(result: Result<(), Refusal>) -> String {
    match result {
        Err(Refusal::Expired { role, .. }) => role,
        other => format!("{other:?}"),
    }
}

#[test]
fn clause_5_1_time_is_fixed_at_the_start() {
    let mut peer = Peer::new("ed25519");
    let mut device = peer.device();
    let expires = "2030-01-08T00:00:00+00:00";
    peer.by("set", json!({"role": "timestamp", "expires": expires}));
    peer.publish(["timestamp"]);
    assert_eq!(device.refresh(), Ok(()));
    device.now = "2030-01-07T23:59:59Z".parse().unwrap();
    assert_eq!(device.refresh(), Ok(()));
    device.now = "2030-01-08T00:00:00Z".parse().unwrap();
    assert_eq!(expired(device.refresh()), "timestamp");
}

#[test]
fn clause_5_2_a_root_that_nobody_has_signed_or_that_is_no_root_starts_nothing() {
    let mut peer = Peer::new("ecdsa-sha2-nistp256");
    let device = peer.device();
    let root: Value = serde_json::from_slice(&peer.read("1.root.json")).unwrap();
    let signature = "30450221".to_owned() + &"00".repeat(67);
    for (pointer, value) in [
        ("/signatures/0/sig", json!(signature)),
        ("/signed/version", json!(null)),
        ("/signed/_type", json!("targets")),
    ] {
        let mut spoiled = root.clone();
        *spoiled.pointer_mut(pointer).unwrap() = value;
        let bytes = serde_json::to_vec(&spoiled).unwrap();
        assert!(device.init(&bytes).is_err(), "{pointer}");
    }
    assert_eq!(peer.requested(), [] as [String; 0]);
}

#[test]
fn clause_5_2_the_expiry_of_the_first_root_does_not_matter() {
    let mut peer = Peer::new("ed25519");
    peer.by("set", json!({"role": "root", "expires": PAST}));
    peer.publish(["root"]);
    let device = peer.device();
    device.init(&peer.read("2.root.json")).unwrap();
    assert_eq!(expired(device.refresh()), "root");
    // 5.3.10: before anything else is asked for.
    assert_eq!(peer.requested(), ["metadata/3.root.json"]);
    peer.by(
        "set",
        json!({"role": "root", "expires": "2035-01-01T00:00:00+00:00"}),
    );
    peer.publish(["root"]);
    assert_eq!(device.refresh(), Ok(()));
    assert_eq!(device.top(), [3, 1, 1, 1]);
}

#[test]
fn clause_5_3_3_the_documents_are_asked_for_in_their_order() {
    let mut peer = Peer::new("ed25519");
    let device = peer.device();
    assert_eq!(device.refresh(), Ok(()));
    let files = [
        "2.root.json",
        "timestamp.json",
        "1.snapshot.json",
        "1.targets.json",
    ];
    assert_eq!(
        peer.requested(),
        files.map(|file| format!("metadata/{file}"))
    );
    assert_eq!(device.refresh(), Ok(()));
    assert_eq!(
        peer.requested(),
        files[..2]
            .iter()
            .map(|file| format!("metadata/{file}"))
            .collect::<Vec<_>>()
    );
}

#[test]
fn clause_5_3_5_5_5_4_5_6_4_a_file_of_another_version_than_its_name_is_refused() {
    for (role, want, kept) in [
        (
            "root",
            Refusal::RootNotSequential { have: 1, got: 3 },
            [1, 0, 0, 0],
        ),
        ("snapshot", wrong_version("snapshot", 2, 3), [2, 2, 0, 0]),
        ("targets", wrong_version("targets", 2, 3), [2, 2, 2, 0]),
    ] {
        let mut peer = Peer::new("ed25519");
        let device = peer.device();
        peer.publish(["root", "targets", "snapshot", "timestamp"]);
        peer.publish(["root", "targets", "snapshot"]);
        let newer = peer.read(&format!("3.{role}.json"));
        peer.write(&format!("2.{role}.json"), &newer);
        for role in ["root", "targets", "snapshot"] {
            peer.remove(&format!("3.{role}.json"));
        }
        assert_eq!(device.refresh(), Err(want));
        assert_eq!(device.top(), kept, "{role}");
    }
}

fn wrong_version(role: &str, want: u64, got: u64) -> Refusal {
    let role = role.to_owned();
    Refusal::WrongVersion { role, want, got }
}

#[test]
fn clause_5_3_8_5_4_5_5_5_7_5_6_6_what_is_kept_is_what_came_byte_for_byte() {
    let peer = Peer::new("ed25519");
    let device = peer.device();
    let spaced = [&peer.read("timestamp.json")[..], b" \n"].concat();
    peer.write("timestamp.json", &spaced);
    assert_eq!(device.refresh(), Ok(()));
    assert_eq!(device.kept("timestamp.json"), spaced);
    for role in ["root", "snapshot", "targets"] {
        assert_eq!(
            device.kept(&format!("{role}.json")),
            peer.read(&format!("1.{role}.json"))
        );
    }
}

#[test]
fn clause_5_3_10_5_4_4_5_5_6_5_6_5_what_has_expired_is_not_believed_and_what_came_before_is_kept() {
    for (role, kept) in [
        ("root", [2, 1, 1, 1]),
        ("timestamp", [2, 1, 1, 1]),
        ("snapshot", [2, 2, 1, 1]),
        ("targets", [2, 2, 2, 1]),
    ] {
        let mut peer = Peer::new("ed25519");
        let device = peer.device();
        assert_eq!(device.refresh(), Ok(()));
        peer.by("set", json!({"role": role, "expires": PAST}));
        peer.publish(["root", "targets", "snapshot", "timestamp"]);
        for _ in 0..2 {
            assert_eq!(expired(device.refresh()), role);
            assert_eq!(device.top(), kept, "{role}");
        }
    }
}

#[test]
fn clause_5_3_10_5_4_4_what_has_expired_on_the_device_is_replaced() {
    let mut peer = Peer::new("ed25519");
    let mut device = peer.device();
    for (role, kept) in [("root", [3, 1, 1, 1]), ("timestamp", [3, 3, 2, 2])] {
        peer.by(
            "set",
            json!({"role": role, "expires": "2030-01-08T00:00:00+00:00"}),
        );
        peer.publish([role]);
        assert_eq!(device.refresh(), Ok(()));
        peer.by(
            "set",
            json!({"role": role, "expires": "2035-01-01T00:00:00+00:00"}),
        );
        match role {
            "root" => peer.publish(["root"]),
            _ => peer.publish(["targets", "snapshot", "timestamp"]),
        }
        device.now = "2030-01-18T00:00:00Z".parse().unwrap();
        assert_eq!(device.refresh(), Ok(()));
        assert_eq!(device.top(), kept);
        device.now = "2030-01-01T00:00:00Z".parse().unwrap();
    }
}

/// A version that the attacker raised to 100, and the keys that the operator changes to be believed at 1 again.
#[test]
fn clause_5_3_11_new_keys_recover_from_a_fast_forward() {
    for (attacked, rotated) in [
        ("timestamp", &["timestamp"][..]),
        ("snapshot", &["snapshot", "timestamp"]),
        ("targets", &["snapshot"]),
        ("a", &["snapshot"]),
    ] {
        let mut peer = Peer::new("ed25519");
        let device = peer.device();
        let delegation = json!({"delegator": "targets", "role": "a", "paths": ["a/*"]});
        peer.by("delegate", delegation);
        peer.publish(["a", "targets", "snapshot", "timestamp"]);
        peer.by("set", json!({"role": attacked, "version": 99}));
        match attacked {
            "timestamp" => peer.publish(["timestamp"]),
            _ => {
                peer.publish([attacked]);
                if attacked != "snapshot" {
                    peer.publish(["snapshot"]);
                }
                peer.publish(["timestamp"]);
            }
        }
        assert_eq!(device.refresh(), Ok(()), "{attacked}");

        peer.by("set", json!({"role": attacked, "version": 2}));
        peer.publish(["targets", "snapshot", "timestamp"]);
        if attacked == "a" {
            // Not a top-level role: the snapshot has to list what was published last.
            peer.publish(["a", "snapshot", "timestamp"]);
        }
        let refused = device.refresh();
        assert!(
            matches!(refused, Err(Refusal::RolledBack { have: 100, .. })),
            "{attacked}: {refused:?}"
        );
        for role in rotated {
            peer.with("rotate", [*role]);
        }
        if attacked == "a" {
            peer.with("unlist", ["a"]);
        }
        peer.publish(["root", "snapshot", "timestamp"]);
        assert_eq!(device.refresh(), Ok(()), "{attacked}");
    }
}

#[test]
fn clause_5_3_12_without_consistent_snapshots_names_are_plain() {
    let mut peer = Peer::new("ed25519");
    peer.by("set", json!({"role": "root", "consistent_snapshot": false}));
    peer.by(
        "target",
        json!({"role": "targets", "path": "folder/file", "content": "hello"}),
    );
    peer.publish(["root", "targets", "snapshot", "timestamp"]);
    for role in ["snapshot", "targets"] {
        let bytes = peer.read(&format!("2.{role}.json"));
        peer.write(&format!("{role}.json"), &bytes);
        peer.remove(&format!("2.{role}.json"));
    }
    let folder = peer.public().join("targets/folder");
    std::fs::write(folder.join("file"), "hello").unwrap();
    let device = peer.device();
    assert_eq!(device.download(&["folder/file"]), Ok(()));
    assert_eq!(device.downloaded(), ["hello"]);
}

#[test]
fn clause_5_4_1_5_5_1_5_6_1_a_file_that_is_not_there_ends_the_refresh() {
    let mut peer = Peer::new("ed25519");
    let device = peer.device();
    assert_eq!(device.refresh(), Ok(()));
    peer.publish(["targets", "snapshot", "timestamp"]);
    for (file, kept) in [
        ("timestamp.json", [1, 1, 1, 1]),
        ("2.snapshot.json", [1, 2, 1, 1]),
        ("2.targets.json", [1, 2, 2, 1]),
    ] {
        let bytes = peer.read(file);
        peer.remove(file);
        assert_eq!(device.refresh(), missing(&format!("metadata/{file}")));
        assert_eq!(device.top(), kept);
        peer.write(file, &bytes);
    }
    assert_eq!(device.refresh(), Ok(()));
    assert_eq!(device.top(), [1, 2, 2, 2]);
}

#[test]
fn clause_5_4_2_a_document_of_another_type_is_refused() {
    let mut peer = Peer::new("ed25519");
    let device = peer.device();
    let key = json!({"role": "snapshot", "keys": ["both"], "threshold": 1, "signs": ["both"]});
    peer.by("keys", key);
    let key = json!({"role": "timestamp", "keys": ["both"], "threshold": 1, "signs": ["both"]});
    peer.by("keys", key);
    peer.publish(["root", "snapshot"]);
    let snapshot = peer.read("2.snapshot.json");
    peer.write("timestamp.json", &snapshot);
    assert!(
        matches!(device.refresh(), Err(Refusal::WrongType { role, .. }) if role == "timestamp")
    );
    assert_eq!(device.top(), [2, 0, 0, 0]);
}

#[test]
fn clause_5_4_3_1_an_older_timestamp_is_refused_and_of_two_with_one_version_the_first_is_kept() {
    let mut peer = Peer::new("ed25519");
    let device = peer.device();
    let first = peer.read("timestamp.json");
    peer.publish(["timestamp"]);
    assert_eq!(device.refresh(), Ok(()));
    let second = peer.read("timestamp.json");
    peer.write("timestamp.json", &first);
    assert_eq!(device.refresh(), rolled_back("timestamp", 2, 1));
    peer.by("announce", json!({"role": "snapshot", "version": 100}));
    peer.by("set", json!({"role": "timestamp", "version": 1}));
    peer.publish(["timestamp"]);
    assert_ne!(peer.read("timestamp.json"), second);
    assert_eq!(device.refresh(), Ok(()));
    assert_eq!(device.kept("timestamp.json"), second);
}

#[test]
fn clause_5_4_3_2_5_5_5_what_a_newer_timestamp_or_snapshot_names_is_not_older() {
    for hashes in [false, true] {
        let mut peer = Peer::new("ed25519");
        let device = peer.device();
        if hashes {
            peer.with("announce_hashes", []);
        }
        peer.publish(["targets", "snapshot", "timestamp"]);
        assert_eq!(device.refresh(), Ok(()));
        peer.by("set", json!({"role": "snapshot", "version": 0}));
        peer.publish(["snapshot", "timestamp"]);
        assert_eq!(device.refresh(), rolled_back("snapshot", 2, 1));
        assert_eq!(device.top(), [1, 2, 2, 2]);
        peer.by("set", json!({"role": "snapshot", "version": 2}));
        peer.by("set", json!({"role": "targets", "version": 0}));
        peer.publish(["targets", "snapshot", "timestamp"]);
        assert_eq!(device.refresh(), rolled_back("targets", 2, 1));
        assert_eq!(device.top(), [1, 4, 2, 2]);
    }
}

#[test]
fn clause_5_5_5_a_snapshot_goes_on_listing_every_role() {
    let mut peer = Peer::new("ed25519");
    let device = peer.device();
    peer.by(
        "delegate",
        json!({"delegator": "targets", "role": "a", "paths": ["a/*"]}),
    );
    peer.publish(["a", "targets", "snapshot", "timestamp"]);
    assert_eq!(device.refresh(), Ok(()));
    peer.with("unlist", ["a"]);
    peer.publish(["snapshot", "timestamp"]);
    let vanished = Refusal::RoleVanished {
        role: "a".into(),
        have: 1,
    };
    assert_eq!(device.refresh(), Err(vanished));
    assert_eq!(device.top(), [1, 3, 2, 2]);
}

#[test]
fn clause_5_5_2_5_6_2_a_file_is_the_one_that_was_announced() {
    for (role, kept) in [("snapshot", [1, 3, 2, 2]), ("targets", [1, 3, 3, 2])] {
        let mut peer = Peer::new("ed25519");
        let device = peer.device();
        peer.with("announce_hashes", []);
        peer.publish(["targets", "snapshot", "timestamp"]);
        assert_eq!(device.refresh(), Ok(()));
        let lie = json!({"role": role, "hashes": {"sha256": "0".repeat(64)}});
        peer.publish(["targets"]);
        if role == "targets" {
            peer.by("announce", lie.clone());
        }
        peer.publish(["snapshot"]);
        if role == "snapshot" {
            peer.by("announce", lie);
        }
        peer.publish(["timestamp"]);
        assert!(
            matches!(device.refresh(), Err(Refusal::WrongDigest { role: of, .. }) if of == role)
        );
        assert_eq!(device.top(), kept, "{role}");
    }
}

/// JSON that two readers could understand differently, in every document: what python-tuf signed is one of the two meanings.
#[test]
fn clause_4_1_json_with_two_meanings_is_refused() {
    let mut peer = Peer::new("ed25519");
    peer.publish(["root", "targets", "snapshot", "timestamp"]);
    let spoilt = |device: &Device, file: &str, change: &dyn Fn(&str) -> String| {
        let good = peer.read(file);
        peer.write(file, change(std::str::from_utf8(&good).unwrap()).as_bytes());
        let refused = device.refresh();
        peer.write(file, &good);
        refused
    };
    for file in [
        "2.root.json",
        "timestamp.json",
        "2.snapshot.json",
        "2.targets.json",
    ] {
        let device = peer.device();
        let twice = |text: &str| text.replacen("\"version\":", "\"version\": 9, \"version\":", 1);
        let refused = spoilt(&device, file, &twice);
        assert!(
            matches!(refused, Err(Refusal::DuplicateKey { .. })),
            "{file}: {refused:?}"
        );
        let float = |text: &str| text.replacen("\"version\": 2", "\"version\": 2.0", 1);
        let refused = spoilt(&device, file, &float);
        assert!(
            matches!(refused, Err(Refusal::NotAnInteger { .. })),
            "{file}: {refused:?}"
        );
        let more = |text: &str| format!("{text}{{}}");
        assert_eq!(
            spoilt(&device, file, &more),
            Err(Refusal::TrailingBytes),
            "{file}"
        );
        assert_eq!(device.refresh(), Ok(()));
    }
}
