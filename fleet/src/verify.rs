//! What a device makes of a publication: its own code, over plain files.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use jiff::Timestamp as Time;
use offshoot::commit::Sha256;
use offshoot::trust::goal::Newest;
use offshoot::trust::refresh::{Refresh, Reply, Want};
use offshoot::trust::schema::{Digested, HardwareId, RoleName};
use offshoot::trust::store::Store;
use offshoot::trust::{Release, Verified};
use serde::Serialize;

use crate::writer::digest_of;

/// How a file is not the one that was signed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub(crate) enum Fault {
    Missing,
    WrongLength { want: u64, got: u64 },
    WrongDigest { want: Sha256, got: Sha256 },
}

/// What is offered to a device of this channel and hardware that has this root, and has seen nothing yet, by the files below `public`.
pub(crate) fn offered(
    public: &Path,
    root: &[u8],
    channel: &RoleName,
    hardware: &HardwareId,
    now: Time,
) -> Result<Option<Verified<Release>>> {
    let state = tempfile::tempdir().context("making a directory for what a device keeps")?;
    let mut store = Store::open(state.path(), root)?;
    loop {
        let goal = Newest {
            channel: channel.clone(),
            hardware: hardware.clone(),
        };
        let before = store.root().version;
        let mut refresh = Refresh::new(&store, goal, now, Time::UNIX_EPOCH);
        let outcome = loop {
            let reply = match refresh.want() {
                Want::Poll { path, limit, .. } => read(public, path, limit)?,
                Want::File { path, limit, .. } => read(public, &path, limit)?,
                Want::Keep => refresh.keep(&mut store)?,
                Want::Done => break refresh.finish(&mut store)?,
            };
            refresh = refresh.supply(reply)?;
        };
        // One refresh follows so many roots and no more.
        if store.root().version == before {
            return Ok(outcome.found);
        }
    }
}

fn read(public: &Path, path: &str, limit: u64) -> Result<Reply> {
    let path = public.join(path);
    let mut bytes = Vec::new();
    match File::open(&path).and_then(|file| file.take(limit + 1).read_to_end(&mut bytes)) {
        Ok(_) if bytes.len() as u64 > limit => bail!(
            "{} has more than the {limit} bytes that a device reads: publish again",
            path.display()
        ),
        Ok(_) => Ok(Reply::Body(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Reply::NotFound),
        Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
    }
}

/// Reads a whole file.
pub(crate) fn fault(public: &Path, path: &str, want: &Digested) -> Result<Option<Fault>> {
    let path = public.join(path);
    let got = match fs::metadata(&path) {
        Ok(meta) if meta.is_file() => meta.len(),
        Ok(_) => return Ok(Some(Fault::Missing)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Some(Fault::Missing)),
        Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
    };
    if got != want.length {
        let want = want.length;
        return Ok(Some(Fault::WrongLength { want, got }));
    }
    let (_, got) = digest_of(&path)?;
    let want = want.sha256;
    Ok((got != want).then_some(Fault::WrongDigest { want, got }))
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Missing => f.write_str("it is not there"),
            Self::WrongLength { want, got } => {
                write!(f, "it has {got} bytes where {want} were signed")
            }
            Self::WrongDigest { want, got } => {
                write!(f, "it has the sha256 {got} where {want} was signed")
            }
        }
    }
}
