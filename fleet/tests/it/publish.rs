//! `init`, `publish`, `channel add`, `status`, and a device that takes what they publish.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;

use jiff::Timestamp as Time;
use offshoot::route::{chains, goal};
use serde_json::{Value, json};

use crate::bench::{Bench, files, noise};
use crate::device::checked;

/// libostree would leave a file of this size out of a delta, to be fetched by itself.
const LARGE: usize = 5_000_000;

fn kinds(status: &Value) -> Vec<&str> {
    let warnings = status["warnings"].as_array().unwrap().iter();
    warnings
        .map(|warning| warning["kind"].as_str().unwrap())
        .collect()
}

#[test]
fn a_device_goes_from_an_empty_channel_through_two_releases() {
    let bench = Bench::empty();
    let made = bench.run(&[
        "init",
        "--root-keys=3",
        "--root-threshold=2",
        "--hardware=qemu-x86_64",
    ]);
    assert_eq!(made["channels"], json!(["stable"]));
    let mut device = bench.device();
    assert_eq!(
        device.poll(&bench.public(), Time::now()).unwrap().found,
        None
    );

    let first = bench.compose("1.0.0", LARGE);
    let published = bench.publish("stable", "1.0.0", &["--full"]);
    assert_eq!(
        (
            &published["serial"],
            &published["unchanged"],
            &published["commit"]
        ),
        (&json!(1), &json!(false), &json!(first))
    );
    bench.ostree(&["--repo=taken", "init", "--mode=bare-user"]);
    let mut held = String::new();
    for (version, more) in [("1.0.0", "--full"), ("1.1.0", "--deltas=1")] {
        let commit = bench.compose(version, LARGE + held.len());
        bench.publish("stable", version, &[more]);
        let release = device
            .poll(&bench.public(), Time::now())
            .unwrap()
            .found
            .unwrap();
        assert_eq!(checked(&bench.public(), &release), version);
        assert_eq!(release.manifest.commit.to_string(), commit);
        let [delta, ..] = &release.manifest.deltas[..] else {
            panic!("{:?}", release.manifest);
        };
        assert_eq!(
            delta.from.map(|from| from.to_string()).unwrap_or_default(),
            held
        );
        // Everything is in it, also what is large.
        assert!(delta.usize > LARGE as u64);
        let superblock = bench.public().join(delta.superblock.path.as_str());
        bench.ostree(&[
            "--repo=taken",
            "static-delta",
            "apply-offline",
            superblock.to_str().unwrap(),
        ]);
        bench.ostree(&["--repo=taken", "fsck", "--quiet"]);
        bench.ostree(&["--repo=taken", "checkout", "--user-mode", &commit, version]);
        assert_eq!(
            fs::read(bench.path(version).join("usr/bin/tool")).unwrap(),
            version.as_bytes()
        );
        let large = fs::read(bench.path(version).join("usr/share/large")).unwrap();
        assert!(large == noise(LARGE + held.len()));
        held = commit;
    }
    assert_eq!(kinds(&bench.run(&["status"])), Vec::<&str>::new());
}

#[test]
fn nothing_that_exists_is_overwritten() {
    let bench = Bench::empty();
    for name in ["keys", "repo", "public", "root.json", "fleet.toml"] {
        let directory = bench.path("fleet");
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join(name), "mine").unwrap();
        assert_eq!(bench.output(&["init"]).status.code(), Some(1), "{name}");
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);
        assert_eq!(fs::read(directory.join(name)).unwrap(), b"mine");
        fs::remove_dir_all(directory).unwrap();
    }
    bench.run(&["init"]);
    let before = files(&bench.path("fleet"));
    bench.fails(&["init"], 1);
    assert_eq!(files(&bench.path("fleet")), before);
}

#[test]
fn keys_are_the_operators_and_what_is_public_is_everybodys() {
    for umask in ["077", "000"] {
        keys_are_the_operators(umask);
    }
}

