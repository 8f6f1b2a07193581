//! From a commit to a disk that boots, as an ordinary user: no root, no loop device, no mount.
//!
//! - [`layout`]: what is where on the disk.
//! - [`commit`]: the commit's files with all their attributes; [`sysroot`]: libostree deploys it in a directory.
//! - [`mod@unit`]: what this unit has in /etc, and what is refused; [`boot`]: what the bootloader needs.
//! - [`inodes`]: the sysroot's files with the attributes of the commit; [`ext4`], [`fat`]: file systems of them.
//! - [`disk`]: the partitions together, sparse, and the bmap.
//!
//! The same commit, layout and options make the same bytes, with the same versions of the tools. Times are the commit's; GUIDs and serial
//! numbers are digests of the commit and the layout.
//!
//! **Across a power cut.** Everything is made in a directory beside the output and renamed at the end, the image before its bmap. A cut
//! leaves the former image or the new one, perhaps with the former bmap, whose digests then do not fit, and perhaps the directory
//! (`.offshoot-image-…`), which may be removed.

mod boot;
mod commit;
mod disk;
mod ext4;
mod fat;
mod inodes;
mod layout;
mod sysroot;
mod tool;
mod unit;

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use offshoot::commit::{Commit, Sha256};
use offshoot::trust::schema::{HardwareId, RoleName, Version};
use serde::Serialize;

use crate::directory::Fleet;
use crate::publication::Publication;

use self::commit::Tree;
use self::disk::Disk;
use self::inodes::{Inode, Inodes};
use self::layout::{Bootloader, Content, Extent, Filesystem, Layout};
use self::sysroot::Staged;
use self::tool::Workshop;

pub(crate) use self::layout::{BOARDS, Size};
pub(crate) use self::unit::Unit;

/// FAT has no earlier time: 1980-01-01.
const EARLIEST: u64 = 315_532_800;

pub(crate) struct Request {
    pub rev: String,
    pub layout: LayoutSource,
    pub unit: Unit,
    pub output: PathBuf,
    /// `output` with `.bmap` if not given.
    pub bmap: Option<PathBuf>,
    pub size: Option<Size>,
    pub kernel_arguments: Vec<String>,
    /// U-Boot, for a board that has it on the disk.
    pub uboot: Option<PathBuf>,
    pub uboot_environment: Option<PathBuf>,
}

#[derive(Clone, Debug)]
pub(crate) enum LayoutSource {
    Board(String),
    File(PathBuf),
}

