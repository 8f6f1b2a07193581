//! The words that an operator, and systemd, say to `offshoot`.

use std::ffi::OsString;
use std::fmt::Display;
use std::io::{self, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use bootloader_glue::Confirmed;
use clap::{CommandFactory as _, Parser, Subcommand};
use http::Method;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tracing_subscriber::prelude::*;

use crate::api::{self, Answer, Kind};
use crate::commit::Commit;
use crate::config::Config;
use crate::daemon;
use crate::decide::Why;
use crate::device;
use crate::events;
use crate::health::{self, Ending};
use crate::selftest::{self, Ending as Tested};
use crate::status::{Share, Status};

/// Updates this device: a new system beside the running one, kept only if it proves healthy.
///
/// `offshoot status` says what runs, what is offered, and why the device is or is not updating.
#[derive(Parser)]
#[command(
    name = "offshoot",
    version,
    after_help = "Exit codes: 0 done, 1 failed (the reason is on standard error), 2 usage, 3 a required health check failed, \
                  4 the daemon is not running, 5 not permitted, 6 there is nothing to update to (the reason is told), \
                  7 the server could not be asked, 8 the self-test found something."
)]
struct Arguments {
    /// Answer in JSON.
    #[arg(long, global = true)]
    json: bool,
    /// Read the configuration below this directory.
    #[arg(long, global = true, default_value = "/", hide = true)]
    root: PathBuf,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Say what runs, what is offered, and why the device is or is not updating.
    Status {
        /// Go on, a line for each change.
        #[arg(long)]
        follow: bool,
    },
    /// Ask the server now.
    Check,
    /// Ask the server now, and install what it offers: fetch, deploy, reboot.
    ///
    /// For devices whose configuration says reboot = "manual", this is the word they wait for; it also does not wait for windows of time.
    /// Tells the progress until the device reboots; interrupting it does not stop the update.
    Update {
        /// Return as soon as the daemon has begun.
        #[arg(long)]
        no_wait: bool,
        /// Fetch it although the link is metered, or it is larger than the limits of the configuration.
        #[arg(long)]
        over_limits: bool,
        /// Not from the server, but from a directory with the same content: a USB stick, a bundle (offshoot-fleet bundle). It is trusted as
        /// little as the server.
        #[arg(long, value_name = "DIRECTORY")]
        from: Option<PathBuf>,
    },
    /// Say which channel the device follows, or change it.
    ///
    /// Examples: `offshoot channel`, `offshoot channel beta`, `offshoot channel --reset`
    Channel {
        /// Follow this channel from now on.
        name: Option<String>,
        /// Follow the channel of the configuration again.
        #[arg(long, conflicts_with = "name")]
        reset: bool,
    },
    /// Install nothing until told otherwise.
    ///
    /// What is being fetched is given up; a trial that has begun goes on.
    Hold {
        /// Why, for whoever looks at `offshoot status`.
        #[arg(required_unless_present = "release")]
        reason: Option<String>,
        /// End the hold.
        #[arg(long, conflicts_with = "reason")]
        release: bool,
    },
    /// Allow a release again that was rejected.
    Retry {
        /// The release's commit; without it, the newest release.
        commit: Option<Commit>,
    },
    /// Test whether this unit would survive a bad release, where it is made.
    ///
    /// Without options it looks and changes nothing. Ends with 0 if everything passed, with 8 if not; what was found and what to do
    /// about it is printed, one line a question.
    ///
    /// On the line: `offshoot selftest --rehearse`, which reboots the unit three times and takes a few minutes; then
    /// `offshoot selftest --result`.
    Selftest {
        /// Also try, over reboots: that bootloader and system share one environment, that a spent counter falls back, that the
        /// watchdog fires. Nothing is installed, and the unit is left as it was.
        #[arg(long)]
        rehearse: bool,
        /// Rehearse without the watchdog.
        #[arg(long, requires = "rehearse")]
        no_watchdog: bool,
        /// Tell the last finished test, and test nothing; ends with 1 if there is none.
        #[arg(long, conflicts_with = "rehearse")]
        result: bool,
        /// End a rehearsal where it is.
        #[arg(long, conflicts_with_all = ["rehearse", "result"])]
        abandon: bool,
        /// Go on with a rehearsal after its reboot (offshoot-selftest.service does).
        #[arg(long, hide = true, conflicts_with_all = ["rehearse", "result", "abandon"])]
        resume: bool,
    },
    /// Run the health checks of this boot (offshoot-health.service does).
    ///
    /// Executables in required.d and wanted.d below /usr/lib/offshoot/health and /etc/offshoot/health; one in /etc replaces the
    /// one of the same name in /usr, and a link to /dev/null masks it. Results are in /run/offshoot/health.json. On a trial boot
    /// a failed required check ends the trial: the boot counter is exhausted and the device reboots into the former system.
    Health,
    /// Keep the system that is on trial (offshoot-confirm.service does, when boot-complete.target is reached).
    ///
    /// One write to the boot environment. Does nothing when nothing is on trial.
    Confirm,
    /// Run the agent (offshoot.service does).
    ///
    /// OFFSHOOT_LOG sets how much it tells: error, warn, info (the default), debug or trace.
    Daemon,
}