fn keys_are_the_operators(umask: &str) {
    let bench = Bench::empty();
    let program = env!("CARGO_BIN_EXE_offshoot-fleet");
    let script = format!(
        "umask {umask} && mkdir -p tree/usr/lib/modules/1 && cd tree/usr/lib/modules/1 && echo k > vmlinuz && echo i > initramfs.img && cd - && \
         run='{program} --fleet fleet' && $run init --hardware=qemu-x86_64 && $run compose --tree=tree --branch=1 --release=1 && \
         $run publish --channel=stable --hardware=qemu-x86_64 --release=1 --full 1"
    );
    let output = std::process::Command::new("sh")
        .args(["-c", &script])
        .current_dir(bench.path(""))
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let mode = |path: &str| fs::metadata(bench.path(path)).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode("fleet/keys"), 0o700);
    for (path, ..) in files(&bench.path("fleet/keys")) {
        assert_eq!(mode(path.to_str().unwrap()), 0o600, "{path:?}");
    }
    for path in [
        "public",
        "public/metadata",
        "public/targets",
        "public/deltas",
        "public/objects",
    ] {
        assert_eq!(mode(&format!("fleet/{path}")), 0o755, "{path}");
    }
    for (path, ..) in files(&bench.public()) {
        assert_eq!(mode(path.to_str().unwrap()), 0o644, "{path:?}");
    }
    let objects = fs::read_dir(bench.public().join("objects")).unwrap();
    for folder in objects
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().is_dir())
    {
        assert_eq!(mode(folder.path().to_str().unwrap()), 0o755, "{folder:?}");
    }
    let key = bench.path("fleet/keys/targets.pem");
    fs::set_permissions(&key, Permissions::from_mode(0o640)).unwrap();
    let output = bench.output(&["status", "--check"]);
    assert_eq!(output.status.code(), Some(4));
    let status: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(kinds(&status), ["key-readable"]);
}

#[test]
fn the_same_again_changes_nothing_and_a_version_is_never_used_twice() {
    let bench = Bench::new();
    for version in ["1.0.0", "1.1.0"] {
        bench.compose(version, 9);
        bench.publish("stable", version, &["--full"]);
    }
    let before = files(&bench.public());
    let again = bench.publish("stable", "1.1.0", &["--full"]);
    assert_eq!(
        (&again["serial"], &again["unchanged"]),
        (&json!(2), &json!(true))
    );
    assert_eq!(again["deltas"].as_array().unwrap().len(), 3);
    assert_eq!(files(&bench.public()), before);

    // Another commit under a version that is taken.
    fs::write(bench.path("tree/usr/bin/other"), "").unwrap();
    bench.compose("1.1.0", 9);
    bench.fails(&Bench::publishing("stable", "1.1.0", &[]), 1);
    // A former release, without the word that it is meant.
    bench.fails(&Bench::publishing("stable", "1.0.0", &[]), 1);
    let back = bench.publish("stable", "1.0.0", &["--again"]);
    assert_eq!(
        (&back["serial"], &back["unchanged"]),
        (&json!(3), &json!(false))
    );
    let release = bench
        .device()
        .poll(&bench.public(), Time::now())
        .unwrap()
        .found
        .unwrap();
    assert_eq!(checked(&bench.public(), &release), "1.0.0");
    let status = bench.run(&["status"]);
    let serials = status["channels"]["stable"]["qemu-x86_64"]
        .as_array()
        .unwrap()
        .iter();
    let serials: Vec<_> = serials
        .map(|release| (&release["version"], &release["serial"]))
        .collect();
    assert_eq!(
        serials,
        [(&json!("1.0.0"), &json!(3)), (&json!("1.1.0"), &json!(2))]
    );
}

#[test]
fn what_is_not_a_release_is_refused_and_nothing_is_published() {
    let bench = Bench::new();
    bench.compose("1.0.0", 9);
    let publish = |channel, hardware, release, rev| {
        let arguments = [
            "publish",
            "--channel",
            channel,
            "--hardware",
            hardware,
            "--release",
            release,
            rev,
        ];
        bench.fails(&arguments, 1);
    };
    publish("nightly", "qemu-x86_64", "1.0.0", "1.0.0");
    publish("stable", "qemu-x86_65", "1.0.0", "1.0.0");
    publish("stable", "qemu-x86_64", "1.0.1", "1.0.0");
    publish("stable", "qemu-x86_64", "1.0.0", "1.0");
    publish("stable", "qemu-x86_64", "1.0.0", &"0".repeat(64));
    bench.fails(
        &[
            "publish",
            "--channel=../x",
            "--hardware=qemu-x86_64",
            "--release=1.0.0",
            "1.0.0",
        ],
        2,
    );
    // The keys that sign for the channel are elsewhere.
    let key = bench.path("fleet/keys/channel-stable.pem");
    fs::rename(&key, bench.path("elsewhere")).unwrap();
    assert_eq!(
        bench
            .output(&Bench::publishing("stable", "1.0.0", &[]))
            .status
            .code(),
        Some(6)
    );
    assert_eq!(
        bench
            .device()
            .poll(&bench.public(), Time::now())
            .unwrap()
            .found,
        None
    );
    fs::rename(bench.path("elsewhere"), &key).unwrap();
    let published = bench.publish("stable", "1.0.0", &["--no-objects"]);
    assert_eq!(
        published["warnings"].as_array().unwrap().len(),
        1,
        "it has no delta and no objects"
    );
}

