//! The disk image of a device: the bootloader's partition (GRUB on an ESP, or U-Boot's environment), boot file system, root file system with
//! one deployment.
//!
//! Owns the partition layout and how it is filled without mounting anything: each file system is made in its place in the
//! image, from a directory that libostree prepared.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};
use bootloader_glue::config::{ESP_CFG, GRUB_MODULES};
use bootloader_glue::grub;
use bootloader_glue::uboot::image::Variables;
use bootloader_glue::uboot::{self, BOOT_CMD, Count};
use offshoot::commit::Commit;

use crate::board::Board;
use crate::cache::{Cache, Ingredients};
use crate::fleet::Fleet;
use crate::release::Release;
use crate::uboot::{COPIES, LAYOUT, Uboot, script_image};
use crate::{host, os, run};

/// The OSTree stateroot: the name that deployments of this OS share, and with it one `/var`.
pub const STATEROOT: &str = "offshoot";

const MIB: u64 = 1 << 20;

/// One partition: where it starts and how long it is, in bytes, and its type for sfdisk.
struct Partition {
    start: u64,
    size: u64,
    kind: &'static str,
}

// FAT32 wants at least 64 MiB to please all tools. With U-Boot it holds the environment instead.
const ESP: Partition = Partition {
    start: MIB,
    size: 64 * MIB,
    kind: "uefi",
};
const BOOT: Partition = Partition {
    start: ESP.start + ESP.size,
    size: 256 * MIB,
    kind: "linux",
};
const ROOT: Partition = Partition {
    start: BOOT.start + BOOT.size,
    size: 2560 * MIB,
    kind: "linux",
};
// The backup partition table follows the last partition.
const DISK_SIZE: u64 = ROOT.start + ROOT.size + MIB;

/// This machine has no screen: the integrator's part of GRUB's configuration, before Offshoot's.
const GRUB_TERMINAL: &str = "\
serial --unit=0 --speed=115200
terminal_input serial
terminal_output serial
";

/// The kernel's arguments besides `ostree=`, which libostree sets.
/// No security module is in use; `lsm=` spares the seconds that an emulated boot takes to attach one. `quiet` leaves
/// errors, panics and the units that fail.
const KERNEL_ARGUMENTS: &[&str] = &["root=LABEL=root", "rw", "quiet", "lsm=capability"];

/// A device as the factory delivers it, and the fleet that it belongs to.
#[derive(Clone, Debug)]
pub struct Image {
    /// Never written to: machines run on overlays of it.
    pub disk: PathBuf,
    /// What it boots: release [`FIRST`].
    pub commit: Commit,
    /// The operator's directory, with that release published. Never written to: [`Fleet::copy`].
    pub fleet: PathBuf,
}

/// The release that devices leave the factory with.
pub const FIRST: &str = "1.0.0";

pub fn factory(cache: &Cache, board: Board) -> Result<Image> {
    let base = os::base_tree(cache, board)?;
    let release = Release::good(FIRST);
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut ingredients = Ingredients::default()
        .text(&base.to_string_lossy())
        .path(&manifest.join("../agent/units"))?
        .path(&manifest.join("../agent/health"))?;
    for source in [
        "board.rs",
        "fleet.rs",
        "image.rs",
        "release.rs",
        "server.rs",
    ] {
        ingredients = ingredients.path(&manifest.join("src").join(source))?;
    }
    for program in ["offshoot", "offshoot-deployer", "ostree-grub-generator"] {
        ingredients = ingredients.path(&board.program(program)?)?;
    }
    ingredients = ingredients.path(&host::program("offshoot-fleet")?)?;
    if let Board::Virt(count) = board {
        let defaults = Uboot::build(cache, count)?.defaults()?;
        ingredients = ingredients.text(BOOT_CMD).text(&defaults);
    }
    let entry = cache.entry(&board.image(), ingredients, |entry| {
        host::timed("making the factory's image", || {
            build(cache, board, &release, entry)
        })
    })?;
    Ok(Image {
        disk: entry.join("disk.img"),
        commit: fs::read_to_string(entry.join("commit"))?.parse()?,
        fleet: entry.join("fleet"),
    })
}

