//! A FAT32 file system of given files, as an ordinary user, without mounting it.
//!
//! `mkfs.vfat` makes it empty and mtools put the files on it, in the order of their names. Serial number and times are given, so the
//! same files are the same bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

use super::layout::MIB;
use super::tool::Workshop;

/// The least that FAT32 is made for.
pub(super) const LEAST: u64 = 33 * MIB;

/// Contents by path, without a leading slash.
pub(super) type Files = BTreeMap<String, Vec<u8>>;

/// Adds everything below `directory`.
pub(super) fn collect(directory: &Path, into: &mut Files) -> Result<()> {
    collect_below(directory, "", into)
}

fn collect_below(directory: &Path, prefix: &str, into: &mut Files) -> Result<()> {
    let reading = || format!("reading {}", directory.display());
    for entry in fs::read_dir(directory).with_context(reading)? {
        let entry = entry.with_context(reading)?;
        let name = entry.file_name();
        let name = name
            .to_str()
            .with_context(|| format!("{name:?} is not UTF-8"))?;
        let path = format!("{prefix}{name}");
        if entry.file_type().with_context(reading)?.is_dir() {
            collect_below(&entry.path(), &format!("{path}/"), into)?;
        } else {
            let content = fs::read(entry.path())
                .with_context(|| format!("reading {}", entry.path().display()))?;
            into.insert(path, content);
        }
    }
    Ok(())
}

/// Makes `image`, a file that does not exist, of `size` bytes.
pub(super) fn make(
    workshop: &Workshop,
    image: &Path,
    size: u64,
    label: &str,
    serial: u32,
    files: &Files,
) -> Result<()> {
    File::create_new(image)
        .and_then(|file| file.set_len(size))
        .with_context(|| format!("making {}", image.display()))?;
    let mut mkfs = workshop.tool("mkfs.vfat");
    mkfs.args(["--invariant", "-n", label, "-i", &format!("{serial:08x}")]);
    mkfs.arg("-F32");
    // A small one needs small clusters to be FAT32.
    if size < 260 * MIB {
        mkfs.arg("-s1");
    }
    workshop.run(mkfs.arg(image), b"")?;
    let mut made = BTreeSet::new();
    for (n, (path, content)) in files.iter().enumerate() {
        for (at, _) in path.match_indices('/') {
            let directory = &path[..at];
            if made.insert(directory) {
                workshop.run(
                    workshop
                        .tool("mmd")
                        .arg("-i")
                        .arg(image)
                        .arg(format!("::{directory}")),
                    b"",
                )?;
            }
        }
        let file = workshop.path(&format!("file-{n}"));
        fs::write(&file, content).with_context(|| format!("writing {}", file.display()))?;
        let mut mcopy = workshop.tool("mcopy");
        mcopy
            .arg("-i")
            .arg(image)
            .arg(&file)
            .arg(format!("::{path}"));
        workshop
            .run(&mut mcopy, b"")
            .with_context(|| format!("putting {path} on partition {label}"))?;
        fs::remove_file(&file).with_context(|| format!("removing {}", file.display()))?;
    }
    Ok(())
}

/// The bytes that must be on a device whatever was there before: everything up to the last cluster that is not free. Clusters are given out
/// from the beginning on.
pub(super) fn used(image: &Path) -> Result<Range<u64>> {
    let reading = || format!("reading {}", image.display());
    let file = File::open(image).with_context(reading)?;
    let mut boot = [0; 512];
    file.read_exact_at(&mut boot, 0).with_context(reading)?;
    let number = |at: usize, bytes: usize| {
        let bytes = boot[at..at + bytes].iter().rev();
        bytes.fold(0, |number, byte| number << 8 | u64::from(*byte))
    };
    let (sector, cluster) = (number(11, 2), number(11, 2) * number(13, 1));
    let (reserved, tables, table) = (number(14, 2), number(16, 1), number(36, 4));
    ensure!(
        sector == 512 && cluster > 0 && number(22, 2) == 0,
        "{} is not FAT32",
        image.display()
    );
    let mut entries = vec![0; usize::try_from(table * sector)?];
    file.read_exact_at(&mut entries, reserved * sector)
        .with_context(reading)?;
    let last = entries.chunks_exact(4).rposition(|entry| entry != [0; 4]);
    // The first two entries are of no cluster.
    let clusters = last.map_or(0, |last| (last as u64 + 1).saturating_sub(2));
    let end = (reserved + tables * table) * sector + clusters * cluster;
    Ok(0..end)
}
