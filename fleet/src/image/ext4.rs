//! An ext4 file system of given inodes, as an ordinary user, without mounting it.
//!
//! `mke2fs` makes it empty, and one run of `debugfs` fills it: the inodes in their order, each with its owner, mode, times and extended
//! attributes. So the order of the host's directories, its clock and its umask leave no trace, and nobody has to be root.
//! What takes part of the result is fixed here: features, UUIDs and times; only another version of e2fsprogs may lay it out otherwise.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};

use super::inodes::{Inode, Kind};
use super::layout::MIB;
use super::tool::Workshop;

/// Instead of the host's /etc/mke2fs.conf. GRUB 2.06 and U-Boot 2025.01 read file systems with these features.
const CONF: &str = "\
[defaults]
    base_features = has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum
    default_mntopts = acl,user_xattr
    enable_periodic_fsck = 0
    blocksize = 4096
    inode_size = 256
    inode_ratio = 16384
[fs_types]
    ext4 = {
    }
    small = {
    }
    big = {
    }
    huge = {
    }
";

pub(super) const BLOCK: u64 = 4096;

const EXTENTS: u32 = 0x8_0000;
const IMMUTABLE: u32 = 0x10;

/// Blocks that the content takes, and inodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Needs {
    blocks: u64,
    inodes: u64,
}

impl Needs {
    pub(super) fn of(inodes: &[Inode]) -> Self {
        let mut needs = Self {
            blocks: 0,
            inodes: inodes.len() as u64,
        };
        for inode in inodes {
            needs.blocks += match &inode.kind {
                // Names are short on the average; of a large directory they are counted.
                Kind::Directory => 1,
                Kind::File { length, .. } => length.div_ceil(BLOCK),
                Kind::Link(target) => u64::from(target.len() >= 60),
            };
            let xattrs = inode.attributes.xattrs.iter();
            let xattrs: usize = xattrs
                .map(|(name, value)| name.len() + value.len() + 20)
                .sum();
            needs.blocks += u64::from(xattrs > 60);
            let names: usize = inode
                .paths
                .iter()
                .map(|path| 12 + path.rsplit('/').next().map_or(0, str::len))
                .sum();
            needs.blocks += (names as u64).div_ceil(BLOCK);
        }
        needs
    }

    /// The least size of a file system that holds it, with its own tables, a journal and a tenth to spare.
    pub(super) fn bytes(self) -> u64 {
        let content = self.blocks * BLOCK;
        let tables = self.inodes().max((content / 16384) * 5 / 4) * 256;
        let whole = content + content / 10 + tables;
        let journal = match whole / MIB {
            0..128 => 4,
            128..1024 => 16,
            1024..2048 => 32,
            2048..16384 => 64,
            _ => 128,
        };
        (whole + (journal + 8) * MIB).next_multiple_of(MIB)
    }

    fn inodes(self) -> u64 {
        self.inodes * 5 / 4 + 64
    }
}

/// What makes one file system another.
pub(super) struct Identity<'a> {
    pub label: &'a str,
    pub uuid: &'a str,
    pub hash_seed: &'a str,
}

/// Makes `image`, a file that does not exist, of `size` bytes.
pub(super) fn make(
    workshop: &Workshop,
    image: &Path,
    size: u64,
    identity: &Identity,
    inodes: &[Inode],
) -> Result<()> {
    let needs = Needs::of(inodes);
    let Identity {
        label,
        uuid,
        hash_seed,
    } = identity;
    ensure!(
        size >= needs.bytes(),
        "partition {label} has {} MiB and needs {}: give it a larger `size` in the layout",
        size / MIB,
        needs.bytes() / MIB
    );
    File::create_new(image)
        .and_then(|file| file.set_len(size))
        .with_context(|| format!("making {}", image.display()))?;
    let conf = workshop.path("mke2fs.conf");
    fs::write(&conf, CONF).with_context(|| format!("writing {}", conf.display()))?;
    let mut mke2fs = workshop.tool("mke2fs");
    mke2fs
        .env("MKE2FS_CONFIG", &conf)
        .args(["-q", "-F", "-t", "ext4", "-m0"]);
    // The kernel clears the tables' unused part when it is first mounted, so that it need not be in the image.
    mke2fs.args([
        "-E",
        &format!(
            "hash_seed={hash_seed},lazy_itable_init=1,lazy_journal_init=0,nodiscard,root_owner=0:0"
        ),
    ]);
    mke2fs.args(["-U", uuid, "-L", label]);
    if needs.inodes() > size / 16384 {
        mke2fs.args(["-N", &needs.inodes().to_string()]);
    }
    workshop.run(mke2fs.arg(image), b"")?;
    let script = Script::write(workshop, inodes)?;
    let said = workshop.run(
        workshop.tool("debugfs").args(["-w", "-f", "-"]).arg(image),
        script.as_bytes(),
    )?;
    // It ends well whatever became of its orders, and names itself first: more than that is what went wrong.
    let said = String::from_utf8_lossy(&said);
    if let Some((_, wrong)) = said.trim().split_once('\n') {
        bail!("filling the file system {label}: debugfs: {wrong}");
    }
    workshop.run(workshop.tool("e2fsck").args(["-f", "-n"]).arg(image), b"")?;
    Ok(())
}

