//! Keys of a role with several people, each on a machine of their own.

use std::fs;
use std::process::Output;

use jiff::Timestamp as Time;
use serde_json::{Value, json};

use crate::bench::{Bench, files};
use crate::device::checked;

/// What somebody runs who has nothing but keys, in a directory of that name.
fn by(bench: &Bench, name: &str, arguments: &[&str]) -> Output {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_offshoot-fleet"));
    command
        .args(["--json", "--fleet", name])
        .args(arguments)
        .current_dir(bench.path(""))
        .output()
        .unwrap()
}

fn answer(output: &Output) -> Value {
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// A new key there; its id, and a file with its public half.
fn key_of(bench: &Bench, name: &str, key: &str) -> (String, String) {
    let made = answer(&by(bench, name, &["key", "new", key]));
    let file = format!("{name}.pub");
    fs::write(bench.path(&file), made["public"].as_str().unwrap()).unwrap();
    (made["keyid"].as_str().unwrap().to_owned(), file)
}

/// A copy of a file that is prepared, signed there.
fn sign(bench: &Bench, name: &str, file: &str) -> String {
    let copy = format!("{name}/{file}");
    fs::copy(
        bench.path(&format!("fleet/prepared/{file}")),
        bench.path(&copy),
    )
    .unwrap();
    answer(&by(bench, name, &["sign", &copy]));
    copy
}

/// Role, how many have signed, how many must, and who has not.
fn prepared(bench: &Bench) -> Value {
    bench.run(&["status"])["prepared"].take()
}

#[test]
fn two_people_sign_what_neither_of_them_could_alone() {
    let bench = Bench::new();
    bench.compose("1.0.0", 9);
    let ((alice, alices), (bob, bobs)) = (
        key_of(&bench, "alice", "channel-stable"),
        key_of(&bench, "bob", "channel-stable"),
    );
    // No secret leaves the machine that it was made on.
    assert!(
        fs::read_to_string(bench.path(&alices))
            .unwrap()
            .starts_with("-----BEGIN PUBLIC KEY-----\n")
    );
    let first = bench.run(&["status"])["roles"][5]["keys"][0]["keyid"].take();
    let public = format!("--public={alices}");
    let added = bench.run(&["rotate", "stable", "--add-key", &public]);
    assert_eq!(
        (&added["keyid"], &added["key"], &added["replaced"]),
        (&json!(alice), &json!(null), &json!(null))
    );
    assert_eq!(
        (&added["keys"], &added["threshold"]),
        (&json!(2), &json!(1))
    );
    let public = format!("--public={bobs}");
    let replace = [
        "rotate",
        "stable",
        "--key=channel-stable",
        &public,
        "--threshold=2",
    ];
    bench.fails(&replace, 6);
    let before = files(&bench.public());
    let summary = bench.run(&[&replace[..], &["--prepare"]].concat());
    assert_eq!(summary["replaced"], first);
    assert_eq!(
        summary["prepared"],
        json!(["fleet/prepared/stable.json", "fleet/prepared/targets.json"])
    );
    let waits = |role: &str, have: u64, need: u64, missing: &[&String]| json!({"role": role, "have": have, "need": need, "missing": missing});
    let targets = waits("targets", 1, 1, &[]);
    assert_eq!(
        prepared(&bench),
        json!([waits("stable", 0, 2, &[&bob, &alice]), targets])
    );
    bench.fails(&["complete"], 6);
    let signed = sign(&bench, "alice", "stable.json");
    bench.fails(&["complete", &signed], 6);
    assert_eq!(
        prepared(&bench),
        json!([waits("stable", 1, 2, &[&bob]), targets])
    );
    assert_eq!(files(&bench.public()), before);
    let signed = sign(&bench, "bob", "stable.json");
    let done = bench.run(&["complete", &signed]);
    let roles = done["signed"].as_array().unwrap().iter();
    let roles: Vec<_> = roles.map(|role| role["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["timestamp", "snapshot", "targets", "stable"]);
    assert_eq!(prepared(&bench), json!([]));

    // A release is refused before anything is made, and says what is missing.
    let publish = Bench::publishing("stable", "1.0.0", &["--full"]);
    bench.fails(&publish, 6);
    let said = String::from_utf8(bench.output(&publish).stderr).unwrap();
    for part in ["stable", "--prepare", &alice, &bob] {
        assert!(said.contains(part), "{said}");
    }
    let metadata = files(&bench.public().join("metadata"));
    let summary = bench.run(&[&publish[..], &["--prepare"]].concat());
    assert_eq!(summary["prepared"], json!(["fleet/prepared/stable.json"]));
    assert_eq!(files(&bench.public().join("metadata")), metadata);
    bench.fails(&["complete"], 6);
    // From one to the next, over one file.
    let signed = sign(&bench, "bob", "stable.json");
    let sheet = answer(&by(&bench, "alice", &["sign", "--show", &signed]));
    let sheet = &sheet["files"][0];
    assert_eq!(
        (&sheet["missing"], &sheet["role"]),
        (&json!([alice]), &json!("stable"))
    );
    assert_eq!(sheet["content"]["releases"][0]["commit"], summary["commit"]);
    let sheet = answer(&by(&bench, "alice", &["sign", &signed]));
    assert_eq!(
        (&sheet["files"][0]["by"], &sheet["files"][0]["missing"]),
        (&json!([alice]), &json!([]))
    );
    bench.run(&["complete", &signed]);
    let found = bench.device().poll(&bench.public(), Time::now()).unwrap();
    assert_eq!(checked(&bench.public(), &found.found.unwrap()), "1.0.0");
    bench.run(&["fsck"]);
}

#[test]
fn a_signature_that_is_not_one_counts_for_nothing() {
    let bench = Bench::new();
    let (_, alices) = key_of(&bench, "alice", "channel-stable");
    let (_, mallorys) = key_of(&bench, "mallory", "channel-stable");
    bench.run(&[
        "rotate",
        "stable",
        "--prepare",
        &format!("--public={alices}"),
    ]);
    let signed = sign(&bench, "alice", "stable.json");
    let good: Value = serde_json::from_slice(&fs::read(bench.path(&signed)).unwrap()).unwrap();
    let no = |document: &Value, code: i32| {
        fs::create_dir_all(bench.path("no")).unwrap();
        fs::write(bench.path("no/stable.json"), document.to_string()).unwrap();
        bench.fails(&["complete", "no/stable.json"], code);
    };
    let mut other = good.clone();
    other["signed"]["expires"] = json!("2099-01-01T00:00:00Z");
    no(&other, 1);
    let mut forged = good.clone();
    forged["signatures"][0]["sig"] = json!("00".repeat(64));
    no(&forged, 6);
    assert_eq!(
        by(&bench, "mallory", &["sign", "fleet/prepared/stable.json"])
            .status
            .code(),
        Some(1)
    );
    // Under another name it would be another role's.
    for name in ["root.json", "timestamp.json", "stable"] {
        fs::copy(bench.path(&signed), bench.path(name)).unwrap();
        let output = by(&bench, "alice", &["sign", name]);
        assert_eq!(output.status.code(), Some(1), "{name}");
    }
    bench.run(&["complete", &signed]);
    bench.fails(
        &[
            "rotate",
            "stable",
            "--add-key",
            &format!("--public={mallorys}"),
            "--threshold=3",
        ],
        1,
    );
    bench.fails(&["rotate", "stable", "--threshold=0"], 1);
}

#[test]
fn every_role_takes_more_keys_a_threshold_and_fewer_again() {
    let bench = Bench::new();
    bench.compose("1.0.0", 9);
    for (number, role) in ["root", "timestamp", "snapshot", "targets", "stable"]
        .into_iter()
        .enumerate()
    {
        bench.run(&["rotate", role, "--add-key", "--threshold=2"]);
        let status = bench.run(&["status"]);
        let roles = status["roles"].as_array().unwrap();
        let found = roles.iter().find(|found| found["role"] == role).unwrap();
        assert_eq!(found["threshold"], json!(2));
        let keys: Vec<_> = found["keys"]
            .as_array()
            .unwrap()
            .iter()
            .map(|key| key["file"].as_str().unwrap())
            .collect();
        assert_eq!(keys.len(), 2);
        if number % 2 == 0 {
            bench.fails(&["rotate", role, "--remove-key", keys[0]], 1);
            bench.run(&["rotate", role, "--threshold=1"]);
            bench.run(&["rotate", role, "--remove-key", keys[0]]);
        }
    }
    bench.publish("stable", "1.0.0", &["--full"]);
    bench.run(&["fsck"]);
    let found = bench.device().poll(&bench.public(), Time::now()).unwrap();
    assert_eq!(checked(&bench.public(), &found.found.unwrap()), "1.0.0");
}

#[test]
fn a_channel_and_what_is_late_are_signed_elsewhere() {
    let bench = Bench::new();
    fs::create_dir_all(bench.path("alice/keys")).unwrap();
    let (from, to) = ["fleet", "alice"]
        .map(|name| bench.path(&format!("{name}/keys/targets.pem")))
        .into();
    let _: () = fs::rename::<std::path::PathBuf, std::path::PathBuf>(from, to).unwrap();
    bench.fails(&["channel", "add", "nightly"], 6);
    let made = bench.run(&["channel", "add", "nightly", "--prepare"]);
    assert_eq!(
        made["prepared"],
        json!(["fleet/prepared/nightly.json", "fleet/prepared/targets.json"])
    );
    let signed = sign(&bench, "alice", "targets.json");
    bench.run(&["complete", &signed]);
    assert!(bench.run(&["status"])["channels"]["nightly"].is_object());

    assert_eq!(bench.run(&["refresh", "--prepare"])["prepared"], json!([]));
    let settings = bench.path("fleet/fleet.toml");
    let text = fs::read_to_string(&settings).unwrap();
    // What was signed for a year is late in the last third of four.
    fs::write(
        &settings,
        text.replace("targets = \"365d\"", "targets = \"1460d\""),
    )
    .unwrap();
    assert_eq!(
        bench.run(&["refresh", "--prepare"])["prepared"],
        json!(["fleet/prepared/targets.json"])
    );
    let signed = sign(&bench, "alice", "targets.json");
    bench.run(&["refresh", "--force"]);
    let done = bench.run(&["complete", &signed]);
    let roles = done["signed"].as_array().unwrap().iter();
    let roles: Vec<_> = roles.map(|role| role["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["timestamp", "snapshot", "targets"]);
    assert_eq!(bench.run(&["status"])["warnings"], json!([]));
}
