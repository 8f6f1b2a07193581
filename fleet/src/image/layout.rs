//! The layout of a disk: a small TOML file, and the places on the disk that follow from it.
//!
//! | key | what |
//! |---|---|
//! | `bootloader` | `grub` or `uboot` |
//! | `kernel_arguments` | besides `ostree=` |
//! | `stateroot` | the name that deployments share, and with it one `/var`; `offshoot` if not given |
//! | `size` | of the disk; without it the disk is as small as its content allows |
//! | `[grub] preamble` | before Offshoot's part of GRUB's configuration |
//! | `[uboot]` | `count`, `architecture`, `offset`, `environment` (`size`, and `files`, or `offsets` and `device`) |
//! | `[[partition]]` | `name` (the file system's label too), `type`, `size` (or `rest`), `start`, `filesystem`, `content`, `mount`, `grow`, `files` |
//!
//! Sizes are bytes, or with KiB, MiB, GiB; `0x` is hexadecimal. Partitions begin at whole MiB, one after the other, unless `start` says otherwise.
//! A layout that cannot be is refused before anything is made; what a wrong one may still be is wrong about the board.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::fat;

pub(super) const MIB: u64 = 1 << 20;
pub(super) const SECTOR: u64 = 512;

/// The partition table and its copy at the end of the disk: header and 128 entries each, and the protective MBR.
const TABLE: u64 = 34 * SECTOR;

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Layout {
    pub bootloader: Bootloader,
    #[serde(default)]
    pub kernel_arguments: Vec<String>,
    #[serde(default = "stateroot")]
    pub stateroot: String,
    pub size: Option<Size>,
    #[serde(default)]
    pub grub: Grub,
    pub uboot: Option<Uboot>,
    #[serde(rename = "partition")]
    pub partitions: Vec<Partition>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Bootloader {
    Grub,
    Uboot,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Grub {
    #[serde(default)]
    pub preamble: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Uboot {
    pub count: Count,
    pub architecture: String,
    pub offset: Option<Size>,
    pub environment: Environment,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Count {
    Script,
    Bootcount,
}

/// Where the copies of U-Boot's environment are: one, or two of a redundant one.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Environment {
    pub size: Size,
    #[serde(default)]
    pub files: Vec<String>,
    #[serde(default)]
    pub offsets: Vec<Size>,
    pub device: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Partition {
    pub name: String,
    #[serde(rename = "type")]
    pub kind: Kind,
    pub size: Extent,
    pub start: Option<Size>,
    pub filesystem: Filesystem,
    pub content: Content,
    pub mount: Option<String>,
    /// A writable mount point of the file system, through which it grows.
    pub grow: Option<String>,
    /// A directory beside the layout whose files are put on the file system.
    pub files: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Filesystem {
    Vfat,
    Ext4,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Content {
    /// GRUB, and its environment.
    Esp,
    /// U-Boot's environment, if that is files.
    Environment,
    /// `/boot`.
    Boot,
    /// The OSTree sysroot.
    Root,
    Empty,
}

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "toml::Value")]
pub(crate) struct Size(pub u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "toml::Value")]
pub(crate) enum Extent {
    Bytes(u64),
    /// What the disk has left.
    Rest,
}

/// A partition's type, by a name or as the GUID itself.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Kind(String);

/// systemd's names for them, and what they stand for.
const KINDS: [(&str, &str); 6] = [
    ("esp", "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"),
    ("linux", "0FC63DAF-8483-4772-8E79-3D69D8477DE4"),
    ("root-x86-64", "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"),
    ("root-arm64", "B921B045-1DF0-41C3-AF44-4C6F280D3FAE"),
    ("var", "4D21B016-B534-45C2-A9FB-5C16E091FD2D"),
    ("xbootldr", "BC13C2FF-59E6-4262-A352-B275FD6F7172"),
];

/// The layouts that come with the program.
pub(crate) const BOARDS: [(&str, &str); 2] = [
    (
        "x86_64-grub",
        include_str!("../../layouts/x86_64-grub.toml"),
    ),
    (
        "arm64-uboot",
        include_str!("../../layouts/arm64-uboot.toml"),
    ),
];

fn stateroot() -> String {
    "offshoot".to_owned()
}

impl Layout {
    pub(super) fn parse(text: &str) -> Result<Self> {
        let layout: Self = toml::from_str(text)?;
        layout.check()?;
        Ok(layout)
    }

    pub(super) fn one(&self, content: Content) -> Result<usize> {
        let mut found = self
            .partitions
            .iter()
            .enumerate()
            .filter(|(_, partition)| partition.content == content);
        let word = content.word();
        let (index, _) = found
            .next()
            .with_context(|| format!("no partition has content = \"{word}\": exactly one must"))?;
        ensure!(
            found.next().is_none(),
            "two partitions have content = \"{word}\": exactly one must"
        );
        Ok(index)
    }

    fn check(&self) -> Result<()> {
        use {Content as C, Filesystem as F};
        ensure!(
            !self.stateroot.is_empty()
                && self
                    .stateroot
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte)),
            "stateroot = {:?}: it is letters, digits, - and _",
            self.stateroot
        );
        for argument in &self.kernel_arguments {
            kernel_argument(argument)?;
        }
        let (boot, root) = (self.one(C::Boot)?, self.one(C::Root)?);
        for index in [boot, root] {
            let Partition {
                name, filesystem, ..
            } = &self.partitions[index];
            ensure!(
                *filesystem == F::Ext4,
                "partition {name}: it must be ext4, since OSTree needs links there"
            );
        }
        match self.bootloader {
            Bootloader::Grub => {
                let esp = &self.partitions[self.one(C::Esp)?];
                ensure!(
                    esp.filesystem == F::Vfat && esp.kind.guid() == KINDS[0].1,
                    "partition {}: firmware looks for GRUB on vfat, in a partition of type = \"esp\"",
                    esp.name
                );
                ensure!(
                    self.partitions[boot].name == "boot",
                    "partition {}: the one with content = \"boot\" must be named boot, by which GRUB finds it",
                    self.partitions[boot].name
                );
                ensure!(
                    self.uboot.is_none(),
                    "[uboot] is of no use with bootloader = \"grub\""
                );
            }
            Bootloader::Uboot => self.check_uboot()?,
        }
        let mut rest = false;
        for (n, partition) in self.partitions.iter().enumerate() {
            partition.check()?;
            let name = &partition.name;
            ensure!(
                self.partitions[..n].iter().all(|other| other.name != *name),
                "two partitions are named {name}"
            );
            ensure!(
                !rest,
                "partition {name} comes after the one with size = \"rest\", which is the last"
            );
            rest = partition.size == Extent::Rest;
            if partition.grow.is_some() {
                ensure!(
                    n + 1 == self.partitions.len(),
                    "partition {name}: only the last one can grow"
                );
            }
            let of_grub = partition.content == C::Esp;
            let of_uboot = partition.content == C::Environment;
            ensure!(
                !(of_grub && self.bootloader != Bootloader::Grub
                    || of_uboot && self.bootloader != Bootloader::Uboot),
                "partition {name}: content = \"{}\" is of the other bootloader",
                partition.content.word()
            );
        }
        Ok(())
    }

    fn check_uboot(&self) -> Result<()> {
        let uboot = self
            .uboot
            .as_ref()
            .context("bootloader = \"uboot\" needs [uboot]: count, architecture, environment")?;
        let Environment {
            size,
            files,
            offsets,
            device,
        } = &uboot.environment;
        ensure!(
            (16..=16 * MIB).contains(&size.0),
            "uboot.environment.size = {}: an environment has 16 bytes to 16 MiB",
            size.0
        );
        match (files.as_slice(), offsets.as_slice(), device) {
            ([_] | [_, _], [], None) => {
                let partition = &self.partitions[self.one(Content::Environment)?];
                ensure!(
                    partition.mount.is_some(),
                    "partition {}: without `mount` fw_env.config cannot name the environment's files on it",
                    partition.name
                );
                for file in files {
                    ensure!(
                        !file.is_empty() && !file.contains(['/', ' ', '\t', '"']),
                        "uboot.environment.files: {file:?} is not the name of a file"
                    );
                }
            }
            ([], [_] | [_, _], Some(_)) => {}
            _ => bail!(
                "uboot.environment: name one or two `files` on the partition with content = \"environment\", or one or two `offsets` \
                 on the disk and the `device` by which Linux knows it"
            ),
        }
        Ok(())
    }

    /// Where U-Boot's environment is on the disk itself.
    fn raw(&self) -> Vec<(String, Range<u64>)> {
        let Some(Uboot { environment, .. }) = &self.uboot else {
            return Vec::new();
        };
        let places = environment.offsets.iter();
        let places = places.map(|at| {
            (
                "the environment".to_owned(),
                at.0..at.0 + environment.size.0,
            )
        });
        places.collect()
    }

    /// Where each partition is, and how large the disk. `least` says what the last one needs at least; `disk` is what was asked for, and
    /// `uboot` the length of U-Boot, if it is on the disk.
    pub(super) fn places(
        &self,
        least: u64,
        disk: Option<Size>,
        uboot: Option<u64>,
    ) -> Result<Geometry> {
        let mut places = Vec::new();
        let mut free = MIB;
        let wanted = disk.or(self.size).map(|size| size.0);
        if let Some(size) = wanted {
            ensure!(
                size % MIB == 0,
                "a disk of {size} bytes: it must be whole MiB"
            );
        }
        for partition in &self.partitions {
            let name = &partition.name;
            let start = partition.start.map_or(free, |size| size.0);
            ensure!(
                start >= free,
                "partition {name} starts at {start}, in what is before it: {free} is free"
            );
            let size = match (partition.size, wanted) {
                (Extent::Bytes(size), _) => size,
                (Extent::Rest, None) => least.next_multiple_of(MIB),
                (Extent::Rest, Some(disk)) => disk.saturating_sub(MIB).saturating_sub(start),
            };
            if partition.size == Extent::Rest {
                ensure!(
                    size >= least,
                    "partition {name} has {} MiB and needs {}: make the disk {} MiB larger (--size)",
                    size / MIB,
                    least.div_ceil(MIB),
                    (least - size).div_ceil(MIB)
                );
            }
            places.push(start..start + size);
            free = start + size;
        }
        let size = wanted.unwrap_or(free + MIB);
        ensure!(
            size >= free + MIB,
            "the partitions and the copy of the partition table need {} MiB, the disk has {}: make it larger (--size)",
            free / MIB + 1,
            size / MIB
        );
        let mut raw = self.raw();
        if let (
            Some(Uboot {
                offset: Some(at), ..
            }),
            Some(length),
        ) = (&self.uboot, uboot)
        {
            raw.push(("U-Boot".to_owned(), at.0..at.0 + length));
        }
        let mut taken = vec![("the partition table".to_owned(), 0..TABLE)];
        let named = self.partitions.iter().zip(&places);
        taken.extend(named.map(|(one, place)| (format!("partition {}", one.name), place.clone())));
        for (what, place) in raw {
            for (other, of_other) in &taken {
                ensure!(
                    place.end <= of_other.start || of_other.end <= place.start,
                    "{what}, at {:#x} to {:#x}, is where {other} is, at {:#x} to {:#x}: move `start` of the first partition",
                    place.start,
                    place.end,
                    of_other.start,
                    of_other.end
                );
            }
            ensure!(
                place.end <= size - TABLE,
                "{what}, at {:#x} to {:#x}, is not on the disk",
                place.start,
                place.end
            );
            taken.push((what, place));
        }
        Ok(Geometry { size, places })
    }
}

/// Where everything is, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    pub size: u64,
    /// Of each partition, in order.
    pub places: Vec<Range<u64>>,
}

