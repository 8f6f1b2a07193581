//! `offshoot-deployer` on real sysroots, with releases made by the real `ostree`. Needs root, as the deployer does.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that fails here says where"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use offshoot::commit::Commit;
use offshoot::deployment::{Deployments, Done, Failure, FailureKind, Stored};
use serde::de::DeserializeOwned;

struct Bench {
    temp: tempfile::TempDir,
}

impl Drop for Bench {
    fn drop(&mut self) {
        // Deployments are immutable, which keeps a temporary directory from going away.
        let script = "chattr -f -i sysroot/ostree/deploy/*/deploy/*.?";
        let _ = Command::new("sh")
            .args(["-c", script])
            .current_dir(self.temp.path())
            .status();
    }
}

impl Bench {
    /// A sysroot that runs release `one`, and a server's repository with it.
    fn new() -> (Self, Commit) {
        let bench = Self {
            temp: tempfile::tempdir().unwrap(),
        };
        bench.ostree(&["--repo=server", "init", "--mode=archive"]);
        let one = bench.release("one", "");
        fs::create_dir(bench.path("sysroot")).unwrap();
        bench.ostree(&["admin", "init-fs", "--modern", "sysroot"]);
        bench.ostree(&["admin", "os-init", "--sysroot=sysroot", "os"]);
        bench.ostree(&[
            "--repo=sysroot/ostree/repo",
            "config",
            "set",
            "sysroot.bootloader",
            "none",
        ]);
        bench.ostree(&[
            "--repo=sysroot/ostree/repo",
            "pull-local",
            "server",
            &one.to_string(),
        ]);
        let commit = one.to_string();
        bench.ostree(&[
            "admin",
            "deploy",
            "--sysroot=sysroot",
            "--os=os",
            "--karg=root=LABEL=root",
            "--karg=rw",
            &commit,
        ]);
        (bench, one)
    }

    fn path(&self, path: &str) -> PathBuf {
        self.temp.path().join(path)
    }

    fn ostree(&self, arguments: &[&str]) -> String {
        let output = Command::new("ostree")
            .args(arguments)
            .current_dir(self.temp.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "ostree {arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    fn release(&self, version: &str, extra: &str) -> Commit {
        let tree = self.path("tree");
        let _ = fs::remove_dir_all(&tree);
        let write = |path: &str, text: &str| {
            let path = tree.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("usr/lib/modules/6.1/vmlinuz", "kernel");
        write(
            "usr/lib/modules/6.1/initramfs.img",
            &format!("initramfs {extra}"),
        );
        write("usr/lib/os-release", "ID=os\nNAME=os\n");
        write("usr/etc/kept", "from the image\n");
        write("usr/etc/edited", &format!("from {version}\n"));
        write("usr/etc/untouched", &format!("from {version}\n"));
        write(&format!("usr/share/{version}"), version);
        for directory in ["sysroot", "boot", "var", "proc", "sys", "dev", "run", "tmp"] {
            fs::create_dir_all(tree.join(directory)).unwrap();
        }
        std::os::unix::fs::symlink("sysroot/ostree", tree.join("ostree")).unwrap();
        let version = format!("--add-metadata-string=version={version}");
        let commit = self.ostree(&[
            "--repo=server",
            "commit",
            "--branch=os",
            "--tree=dir=tree",
            &version,
        ]);
        commit.parse().unwrap()
    }

    /// The delta between two releases as a directory of `superblock`, `0`, …
    fn delta(&self, from: Option<Commit>, to: Commit) -> PathBuf {
        let (from_arg, name) = match from {
            Some(from) => (format!("--from={from}"), format!("delta-{from}-{to}")),
            None => ("--empty".to_owned(), format!("delta-{to}")),
        };
        let to = format!("--to={to}");
        let file = format!("--filename={name}/superblock");
        fs::create_dir_all(self.path(&name)).unwrap();
        self.ostree(&[
            "--repo=server",
            "static-delta",
            "generate",
            &from_arg,
            &to,
            "--min-fallback-size=0",
            &file,
        ]);
        self.path(&name)
    }

    fn deployer(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_offshoot-deployer"))
            .arg("--sysroot")
            .arg(self.path("sysroot"))
            .args(arguments)
            .output()
            .unwrap()
    }

    fn done<T: DeserializeOwned>(&self, arguments: &[&str]) -> T {
        let output = self.deployer(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn refused(&self, arguments: &[&str]) -> FailureKind {
        #[derive(serde::Deserialize)]
        struct Refused {
            error: Failure,
        }
        let output = self.deployer(arguments);
        let refused: Refused =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
        assert_eq!(output.status.code(), Some(refused.error.kind.code().into()));
        refused.error.kind
    }

    fn changed(&self, arguments: &[&str]) -> bool {
        self.done::<Done>(arguments).changed
    }

    fn deployed(&self) -> Vec<Commit> {
        let status: Deployments = self.done(&["status"]);
        status
            .deployments
            .iter()
            .map(|deployment| deployment.commit)
            .collect()
    }

    fn file(&self, commit: Commit, path: &str) -> PathBuf {
        self.path(&format!(
            "sysroot/ostree/deploy/os/deploy/{commit}.0/{path}"
        ))
    }

    fn apply(&self, delta: &Path, commit: Commit) -> Vec<String> {
        [
            "apply",
            "--spool",
            delta.to_str().unwrap(),
            "--commit",
            &commit.to_string(),
        ]
        .map(str::to_owned)
        .to_vec()
    }
}

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
        Stored { complete: false }
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
        Stored { complete: true }
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
        Stored { complete: false }
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
            Stored { complete: false }
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
