//! A device that no delta is for gets there by the objects that are missing: the agent's own client, over the operator's own server.

use std::fs;
use std::path::{Path, PathBuf};

use jiff::Timestamp as Time;
use offshoot::fetch::{Name, Source, Spool, Wanted};
use offshoot::objects::{self, Object};
use offshoot::poll::Poller;
use offshoot::route::chains;
use offshoot::trust::store::Store;

use crate::bench::Bench;
use crate::device::checked;
use crate::serve::{Serving, client, wait};

/// One connection, one runtime.
#[test]
fn a_device_with_an_unrelated_commit_gets_there_by_the_objects_that_are_missing() {
    wait(get_there());
}

fn place(repo: &Path, object: &Object) -> PathBuf {
    repo.join(object.path())
}

async fn get_there() {
    let bench = Bench::new();
    // What it has was never published; the large file is in both.
    let former = bench.compose("0.9", 300_000);
    bench.ostree(&["--repo=taken", "init", "--mode=archive"]);
    bench.ostree(&["--repo=taken", "pull-local", "fleet/repo", &former]);
    let commit = bench.compose("1.0.0", 300_000);
    let published = bench.publish("stable", "1.0.0", &["--deltas=0"]);
    assert_eq!(published["warnings"].as_array().unwrap().len(), 0);

    let serving = Serving::start(&bench, &[]);
    let mut source = Source::from(client(&serving));
    let root = fs::read(bench.path("fleet/root.json")).unwrap();
    let mut store = Store::open(bench.path("device"), &root).unwrap();
    let mut poller = Poller::new("stable".parse().unwrap(), "qemu-x86_64".parse().unwrap());
    let now = Time::now();
    let found = poller.poll(&mut source, &mut store, now, Time::UNIX_EPOCH);
    let release = found.await.unwrap().found.unwrap();
    assert_eq!(checked(&bench.public(), &release), "1.0.0");
    let manifest = &release.manifest;
    assert_eq!(chains(manifest, |_| true, &[]), [None, None]);

    let spool = Spool::open(bench.path("spool")).unwrap();
    let slot = |name| spool.slot(&manifest.commit, name);
    let index = &manifest.objects.as_ref().unwrap().index;
    let slot_of_index = slot(Name::Index);
    let told = &mut |_| {};
    let fetched = source.part(
        index.path.as_str(),
        index.length,
        &index.sha256,
        &slot_of_index,
        told,
    );
    fetched.await.unwrap();
    let all = objects::parse(&fs::read(slot_of_index.path()).unwrap()).unwrap();
    let taken = bench.path("taken");
    let missing: Vec<_> = all
        .iter()
        .filter(|object| !place(&taken, object).exists())
        .collect();
    let wanted = missing.iter().map(|object| Wanted {
        path: object.path(),
        length: object.length,
        sha256: object.sha256,
        slot: slot(Name::Object(object.kind, object.checksum)),
    });
    let wanted: Vec<_> = wanted.collect();
    let mut bytes = 0;
    let fetched = source.many(&wanted, &mut |length| bytes += length).await;
    fetched.unwrap();
    // The commit, the tool, and the directories above it: not the large file, the kernel and the rest.
    assert!(missing.len() < all.len() && bytes < 300_000);
    let sum: u64 = missing.iter().map(|object| object.length).sum();
    assert_eq!(bytes, sum);

    for object in missing {
        let (from, to) = (
            slot(Name::Object(object.kind, object.checksum)),
            place(&taken, object),
        );
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(from.path(), to).unwrap();
    }
    // libostree finds each object to be what it is named, and the commit complete.
    bench.ostree(&["--repo=taken", "refs", "--create=got", &commit]);
    bench.ostree(&["--repo=taken", "fsck", "--quiet"]);
    bench.ostree(&["--repo=taken", "checkout", "--user-mode", &commit, "out"]);
    let tool = fs::read(bench.path("out/usr/bin/tool")).unwrap();
    assert_eq!(tool, b"1.0.0");

    let (code, log) = serving.stop();
    assert_eq!(code, Some(0));
    let asked = log.iter().filter(|line| {
        let path = line["path"].as_str().unwrap();
        path.starts_with("/objects/") && !path.ends_with(".index")
    });
    let asked: Vec<_> = asked.collect();
    assert_eq!(asked.len(), wanted.len());
    assert!(asked.iter().all(|line| line["http"] == "2"), "{asked:?}");
}