impl Partition {
    fn check(&self) -> Result<()> {
        let Self { name, .. } = self;
        let longest = match self.filesystem {
            Filesystem::Vfat => 11,
            Filesystem::Ext4 => 16,
        };
        ensure!(
            (1..=longest).contains(&name.len())
                && name
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte)),
            "partition {name:?}: a name is at most {longest} letters, digits, - and _"
        );
        let whole = |what: &str, size: u64| {
            ensure!(
                size > 0 && size.is_multiple_of(MIB),
                "partition {name}: {what} is {size} bytes, and must be whole MiB"
            );
            Ok(())
        };
        if let Extent::Bytes(size) = self.size {
            whole("size", size)?;
            ensure!(
                self.filesystem != Filesystem::Vfat || size >= fat::LEAST,
                "partition {name}: size is {} MiB, and FAT32 needs {}",
                size / MIB,
                fat::LEAST / MIB
            );
        } else {
            ensure!(
                self.filesystem == Filesystem::Ext4,
                "partition {name}: only an ext4 file system takes the rest of the disk"
            );
        }
        if let Some(start) = self.start {
            whole("start", start.0)?;
        }
        for (key, path) in [("mount", &self.mount), ("grow", &self.grow)] {
            if let Some(path) = path {
                ensure!(
                    path.starts_with('/')
                        && path
                            .bytes()
                            .all(|byte| byte.is_ascii_alphanumeric() || b"/-_.".contains(&byte)),
                    "partition {name}: {key} = {path:?} is not an absolute path of letters, digits, /, -, _ and ."
                );
            }
        }
        ensure!(
            self.files.is_none() || self.filesystem == Filesystem::Vfat,
            "partition {name}: only a vfat file system can be given `files`"
        );
        ensure!(
            self.grow.is_none() || self.filesystem == Filesystem::Ext4,
            "partition {name}: only an ext4 file system can grow"
        );
        Ok(())
    }
}

