//! `offshoot selftest`: whether this unit would survive a bad release, asked where it is made and not where it is used.
//!
//! The quick test looks and changes nothing. The rehearsal proves, over reboots, what no look can: that the bootloader and the system share one
//! environment, that a spent counter falls back, that the watchdog fires. Nothing is deployed: the running deployment is put on trial as if
//! it were new, and given up.
//!
//! | file in the state directory | what |
//! |---|---|
//! | `rehearsal.json` | a rehearsal that is going on: its stage, and what was found so far |
//! | `selftest.json` | the last finished test |
//!
//! - `rehearsal`: the stages, and what a power cut between them leaves.

mod rehearsal;

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bootloader_glue::protocol::Environment;
use bootloader_glue::uboot::places;
use jiff::Timestamp as Time;
use serde::{Deserialize, Serialize};

use crate::config::{BootloaderKind, Config};
use crate::decide::{Consent, Download};
use crate::device::Device;
use crate::trust::store::Store;
use crate::trust::verify;

/// A clock before this is one that was never set: the project is younger.
const YOUNGEST_CLOCK: Time = Time::constant(1_735_689_600, 0);

/// Beyond the watchdog's own time-out, before it is said not to fire.
const WATCHDOG_MARGIN: Duration = Duration::from_secs(30);

/// What is asked of a unit. The names are the JSON's, for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Question {
    /// The running system is a deployment, and its deployments can be read.
    Deployment,
    /// The trusted root is in the image, signed and not expired.
    TrustedRoot,
    /// The time to judge by is one that a device of today has.
    Clock,
    /// The unit has an identity of its own.
    Identity,
    /// The boot environment is whole, and nothing is on trial.
    BootEnvironment,
    /// The bootloader's configuration is one that counts.
    BootCounter,
    /// There is a watchdog, and the service manager feeds it.
    Watchdog,
    /// The bootloader counts in the environment that the system reads.
    EnvironmentShared,
    /// A spent counter boots the fallback.
    CounterFallsBack,
    /// A watchdog that nobody feeds resets the unit.
    WatchdogFires,
}

impl Question {
    /// As in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Deployment => "deployment",
            Self::TrustedRoot => "trusted-root",
            Self::Clock => "clock",
            Self::Identity => "identity",
            Self::BootEnvironment => "boot-environment",
            Self::BootCounter => "boot-counter",
            Self::Watchdog => "watchdog",
            Self::EnvironmentShared => "environment-shared",
            Self::CounterFallsBack => "counter-falls-back",
            Self::WatchdogFires => "watchdog-fires",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Answer {
    pub question: Question,
    pub passed: bool,
    /// What was found, and if it is not what it should be, what to do about it.
    pub found: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    pub passed: bool,
    /// It went over the reboots.
    pub rehearsed: bool,
    pub answers: Vec<Answer>,
}

impl Answer {
    fn passed(question: Question, found: impl Into<String>) -> Self {
        Self {
            question,
            passed: true,
            found: found.into(),
        }
    }

    fn failed(question: Question, found: impl Into<String>) -> Self {
        Self {
            question,
            passed: false,
            found: found.into(),
        }
    }

