//! The disk of a device and the fleet that it belongs to, as the factory delivers it: `offshoot-fleet image` makes it, of one of the layouts in
//! `qemu-tests/layouts`.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use offshoot::commit::Commit;

use crate::board::Board;
use crate::cache::{Cache, Ingredients};
use crate::fleet::{CHANNEL, Fleet};
use crate::release::Release;
use crate::uboot::Uboot;
use crate::{host, os};

const LAYOUT: &str = "layout.toml";
const UBOOT_ENVIRONMENT: &str = "u-boot-initial-env";

/// A device as the factory delivers it, and the fleet that it belongs to.
#[derive(Clone, Debug)]
pub struct Image {
    /// Never written to: machines run on overlays of it.
    pub disk: PathBuf,
    /// What it boots: release [`FIRST`].
    pub commit: Commit,
    /// The operator's directory, with that release published. Never written to: [`Fleet::copy`].
    pub fleet: PathBuf,
}

/// The release that devices leave the factory with.
pub const FIRST: &str = "1.0.0";

pub fn factory(cache: &Cache, board: Board) -> Result<Image> {
    let base = os::base_tree(cache, board)?;
    let release = Release::good(FIRST);
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut ingredients = Ingredients::default()
        .text(&base.to_string_lossy())
        .path(&manifest.join("../agent/units"))?
        .path(&manifest.join("../agent/health"))?;
    for source in [
        "board.rs",
        "fleet.rs",
        "image.rs",
        "release.rs",
        "server.rs",
    ] {
        ingredients = ingredients.path(&manifest.join("src").join(source))?;
    }
    for program in ["offshoot", "offshoot-deployer", "ostree-grub-generator"] {
        ingredients = ingredients.path(&board.program(program)?)?;
    }
    ingredients = ingredients.path(&host::program("offshoot-fleet")?)?;
    if let Board::Virt(count) = board {
        let defaults = Uboot::build(cache, count)?.defaults()?;
        ingredients = ingredients.text(&defaults);
    }
    ingredients = ingredients.text(&board.layout());
    let entry = cache.entry(&board.image(), ingredients, |entry| {
        host::timed("making the factory's image", || {
            build(cache, board, &release, entry)
        })
    })?;
    Ok(Image {
        disk: entry.join("disk.img"),
        commit: fs::read_to_string(entry.join("commit"))?.parse()?,
        fleet: entry.join("fleet"),
    })
}

fn build(cache: &Cache, board: Board, release: &Release, entry: &Path) -> Result<()> {
    let fleet = Fleet::init(board, &entry.join("fleet"))?;
    let commit = host::timed("  composing and publishing the release", || {
        fleet.publish(cache, release)
    })?;
    fs::write(entry.join("commit"), commit.to_string())?;
    fs::write(entry.join(LAYOUT), board.layout())?;
    if let Board::Virt(count) = board {
        let initial = Uboot::build(cache, count)?.initial_environment();
        fs::copy(&initial, entry.join(UBOOT_ENVIRONMENT))
            .with_context(|| format!("copying {}", initial.display()))?;
    }
    host::timed("  making the disk", || {
        let arguments = arguments(board, commit, entry, &entry.join("disk.img"));
        host::run(fleet.command()?.args(arguments)).map(drop)
    })
}

/// What `offshoot-fleet` is told to make the disk; the layout, and what U-Boot has compiled in, are in `directory`.
pub fn arguments(board: Board, commit: Commit, directory: &Path, output: &Path) -> Vec<OsString> {
    let file = |option: &str, path: &Path| -> [OsString; 2] { [option.into(), path.into()] };
    let mut arguments: Vec<OsString> = vec![
        "image".into(),
        format!("--commit={commit}").into(),
        format!("--channel={CHANNEL}").into(),
        format!("--hardware={}", board.hardware()).into(),
    ];
    arguments.extend(file("--layout", &directory.join(LAYOUT)));
    arguments.extend(file("--output", output));
    if let Board::Virt(_) = board {
        let initial = directory.join(UBOOT_ENVIRONMENT);
        arguments.extend(file("--uboot-environment", &initial));
    }
    arguments
}
