//! What is in the file systems is what the real libostree deploys as root, and what the commit says.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};

use ostree::glib::{Variant, VariantTy};

use super::dump::{self, Dump, Node};
use super::{Bench, assert_same};
use crate::bench::noise;

const CAPABILITY: [u8; 20] = [
    1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

/// user::rw-, user:7:r--, group::r--, mask::r--, other::---
const ACL: [u8; 44] = [
    2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 4, 0, 7, 0, 0, 0, 4, 0, 4, 0, 255, 255, 255,
    255, 16, 0, 4, 0, 255, 255, 255, 255, 32, 0, 0, 0, 255, 255, 255, 255,
];

/// A tree with everything that could be lost on the way.
pub(super) fn odd_tree(bench: &Bench) {
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