#[test]
fn deltas_come_from_the_last_releases_and_are_made_once() {
    let bench = Bench::new();
    let mut commits = Vec::new();
    for version in ["1", "2", "3", "4", "5"] {
        commits.push(json!(bench.compose(version, 9)));
        let published = bench.publish("stable", version, &[]);
        let deltas = published["deltas"].as_array().unwrap().iter();
        let deltas = deltas.filter(|delta| delta["to"].is_null());
        let from: Vec<_> = deltas.map(|delta| delta["from"].clone()).collect();
        let last = commits[..commits.len() - 1].iter().rev().take(3);
        assert_eq!(from, last.cloned().collect::<Vec<_>>());
    }
    let before = files(&bench.public().join("deltas"));
    bench.publish("beta", "4", &[]);
    let published = bench.publish("beta", "5", &["--deltas=1"]);
    assert_eq!(
        (&published["serial"], &published["deltas"][0]["from"]),
        (&json!(2), &commits[3])
    );
    assert_eq!(files(&bench.public().join("deltas")), before);
}

/// The releases that a device which has `from` goes through.
fn way(release: &offshoot::trust::Release, from: &str) -> Vec<String> {
    let manifest = &release.manifest;
    let sizes: Vec<_> = manifest
        .deltas
        .iter()
        .map(|delta| delta.download().unwrap())
        .collect();
    let [way, _] = chains(manifest, |commit| commit.to_string() == from, &sizes);
    let hops = way.map(|way| way.hops).unwrap_or_default();
    hops.iter()
        .map(|hop| goal(manifest, hop).to_string())
        .collect()
}

#[test]
fn a_device_that_is_far_behind_goes_from_delta_to_delta() {
    let bench = Bench::new();
    let settings = bench.path("fleet/fleet.toml");
    let text = fs::read_to_string(&settings).unwrap();
    fs::write(&settings, text.replace("chain = 10", "chain = 3")).unwrap();
    let mut commits = Vec::new();
    let mut device = bench.device();
    let mut seen = || {
        let found = device.poll(&bench.public(), Time::now()).unwrap().found;
        let release = found.unwrap();
        checked(&bench.public(), &release);
        release
    };
    bench.ostree(&["--repo=taken", "init", "--mode=bare-user"]);
    for version in ["1", "2", "3", "4", "5", "6"] {
        commits.push(bench.compose(version, 9));
        let full = if version == "1" { "--full" } else { "--json" };
        bench.publish("stable", version, &["--deltas=1", full]);
    }
    let release = seen();
    assert_eq!(way(&release, &commits[4]), &commits[5..]);
    assert_eq!(way(&release, &commits[1]), &commits[2..]);
    // Further behind than three releases and the last delta.
    assert_eq!(way(&release, &commits[0]), &commits[..0]);

    // Who keeps one release keeps the ways to it, and the next one continues them.
    bench.run(&["prune", "--keep=1"]);
    seen();
    commits.push(bench.compose("7", 9));
    bench.publish("stable", "7", &["--deltas=1"]);
    let release = seen();
    assert_eq!(way(&release, &commits[2]), &commits[3..]);
    assert_eq!(way(&release, &commits[1]), &commits[..0]);
    assert_eq!(kinds(&bench.run(&["status"])), Vec::<&str>::new());

    // By what is published a device gets there.
    bench.ostree(&["--repo=taken", "pull-local", "fleet/repo", &commits[2]]);
    for (from, to) in commits[2..].iter().zip(&commits[3..]) {
        let superblock = bench
            .public()
            .join(format!("deltas/{from}-{to}/superblock"));
        let superblock = superblock.to_str().unwrap();
        bench.ostree(&["--repo=taken", "static-delta", "apply-offline", superblock]);
    }
    bench.ostree(&["--repo=taken", "fsck", "--quiet"]);
    bench.ostree(&["--repo=taken", "ls", &commits[6], "/usr/bin/tool"]);
}

