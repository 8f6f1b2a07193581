//! The words an operator types, and what is said back.

mod distribute;
mod image;
mod split;

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Args, CommandFactory as _, Parser, Subcommand};
use jiff::Timestamp as Time;
use offshoot::trust::schema::{HardwareId, ReleaseVersion, RoleName};
use serde::Serialize;
use serde_json::json;

use crate::directory::{Busy, Fleet};
use crate::keys::Keys;
use crate::keys::passphrase::Passphrases;
use crate::prepared::Goal;
use crate::publication::Below;
use crate::{compose, init, objects, prune, publish, refresh, serve, status};

const NAME: &str = "offshoot-fleet";

/// Composes and publishes OS releases for devices that Offshoot updates.
///
/// Everything is in one directory: the keys, the OSTree repository, and `public`, which any web server serves as it is. Back it up;
/// whoever has `keys` decides what the devices run.
///
/// Exit codes: 0 done, 1 failed (the reason is on standard error), 2 usage, 3 another offshoot-fleet is at work in the directory,
/// 4 `status --check` has warnings, 5 `fsck` found problems, 6 too few keys have signed.
#[derive(Parser)]
#[command(name = NAME, version, disable_help_subcommand = true)]
pub(crate) struct Arguments {
    /// The operator's directory.
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        default_value = ".",
        env = "OFFSHOOT_FLEET"
    )]
    fleet: PathBuf,
    /// Answer in JSON.
    #[arg(long, global = true)]
    json: bool,
    /// A file with the passphrase of the keys; else it is in OFFSHOOT_FLEET_PASSPHRASE, or asked for on the terminal.
    #[arg(long, global = true, value_name = "FILE")]
    passphrase_file: Option<PathBuf>,
    #[command(subcommand)]
    verb: Verb,
}

impl Arguments {
    fn passphrases(&self) -> Passphrases {
        Passphrases::from(self.passphrase_file.clone())
    }

    /// On a machine that may have no other part of a fleet.
    fn keys(&self) -> Keys {
        Keys::new(self.fleet.join("keys"), self.passphrases())
    }

    fn open(&self) -> Result<Fleet> {
        Ok(Fleet::open(&self.fleet)?.with_passphrases(self.passphrases()))
    }
}

