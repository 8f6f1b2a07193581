//! `offshoot-deployer` on real sysroots, with releases made by the real `ostree`.

use std::fs;
use std::process::Command;

use offshoot::deployment::{Done, FailureKind, Stored};

use crate::bench::Bench;

fn words(words: &[String]) -> Vec<&str> {
    words.iter().map(String::as_str).collect()
}

#[test]
fn a_delta_is_applied_deployed_and_the_former_release_kept() {
    let (bench, one) = Bench::new();
    let two = bench.release("two", "");
    let (commit, delta) = (two.to_string(), bench.delta(Some(one), two));
    assert_eq!(
        bench.done::<Stored>(&["stored", "--commit", &commit]),
        Stored { complete: vec![] }
    );
    assert_eq!(
        bench.refused(&["deploy", "--commit", &commit]),
        FailureKind::IncompleteCommit
    );
    let apply = bench.apply(&delta, two);
    assert!(bench.changed(&words(&apply)));
    assert!(!bench.changed(&words(&apply)));
    assert_eq!(
        bench.done::<Stored>(&["stored", "--commit", &commit]),
        Stored {
            complete: vec![two]
        }
    );
    assert_eq!(bench.deployed(), [one]);

    fs::write(bench.file(one, "etc/edited"), "by the operator\n").unwrap();
    fs::remove_file(bench.file(one, "etc/kept")).unwrap();
    fs::write(bench.path("sysroot/ostree/deploy/os/var/data"), "precious").unwrap();
    assert!(bench.changed(&["deploy", "--commit", &commit]));
    assert!(!bench.changed(&["deploy", "--commit", &commit]));
    assert_eq!(bench.deployed(), [two, one]);
    let read = |path| fs::read_to_string(bench.file(two, path)).unwrap();
    assert_eq!(read("etc/edited"), "by the operator\n");
    assert_eq!(read("etc/untouched"), "from two\n");
    assert!(!bench.file(two, "etc/kept").exists());
    assert_eq!(
        fs::read_to_string(bench.path("sysroot/ostree/deploy/os/var/data")).unwrap(),
        "precious"
    );
    let entry =
        fs::read_to_string(bench.path("sysroot/boot/loader/entries/ostree-2-os.conf")).unwrap();
    let options = entry
        .lines()
        .find_map(|line| line.strip_prefix("options "))
        .unwrap();
    assert!(
        options.starts_with("root=LABEL=root rw ostree=/ostree/boot."),
        "{options}"
    );

    assert!(bench.changed(&["undeploy", "--commit", &commit]));
    assert!(!bench.changed(&["undeploy", "--commit", &commit]));
    assert_eq!(bench.deployed(), [one]);
    assert_eq!(
        bench.refused(&["undeploy", "--commit", &one.to_string()]),
        FailureKind::Booted
    );
    assert!(bench.changed(&["prune"]));
    assert!(!bench.changed(&["prune"]));
    assert_eq!(
        bench.done::<Stored>(&["stored", "--commit", &commit]),
        Stored { complete: vec![] }
    );
}

#[test]
fn what_is_applied_and_not_deployed_survives_a_prune_that_keeps_it() {
    let (bench, _) = Bench::new();
    let two = bench.release("two", "changed");
    bench.done::<Done>(&words(&bench.apply(&bench.delta(None, two), two)));
    let commit = two.to_string();
    assert!(!bench.changed(&["prune", "--keep", &commit]));
    assert!(bench.changed(&["deploy", "--commit", &commit]));
}

/// A power cut after the objects are on the disk and before the name of the ref is.
#[test]
fn what_is_complete_and_not_held_is_not_stored_until_it_is_applied_again() {
    let (bench, one) = Bench::new();
    let two = bench.release("two", "changed");
    let (commit, apply) = (two.to_string(), bench.apply(&bench.delta(None, two), two));
    bench.done::<Done>(&words(&apply));
    fs::remove_file(bench.path("sysroot/ostree/repo/refs/heads/offshoot/staged")).unwrap();
    let stored = || bench.done::<Stored>(&["stored", "--commit", &commit]);
    assert_eq!(stored(), Stored { complete: vec![] });
    assert!(bench.changed(&words(&apply)));
    assert_eq!(
        stored(),
        Stored {
            complete: vec![two]
        }
    );
    assert!(bench.changed(&["deploy", "--commit", &commit]));
    assert_eq!(bench.deployed(), [two, one]);
}

#[test]
fn a_wrong_or_corrupt_delta_is_refused_and_changes_nothing() {
    let (bench, one) = Bench::new();
    let (two, three) = (bench.release("two", ""), bench.release("three", ""));
    let delta = bench.delta(Some(one), two);
    assert_eq!(
        bench.refused(&words(&bench.apply(&delta, three))),
        FailureKind::CorruptDelta
    );
    for commit in [two, three] {
        let commit = commit.to_string();
        assert_eq!(
            bench.done::<Stored>(&["stored", "--commit", &commit]),
            Stored { complete: vec![] }
        );
    }
    assert_eq!(bench.deployed(), [one]);

    let (bench, one) = Bench::new();
    let two = bench.release("two", "");
    let delta = bench.delta(Some(one), two);
    let part = delta.join("0");
    let mut bytes = fs::read(&part).unwrap();
    let last = bytes.len() - 1;
    bytes[last / 2] ^= 0x10;
    fs::write(&part, bytes).unwrap();
    assert_eq!(
        bench.refused(&words(&bench.apply(&delta, two))),
        FailureKind::CorruptDelta
    );
    assert_eq!(bench.deployed(), [one]);
}

#[test]
fn there_must_be_room_before_the_first_byte() {
    let (bench, _) = Bench::new();
    assert_eq!(
        bench.done::<Done>(&["preflight", "--unpacked", "1000"]),
        Done { changed: false }
    );
    assert_eq!(
        bench.refused(&["preflight", "--unpacked", "9000000000000000"]),
        FailureKind::NoSpace
    );
    // Numbers from outside, however large.
    let most = u64::MAX.to_string();
    assert_eq!(
        bench.refused(&["preflight", "--unpacked", &most]),
        FailureKind::NoSpace
    );
    assert_eq!(
        bench.refused(&["preflight", "--unpacked", "1", "--objects", &most]),
        FailureKind::NoSpace
    );
}

#[test]
fn a_corrupt_kernel_is_found_before_the_default_moves() {
    let (bench, one) = Bench::new();
    let two = bench.release("two", "new");
    bench.done::<Done>(&words(&bench.apply(&bench.delta(Some(one), two), two)));
    let object = fs::read_dir(bench.path("sysroot/ostree/repo/objects"))
        .unwrap()
        .flat_map(|directory| fs::read_dir(directory.unwrap().path()).unwrap())
        .map(|object| object.unwrap().path())
        .find(|path| fs::read(path).is_ok_and(|bytes| bytes == b"initramfs new"))
        .unwrap();
    fs::write(object, "initramfs bad").unwrap();
    assert_eq!(
        bench.refused(&["deploy", "--commit", &two.to_string()]),
        FailureKind::IncompleteCommit
    );
    assert_eq!(bench.deployed(), [one]);
}

#[test]
fn only_the_deployer_links_libostree() {
    let needed = |program: &str| {
        let output = Command::new("readelf")
            .args(["-d", program])
            .output()
            .unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout)
            .unwrap()
            .contains("[libostree-1.so.1]")
    };
    assert!(needed(env!("CARGO_BIN_EXE_offshoot-deployer")));
    assert!(!needed(env!("CARGO_BIN_EXE_offshoot")));
}