#[test]
fn a_channel_more_has_its_own_key_and_the_devices_of_the_others_go_on() {
    let bench = Bench::new();
    bench.compose("1.0.0", 9);
    bench.publish("stable", "1.0.0", &["--full"]);
    let mut device = bench.device();
    device.poll(&bench.public(), Time::now()).unwrap();
    bench.run(&["channel", "add", "nightly"]);
    bench.fails(&["channel", "add", "nightly"], 1);
    bench.fails(&["channel", "add", "root"], 2);
    fs::rename(
        bench.path("fleet/keys/channel-stable.pem"),
        bench.path("elsewhere"),
    )
    .unwrap();
    bench.publish("nightly", "1.0.0", &["--full"]);
    let release = device
        .poll(&bench.public(), Time::now())
        .unwrap()
        .found
        .unwrap();
    assert_eq!(checked(&bench.public(), &release), "1.0.0");
    let status = bench.run(&["status"]);
    assert_eq!(status["channels"].as_object().unwrap().len(), 3);
    let targets = fs::read(bench.public().join("metadata/2.targets.json")).unwrap();
    let targets: Value = serde_json::from_slice(&targets).unwrap();
    let delegations = &targets["signed"]["delegations"];
    let channels = ["stable", "beta", "nightly"];
    for (delegation, channel) in delegations["roles"]
        .as_array()
        .unwrap()
        .iter()
        .zip(channels)
    {
        assert_eq!(
            (
                &delegation["name"],
                &delegation["terminating"],
                &delegation["paths"]
            ),
            (
                &json!(channel),
                &json!(true),
                &json!([format!("{channel}/*/*")])
            )
        );
    }
    assert_eq!(delegations["keys"].as_object().unwrap().len(), 3);
}

#[test]
fn damage_is_told_and_not_published_over() {
    let bench = Bench::new();
    let commits = ["1.0.0", "1.1.0"].map(|version| {
        let commit = bench.compose(version, 9);
        bench.publish("stable", version, &["--full"]);
        commit
    });
    let one = |folder: &str, end: &str| {
        let all = files(&bench.public().join(folder)).into_iter();
        let mut found = all
            .map(|(path, ..)| path)
            .filter(|path| path.to_str().unwrap().ends_with(end));
        found.next().unwrap()
    };
    let original = |path: &std::path::Path| fs::read(path).unwrap();
    for (path, kind) in [
        (one("deltas", "/0"), "file-damaged"),
        (one("deltas", "superblock"), "file-damaged"),
        (one("targets", "1.0.0.manifest.json"), "file-damaged"),
        (one("targets", "1.1.0.commit"), "file-damaged"),
    ] {
        let bytes = original(&path);
        fs::remove_file(&path).unwrap();
        assert_eq!(kinds(&bench.run(&["status"])), [kind], "{path:?}");
        if !path.to_str().unwrap().ends_with("commit") {
            fs::write(&path, &bytes[1..]).unwrap();
            assert_eq!(kinds(&bench.run(&["status"])), [kind], "{path:?}");
        }
        fs::write(&path, bytes).unwrap();
    }
    // The beta channel would use the same delta.
    let part = one("deltas", &format!("empty-{}/0", commits[0]));
    let bytes = original(&part);
    fs::write(&part, "other").unwrap();
    bench.fails(&Bench::publishing("beta", "1.0.0", &["--full"]), 1);
    fs::write(&part, &bytes).unwrap();
    // Of the same length, which only `fsck` finds.
    assert_eq!(bench.run(&["fsck"])["problems"], json!([]));
    let mut other = bytes.clone();
    other[0] ^= 1;
    fs::write(&part, other).unwrap();
    assert_eq!(kinds(&bench.run(&["status"])), Vec::<&str>::new());
    let output = bench.output(&["fsck"]);
    assert_eq!(output.status.code(), Some(5));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let path = part.strip_prefix(bench.public()).unwrap();
    assert_eq!(
        (
            &report["problems"][0]["kind"],
            &report["problems"][0]["path"]
        ),
        (&json!("wrong-digest"), &json!(path))
    );
    let copy = bench.path("copy");
    fs::write(&part, bytes).unwrap();
    let copied = std::process::Command::new("cp")
        .arg("-a")
        .args([&bench.public(), &copy])
        .status();
    assert!(copied.unwrap().success());
    bench.run(&["fsck", "--public", "copy"]);
    fs::remove_file(copy.join(path)).unwrap();
    assert_eq!(
        bench.output(&["fsck", "--public", "copy"]).status.code(),
        Some(5)
    );
    // Signed by nobody.
    let metadata = one("metadata", "stable.json");
    let newest = bench.public().join("metadata/3.stable.json");
    fs::copy(metadata, &newest).unwrap();
    bench.fails(&["status"], 1);
    bench.fails(&["refresh", "--force"], 1);
    bench.fails(&Bench::publishing("beta", "1.0.0", &[]), 1);
}

