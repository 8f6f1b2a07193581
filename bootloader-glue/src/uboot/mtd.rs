//! MTD character devices: what NOR and NAND flash need besides read and write.
//!
//! Owns the kernel's ioctls (`mtd/mtd-abi.h`). A sector is erased to ones before it is written; a power cut in between leaves a copy
//! whose CRC is wrong. Sectors that hold anything besides the environment are refused, not preserved: they would be lost with it.

#![allow(unsafe_code, reason = "ioctls; each carries a SAFETY comment")]

use std::ffi::c_void;
use std::fs::File;
use std::io::{self, Error, ErrorKind};
use std::os::unix::fs::FileExt as _;

use rustix::ioctl::{Getter, Ioctl, IoctlOutput, Opcode, Setter, ioctl, opcode};

const NOR: u8 = 3;
const NAND: u8 = 4;

#[repr(C)]
struct Info {
    kind: u8,
    flags: u32,
    size: u32,
    erase_size: u32,
    write_size: u32,
    oob_size: u32,
    padding: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Range {
    start: u32,
    length: u32,
}

const GET_INFO: Opcode = opcode::read::<Info>(b'M', 1);
const ERASE: Opcode = opcode::write::<Range>(b'M', 2);
const LOCK: Opcode = opcode::write::<Range>(b'M', 5);
const UNLOCK: Opcode = opcode::write::<Range>(b'M', 6);
const GET_BAD_BLOCK: Opcode = opcode::write::<i64>(b'M', 11);

/// A region of flash that holds one copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Flash {
    pub(super) nand: bool,
    offset: u64,
    size: usize,
    sector: u64,
    /// How many sectors may be used, bad ones included.
    sectors: u64,
    page: usize,
    no_lock: bool,
}

/// What the configuration says of the region.
pub(super) struct Region {
    pub(super) offset: u64,
    pub(super) size: usize,
    pub(super) sector: Option<u64>,
    pub(super) sectors: Option<u64>,
    pub(super) no_lock: bool,
}

impl Flash {
    pub(super) fn new(file: &File, region: &Region) -> io::Result<Self> {
        // SAFETY: MEMGETINFO fills a struct mtd_info_user, which `Info` mirrors.
        let info = unsafe { ioctl(file, Getter::<GET_INFO, Info>::new()) }?;
        if info.kind != NOR && info.kind != NAND {
            return Err(refused(format!(
                "it is flash of type {}, neither NOR (3) nor NAND (4)",
                info.kind
            )));
        }
        let sector = region.sector.unwrap_or(info.erase_size.into());
        let least = (region.size as u64).div_ceil(sector.max(1));
        let sectors = region.sectors.unwrap_or(least);
        if sector == 0 || !region.offset.is_multiple_of(sector) || sectors < least {
            return Err(refused(format!(
                "the environment must begin at a sector and lie in its sectors: offset {:#x}, size {:#x}, {sectors} sectors of {sector:#x}",
                region.offset, region.size
            )));
        }
        Ok(Self {
            nand: info.kind == NAND,
            offset: region.offset,
            size: region.size,
            sector,
            sectors,
            page: info.write_size.max(1) as usize,
            no_lock: region.no_lock,
        })
    }

