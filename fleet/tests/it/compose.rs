//! `offshoot-fleet compose` on real trees, read back with the real `ostree`. Needs root, for owners and capabilities.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

struct Bench {
    temp: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let bench = Self {
            temp: tempfile::tempdir().unwrap(),
        };
        for (path, text) in [
            ("usr/bin/tool", "tool"),
            ("usr/lib/modules/6.12/modules.dep", ""),
            ("boot/vmlinuz-6.12", "kernel"),
            ("boot/initrd.img-6.12", "initramfs"),
            ("etc/passwd", "root"),
            ("var/cache/junk", "junk"),
            ("usr/local/junk", "junk"),
            ("home/user/junk", "junk"),
            (
                "var/lib/dpkg/status",
                "Package: b\nStatus: install ok installed\nArchitecture: amd64\nVersion: 2\n\n\
                 Package: gone\nStatus: deinstall ok config-files\nArchitecture: amd64\nVersion: 1\n\n\
                 Package: a\nStatus: install ok installed\nArchitecture: all\nVersion: 1:0-1\n",
            ),
        ] {
            let path = bench.tree().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        symlink("usr/bin", bench.tree().join("bin")).unwrap();
        let tool = bench.tree().join("usr/bin/tool");
        chown(&tool, Some(12), Some(34)).unwrap();
        fs::set_permissions(&tool, fs::Permissions::from_mode(0o4751)).unwrap();
        xattr::set(&tool, "user.label", b"x\0y").unwrap();
        let capability = [
            1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        ];
        xattr::set(&tool, "security.capability", &capability).unwrap();
        bench
    }

    fn tree(&self) -> PathBuf {
        self.temp.path().join("tree")
    }

    fn compose(&self, repo: &str) -> Output {
        Command::new(env!("CARGO_BIN_EXE_offshoot-fleet"))
            .args([
                "--json",
                "compose",
                "--tree",
                "tree",
                "--branch",
                "os/x",
                "--release",
                "1.0",
                "--repo",
                repo,
            ])
            .args(["--timestamp", "1000"])
            .current_dir(self.temp.path())
            .output()
            .unwrap()
    }

    fn composed(&self, repo: &str) -> serde_json::Value {
        let output = self.compose(repo);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn ostree(&self, arguments: &[&str]) -> String {
        let output = Command::new("ostree")
            .args(arguments)
            .current_dir(self.temp.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn a_tree_becomes_a_commit_with_everything_where_ostree_wants_it() {
    let bench = Bench::new();
    let composed = bench.composed("repo");
    assert_eq!(
        (
            &composed["kernel"],
            &composed["packages"],
            &composed["left_out"]
        ),
        (&"6.12".into(), &2.into(), &2.into())
    );
    bench.ostree(&["--repo=repo", "fsck", "--quiet"]);
    bench.ostree(&["--repo=repo", "checkout", "os/x", "out"]);
    let out = bench.temp.path().join("out");
    assert_eq!(read(&out.join("usr/etc/passwd")), "root");
    assert_eq!(read(&out.join("usr/lib/modules/6.12/vmlinuz")), "kernel");
    assert_eq!(
        read(&out.join("usr/lib/modules/6.12/initramfs.img")),
        "initramfs"
    );
    for (link, target) in [
        ("bin", "usr/bin"),
        ("home", "var/home"),
        ("ostree", "sysroot/ostree"),
        ("usr/local", "../var/usrlocal"),
    ] {
        assert_eq!(fs::read_link(out.join(link)).unwrap(), Path::new(target));
    }
    for empty in ["boot", "var", "proc", "sysroot", "tmp"] {
        assert_eq!(fs::read_dir(out.join(empty)).unwrap().count(), 0, "{empty}");
    }
    assert!(!out.join("etc").exists());
    let (tool, meta) = (
        out.join("usr/bin/tool"),
        fs::metadata(out.join("usr/bin/tool")).unwrap(),
    );
    assert_eq!((meta.uid(), meta.gid(), meta.mode()), (12, 34, 0o104_751));
    assert_eq!(xattr::get(&tool, "user.label").unwrap().unwrap(), b"x\0y");
    let original = xattr::get(bench.tree().join("usr/bin/tool"), "security.capability").unwrap();
    assert_eq!(xattr::get(&tool, "security.capability").unwrap(), original);
    let show = |key: &str| bench.ostree(&["--repo=repo", "show", key, "os/x"]);
    assert_eq!(show("--print-metadata-key=version"), "'1.0'\n");
    assert_eq!(show("--print-metadata-key=ostree.linux"), "'6.12'\n");
    assert_eq!(
        show("--print-metadata-key=offshoot.packages"),
        "[('a', '1:0-1', 'all'), ('b', '2', 'amd64')]\n"
    );
}

#[test]
fn the_same_tree_is_the_same_commit() {
    let bench = Bench::new();
    let (one, two) = (bench.composed("one"), bench.composed("two"));
    assert_eq!(one, two);
    fs::write(bench.tree().join("usr/bin/new"), "new").unwrap();
    assert_ne!(bench.composed("one")["commit"], one["commit"]);
}

#[test]
fn a_tree_that_cannot_be_a_release_is_refused_and_the_branch_stays() {
    let cases: [fn(&Path); 4] = [
        |tree| fs::remove_file(tree.join("boot/vmlinuz-6.12")).unwrap(),
        |tree| fs::remove_file(tree.join("boot/initrd.img-6.12")).unwrap(),
        |tree| {
            fs::create_dir(tree.join("usr/lib/modules/6.13")).unwrap();
            fs::write(tree.join("usr/lib/modules/6.13/vmlinuz"), "").unwrap();
            fs::write(tree.join("usr/lib/modules/6.13/initramfs.img"), "").unwrap();
        },
        |tree| drop(std::os::unix::net::UnixListener::bind(tree.join("usr/socket")).unwrap()),
    ];
    for spoil in cases {
        let bench = Bench::new();
        let before = bench.composed("repo");
        spoil(&bench.tree());
        assert_eq!(bench.compose("repo").status.code(), Some(1));
        assert_eq!(
            bench.ostree(&["--repo=repo", "rev-parse", "os/x"]).trim(),
            before["commit"]
        );
    }
}
