//! Who has signed: every kind of key, every way to a root, and what does not count.

use offshoot::trust::Refusal;
use serde_json::{Value, json};

use super::peer::{Peer, below};

const SCHEMES: [&str; 3] = ["ed25519", "ecdsa-sha2-nistp256", "rsassa-pss-sha256"];

#[test]
fn clause_5_3_4_each_kind_of_key_signs_every_role() {
    for scheme in SCHEMES {
        let mut peer = Peer::new(scheme);
        peer.by(
            "delegate",
            json!({"delegator": "targets", "role": "a", "paths": ["a/*"]}),
        );
        peer.by(
            "target",
            json!({"role": "a", "path": "a/file", "content": "hello"}),
        );
        peer.publish(["a", "targets", "snapshot", "timestamp", "root"]);
        let device = peer.device();
        assert_eq!(device.download(&["a/file"]), Ok(()), "{scheme}");
        assert_eq!(device.downloaded(), ["hello"]);
        assert_eq!(device.top(), [2; 4]);
    }
}

#[test]
fn clause_5_3_4_a_signature_of_each_kind_over_something_else_does_not_count() {
    for scheme in SCHEMES {
        let mut peer = Peer::new("ed25519");
        let device = peer.device();
        let keyid = peer.by("key", json!({"role": "root", "scheme": scheme}));
        peer.by("threshold", json!({"role": "root", "threshold": 2}));
        peer.publish(["root"]);
        assert_eq!(device.refresh(), Ok(()), "{scheme}");
        peer.publish(["root"]);
        let former: Value = serde_json::from_slice(&peer.read("2.root.json")).unwrap();
        peer.spoil("3.root.json", |root| {
            let former = former["signatures"].as_array().unwrap();
            let former = former.iter().find(|one| one["keyid"] == keyid).unwrap();
            let now = root["signatures"].as_array_mut().unwrap();
            *now.iter_mut().find(|one| one["keyid"] == keyid).unwrap() = former.clone();
        });
        assert_eq!(device.refresh(), below("root", 1, 2), "{scheme}");
        assert_eq!(device.version("root"), Some(2));
    }
}

#[test]
fn clause_5_3_4_kinds_of_keys_that_are_unknown_here_do_not_count_and_do_not_harm() {
    let mut peer = Peer::new("ed25519");
    let device = peer.device();
    peer.with("key", ["timestamp"]);
    peer.publish(["root", "timestamp"]);
    let foreign = json!({"keytype": "later", "scheme": "much-later", "keyval": {"issuer": "somebody", "at": [1]}});
    let root: Value = serde_json::from_slice(&peer.read("2.root.json")).unwrap();
    let keyids = &root["signed"]["roles"]["timestamp"]["keyids"];
    peer.by("extra_key", json!({"keyid": keyids[0], "key": foreign}));
    peer.publish(["root", "timestamp"]);
    assert_eq!(device.refresh(), Ok(()));
    assert_eq!(device.top(), [3, 3, 1, 1]);
    peer.by("extra_key", json!({"keyid": keyids[1], "key": foreign}));
    peer.publish(["root", "timestamp"]);
    assert_eq!(device.refresh(), below("timestamp", 0, 1));
}

/// One way to a root: the keys, the threshold and who signs, version by version; and whether the last is believed.
type Way<'a> = (&'a [(&'a [&'a str], u64, &'a [&'a str])], bool);