/// Orders for debugfs.
struct Script<'a> {
    workshop: &'a Workshop,
    text: String,
    /// The files with the values of extended attributes.
    values: BTreeMap<&'a [u8], usize>,
    directory: Option<&'a str>,
}

impl<'a> Script<'a> {
    fn write(workshop: &'a Workshop, inodes: &'a [Inode]) -> Result<String> {
        let mut script = Self {
            workshop,
            text: String::new(),
            values: BTreeMap::new(),
            directory: None,
        };
        for inode in inodes {
            script.inode(inode)?;
        }
        // Links come last: by then all directories are there.
        for inode in inodes {
            if let [first, others @ ..] = inode.paths.as_slice() {
                for other in others {
                    let name = script.enter(other);
                    let _ = writeln!(
                        script.text,
                        "ln {} {}",
                        quote(&format!("/{first}")),
                        quote(name)
                    );
                }
            }
        }
        Ok(script.text)
    }

    fn inode(&mut self, inode: &'a Inode) -> Result<()> {
        let path = inode.paths.first().map_or("", String::as_str);
        let name = self.enter(path);
        let quoted = quote(name);
        let (kind, flags) = match &inode.kind {
            Kind::Directory if path.is_empty() => (0o040_000, 0),
            Kind::Directory => {
                let _ = writeln!(self.text, "mkdir {quoted}");
                (
                    0o040_000,
                    if inode.immutable {
                        EXTENTS | IMMUTABLE
                    } else {
                        0
                    },
                )
            }
            Kind::File { source, .. } => {
                let source = source
                    .to_str()
                    .context("the scratch directory's name is not UTF-8")?;
                let _ = writeln!(self.text, "write {} {quoted}", quote(source));
                (0o100_000, 0)
            }
            Kind::Link(target) => {
                let _ = writeln!(self.text, "symlink {quoted} {}", quote(target));
                (0o120_000, 0)
            }
        };
        // A name like <12> is a number of an inode, a path is not.
        let this = quote(&format!("./{name}"));
        let mut set = |field: &str, value: String| {
            let _ = writeln!(self.text, "sif {this} {field} {value}");
        };
        let attributes = &inode.attributes;
        set("mode", format!("0{:o}", kind | attributes.mode));
        set("uid", attributes.uid.to_string());
        set("gid", attributes.gid.to_string());
        if inode.epoch {
            set("mtime", "@0".to_owned());
        }
        if inode.paths.len() > 1 {
            set("links_count", inode.paths.len().to_string());
        }
        if flags != 0 {
            set("flags", format!("{flags:#x}"));
        }
        for (attribute, value) in &attributes.xattrs {
            let next = self.values.len();
            let number = *self.values.entry(value).or_insert(next);
            let file = self.workshop.path(&format!("value-{number}"));
            if number == next {
                fs::write(&file, value).with_context(|| format!("writing {}", file.display()))?;
            }
            let file = file
                .to_str()
                .context("the scratch directory's name is not UTF-8")?;
            let attribute = str::from_utf8(attribute)
                .ok()
                .filter(|name| !name.contains(['\n', '\r']));
            let attribute = attribute.with_context(|| {
                format!("{path} has an extended attribute whose name is not one line of text")
            })?;
            let _ = writeln!(
                self.text,
                "ea_set -f {} {this} {}",
                quote(file),
                quote(attribute)
            );
        }
        Ok(())
    }