fn build(cache: &Cache, board: Board, release: &Release, entry: &Path) -> Result<()> {
    let work = tempfile::tempdir_in(entry)?;
    let fleet = Fleet::init(board, &entry.join("fleet"))?;
    let commit = host::timed("  composing and publishing the release", || {
        fleet.publish(cache, release)
    })?;
    let sysroot = work.path().join("sysroot");
    host::timed("  deploying it", || {
        deploy(board, &fleet.repository(), commit, &sysroot)
    })?;
    // The boot file system is one of its own; in the root file system only its mount point stays.
    let boot = work.path().join("boot");
    fs::rename(sysroot.join("boot"), &boot)?;
    fs::create_dir(sysroot.join("boot"))?;
    host::timed("  making the file systems", || {
        let disk = entry.join("disk.img");
        partition(&disk)?;
        match board {
            Board::Pc => make_esp(&disk, work.path())?,
            Board::Virt(count) => {
                let defaults = Uboot::build(cache, count)?.defaults()?;
                make_environment(&disk, work.path(), &defaults, count)?;
                fs::write(boot.join("boot.scr"), script_image(BOOT_CMD)?)?;
            }
        }
        make_ext4(&disk, "boot", &BOOT, &boot)?;
        make_ext4(&disk, "root", &ROOT, &sysroot)
    })?;
    fs::write(entry.join("commit"), commit.to_string())?;
    work.close()?;
    Ok(())
}

fn deploy(board: Board, repository: &Path, commit: Commit, sysroot: &Path) -> Result<()> {
    fs::create_dir(sysroot)?;
    let own = sysroot.join("ostree/repo");
    let admin = format!("--sysroot={}", sysroot.display());
    run!("ostree", "admin", "init-fs", "--modern", sysroot)?;
    run!("ostree", "admin", "os-init", &admin, STATEROOT)?;
    run!(
        "ostree",
        "config",
        format!("--repo={}", own.display()),
        "set",
        "sysroot.bootloader",
        match board {
            Board::Pc => "grub2",
            Board::Virt(_) => "uboot",
        }
    )?;
    run!(
        "ostree",
        "pull-local",
        format!("--repo={}", own.display()),
        repository,
        commit.to_string()
    )?;
    match board {
        Board::Pc => {
            fs::create_dir_all(sysroot.join("boot/grub2"))?;
            symlink("../loader/grub.cfg", sysroot.join("boot/grub2/grub.cfg"))?;
        }
        Board::Virt(_) => {
            // libostree reads the file that it replaces.
            fs::create_dir_all(sysroot.join("boot/loader.0"))?;
            symlink("loader.0", sysroot.join("boot/loader"))?;
            fs::write(sysroot.join("boot/loader/uEnv.txt"), "")?;
        }
    }
    let mut deploy = Command::new("ostree");
    deploy
        .args(["admin", "deploy", &admin])
        .arg(format!("--os={STATEROOT}"));
    deploy.arg(format!("--karg=console={}", board.console()));
    for argument in KERNEL_ARGUMENTS {
        deploy.arg(format!("--karg={argument}"));
    }
    deploy.arg(match board {
        // The kernel tests its timer against a loop of its own, and panics if the build host was busy just then.
        Board::Pc => "--karg=no_timer_check",
        // Moving the kernel about takes seconds of an emulated boot.
        Board::Virt(_) => "--karg=nokaslr",
    });
    host::run(
        deploy
            .arg(commit.to_string())
            .env("OSTREE_GRUB2_EXEC", host::program("ostree-grub-generator")?)
            // Here /boot is a directory; on the device it is a file system of its own.
            .env("OFFSHOOT_GRUB_BOOT_PREFIX", ""),
    )?;
    // libostree makes the deployment's top directory immutable; this copy of it is to be removed.
    run!(
        "chattr",
        "-i",
        sysroot.join(format!("ostree/deploy/{STATEROOT}/deploy/{commit}.0"))
    )?;
    Ok(())
}