    fn of(question: Question, result: Result<String>) -> Self {
        match result {
            Ok(found) => Self::passed(question, found),
            Err(error) => Self::failed(question, format!("{error:#}")),
        }
    }
}

impl Report {
    fn new(answers: Vec<Answer>, rehearsed: bool) -> Self {
        Self {
            passed: answers.iter().all(|answer| answer.passed),
            rehearsed,
            answers,
        }
    }
}

pub use rehearsal::{Ending, abandon, rehearse, resume};

/// Whether a rehearsal is going on. One that cannot be read is.
pub fn is_rehearsing(state: &Path) -> bool {
    state.join("rehearsal.json").exists()
}

/// The last finished test.
pub fn last(config: &Config) -> Result<Option<Report>> {
    read(&config.paths.state.join("selftest.json"))
}

/// Looks, and changes nothing.
pub async fn look(config: &Config) -> Result<Report> {
    let answers = vec![
        Answer::of(Question::Deployment, deployment(config).await),
        Answer::of(Question::TrustedRoot, trusted_root(config)),
        Answer::of(Question::Clock, clock(config)),
        Answer::of(Question::Identity, identity(config)),
        Answer::of(Question::BootEnvironment, boot_environment(config)),
        Answer::of(
            Question::BootCounter,
            (config.bootloader().probe())
                .map(|()| "it counts the boots of a trial".to_owned())
                .map_err(Into::into),
        ),
        Answer::of(
            Question::Watchdog,
            Watchdog::find(config).map(|watchdog| {
                format!(
                    "{}, {} s, fed by the service manager",
                    watchdog.identity,
                    watchdog.timeout.as_secs()
                )
            }),
        ),
    ];
    Ok(Report::new(answers, false))
}

async fn deployment(config: &Config) -> Result<String> {
    let (device, _) = Device::open(config)?;
    let observed = device
        .observe(None, |_, _| Download::Allowed, |_| Consent::AwaitsOperator)
        .await?;
    let booted = observed.facts.booted;
    Ok(format!(
        "{booted} runs, {} deployed",
        observed.facts.deployed.len()
    ))
}

fn trusted_root(config: &Config) -> Result<String> {
    let path = &config.paths.root_metadata;
    let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    let root = verify::trusted_root(&bytes).with_context(|| format!("in {}", path.display()))?;
    let store = Store::open(config.paths.state.join("tuf"), &bytes)?;
    let now = store.now(Time::now(), Time::UNIX_EPOCH);
    let current = store.root().clone();
    let (version, expires) = (current.version, current.expires);
    verify::current_root(current, now).context("compose an image with a newer root")?;
    Ok(format!(
        "version {} in the image, version {version} trusted, until {expires}",
        root.version
    ))
}

fn clock(config: &Config) -> Result<String> {
    let bytes = fs::read(&config.paths.root_metadata)?;
    let store = Store::open(config.paths.state.join("tuf"), &bytes)?;
    let now = store.now(Time::now(), Time::UNIX_EPOCH);
    ensure!(
        now >= YOUNGEST_CLOCK,
        "it is {now}: set the clock, or let the unit poll once, so that signed metadata lifts it"
    );
    Ok(format!("{now}"))
}

/// What tells this unit from its siblings. An image that carries one makes clones.
fn identity(config: &Config) -> Result<String> {
    let path = config.paths.root.join("etc/machine-id");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let id = text.trim();
    ensure!(
        id.len() == 32 && id.bytes().all(|digit| digit.is_ascii_hexdigit()),
        "{} has {id:?}, which is no machine id: the first boot writes one, `systemd-machine-id-setup` does",
        path.display()
    );
    let shipped = config.paths.root.join("usr/etc/machine-id");
    let shipped = match fs::read_to_string(&shipped) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => {
            return Err(error).with_context(|| format!("reading {}", shipped.display()));
        }
    };
    ensure!(
        shipped.trim() != id,
        "the machine id {id} is in the image (usr/etc/machine-id): every unit made from it has the same one, compose it with an empty file"
    );
    Ok(format!("machine id {id}"))
}

fn boot_environment(config: &Config) -> Result<String> {
    let Whereabouts { place, same, .. } = Whereabouts::of(config);
    match config.bootloader().read()? {
        Environment::Valid {
            counter,
            damaged: false,
        } if !counter.upgrade_available => {
            Ok(format!("whole, disarmed, {} tries", counter.bootlimit))
        }
        Environment::Valid { damaged: true, .. } => {
            anyhow::bail!(
                "one copy of the boot environment {place} is bad: the next update makes it whole, or the storage is bad"
            )
        }
        Environment::Valid { counter, .. } => anyhow::bail!(
            "a trial is armed ({} of {} boots used): wait until it has ended",
            counter.bootcount,
            counter.bootlimit
        ),
        Environment::Absent => anyhow::bail!(
            "there is no boot environment {place}: {same}; if that is so already, initialise it, as `offshoot-fleet image` does"
        ),
        Environment::Corrupt => anyhow::bail!(
            "no copy of the boot environment {place} is valid: {same}; if that is so already, initialise it, and if that does not last replace the \
             storage"
        ),
    }
}

/// Where the system looks for the boot environment, in words, and what to do if the bootloader has it elsewhere or does not count.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Whereabouts {
    place: String,
    same: String,
    counting: &'static str,
}

