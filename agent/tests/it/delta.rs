//! The superblock's check, on deltas that the real `ostree` has made.

use std::fs;
use std::path::Path;

use offshoot::commit::{Commit, Sha256};
use offshoot::delta::{Mismatch, check, objects};
use offshoot::trust::schema::{Delta, File};

use crate::bench::Bench;

/// What an honest publisher says of the delta in `directory`.
pub fn describe(directory: &Path, from: Option<Commit>, url: &str) -> Delta {
    let file = |name: &str| {
        let bytes = fs::read(directory.join(name)).unwrap();
        File {
            path: format!("{url}/{name}").parse().unwrap(),
            length: bytes.len() as u64,
            sha256: Sha256::of(&bytes),
        }
    };
    let names = (0..).map(|part: u32| part.to_string());
    Delta {
        from,
        to: None,
        usize: 1 << 20,
        superblock: file("superblock"),
        parts: names
            .take_while(|name| directory.join(name).exists())
            .map(|name| file(&name))
            .collect(),
    }
}

#[test]
fn the_superblock_of_an_honest_delta_is_what_its_manifest_says() {
    let (bench, one) = Bench::new();
    let two = bench.release("two", "");
    for from in [Some(one), None] {
        let directory = bench.delta(from, two);
        let delta = describe(&directory, from, "deltas/a");
        assert!(!delta.parts.is_empty());
        let superblock = fs::read(directory.join("superblock")).unwrap();
        assert_eq!(check(&superblock, &delta, two), Ok(()));
    }
}

#[test]
fn the_objects_of_a_delta_are_counted_from_its_superblock() {
    let (bench, _) = Bench::new();
    let two = bench.release("two", "");
    let directory = bench.delta(None, two);
    bench.ostree(&["--repo=only", "init", "--mode=archive"]);
    bench.ostree(&["--repo=only", "pull-local", "server", &two.to_string()]);
    let folders = fs::read_dir(bench.path("only/objects")).unwrap();
    let all: usize = folders
        .map(|folder| fs::read_dir(folder.unwrap().path()).unwrap().count())
        .sum();
    let superblock = fs::read(directory.join("superblock")).unwrap();
    // All but the commit, which is in the superblock itself; the head of each part counts as another one or two.
    let (least, parts) = (all as u64 - 1, 1);
    let counted = objects(&superblock);
    assert!((least..=least + 2 * parts).contains(&counted), "{counted}");
    assert_eq!(objects(b"no superblock"), 0);
}

#[test]
fn a_delta_that_is_not_what_its_manifest_says_is_refused_by_name() {
    let (bench, one) = Bench::new();
    let (two, three) = (bench.release("two", ""), bench.release("three", ""));
    let directory = bench.delta(Some(one), two);
    let honest = describe(&directory, Some(one), "deltas/a");
    let superblock = fs::read(directory.join("superblock")).unwrap();

    assert_eq!(
        check(&superblock, &honest, three),
        Err(Mismatch::To {
            want: three,
            got: Some(two)
        })
    );
    let mut delta = honest.clone();
    delta.from = None;
    assert_eq!(
        check(&superblock, &delta, two),
        Err(Mismatch::From {
            want: None,
            got: Some(one)
        })
    );
    let mut delta = honest.clone();
    let part = delta.parts.pop().unwrap();
    assert_eq!(
        check(&superblock, &delta, two),
        Err(Mismatch::PartCount { want: 0, got: 1 })
    );
    let other = Sha256::of(b"another part");
    delta.parts.push(File {
        sha256: other,
        ..part.clone()
    });
    assert_eq!(
        check(&superblock, &delta, two),
        Err(Mismatch::Part {
            part: 0,
            want: other,
            got: Some(part.sha256)
        })
    );

    // The right names around another commit: the object's own digest tells.
    let swapped = replace(&superblock, two, three);
    assert_eq!(
        check(&swapped, &honest, three),
        Err(Mismatch::Commit {
            want: three,
            got: two
        })
    );
}

/// The first place that holds one checksum then holds the other.
fn replace(bytes: &[u8], from: Commit, to: Commit) -> Vec<u8> {
    let needle = from.0.as_bytes();
    let at = bytes
        .windows(32)
        .position(|window| window == needle)
        .unwrap();
    let mut bytes = bytes.to_vec();
    bytes[at..at + 32].copy_from_slice(to.0.as_bytes());
    bytes
}

#[test]
fn objects_to_be_fetched_one_by_one_are_refused() {
    let (bench, one) = Bench::new();
    let big = "0123456789abcdef".repeat(200_000);
    let two = bench.release("two", &big);
    fs::create_dir(bench.path("fallback")).unwrap();
    bench.ostree(&[
        "--repo=server",
        "static-delta",
        "generate",
        &format!("--from={one}"),
        &format!("--to={two}"),
        "--min-fallback-size=1",
        "--disable-bsdiff",
        "--filename=fallback/superblock",
    ]);
    let directory = bench.path("fallback");
    let superblock = fs::read(directory.join("superblock")).unwrap();
    let delta = describe(&directory, Some(one), "deltas/a");
    assert_eq!(check(&superblock, &delta, two), Err(Mismatch::Fallbacks));
}

#[test]
fn a_superblock_cut_anywhere_or_with_any_byte_changed_is_never_taken_for_another_commit() {
    let (bench, one) = Bench::new();
    let two = bench.release("two", "");
    let directory = bench.delta(Some(one), two);
    let delta = describe(&directory, Some(one), "deltas/a");
    let superblock = fs::read(directory.join("superblock")).unwrap();
    for length in 0..superblock.len() {
        assert!(
            check(&superblock[..length], &delta, two).is_err(),
            "{length}"
        );
    }
    let at = superblock
        .windows(32)
        .position(|window| window == two.0.as_bytes())
        .unwrap();
    let mut refused = 0;
    for place in 0..superblock.len() {
        let mut changed = superblock.clone();
        changed[place] ^= 0x40;
        match check(&changed, &delta, two) {
            // Metadata, times and sizes are not looked at here.
            Ok(()) => assert!(place < at || place > at + 32, "{place}"),
            Err(_) => refused += 1,
        }
    }
    // At least the goal, the commit object and the parts' digests.
    assert!(refused > 32 + 100 + 32, "{refused}");
}
