//! `offshoot-fleet image`, run by an ordinary user, and what is on the disk, read back without mounting it. What must be there is what the real
//! libostree deploys as root.

mod dump;

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::bench::{self, noise};
use dump::{Dump, Node};
use ostree::glib::{Variant, VariantTy};

/// Nobody on this machine, who may do nothing special.
const USER: u32 = 12345;

const CAPABILITY: [u8; 20] = [
    1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

/// user::rw-, user:7:r--, group::r--, mask::r--, other::---
const ACL: [u8; 44] = [
    2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 4, 0, 7, 0, 0, 0, 4, 0, 4, 0, 255, 255, 255,
    255, 16, 0, 4, 0, 255, 255, 255, 255, 32, 0, 0, 0, 255, 255, 255, 255,
];

const CONFIG: &str =
    "[server]\nurl = 'https://updates.invalid/'\n[device]\nhardware = 'x'\nchannel = 'x'\n";

/// A fleet, a tree to compose, and a place for the user to write to.
struct Bench {
    fleet: bench::Bench,
}

impl Bench {
    fn new() -> Self {
        let bench = Self {
            fleet: bench::Bench::new(),
        };
        let tree = bench.tree();
        for (path, text) in [
            ("usr/lib/modules/6.12/vmlinuz", "kernel"),
            ("usr/lib/modules/6.12/initramfs.img", "initramfs"),
            (
                "usr/lib/os-release",
                "NAME=Bench\nPRETTY_NAME=\"Bench 1\"\n",
            ),
            ("usr/lib/offshoot/config.toml", CONFIG),
            ("usr/bin/tool", "tool"),
            ("etc/passwd", "root"),
            ("etc/machine-id", ""),
        ] {
            bench.write(path, text.as_bytes());
        }
        fs::copy(
            bench.fleet.path("fleet/root.json"),
            tree.join("usr/lib/offshoot/root.json"),
        )
        .unwrap();
        symlink("../usr/lib/os-release", tree.join("etc/os-release")).unwrap();
        symlink("usr/bin", tree.join("bin")).unwrap();
        let everybody = fs::Permissions::from_mode(0o755);
        fs::set_permissions(bench.fleet.path(""), everybody.clone()).unwrap();
        let program = bench.fleet.path("offshoot-fleet");
        fs::copy(env!("CARGO_BIN_EXE_offshoot-fleet"), &program).unwrap();
        fs::set_permissions(&program, everybody).unwrap();
        for directory in ["out", "other"] {
            let directory = bench.fleet.path(directory);
            fs::create_dir(&directory).unwrap();
            chown(&directory, Some(USER), Some(USER)).unwrap();
        }
        bench
    }

    fn tree(&self) -> PathBuf {
        self.fleet.path("tree")
    }

    fn write(&self, path: &str, content: &[u8]) {
        let path = self.tree().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    fn compose(&self) -> String {
        let arguments = [
            "compose",
            "--tree=tree",
            "--branch=os",
            "--release=1.0",
            "--timestamp=1700000000",
        ];
        let composed = self.fleet.run(&arguments);
        composed["commit"].as_str().unwrap().to_owned()
    }

    /// The layout of a board, without what is not in the tree, in a file that everybody may read.
    fn layout(&self, board: &str, change: impl Fn(String) -> String) -> String {
        let printed = self
            .fleet
            .output(&["image", "--print-layout", "--board", board]);
        assert!(printed.status.success(), "{printed:?}");
        let text = String::from_utf8(printed.stdout).unwrap();
        let plain = text.lines().filter(|line| !line.starts_with("grow"));
        let text = change(plain.map(|line| format!("{line}\n")).collect());
        let path = self.fleet.path("layout.toml");
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// The user makes an image of branch `os`.
    fn command(&self, output: &str, more: &[&str]) -> Command {
        let mut command = Command::new("setpriv");
        let user = USER.to_string();
        command
            .args([
                &format!("--reuid={user}"),
                &format!("--regid={user}"),
                "--clear-groups",
            ])
            .args(["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"])
            .arg(self.fleet.path("offshoot-fleet"))
            .args([
                "--json",
                "--fleet",
                "fleet",
                "image",
                "--commit=os",
                "--output",
                output,
            ])
            .args(more)
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .current_dir(self.fleet.path(""));
        for usual in ["--channel=stable", "--hardware=qemu-x86_64"] {
            let (key, _) = usual.split_once('=').unwrap();
            if !more.iter().any(|argument| argument.starts_with(key)) {
                command.arg(usual);
            }
        }
        command
    }

    fn image(&self, output: &str, more: &[&str]) -> Value {
        let output = self.command(output, more).output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Fails, and leaves nothing. What it says.
    fn refused(&self, more: &[&str]) -> String {
        let output = self.command("out/refused.img", more).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(output.stdout.is_empty(), "{output:?}");
        assert_eq!(fs::read_dir(self.fleet.path("out")).unwrap().count(), 0);
        String::from_utf8(output.stderr).unwrap()
    }

    /// A partition of an image, in a file.
    fn part(&self, made: &Value, name: &str) -> PathBuf {
        let image = self.fleet.path(made["image"].as_str().unwrap());
        let parts = made["partitions"].as_array().unwrap();
        let part = parts.iter().find(|part| part["name"] == name).unwrap();
        let number = |key: &str| part[key].as_u64().unwrap();
        let to = self.fleet.path(&format!("{name}.part"));
        dump::cut_out(
            &image,
            number("start")..number("start") + number("size"),
            &to,
        );
        to
    }

    fn ext4(&self, made: &Value, name: &str) -> Dump {
        let part = self.part(made, name);
        let scratch = self.fleet.path(&format!("{name}.dump"));
        if scratch.exists() {
            fs::remove_dir_all(&scratch).unwrap();
        }
        dump::of_ext4(&part, &scratch)
    }

    /// The path of the deployment in the root file system.
    fn deployment(&self, made: &Value) -> String {
        format!(
            "ostree/deploy/offshoot/deploy/{}.0",
            made["commit"].as_str().unwrap()
        )
    }

    fn run(&self, program: &str, arguments: &[&str]) -> String {
        let output = Command::new(program)
            .args(arguments)
            .current_dir(self.fleet.path(""))
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{program} {arguments:?}: {output:?}"
        );
        String::from_utf8(output.stdout).unwrap()
    }
}

/// A tree with everything that could be lost on the way.
fn odd_tree(bench: &Bench) {
    let tree = bench.tree();
    let set = |path: &str, owner: (u32, u32), mode: u32| {
        let path = tree.join(path);
        chown(&path, Some(owner.0), Some(owner.1)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    };
    let large = noise(3_000_000);
    for (path, content) in [
        ("usr/bin/setuid", &b"setuid"[..]),
        ("usr/bin/capable", b"capable"),
        ("usr/bin/capable-twin", b"capable"),
        ("usr/lib/acl", b"acl"),
        ("usr/lib/far-owner", b"far"),
        ("usr/lib/empty", b""),
        ("usr/lib/empty-odd", b""),
        ("usr/lib/large", &large),
        ("usr/lib/zeros", &[0; 100_000]),
        (
            "usr/lib/half-zeros",
            &[&large[..5000], &[0; 20_000][..]].concat(),
        ),
        ("usr/lib/odd names/it's \"quoted\" <12> #1", b"odd"),
        ("usr/lib/odd names/<12>", b"not an inode"),
        ("usr/lib/odd names/-f", b"not an option"),
        ("usr/lib/odd names/\u{e9}\\t\t", b"unicode, backslash, tab"),
        ("usr/lib/secret/key", b"secret"),
        ("usr/lib/closed/inner/file", b"closed"),
        ("etc/shadow", b"shadow"),
        ("etc/odd/file", b"odd"),
        ("etc/empty", b""),
    ] {
        bench.write(path, content);
    }
    for n in 0..300 {
        bench.write(
            &format!("usr/share/many/a-name-that-makes-the-directory-large-{n}"),
            n.to_string().as_bytes(),
        );
    }
    symlink("x".repeat(150), tree.join("usr/lib/long-link")).unwrap();
    symlink("a \"b\" <2>", tree.join("usr/lib/odd-link")).unwrap();
    symlink("to", tree.join("usr/lib/owned-link")).unwrap();
    std::os::unix::fs::lchown(tree.join("usr/lib/owned-link"), Some(3), Some(4)).unwrap();
    fs::hard_link(tree.join("usr/lib/large"), tree.join("usr/share/large")).unwrap();
    set("usr/bin/setuid", (12, 34), 0o6711);
    set("usr/lib/far-owner", (4_000_000, 3_000_000), 0o640);
    set("usr/lib/empty-odd", (7, 8), 0o4000);
    set("usr/lib/secret", (9, 10), 0o700);
    set("usr/lib/secret/key", (9, 10), 0o000);
    set("usr/lib/closed/inner", (0, 0), 0o1555);
    set("usr/lib/closed", (0, 5), 0o2555);
    set("etc/shadow", (0, 42), 0o640);
    set("etc/odd", (11, 12), 0o3775);
    set("etc/odd/file", (11, 12), 0o4600);
    for path in ["usr/bin/capable", "usr/bin/capable-twin", "etc/odd/file"] {
        xattr::set(tree.join(path), "security.capability", &CAPABILITY).unwrap();
    }
    xattr::set(tree.join("usr/lib/acl"), "system.posix_acl_access", &ACL).unwrap();
    xattr::set(tree.join("usr/lib/acl"), "user.label", b"x\0y").unwrap();
    xattr::set(tree.join("usr/lib/acl"), "user.long", &noise(1000)).unwrap();
    xattr::set(tree.join("usr/lib/odd names"), "user.of a directory", b"").unwrap();
    xattr::set(tree.join("usr/lib/empty"), "trusted.overlay", b"y").unwrap();
    xattr::set(tree.join("etc/odd"), "user.of-etc", b"1").unwrap();
    // Only a kernel with SELinux minds what it is.
    for path in ["usr/lib/acl", "usr/bin"] {
        xattr::set(
            tree.join(path),
            "security.selinux",
            b"system_u:object_r:bin_t:s0\0",
        )
        .unwrap();
    }
}

/// What libostree makes, as root, of the same commit.
fn deployed_by_root(bench: &Bench, commit: &str) -> Dump {
    let repo = "--repo=sysroot/ostree/repo";
    for arguments in [
        &["admin", "init-fs", "--modern", "sysroot"][..],
        &["admin", "os-init", "--sysroot=sysroot", "offshoot"],
        &["config", repo, "set", "sysroot.bootloader", "none"],
        &["pull-local", repo, "fleet/repo", commit],
        &[
            "admin",
            "deploy",
            "--sysroot=sysroot",
            "--os=offshoot",
            "--karg=root=LABEL=root",
            "--karg=rw",
            commit,
        ],
    ] {
        if arguments.contains(&"init-fs") {
            fs::create_dir(bench.fleet.path("sysroot")).unwrap();
        }
        bench.run("ostree", arguments);
    }
    let deployment = format!("sysroot/ostree/deploy/offshoot/deploy/{commit}.0");
    let attributes = bench.run("lsattr", &["-d", &deployment]);
    assert!(attributes[..20].contains('i'), "{attributes}");
    bench.run("chattr", &["-i", &deployment]);
    dump::of_directory(&bench.fleet.path("sysroot"))
}

/// Differences by path, so that a failure can be read.
fn assert_same(what: &str, found: &Dump, wanted: &Dump) {
    for (path, node) in wanted {
        assert_eq!(found.get(path), Some(node), "{what}: {path}");
    }
    for path in found.keys() {
        assert!(
            wanted.contains_key(path),
            "{what}: {path} should not be there"
        );
    }
}

/// Without what is this program's own, or no part of a sysroot.
fn comparable(mut dump: Dump, deployment: &str) -> Dump {
    let etc = format!("{deployment}/etc/offshoot");
    dump.retain(|path, _| {
        !path.starts_with(&etc)
            && !path.starts_with("ostree/repo/tmp/")
            && path != "ostree/lock"
            && path != "ostree/repo/config"
    });
    for node in dump.values_mut() {
        // Directories have the sizes of their file system; a test's file system may pass the set-group-id bit on.
        if node.mode & 0o170_000 == 0o040_000 {
            node.content.clear();
        }
    }
    dump
}

#[test]
fn an_ordinary_user_s_image_holds_what_libostree_deploys_as_root() {
    let bench = Bench::new();
    odd_tree(&bench);
    let commit = bench.compose();
    let layout = bench.layout("x86_64-grub", |text| text);
    let made = bench.image("out/disk.img", &["--layout", &layout]);
    assert_eq!(
        (&made["commit"], &made["version"], &made["root_version"]),
        (&commit.clone().into(), &"1.0".into(), &1.into())
    );
    let deployment = bench.deployment(&made);
    let mut wanted = deployed_by_root(&bench, &commit);
    let (root, boot) = (bench.ext4(&made, "root"), bench.ext4(&made, "boot"));

    // The boot file system is one of its own.
    let mut wanted_boot = Dump::new();
    wanted.retain(|path, node| match path.strip_prefix("boot/") {
        Some(inner) => {
            // Its kernel is a copy, not a link to an object.
            let node = Node {
                first: inner.to_owned(),
                ..node.clone()
            };
            wanted_boot.insert(inner.to_owned(), node);
            false
        }
        None => true,
    });
    let mut found_boot = boot.clone();
    found_boot.retain(|path, _| {
        !path.is_empty() && !path.starts_with("grub2") && !path.ends_with("grub.cfg")
    });
    // What has a link in /boot is named by that.
    for node in wanted.values_mut() {
        if let Some(inner) = node.first.strip_prefix("boot/") {
            node.first = format!(
                "{deployment}/usr/lib/modules/6.12/{}",
                if inner.contains("vmlinuz") {
                    "vmlinuz"
                } else {
                    "initramfs.img"
                }
            );
        }
    }
    assert_same("boot", &found_boot, &wanted_boot);
    assert_same(
        "root",
        &comparable(root.clone(), &deployment),
        &comparable(wanted, &deployment),
    );

    // Root's dump is of one that was made writable to be removed.
    let flags = dump::debugfs(
        &bench.fleet.path("root.part"),
        &[format!("stat /{deployment}")],
    );
    assert!(flags[0].contains("Flags: 0x80010"), "{flags:?}");
    let config = String::from_utf8(root["ostree/repo/config"].content.clone()).unwrap();
    assert!(
        config.contains("mode=bare\n") && config.contains("bootloader=grub2\n"),
        "{config}"
    );
    let entries = bench.fleet.path("boot.dump/out/loader/entries");
    let wanted = bootloader_glue::config::grub_cfg(
        &bootloader_glue::config::read_entries(&entries).unwrap(),
        "",
    );
    assert_eq!(
        String::from_utf8(boot["loader.1/grub.cfg"].content.clone()).unwrap(),
        wanted
    );
    assert_eq!(boot["grub2/grub.cfg"].content, b"../loader/grub.cfg");
    assert!(wanted.contains("'root=LABEL=root' 'rw'"));

    assert_holds_commit(&bench, &root, &deployment, &commit);
}

/// Every inode is as the commit's metadata says, in the words of `ostree ls`.
fn assert_holds_commit(bench: &Bench, root: &Dump, deployment: &str, commit: &str) {
    let list = bench.run(
        "ostree",
        &["--repo=fleet/repo", "ls", "-R", "-X", "-C", commit],
    );
    let mut listed = 0;
    for line in list.lines() {
        let (head, rest) = line.split_once(" { ").unwrap();
        let (xattrs, path) = rest.split_once(" } /").unwrap();
        let path = path.split(" -> ").next().unwrap();
        let path = format!("{deployment}/{path}");
        let node = &root[path.trim_end_matches('/')];
        let kind = match node.mode & 0o170_000 {
            0o040_000 => "d",
            0o100_000 => "-",
            _ => "l",
        };
        let found = format!(
            "{kind}{:05o} {} {} ",
            node.mode & 0o7777,
            node.uid,
            node.gid
        );
        assert!(head.starts_with(&found), "{line}: {node:?}");
        let xattrs = Variant::parse(Some(VariantTy::new("a(ayay)").unwrap()), xattrs).unwrap();
        let wanted = xattrs.get::<Vec<(Vec<u8>, Vec<u8>)>>().unwrap();
        let found = node
            .xattrs
            .iter()
            .map(|(name, value)| ([name, &b"\0"[..]].concat(), value.clone()));
        assert_eq!(found.collect::<Vec<_>>(), wanted, "{line}");
        listed += 1;
    }
    let inner = root.keys().filter(|path| {
        let inner = path.strip_prefix(deployment);
        inner.is_some_and(|inner| {
            (inner.is_empty() || inner.starts_with('/')) && !inner.starts_with("/etc")
        })
    });
    assert_eq!(listed, inner.count());
}

#[test]
fn the_same_inputs_make_the_same_bytes_whoever_makes_them_where() {
    let bench = Bench::new();
    odd_tree(&bench);
    bench.compose();
    let layout = bench.layout("x86_64-grub", |text| text);
    let one = bench.image("out/disk.img", &["--layout", &layout]);
    // Another umask, directory, file system's order, user and moment; as root, too.
    let script = "umask 077 && exec \"$0\" \"$@\"";
    let again = bench.command("other/again.img", &["--layout", &layout]);
    let again = Command::new("sh")
        .args(["-c", script])
        .arg(again.get_program())
        .args(again.get_args())
        .current_dir(bench.fleet.path(""))
        .output()
        .unwrap();
    assert!(again.status.success(), "{again:?}");
    let by_root = bench.fleet.run(&[
        "image",
        "--commit=os",
        "--channel=stable",
        "--hardware=qemu-x86_64",
        "--output=root.img",
        "--layout",
        &layout,
    ]);
    let again: Value = serde_json::from_slice(&again.stdout).unwrap();
    for other in [&again, &by_root] {
        for key in ["sha256", "bmap_sha256", "size", "mapped", "partitions"] {
            assert_eq!(other[key], one[key], "{key}");
        }
        let images = [&one, other].map(|made| made["image"].as_str().unwrap());
        bench.run("cmp", &images);
        bench.run(
            "cmp",
            &images
                .map(|image| format!("{image}.bmap"))
                .each_ref()
                .map(String::as_str),
        );
    }
    let digest = bench.run("sha256sum", &["out/disk.img", "out/disk.img.bmap"]);
    let digests: Vec<_> = digest
        .lines()
        .map(|line| line.split(' ').next().unwrap())
        .collect();
    assert_eq!(
        digests,
        [
            one["sha256"].as_str().unwrap(),
            one["bmap_sha256"].as_str().unwrap()
        ]
    );
    // Anything else makes another disk.
    let other = bench.image("out/other.img", &["--layout", &layout, "--karg=quiet"]);
    assert_ne!(other["sha256"], one["sha256"]);
    let left = fs::read_dir(bench.fleet.path("out"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    assert_eq!(left.count(), 4);
}

#[test]
fn a_unit_that_was_something_else_before_is_the_same_when_the_bmap_is_written_to_it() {
    let bench = Bench::new();
    odd_tree(&bench);
    bench.compose();
    let layout = bench.layout("x86_64-grub", |text| text);
    let made = bench.image("out/disk.img", &["--layout", &layout, "--size=1GiB"]);
    assert_eq!(made["size"], 1u64 << 30);
    assert!(made["mapped"].as_u64().unwrap() < 100 << 20, "{made}");
    let blocks = std::os::unix::fs::MetadataExt::blocks(
        &fs::metadata(bench.fleet.path("out/disk.img")).unwrap(),
    );
    assert!(blocks * 512 < 40 << 20, "it is sparse: {blocks}");
    let before = ["root", "boot"].map(|name| bench.ext4(&made, name));
    let esp = bench.run(
        "mdir",
        &[
            "-/",
            "-b",
            "-i",
            bench.part(&made, "ESP").to_str().unwrap(),
            "::",
        ],
    );
    // bmaptool checks every digest that the bmap has. A file it makes anew.
    bench.run(
        "bmaptool",
        &[
            "copy",
            "--bmap",
            "out/disk.img.bmap",
            "out/disk.img",
            "unit.img",
        ],
    );
    bench.run("cmp", &["out/disk.img", "unit.img"]);
    let image = fs::read(bench.fleet.path("out/disk.img")).unwrap();
    let bmap = fs::read_to_string(bench.fleet.path("out/disk.img.bmap")).unwrap();
    let mut unit = vec![0xa5; 1 << 30];
    let mut written = 0;
    for range in bmap.split("<Range ").skip(1) {
        let range = range
            .split('>')
            .nth(1)
            .unwrap()
            .split('<')
            .next()
            .unwrap()
            .trim();
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let bytes =
            first.parse::<usize>().unwrap() * 4096..(last.parse::<usize>().unwrap() + 1) * 4096;
        unit[bytes.clone()].copy_from_slice(&image[bytes.clone()]);
        written += bytes.len() as u64;
    }
    assert_eq!(made["mapped"], written);
    fs::write(bench.fleet.path("unit.img"), unit).unwrap();
    drop(image);
    let unit = {
        let mut unit = made.clone();
        unit["image"] = "unit.img".into();
        unit
    };
    for (name, before) in ["root", "boot"].into_iter().zip(before) {
        assert_same(name, &bench.ext4(&unit, name), &before);
        bench.run("e2fsck", &["-f", "-n", &format!("{name}.part")]);
    }
    assert_eq!(
        bench.run(
            "mdir",
            &[
                "-/",
                "-b",
                "-i",
                bench.part(&unit, "ESP").to_str().unwrap(),
                "::"
            ]
        ),
        esp
    );
    bench.run("fsck.vfat", &["-n", "ESP.part"]);
    bench.run("sfdisk", &["--verify", "unit.img"]);
}

#[test]
fn a_grub_disk_has_a_partition_for_firmware_one_to_boot_and_a_fresh_environment() {
    let bench = Bench::new();
    bench.compose();
    let layout = bench.layout("x86_64-grub", |text| {
        text.replace("# [grub]", "[grub]\npreamble = 'serial --unit=0'")
    });
    let made = bench.image("out/disk.img", &["--layout", &layout]);
    let table: Value =
        serde_json::from_str(&bench.run("sfdisk", &["--json", "out/disk.img"])).unwrap();
    let parts = table["partitiontable"]["partitions"].as_array().unwrap();
    let told = made["partitions"].as_array().unwrap();
    assert_eq!(
        (
            table["partitiontable"]["label"].as_str(),
            parts.len(),
            told.len()
        ),
        (Some("gpt"), 3, 3)
    );
    for (part, told) in parts.iter().zip(told) {
        let number = |value: &Value| value.as_u64().unwrap();
        assert_eq!(part["name"], told["name"]);
        assert_eq!(
            (number(&part["start"]) * 512, number(&part["size"]) * 512),
            (number(&told["start"]), number(&told["size"]))
        );
        assert_eq!(
            part["uuid"].as_str().unwrap().to_lowercase(),
            told["uuid"].as_str().unwrap()
        );
    }
    assert_eq!(parts[0]["type"], "C12A7328-F81F-11D2-BA4B-00A0C93EC93B");
    let esp = bench.part(&made, "ESP");
    let file = |path: &str| {
        bench.run(
            "mtype",
            &["-i", esp.to_str().unwrap(), &format!("::{path}")],
        )
    };
    let [first, second] =
        bootloader_glue::grub::fresh(3).map(|copy| String::from_utf8(copy).unwrap());
    assert_eq!(
        (file("offshoot/env.0"), file("offshoot/env.1")),
        (first, second)
    );
    let config = file("EFI/BOOT/grub.cfg");
    assert_eq!(
        config,
        format!("serial --unit=0\n{}", bootloader_glue::config::ESP_CFG)
    );
    bench.run(
        "mcopy",
        &[
            "-i",
            esp.to_str().unwrap(),
            "::EFI/BOOT/BOOTX64.EFI",
            "grub.efi",
        ],
    );
    assert!(
        fs::read(bench.fleet.path("grub.efi"))
            .unwrap()
            .starts_with(b"MZ")
    );
    for (name, label) in [("boot", "boot"), ("root", "root"), ("ESP", "ESP")] {
        let part = bench.part(&made, name);
        assert_eq!(
            bench
                .run(
                    "blkid",
                    &["-p", "-o", "value", "-s", "LABEL", part.to_str().unwrap()]
                )
                .trim(),
            label
        );
    }
}

#[test]
fn a_unit_has_its_channel_its_identity_and_the_rest_of_its_configuration() {
    let bench = Bench::new();
    bench.write("etc/offshoot/config.toml", b"[poll]\ninterval = 60\n");
    bench.write("etc/machine-id", b"uninitialized\n");
    bench.compose();
    let layout = bench.layout("x86_64-grub", |text| text);
    let etc = |more: &[&str]| {
        let mut arguments = vec!["--layout", &layout];
        arguments.extend(more);
        let made = bench.image("out/disk.img", &arguments);
        let root = bench.ext4(&made, "root");
        let etc = format!("{}/etc/", bench.deployment(&made));
        let inner = root
            .into_iter()
            .filter_map(|(path, node)| Some((path.strip_prefix(&etc)?.to_owned(), node)));
        inner.collect::<Dump>()
    };
    let parse = |node: &Node| {
        String::from_utf8(node.content.clone())
            .unwrap()
            .parse::<toml::Table>()
            .unwrap()
    };
    let text = |node: &Node| String::from_utf8(node.content.clone()).unwrap();

    // Key by key over what the commit has there.
    let plain = etc(&[]);
    let wanted = "[poll]\ninterval = 60\n[device]\nchannel = 'stable'\nhardware = 'qemu-x86_64'\n";
    assert_eq!(
        parse(&plain["offshoot/config.toml"]),
        wanted.parse().unwrap()
    );
    assert_eq!(text(&plain["machine-id"]), "uninitialized\n");
    assert!(!plain.contains_key("offshoot/identity") && !plain.contains_key("repart.d"));

    let of_unit = |name: &str, content: &str| {
        let path = bench.fleet.path(name);
        fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let config = of_unit(
        "unit.toml",
        "[server]\nurl = 'https://bench/'\n[bootloader]\ntries = 5\n",
    );
    let identity = of_unit("unit.pem", "a certificate");
    let id = "0123456789abcdef0123456789abcdef";
    let own = etc(&[
        "--config",
        &config,
        "--identity",
        &identity,
        "--machine-id",
        id,
    ]);
    let wanted = "[server]\nurl = 'https://bench/'\n[bootloader]\ntries = 5\n[device]\nchannel = 'stable'\nhardware = 'qemu-x86_64'\n";
    assert_eq!(parse(&own["offshoot/config.toml"]), wanted.parse().unwrap());
    assert_eq!(
        (text(&own["machine-id"]), own["machine-id"].mode),
        (format!("{id}\n"), 0o100_644)
    );
    assert_eq!(
        (
            text(&own["offshoot/identity"]),
            own["offshoot/identity"].mode
        ),
        ("a certificate".to_owned(), 0o100_600)
    );
    for node in own.values() {
        assert_eq!((node.uid, node.gid), (0, 0));
    }
    // The bootloader counts as far as the unit is told to.
    let made: Value =
        serde_json::from_str(&bench.run("sfdisk", &["--json", "out/disk.img"])).unwrap();
    let start = made["partitiontable"]["partitions"][0]["start"]
        .as_u64()
        .unwrap()
        * 512;
    let env = bench.run(
        "env",
        &[
            "MTOOLS_SKIP_CHECK=1",
            "mtype",
            "-i",
            &format!("out/disk.img@@{start}"),
            "::offshoot/env.0",
        ],
    );
    let (counter, _) = bootloader_glue::grub::decode(env.as_bytes()).unwrap();
    assert_eq!((counter.bootlimit, counter.upgrade_available), (5, false));
}

#[test]
fn a_disk_that_grows_has_what_systemd_needs_to_grow_it() {
    let bench = Bench::new();
    for path in [
        "usr/bin/systemd-repart",
        "usr/lib/systemd/systemd-growfs",
        "usr/lib/systemd/system/systemd-growfs@.service",
    ] {
        bench.write(path, b"systemd's");
    }
    bench.compose();
    let made = bench.image("out/disk.img", &["--board=x86_64-grub"]);
    let root = bench.ext4(&made, "root");
    let etc = format!("{}/etc", bench.deployment(&made));
    let rule = String::from_utf8(
        root[&format!("{etc}/repart.d/50-root.conf")]
            .content
            .clone(),
    )
    .unwrap();
    assert!(rule.ends_with("[Partition]\nType=root-x86-64\n"), "{rule}");
    let unit =
        &root[&format!("{etc}/systemd/system/local-fs.target.wants/systemd-growfs@var.service")];
    assert_eq!(
        unit.content,
        b"/usr/lib/systemd/system/systemd-growfs@.service"
    );
}

const UBOOT_CONFIG: &str =
    "[server]\nurl = 'https://updates.invalid/'\n[bootloader]\nkind = 'uboot'\n";
const UBOOT_ENVIRONMENT: &str =
    "bootcmd=run offshoot_start\naltbootcmd=run bootcmd\nbaudrate=115200\n";

fn uboot_bench() -> (Bench, String) {
    let bench = Bench::new();
    bench.write("usr/lib/offshoot/config.toml", UBOOT_CONFIG.as_bytes());
    let initial = bench.fleet.path("u-boot-initial-env");
    fs::write(&initial, UBOOT_ENVIRONMENT).unwrap();
    (bench, format!("--uboot-environment={}", initial.display()))
}

/// As U-Boot's own tools read it.
fn printenv(bench: &Bench, config: &str) -> String {
    fs::write(bench.fleet.path("fw_env.config"), config).unwrap();
    bench.run(
        "fw_printenv",
        &[
            "--config",
            "fw_env.config",
            "bootcmd",
            "baudrate",
            "upgrade_available",
            "bootcount",
            "bootlimit",
            "rollback",
            "offshoot_count",
        ],
    )
}

#[test]
fn a_uboot_disk_has_its_environment_in_files_where_linux_looks_for_them() {
    let (bench, initial) = uboot_bench();
    bench.compose();
    let layout = bench.layout("arm64-uboot", |text| text);
    let made = bench.image("out/disk.img", &["--layout", &layout, &initial]);
    let firmware = bench.part(&made, "firmware");
    for (n, name) in ["uboot.env", "uboot-redund.env"].into_iter().enumerate() {
        bench.run(
            "mcopy",
            &[
                "-i",
                firmware.to_str().unwrap(),
                &format!("::{name}"),
                &n.to_string(),
            ],
        );
    }
    let directory = bench.fleet.path("");
    let at = |n: usize| format!("{} 0x0 0x1000\n", directory.join(n.to_string()).display());
    let wanted = "bootcmd=run offshoot_start\nbaudrate=115200\nupgrade_available=0\nbootcount=0\nbootlimit=3\nrollback=0\noffshoot_count=script\n";
    assert_eq!(printenv(&bench, &(at(0) + &at(1))), wanted);
    // Each copy is whole.
    for damaged in [0, 1] {
        let path = directory.join(damaged.to_string());
        let whole = fs::read(&path).unwrap();
        fs::write(&path, vec![0; 0x1000]).unwrap();
        assert_eq!(printenv(&bench, &(at(0) + &at(1))), wanted);
        fs::write(&path, whole).unwrap();
    }
    let root = bench.ext4(&made, "root");
    let places = &root[&format!("{}/etc/fw_env.config", bench.deployment(&made))];
    let places =
        bootloader_glue::uboot::places::parse(str::from_utf8(&places.content).unwrap()).unwrap();
    let places: Vec<_> = places
        .iter()
        .map(|place| (place.device.to_str().unwrap(), place.offset, place.size))
        .collect();
    assert_eq!(
        places,
        [
            ("/efi/uboot.env", 0, 0x1000),
            ("/efi/uboot-redund.env", 0, 0x1000)
        ]
    );

    let boot = bench.ext4(&made, "boot");
    let script = &boot["boot.scr"].content;
    assert_eq!(&script[72..], bootloader_glue::uboot::BOOT_CMD.as_bytes());
    assert_eq!(script[..4], [0x27, 0x05, 0x19, 0x56]);
    let variables = String::from_utf8(boot["loader.1/uEnv.txt"].content.clone()).unwrap();
    assert!(
        variables.contains("bootargs=root=LABEL=root rw ostree=/ostree/boot.1/"),
        "{variables}"
    );
    let config = String::from_utf8(root["ostree/repo/config"].content.clone()).unwrap();
    assert!(config.contains("bootloader=uboot\n"), "{config}");
}

#[test]
fn a_uboot_disk_has_uboot_and_its_environment_at_offsets_of_the_disk() {
    let (bench, initial) = uboot_bench();
    // Linux may know more about how the storage is written.
    bench.write(
        "etc/fw_env.config",
        b"/dev/mmcblk0 0x400000 0x2000 0x200\n/dev/mmcblk0 0x500000 0x2000 0x200\n",
    );
    bench.compose();
    let raw = |text: String| {
        let text = text
            .replace("size = \"4KiB\"", "size = \"8KiB\"")
            .replace("# offset =", "offset =");
        let text = text.replace(
            "files = [\"uboot.env\"",
            "offsets = [\"4MiB\", \"5MiB\"]\ndevice = \"/dev/mmcblk0\"\n# files = [\"uboot.env\"",
        );
        let (before, after) = text.split_once("[[partition]]").unwrap();
        format!(
            "{before}[[partition]]{}",
            after
                .replacen("content = \"environment\"", "content = \"empty\"", 1)
                .replacen("size =", "start = \"16MiB\"\nsize =", 1)
        )
    };
    let layout = bench.layout("arm64-uboot", raw);
    let uboot = bench.fleet.path("u-boot.bin");
    fs::write(&uboot, noise(600_000)).unwrap();
    let with_uboot = [
        "--layout",
        &layout,
        &initial,
        "--uboot",
        uboot.to_str().unwrap(),
    ];
    bench.image("out/disk.img", &with_uboot);
    let disk = fs::read(bench.fleet.path("out/disk.img")).unwrap();
    assert_eq!(disk[8 << 20..][..600_000], noise(600_000));
    let place = |at: &str| {
        format!(
            "{} {at} 0x2000\n",
            bench.fleet.path("out/disk.img").display()
        )
    };
    assert!(
        printenv(&bench, &(place("0x400000") + &place("0x500000")))
            .contains("upgrade_available=0\n")
    );
    let bmap = fs::read_to_string(bench.fleet.path("out/disk.img.bmap")).unwrap();
    for range in [" 1024-1025 ", " 1280-1281 ", " 2048-2194 "] {
        assert!(bmap.contains(range), "{range} is to be written: {bmap}");
    }
    fs::remove_file(bench.fleet.path("out/disk.img")).unwrap();
    fs::remove_file(bench.fleet.path("out/disk.img.bmap")).unwrap();

    // Linux would write over something else.
    bench.write(
        "etc/fw_env.config",
        b"/dev/mmcblk0 0x400000 0x2000\n/dev/mmcblk0 0x600000 0x2000\n",
    );
    bench.compose();
    assert!(bench.refused(&with_uboot).contains("/etc/fw_env.config"));
    assert!(
        bench
            .refused(&with_uboot[..3])
            .contains("--uboot is missing")
    );
    fs::write(&uboot, noise(8 << 20)).unwrap();
    fs::remove_file(bench.tree().join("etc/fw_env.config")).unwrap();
    bench.compose();
    fs::write(&uboot, noise(9 << 20)).unwrap();
    assert!(
        bench.refused(&with_uboot).contains("partition firmware"),
        "U-Boot reaches into it"
    );
}

#[test]
fn what_cannot_be_a_good_device_is_refused_and_leaves_nothing() {
    type Spoil = fn(&Bench);
    let cases: [(&str, &[&str], Spoil); 13] = [
        ("root.json", &[], |bench| {
            fs::remove_file(bench.tree().join("usr/lib/offshoot/root.json")).unwrap()
        }),
        ("root.json", &[], |bench| {
            let program = bench.fleet.path("offshoot-fleet");
            bench.run(
                program.to_str().unwrap(),
                &["--fleet=stranger", "init", "--hardware=x"],
            );
            fs::copy(
                bench.fleet.path("stranger/root.json"),
                bench.tree().join("usr/lib/offshoot/root.json"),
            )
            .unwrap();
        }),
        ("machine-id", &[], |bench| {
            bench.write("etc/machine-id", b"0123456789abcdef0123456789abcdef\n")
        }),
        ("--machine-id", &["--machine-id=0123"], |_| {}),
        ("composefs", &[], |bench| {
            bench.write(
                "usr/lib/ostree/prepare-root.conf",
                b"[composefs]\nenabled = yes\n",
            )
        }),
        ("kind", &[], |bench| {
            bench.write("usr/lib/offshoot/config.toml", UBOOT_CONFIG.as_bytes())
        }),
        ("environment", &[], |bench| {
            bench.write(
                "usr/lib/offshoot/config.toml",
                format!("{CONFIG}[bootloader]\nenvironment = '/boot/offshoot'\n").as_bytes(),
            );
        }),
        ("config.toml", &[], |bench| {
            bench.write("usr/lib/offshoot/config.toml", b"[server]\nurl = 1\n")
        }),
        ("--size", &["--size=330MiB"], |bench| {
            bench.write("usr/lib/large", &noise(4 << 20))
        }),
        ("systemd-repart", &["--board=x86_64-grub"], |_| {}),
        ("fleet.toml", &["--hardware=qemu-arm64"], |_| {}),
        ("channel add", &["--channel=gamma"], |_| {}),
        ("ostree=", &["--karg=ostree=/x"], |_| {}),
    ];
    for (named, more, spoil) in cases {
        let bench = Bench::new();
        spoil(&bench);
        bench.compose();
        let layout = format!("--layout={}", bench.layout("x86_64-grub", |text| text));
        let board = more.iter().any(|argument| argument.starts_with("--board"));
        let mut arguments = if board { vec![] } else { vec![layout.as_str()] };
        arguments.extend(more);
        let said = bench.refused(&arguments);
        assert!(said.contains(named), "{named}: {said}");
    }
}

#[test]
fn a_root_that_was_replaced_since_is_one_to_start_from() {
    let bench = Bench::new();
    bench.compose();
    bench.fleet.run(&["rotate", "root"]);
    bench.fleet.run(&["rotate", "timestamp"]);
    let layout = bench.layout("x86_64-grub", |text| text);
    let made = bench.image("out/disk.img", &["--layout", &layout]);
    assert_eq!(made["root_version"], 1);
    // One that says it is newer than any is not.
    let newest = fs::read_to_string(bench.fleet.path("fleet/root.json")).unwrap();
    bench.write(
        "usr/lib/offshoot/root.json",
        newest.replace("\"version\":3", "\"version\":4").as_bytes(),
    );
    bench.compose();
    fs::remove_file(bench.fleet.path("out/disk.img")).unwrap();
    fs::remove_file(bench.fleet.path("out/disk.img.bmap")).unwrap();
    bench.refused(&["--layout", &layout]);
}

#[test]
fn what_is_not_in_the_commit_has_the_labels_of_the_commit_s_policy() {
    let bench = Bench::new();
    bench.write(
        "etc/selinux/config",
        b"SELINUX=enforcing\nSELINUXTYPE=bench\n",
    );
    bench.write("etc/selinux/bench/policy/policy.33", b"is only digested");
    let contexts = [
        ("/.*", "default"),
        ("/etc(/.*)?", "etc"),
        ("/etc/shadow", "shadow"),
        ("/boot(/.*)?", "boot"),
        ("/var(/.*)?", "var"),
        ("/usr(/.*)?", "wrong"),
    ];
    let contexts = contexts.map(|(path, kind)| format!("{path} system_u:object_r:{kind}_t:s0\n"));
    bench.write(
        "etc/selinux/bench/contexts/files/file_contexts",
        contexts.concat().as_bytes(),
    );
    bench.write("etc/shadow", b"shadow");
    xattr::set(
        bench.tree().join("usr/bin/tool"),
        "security.selinux",
        b"system_u:object_r:tool_t:s0\0",
    )
    .unwrap();
    xattr::set(
        bench.tree().join("etc/passwd"),
        "security.selinux",
        b"system_u:object_r:old_t:s0\0",
    )
    .unwrap();
    bench.compose();
    let layout = bench.layout("x86_64-grub", |text| text);
    let made = bench.image("out/disk.img", &["--layout", &layout]);
    let (root, boot) = (bench.ext4(&made, "root"), bench.ext4(&made, "boot"));
    let deployment = bench.deployment(&made);
    let label = |node: &Node| {
        let label = node.xattrs.get(&b"security.selinux"[..])?;
        let label = str::from_utf8(label)
            .unwrap()
            .strip_suffix(":s0\0")
            .unwrap();
        Some(label.strip_prefix("system_u:object_r:").unwrap().to_owned())
    };
    for (path, wanted) in [
        // The commit's are the commit's.
        (format!("{deployment}/usr/bin/tool"), Some("tool_t")),
        (format!("{deployment}/usr/lib/os-release"), None),
        (format!("{deployment}/usr/etc/passwd"), Some("old_t")),
        (format!("{deployment}/etc/passwd"), Some("etc_t")),
        (format!("{deployment}/etc/shadow"), Some("shadow_t")),
        (format!("{deployment}/etc/offshoot"), Some("etc_t")),
        (
            format!("{deployment}/etc/offshoot/config.toml"),
            Some("etc_t"),
        ),
        (format!("{deployment}.origin"), Some("etc_t")),
        ("ostree/deploy/offshoot/var".to_owned(), Some("var_t")),
        (
            "ostree/deploy/offshoot/var/.ostree-selabeled".to_owned(),
            Some("var_t"),
        ),
        ("ostree/repo/config".to_owned(), Some("default_t")),
    ] {
        assert_eq!(label(&root[&path]).as_deref(), wanted, "{path}");
    }
    for (path, node) in boot.iter().filter(|(path, _)| !path.is_empty()) {
        assert_eq!(label(node).as_deref(), Some("boot_t"), "{path}");
    }
}

#[test]
fn whoever_is_killed_half_way_leaves_the_former_image() {
    let bench = Bench::new();
    bench.compose();
    let layout = bench.layout("x86_64-grub", |text| text);
    let former = bench.image("out/disk.img", &["--layout", &layout]);
    for moment in [
        "deploying it",
        "making the file system ESP",
        "making the file system root",
        "writing the disk",
    ] {
        let mut maker = bench.command("out/disk.img", &["--layout", &layout, "--karg=quiet"]);
        let mut maker = maker
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let steps = BufReader::new(maker.stderr.take().unwrap()).lines();
        // It says what it is about to do.
        assert!(
            steps.map(Result::unwrap).any(|step| step == moment),
            "{moment}"
        );
        maker.kill().unwrap();
        maker.wait().unwrap();
        let digest = bench.run("sha256sum", &["out/disk.img"]);
        assert!(
            digest.starts_with(former["sha256"].as_str().unwrap()),
            "{moment}"
        );
    }
    // What was left behind is in nobody's way.
    let made = bench.image("out/disk.img", &["--layout", &layout, "--karg=quiet"]);
    let digest = bench.run("sha256sum", &["out/disk.img"]);
    assert!(
        digest.starts_with(made["sha256"].as_str().unwrap()) && made["sha256"] != former["sha256"]
    );
}
