//! The words of what is done with a publication: `push`, `bundle`, `fsck`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use jiff::Timestamp as Time;
use offshoot::commit::Commit;
use offshoot::trust::schema::{HardwareId, RoleName};

use super::say;
use crate::bundle::{self, Request, Summary};
use crate::directory::Fleet;
use crate::fsck::{self, Report};
use crate::push::{self, Destination, Options, Service};

/// How many unreferenced files are named to people.
const NAMED: usize = 10;

/// Copy what is published to where devices ask for it.
///
/// The destination is a directory, USER@HOST:PATH or rsync://HOST/MODULE (by rsync, which must be installed), or s3://BUCKET/PREFIX in a
/// store with Amazon's interface. Content goes first and timestamp.json last, so a device finds the former publication or this one at
/// every moment; what is there already is not sent again, so the same command completes what was interrupted. Run it after each publish
/// and refresh.
///
/// A store's keys come from the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT. On
/// Amazon's own machines they come from the machine's role.
///
/// Example: offshoot-fleet push deploy@web.example.com:/srv/www/updates
#[derive(Args)]
pub(super) struct PushArguments {
    /// Where to.
    destination: Destination,
    /// Then remove there what no device asks for any more, after `prune` has removed it here. Only in metadata, targets, deltas and
    /// objects.
    #[arg(long)]
    delete: bool,
    /// What rsync runs to reach the host, such as "ssh -p 2222".
    #[arg(long, value_name = "COMMAND")]
    rsh: Option<String>,
    /// The address of the store, if it is not Amazon's.
    #[arg(long, value_name = "URL")]
    endpoint: Option<String>,
    /// The region of the bucket.
    #[arg(long)]
    region: Option<String>,
}

pub(super) fn push(directory: &Path, arguments: &PushArguments, json: bool) -> Result<()> {
    let options = Options {
        delete: arguments.delete,
        rsh: arguments.rsh.clone(),
        service: Service {
            endpoint: arguments.endpoint.clone(),
            region: arguments.region.clone(),
        },
    };
    let fleet = Fleet::open(directory)?;
    let summary = push::push(&fleet, &arguments.destination, &options)?;
    say(json, &summary, || {
        let push::Summary {
            files,
            sent,
            bytes,
            removed,
        } = summary;
        let removed = match removed {
            0 => String::new(),
            removed => format!(", {removed} removed"),
        };
        format!("{files} files are there: {sent} sent, {bytes} bytes{removed}")
    })
}

/// Write a directory that takes the newest release to devices without a network.
///
/// On the device: offshoot update --from DIR. It trusts the bundle as little as a server: everything in it is signed, and it is believed
/// until the metadata expires, which is said (`refresh` and bundle again, or a longer lifetime of timestamp in fleet.toml). Without --from
/// and --objects it has all of the release's deltas. With --from, name each commit that the devices may run, or hold to fall back to: of
/// several ways a device takes the cheapest by what it has. With --objects it serves any device, and is the largest.
///
/// Example: offshoot-fleet bundle --output /media/stick/offshoot --channel stable --hardware qemu-x86_64
#[derive(Args)]
pub(super) struct BundleArguments {
    /// The directory to write, which there is not yet.
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// The channel that the devices follow.
    #[arg(long)]
    channel: RoleName,
    /// The kind of device.
    #[arg(long)]
    hardware: HardwareId,
    /// What the devices run: only the deltas that lead on from it; may be given more than once.
    #[arg(long, value_name = "COMMIT")]
    from: Vec<Commit>,
    /// Every object of the release, for devices that run anything.
    #[arg(long)]
    objects: bool,
}

pub(super) fn bundle(
    directory: &Path,
    options: &BundleArguments,
    json: bool,
    now: Time,
) -> Result<()> {
    let request = Request {
        output: options.output.clone(),
        channel: options.channel.clone(),
        hardware: options.hardware.clone(),
        from: options.from.clone(),
        objects: options.objects,
    };
    let summary = bundle::bundle(&Fleet::open(directory)?, &request, now)?;
    say(json, &summary, || bundled(&summary))
}

fn bundled(summary: &Summary) -> String {
    let Summary {
        output,
        version,
        deltas,
        objects,
        files,
        bytes,
        until,
        ..
    } = summary;
    let output = output.display();
    let objects = objects.map_or(String::new(), |objects| {
        format!(" and {} objects", objects.count)
    });
    format!(
        "{output} has {version} with {} deltas{objects}: {files} files, {bytes} bytes, verified\n\
         devices believe it until {until}: offshoot update --from {output}",
        deltas.len()
    )
}

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