    pub(super) fn read(&self, file: &File) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; self.size];
        for (at, chunk) in self
            .good(file)?
            .into_iter()
            .zip(bytes.chunks_mut(self.sector as usize))
        {
            file.read_exact_at(chunk, at)?;
        }
        Ok(bytes)
    }

    pub(super) fn write(&self, file: &File, bytes: &[u8]) -> io::Result<()> {
        let good = self.good(file)?;
        let chunks = || good.iter().copied().zip(bytes.chunks(self.sector as usize));
        for (at, chunk) in chunks() {
            let mut rest = vec![0; self.sector as usize - chunk.len()];
            file.read_exact_at(&mut rest, at + chunk.len() as u64)?;
            if rest.iter().any(|byte| *byte != 0xff) {
                return Err(refused(format!(
                    "the sector at {at:#x} holds something besides the environment, which an erase would take away"
                )));
            }
        }
        for (at, chunk) in chunks() {
            let range = self.range(at)?;
            self.protect::<UNLOCK>(file, range);
            // SAFETY: MEMERASE reads a struct erase_info_user, which `Range` mirrors.
            unsafe { ioctl(file, Setter::<ERASE, Range>::new(range)) }?;
            let mut padded = chunk.to_vec();
            padded.resize(chunk.len().next_multiple_of(self.page), 0xff);
            file.write_all_at(&padded, at)?;
            self.protect::<LOCK>(file, range);
        }
        Ok(())
    }

    /// NOR only: programs one byte to zero, which needs no erase.
    pub(super) fn clear(&self, file: &File, at: u64) -> io::Result<()> {
        let range = self.range(self.offset)?;
        self.protect::<UNLOCK>(file, range);
        file.write_all_at(&[0], self.offset + at)?;
        self.protect::<LOCK>(file, range);
        Ok(())
    }

    /// The good sectors that hold the environment.
    fn good(&self, file: &File) -> io::Result<Vec<u64>> {
        let needed = self.size.div_ceil(self.sector as usize);
        let mut good = Vec::with_capacity(needed);
        for n in 0..self.sectors {
            let at = self.offset + n * self.sector;
            // SAFETY: MEMGETBADBLOCK reads a loff_t and answers by its result.
            if good.len() < needed && !(self.nand && unsafe { ioctl(file, BadBlock(at as i64)) }?) {
                good.push(at);
            }
        }
        if good.len() < needed {
            return Err(refused(format!(
                "{} of its {} sectors are good, {needed} are needed",
                good.len(),
                self.sectors
            )));
        }
        Ok(good)
    }

    fn range(&self, at: u64) -> io::Result<Range> {
        let narrow = |number: u64| {
            u32::try_from(number).map_err(|_| refused(format!("{number:#x} is beyond 4 GiB")))
        };
        Ok(Range {
            start: narrow(at)?,
            length: narrow(self.sector)?,
        })
    }

    /// Not every flash can be locked: what cannot is written anyhow, and read back.
    fn protect<const OPCODE: Opcode>(&self, file: &File, range: Range) {
        if !self.no_lock {
            // SAFETY: MEMLOCK and MEMUNLOCK read a struct erase_info_user, which `Range` mirrors.
            let _unsupported = unsafe { ioctl(file, Setter::<OPCODE, Range>::new(range)) };
        }
    }
}

fn refused(why: String) -> Error {
    Error::new(ErrorKind::InvalidInput, why)
}

/// MEMGETBADBLOCK, whose answer is the ioctl's result.
struct BadBlock(i64);

// SAFETY: the opcode reads the loff_t that `as_ptr` points to, and nothing is written.
unsafe impl Ioctl for BadBlock {
    type Output = bool;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        GET_BAD_BLOCK
    }

    fn as_ptr(&mut self) -> *mut c_void {
        (&raw mut self.0).cast()
    }

    unsafe fn output_from_ptr(
        output: IoctlOutput,
        _pointer: *mut c_void,
    ) -> rustix::io::Result<bool> {
        Ok(output > 0)
    }
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};

    use super::*;

    /// As a C program with `<mtd/mtd-user.h>` prints them, on x86_64 and arm64.
    #[test]
    fn the_ioctls_are_the_kernels() {
        assert_eq!(
            [GET_INFO, ERASE, LOCK, UNLOCK, GET_BAD_BLOCK],
            [
                0x8020_4d01,
                0x4008_4d02,
                0x4008_4d05,
                0x4008_4d06,
                0x4008_4d0b
            ]
        );
        assert_eq!((size_of::<Info>(), size_of::<Range>()), (32, 8));
        assert_eq!(
            (offset_of!(Info, erase_size), offset_of!(Info, write_size)),
            (12, 16)
        );
    }
}
