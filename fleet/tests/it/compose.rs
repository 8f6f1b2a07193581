//! `offshoot-fleet compose` on real trees, read back with the real `ostree`. Needs root, for owners and capabilities.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::bench::noise;

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
        self.command("tree", repo).output().unwrap()
    }

    fn command(&self, tree: &str, repo: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_offshoot-fleet"));
        command
            .args([
                "--json",
                "compose",
                "--tree",
                tree,
                "--branch",
                "os/x",
                "--release",
                "1.0",
                "--repo",
                repo,
            ])
            .args(["--timestamp", "1000"])
            .current_dir(self.temp.path());
        command
    }

    fn composed(&self, repo: &str) -> Value {
        self.composed_of("tree", repo)
    }

    fn composed_of(&self, tree: &str, repo: &str) -> Value {
        answer(&mut self.command(tree, repo))
    }

    /// A tar of the tree, as the documentation says to make one.
    fn tar(&self) {
        let status = Command::new("tar")
            .args([
                "--create",
                "--file=tree.tar",
                "--directory=tree",
                "--numeric-owner",
            ])
            .args(["--format=pax", "--xattrs", "--xattrs-include=*", "."])
            .current_dir(self.temp.path())
            .status()
            .unwrap();
        assert!(status.success());
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

fn answer(command: &mut Command) -> Value {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
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

#[test]
fn a_tar_of_a_tree_is_the_commit_of_the_tree_whoever_reads_it() {
    let bench = Bench::new();
    let (tree, temp) = (bench.tree(), bench.temp.path());
    // Streamed, with what a large file has beside its content.
    let large = tree.join("usr/lib/large");
    fs::write(&large, noise(3_000_000)).unwrap();
    chown(&large, Some(4_000_000), Some(3)).unwrap();
    xattr::set(&large, "user.b", b"2").unwrap();
    xattr::set(&large, "user.a", b"line\nline").unwrap();
    let deep = tree.join(format!("usr/{}/{}", "d".repeat(120), "é".repeat(100)));
    fs::create_dir_all(deep.parent().unwrap()).unwrap();
    fs::write(&deep, "deep").unwrap();
    fs::hard_link(&large, tree.join("usr/share-large")).unwrap();
    symlink("x".repeat(150), tree.join("usr/long-link")).unwrap();
    fs::create_dir(tree.join("dev")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        tree.join("dev/null"),
        rustix::fs::FileType::CharacterDevice,
        0o666.into(),
        rustix::fs::makedev(1, 3),
    )
    .unwrap();
    bench.tar();
    let want = bench.composed("repo");
    assert_eq!(want["replaced"], json!(["home", "usr/local"]));
    assert_eq!(bench.composed_of("tree.tar", "from-tar"), want);
    bench.ostree(&["--repo=from-tar", "fsck", "--quiet"]);

    let piped = answer(
        bench
            .command("-", "from-pipe")
            .stdin(fs::File::open(temp.join("tree.tar")).unwrap()),
    );
    assert_eq!(piped, want);

    // Nobody has no right to make these owners and capabilities, and need not.
    fs::set_permissions(temp, fs::Permissions::from_mode(0o777)).unwrap();
    let command = bench.command("-", "from-nobody");
    // The program itself may be where only root may look.
    let program = temp.join("offshoot-fleet");
    // Not copied by this process: another test's child may inherit the descriptor, and what is open for writing cannot be run.
    let copied = Command::new("cp")
        .arg(command.get_program())
        .arg(&program)
        .status();
    assert!(copied.unwrap().success());
    let mut nobody = Command::new("setpriv");
    nobody
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(program)
        .args(command.get_args())
        .current_dir(temp)
        .stdin(fs::File::open(temp.join("tree.tar")).unwrap());
    assert_eq!(answer(&mut nobody), want);
}

#[test]
fn a_tree_that_is_laid_out_already_composes_to_itself() {
    let bench = Bench::new();
    bench.composed("repo");
    bench.ostree(&["--repo=repo", "checkout", "os/x", "out"]);
    let out = bench.temp.path().join("out");
    // What ostree leaves out of /var, and directories that others keep in /usr.
    fs::create_dir_all(out.join("usr/share/dpkg/database")).unwrap();
    fs::copy(
        bench.tree().join("var/lib/dpkg/status"),
        out.join("usr/share/dpkg/database/status"),
    )
    .unwrap();
    fs::remove_file(out.join("opt")).unwrap();
    fs::create_dir(out.join("opt")).unwrap();
    fs::write(out.join("opt/kept"), "kept").unwrap();
    fs::remove_dir(out.join("tmp")).unwrap();
    symlink("sysroot/tmp", out.join("tmp")).unwrap();
    let composed = bench.composed_of("out", "again");
    assert_eq!(
        (&composed["packages"], &composed["replaced"]),
        (&json!(2), &json!([]))
    );
    let again = ["--repo=again", "checkout", "os/x", "again-out"];
    bench.ostree(&again);
    assert_eq!(bench.composed_of("again-out", "third"), composed);
    let differ = Command::new("diff")
        .args(["--recursive", "--no-dereference", "out", "again-out"])
        .current_dir(bench.temp.path())
        .output()
        .unwrap();
    assert!(differ.status.success(), "{differ:?}");
    // A tree that says both is one of neither kind.
    fs::create_dir(out.join("etc")).unwrap();
    assert_eq!(
        bench
            .command("out", "again")
            .output()
            .unwrap()
            .status
            .code(),
        Some(1)
    );
}

#[test]
fn a_tar_that_cannot_be_a_release_is_refused_and_leaves_no_branch() {
    fn header() -> tar::Header {
        let mut header = tar::Header::new_ustar();
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header
    }
    type Spoil = fn(&mut tar::Builder<fs::File>) -> std::io::Result<()>;
    let cases: [(&str, Spoil); 6] = [
        ("nothing", |_| Ok(())),
        ("device", |tar| {
            let mut header = header();
            header.set_entry_type(tar::EntryType::Char);
            header.set_size(0);
            tar.append_data(&mut header, "usr/null", std::io::empty())
        }),
        ("hard link to nothing", |tar| {
            let mut header = header();
            header.set_entry_type(tar::EntryType::Link);
            header.set_size(0);
            tar.append_link(&mut header, "usr/link", "usr/nothing")
        }),
        ("hard link out of a commit", |tar| {
            let mut header = header();
            header.set_entry_type(tar::EntryType::Link);
            header.set_size(0);
            tar.append_link(&mut header, "usr/link", "var/lib/dpkg/status")
        }),
        ("sparse", |tar| {
            tar.append_pax_extensions([("GNU.sparse.major", &b"1"[..])])?;
            let mut header = header();
            header.set_size(1);
            tar.append_data(&mut header, "usr/sparse", &b"x"[..])
        }),
        ("climbs", |tar| {
            let mut header = header();
            header.as_mut_bytes()[..9].copy_from_slice(b"usr/../up");
            header.set_size(0);
            header.set_cksum();
            tar.append(&header, std::io::empty())
        }),
    ];
    let bench = Bench::new();
    bench.tar();
    let path = bench.temp.path().join("tree.tar");
    let whole = fs::read(&path).unwrap();
    let refused = |what: &str, tree: &str| {
        let output = bench.command(tree, what).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{what}: {output:?}");
        assert_eq!(bench.ostree(&["refs", "--repo", what]), "", "{what}");
    };
    for (what, spoil) in cases {
        let mut tar = tar::Archive::new(&whole[..]);
        let mut spoilt =
            tar::Builder::new(fs::File::create(bench.temp.path().join("spoilt.tar")).unwrap());
        for entry in tar.entries().unwrap() {
            let entry = entry.unwrap();
            let mut header = entry.header().clone();
            let path = entry.path().unwrap().into_owned();
            match entry.link_name().unwrap().map(|target| target.into_owned()) {
                Some(target) => spoilt.append_link(&mut header, path, target).unwrap(),
                None => spoilt.append_data(&mut header, path, entry).unwrap(),
            }
        }
        spoil(&mut spoilt).unwrap();
        spoilt.finish().unwrap();
        if what == "nothing" {
            bench.composed_of("spoilt.tar", what);
        } else {
            refused(&what.replace(' ', "-"), "spoilt.tar");
        }
    }
    // Cut off, compressed, empty, none.
    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    refused("cut", "tree.tar");
    fs::write(&path, [&[0x1f, 0x8b][..], &whole].concat()).unwrap();
    refused("compressed", "tree.tar");
    fs::write(&path, vec![0; 1024]).unwrap();
    refused("empty", "tree.tar");
    fs::write(&path, noise(4096)).unwrap();
    refused("noise", "tree.tar");
}
