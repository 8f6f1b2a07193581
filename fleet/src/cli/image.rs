//! The words of `image`.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use clap::builder::PossibleValuesParser;
use offshoot::trust::schema::{HardwareId, RoleName};

use super::{say, warn};
use crate::directory::Fleet;
use crate::image::{self, BOARDS, LayoutSource, Request, Size, Summary, Unit};

/// Make a disk image that boots: what a factory writes to a new device.
///
/// Needs no root, no loop device and no mount: an ordinary user who can read the operator's directory can run it. The image holds the
/// commit, deployed by libostree as on a device, with every owner, mode and extended attribute that the commit has; the bootloader
/// with a boot environment that has nothing on trial; and the unit's /etc/offshoot/config.toml. The commit must have one of this
/// fleet's roots as /usr/lib/offshoot/root.json and no machine id.
///
/// The image is sparse. Beside it is its bmap, which names what there is to write: bmaptool copy disk.img /dev/sdX. The same
/// commit, layout and options make the same bytes. When the device boots it takes the whole of its disk, if its layout says `grow`.
///
/// A board is a layout that comes with the program (x86_64-grub: UEFI and GRUB; arm64-uboot: U-Boot with its environment in two
/// files); --print-layout prints one to start from, --layout takes one from a file.
///
/// Example: offshoot-fleet image --commit os/stable/qemu-x86_64 --board x86_64-grub --channel stable --hardware qemu-x86_64 --output disk.img
#[derive(Args)]
pub(super) struct ImageArguments {
    /// A branch of the repository, or a commit checksum.
    #[arg(
        long,
        value_name = "COMMIT-OR-BRANCH",
        required_unless_present = "print_layout"
    )]
    commit: Option<String>,
    /// A layout that comes with the program.
    #[arg(long, value_parser = PossibleValuesParser::new(BOARDS.map(|(name, _)| name)), required_unless_present = "layout", conflicts_with = "layout")]
    board: Option<String>,
    /// A file with the layout of the disk.
    #[arg(long, value_name = "FILE")]
    layout: Option<PathBuf>,
    /// Print the layout of --board, to start from, and make nothing.
    #[arg(long, requires = "board", exclusive = false)]
    print_layout: bool,
    /// The channel that the device follows.
    #[arg(long, required_unless_present = "print_layout")]
    channel: Option<RoleName>,
    /// The kind of device that it is, one of those in fleet.toml.
    #[arg(long, required_unless_present = "print_layout")]
    hardware: Option<HardwareId>,
    /// The image to write. Its bmap is put beside it, with .bmap after the name.
    #[arg(long, value_name = "FILE", required_unless_present = "print_layout")]
    output: Option<PathBuf>,
    /// Write the bmap to this file instead.
    #[arg(long, value_name = "FILE")]
    bmap: Option<PathBuf>,
    /// The size of the disk (4GiB); without it, and without one in the layout, as small as the content allows.
    #[arg(long)]
    size: Option<Size>,
    /// A word more for the kernel's command line; may be given more than once.
    #[arg(long = "karg", value_name = "ARGUMENT", allow_hyphen_values = true)]
    kernel_arguments: Vec<String>,
    /// The rest of the device's /etc/offshoot/config.toml: its server, for example. Without it, what the commit has there.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The machine id of this one unit, for /etc/machine-id. Without it, a unit makes one when it first boots.
    #[arg(long, value_name = "ID")]
    machine_id: Option<String>,
    /// A file of this one unit, a certificate or a serial number, for /etc/offshoot/identity, which only root may read.
    #[arg(long, value_name = "FILE")]
    identity: Option<PathBuf>,
    /// U-Boot itself, where the layout has it on the disk (`uboot.offset`).
    #[arg(long, value_name = "FILE")]
    uboot: Option<PathBuf>,
    /// The variables compiled into U-Boot, as lines of name=value: u-boot-initial-env of its build. Needed for a board with U-Boot.
    #[arg(long, value_name = "FILE")]
    uboot_environment: Option<PathBuf>,
}

pub(super) fn run(directory: &Path, arguments: &ImageArguments, json: bool) -> Result<()> {
    let layout = match (&arguments.board, &arguments.layout) {
        (_, Some(path)) => LayoutSource::File(path.clone()),
        (Some(board), None) => LayoutSource::Board(board.clone()),
        (None, None) => anyhow::bail!("name a --board or a --layout"),
    };
    let (Some(rev), Some(channel), Some(hardware), Some(output), false) = (
        &arguments.commit,
        &arguments.channel,
        &arguments.hardware,
        &arguments.output,
        arguments.print_layout,
    ) else {
        let board = BOARDS
            .iter()
            .find(|(name, _)| Some(*name) == arguments.board.as_deref());
        return super::out(board.map_or("", |(_, text)| text).as_bytes());
    };
    let request = Request {
        rev: rev.clone(),
        layout,
        unit: Unit {
            channel: channel.clone(),
            hardware: hardware.clone(),
            config: arguments.config.clone(),
            machine_id: arguments.machine_id.clone(),
            identity: arguments.identity.clone(),
        },
        output: output.clone(),
        bmap: arguments.bmap.clone(),
        size: arguments.size,
        kernel_arguments: arguments.kernel_arguments.clone(),
        uboot: arguments.uboot.clone(),
        uboot_environment: arguments.uboot_environment.clone(),
    };
    let summary = image::image(&Fleet::open(directory)?, &request, |step| {
        eprintln!("{step}")
    })?;
    warn(&summary.warnings);
    say(json, &summary, || made(&summary))
}

fn made(summary: &Summary) -> String {
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let mut text = format!(
        "{}\n  {} MiB, {} to write; sha256 {}\n  commit {}",
        summary.image.display(),
        mib(summary.size),
        mib(summary.mapped),
        summary.sha256,
        summary.commit
    );
    if let Some(version) = &summary.version {
        text += &format!(", release {version}");
    }
    for part in &summary.partitions {
        text += &format!(
            "\n  {}: {} MiB, {} used",
            part.name,
            mib(part.size),
            mib(part.used)
        );
    }
    text + &format!(
        "\nWrite it with: bmaptool copy --bmap {} {} DEVICE",
        summary.bmap.display(),
        summary.image.display()
    )
}