/// What was made.
#[derive(Debug, Serialize)]
pub(crate) struct Summary {
    pub image: PathBuf,
    /// Of the whole disk, in bytes.
    pub size: u64,
    /// What there is to write to a unit.
    pub mapped: u64,
    pub sha256: Sha256,
    pub bmap: PathBuf,
    pub bmap_sha256: Sha256,
    pub commit: Commit,
    pub version: Option<String>,
    pub channel: RoleName,
    pub hardware: HardwareId,
    pub bootloader: Bootloader,
    /// Of the trusted root in the commit.
    pub root_version: Version,
    pub partitions: Vec<Part>,
    pub warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Part {
    pub name: String,
    pub start: u64,
    pub size: u64,
    /// What of it is in use.
    pub used: u64,
    pub uuid: String,
}

pub(crate) fn image(fleet: &Fleet, request: &Request, progress: impl Fn(&str)) -> Result<Summary> {
    let (text, layout, beside) = read_layout(&request.layout)?;
    let arguments = kernel_arguments(&layout, request)?;
    let uboot = uboot(&layout, request)?;
    request.unit.check()?;
    fleet.knows(&request.unit.hardware)?;
    let publication = Publication::read(fleet)?;
    publication.channel(&request.unit.channel)?;

    progress("reading the commit");
    let tree = Tree::read(&fleet.repo(), &request.rev)?;
    let root_version = unit::check_root(&tree, fleet, &publication)?;
    unit::check_machine_id(&tree)?;

    let parent = match request.output.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let parent =
        fs::canonicalize(parent).with_context(|| format!("looking at {}", parent.display()))?;
    let scratch = Scratch::new(&parent)?;
    let workshop = Workshop::new(scratch.path(), tree.timestamp.max(EARLIEST));
    // Modes that libostree leaves to the user are not.
    rustix::process::umask(0o022.into());

    progress("deploying it");
    let staged = quietly(|| Staged::deploy(&workshop.path("sysroot"), &tree, &layout, &arguments))?;
    let config = request.unit.install(&staged.deployment(), &tree, &layout)?;
    let tries = config.bootloader.tries;
    if let Some(uboot) = &layout.uboot {
        boot::script(&workshop, uboot, &staged.path.join("boot"))?;
    }
    let inodes = Inodes::of(&staged, &tree)?;

    let environment = match (&layout.uboot, &request.uboot_environment) {
        (Some(uboot), Some(initial)) => boot::environment(uboot, initial, tries)?,
        _ => Vec::new(),
    };
    let makers = Makers {
        workshop: &workshop,
        layout: &layout,
        beside: &beside,
        inodes: &inodes,
        environment: &environment,
        tries,
    };
    let last = layout
        .partitions
        .last()
        .context("the layout has no partition")?;
    let geometry = layout.places(
        makers.least(last),
        request.size,
        uboot.as_ref().map(|uboot| uboot.len() as u64),
    )?;
    let guid = |what: &str| guid(&tree.commit, &text, what);
    let image = workshop.path("disk.img");
    let mut disk = Disk::create(&workshop, &image, &layout, &geometry, guid)?;
    let mut partitions = Vec::new();
    for (partition, place) in layout.partitions.iter().zip(&geometry.places) {
        let name = &partition.name;
        progress(&format!("making the file system {name}"));
        let size = place.end - place.start;
        let file = workshop.path(&format!("{name}.part"));
        let used = makers.make(partition, &file, size, &guid)?;
        disk.put(&file, &used, place.start)?;
        fs::remove_file(&file).with_context(|| format!("removing {}", file.display()))?;
        partitions.push(Part {
            name: name.clone(),
            start: place.start,
            size,
            used: used.iter().map(|range| range.end - range.start).sum(),
            uuid: guid(&format!("partition {name}")),
        });
    }
    put_uboot(&mut disk, &layout, uboot.as_deref(), &environment)?;

    progress("writing the disk");
    let written = disk.finish()?;
    let list = workshop.path("disk.bmap");
    fs::write(&list, &written.bmap).with_context(|| format!("writing {}", list.display()))?;
    let bmap = request.bmap.clone().unwrap_or_else(|| {
        let mut name = request.output.clone().into_os_string();
        name.push(".bmap");
        name.into()
    });
    disk::place(&image, &request.output)?;
    disk::place(&list, &bmap)?;
    Ok(Summary {
        image: request.output.clone(),
        size: geometry.size,
        mapped: written.mapped,
        sha256: written.sha256,
        bmap,
        bmap_sha256: Sha256::of(written.bmap.as_bytes()),
        commit: tree.commit,
        version: tree.version.clone(),
        channel: request.unit.channel.clone(),
        hardware: request.unit.hardware.clone(),
        bootloader: layout.bootloader,
        root_version,
        partitions,
        warnings: unit::warnings(&tree),
    })
}

/// The text, what it says, and the directory that its `files` are relative to.
fn read_layout(source: &LayoutSource) -> Result<(String, Layout, PathBuf)> {
    let (text, what, beside) = match source {
        LayoutSource::Board(board) => {
            let text = BOARDS.iter().find(|(name, _)| name == board);
            let (_, text) = text.with_context(|| format!("there is no board {board}"))?;
            (
                (*text).to_owned(),
                format!("the layout of {board}"),
                PathBuf::from("."),
            )
        }
        LayoutSource::File(path) => {
            let reading = || format!("reading {}", path.display());
            let text = fs::read_to_string(path).with_context(reading)?;
            let beside = path.parent().unwrap_or(Path::new(".")).to_owned();
            (text, path.display().to_string(), beside)
        }
    };
    let layout = Layout::parse(&text).with_context(|| format!("reading {what}"))?;
    Ok((text, layout, beside))
}

fn kernel_arguments<'a>(layout: &'a Layout, request: &'a Request) -> Result<Vec<&'a str>> {
    for argument in &request.kernel_arguments {
        layout::kernel_argument(argument)?;
    }
    let arguments = layout.kernel_arguments.iter();
    let arguments: Vec<_> = arguments
        .chain(&request.kernel_arguments)
        .map(String::as_str)
        .collect();
    if let Some(argument) = arguments.iter().find(|argument| argument.contains('\''))
        && layout.bootloader == Bootloader::Uboot
    {
        bail!("kernel argument {argument:?}: U-Boot's shell cannot quote a single quote");
    }
    Ok(arguments)
}

/// U-Boot itself, if it is to be on the disk.
fn uboot(layout: &Layout, request: &Request) -> Result<Option<Vec<u8>>> {
    let Some(uboot) = &layout.uboot else {
        ensure!(
            request.uboot.is_none() && request.uboot_environment.is_none(),
            "--uboot and --uboot-environment are for a board with U-Boot, and this one boots by GRUB"
        );
        return Ok(None);
    };
    ensure!(
        request.uboot_environment.is_some(),
        "--uboot-environment is missing: the saved environment takes the place of the variables compiled into U-Boot, so it must hold them. \
         Give the file u-boot-initial-env of its build (`make u-boot-initial-env`)"
    );
    match (&uboot.offset, &request.uboot) {
        (Some(_), Some(path)) => {
            let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
            Ok(Some(bytes))
        }
        (Some(at), None) => bail!(
            "--uboot is missing: the layout has U-Boot on the disk, at {:#x}",
            at.0
        ),
        (None, Some(_)) => bail!(
            "--uboot: the layout has no place for U-Boot on the disk: set uboot.offset, or leave out --uboot"
        ),
        (None, None) => Ok(None),
    }
}

fn put_uboot(
    disk: &mut Disk,
    layout: &Layout,
    binary: Option<&[u8]>,
    environment: &[Vec<u8>],
) -> Result<()> {
    let Some(uboot) = &layout.uboot else {
        return Ok(());
    };
    if let (Some(at), Some(binary)) = (uboot.offset, binary) {
        disk.put_bytes(binary, at.0)?;
    }
    for (at, copy) in uboot.environment.offsets.iter().zip(environment) {
        disk.put_bytes(copy, at.0)?;
    }
    Ok(())
}

/// What the file systems are made of.
struct Makers<'a> {
    workshop: &'a Workshop,
    layout: &'a Layout,
    /// Where the layout's `files` are.
    beside: &'a Path,
    inodes: &'a Inodes,
    environment: &'a [Vec<u8>],
    tries: u8,
}

