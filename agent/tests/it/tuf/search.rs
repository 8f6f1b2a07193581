//! 5.6.7 and 5.7: which roles are asked about a target, in which order, and what is taken for its file.

use std::fs;

use offshoot::trust::Refusal;
use serde_json::json;

use super::peer::{Peer, below};

/// From whom, to whom, for which paths, and whether nothing comes after.
type Delegation<'a> = (&'a str, &'a str, &'a [&'a str], bool);

fn publish(peer: &mut Peer, delegations: &[Delegation<'_>]) {
    for (delegator, role, paths, terminating) in delegations {
        let delegation = json!({"delegator": delegator, "role": role, "paths": paths, "terminating": terminating});
        peer.by("delegate", delegation);
    }
    let mut roles: Vec<_> = delegations.iter().map(|(_, role, ..)| *role).collect();
    roles.sort_unstable();
    roles.dedup();
    for role in roles {
        peer.publish([role]);
    }
    peer.publish(["targets", "snapshot", "timestamp"]);
}

/// The delegated roles that were asked for, in order.
fn visited(peer: &mut Peer) -> String {
    let requested = peer.requested();
    let roles = requested
        .iter()
        .filter_map(|path| path.strip_prefix("metadata/1.")?.strip_suffix(".json"))
        .filter(|role| !matches!(*role, "snapshot" | "targets"));
    roles.collect::<Vec<_>>().join(" ")
}

fn no_such_target(path: &str) -> Result<(), Refusal> {
    let path = path.to_owned();
    Err(Refusal::NoSuchTarget { path })
}

const ALL: &[&str] = &["*"];
const OTHER: &[&str] = &["*.other"];

#[test]
fn clause_5_6_7_roles_are_visited_in_pre_order_depth_first() {
    let graphs: [(&[Delegation<'_>], &str); 12] = [
        (&[("targets", "a", ALL, false)], "a"),
        (
            &[("targets", "a", ALL, false), ("targets", "b", ALL, false)],
            "a b",
        ),
        (
            &[
                ("targets", "a", ALL, false),
                ("targets", "b", ALL, false),
                ("b", "c", ALL, false),
            ],
            "a b c",
        ),
        (
            &[
                ("targets", "a", ALL, false),
                ("targets", "b", ALL, false),
                ("a", "c", ALL, false),
                ("a", "d", ALL, false),
            ],
            "a c d b",
        ),
        (
            &[
                ("targets", "a", ALL, false),
                ("targets", "b", ALL, false),
                ("a", "c", ALL, false),
                ("c", "d", ALL, false),
            ],
            "a c d b",
        ),
        // 5.6.7.2.1
        (
            &[
                ("targets", "a", ALL, false),
                ("targets", "b", ALL, false),
                ("a", "c", ALL, true),
                ("a", "d", ALL, false),
            ],
            "a c",
        ),
        (
            &[
                ("targets", "a", ALL, false),
                ("targets", "b", ALL, false),
                ("a", "c", ALL, true),
                ("c", "d", ALL, false),
            ],
            "a c d",
        ),
        (
            &[
                ("targets", "a", ALL, false),
                ("targets", "b", ALL, true),
                ("targets", "c", ALL, false),
            ],
            "a b",
        ),
        (
            &[
                ("targets", "a", OTHER, true),
                ("targets", "b", ALL, false),
                ("a", "c", ALL, false),
            ],
            "b",
        ),
        (
            &[
                ("targets", "a", ALL, false),
                ("targets", "b", ALL, false),
                ("a", "c", OTHER, false),
                ("c", "d", ALL, false),
            ],
            "a b",
        ),
        // 5.6.7.1: a cycle, and a role that is reached twice.
        (
            &[
                ("targets", "a", ALL, false),
                ("targets", "b", ALL, false),
                ("b", "c", ALL, false),
                ("c", "d", ALL, false),
                ("d", "b", ALL, false),
            ],
            "a b c d",
        ),
        (
            &[
                ("targets", "a", ALL, false),
                ("targets", "b", ALL, false),
                ("b", "c", ALL, false),
                ("a", "c", ALL, false),
            ],
            "a c b",
        ),
    ];
    for (delegations, want) in graphs {
        let mut peer = Peer::new("ed25519");
        publish(&mut peer, delegations);
        let device = peer.device();
        assert_eq!(device.download(&["missing"]), no_such_target("missing"));
        assert_eq!(visited(&mut peer), want);
    }
}

#[test]
fn clause_5_6_7_1_the_roles_of_one_search_are_bounded() {
    let mut peer = Peer::new("ed25519");
    let names: Vec<_> = (0..40).map(|number| format!("r{number}")).collect();
    let mut delegations = vec![("targets", "r0", ALL, false)];
    delegations.extend(
        names
            .windows(2)
            .map(|pair| (pair[0].as_str(), pair[1].as_str(), ALL, false)),
    );
    publish(&mut peer, &delegations);
    let device = peer.device();
    assert!(matches!(
        device.download(&["missing"]),
        Err(Refusal::TooManyRoles { limit: 32, .. })
    ));
    assert_eq!(visited(&mut peer).split(' ').count(), 31);
}

#[test]
fn clause_5_6_7_2_a_target_is_in_the_paths_of_every_role_on_the_way() {
    let mut peer = Peer::new("ed25519");
    publish(
        &mut peer,
        &[
            ("targets", "a", &["*.doc", "*.md", "foo-?.tgz"], false),
            ("targets", "b", &["releases/*/*"], false),
            ("b", "c", &["releases/x/*"], false),
            ("b", "d", &["releases/y/*.zip"], false),
        ],
    );
    let files = [
        ("targets", "top", ""),
        ("a", "read.md", "a"),
        ("a", "foo-1.tgz", "a"),
        ("c", "releases/x/one", "b c"),
        ("d", "releases/y/one.zip", "b d"),
        // Nobody may sign for these, or not the one that does.
        ("d", "releases/z/one.zip", "b"),
        ("a", "releases/read.md", ""),
        ("a", "foo-one.tgz", ""),
        ("a", "READ.MD", ""),
    ];
    for (role, path, _) in files {
        peer.by(
            "target",
            json!({"role": role, "path": path, "content": path}),
        );
    }
    peer.publish(["a", "c", "d", "targets", "snapshot", "timestamp"]);
    for (index, (_, path, want)) in files.into_iter().enumerate() {
        let device = peer.device();
        peer.requested();
        if index < 5 {
            assert_eq!(device.download(&[path]), Ok(()));
            assert_eq!(device.downloaded(), [path]);
        } else {
            assert_eq!(device.download(&[path]), no_such_target(path));
            assert_eq!(device.downloaded(), [] as [String; 0]);
        }
        let requested = peer.requested().join(" ");
        let asked = ["a", "b", "c", "d"]
            .into_iter()
            .filter(|role| requested.contains(&format!(".{role}.json")));
        assert_eq!(asked.collect::<Vec<_>>().join(" "), want, "{path}");
    }
}

#[test]
fn clause_5_6_7_2_a_delegation_may_be_by_how_the_digest_of_the_path_begins() {
    let mut peer = Peer::new("ed25519");
    // sha256("one") begins 7692, sha256("two") 3fc4.
    for (role, prefixes) in [("bin-7", ["76", "a0"]), ("bin-3", ["3", "b"])] {
        peer.by(
            "delegate",
            json!({"delegator": "targets", "role": role, "prefixes": prefixes}),
        );
        for path in ["one", "two"] {
            let content = format!("{path} of {role}");
            peer.by(
                "target",
                json!({"role": role, "path": path, "content": content}),
            );
        }
    }
    peer.publish(["bin-7", "bin-3", "targets", "snapshot", "timestamp"]);
    let device = peer.device();
    assert_eq!(device.download(&["one", "two"]), Ok(()));
    assert_eq!(device.downloaded(), ["one of bin-7", "two of bin-3"]);
    // Both searches begin at the top-level targets, which came once.
    let requested = peer.requested();
    let top = requested
        .iter()
        .filter(|path| path.ends_with(".targets.json"));
    assert_eq!(top.count(), 1);
    assert_eq!(device.download(&["three"]), no_such_target("three"));
}

#[test]
fn clause_5_6_7_a_role_is_judged_by_the_role_that_led_to_it_each_time() {
    let mut peer = Peer::new("ed25519");
    publish(
        &mut peer,
        &[
            ("targets", "a", &["a/*"], false),
            ("targets", "b", &["b/*"], false),
            ("a", "both", &["a/*"], false),
            ("b", "both", &["b/*"], false),
        ],
    );
    // The key that b gave it does not sign.
    peer.with("unsign", ["both"]);
    for path in ["a/file", "b/file"] {
        peer.by(
            "target",
            json!({"role": "both", "path": path, "content": path}),
        );
    }
    peer.publish(["both", "snapshot", "timestamp"]);
    let device = peer.device();
    assert_eq!(device.download(&["a/file", "b/file"]), below("both", 0, 1));
    assert_eq!(device.downloaded(), ["a/file"]);
}

#[test]
fn clause_5_6_7_a_role_that_the_snapshot_does_not_list_is_not_fetched() {
    let mut peer = Peer::new("ed25519");
    peer.by(
        "delegate",
        json!({"delegator": "targets", "role": "a", "paths": ["a/*"]}),
    );
    peer.publish(["a", "targets"]);
    peer.with("unlist", ["a"]);
    peer.publish(["snapshot", "timestamp"]);
    let device = peer.device();
    assert_eq!(device.refresh(), Ok(()));
    let unlisted = Refusal::NotInSnapshot { role: "a".into() };
    assert_eq!(device.download(&["a/file"]), Err(unlisted));
    assert_eq!(visited(&mut peer), "");
}

#[test]
fn clause_5_6_7_a_role_may_be_called_anything() {
    for (name, file) in [
        ("?", "%3F"),
        ("#", "%23"),
        ("/a", "%2Fa"),
        ("../a", "..%2Fa"),
        ("\u{fc}", "%C3%BC"),
    ] {
        let mut peer = Peer::new("ed25519");
        publish(&mut peer, &[("targets", name, ALL, false)]);
        let device = peer.device();
        assert_eq!(device.download(&["missing"]), no_such_target("missing"));
        assert_eq!(visited(&mut peer), file);
        assert_eq!(device.version(file), Some(1));
        assert_eq!(device.versions().len(), 5);
    }
}

#[test]
fn clause_5_7_2_a_target_that_no_role_has_is_reported_after_the_metadata_was_refreshed() {
    let peer = Peer::new("ed25519");
    let device = peer.device();
    assert_eq!(
        device.download(&["missing file"]),
        no_such_target("missing file")
    );
    assert_eq!(device.top(), [1; 4]);
}

#[test]
fn clause_5_7_3_a_file_is_what_its_role_signed_for() {
    let mut peer = Peer::new("ed25519");
    for path in ["one", "two"] {
        peer.by(
            "target",
            json!({"role": "targets", "path": path, "content": path}),
        );
    }
    peer.publish(["targets", "snapshot", "timestamp"]);
    let device = peer.device();
    assert_eq!(device.download(&["one"]), Ok(()));
    for round in ["uno", "due"] {
        let targets = peer.public().join("targets");
        for file in fs::read_dir(&targets).unwrap() {
            fs::write(file.unwrap().path(), "bad").unwrap();
        }
        let refused = device.download(&["two"]);
        assert!(matches!(refused, Err(Refusal::WrongDigest { role, .. }) if role == "two"));
        assert_eq!(device.downloaded(), ["one"]);
        peer.by(
            "target",
            json!({"role": "targets", "path": "one", "content": round}),
        );
        peer.publish(["targets", "snapshot", "timestamp"]);
        assert_eq!(device.download(&["one"]), Ok(()));
        assert_eq!(device.downloaded(), [round]);
        peer.by(
            "target",
            json!({"role": "targets", "path": "one", "content": "one"}),
        );
        peer.publish(["targets", "snapshot", "timestamp"]);
        assert_eq!(device.download(&["one"]), Ok(()));
    }
}

#[test]
fn clause_5_7_3_a_file_has_every_hash_that_is_listed_and_none_that_is_unknown() {
    for hashes in [&["sha256"][..], &["sha512"], &["sha256", "sha512"]] {
        let mut peer = Peer::new("ed25519");
        peer.by(
            "target",
            json!({"role": "targets", "path": "file", "content": "hello", "hashes": hashes}),
        );
        peer.publish(["targets", "snapshot", "timestamp"]);
        let device = peer.device();
        assert_eq!(device.download(&["file"]), Ok(()), "{hashes:?}");
        assert_eq!(device.downloaded(), ["hello"]);
    }
    let mut peer = Peer::new("ed25519");
    peer.by(
        "target",
        json!({"role": "targets", "path": "file", "content": "hello", "rename": "later"}),
    );
    peer.publish(["targets", "snapshot", "timestamp"]);
    let device = peer.device();
    let unknown = Refusal::UnknownHash {
        role: "file".into(),
        algorithm: "later".into(),
    };
    assert_eq!(device.download(&["file"]), Err(unknown));
    assert_eq!(device.downloaded(), [] as [String; 0]);
}

#[test]
fn clause_5_7_3_a_file_that_is_here_is_not_fetched_again() {
    let mut peer = Peer::new("ed25519");
    peer.by(
        "target",
        json!({"role": "targets", "path": "folder/file", "content": "hello"}),
    );
    peer.publish(["targets", "snapshot", "timestamp"]);
    let device = peer.device();
    for _ in 0..2 {
        assert_eq!(device.download(&["folder/file"]), Ok(()));
    }
    let targets = peer
        .requested()
        .into_iter()
        .filter(|path| path.starts_with("targets/"));
    assert_eq!(targets.count(), 1);
}
