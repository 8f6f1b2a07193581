//! What is published, read by python-tuf, the specification's reference implementation.

use std::fs;
use std::path::Path;

use offshoot::commit::Sha256;
use serde_json::{Value, json};

use crate::bench::Bench;

#[path = "../../../agent/tests/it/tuf/process.rs"]
mod process;

/// The versions that it reads, from the first root to the file of a target.
pub(crate) fn versions(bench: &Bench, target: &str) -> Value {
    let mut python = process::Process::start();
    let url = python.call(&json!({"do": "serve", "with": [bench.public()]}));
    let read = json!({"do": "read", "by": {
        "url": url.unwrap(), "root": bench.path("fleet/public/metadata/1.root.json"), "directory": bench.path("python"), "targets": [target],
    }});
    python.call(&read).unwrap()["versions"].take()
}

#[test]
fn python_tuf_verifies_what_is_published_and_downloads_the_commit() {
    let bench = Bench::new();
    let mut python = process::Process::start();
    let url = python.call(&json!({"do": "serve", "with": [bench.public()]}));
    let url = url.unwrap();
    let mut read = |targets: &[&str]| {
        let call = json!({"do": "read", "by": {
            "url": url, "root": bench.path("fleet/public/metadata/1.root.json"), "directory": bench.path("python"), "targets": targets,
        }});
        python.call(&call)
    };
    let empty = read(&[]).unwrap()["versions"].take();
    assert_eq!(
        empty,
        json!({"root": 1, "timestamp": 1, "snapshot": 1, "targets": 1})
    );
    // It has the first root, and follows.
    for (roots, version) in (1..).step_by(2).zip(["1.0.0", "1.1.0"]) {
        let commit = bench.compose(version, 1000);
        bench.publish("stable", version, &["--full"]);
        let target = |kind: &str| format!("stable/qemu-x86_64/{version}.{kind}");
        let (object, manifest) = (target("commit"), target("manifest.json"));
        let found = read(&[&object, &manifest]).unwrap();
        assert!(found["versions"]["stable"].as_u64() > Some(1), "{found}");
        let file = |target: &str| {
            let path = found["files"][target].as_str().unwrap();
            fs::read(Path::new(path)).unwrap()
        };
        // The target's bytes are the commit object, and their digest is its name.
        assert_eq!(Sha256::of(&file(&object)).to_string(), commit);
        let manifest: Value = serde_json::from_slice(&file(&manifest)).unwrap();
        assert_eq!(manifest["commit"], json!(commit));
        assert_eq!(found["versions"]["root"], roots);
        for role in ["root", "timestamp", "stable"] {
            bench.run(&["rotate", role]);
        }
    }
    // Two must sign each role, and sign.
    for role in ["root", "timestamp", "snapshot", "targets", "stable"] {
        bench.run(&["rotate", role, "--add-key", "--threshold=2"]);
    }
    bench.compose("1.2.0", 1000);
    bench.publish("stable", "1.2.0", &[]);
    let found = read(&["stable/qemu-x86_64/1.2.0.commit"]).unwrap();
    assert_eq!(found["versions"]["root"], json!(9));
}

#[test]
fn python_tuf_refuses_what_was_changed_after_it_was_published() {
    let bench = Bench::new();
    let commit = bench.compose("1.0.0", 1000);
    bench.publish("stable", "1.0.0", &[]);
    let mut python = process::Process::start();
    let url = python.call(&json!({"do": "serve", "with": [bench.public()]}));
    let url = url.unwrap();
    let object = format!("targets/stable/qemu-x86_64/{commit}.1.0.0.commit");
    for file in ["metadata/timestamp.json", &object] {
        let path = bench.public().join(file);
        let good = fs::read(&path).unwrap();
        let mut bad = good.clone();
        let at = bad.len() / 2;
        bad[at] = if bad[at] == b'1' { b'2' } else { b'1' };
        fs::remove_file(&path).unwrap();
        fs::write(&path, bad).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let mut read = || {
            python.call(&json!({"do": "read", "by": {
                "url": url, "root": bench.path("fleet/root.json"), "directory": directory.path(),
                "targets": ["stable/qemu-x86_64/1.0.0.commit"],
            }}))
        };
        assert!(read().is_err(), "{file}");
        fs::write(&path, good).unwrap();
        assert!(read().is_ok(), "{file}");
    }
}