/// libostree splits the line at blanks and GRUB and U-Boot see the words: one that holds another is two.
pub(super) fn kernel_argument(argument: &str) -> Result<()> {
    ensure!(
        !argument.is_empty() && argument.bytes().all(|byte| byte.is_ascii_graphic()),
        "kernel argument {argument:?}: it is one word of printable characters"
    );
    ensure!(
        !argument.starts_with("ostree="),
        "kernel argument {argument:?}: libostree sets ostree= itself"
    );
    Ok(())
}

impl Content {
    pub(super) const fn word(self) -> &'static str {
        match self {
            Self::Esp => "esp",
            Self::Environment => "environment",
            Self::Boot => "boot",
            Self::Root => "root",
            Self::Empty => "empty",
        }
    }
}

impl Kind {
    pub(super) fn guid(&self) -> &str {
        let known = KINDS.iter().find(|(name, _)| *name == self.0);
        known.map_or(&self.0, |(_, guid)| guid)
    }

    pub(super) fn name(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Kind {
    type Error = anyhow::Error;

    fn try_from(text: String) -> Result<Self> {
        let groups: Vec<_> = text.split('-').map(str::len).collect();
        let is_guid = groups == [8, 4, 4, 4, 12]
            && text
                .bytes()
                .all(|byte| byte == b'-' || byte.is_ascii_hexdigit());
        let names = KINDS.map(|(name, _)| name);
        ensure!(
            is_guid || names.contains(&text.as_str()),
            "{text:?} is not a type of partition: write a GUID, or one of {}",
            names.join(", ")
        );
        Ok(Self(text))
    }
}

impl FromStr for Size {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let refuse = || format!("{text:?} is not a size: write 64MiB, 4GiB, 512KiB, or bytes");
        let units = [("KiB", 10), ("MiB", 20), ("GiB", 30)];
        let unit = units
            .iter()
            .find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, *shift)));
        let (digits, shift) = unit.unwrap_or((text, 0));
        let number: u64 = match digits.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16),
            None => digits.parse(),
        }
        .with_context(refuse)?;
        // Sums of a few of them do not overflow either.
        let size = number
            .checked_mul(1 << shift)
            .filter(|size| *size <= 1 << 50);
        Ok(Self(size.with_context(refuse)?))
    }
}

impl TryFrom<toml::Value> for Size {
    type Error = anyhow::Error;

    fn try_from(value: toml::Value) -> Result<Self> {
        match value {
            toml::Value::String(text) => text.parse(),
            toml::Value::Integer(number) => number.to_string().parse(),
            other => bail!("{other} is not a size: write \"64MiB\""),
        }
    }
}

impl TryFrom<toml::Value> for Extent {
    type Error = anyhow::Error;

    fn try_from(value: toml::Value) -> Result<Self> {
        if value.as_str() == Some("rest") {
            return Ok(Self::Rest);
        }
        Size::try_from(value).map(|size| Self::Bytes(size.0))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests;
