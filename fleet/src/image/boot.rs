//! What the bootloader finds: GRUB and its environment on the EFI system partition, or U-Boot's environment, its script, and U-Boot itself.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use bootloader_glue::config::{ESP_CFG, GRUB_MODULES};
use bootloader_glue::grub;
use bootloader_glue::uboot::image::{Endian, Layout as Encoding, Variables};
use bootloader_glue::uboot::places::{self, Place};
use bootloader_glue::uboot::{self, BOOT_CMD};

use super::fat::Files;
use super::layout::{Content, Count, Environment, Layout, Uboot};
use super::tool::Workshop;

/// GRUB as firmware starts it from a disk that it has never seen, its configuration, and a fresh environment.
pub(super) fn esp(workshop: &Workshop, layout: &Layout, tries: u8) -> Result<Files> {
    let image = workshop.path("grub.efi");
    let mut mkimage = workshop.tool("grub-mkimage");
    mkimage
        .args(["--format=x86_64-efi", "--prefix=/EFI/BOOT", "--output"])
        .arg(&image)
        .args(GRUB_MODULES);
    workshop.run(&mut mkimage, b"")?;
    let image = fs::read(&image).with_context(|| format!("reading {}", image.display()))?;
    let mut preamble = layout.grub.preamble.clone();
    if !preamble.is_empty() && !preamble.ends_with('\n') {
        preamble.push('\n');
    }
    let [first, second] = grub::fresh(tries);
    Ok(Files::from([
        ("EFI/BOOT/BOOTX64.EFI".to_owned(), image),
        (
            "EFI/BOOT/grub.cfg".to_owned(),
            format!("{preamble}{ESP_CFG}").into_bytes(),
        ),
        ("offshoot/env.0".to_owned(), first),
        ("offshoot/env.1".to_owned(), second),
    ]))
}

/// The copies of a fresh U-Boot environment: `initial` is what is compiled into U-Boot, which a saved environment takes the place of.
pub(super) fn environment(uboot: &Uboot, initial: &Path, tries: u8) -> Result<Vec<Vec<u8>>> {
    let text =
        fs::read_to_string(initial).with_context(|| format!("reading {}", initial.display()))?;
    let variables = Variables::from_text(&text);
    let value = |name: &str| {
        variables
            .value(name)
            .map(|value| String::from_utf8_lossy(&value).into_owned())
    };
    ensure!(
        value("bootcmd").is_some(),
        "{} has no bootcmd, so U-Boot would do nothing: give the u-boot-initial-env of its build (`make u-boot-initial-env`)",
        initial.display()
    );
    if uboot.count == Count::Bootcount {
        let found = value("altbootcmd");
        ensure!(
            found.as_deref() == Some("run bootcmd"),
            "{}: altbootcmd is {found:?}, and U-Boot would stop at its prompt when the tries of a trial are used up: build it with \
             altbootcmd=run bootcmd",
            initial.display()
        );
    }
    let count = match uboot.count {
        Count::Script => uboot::Count::Script,
        Count::Bootcount => uboot::Count::Bootcount,
    };
    let variables = uboot::fresh(variables, tries, count);
    let copies = uboot.environment.files.len() + uboot.environment.offsets.len();
    let encoding = Encoding {
        size: usize::try_from(uboot.environment.size.0)?,
        redundant: copies == 2,
        endian: Endian::Little,
    };
    // Both are valid; the first is the newer.
    let flags = (0..copies as u8).rev();
    let encoded = flags
        .map(|flag| encoding.encode(&variables, flag))
        .collect::<Result<_, _>>();
    encoded.context(
        "making U-Boot's environment: CONFIG_ENV_SIZE and uboot.environment.size must be larger",
    )
}

/// Makes `boot.scr` in `boot`.
pub(super) fn script(workshop: &Workshop, uboot: &Uboot, boot: &Path) -> Result<()> {
    let source = workshop.path("boot.cmd");
    fs::write(&source, BOOT_CMD).with_context(|| format!("writing {}", source.display()))?;
    let mut mkimage = workshop.tool("mkimage");
    mkimage
        .args([
            "-T",
            "script",
            "-A",
            &uboot.architecture,
            "-n",
            "offshoot",
            "-d",
        ])
        .arg(&source)
        .arg(boot.join("boot.scr"));
    workshop.run(&mut mkimage, b"").map(drop)
}

/// The layout's `fw_env.config`: where Linux finds the environment that U-Boot was told of.
pub(super) fn fw_env_config(layout: &Layout, uboot: &Uboot) -> Result<String> {
    let Environment {
        size,
        files,
        offsets,
        device,
    } = &uboot.environment;
    let mut text = "# DEVICE OFFSET SIZE\n".to_owned();
    if files.is_empty() {
        let device = device
            .as_deref()
            .context("uboot.environment has neither files nor a device")?;
        for offset in offsets {
            text += &format!("{device} {:#x} {:#x}\n", offset.0, size.0);
        }
        return Ok(text);
    }
    let partition = &layout.partitions[layout.one(Content::Environment)?];
    let mount = partition
        .mount
        .as_deref()
        .context("the partition of the environment has no `mount`")?;
    for file in files {
        text += &format!("{mount}/{file} 0x0 {:#x}\n", size.0);
    }
    Ok(text)
}

/// Linux and U-Boot must mean the same bytes.
pub(super) fn same_places(layout: &str, device: &str, path: &str) -> Result<()> {
    let read = |text: &str| -> Result<Vec<Place>> {
        let places = places::parse(text)?;
        // How the storage is written is the device's to know.
        let plain = places.into_iter().map(|place| Place {
            sector: None,
            sectors: None,
            no_lock: false,
            ..place
        });
        Ok(plain.collect())
    };
    let (wanted, found) = (
        read(layout)?,
        read(device).with_context(|| format!("reading {path} of the commit"))?,
    );
    if wanted != found {
        bail!(
            "{path} of the commit and the layout mean different places for U-Boot's environment: correct the one that is not U-Boot's. The layout's:\n{layout}"
        );
    }
    Ok(())
}
