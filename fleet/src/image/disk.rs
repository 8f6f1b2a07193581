//! The disk: the partition table, what is in its places, and the list of what must be written (bmap).
//!
//! The image is sparse: what no file system uses is a hole. A bmap names the blocks that are not, with their digests, so that a factory
//! writes those alone (`bmaptool copy`). It is not made by looking for holes or zeros: a block of zeros that a file system uses, of the
//! journal above all, must be written too, or what a unit had there before would be read as this system's own.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Read as _;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use offshoot::commit::Sha256;
use sha2::Digest as _;

use super::ext4::BLOCK;
use super::layout::{Geometry, Layout, MIB, SECTOR};
use super::tool::Workshop;

/// Header and entries of a partition table, in front or at the end.
const TABLE: u64 = 34 * SECTOR;

pub(super) struct Disk {
    file: File,
    size: u64,
    used: Vec<Range<u64>>,
}

/// What was written.
pub(super) struct Written {
    pub sha256: Sha256,
    /// Bytes that are not holes.
    pub mapped: u64,
    pub bmap: String,
}

impl Disk {
    /// Makes `path`, a file that does not exist, with the partition table on it.
    pub(super) fn create(
        workshop: &Workshop,
        path: &Path,
        layout: &Layout,
        geometry: &Geometry,
        guid: impl Fn(&str) -> String,
    ) -> Result<Self> {
        let making = || format!("making {}", path.display());
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .with_context(making)?;
        file.set_len(geometry.size).with_context(making)?;
        let mut table = format!("label: gpt\nlabel-id: {}\n", guid("disk"));
        for (partition, place) in layout.partitions.iter().zip(&geometry.places) {
            let _ = writeln!(
                table,
                "start={}, size={}, type={}, uuid={}, name=\"{}\"",
                place.start / SECTOR,
                (place.end - place.start) / SECTOR,
                partition.kind.guid(),
                guid(&format!("partition {}", partition.name)),
                partition.name
            );
        }
        let mut sfdisk = workshop.tool("sfdisk");
        workshop.run(
            sfdisk
                .args(["--quiet", "--no-tell-kernel", "--no-reread"])
                .arg(path),
            table.as_bytes(),
        )?;
        let used = vec![0..TABLE, geometry.size - TABLE..geometry.size];
        Ok(Self {
            file,
            size: geometry.size,
            used,
        })
    }

    /// Puts the `used` parts of a file system at `start`.
    pub(super) fn put(&mut self, image: &Path, used: &[Range<u64>], start: u64) -> Result<()> {
        let from = File::open(image).with_context(|| format!("reading {}", image.display()))?;
        let mut block = vec![0; MIB as usize];
        for range in used {
            let mut at = range.start;
            while at < range.end {
                let length = (range.end - at).min(MIB) as usize;
                let block = &mut block[..length];
                from.read_exact_at(block, at)
                    .with_context(|| format!("reading {}", image.display()))?;
                self.write(block, start + at)?;
                at += length as u64;
            }
            self.used.push(start + range.start..start + range.end);
        }
        Ok(())
    }

    /// Puts bytes at `start`.
    pub(super) fn put_bytes(&mut self, bytes: &[u8], start: u64) -> Result<()> {
        self.write(bytes, start)?;
        self.used.push(start..start + bytes.len() as u64);
        Ok(())
    }

    /// Zeros stay holes: the list says that they are to be written.
    fn write(&self, bytes: &[u8], at: u64) -> Result<()> {
        for (n, block) in bytes.chunks(BLOCK as usize).enumerate() {
            if block.iter().any(|byte| *byte != 0) {
                self.file
                    .write_all_at(block, at + n as u64 * BLOCK)
                    .context("writing the disk")?;
            }
        }
        Ok(())
    }

    /// Reads it through once.
    pub(super) fn finish(self) -> Result<Written> {
        let ranges = blocks(self.used, self.size);
        let mut whole = sha2::Sha256::new();
        let mut block = vec![0; MIB as usize];
        let mut at = 0;
        let mut rows = String::new();
        let mut mapped = 0;
        let mut file = &self.file;
        std::io::Seek::rewind(&mut file).context("reading the disk")?;
        let mut take = |whole: &mut sha2::Sha256,
                        until: u64,
                        mut digest: Option<&mut sha2::Sha256>|
         -> Result<()> {
            while at < until {
                let length = (until - at).min(MIB) as usize;
                file.read_exact(&mut block[..length])
                    .context("reading the disk")?;
                whole.update(&block[..length]);
                if let Some(digest) = &mut digest {
                    digest.update(&block[..length]);
                }
                at += length as u64;
            }
            Ok(())
        };
        for Range { start, end } in ranges {
            take(&mut whole, start * BLOCK, None)?;
            let mut digest = sha2::Sha256::new();
            take(&mut whole, end * BLOCK, Some(&mut digest))?;
            let digest = Sha256::from_bytes(digest.finalize().into());
            let _ = match end - start {
                1 => writeln!(rows, "        <Range chksum=\"{digest}\"> {start} </Range>"),
                _ => writeln!(
                    rows,
                    "        <Range chksum=\"{digest}\"> {start}-{} </Range>",
                    end - 1
                ),
            };
            mapped += end - start;
        }
        take(&mut whole, self.size, None)?;
        Ok(Written {
            sha256: Sha256::from_bytes(whole.finalize().into()),
            mapped: mapped * BLOCK,
            bmap: bmap(self.size, mapped, &rows),
        })
    }
}

/// Whole blocks, in order, none twice.
fn blocks(mut used: Vec<Range<u64>>, size: u64) -> Vec<Range<u64>> {
    used.sort_by_key(|range| range.start);
    let mut blocks: Vec<Range<u64>> = Vec::new();
    for range in used {
        let (start, end) = (range.start / BLOCK, range.end.min(size).div_ceil(BLOCK));
        match blocks.last_mut() {
            Some(last) if start <= last.end => last.end = last.end.max(end),
            _ => blocks.push(start..end),
        }
    }
    blocks
}

/// Version 2.0 of the format, as bmaptool writes it. Its own digest is taken with zeros in the digest's place.
fn bmap(size: u64, mapped: u64, rows: &str) -> String {
    let text = |own: &str| {
        format!(
            "\
<?xml version=\"1.0\" ?>
<bmap version=\"2.0\">
    <ImageSize> {size} </ImageSize>
    <BlockSize> {BLOCK} </BlockSize>
    <BlocksCount> {} </BlocksCount>
    <MappedBlocksCount> {mapped} </MappedBlocksCount>
    <ChecksumType> sha256 </ChecksumType>
    <BmapFileChecksum> {own} </BmapFileChecksum>
    <BlockMap>
{rows}    </BlockMap>
</bmap>
",
            size / BLOCK
        )
    };
    let digest = Sha256::of(text(&"0".repeat(64)).as_bytes()).to_string();
    text(&digest)
}

/// Renames what was made to where it is wanted, through the disk.
pub(super) fn place(from: &Path, to: &Path) -> Result<()> {
    let placing = || format!("writing {}", to.display());
    let place = || -> std::io::Result<()> {
        File::open(from)?.sync_all()?;
        fs::rename(from, to)?;
        let above = to.parent().filter(|above| *above != Path::new(""));
        File::open(above.unwrap_or(Path::new(".")))?.sync_all()
    };
    place().with_context(placing)
}