#[derive(Subcommand)]
enum Verb {
    Init(InitArguments),
    /// Add a channel.
    #[command(subcommand)]
    Channel(ChannelVerb),
    /// Look after the files of keys.
    #[command(subcommand)]
    Key(split::KeyVerb),
    Compose(ComposeArguments),
    Publish(PublishArguments),
    Image(Box<image::ImageArguments>),
    /// Sign again what expires.
    ///
    /// A role is signed again in the last third of its lifetime (`lifetimes` in fleet.toml). Run this daily, from a timer: devices refuse
    /// metadata that has expired. A role whose keys are not in `keys` is left as it is, with a warning.
    Refresh {
        /// Sign a new timestamp even if nothing is late.
        #[arg(long)]
        force: bool,
        /// Prepare what is late and is signed elsewhere, for `sign`; nothing else is done.
        #[arg(long, conflicts_with = "force")]
        prepare: bool,
    },
    Rotate(split::RotateArguments),
    Sign(split::SignArguments),
    Complete(split::CompleteArguments),
    /// Remove former releases, and the files that only they need.
    ///
    /// Devices that run a removed release still update, if a release that stays has a delta from it or from nothing. The OSTree
    /// repository is left as it is: `ostree prune` is for that.
    Prune {
        /// How many releases of each channel and hardware stay.
        #[arg(long)]
        keep: usize,
        /// Others sign: leave what they sign in `prepared`. Files are removed by the same command after `complete`.
        #[arg(long)]
        prepare: bool,
    },
    /// Tell what is published, until when devices believe it, and what to do about it.
    ///
    /// Each warning names its remedy. With --check, warnings are exit code 4, for a timer that mails.
    Status {
        /// Fail if there are warnings.
        #[arg(long)]
        check: bool,
    },
    Push(distribute::PushArguments),
    Bundle(distribute::BundleArguments),
    Fsck(distribute::FsckArguments),
    Serve(ServeArguments),
    /// Write a manual page to standard output: this program's, or that of one of its verbs.
    #[command(hide = true)]
    Man {
        /// The verb.
        verb: Option<String>,
    },
    /// Write a shell's completions to standard output.
    #[command(hide = true)]
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

/// Make the operator's directory: keys, settings, repository, and a first publication without releases.
///
/// Nothing that exists is overwritten. Put `root.json` into the devices' image as /usr/lib/offshoot/root.json, and keep copies of the
/// root keys elsewhere: with them all other keys can be replaced, without them none.
///
/// Example: offshoot-fleet --fleet acme init --channel stable --channel beta --hardware qemu-x86_64
#[derive(Args)]
struct InitArguments {
    /// A channel, which devices follow; may be given more than once.
    #[arg(long = "channel", default_value = "stable")]
    channels: Vec<RoleName>,
    /// A kind of device, as `hardware` in the devices' configuration; may be given more than once.
    #[arg(long)]
    hardware: Vec<HardwareId>,
    /// How many root keys to make.
    #[arg(long, default_value_t = 1)]
    root_keys: u32,
    /// How many of them it takes to sign a root.
    #[arg(long, default_value_t = 1)]
    root_threshold: u32,
    /// Give the keys of root, targets and channels a passphrase. Those of timestamp and snapshot have none: a timer signs with them.
    #[arg(long)]
    encrypt: bool,
}

#[derive(Subcommand)]
enum ChannelVerb {
    /// Add a channel, with a key of its own and without releases.
    Add {
        /// Its name.
        name: RoleName,
        /// Others sign: leave what they sign in `prepared`.
        #[arg(long)]
        prepare: bool,
    },
}

/// Turn a root file system into an OSTree commit.
///
/// The tree is a directory or a tar, and is not changed. Owners, modes and extended attributes are kept as they are: read a directory
/// as root; a tar can be read by anybody, if it was made with --numeric-owner --xattrs. What OSTree wants elsewhere goes
/// there: /etc becomes /usr/etc, the kernel and the initramfs go to /usr/lib/modules/VERSION, /var is left out, /home, /root, /srv,
/// /opt, /mnt and /usr/local become links into it. A tree with /usr/etc and no /etc stays as it is laid out. The same tree and
/// the same --timestamp give the same commit.
///
/// Example: offshoot-fleet compose --tree rootfs.tar --branch os/stable/qemu-x86_64 --release 1.4.0
#[derive(Args)]
struct ComposeArguments {
    /// The root file system: a directory, a tar, or - for a tar on standard input.
    #[arg(long)]
    tree: PathBuf,
    /// The OSTree repository, made if it does not exist; `repo` in the operator's directory if not given.
    #[arg(long)]
    repo: Option<PathBuf>,
    /// The branch to move to the new commit.
    #[arg(long)]
    branch: String,
    /// The version to write into the commit.
    #[arg(long)]
    release: String,
    /// The commit's time, in seconds since 1970.
    #[arg(long, env = "SOURCE_DATE_EPOCH", default_value_t = 0)]
    timestamp: u64,
}

/// Publish a commit as a release of a channel.
///
/// Makes deltas from the releases before it, publishes its objects for devices that no delta is for, signs, and writes it to `public` so that a device sees the former release or this one and
/// nothing else. Interrupted, the same command completes it. Publishing the same again changes nothing.
///
/// Example: offshoot-fleet publish --channel stable --hardware qemu-x86_64 --release 1.4.0 os/stable/qemu-x86_64
#[derive(Args)]
struct PublishArguments {
    /// The channel to publish to.
    #[arg(long)]
    channel: RoleName,
    /// The kind of device that it is for, one of those in fleet.toml.
    #[arg(long)]
    hardware: HardwareId,
    /// The version, as it was composed.
    #[arg(long)]
    release: ReleaseVersion,
    /// A branch of the repository, or a commit checksum.
    #[arg(value_name = "COMMIT-OR-BRANCH")]
    rev: String,
    /// From how many former releases to make deltas; `deltas` in fleet.toml if not given.
    #[arg(long)]
    deltas: Option<usize>,
    /// Also make a delta from nothing, for devices that run none of those releases.
    #[arg(long)]
    full: bool,
    /// Without its objects one by one, whatever fleet.toml says.
    #[arg(long)]
    no_objects: bool,
    /// Make a former release the newest again.
    #[arg(long)]
    again: bool,
    /// Others sign: write the content, and leave in `prepared` what they `sign`; `complete` publishes it.
    #[arg(long)]
    prepare: bool,
}

/// Serve `public` over HTTPS, for a bench or a small site.
///
/// Any other web server will do as well: these are plain files. The certificate authority is made at the first start and kept as
/// keys/serve-ca.pem: put it on the devices (`[server] ca` in their configuration). Stops on SIGTERM, after the transfers that run.
/// Each request is a line of JSON on standard error or in --log: method, path, range, status, bytes, complete, http.
#[derive(Args)]
struct ServeArguments {
    /// Address and port; port 0 picks one.
    #[arg(long, default_value = "127.0.0.1:8443")]
    listen: SocketAddr,
    /// Without TLS. The metadata is signed either way.
    #[arg(long)]
    http: bool,
    /// A name or address by which devices know this server; may be given more than once.
    #[arg(long = "name")]
    names: Vec<String>,
    /// Write the requests to this file.
    #[arg(long)]
    log: Option<PathBuf>,
}

pub(crate) fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("offshoot-fleet: {error:#}");
            if error.is::<Busy>() {
                ExitCode::from(3)
            } else if error.is::<Below>() {
                ExitCode::from(6)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    let json = arguments.json;
    let directory = &arguments.fleet;
    let now = now()?;
    match &arguments.verb {
        Verb::Init(options) => {
            let keys = init::NewKeys {
                root: (options.root_keys, options.root_threshold),
                encrypt: options.encrypt,
                passphrases: arguments.passphrases(),
            };
            let summary = init::init(directory, &options.channels, &options.hardware, keys, now)?;
            say(json, &summary, || initiated(&summary))
        }
        Verb::Channel(ChannelVerb::Add { name, prepare }) => {
            let goal = Goal::of(*prepare);
            let prepared = init::add_channel(&arguments.open()?, name, goal, now)?;
            let answer = json!({"channel": name, "prepared": prepared});
            say(json, &answer, || {
                split::or_prepared(&prepared, || {
                    format!("channel {name} is published, without releases")
                })
            })
        }
        Verb::Key(verb) => split::key(&arguments.keys(), verb, json),
        Verb::Compose(options) => composing(directory, options, json),
        Verb::Publish(options) => {
            let request = publish::Request {
                channel: options.channel.clone(),
                hardware: options.hardware.clone(),
                version: options.release.clone(),
                rev: options.rev.clone(),
                deltas: options.deltas,
                full: options.full,
                objects: options.no_objects.then_some(false),
                again: options.again,
                prepare: options.prepare,
            };
            let summary = publish::publish(&arguments.open()?, &request, now)?;
            warn(&summary.warnings);
            say(json, &summary, || {
                split::or_prepared(&summary.prepared, || published(&summary))
            })
        }
        Verb::Image(options) => image::run(directory, options, json),
        Verb::Refresh { force, prepare } => {
            let fleet = arguments.open()?;
            let summary = if *prepare {
                refresh::prepare(&fleet, now)?
            } else {
                refresh::refresh(&fleet, *force, now)?
            };
            warn(&summary.warnings);
            say(json, &summary, || {
                split::or_prepared(&summary.prepared, || refreshed(&summary.signed))
            })
        }
        Verb::Rotate(options) => split::rotate(&arguments.open()?, options, json, now),
        Verb::Sign(options) => split::sign(&arguments.keys(), options, json),
        Verb::Complete(options) => split::complete(&arguments.open()?, options, json, now),
        Verb::Prune { keep, prepare } => {
            let summary = prune::prune(&arguments.open()?, *keep, Goal::of(*prepare), now)?;
            warn(&summary.warnings);
            say(json, &summary, || {
                split::or_prepared(&summary.prepared, || pruned(&summary))
            })
        }
        Verb::Status { check } => {
            let status = status::status(&arguments.open()?, now)?;
            say(json, &status, || status.to_string().trim_end().to_owned())?;
            if *check && !status.warnings.is_empty() {
                return Ok(ExitCode::from(4));
            }
            Ok(())
        }
        Verb::Push(options) => distribute::push(directory, options, json),
        Verb::Bundle(options) => distribute::bundle(directory, options, json, now),
        Verb::Fsck(options) => return distribute::fsck(directory, options, json, now),
        Verb::Man { verb } => manual(verb.as_deref()),
        Verb::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(*shell, &mut Arguments::command(), NAME, &mut text);
            out(&text)
        }
        Verb::Serve(options) => {
            let serving = serve::Options {
                listen: options.listen,
                http: options.http,
                names: options.names.clone(),
                log: options.log.clone(),
            };
            serve::serve(&arguments.open()?, &serving, |ready| {
                let url = ready["url"].as_str().unwrap_or_default();
                let text = || match ready["ca"].as_str() {
                    Some(ca) => format!("serving {url} to devices that trust {ca}"),
                    None => format!("serving {url} without TLS"),
                };
                // Nobody reads it: the server serves all the same.
                drop(say(json, ready, text));
            })
        }
    }?;
    Ok(ExitCode::SUCCESS)
}

