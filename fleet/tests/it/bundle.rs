//! A device without a network: the agent's own client, and a directory that `bundle` has written.

use std::fs;

use jiff::Timestamp as Time;
use offshoot::delta;
use offshoot::fetch::{Directory, Name, Source, Spool};
use offshoot::poll::Poller;
use offshoot::route::{chains, goal};
use offshoot::trust::store::Store;

use crate::bench::Bench;
use crate::serve::wait;

#[test]
fn a_device_that_is_two_releases_behind_gets_there_from_a_bundle() {
    let bench = Bench::new();
    let commits = ["1.0.0", "1.1.0", "1.2.0"].map(|version| {
        let commit = bench.compose(version, 100_000);
        bench.publish("stable", version, &["--deltas=1"]);
        commit
    });
    bench.run(&["rotate", "root"]);
    bench.fails(
        &[
            "bundle",
            "--channel=stable",
            "--hardware=other",
            "--output=b",
        ],
        1,
    );
    let arguments = [
        "bundle",
        "--channel=stable",
        "--hardware=qemu-x86_64",
        "--output=stick/b",
        "--from",
    ];
    let bundled = bench.run(&[&arguments[..], &[&commits[0]]].concat());
    assert_eq!(
        (
            &bundled["version"],
            bundled["deltas"].as_array().unwrap().len()
        ),
        (&"1.2.0".into(), 2)
    );
    bench.fails(&[&arguments[..], &[&commits[0]]].concat(), 1);

    bench.ostree(&["--repo=taken", "init", "--mode=bare-user"]);
    bench.ostree(&["--repo=taken", "pull-local", "fleet/repo", &commits[0]]);
    let mut source = Source::from(Directory::new(bench.path("stick/b")));
    let root = fs::read(bench.public().join("metadata/1.root.json")).unwrap();
    let mut store = Store::open(bench.path("device"), &root).unwrap();
    let mut poller = Poller::new("stable".parse().unwrap(), "qemu-x86_64".parse().unwrap());
    wait(async {
        let found = poller.poll(&mut source, &mut store, Time::now(), Time::UNIX_EPOCH);
        let release = found.await.unwrap().found.unwrap();
        let manifest = &release.manifest;
        let sizes: Vec<_> = manifest
            .deltas
            .iter()
            .map(|delta| delta.download().unwrap())
            .collect();
        let [way, _] = chains(manifest, |commit| commit.to_string() == commits[0], &sizes);
        let hops = way.unwrap().hops;
        assert_eq!(hops.len(), 2);
        let spool = Spool::open(bench.path("spool")).unwrap();
        for hop in hops {
            let to = goal(manifest, hop);
            let numbered = (0..).map(Name::Part).zip(&hop.parts);
            for (name, file) in numbered.chain([(Name::Superblock, &hop.superblock)]) {
                let slot = spool.slot(&to, name);
                let told = &mut |_| {};
                let fetched =
                    source.part(file.path.as_str(), file.length, &file.sha256, &slot, told);
                fetched.await.unwrap();
            }
            let superblock = spool.slot(&to, Name::Superblock).path();
            delta::check(&fs::read(&superblock).unwrap(), hop, to).unwrap();
            let superblock = superblock.to_str().unwrap();
            bench.ostree(&["--repo=taken", "static-delta", "apply-offline", superblock]);
        }
    });
    assert_eq!(store.root().version.number(), 2);
    bench.ostree(&["--repo=taken", "fsck", "--quiet"]);
    bench.ostree(&[
        "--repo=taken",
        "checkout",
        "--user-mode",
        &commits[2],
        "out",
    ]);
    assert_eq!(fs::read(bench.path("out/usr/bin/tool")).unwrap(), b"1.2.0");
}
