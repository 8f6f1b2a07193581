//! A real U-Boot for QEMU's arm64 machine, alone: built from Debian's source, run on a disk with its environment and a boot partition.
//!
//! | partition | what |
//! |---|---|
//! | 1, FAT | the environment: `uboot.env` and `uboot-redund.env` |
//! | 2, FAT or ext4 | `boot.scr`, and what it loads |
//!
//! The disk is the machine's `virtio 0`, which can be write protected, and once more its `virtio 1`, which can not.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use bootloader_glue::uboot::image::{Endian, Layout};
use bootloader_glue::uboot::{Count, DEFAULTS};

use crate::cache::{Cache, Ingredients};
use crate::run;

/// `CONFIG_ENV_SIZE` and the kind of environment in `uboot/common.config`.
pub const LAYOUT: Layout = Layout {
    size: 0x1000,
    redundant: true,
    endian: Endian::Little,
};

/// The names of the copies, as in `uboot/common.config`.
pub const COPIES: [&str; 2] = ["uboot.env", "uboot-redund.env"];

const MIB: u64 = 1 << 20;
const ENV_MIB: u64 = 16;

/// A U-Boot that counts by itself, or one that leaves it to the script.
pub struct Uboot {
    directory: PathBuf,
}

impl Uboot {
    pub fn build(cache: &Cache, count: Count) -> Result<Self> {
        let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("uboot");
        let source = Ingredients::default().path(&here.join("fetch"))?;
        let source = cache.entry("u-boot-source", source, |directory| {
            run!(here.join("fetch"), directory).map(drop)
        })?;
        let archive = fs::read_dir(&source)?
            .next()
            .context("the cached source of U-Boot is empty")??
            .path();
        let fragments = ["common.config", &format!("{}.config", count.name())];
        let compiler = run!("aarch64-linux-gnu-gcc", "--version")?;
        let mut ingredients = Ingredients::default().text(&compiler).text(DEFAULTS);
        for file in ["build", "bench.env"].into_iter().chain(fragments) {
            ingredients = ingredients.path(&here.join(file))?;
        }
        let name = format!("u-boot-{}", count.name());
        let directory = cache.entry(&name, ingredients, |directory| {
            let defaults = directory.join("defaults.env");
            fs::write(&defaults, DEFAULTS)?;
            run!(
                here.join("build"),
                archive,
                defaults,
                directory,
                fragments[0],
                fragments[1]
            )
            .map(drop)
        })?;
        Ok(Self { directory })
    }

    pub fn image(&self) -> PathBuf {
        self.directory.join("u-boot.bin")
    }

    /// The file that its build makes of the compiled-in variables.
    pub fn initial_environment(&self) -> PathBuf {
        self.directory.join("u-boot-initial-env")
    }

    /// The compiled-in variables, as text.
    pub fn defaults(&self) -> Result<String> {
        let path = self.initial_environment();
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    }

    /// Runs it on `disk` until the machine is off, and returns what came out of the serial port. `extra` are arguments for QEMU.
    pub fn run(&self, disk: &Disk, writable: bool, extra: &[&str]) -> Result<String> {
        let path = disk.path.display();
        let drive = |id: &str, readonly: bool| {
            let readonly = if readonly { "on" } else { "off" };
            format!(
                "if=none,id={id},format=raw,cache=unsafe,readonly={readonly},file.locking=off,file.filename={path}"
            )
        };
        let output = Command::new("timeout")
            .args(["300", "qemu-system-aarch64", "-M", "virt"])
            .args(["-cpu", "cortex-a57", "-m", "512"])
            .args(["-display", "none", "-serial", "stdio", "-monitor", "none"])
            .args(["-net", "none", "-bios"])
            .arg(self.image())
            // The last device is U-Boot's first.
            .args(["-drive", &drive("b", false)])
            .args(["-device", "virtio-blk-device,drive=b,share-rw=on"])
            .args(["-drive", &drive("a", !writable)])
            .args(["-device", "virtio-blk-device,drive=a,share-rw=on"])
            .args(extra)
            .stdin(Stdio::null())
            .output()
            .context("starting timeout: `make setup` installs what is needed")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            output.status.success(),
            "QEMU: {}\n{}{text}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(text)
    }
}

/// `boot.scr` of a script's text.
pub fn script_image(text: &str) -> Result<Vec<u8>> {
    let temp = tempfile::tempdir()?;
    let [source, image] = ["boot.cmd", "boot.scr"].map(|name| temp.path().join(name));
    fs::write(&source, text)?;
    run!(
        "mkimage", "-T", "script", "-A", "arm64", "-n", "offshoot", "-d", source, &image
    )?;
    Ok(fs::read(image)?)
}

/// A kernel that prints `booted NAME ARGUMENTS.` and turns the machine off; on a trial whose arguments have the word `dies` it resets it.
pub fn payload(name: &str) -> Result<Vec<u8>> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("uboot");
    let temp = tempfile::tempdir()?;
    let [elf, image] = ["payload.elf", "payload.img"].map(|name| temp.path().join(name));
    crate::host::run(
        Command::new("aarch64-linux-gnu-gcc")
            .arg(format!("-DNAME=\"{name}\""))
            .args(["-Os", "-ffreestanding", "-fno-builtin", "-fpie"])
            .args(["-mstrict-align", "-mgeneral-regs-only"])
            .args(["-nostdlib", "-static", "-Wl,--no-dynamic-linker"])
            .args(["-Wl,--build-id=none", "-Wl,-T"])
            .arg(here.join("payload.lds"))
            .arg("-o")
            .args([&elf, &here.join("payload.c")]),
    )?;
    run!("aarch64-linux-gnu-objcopy", "-O", "binary", &elf, &image)?;
    Ok(fs::read(image)?)
}