#[test]
fn clause_5_3_4_a_root_is_signed_by_the_threshold_before_and_by_its_own() {
    let (five, other): (&[&str], &[&str]) =
        (&["a", "b", "c", "d", "e"], &["f", "g", "h", "i", "j"]);
    let one_new: &[&str] = &["a", "b", "d", "e", "f"];
    let ways: [Way<'_>; 15] = [
        (
            &[
                (&["a"], 1, &["a"]),
                (&["b"], 1, &["b", "a"]),
                (&["b"], 1, &["b"]),
            ],
            true,
        ),
        (
            &[
                (&["a"], 1, &["x", "a", "y"]),
                (&["b"], 1, &["x", "b", "a", "y"]),
                (&["b"], 1, &["x", "b", "y"]),
            ],
            true,
        ),
        (
            &[
                (five, 3, &["a", "c", "e"]),
                (five, 3, &["a", "e", "b"]),
                (five, 3, &["b", "c", "d"]),
            ],
            true,
        ),
        (
            &[(five, 3, &["a", "c", "e"]), (one_new, 3, &["a", "e", "b"])],
            true,
        ),
        (
            &[
                (five, 3, &["a", "c", "e"]),
                (one_new, 3, &["a", "c", "e", "f"]),
                (one_new, 3, &["a", "e", "f"]),
            ],
            true,
        ),
        (
            &[
                (five, 3, &["a", "c", "e"]),
                (other, 3, &["a", "c", "e", "f", "g", "h"]),
                (other, 3, &["f", "g", "h"]),
            ],
            true,
        ),
        (
            &[
                (&["a", "b", "c"], 1, &["a"]),
                (&["a", "b", "c"], 2, &["a", "b"]),
            ],
            true,
        ),
        (
            &[
                (&["a", "b", "c"], 2, &["a", "b"]),
                (&["a", "b", "c"], 1, &["a", "b"]),
                (&["a", "b", "c"], 1, &["a"]),
            ],
            true,
        ),
        (&[(&["a"], 1, &["a"]), (&["a", "b"], 2, &["a", "b"])], true),
        (&[(&["a"], 1, &["a"]), (&["b"], 1, &["b", "x"])], false),
        (&[(&["a"], 1, &["a"]), (&["b"], 1, &["a", "x"])], false),
        (
            &[(five, 3, &["a", "c", "e"]), (one_new, 3, &["a", "c", "e"])],
            false,
        ),
        (
            &[(five, 3, &["a", "c", "e"]), (one_new, 3, &["a", "e", "f"])],
            false,
        ),
        (
            &[(&["a", "b", "c"], 1, &["a"]), (&["a", "b", "c"], 2, &["b"])],
            false,
        ),
        (
            &[
                (&["a", "b", "c"], 2, &["a", "b"]),
                (&["a", "b", "c"], 1, &["a"]),
            ],
            false,
        ),
    ];
    for (index, (versions, believed)) in ways.into_iter().enumerate() {
        let mut peer = Peer::new("ed25519");
        for (keys, threshold, signs) in versions {
            let role =
                json!({"role": "root", "keys": keys, "threshold": threshold, "signs": signs});
            peer.by("keys", role);
            peer.publish(["root"]);
        }
        // The first root of the way is the second that was published.
        let device = peer.device();
        device.init(&peer.read("2.root.json")).unwrap();
        let last = versions.len() as u64 + 1;
        assert_eq!(device.refresh().is_ok(), believed, "{index}");
        let kept = if believed { last } else { last - 1 };
        assert_eq!(
            device.kept("root.json"),
            peer.read(&format!("{kept}.root.json")),
            "{index}"
        );
    }
}

#[test]
fn clause_5_4_2_5_5_3_5_6_3_each_role_is_signed_by_a_threshold_of_its_keys() {
    let five: &[&str] = &["a", "b", "c", "d", "e"];
    let cases: [(&[&str], u64, &[&str], bool); 7] = [
        (&["b"], 1, &["b"], true),
        (&["a"], 1, &["x", "a", "y"], true),
        (five, 3, &["c", "d", "e"], true),
        (five, 3, &["a", "e", "b"], true),
        (&["b"], 1, &["a", "x"], false),
        (five, 3, &["a", "c", "x"], false),
        (five, 3, &["a", "e"], false),
    ];
    for role in ["timestamp", "snapshot", "targets"] {
        let mut peer = Peer::new("ed25519");
        for (keys, threshold, signs, believed) in cases {
            peer.by(
                "keys",
                json!({"role": role, "keys": keys, "threshold": threshold, "signs": signs}),
            );
            peer.publish(["root", "targets", "snapshot", "timestamp"]);
            let device = peer.device();
            let have = signs.iter().filter(|key| keys.contains(key)).count() as u64;
            let want = if believed {
                Ok(())
            } else {
                below(role, have, threshold)
            };
            assert_eq!(device.refresh(), want, "{role} {signs:?}");
        }
    }
}

