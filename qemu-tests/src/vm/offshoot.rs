//! What the test bed asks of Offshoot in the guest.

use std::fs;

use anyhow::{Context as _, Result};
use bootloader_glue::Bootloader;
use bootloader_glue::protocol::Environment;
use offshoot::commit::Commit;
use offshoot::status::Status;

use super::Vm;

impl Vm {
    /// `offshoot status --json`.
    pub fn status(&mut self) -> Result<Status> {
        let status = self.ask(["offshoot", "status", "--json"])?;
        serde_json::from_str(&status).with_context(|| format!("reading {status:?}"))
    }

    /// The boot environment, read off the guest's files and not told by its agent.
    pub fn environment(&mut self) -> Result<Environment> {
        let directory = tempfile::tempdir()?;
        for copy in ["env.0", "env.1"] {
            let path = format!("/efi/offshoot/{copy}");
            let content = self.run(["cat", &path])?;
            if content.status == 0 {
                fs::write(directory.path().join(copy), content.stdout)?;
            }
        }
        let bootloader = Bootloader::Grub {
            environment: directory.path().to_owned(),
            boot: directory.path().to_owned(),
        };
        Ok(bootloader.read()?)
    }

    /// The commit of the deployment that the guest runs, read from the path that the kernel command line names.
    pub fn booted_commit(&mut self) -> Result<Commit> {
        let script = "basename \"$(readlink --canonicalize \"/sysroot$(sed 's/.*ostree=\\([^ ]*\\).*/\\1/' /proc/cmdline)\")\"";
        let deployment = self.ask(["/bin/sh", "-c", script])?;
        let commit = deployment.split('.').next().unwrap_or_default();
        commit
            .parse()
            .with_context(|| format!("{deployment:?} is no deployment's name"))
    }
}
