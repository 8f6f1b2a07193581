//! The operator's tool. So far: [`compose`], from a root file system to an OSTree commit.

mod compose;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use serde_json::json;

/// Composes OS releases for devices that Offshoot updates.
///
/// Exit codes: 0 done, 1 failed (the reason is on standard error), 2 usage.
#[derive(Parser)]
#[command(name = "offshoot-fleet", version)]
struct Arguments {
    /// Answer in JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Turn a root file system into an OSTree commit.
    ///
    /// The directory is not changed. Owners, modes and extended attributes are kept as they are, so run it as root on a tree
    /// that has the device's own. What OSTree wants elsewhere goes there: /etc becomes /usr/etc, the kernel and the initramfs
    /// go to /usr/lib/modules/VERSION, /var is left out, /home, /root, /srv, /opt, /mnt and /usr/local become links into it. The
    /// same tree and the same --timestamp give the same commit.
    ///
    /// Example: offshoot-fleet compose --tree rootfs --repo ostree --branch os/stable/qemu-x86_64 --release 1.4.0
    Compose {
        /// The root file system.
        #[arg(long)]
        tree: PathBuf,
        /// The OSTree repository; made if it does not exist.
        #[arg(long)]
        repo: PathBuf,
        /// The branch to move to the new commit.
        #[arg(long)]
        branch: String,
        /// The version to write into the commit.
        #[arg(long)]
        release: String,
        /// The commit's time, in seconds since 1970.
        #[arg(long, env = "SOURCE_DATE_EPOCH", default_value_t = 0)]
        timestamp: u64,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let Verb::Compose {
        tree,
        repo,
        branch,
        release,
        timestamp,
    } = &arguments.verb;
    match compose::compose(tree, repo, branch, release, *timestamp) {
        Ok(composed) => {
            if arguments.json {
                println!("{}", json!(composed));
            } else {
                println!("{}", composed.commit);
                eprintln!(
                    "kernel {}, {} packages, {} files; {} entries of /var left out",
                    composed.kernel, composed.packages, composed.files, composed.left_out
                );
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("offshoot-fleet: {error:#}");
            ExitCode::FAILURE
        }
    }
}