#[test]
fn clause_5_5_3_one_key_under_two_key_ids_counts_once() {
    for scheme in SCHEMES {
        let mut peer = Peer::new(scheme);
        let device = peer.device();
        let keyid = peer.with("rotate", ["snapshot"]);
        peer.publish(["root"]);
        let root: Value = serde_json::from_slice(&peer.read("2.root.json")).unwrap();
        let mut twin = root["signed"]["keys"][keyid.as_str().unwrap()].clone();
        // The same key in another spelling: digits in capitals, or lines of another length.
        let public = twin["keyval"]["public"].as_str().unwrap();
        twin["keyval"]["public"] = match scheme {
            "ed25519" => json!(public.to_uppercase()),
            _ => json!(format!("\n{}\n", public.replace('\n', "\r\n"))),
        };
        peer.by(
            "extra_key",
            json!({"keyid": "twin", "key": twin, "role": "snapshot"}),
        );
        peer.publish(["root", "snapshot", "timestamp"]);
        let twice = |snapshot: &mut Value| {
            let mut second = snapshot["signatures"][0].clone();
            second["keyid"] = json!("twin");
            snapshot["signatures"].as_array_mut().unwrap().push(second);
        };
        peer.spoil("2.snapshot.json", twice);
        assert_eq!(device.refresh(), Ok(()), "{scheme}");
        peer.by("threshold", json!({"role": "snapshot", "threshold": 2}));
        peer.publish(["root", "snapshot", "timestamp"]);
        peer.spoil("3.snapshot.json", twice);
        assert_eq!(device.refresh(), below("snapshot", 1, 2), "{scheme}");
    }
}

#[test]
fn clause_4_2_1_two_signatures_of_one_key_id_are_refused() {
    let peer = Peer::new("ed25519");
    let device = peer.device();
    peer.spoil("1.snapshot.json", |snapshot| {
        let signatures = snapshot["signatures"].as_array_mut().unwrap();
        signatures.push(signatures[0].clone());
    });
    assert!(
        matches!(device.refresh(), Err(Refusal::DuplicateSignature { role, .. }) if role == "snapshot")
    );
    assert_eq!(device.top(), [1, 1, 0, 0]);
}

#[test]
fn clause_5_4_2_a_signature_that_does_not_verify_does_no_harm_beside_enough_that_do() {
    let mut peer = Peer::new("ed25519");
    let device = peer.device();
    peer.with("key", ["timestamp"]);
    for (version, sig) in [
        (2, json!("00")),
        (3, json!("")),
        (4, json!("not hexadecimal")),
    ] {
        peer.publish(["root", "timestamp"]);
        peer.spoil("timestamp.json", |timestamp| {
            timestamp["signatures"][0]["sig"] = sig
        });
        assert_eq!(device.refresh(), Ok(()));
        assert_eq!(device.version("timestamp"), Some(version));
    }
}

#[test]
fn clause_5_5_3_a_threshold_that_no_keys_can_meet_holds_only_that_role_up() {
    let mut peer = Peer::new("ed25519");
    let device = peer.device();
    peer.by("threshold", json!({"role": "snapshot", "threshold": 6}));
    peer.publish(["root", "snapshot", "timestamp"]);
    let want = Refusal::BadThreshold {
        role: "snapshot".into(),
        threshold: 6,
        keys: 1,
    };
    assert_eq!(device.refresh(), Err(want));
    assert_eq!(device.top(), [2, 2, 0, 0]);
    peer.by("threshold", json!({"role": "snapshot", "threshold": 1}));
    peer.publish(["root"]);
    assert_eq!(device.refresh(), Ok(()));
}

#[test]
fn clause_4_1_fields_and_key_ids_that_are_unknown_here_are_signed_for_too() {
    let mut peer = Peer::new("ed25519");
    let device = peer.device();
    peer.by(
        "extra",
        json!({"role": "root", "x-later": {"b": [1, null], "a": "\u{e9}\n"}}),
    );
    let key = json!({"keytype": "ed25519", "scheme": "ed25519", "keyval": {"public": "00"}, "keyid_hash_algorithms": "md5"});
    peer.by(
        "extra_key",
        json!({"keyid": "the key of Alice", "key": key, "role": "root"}),
    );
    peer.publish(["root"]);
    assert_eq!(device.refresh(), Ok(()));
    peer.publish(["root"]);
    peer.spoil("3.root.json", |root| {
        root["signed"]["x-later"]["b"][0] = json!(2)
    });
    assert_eq!(device.refresh(), below("root", 0, 1));
}
