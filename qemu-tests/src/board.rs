//! The boards of the test bed: what differs between a PC with UEFI and GRUB and an arm64 board with U-Boot.

use std::path::PathBuf;

use anyhow::Result;
use bootloader_glue::uboot::Count;

use crate::host;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Board {
    /// QEMU's `q35`: UEFI, GRUB.
    #[default]
    Pc,
    /// QEMU's `virt`, arm64: U-Boot, and who counts there.
    Virt(Count),
}

impl Board {
    /// Debian's name for it.
    pub fn architecture(self) -> &'static str {
        match self {
            Self::Pc => "amd64",
            Self::Virt(_) => "arm64",
        }
    }

    /// The hardware id that releases are signed for.
    pub fn hardware(self) -> &'static str {
        match self {
            Self::Pc => "qemu-x86_64",
            Self::Virt(_) => "qemu-arm64",
        }
    }

    /// The layout of its disk, for `offshoot-fleet image`.
    pub fn layout(self) -> String {
        match self {
            Self::Pc => include_str!("../layouts/amd64.toml").to_owned(),
            Self::Virt(count) => include_str!("../layouts/arm64.toml")
                .replace("\"script\"", &format!("\"{}\"", count.name())),
        }
    }

    /// What names its image in the cache.
    pub fn image(self) -> String {
        match self {
            Self::Pc => "image".to_owned(),
            Self::Virt(count) => format!("image-arm64-{}", count.name()),
        }
    }

    /// Its part of the image's configuration of Offshoot.
    pub fn configuration(self) -> String {
        match self {
            Self::Pc => String::new(),
            Self::Virt(count) => {
                format!(
                    "\n[bootloader]\nkind = \"uboot\"\ncount = \"{}\"\n",
                    count.name()
                )
            }
        }
    }

    /// One of this workspace's own programs, built for this board.
    pub fn program(self, name: &str) -> Result<PathBuf> {
        match self {
            Self::Pc => host::program(name),
            Self::Virt(_) => host::cross_program(name),
        }
    }
}