#[test]
fn whoever_comes_second_is_told_that_another_is_at_work() {
    let bench = Bench::new();
    let lock = fs::File::options()
        .write(true)
        .open(bench.path("fleet/.lock"))
        .unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    bench.fails(&["refresh", "--force"], 3);
    bench.fails(&["channel", "add", "nightly"], 3);
    bench.run(&["status"]);
    drop(lock);
    bench.run(&["refresh", "--force"]);
}

#[test]
fn a_setting_that_is_wrong_is_named() {
    let bench = Bench::new();
    let path = bench.path("fleet/fleet.toml");
    let good = fs::read_to_string(&path).unwrap();
    for (from, to, names) in [
        ("deltas = 3", "delta = 3", "delta"),
        ("\"7d\"", "\"7 days\"", "timestamp"),
        ("\"7d\"", "\"0d\"", "timestamp"),
        ("\"qemu-x86_64\"", "\"a/b\"", "hardware"),
    ] {
        fs::write(&path, good.replace(from, to)).unwrap();
        let output = bench.output(&["status"]);
        assert_eq!(output.status.code(), Some(1));
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(
            text.contains("fleet.toml") && text.contains(names),
            "{text}"
        );
    }
    fs::remove_file(&path).unwrap();
    bench.fails(&["status"], 1);
}

#[test]
fn keys_are_replaced_and_former_releases_removed_as_the_operator_says() {
    let bench = Bench::new();
    for version in ["1.0.0", "1.1.0"] {
        bench.compose(version, 9);
        bench.publish("stable", version, &["--full"]);
    }
    let mut device = bench.device();
    device.poll(&bench.public(), Time::now()).unwrap();
    bench.fails(&["rotate", "nightly"], 1);
    let rotated = bench.run(&["rotate", "timestamp", "--key=timestamp"]);
    assert!(
        rotated["key"]
            .as_str()
            .unwrap()
            .ends_with("keys/timestamp-2.pem")
    );
    fs::remove_file(bench.path("fleet/keys/timestamp.pem")).unwrap();
    bench.fails(&["prune"], 2);
    let pruned = bench.run(&["prune", "--keep=1"]);
    assert_eq!(pruned["releases"][0]["version"], "1.0.0");
    assert!(pruned["files"].as_u64().unwrap() > 0 && pruned["bytes"].as_u64().unwrap() > 0);
    let release = device
        .poll(&bench.public(), Time::now())
        .unwrap()
        .found
        .unwrap();
    assert_eq!(checked(&bench.public(), &release), "1.1.0");
    assert_eq!(device.root(), 2);
    let status = bench.run(&["status"]);
    assert_eq!(kinds(&status), Vec::<&str>::new());
    let timestamp = &status["roles"][1];
    assert_eq!(
        (&timestamp["role"], &timestamp["keys"][0]["file"]),
        (&json!("timestamp"), &json!("timestamp-2"))
    );
    let releases = &status["channels"]["stable"]["qemu-x86_64"];
    assert_eq!(releases.as_array().unwrap().len(), 1);
}
