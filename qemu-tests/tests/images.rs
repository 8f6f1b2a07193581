//! Images made by `offshoot-fleet image` under the real U-Boot: it finds its environment, the script, the kernel and its arguments where the image
//! has them, and what userspace writes to the environment is what it goes by.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that fails here says where"
)]

use std::fs;
use std::path::Path;
use std::process::Command;

use bootloader_glue::uboot::image::Flags;
use bootloader_glue::uboot::{Copies, Count};
use qemu_tests::cache::Cache;
use qemu_tests::host;
use qemu_tests::uboot::{COPIES, Disk, LAYOUT, Uboot, payload};

const HARDWARE: &str = "qemu-arm64";

/// The image of a device whose kernel says what it was started with.
fn image(directory: &Path, uboot: &Uboot, count: Count) -> Disk {
    let fleet = |arguments: &[&str]| {
        let mut command = Command::new(host::program("offshoot-fleet").unwrap());
        host::run(
            command
                .args(["--fleet", "fleet"])
                .args(arguments)
                .current_dir(directory),
        )
        .unwrap()
    };
    fleet(&["init", "--hardware", HARDWARE]);
    let root = fs::read(directory.join("fleet/root.json")).unwrap();
    let config = format!(
        "[server]\nurl = 'https://updates.invalid/'\n[bootloader]\nkind = 'uboot'\ncount = '{}'\n",
        count.name()
    );
    for (path, content) in [
        ("etc/passwd", b"root".to_vec()),
        ("usr/lib/modules/6.12/vmlinuz", payload("image").unwrap()),
        ("usr/lib/modules/6.12/initramfs.img", b"initramfs".to_vec()),
        ("usr/lib/offshoot/config.toml", config.into_bytes()),
        ("usr/lib/offshoot/root.json", root),
        ("usr/lib/os-release", b"PRETTY_NAME=Bench\n".to_vec()),
    ] {
        let path = directory.join("tree").join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    fleet(&["compose", "--tree=tree", "--branch=os", "--release=1.0"]);
    let layout = fleet(&["image", "--board=arm64-uboot", "--print-layout"]);
    // This tree has no systemd that could grow anything.
    let layout = layout.lines().filter(|line| !line.starts_with("grow"));
    let layout: String = layout.map(|line| format!("{line}\n")).collect();
    let layout = layout.replace(
        "count = \"script\"",
        &format!("count = \"{}\"", count.name()),
    );
    fs::write(directory.join("layout.toml"), layout).unwrap();
    fs::write(directory.join("initial.env"), uboot.defaults().unwrap()).unwrap();
    let hardware = format!("--hardware={HARDWARE}");
    fleet(&[
        "image",
        "--commit=os",
        "--layout=layout.toml",
        "--channel=stable",
        &hardware,
        "--uboot-environment=initial.env",
        "--karg=console=ttyAMA0",
        "--output=disk.img",
    ]);
    Disk::made(directory.join("disk.img"))
}

fn boots_and_counts(count: Count) {
    let uboot = Uboot::build(&Cache::open().unwrap(), count).unwrap();
    let temp = tempfile::tempdir().unwrap();
    let disk = image(temp.path(), &uboot, count);
    let boot = || {
        let said = uboot.run(&disk, true, &[]).unwrap();
        let line = said
            .lines()
            .find_map(|line| line.strip_prefix("booted image "));
        let line = line.unwrap_or_else(|| panic!("{said}")).to_owned();
        let words = line
            .trim_end_matches('.')
            .split_whitespace()
            .map(str::to_owned);
        words.collect::<Vec<_>>()
    };
    let words = boot();
    let has = |words: &[String], word: &str| words.iter().any(|other| other == word);
    for word in [
        "root=LABEL=root",
        "rw",
        "console=ttyAMA0",
        &format!("offshoot.counts={}", count.name()),
    ] {
        assert!(has(&words, word), "{word}: {words:?}");
    }
    assert!(
        words
            .iter()
            .any(|word| word.starts_with("ostree=/ostree/boot.1/offshoot/")),
        "{words:?}"
    );
    assert!(!words.iter().any(|word| word.starts_with("offshoot.trial") || word.starts_with("offshoot.fallback")), "{words:?}");

    // A trial, as userspace arms it.
    let copies = || {
        Copies::new(
            LAYOUT,
            Flags::Incremental,
            &COPIES.map(|name| disk.copy(name).unwrap()),
        )
    };
    let armed = copies();
    let mut variables = armed.variables().unwrap().clone();
    variables.set("upgrade_available", "1");
    variables.set("bootcount", "0");
    let write = armed.write(&variables).unwrap();
    disk.set_copy(COPIES[write.copy], Some(&write.bytes))
        .unwrap();
    assert!(has(&boot(), "offshoot.trial=1"));
    assert!(has(&boot(), "offshoot.trial=2"));
    assert_eq!(
        copies().variables().unwrap().value("bootcount").unwrap(),
        b"2"
    );
}

#[test]
fn an_image_boots_by_a_uboot_whose_script_counts() {
    boots_and_counts(Count::Script);
}

#[test]
fn an_image_boots_by_a_uboot_that_counts_itself() {
    boots_and_counts(Count::Bootcount);
}

/// `make test-all`.
#[cfg(feature = "all")]
mod all {
    use std::os::unix::fs::chown;

    use qemu_tests::board::Board;
    use qemu_tests::image::{self, Image};

    use super::*;

    const NOBODY: u32 = 65534;

    /// What the scenarios boot was made by root, in the cache.
    #[test]
    fn the_images_of_both_boards_made_again_by_an_ordinary_user_are_the_same_bytes() {
        let cache = Cache::open().unwrap();
        for board in [
            Board::Pc,
            Board::Virt(Count::Script),
            Board::Virt(Count::Bootcount),
        ] {
            let Image {
                disk,
                commit,
                fleet,
            } = image::factory(&cache, board).unwrap();
            let entry = disk.parent().unwrap();
            let temp = tempfile::tempdir().unwrap();
            let here = temp.path();
            // The keys are nobody else's.
            let program = host::program("offshoot-fleet").unwrap();
            let copy = "umask 022 && mkdir fleet && cp -r \"$0/repo\" \"$0/public\" \"$0/fleet.toml\" \"$0/root.json\" fleet && cp \"$@\" .";
            let beside = fs::read_dir(entry)
                .unwrap()
                .map(|file| file.unwrap().path());
            let beside = beside.filter(|path| path.is_file() && *path != disk);
            host::run(
                Command::new("sh")
                    .args(["-c", copy])
                    .arg(&fleet)
                    .arg(program)
                    .args(beside)
                    .current_dir(here),
            )
            .unwrap();
            chown(here, Some(NOBODY), Some(NOBODY)).unwrap();
            let again = here.join("again.img");
            host::run(
                Command::new("setpriv")
                    .args([
                        format!("--reuid={NOBODY}"),
                        format!("--regid={NOBODY}"),
                        "--clear-groups".to_owned(),
                        "--bounding-set=-all".to_owned(),
                        "--inh-caps=-all".to_owned(),
                        "--no-new-privs".to_owned(),
                    ])
                    .arg(here.join("offshoot-fleet"))
                    .args(["--fleet", "fleet"])
                    .args(image::arguments(board, commit, here, &again))
                    .current_dir(here),
            )
            .unwrap();
            host::run(Command::new("cmp").args([&disk, &again])).unwrap();
        }
    }
}
