//! Where one copy of the environment lies: a file, a block device, or flash.
//!
//! A write goes over the bytes of the copy that is given, in place, and nowhere else: no truncation, no allocation. It returns when
//! the device says that it has the bytes. A power cut leaves that copy torn, its CRC wrong. A file that is missing or too
//! short is made under another name and renamed. This module does not know what the bytes mean.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, fadvise};
use rustix::io::Errno;

use super::image::Flags;
use super::mtd::{Flash, Region};
use super::places::Place;
use crate::Error;

/// What a disk writes whole or not at all.
pub(super) const SECTOR: usize = 512;

/// A copy's place on this device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Store {
    path: PathBuf,
    offset: u64,
    size: usize,
    kind: Kind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    /// `force_ro`: the kernel's write protection of an eMMC boot partition.
    Block {
        force_ro: Option<PathBuf>,
    },
    File,
    Flash(Flash),
}

impl Store {
    pub(super) fn open(place: &Place) -> Result<Self, Error> {
        let fail = |error: io::Error| Error::io("opening", &place.device, &error);
        // As the tools do: /dev/disk/by-partlabel/uboot-env is a link.
        let path = match fs::canonicalize(&place.device) {
            Err(error) if error.kind() == ErrorKind::NotFound => place.device.clone(),
            other => other.map_err(fail)?,
        };
        let mut store = Self {
            offset: u64::try_from(place.offset).unwrap_or(0),
            size: usize::try_from(place.size)
                .map_err(io::Error::other)
                .map_err(fail)?,
            kind: Kind::File,
            path,
        };
        let kind = match fs::metadata(&store.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(store),
            other => other.map_err(fail)?.file_type(),
        };
        if place.offset < 0 {
            let end = File::open(&store.path)
                .and_then(|mut file| file.seek(SeekFrom::End(0)))
                .map_err(fail)?;
            store.offset = end
                .checked_add_signed(place.offset)
                .ok_or_else(|| {
                    io::Error::new(
                        ErrorKind::InvalidInput,
                        format!("offset {:#x} is before its beginning", place.offset),
                    )
                })
                .map_err(fail)?;
        }
        if kind.is_block_device() {
            store.kind = Kind::Block {
                force_ro: force_ro(&store.path),
            };
        } else if kind.is_char_device() {
            let region = Region {
                offset: store.offset,
                size: store.size,
                sector: place.sector,
                sectors: place.sectors,
                no_lock: place.no_lock,
            };
            let flash = File::open(&store.path).and_then(|file| Flash::new(&file, &region));
            store.kind = Kind::Flash(flash.map_err(fail)?);
        } else if !kind.is_file() {
            return Err(fail(io::Error::new(
                ErrorKind::InvalidInput,
                "it is neither a file, a block device nor an MTD device",
            )));
        }
        Ok(store)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn flags(&self) -> Flags {
        match self.kind {
            Kind::Flash(flash) if !flash.nand => Flags::Boolean,
            Kind::Flash(_) | Kind::Block { .. } | Kind::File => Flags::Incremental,
        }
    }

    /// The bytes; `None` where there are not as many, or where the medium has lost them, which is how U-Boot sees it too. Past the
    /// page cache where the kernel lets us: what counts is on the device.
    pub(super) fn read(&self) -> Result<Option<Vec<u8>>, Error> {
        match self.bytes() {
            Err(error) if lost(&error) => Ok(None),
            other => other.map_err(|error| Error::io("reading", &self.path, &error)),
        }
    }

    fn bytes(&self) -> io::Result<Option<Vec<u8>>> {
        let file = match File::open(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        if let Kind::Flash(flash) = self.kind {
            return flash.read(&file).map(Some);
        }
        fadvise(&file, 0, None, Advice::DontNeed)?;
        let mut bytes = vec![0; self.size];
        match file.read_exact_at(&mut bytes, self.offset) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(None),
            other => other.map(|()| Some(bytes)),
        }
    }

    pub(super) fn write(&self, bytes: &[u8]) -> Result<(), Error> {
        let written = match &self.kind {
            Kind::Flash(flash) => self.open_to_write().and_then(|file| {
                flash.write(&file, bytes)?;
                sync_flash(&file)
            }),
            Kind::Block { force_ro } => unprotected(force_ro.as_deref(), || self.overwrite(bytes)),
            Kind::File if self.offset == 0 && !self.is_whole() => create(&self.path, bytes),
            Kind::File => self.overwrite(bytes),
        };
        written.map_err(|error| Error::io("writing", &self.path, &error))
    }

    /// Zeroes the first sector of a copy, so that whatever else of it is written it cannot be valid. Flash is erased anyhow.
    pub(super) fn wipe(&self) -> Result<(), Error> {
        let head = vec![0; self.size.min(SECTOR)];
        let wiped = match &self.kind {
            Kind::Flash(_) => return Ok(()),
            Kind::File if !self.is_whole() => return Ok(()),
            Kind::Block { force_ro } => unprotected(force_ro.as_deref(), || self.overwrite(&head)),
            Kind::File => self.overwrite(&head),
        };
        wiped.map_err(|error| Error::io("writing", &self.path, &error))
    }

    /// NOR only: the copy gives way to one that was written before this call.
    pub(super) fn clear(&self, at: usize) -> Result<(), Error> {
        let Kind::Flash(flash) = self.kind else {
            return Ok(());
        };
        self.open_to_write()
            .and_then(|file| {
                flash.clear(&file, at as u64)?;
                sync_flash(&file)
            })
            .map_err(|error| Error::io("writing", &self.path, &error))
    }

    fn open_to_write(&self) -> io::Result<File> {
        OpenOptions::new().read(true).write(true).open(&self.path)
    }

    fn overwrite(&self, bytes: &[u8]) -> io::Result<()> {
        let file = OpenOptions::new().write(true).open(&self.path)?;
        file.write_all_at(bytes, self.offset)?;
        file.sync_all()
    }

    /// The file is there at its size. Its blocks are then its own, whatever their content.
    fn is_whole(&self) -> bool {
        fs::metadata(&self.path)
            .is_ok_and(|meta| meta.len() >= self.offset.saturating_add(self.size as u64))
    }
}

/// A sector that cannot be read, or flash whose error correction gave up.
fn lost(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::IO | Errno::BADMSG))
}

/// MTD character devices write through, and have no fsync.
fn sync_flash(file: &File) -> io::Result<()> {
    match file.sync_all() {
        Err(error) if error.kind() == ErrorKind::InvalidInput => Ok(()),
        other => other,
    }
}

fn create(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

/// `/sys/class/block/mmcblk0boot1/force_ro`, if `path` is such a boot partition.
fn force_ro(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?;
    let (number, boot) = name.strip_prefix("mmcblk")?.split_once("boot")?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    (digits(number) && digits(boot))
        .then(|| Path::new("/sys/class/block").join(name).join("force_ro"))
}

/// Does `write` with the boot partition writable, and protects it again whatever came of it.
fn unprotected(force_ro: Option<&Path>, write: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    let Some(force_ro) = force_ro else {
        return write();
    };
    let protected = fs::read(force_ro)?.first() == Some(&b'1');
    if protected {
        fs::write(force_ro, "0")?;
    }
    let written = write();
    if protected {
        fs::write(force_ro, "1")?;
    }
    written
}