impl Makers<'_> {
    fn inodes(&self, content: Content) -> &[Inode] {
        match content {
            Content::Root => &self.inodes.root,
            Content::Boot => &self.inodes.boot,
            Content::Esp | Content::Environment | Content::Empty => &[],
        }
    }

    /// The least size of the partition.
    fn least(&self, partition: &layout::Partition) -> u64 {
        match (partition.size, partition.filesystem) {
            (Extent::Bytes(size), _) => size,
            (Extent::Rest, Filesystem::Ext4) => {
                ext4::Needs::of(self.inodes(partition.content)).bytes()
            }
            (Extent::Rest, Filesystem::Vfat) => fat::LEAST,
        }
    }

    /// Makes the file system; the parts of it that are in use.
    fn make(
        &self,
        partition: &layout::Partition,
        file: &Path,
        size: u64,
        guid: &impl Fn(&str) -> String,
    ) -> Result<Vec<std::ops::Range<u64>>> {
        let name = &partition.name;
        let uuid = guid(&format!("file system {name}"));
        match partition.filesystem {
            Filesystem::Ext4 => {
                let hash_seed = guid(&format!("hash seed {name}"));
                let identity = ext4::Identity {
                    label: name,
                    uuid: &uuid,
                    hash_seed: &hash_seed,
                };
                ext4::make(
                    self.workshop,
                    file,
                    size,
                    &identity,
                    self.inodes(partition.content),
                )?;
                ext4::used(file)
            }
            Filesystem::Vfat => {
                let mut files = match partition.content {
                    Content::Esp => boot::esp(self.workshop, self.layout, self.tries)?,
                    Content::Environment => self.environment_files(),
                    Content::Boot | Content::Root | Content::Empty => fat::Files::new(),
                };
                if let Some(directory) = &partition.files {
                    fat::collect(&self.beside.join(directory), &mut files)?;
                }
                let serial =
                    u32::from_str_radix(&uuid[..8], 16).context("making a serial number")?;
                fat::make(self.workshop, file, size, name, serial, &files)?;
                Ok(Vec::from([fat::used(file)?]))
            }
        }
    }

    fn environment_files(&self) -> fat::Files {
        let files = self
            .layout
            .uboot
            .iter()
            .flat_map(|uboot| &uboot.environment.files);
        files
            .cloned()
            .zip(self.environment.iter().cloned())
            .collect()
    }
}

/// A UUID (version 8, whose content is one's own) of the commit, the layout and what it is for.
fn guid(commit: &Commit, layout: &str, what: &str) -> String {
    let digest = Sha256::of(format!("offshoot image 1\n{commit}\n{what}\n{layout}").as_bytes());
    let mut bytes = *digest.as_bytes();
    bytes[6] = bytes[6] & 0x0f | 0x80;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes[..16]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    [
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    ]
    .join("-")
}

/// libostree prints notes on standard output, which is for the answer.
fn quietly<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    let kept = rustix::io::dup(rustix::stdio::stdout()).context("keeping standard output")?;
    rustix::stdio::dup2_stdout(rustix::stdio::stderr()).context("moving standard output")?;
    let done = work();
    rustix::stdio::dup2_stdout(&kept).context("restoring standard output")?;
    done
}

/// The directory in which it is made, gone at the end.
struct Scratch(Option<tempfile::TempDir>, PathBuf);

impl Scratch {
    fn new(parent: &Path) -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix(".offshoot-image-")
            .tempdir_in(parent);
        let directory =
            directory.with_context(|| format!("making a directory in {}", parent.display()))?;
        let path = directory.path().to_owned();
        Ok(Self(Some(directory), path))
    }

    fn path(&self) -> &Path {
        &self.1
    }
}

impl Drop for Scratch {
    /// Directories of a commit may forbid their owner to remove what is in them.
    fn drop(&mut self) {
        open_up(&self.1);
        drop(self.0.take());
    }
}

fn open_up(directory: &Path) {
    // What cannot be opened is not removed: nothing more can be done about it.
    if fs::set_permissions(directory, Permissions::from_mode(0o700)).is_err() {
        return;
    }
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            open_up(&entry.path());
        }
    }
}