/// The exit codes. Those of clap are 0 and 2.
mod code {
    pub(super) const FAILED: u8 = 1;
    pub(super) const UNHEALTHY: u8 = 3;
    pub(super) const NOT_RUNNING: u8 = 4;
    pub(super) const NOT_PERMITTED: u8 = 5;
    pub(super) const NOTHING: u8 = 6;
    pub(super) const NOT_ASKED: u8 = 7;
    pub(super) const NOT_SOUND: u8 = 8;
}

/// The command line, for what is made from it: the manual page and the shells' completions (`examples/docs.rs`).
pub fn command() -> clap::Command {
    Arguments::command()
}

/// Runs the command line and says how it ended.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        // Help and usage errors: clap knows which stream and code.
        Err(error) => error.exit(),
    };
    match perform(&arguments) {
        Ok(code) => code,
        Err(error) => {
            if error
                .downcast_ref::<io::Error>()
                .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
            {
                return ExitCode::SUCCESS;
            }
            eprintln!("offshoot: {error:#}");
            match error.downcast_ref::<api::NotRunning>() {
                Some(_) => ExitCode::from(code::NOT_RUNNING),
                None => ExitCode::from(code::FAILED),
            }
        }
    }
}

fn perform(arguments: &Arguments) -> Result<ExitCode> {
    let config = Config::load(&arguments.root)?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting")?
        .block_on(Cli { arguments, config }.perform())
}

struct Cli<'a> {
    arguments: &'a Arguments,
    config: Config,
}

