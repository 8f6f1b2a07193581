//! Which layouts there can be.
#![allow(clippy::unwrap_used, reason = "a test that fails here says where")]

use super::*;

const ROOM: Option<u64> = None;

#[test]
fn the_layouts_that_come_with_the_program_are_layouts() {
    for (name, text) in BOARDS {
        let layout = Layout::parse(text).unwrap_or_else(|error| panic!("{name}: {error:#}"));
        let geometry = layout.places(200 * MIB, None, ROOM).unwrap();
        assert_eq!(geometry.places[0], MIB..65 * MIB);
        assert_eq!(geometry.places[2], 321 * MIB..521 * MIB);
        assert_eq!(geometry.size, 522 * MIB);
        let larger = layout.places(200 * MIB, Some(Size(1 << 30)), ROOM).unwrap();
        assert_eq!((larger.size, larger.places[2].end), (1 << 30, 1023 * MIB));
        // Every comment that is a line of TOML is one that may be said.
        let said: String = text
            .lines()
            .map(|line| {
                line.strip_prefix("# ")
                    .filter(|rest| rest.starts_with("offset ="))
                    .unwrap_or(line)
            })
            .map(|line| format!("{line}\n"))
            .collect();
        Layout::parse(&said).unwrap();
    }
}

#[test]
fn a_layout_that_cannot_be_is_refused_by_what_is_wrong_with_it() {
    let [(_, grub), (_, uboot)] = BOARDS;
    for (text, from, to, named) in [
        (grub, "\"grub\"", "\"lilo\"", "lilo"),
        (
            grub,
            "bootloader = \"grub\"",
            "bootloader = \"uboot\"",
            "[uboot]",
        ),
        (
            uboot,
            "bootloader = \"uboot\"",
            "bootloader = \"grub\"",
            "content = \"esp\"",
        ),
        (
            grub,
            "content = \"boot\"",
            "content = \"empty\"",
            "content = \"boot\"",
        ),
        (
            grub,
            "content = \"esp\"",
            "content = \"root\"",
            "content = \"root\"",
        ),
        (grub, "name = \"boot\"", "name = \"start\"", "named boot"),
        (
            grub,
            "name = \"ESP\"",
            "name = \"EFI SYSTEM\"",
            "EFI SYSTEM",
        ),
        (grub, "name = \"ESP\"", "name = \"boot\"", "named boot"),
        (grub, "type = \"esp\"", "type = \"efi\"", "efi"),
        (grub, "type = \"esp\"", "type = \"linux\"", "type = \"esp\""),
        (
            grub,
            "filesystem = \"vfat\"",
            "filesystem = \"ext4\"",
            "vfat",
        ),
        (grub, "size = \"256MiB\"", "size = \"256MB\"", "256MB"),
        (grub, "size = \"256MiB\"", "size = \"257KiB\"", "whole MiB"),
        (grub, "size = \"256MiB\"", "size = \"rest\"", "the last"),
        (grub, "size = \"64MiB\"", "size = \"32MiB\"", "FAT32"),
        (grub, "mount = \"/efi\"", "mount = \"efi\"", "absolute"),
        (grub, "mount = \"/boot\"", "grow = \"/boot\"", "can grow"),
        (grub, "mount = \"/boot\"", "files = \"x\"", "vfat"),
        (grub, "\"rw\"]", "\"rw quiet\"]", "rw quiet"),
        (
            grub,
            "kernel_arguments",
            "kernel_argument",
            "kernel_argument",
        ),
        (uboot, "count = \"script\"", "count = \"nobody\"", "nobody"),
        (
            uboot,
            "size = \"4KiB\"",
            "size = \"32MiB\"",
            "uboot.environment.size",
        ),
        (
            uboot,
            ", \"uboot-redund.env\"",
            ", \"b\", \"c\"",
            "uboot.environment",
        ),
        (uboot, "# offsets", "offsets", "uboot.environment"),
        (uboot, "\"uboot.env\"", "\"a/b\"", "a/b"),
        (uboot, "mount = \"/efi\"", "", "fw_env.config"),
    ] {
        assert!(text.contains(from), "{from}");
        let error = format!(
            "{:#}",
            Layout::parse(&text.replacen(from, to, 1)).unwrap_err()
        );
        assert!(error.contains(named), "{from} -> {to}: {error}");
    }
}

#[test]
fn what_does_not_fit_on_the_disk_is_refused_with_numbers() {
    let [(_, grub), (_, uboot)] = BOARDS;
    let places = |text: &str, disk: u64, binary: Option<u64>| {
        let layout = Layout::parse(text).unwrap();
        layout.places(200 * MIB, Some(Size(disk * MIB)), binary)
    };
    let error = |text: &str, disk, binary| format!("{:#}", places(text, disk, binary).unwrap_err());
    assert!(places(grub, 522, None).is_ok());
    assert!(error(grub, 521, None).contains("1 MiB larger"));
    let raw = uboot.replace(
        "files =",
        "offsets = [\"512KiB\", \"768KiB\"]\ndevice = \"/dev/x\"\n# files =",
    );
    assert!(places(&raw, 600, None).is_ok());
    for (offsets, named) in [
        ("\"16KiB\", \"768KiB\"", "partition table"),
        ("\"512KiB\", \"2MiB\"", "partition firmware"),
        ("\"512KiB\", \"514KiB\"", "the environment"),
        ("\"512KiB\", \"600MiB\"", "not on the disk"),
    ] {
        let raw = raw.replace("\"512KiB\", \"768KiB\"", offsets);
        assert!(error(&raw, 600, None).contains(named), "{offsets}");
    }
    let with_uboot = uboot
        .replace("# offset =", "offset =")
        .replace("\"8MiB\"", "\"32KiB\"");
    assert!(places(&with_uboot, 600, Some(900 * 1024)).is_ok());
    assert!(error(&with_uboot, 600, Some(MIB)).contains("partition firmware"));
    let moved = grub.replacen("size =", "start = \"16MiB\"\nsize =", 1);
    assert_eq!(places(&moved, 600, None).unwrap().places[0].start, 16 * MIB);
    let back = grub.replacen("mount = \"/boot\"", "start = \"16MiB\"", 1);
    assert!(error(&back, 600, None).contains("partition boot starts"));
}

#[test]
fn sizes_are_bytes_or_have_a_unit() {
    for (text, bytes) in [
        ("4096", 4096),
        ("0x1000", 4096),
        ("4KiB", 4096),
        ("2MiB", 2 << 20),
        ("1GiB", 1 << 30),
    ] {
        assert_eq!(text.parse::<Size>().unwrap(), Size(bytes));
    }
    for text in ["", "MiB", "-1", "4KB", "1.5GiB", "99999999999GiB"] {
        assert!(text.parse::<Size>().is_err(), "{text}");
    }
}