    /// Goes to the directory of `path`, and returns its name there.
    fn enter(&mut self, path: &'a str) -> &'a str {
        let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
        if self.directory != Some(directory) {
            let _ = writeln!(self.text, "cd {}", quote(&format!("/{directory}")));
            self.directory = Some(directory);
        }
        name
    }
}

fn quote(word: &str) -> String {
    format!("\"{}\"", word.replace('"', "\"\""))
}

/// The bytes of the file system that are not free: what must be on a device whatever was there before. The unused part of the
/// inode tables is not among them.
pub(super) fn used(image: &Path) -> Result<Vec<Range<u64>>> {
    let file = File::open(image).with_context(|| format!("reading {}", image.display()))?;
    let blocks = Superblock::read(&file)
        .and_then(|superblock| superblock.used(&file))
        .with_context(|| format!("reading the file system in {}", image.display()))?;
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for (block, used) in blocks.iter().enumerate() {
        let start = block as u64 * BLOCK;
        match ranges.last_mut() {
            Some(last) if *used && last.end == start => last.end += BLOCK,
            _ if *used => ranges.push(start..start + BLOCK),
            _ => {}
        }
    }
    Ok(ranges)
}

struct Superblock {
    blocks: u64,
    blocks_per_group: u64,
    inodes_per_group: u64,
    inode_size: u64,
    descriptor_size: u64,
    /// Blocks kept for more descriptors, when it grows.
    reserved_descriptors: u64,
}

/// With the feature `sparse_super` the superblock and the descriptors are in groups 0, 1 and the powers of 3, 5 and 7.
fn has_copies(group: u64) -> bool {
    let is_power = |base: u64| {
        (1..)
            .map(|n| base.pow(n))
            .take_while(|power| *power <= group)
            .any(|power| power == group)
    };
    group < 2 || [3, 5, 7].into_iter().any(is_power)
}

fn u16_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(bytes[at]) | u64::from(bytes[at + 1]) << 8
}

fn u32_at(bytes: &[u8], at: usize) -> u64 {
    u16_at(bytes, at) | u16_at(bytes, at + 2) << 16
}

impl Superblock {
    /// As `make` makes them: blocks of 4096 bytes, descriptors of 64-bit file systems.
    fn read(file: &File) -> Result<Self> {
        let mut bytes = [0; 1024];
        file.read_exact_at(&mut bytes, 1024)?;
        let is_ours =
            u16_at(&bytes, 56) == 0xef53 && u32_at(&bytes, 24) == 2 && u16_at(&bytes, 254) >= 64;
        ensure!(
            is_ours,
            "it is not an ext4 file system of 4096-byte blocks with 64-bit descriptors"
        );
        Ok(Self {
            blocks: u32_at(&bytes, 4) | u32_at(&bytes, 336) << 32,
            blocks_per_group: u32_at(&bytes, 32),
            inodes_per_group: u32_at(&bytes, 40),
            inode_size: u16_at(&bytes, 88),
            descriptor_size: u16_at(&bytes, 254),
            reserved_descriptors: u16_at(&bytes, 206),
        })
    }

    fn used(&self, file: &File) -> Result<Vec<bool>> {
        let mut used = vec![false; usize::try_from(self.blocks)?];
        let groups = self.blocks.div_ceil(self.blocks_per_group);
        let descriptors = (groups * self.descriptor_size).div_ceil(BLOCK);
        let mut table = vec![0; usize::try_from(descriptors * BLOCK)?];
        file.read_exact_at(&mut table, BLOCK)?;
        let descriptor = |group: u64| {
            let at = (group * self.descriptor_size) as usize;
            &table[at..at + self.descriptor_size as usize]
        };
        let wide =
            |bytes: &[u8], low: usize, high: usize| u32_at(bytes, low) | u32_at(bytes, high) << 32;
        const BLOCK_BITMAP_UNUSED: u64 = 2;
        for group in 0..groups {
            let bytes = descriptor(group);
            let first = group * self.blocks_per_group;
            let length = self.blocks_per_group.min(self.blocks - first);
            if u16_at(bytes, 18) & BLOCK_BITMAP_UNUSED == 0 {
                let mut bitmap = [0; BLOCK as usize];
                file.read_exact_at(&mut bitmap, wide(bytes, 0, 32) * BLOCK)?;
                for n in 0..length {
                    let bit = bitmap[(n / 8) as usize] >> (n % 8) & 1;
                    used[(first + n) as usize] |= bit == 1;
                }
            } else if has_copies(group) {
                // Nothing else is there.
                let copies = 1 + descriptors + self.reserved_descriptors;
                used[first as usize..(first + copies.min(length)) as usize].fill(true);
            }
        }
        for group in 0..groups {
            let bytes = descriptor(group);
            let unused = u16_at(bytes, 28) | u16_at(bytes, 50) << 16;
            let start = wide(bytes, 8, 40);
            let in_use = ((self.inodes_per_group - unused) * self.inode_size).div_ceil(BLOCK);
            let whole = (self.inodes_per_group * self.inode_size).div_ceil(BLOCK);
            used[(start + in_use) as usize..(start + whole) as usize].fill(false);
        }
        Ok(used)
    }
}