fn partition(disk: &Path) -> Result<()> {
    File::create(disk)?.set_len(DISK_SIZE)?;
    let mut table = String::from("label: gpt\n");
    for Partition { start, size, kind } in [ESP, BOOT, ROOT] {
        table += &format!("start={}, size={}, type={kind}\n", start / 512, size / 512);
    }
    let mut sfdisk = Command::new("sfdisk")
        .arg("--quiet")
        .arg(disk)
        .stdin(Stdio::piped())
        .spawn()
        .context("starting sfdisk: `make setup` installs it")?;
    if let Some(mut stdin) = sfdisk.stdin.take() {
        stdin.write_all(table.as_bytes())?;
    }
    let status = sfdisk.wait()?;
    anyhow::ensure!(status.success(), "sfdisk: {status}");
    Ok(())
}

fn make_esp(disk: &Path, work: &Path) -> Result<()> {
    let esp = work.join("esp");
    let grub = esp.join("EFI/BOOT");
    fs::create_dir_all(&grub)?;
    fs::write(grub.join("grub.cfg"), format!("{GRUB_TERMINAL}{ESP_CFG}"))?;
    host::run(
        Command::new("grub-mkimage")
            .args(["--format=x86_64-efi", "--prefix=/EFI/BOOT"])
            .arg(format!("--output={}", grub.join("BOOTX64.EFI").display()))
            .args(GRUB_MODULES),
    )?;
    fs::create_dir(esp.join("offshoot"))?;
    for (n, copy) in grub::fresh(3).iter().enumerate() {
        fs::write(esp.join(format!("offshoot/env.{n}")), copy)?;
    }
    make_vfat(disk, "ESP", &[&esp.join("EFI"), &esp.join("offshoot")])
}

/// U-Boot's partition: its environment, initialised as the factory does.
fn make_environment(disk: &Path, work: &Path, defaults: &str, count: Count) -> Result<()> {
    let variables = uboot::fresh(Variables::from_text(defaults), 3, count);
    let copies = COPIES.map(|name| work.join(name));
    for (copy, flag) in copies.iter().zip([1, 0]) {
        fs::write(copy, LAYOUT.encode(&variables, flag)?)?;
    }
    make_vfat(disk, "UBOOT", &[&copies[0], &copies[1]])
}

fn make_vfat(disk: &Path, label: &str, content: &[&Path]) -> Result<()> {
    run!(
        "mkfs.vfat",
        "-F32",
        format!("-n{label}"),
        // One sector per cluster: with more, this size has too few clusters to be FAT32.
        "-s1",
        // Each machine is a copy of this one disk anyway.
        "-i0FF54007",
        format!("--offset={}", ESP.start / 512),
        disk,
        (ESP.size / 1024).to_string()
    )?;
    let partition = format!("{}@@{}", disk.display(), ESP.start);
    host::run(
        Command::new("mcopy")
            .args(["-s", "-i", &partition])
            .args(content)
            .arg("::"),
    )?;
    Ok(())
}

fn make_ext4(disk: &Path, label: &str, partition: &Partition, content: &Path) -> Result<()> {
    run!(
        "mke2fs",
        "-q",
        "-F",
        "-text4",
        // GRUB 2.06 does not know these.
        "-O^metadata_csum_seed,^orphan_file",
        "-Enodiscard",
        format!("-Eoffset={},root_owner=0:0", partition.start),
        "-m0",
        format!("-L{label}"),
        "-d",
        content,
        disk,
        format!("{}k", partition.size / 1024),
    )?;
    Ok(())
}