/// The disk, as a file.
pub struct Disk {
    pub path: PathBuf,
}

impl Disk {
    /// One that somebody else made, whose first partition has the environment.
    pub fn made(path: PathBuf) -> Self {
        Self { path }
    }

    /// A partition for the environment, empty, and one of `boot_mib` with the directory `boot` in it.
    pub fn with_fat(path: PathBuf, boot: &Path, boot_mib: u64) -> Result<Self> {
        let disk = Self::new(path, boot_mib)?;
        disk.mkfs_vfat(1 + ENV_MIB, boot_mib)?;
        let mut entries = fs::read_dir(boot)?
            .map(|entry| Ok(entry?.path()))
            .collect::<Result<Vec<_>>>()?;
        entries.sort();
        crate::host::run(
            mtools("mcopy")
                .args(["-s", "-i"])
                .arg(disk.partition(2))
                .args(entries)
                .arg("::"),
        )?;
        Ok(disk)
    }

    /// The same, with the boot partition as libostree needs it: symbolic links.
    pub fn with_ext4(path: PathBuf, boot: &Path, boot_mib: u64) -> Result<Self> {
        let disk = Self::new(path, boot_mib)?;
        crate::host::run(
            Command::new("mke2fs")
                .args(["-q", "-t", "ext4", "-L", "boot", "-F"])
                // What U-Boot 2025.01 reads.
                .args(["-O", "^orphan_file,^metadata_csum_seed", "-d"])
                .arg(boot)
                .arg("-E")
                .arg(format!("offset={}", (1 + ENV_MIB) * MIB))
                .arg(&disk.path)
                .arg(format!("{boot_mib}M")),
        )?;
        Ok(disk)
    }

    fn new(path: PathBuf, boot_mib: u64) -> Result<Self> {
        let disk = Self { path };
        fs::File::create(&disk.path)?.set_len((2 + ENV_MIB + boot_mib) * MIB)?;
        let table = disk.path.with_extension("sfdisk");
        fs::write(
            &table,
            format!("label: gpt\nstart=1MiB,size={ENV_MIB}MiB\nsize={boot_mib}MiB\n"),
        )?;
        crate::host::run(
            Command::new("sh")
                .args(["-c", "exec sfdisk --quiet \"$1\" < \"$2\"", "sh"])
                .arg(&disk.path)
                .arg(&table),
        )?;
        disk.mkfs_vfat(1, ENV_MIB)?;
        Ok(disk)
    }

    fn mkfs_vfat(&self, at_mib: u64, mib: u64) -> Result<()> {
        let offset = (at_mib * MIB / 512).to_string();
        let blocks = (mib * MIB / 1024).to_string();
        run!(
            "mkfs.vfat",
            "--offset",
            offset,
            "-S",
            "512",
            &self.path,
            blocks
        )
        .map(drop)
    }

    /// The bytes of a copy of the environment, if the file exists.
    pub fn copy(&self, name: &str) -> Result<Option<Vec<u8>>> {
        if !self.names()?.contains(&name.to_owned()) {
            return Ok(None);
        }
        let temp = tempfile::tempdir()?;
        let file = temp.path().join(name);
        crate::host::run(
            mtools("mcopy")
                .args(["-n", "-i"])
                .arg(self.partition(1))
                .arg(format!("::{name}"))
                .arg(&file),
        )?;
        Ok(Some(fs::read(file)?))
    }

    /// Puts a copy of the environment in place, or takes it away.
    pub fn set_copy(&self, name: &str, bytes: Option<&[u8]>) -> Result<()> {
        if self.names()?.contains(&name.to_owned()) {
            crate::host::run(
                mtools("mdel")
                    .arg("-i")
                    .arg(self.partition(1))
                    .arg(format!("::{name}")),
            )?;
        }
        let Some(bytes) = bytes else { return Ok(()) };
        let temp = tempfile::tempdir()?;
        let file = temp.path().join(name);
        fs::write(&file, bytes)?;
        crate::host::run(
            mtools("mcopy")
                .args(["-o", "-i"])
                .arg(self.partition(1))
                .arg(&file)
                .arg(format!("::{name}")),
        )?;
        Ok(())
    }

    /// Copies everything on the boot partition (FAT) into the directory `to`.
    pub fn read_boot(&self, to: &Path) -> Result<()> {
        crate::host::run(
            mtools("mcopy")
                .args(["-s", "-n", "-i"])
                .arg(self.partition(2))
                .arg("::*")
                .arg(to),
        )?;
        Ok(())
    }

    fn names(&self) -> Result<Vec<String>> {
        let list = crate::host::run(mtools("mdir").args(["-b", "-i"]).arg(self.partition(1)))?;
        let names = list.lines().filter_map(|line| line.strip_prefix("::/"));
        Ok(names.map(str::to_owned).collect())
    }

    fn partition(&self, number: u64) -> String {
        let at = if number == 1 { 1 } else { 1 + ENV_MIB };
        format!("{}@@{at}M", self.path.display())
    }
}

/// mtools compares the size of a partition with that of the whole disk, and finds fault.
fn mtools(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env("MTOOLS_SKIP_CHECK", "1");
    command
}
