//! What the test bed asks of Offshoot in the guest.

use std::fs;

use anyhow::{Context as _, Result};
use bootloader_glue::Bootloader;
use bootloader_glue::protocol::Environment;
use bootloader_glue::uboot::Copies;
use bootloader_glue::uboot::image::Flags;
use offshoot::commit::Commit;
use offshoot::status::Status;

use super::Vm;
use crate::board::Board;
use crate::uboot::{COPIES, LAYOUT};

impl Vm {
    /// `offshoot status --json`.
    pub fn status(&mut self) -> Result<Status> {
        let status = self.ask(["offshoot", "status", "--json"])?;
        serde_json::from_str(&status).with_context(|| format!("reading {status:?}"))
    }

    /// The boot environment, read off the guest's files and not told by its agent.
    pub fn environment(&mut self) -> Result<Environment> {
        let board = self.options.board;
        let mut read = |path: &str| self.read_file(path);
        if board != Board::Pc {
            let [first, second] = COPIES.map(|name| read(&format!("/uboot/{name}")));
            return Ok(Copies::new(LAYOUT, Flags::Incremental, &[first?, second?]).environment());
        }
        let directory = tempfile::tempdir()?;
        for copy in ["env.0", "env.1"] {
            if let Some(bytes) = read(&format!("/efi/offshoot/{copy}"))? {
                fs::write(directory.path().join(copy), bytes)?;
            }
        }
        let bootloader = Bootloader::Grub {
            environment: directory.path().to_owned(),
            boot: directory.path().to_owned(),
        };
        Ok(bootloader.read()?)
    }

    /// The commit of the deployment that the guest runs: the directory of the root file system that is mounted as `/`.
    pub fn booted_commit(&mut self) -> Result<Commit> {
        let root = self.ask(["findmnt", "--noheadings", "--output=FSROOT", "/"])?;
        let deployment = root.rsplit('/').next().unwrap_or_default();
        let commit = deployment.split('.').next().unwrap_or_default();
        commit
            .parse()
            .with_context(|| format!("{root:?} is no deployment"))
    }
}
