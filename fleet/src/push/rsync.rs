//! To a machine that rsync reaches, over ssh or its own protocol.
//!
//! Three runs, because rsync sends in the order of names: content, metadata, timestamp. rsync writes each file beside its place and
//! renames it; what was interrupted in the middle of a file goes on from there (`--partial-dir`).

use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use super::{FOLDERS, Options, Plan, Summary, TIMESTAMP};
use crate::verify;

pub(super) fn push(plan: &Plan, to: &str, options: &Options) -> Result<Summary> {
    let mut summary = Summary {
        files: plan.count(),
        ..Summary::default()
    };
    // rsync does not look at what it sends.
    for (path, want) in &plan.content {
        if verify::fault(&plan.public, path, want)?.is_some() {
            return Err(super::damaged(&plan.public.join(path)));
        }
    }
    let run = |names: Vec<&str>, more: &[&str], summary: &mut Summary| {
        let list = names.join("\n");
        let mut command = rsync(options);
        command
            .args(["--relative", "--files-from=-", "--out-format=%i %l"])
            .args(more)
            .arg(format!("{}/", plan.public.display()))
            .arg(to);
        for (_, length) in lines(command, &list, to)?
            .iter()
            .filter(|(is_sent, _)| *is_sent)
        {
            summary.sent += 1;
            summary.bytes += length;
        }
        anyhow::Ok(())
    };
    let names = plan.content.keys().map(String::as_str).collect();
    run(names, &[], &mut summary)?;
    // Small enough to compare by content.
    let names = plan.metadata.keys().map(String::as_str).collect();
    run(names, &["--checksum"], &mut summary)?;
    run(vec![TIMESTAMP], &["--checksum"], &mut summary)?;
    if options.delete {
        let mut command = rsync(options);
        command
            .args([
                "--delete",
                "--existing",
                "--ignore-existing",
                "--out-format=%i %l",
            ])
            .args(
                FOLDERS
                    .iter()
                    .map(|folder| plan.public.join(folder))
                    .filter(|path| path.exists()),
            )
            .arg(to);
        let deleted = lines(command, "", to)?;
        summary.removed = deleted.iter().filter(|(is_sent, _)| !is_sent).count();
    }
    Ok(summary)
}

fn rsync(options: &Options) -> Command {
    let mut command = Command::new("rsync");
    command.args([
        "--recursive",
        "--times",
        "--chmod=D755,F644",
        "--partial-dir=.offshoot-partial",
    ]);
    if let Some(rsh) = &options.rsh {
        command.arg("--rsh").arg(rsh);
    }
    command
}

/// What it did: whether a file was sent (or else deleted), and its length.
fn lines(mut command: Command, input: &str, to: &str) -> Result<Vec<(bool, u64)>> {
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut child = child.context("running rsync: install it (apt install rsync)")?;
    let mut stdin = child.stdin.take().context("rsync has no standard input")?;
    // Both ends may fill up: whoever writes does not read.
    let input = input.to_owned();
    let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output().context("waiting for rsync")?;
    // It may have ended before it read all; its status says why.
    drop(writer.join());
    ensure!(
        output.status.success(),
        "rsync to {to} failed ({}), what it said is above: check the address, the login and the space there; the same command goes on",
        output.status
    );
    let text = String::from_utf8_lossy(&output.stdout);
    let parsed = text.lines().filter_map(|line| {
        // `<f+++++++++ 123`, `*deleting 0`.
        let (what, length) = line.split_once(' ')?;
        let is_sent = what.starts_with("<f");
        let is_deleted = what.starts_with("*deleting");
        (is_sent || is_deleted).then(|| (is_sent, length.trim().parse().unwrap_or(0)))
    });
    Ok(parsed.collect())
}