impl Whereabouts {
    fn of(config: &Config) -> Self {
        if config.bootloader.kind == BootloaderKind::Grub {
            let environment = config.bootloader.environment.display();
            return Self {
                place: format!("in {environment}/env.0 and env.1 ([bootloader] environment)"),
                same: format!(
                    "let {environment} be the directory offshoot on the EFI system partition that GRUB is started from"
                ),
                counting: "let GRUB run the grub.cfg that ostree-grub-generator writes (OSTREE_GRUB2_EXEC), and nothing before it",
            };
        }
        let file = config.bootloader.config.display();
        // What is wrong with the file is said where it is read.
        let places = fs::read_to_string(&config.bootloader.config).map(|text| places::parse(&text));
        let listed = match places {
            Ok(Ok(places)) => {
                let places = places.iter().map(|place| {
                    let sign = if place.offset < 0 { "-" } else { "" };
                    let (device, size) = (place.device.display(), place.size);
                    format!(
                        "{device} {sign}{:#x} {size:#x}",
                        place.offset.unsigned_abs()
                    )
                });
                format!(": {}", places.collect::<Vec<_>>().join(", "))
            }
            Ok(Err(_)) | Err(_) => String::new(),
        };
        Self {
            place: format!("named by {file} ([bootloader] config{listed})"),
            same: format!(
                "let the devices, offsets and sizes in {file} be those that U-Boot was built with (CONFIG_ENV_OFFSET, CONFIG_ENV_SIZE, CONFIG_ENV_FAT_FILE)"
            ),
            counting: "let U-Boot's bootcmd run boot.scr as mkimage makes it of boot.cmd, unchanged",
        }
    }
}

struct Watchdog {
    device: PathBuf,
    identity: String,
    timeout: Duration,
}

impl Watchdog {
    /// The watchdog that the service manager feeds.
    fn find(config: &Config) -> Result<Self> {
        let class = &config.paths.watchdog_class;
        let attribute = |name: &str| {
            let path = class.join(name);
            let text = fs::read_to_string(&path);
            text.map(|text| text.trim().to_owned())
        };
        let identity = attribute("identity").with_context(|| {
            format!(
                "{} is not there: the kernel knows no watchdog. Build in or load its driver; a board without one cannot come back from a hang",
                class.display()
            )
        })?;
        let timeout: u64 = attribute("timeout")?
            .parse()
            .with_context(|| format!("{}/timeout", class.display()))?;
        let state = attribute("state")?;
        ensure!(
            state == "active",
            "nobody feeds {identity}: set RuntimeWatchdogSec= in /etc/systemd/system.conf"
        );
        let name = class.file_name().context("the watchdog has no name")?;
        Ok(Self {
            device: Path::new("/dev").join(name),
            identity,
            timeout: Duration::from_secs(timeout),
        })
    }

    /// Takes it from the service manager and does not feed it. Returns only if it does not fire.
    fn starve(&self) -> Result<String> {
        let waited = give_up_feeding().and_then(|()| self.wait_unfed());
        // It did not fire, or could not be had. Leave it as it was.
        feed_again()?;
        anyhow::bail!(
            "nobody fed {} for {} s and it did not reset the unit: a system that hangs would hang for ever",
            self.identity,
            waited?.as_secs()
        )
    }

    fn wait_unfed(&self) -> Result<Duration> {
        let long_enough = self.timeout + WATCHDOG_MARGIN;
        let mut device = fs::File::options()
            .write(true)
            .open(&self.device)
            .with_context(|| format!("opening {}", self.device.display()))?;
        rustix::fs::sync();
        device.write_all(b"1").context("starting the watchdog")?;
        std::thread::sleep(long_enough);
        device.write_all(b"V").context("stopping the watchdog")?;
        Ok(long_enough)
    }
}

/// Says to the service manager that there is no watchdog to feed. In `/run`, so that a power cut leaves nothing of it, and through a
/// file, because a small system has no message bus.
const UNFED: &str = "/run/systemd/system.conf.d/zz-offshoot-selftest.conf";

fn give_up_feeding() -> Result<()> {
    let path = Path::new(UNFED);
    let directory = path.parent().context("it is in a directory")?;
    fs::create_dir_all(directory)
        .and_then(|()| fs::write(path, "[Manager]\nRuntimeWatchdogSec=0\n"))
        .with_context(|| format!("writing {UNFED}"))?;
    reload_service_manager()
}

fn feed_again() -> Result<()> {
    remove(Path::new(UNFED))?;
    reload_service_manager()
}

fn reload_service_manager() -> Result<()> {
    let reloaded = Command::new("systemctl")
        .arg("daemon-reload")
        .status()
        .context("starting systemctl")?;
    ensure!(
        reloaded.success(),
        "the service manager does not read its configuration again: systemctl daemon-reload, {reloaded}"
    );
    Ok(())
}

fn read<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<Option<T>> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .with_context(|| format!("{} is corrupt: remove it", path.display())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
    }
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}
