//! The operator's tool. Read the modules in this order:
//!
//! - [`directory`]: the operator's directory and its settings; [`keys`]: the private keys in it.
//! - [`compose`]: from a root file system to an OSTree commit.
//! - [`publish`]: from a commit to a release; [`delta`], [`objects`]: what devices download of it; [`writer`]: how files get into `public/`.
//! - [`publication`]: the signed metadata; [`init`] makes the first, [`refresh`] signs again what expires,
//!   [`rotate`] replaces keys, [`prune`] removes former releases, [`status`] tells.
//! - [`prepared`]: signing that is split over people and machines.
//! - [`push`]: to where devices ask for it.
//! - [`bundle`]: a release on a stick, for devices without a network.
//! - [`image`]: from a commit to a disk that boots.
//! - [`content`]: every file that a device may ask for; [`verify`]: what a device makes of them; [`fsck`] reads them all.
//! - [`serve`]: `public/` over HTTPS, for a bench.

#[cfg(test)]
mod bench;
mod bundle;
mod cli;
mod compose;
mod content;
mod delta;
#[cfg(test)]
#[path = "../tests/it/device.rs"]
mod device;
mod directory;
mod fsck;
mod image;
mod init;
mod keys;
mod objects;
mod prepared;
mod prune;
mod publication;
mod publish;
mod push;
mod refresh;
mod rotate;
mod serve;
mod status;
mod verify;
mod writer;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