fn manual(verb: Option<&str>) -> Result<()> {
    let mut command = Arguments::command();
    command.build();
    let command = match verb {
        None => command,
        Some(verb) => command
            .find_subcommand(verb)
            .with_context(|| format!("there is no verb {verb}: `{NAME} --help` lists them"))?
            .clone(),
    };
    let mut text = Vec::new();
    clap_mangen::Man::new(command)
        .source(concat!("offshoot-fleet ", env!("CARGO_PKG_VERSION")))
        .render(&mut text)
        .context("writing the page")?;
    out(&text)
}

fn out(text: &[u8]) -> Result<()> {
    let mut out = std::io::stdout();
    out.write_all(text)
        .and_then(|()| out.flush())
        .context("writing the answer")
}

fn composing(directory: &Path, options: &ComposeArguments, json: bool) -> Result<()> {
    let repo = options
        .repo
        .clone()
        .unwrap_or_else(|| directory.join("repo"));
    let composed = compose::compose(
        &options.tree,
        &repo,
        &options.branch,
        &options.release,
        options.timestamp,
    )?;
    if !json {
        eprintln!(
            "kernel {}, {} packages, {} files; {} entries of /var left out",
            composed.kernel, composed.packages, composed.files, composed.left_out
        );
        if !composed.replaced.is_empty() {
            eprintln!(
                "replaced by links, with what was in them: {}",
                composed.replaced.join(", ")
            );
        }
    }
    say(json, &composed, || composed.commit.to_string())
}

