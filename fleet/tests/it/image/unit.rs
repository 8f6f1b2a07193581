//! What a unit has of its own, and what is refused.

use std::fs;

use serde_json::Value;

use super::dump::{Dump, Node};
use super::{Bench, CONFIG, UBOOT_CONFIG};
use crate::bench::noise;

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
