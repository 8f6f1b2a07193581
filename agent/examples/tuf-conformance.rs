//! The device's TUF client behind the command line that the official conformance suite drives.
//!
//! ```text
//! tuf-conformance --metadata-dir DIR init ROOT
//! tuf-conformance --metadata-dir DIR --metadata-url URL refresh
//! tuf-conformance --metadata-dir DIR --metadata-url URL --target-base-url URL --target-dir DIR --target-name NAME… download
//! ```
//!
//! What differs from a device: plain http, roots first in every refresh, and any target instead of a channel's release.
//! The trusted root that `init` was given is `DIR/initial`, with a suffix that says it is not metadata of the repository.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::{Parser, Subcommand};
use jiff::Timestamp as Time;
use offshoot::fetch::{self, Server, ServerConfig};
use offshoot::trust::goal::{AnyTarget, Goal, TopLevel};
use offshoot::trust::refresh::{Refresh, Reply, Want};
use offshoot::trust::store::Store;
use offshoot::trust::verify;

#[derive(Parser)]
struct Arguments {
    /// Where the metadata is kept that the client has verified.
    #[arg(long)]
    metadata_dir: PathBuf,
    /// Where the repository's metadata is.
    #[arg(long)]
    metadata_url: Option<String>,
    /// Where the repository's targets are.
    #[arg(long)]
    target_base_url: Option<String>,
    /// Where to write what is downloaded.
    #[arg(long)]
    target_dir: Option<PathBuf>,
    /// What to download; may be repeated.
    #[arg(long)]
    target_name: Vec<String>,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Trust this root.
    Init { root: PathBuf },
    /// Bring the top-level metadata up to date.
    Refresh,
    /// Do that, and download targets.
    Download,
}

/// Both places, each below its own address.
struct Repository {
    metadata: Server,
    targets: Option<Server>,
}

fn main() -> ExitCode {
    match run(std::env::args_os(), Time::now()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tuf-conformance: {error:#}");
            ExitCode::FAILURE
        }
    }
}

pub(crate) fn run(words: impl Iterator<Item = OsString>, now: Time) -> anyhow::Result<()> {
    let arguments = Arguments::try_parse_from(words)?;
    let initial = arguments.metadata_dir.join("initial");
    if let Verb::Init { root } = &arguments.verb {
        let bytes = fs::read(root).with_context(|| format!("reading {}", root.display()))?;
        verify::trusted_root(&bytes)?;
        fs::create_dir_all(&arguments.metadata_dir)?;
        fs::write(&initial, &bytes)?;
        // The suite looks for it here. A store reads it back as the root that it was left with.
        fs::write(arguments.metadata_dir.join("root.json"), &bytes)?;
        return Ok(());
    }
    let shipped = fs::read(&initial).context("reading the trusted root: run init first")?;
    let mut store = Store::open(&arguments.metadata_dir, &shipped)?;
    let Some(url) = &arguments.metadata_url else {
        bail!("give --metadata-url");
    };
    let mut repository = Repository {
        metadata: server(url)?,
        targets: arguments
            .target_base_url
            .as_deref()
            .map(server)
            .transpose()?,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let refresh = Refresh::new(&store, TopLevel, now, Time::UNIX_EPOCH).roots_first()?;
    let refresh = runtime.block_on(carry_out(refresh, &mut store, &mut repository))?;
    if matches!(arguments.verb, Verb::Refresh) {
        refresh.finish(&mut store)?;
        return Ok(());
    }
    let Some(directory) = &arguments.target_dir else {
        bail!("give --target-dir");
    };
    let mut names = arguments.target_name.into_iter();
    let Some(first) = names.next() else {
        bail!("give --target-name");
    };
    let (copy, goal) = sought(directory, first);
    let (_, mut refresh) = refresh.look_for(goal, copy)?;
    loop {
        refresh = runtime.block_on(carry_out(refresh, &mut store, &mut repository))?;
        let (copy, goal) = match names.next() {
            Some(name) => sought(directory, name),
            None => break,
        };
        let (found, next) = refresh.look_for(goal, copy)?;
        if let Some(found) = found {
            write(directory, &found.target.path, &found.bytes)?;
        }
        refresh = next;
    }
    if let Some(found) = refresh.finish(&mut store)?.found {
        write(directory, &found.target.path, &found.bytes)?;
    }
    Ok(())
}

async fn carry_out<G: Goal>(
    mut refresh: Refresh<G>,
    store: &mut Store,
    repository: &mut Repository,
) -> anyhow::Result<Refresh<G>> {
    loop {
        let reply = match refresh.want() {
            Want::Poll { path, limit, .. } => repository.fetch(path, limit).await?,
            Want::File { path, limit, .. } => repository.fetch(&path, limit).await?,
            Want::Keep => refresh.keep(store)?,
            Want::Done => return Ok(refresh),
        };
        refresh = refresh.supply(reply)?;
    }
}

impl Repository {
    async fn fetch(&mut self, path: &str, limit: u64) -> anyhow::Result<Reply> {
        let (server, path) = match (path.split_once('/'), &mut self.targets) {
            (Some(("metadata", path)), _) => (&mut self.metadata, path),
            (Some(("targets", path)), Some(targets)) => (targets, path),
            _ => bail!("{path} is in no known place: give --target-base-url"),
        };
        Ok(match server.small(path, limit, None).await? {
            fetch::Reply::Body { bytes, .. } => Reply::Body(bytes.into()),
            fetch::Reply::NotModified => Reply::NotModified,
            fetch::Reply::NotFound => Reply::NotFound,
        })
    }
}

fn server(url: &str) -> anyhow::Result<Server> {
    let config = ServerConfig {
        insecure_http: true,
        ..ServerConfig::new(url)
    };
    Server::new(config, concat!("offshoot/", env!("CARGO_PKG_VERSION")))
}

/// A target, and the copy of it that is here already.
fn sought(directory: &Path, path: String) -> (Option<Vec<u8>>, AnyTarget) {
    let copy = fs::read(directory.join(file_name(&path))).ok();
    (copy, AnyTarget { path })
}

fn write(directory: &Path, path: &str, bytes: &[u8]) -> anyhow::Result<()> {
    let file = directory.join(file_name(path));
    if fs::read(&file).is_ok_and(|held| held == bytes) {
        return Ok(());
    }
    fs::create_dir_all(directory)?;
    fs::write(&file, bytes).with_context(|| format!("writing {}", file.display()))
}

/// One file for each path, wherever the path would lead.
fn file_name(path: &str) -> String {
    path.replace('%', "%25").replace('/', "%2F")
}
