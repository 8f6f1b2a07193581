//! The disk: the same bytes each time, nothing that the bmap leaves out, and what the bootloader looks for.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::ops::RangeInclusive;
use std::os::unix::fs::MetadataExt as _;
use std::process::{Command, Stdio};

use serde_json::Value;

use super::deployed::odd_tree;
use super::dump;
use super::{Bench, assert_same, uboot_bench};
use crate::bench::noise;

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

/// The blocks that a bmap names.
fn ranges(bmap: &str) -> Vec<RangeInclusive<u64>> {
    let ranges = bmap.split("<Range ").skip(1).map(|range| {
        let text = range.split(['>', '<']).nth(1).unwrap().trim();
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        first.parse().unwrap()..=last.parse().unwrap()
    });
    ranges.collect()
}

#[test]
fn a_unit_that_was_something_else_before_is_the_same_when_the_bmap_is_written_to_it() {
    const SIZE: u64 = 512 << 20;
    let bench = Bench::new();
    odd_tree(&bench);
    bench.compose();
    let layout = bench.layout("x86_64-grub", |text| {
        text.replacen("mount = \"/efi\"", "mount = \"/efi\"\nfiles = \"own\"", 1)
    });
    // The last file on the ESP, whose end is as empty as what is free.
    fs::create_dir(bench.fleet.path("own")).unwrap();
    fs::write(bench.fleet.path("own/zeros"), vec![0; 50_000]).unwrap();
    let made = bench.image("out/disk.img", &["--layout", &layout, "--size=512MiB"]);
    assert_eq!(made["size"], SIZE);
    assert!(made["mapped"].as_u64().unwrap() < 100 << 20, "{made}");
    let path = bench.fleet.path("out/disk.img");
    let blocks = fs::metadata(&path).unwrap().blocks();
    assert!(blocks * 512 < 40 << 20, "it is sparse: {blocks}");
    // bmaptool checks every digest that the bmap has. It makes a file anew.
    let copy = [
        "copy",
        "--bmap",
        "out/disk.img.bmap",
        "out/disk.img",
        "copy.img",
    ];
    bench.run("bmaptool", &copy);
    bench.run("cmp", &["out/disk.img", "copy.img"]);

    let image = fs::read(&path).unwrap();
    let ranges = ranges(&fs::read_to_string(bench.fleet.path("out/disk.img.bmap")).unwrap());
    let mut unit = vec![0xa5; SIZE as usize];
    let mut written = 0;
    for range in &ranges {
        let bytes = *range.start() as usize * 4096..(*range.end() as usize + 1) * 4096;
        unit[bytes.clone()].copy_from_slice(&image[bytes.clone()]);
        written += bytes.len() as u64;
    }
    assert_eq!(made["mapped"], written);
    fs::write(bench.fleet.path("unit.img"), unit).unwrap();
    let mut unit = made.clone();
    unit["image"] = "unit.img".into();
    for name in ["root", "boot"] {
        assert_same(name, &bench.ext4(&unit, name), &bench.ext4(&made, name));
        let part = bench.part(&unit, name);
        bench.run("e2fsck", &["-f", "-n", part.to_str().unwrap()]);
        // What was in a journal before would be replayed.
        let journal = dump::debugfs(&part, &["blocks <8>".to_owned()]).remove(0);
        let journal: Vec<u64> = journal
            .split_whitespace()
            .map(|block| block.parse().unwrap())
            .collect();
        assert!(journal.len() >= 1024, "{journal:?}");
        let start = made["partitions"]
            .as_array()
            .unwrap()
            .iter()
            .find(|part| part["name"] == name);
        let start = start.unwrap()["start"].as_u64().unwrap() / 4096;
        for block in journal {
            assert!(
                ranges.iter().any(|range| range.contains(&(start + block))),
                "{name}: block {block}"
            );
        }
    }
    let files = |made: &Value, to: &str| {
        let esp = bench.part(made, "ESP");
        fs::create_dir(bench.fleet.path(to)).unwrap();
        bench.run("mcopy", &["-s", "-i", esp.to_str().unwrap(), "::*", to]);
        bench.run("fsck.vfat", &["-n", esp.to_str().unwrap()]);
    };
    files(&made, "wanted");
    files(&unit, "found");
    bench.run("diff", &["-r", "wanted", "found"]);
    assert_eq!(
        fs::read(bench.fleet.path("found/zeros")).unwrap(),
        [0; 50_000]
    );
    bench.run("sfdisk", &["--verify", "unit.img"]);
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

#[test]
fn a_grub_disk_has_a_partition_for_firmware_one_to_boot_and_a_fresh_environment() {
    let bench = Bench::new();
    bench.compose();
    let layout = bench.layout("x86_64-grub", |text| {
        let text = text.replace("# [grub]", "[grub]\npreamble = 'serial --unit=0'");
        text.replacen("mount = \"/efi\"", "mount = \"/efi\"\nfiles = \"own\"", 1)
    });
    // A directory beside the layout.
    let own = bench.fleet.path("own/vendor/firmware");
    fs::create_dir_all(&own).unwrap();
    fs::write(own.join("A name that is long.bin"), "theirs").unwrap();
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
    assert_eq!(file("vendor/firmware/A name that is long.bin"), "theirs");
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
    assert!(!boot.contains_key("loader.0"), "what libostree wrote over");
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

    let quoted = [&with_uboot[..], &["--karg=a='b'"]].concat();
    assert!(bench.refused(&quoted).contains("a='b'"));

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
