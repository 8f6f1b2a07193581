//! The words of what is done with a publication: `fsck`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use jiff::Timestamp as Time;

use super::say;
use crate::directory::Fleet;
use crate::fsck::{self, Report};

/// How many unreferenced files are named to people.
const NAMED: usize = 10;

/// Check that everything that a device may ask for is there, and is what was signed.
///
/// The metadata is verified as a device does it, from the first root on, and every file that a release names is read and matched to its
/// digest. Files that no device asks for are listed; `prune` removes them. Problems are exit code 5.
#[derive(Args)]
pub(super) struct FsckArguments {
    /// A copy of `public`, such as a mounted server, instead.
    #[arg(long, value_name = "DIR")]
    public: Option<PathBuf>,
}

pub(super) fn fsck(
    directory: &Path,
    options: &FsckArguments,
    json: bool,
    now: Time,
) -> Result<ExitCode> {
    let fleet = Fleet::open(directory)?;
    let public = options.public.clone().unwrap_or_else(|| fleet.public());
    let report = fsck::fsck(&fleet, &public, now)?;
    say(json, &report, || checked(&report))?;
    Ok(if report.problems.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(5)
    })
}

fn checked(report: &Report) -> String {
    let Report {
        releases,
        files,
        bytes,
        problems,
        unreferenced,
    } = report;
    let mut lines: Vec<_> = problems
        .iter()
        .map(|problem| format!("problem: {}: {}", problem.path, problem.text))
        .collect();
    lines.push(format!(
        "{releases} releases: {files} files, {bytes} bytes are what was signed"
    ));
    if !unreferenced.paths.is_empty() {
        let count = unreferenced.paths.len();
        lines.push(format!(
            "no device asks for {count} files, {} bytes: `offshoot-fleet prune` removes them",
            unreferenced.bytes
        ));
        lines.extend(
            unreferenced
                .paths
                .iter()
                .take(NAMED)
                .map(|path| format!("  {path}")),
        );
        if count > NAMED {
            lines.push("  …".to_owned());
        }
    }
    lines.join("\n")
}
