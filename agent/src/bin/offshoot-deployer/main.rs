//! The only program on the device that links libostree: one operation a run, JSON out, no network, killable at any moment.
//!
//! Everything it is given has been checked against signed digests by the daemon. A power cut leaves what libostree's own order of
//! writes leaves: objects of a transaction are whole or not there, and the bootloader's entries swap with one rename; the next run
//! of the same verb clears up and goes on.

mod sysroot;

use std::fs::File;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use offshoot::commit::Commit;
use offshoot::deployment::{Failure, FailureKind};
use rustix::process::{Resource, Rlimit, setrlimit};
use serde_json::json;
use sysroot::Sysroot;

/// Deploys OSTree commits for the Offshoot daemon: one operation a run, one JSON object on standard output.
///
/// Exit codes: 0 done, 1 libostree failed, 2 usage, 3 the sysroot is locked by another program, 4 no space, 5 corrupt delta,
/// 6 incomplete commit, 7 the running deployment is concerned, 8 the sysroot is not set up for updates.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The root of the system.
    #[arg(long, default_value = "/")]
    sysroot: PathBuf,
    /// What writes grub.cfg, for libostree to run.
    #[arg(long, default_value = "/usr/lib/ostree/ostree-grub-generator")]
    bootloader_generator: PathBuf,
    /// How much memory it may take, in MiB.
    #[arg(long, default_value_t = 512)]
    memory: u64,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// The deployments in boot order, and the free space. Writes nothing, takes no lock.
    Status,
    /// Which commits are complete in the repository, and held there by a ref. Writes nothing, takes no lock.
    Stored {
        #[arg(long, required = true)]
        commit: Vec<Commit>,
    },
    /// Which objects of an index are not in the repository. Writes nothing, takes no lock.
    Missing {
        #[arg(long)]
        index: PathBuf,
    },
    /// Stores the objects of an index that are missing, from a directory with `<checksum>.<kind>` files, and so the commit.
    Import {
        #[arg(long)]
        index: PathBuf,
        #[arg(long)]
        spool: PathBuf,
        #[arg(long)]
        commit: Commit,
    },
    /// Whether there is room for a release, and a bootloader set up to take it. Writes nothing.
    Preflight {
        /// The bytes that the release unpacks to.
        #[arg(long)]
        unpacked: u64,
        /// The objects that it adds to the repository, as far as they are known.
        #[arg(long, default_value_t = 0)]
        objects: u64,
    },
    /// Stores a delta, in a directory with `superblock`, `0`, `1` …, in the repository.
    Apply {
        #[arg(long)]
        spool: PathBuf,
        #[arg(long)]
        commit: Commit,
    },
    /// Deploys a commit beside the running system and makes it the default; /etc is merged now.
    Deploy {
        #[arg(long)]
        commit: Commit,
    },
    /// Removes every deployment of a commit but the running one.
    Undeploy {
        #[arg(long)]
        commit: Commit,
    },
    /// Removes deployments that are neither running, pinned nor kept, and objects that nothing refers to.
    Prune {
        #[arg(long)]
        keep: Vec<Commit>,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match speak(&arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("offshoot-deployer: standard output: {error}");
            ExitCode::FAILURE
        }
    }
}

/// libostree prints notes on standard output; that is for one JSON object, so everything else goes to standard error.
fn speak(arguments: &Arguments) -> io::Result<ExitCode> {
    let mut answer = File::from(rustix::io::dup(rustix::stdio::stdout())?);
    rustix::stdio::dup2_stdout(rustix::stdio::stderr())?;
    match run(arguments) {
        Ok(value) => {
            writeln!(answer, "{value}")?;
            Ok(ExitCode::SUCCESS)
        }
        Err(failure) => {
            writeln!(answer, "{}", json!({ "error": failure }))?;
            eprintln!("offshoot-deployer: {failure}");
            Ok(ExitCode::from(failure.kind.code()))
        }
    }
}

fn run(arguments: &Arguments) -> Result<serde_json::Value, Failure> {
    let limit = Some(arguments.memory << 20);
    setrlimit(
        Resource::Data,
        Rlimit {
            current: limit,
            maximum: limit,
        },
    )
    .map_err(|error| Failure {
        kind: FailureKind::Unsuited,
        message: format!("limiting memory to {} MiB: {error}", arguments.memory),
    })?;
    let look = || Sysroot::look(&arguments.sysroot, &arguments.bootloader_generator);
    let lock = || Sysroot::lock(&arguments.sysroot, &arguments.bootloader_generator);
    let value = match &arguments.verb {
        Verb::Status => json!(look()?.status()?),
        Verb::Stored { commit } => json!(look()?.stored(commit)?),
        Verb::Missing { index } => json!(look()?.missing(index)?),
        Verb::Import {
            index,
            spool,
            commit,
        } => json!(lock()?.import(index, spool, *commit)?),
        Verb::Preflight { unpacked, objects } => json!(look()?.preflight(*unpacked, *objects)?),
        Verb::Apply { spool, commit } => json!(lock()?.apply(spool, *commit)?),
        Verb::Deploy { commit } => json!(lock()?.deploy(*commit)?),
        Verb::Undeploy { commit } => json!(lock()?.undeploy(*commit)?),
        Verb::Prune { keep } => json!(lock()?.prune(keep)?),
    };
    Ok(value)
}
