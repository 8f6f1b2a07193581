//! The words that an operator, and systemd, say to `offshoot`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};
use bootloader_glue::Confirmed;
use clap::{Parser, Subcommand};
use serde_json::json;

use crate::config::Config;
use crate::health::{self, Ending};

/// Updates this device: a new system beside the running one, kept only if it proves healthy.
///
/// Exit codes: 0 done, 1 failed (the reason is on standard error), 2 usage, 3 a required health check failed.
#[derive(Parser)]
#[command(name = "offshoot", version)]
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
            eprintln!("offshoot: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(arguments: &Arguments) -> Result<ExitCode> {
    let config = Config::load(&arguments.root)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting")?;
    match arguments.verb {
        Verb::Health => {
            let ending = runtime.block_on(health::run(&config))?;
            let say = |text: &str| match arguments.json {
                true => println!("{}", json!({ "ending": text })),
                false => println!("{text}"),
            };
            match ending {
                Ending::Healthy => say("healthy"),
                Ending::Unhealthy => say("unhealthy"),
                Ending::FallBack => {
                    say("unhealthy-trial");
                    reboot(&config)?;
                }
            }
            Ok(if ending == Ending::Healthy {
                ExitCode::SUCCESS
            } else {
                ExitCode::from(3)
            })
        }
        Verb::Confirm => {
            let confirmed = health::confirm(&config)? == Confirmed::Confirmed;
            match (arguments.json, confirmed) {
                (true, _) => println!("{}", json!({ "confirmed": confirmed })),
                (false, true) => println!("confirmed"),
                (false, false) => println!("nothing is on trial"),
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Asks for the reboot, and does not wait for it.
fn reboot(config: &Config) -> Result<()> {
    let [program, arguments @ ..] = config.install.reboot_command.as_slice() else {
        bail!("install.reboot_command is empty");
    };
    let status = Command::new(program)
        .args(arguments)
        .status()
        .with_context(|| format!("starting {program}"))?;
    if !status.success() {
        bail!("{program} ended with {status}: the deadline of the trial will reboot the device");
    }
    Ok(())
}