fn initiated(summary: &init::Summary) -> String {
    let channel = summary.channels.first().map_or("stable", RoleName::as_str);
    let hardware = summary
        .hardware
        .first()
        .map_or("HARDWARE", HardwareId::as_str);
    let fleet = summary.fleet.display();
    let first = if summary.hardware.is_empty() {
        format!("0. Name the kinds of device that there are: `hardware` in {fleet}/fleet.toml\n")
    } else {
        String::new()
    };
    format!(
        "\
{fleet} is ready. Next:
{first}1. Put {} into the image as /usr/lib/offshoot/root.json.
2. Copy {fleet}/keys/root-*.pem to a safe place ({} of them sign a root).
3. offshoot-fleet --fleet {fleet} compose --tree ROOTFS --branch os/{channel}/{hardware} --release 1.0.0
4. offshoot-fleet --fleet {fleet} publish --channel {channel} --hardware {hardware} --release 1.0.0 os/{channel}/{hardware}
5. Serve {fleet}/public with any web server, or on a bench: offshoot-fleet --fleet {fleet} serve
6. Daily, from a timer: offshoot-fleet --fleet {fleet} refresh",
        summary.root.display(),
        summary.root_threshold,
    )
}

fn published(summary: &publish::Summary) -> String {
    let publish::Summary {
        channel,
        hardware,
        version,
        serial,
        commit,
        ..
    } = summary;
    let done = if summary.unchanged {
        "was published already as"
    } else {
        "is"
    };
    let mut text =
        format!("{commit}\n{done} {version}, release {serial} of {channel} for {hardware}");
    let (chain, direct): (Vec<_>, Vec<_>) =
        summary.deltas.iter().partition(|delta| delta.to.is_some());
    for delta in direct {
        let from = delta
            .from
            .map_or("nothing".to_owned(), |from| from.to_string());
        text += &format!(
            "\n  from {from}: {} bytes, {} unpacked",
            delta.download, delta.usize
        );
    }
    if let Some(objects::Summary {
        count,
        download,
        usize,
    }) = summary.objects
    {
        text += &format!(
            "\n  or the objects that are missing, of {count}: {download} bytes, {usize} unpacked"
        );
    }
    if !chain.is_empty() {
        text += &format!(
            "\n  on the way: {} deltas that led to former releases",
            chain.len()
        );
    }
    text
}

fn refreshed(signed: &[refresh::SignedRole]) -> String {
    if signed.is_empty() {
        return "nothing is late".to_owned();
    }
    let lines = signed.iter().map(|signed| {
        format!(
            "{} {} until {}",
            signed.role, signed.version, signed.expires
        )
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn pruned(summary: &prune::Summary) -> String {
    let releases = summary.releases.iter().map(|gone| {
        format!(
            "{} of {} for {}\n",
            gone.version, gone.channel, gone.hardware
        )
    });
    let releases: String = releases.collect();
    format!("{releases}{} files, {} bytes", summary.files, summary.bytes)
}

fn warn(warnings: &[String]) {
    for warning in warnings {
        eprintln!("warning: {warning}");
    }
}

fn say(json: bool, value: &impl Serialize, text: impl FnOnce() -> String) -> Result<()> {
    let text = if json {
        serde_json::to_string(value).context("writing the answer")?
    } else {
        text()
    };
    out(format!("{text}\n").as_bytes())
}

/// Whole seconds, as metadata has them.
fn now() -> Result<Time> {
    Time::from_second(Time::now().as_second()).context("reading the clock")
}