impl Cli<'_> {
    async fn perform(self) -> Result<ExitCode> {
        match &self.arguments.verb {
            Verb::Status { follow } => self.status(*follow).await,
            Verb::Check => match self.ask(Method::POST, "/v1/check", None).await? {
                Answer::Status(status) => self.checked(&status),
                other => self.told(other),
            },
            Verb::Update {
                no_wait,
                over_limits,
                from,
            } => self.update(*no_wait, *over_limits, from.as_deref()).await,
            Verb::Channel { name, reset } => self.channel(name.as_deref(), *reset).await,
            Verb::Hold { reason, .. } => {
                let answer = match reason {
                    Some(reason) => {
                        let body = json!({ "reason": reason });
                        self.ask(Method::PUT, "/v1/hold", Some(&body)).await?
                    }
                    None => self.ask(Method::DELETE, "/v1/hold", None).await?,
                };
                self.told(answer)
            }
            Verb::Retry { commit } => self.retry(*commit).await,
            Verb::Selftest {
                rehearse,
                no_watchdog,
                result,
                abandon,
                resume,
            } => {
                let ending = match (rehearse, result, abandon, resume) {
                    (true, ..) => Some(selftest::rehearse(&self.config, !no_watchdog).await?),
                    (_, true, ..) => selftest::last(&self.config)?.map(Tested::Finished),
                    (_, _, true, _) => {
                        let abandoned = selftest::abandon(&self.config)?;
                        self.say(
                            if abandoned {
                                "abandoned"
                            } else {
                                "nothing to abandon"
                            },
                            &json!({ "abandoned": abandoned }),
                        )?;
                        return Ok(ExitCode::SUCCESS);
                    }
                    (.., true) => match selftest::resume(&self.config)? {
                        None => return Ok(ExitCode::SUCCESS),
                        ending => ending,
                    },
                    _ => Some(Tested::Finished(selftest::look(&self.config).await?)),
                };
                self.tested(ending).await
            }
            Verb::Health => self.health().await,
            Verb::Confirm => self.confirm(),
            Verb::Daemon => self.daemon().await,
        }
    }

    async fn ask(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Answer> {
        api::request(&self.config.paths.run, method, path, body).await
    }

    /// One line, or one line of JSON.
    fn say(&self, text: impl Display, value: &impl Serialize) -> Result<()> {
        let line = if self.arguments.json {
            serde_json::to_string(value)?
        } else {
            text.to_string()
        };
        Ok(writeln!(io::stdout(), "{}", line.trim_end())?)
    }

    /// The plain end of a request.
    fn told(&self, answer: Answer) -> Result<ExitCode> {
        match answer {
            Answer::Status(status) => {
                self.say(status.summary(), &status)?;
                Ok(ExitCode::SUCCESS)
            }
            Answer::Conflict(status) => {
                self.say(status.summary(), &status)?;
                Ok(ExitCode::from(code::NOTHING))
            }
            Answer::Refused(why) => {
                eprintln!("offshoot: {}", why.message);
                Ok(ExitCode::from(match why.kind {
                    Kind::NotPermitted => code::NOT_PERMITTED,
                    Kind::NoSuchThing | Kind::BadRequest | Kind::Failed => code::FAILED,
                }))
            }
        }
    }

    fn checked(&self, status: &Status) -> Result<ExitCode> {
        self.say(status.summary(), status)?;
        match &status.last_poll {
            Some(poll) if poll.error.is_none() => Ok(ExitCode::SUCCESS),
            Some(_) | None => {
                if let Some(error) = status
                    .last_poll
                    .as_ref()
                    .and_then(|poll| poll.error.as_ref())
                {
                    eprintln!("offshoot: {}", error.message);
                }
                Ok(ExitCode::from(code::NOT_ASKED))
            }
        }
    }

    async fn status(&self, follow: bool) -> Result<ExitCode> {
        let mut answer = self.ask(Method::GET, "/v1/status", None).await?;
        if !follow {
            return match answer {
                Answer::Status(status) => {
                    self.say(&*status, &status)?;
                    Ok(ExitCode::SUCCESS)
                }
                other => self.told(other),
            };
        }
        let mut last = String::new();
        loop {
            let Answer::Status(status) = answer else {
                return self.told(answer);
            };
            let summary = status.summary();
            if self.arguments.json || summary != last {
                self.say(&summary, &status)?;
            }
            last = summary;
            let path = format!("/v1/status?after={}", status.revision);
            answer = self.ask(Method::GET, &path, None).await?;
        }
    }

    async fn update(
        &self,
        no_wait: bool,
        over_limits: bool,
        from: Option<&Path>,
    ) -> Result<ExitCode> {
        // The daemon has another working directory.
        let from = from.map(std::path::absolute).transpose()?;
        let body = json!({ "over_limits": over_limits, "from": from });
        let mut answer = (self.ask(Method::POST, "/v1/update", Some(&body))).await?;
        if no_wait || matches!(answer, Answer::Conflict(_) | Answer::Refused(_)) {
            return self.told(answer);
        }
        let terminal = io::stdout().is_terminal() && !self.arguments.json;
        let mut last = String::new();
        loop {
            let Answer::Status(status) = answer else {
                return self.told(answer);
            };
            match status.progress {
                // One line that grows, where somebody looks at it.
                Some(progress) if terminal => {
                    let share = Share {
                        done: progress.done,
                        total: progress.total,
                    };
                    let mut out = io::stdout();
                    write!(out, "\rfetching: {share} ")?;
                    if progress.done == progress.total {
                        writeln!(out)?;
                    }
                    out.flush()?;
                }
                Some(_) if !self.arguments.json => {}
                Some(_) | None => {
                    let summary = status.summary();
                    if self.arguments.json || summary != last {
                        self.say(&summary, &status)?;
                    }
                    last = summary;
                }
            }
            if status.step == "rebooting" {
                return Ok(ExitCode::SUCCESS);
            }
            match status.why {
                None | Some(Why::AwaitingConsent) => {}
                // It went no further: held, rejected, or no longer offered.
                Some(_) => return Ok(ExitCode::from(code::NOTHING)),
            }
            let path = format!("/v1/status?after={}", status.revision);
            answer = self.ask(Method::GET, &path, None).await?;
        }
    }

    async fn channel(&self, name: Option<&str>, reset: bool) -> Result<ExitCode> {
        let answer = match (name, reset) {
            (Some(name), _) => {
                let body = json!({ "channel": name });
                self.ask(Method::PUT, "/v1/channel", Some(&body)).await?
            }
            (None, true) => self.ask(Method::DELETE, "/v1/channel", None).await?,
            (None, false) => self.ask(Method::GET, "/v1/status", None).await?,
        };
        let Answer::Status(status) = answer else {
            return self.told(answer);
        };
        if name.is_none() && !reset {
            self.say(&status.channel, &json!({ "channel": status.channel }))?;
            return Ok(ExitCode::SUCCESS);
        }
        self.checked(&status)
    }

    async fn retry(&self, commit: Option<Commit>) -> Result<ExitCode> {
        let commit = match commit {
            Some(commit) => commit,
            None => match self.ask(Method::GET, "/v1/status", None).await? {
                Answer::Status(status) => match status.offer {
                    Some(offer) => offer.commit,
                    None => return self.told(Answer::Conflict(status)),
                },
                other => return self.told(other),
            },
        };
        let path = format!("/v1/rejections/{commit}");
        let answer = self.ask(Method::DELETE, &path, None).await?;
        self.told(answer)
    }

    async fn tested(&self, ending: Option<Tested>) -> Result<ExitCode> {
        match ending {
            None => {
                eprintln!("offshoot: no self-test was finished on this unit");
                Ok(ExitCode::from(code::FAILED))
            }
            Some(Tested::Reboot) => {
                let text =
                    "rebooting; the rehearsal goes on, `offshoot selftest --result` tells its end";
                self.say(text, &json!({ "rebooting": true }))?;
                device::reboot(&self.config.install.reboot_command).await?;
                Ok(ExitCode::SUCCESS)
            }
            Some(Tested::Finished(report)) => {
                let lines = report.answers.iter().map(|answer| {
                    let verdict = if answer.passed { "ok  " } else { "FAIL" };
                    format!("{verdict} {:19} {}", answer.question.name(), answer.found)
                });
                let text = lines.collect::<Vec<_>>().join("\n");
                self.say(text, &report)?;
                Ok(if report.passed {
                    ExitCode::SUCCESS
                } else {
                    ExitCode::from(code::NOT_SOUND)
                })
            }
        }
    }

    async fn health(&self) -> Result<ExitCode> {
        log();
        let (ending, report) = health::run(&self.config).await?;
        if ending == Ending::Healthy {
            tracing::info!(
                MESSAGE_ID = events::HEALTHY,
                "every required health check passed"
            );
        } else {
            let failed = report.failed().join(" ");
            tracing::warn!(
                MESSAGE_ID = events::UNHEALTHY,
                CHECKS = failed,
                "required health checks failed: {failed}"
            );
        }
        let word = match ending {
            Ending::Healthy => "healthy",
            Ending::Unhealthy => "unhealthy",
            Ending::FallBack => "unhealthy-trial",
        };
        self.say(word, &json!({ "ending": word, "checks": report.checks }))?;
        if ending == Ending::FallBack {
            device::reboot(&self.config.install.reboot_command)
                .await
                .context("the deadline of the trial will reboot the device")?;
        }
        Ok(if ending == Ending::Healthy {
            ExitCode::SUCCESS
        } else {
            ExitCode::from(code::UNHEALTHY)
        })
    }

    fn confirm(&self) -> Result<ExitCode> {
        log();
        let confirmed = health::confirm(&self.config)? == Confirmed::Confirmed;
        let text = if confirmed {
            tracing::info!(MESSAGE_ID = events::CONFIRMING, "the trial is kept");
            "confirmed"
        } else {
            "nothing is on trial"
        };
        self.say(text, &json!({ "confirmed": confirmed }))?;
        Ok(ExitCode::SUCCESS)
    }

    async fn daemon(self) -> Result<ExitCode> {
        log();
        let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
        let listener = api::listen(&self.config.paths.run)?;
        // Commands are done one at a time; a few may wait.
        let (command_sender, commands) = mpsc::channel(4);
        let (status, status_receiver) = watch::channel(None);
        let api = api::serve(listener, command_sender, status_receiver);
        let stop = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        let ends = daemon::Ends { commands, status };
        tokio::select! {
            result = daemon::run(self.config, ends, stop) => result?,
            () = api => {}
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// To the journal if that is where standard error goes, with the message ids; else to standard error.
fn log() {
    // An empty word would be read as `error`.
    let level = std::env::var("OFFSHOOT_LOG")
        .ok()
        .filter(|wanted| !wanted.is_empty())
        .and_then(|wanted| wanted.parse().ok())
        .unwrap_or(tracing_subscriber::filter::LevelFilter::INFO);
    let journal = match std::env::var_os("JOURNAL_STREAM") {
        Some(_) => tracing_journald::layer(),
        None => Err(io::ErrorKind::NotFound.into()),
    };
    let registry = tracing_subscriber::registry();
    match journal {
        Ok(journal) => {
            let journal = journal
                .with_field_prefix(None)
                .with_syslog_identifier("offshoot".to_owned());
            registry.with(journal.with_filter(level)).init();
        }
        Err(_) => {
            let stderr = tracing_subscriber::fmt::layer()
                .with_writer(io::stderr)
                .with_ansi(io::stderr().is_terminal())
                .with_target(false);
            registry.with(stderr.with_filter(level)).init();
        }
    }
}
