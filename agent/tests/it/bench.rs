//! A sysroot with real deployments of small releases, made and changed by the real `ostree` and `offshoot-deployer`. Needs root, as they do.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use offshoot::commit::Commit;
use offshoot::deployment::{Deployments, Done, Failure, FailureKind};
use serde::de::DeserializeOwned;

/// 64 digits for each number. Digits of digests do not compress to less than half.
pub fn noise(numbers: std::ops::Range<u64>) -> String {
    numbers
        .map(|number| offshoot::commit::Sha256::of(&number.to_le_bytes()).to_string())
        .collect()
}

pub struct Bench {
    pub temp: tempfile::TempDir,
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
    pub fn new() -> (Self, Commit) {
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

    pub fn path(&self, path: &str) -> PathBuf {
        self.temp.path().join(path)
    }

    pub fn ostree(&self, arguments: &[&str]) -> String {
        let output = Command::new("ostree")
            .args(arguments)
            .current_dir(self.temp.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "ostree {arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    pub fn release(&self, version: &str, extra: &str) -> Commit {
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
        // Where a device's root has the physical one mounted, a deployment here has a link to it.
        std::os::unix::fs::symlink("../../../../..", tree.join("sysroot")).unwrap();
        for directory in ["boot", "var", "proc", "sys", "dev", "run", "tmp"] {
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
    pub fn delta(&self, from: Option<Commit>, to: Commit) -> PathBuf {
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

    pub fn deployer(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_offshoot-deployer"))
            .arg("--sysroot")
            .arg(self.path("sysroot"))
            .args(arguments)
            .output()
            .unwrap()
    }

    pub fn done<T: DeserializeOwned>(&self, arguments: &[&str]) -> T {
        let output = self.deployer(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    pub fn refused(&self, arguments: &[&str]) -> FailureKind {
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

    pub fn changed(&self, arguments: &[&str]) -> bool {
        self.done::<Done>(arguments).changed
    }

    pub fn deployed(&self) -> Vec<Commit> {
        let status: Deployments = self.done(&["status"]);
        status
            .deployments
            .iter()
            .map(|deployment| deployment.commit)
            .collect()
    }

    pub fn file(&self, commit: Commit, path: &str) -> PathBuf {
        self.path(&format!(
            "sysroot/ostree/deploy/os/deploy/{commit}.0/{path}"
        ))
    }

    pub fn apply(&self, delta: &Path, commit: Commit) -> Vec<String> {
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
