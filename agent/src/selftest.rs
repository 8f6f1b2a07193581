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
//! | stage on disk | then | on the next boot is expected |
//! |---|---|---|
//! | `counting` | the counter is armed, reboot | `offshoot.trial=1`, and one boot counted where the system reads it |
//! | `falling-back` | the counter is exhausted, reboot | `offshoot.fallback=exhausted` |
//! | `watchdog` | the counter is settled; the watchdog is opened and not fed | a boot that nobody asked for |
//!
//! The stage is on disk before what it names is done. A power cut in between leaves an environment that was not changed, which the bootloader
//! does not change back: the stage is then begun again. Only of the watchdog nothing can be read afterwards on every board, so a power cut
//! in that minute passes for it. While `rehearsal.json` is there nothing is confirmed, given up for its health, or installed.
//! `offshoot-selftest.service` goes on after each reboot.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bootloader_glue::protocol::{Environment, Fallback, Mark};
use jiff::Timestamp as Time;
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::decide::{Consent, Download};
use crate::device::Device;
use crate::health;
use crate::record::{self, Phase};
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

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rehearsal {
    stage: Stage,
    /// The kernel's id of the boot on which the stage began.
    boot: String,
    with_watchdog: bool,
    /// What the environment had before.
    bootlimit: u8,
    answers: Vec<Answer>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Stage {
    Counting,
    FallingBack,
    Watchdog,
}

/// What a boot in the middle of a rehearsal looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    mark: Mark,
    environment: Environment,
    /// It is another boot than the one on which the stage began.
    rebooted: bool,
}

/// What to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Next {
    /// The stage did not begin yet: do what it names.
    Begin,
    /// Go on with this stage, having learnt this.
    Enter(Stage, Vec<Answer>),
    /// Nothing is left to be tried with the counter: it is settled, and the watchdog comes last.
    Settled(Vec<Answer>),
    End(Vec<Answer>),
}

/// How a call ended.
#[derive(Debug)]
pub enum Ending {
    Finished(Report),
    /// The caller reboots the device, and the rehearsal goes on after it.
    Reboot,
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

/// Looks, and if all is well begins a rehearsal.
pub async fn rehearse(config: &Config, with_watchdog: bool) -> Result<Ending> {
    ensure!(
        !is_rehearsing(&config.paths.state),
        "a rehearsal is going on: it goes on after the next reboot, `offshoot selftest --abandon` ends it"
    );
    let (device, _) = Device::open(config)?;
    ensure!(
        device.record().phase == Phase::Idle,
        "an update is going on: wait until it has ended"
    );
    let deployments = device
        .observe(None, |_, _| Download::Allowed, |_| Consent::AwaitsOperator)
        .await?
        .deployments;
    ensure!(
        deployments.deployments.len() == 1,
        "there are {} deployments: a rehearsal falls back, and would boot another release. Rehearse on the factory's image, or remove the others (ostree admin undeploy)",
        deployments.deployments.len()
    );
    let mut report = look(config).await?;
    if !with_watchdog {
        report
            .answers
            .retain(|answer| answer.question != Question::Watchdog);
        report = Report::new(report.answers, false);
    }
    let Environment::Valid { counter, .. } = config.bootloader().read()? else {
        return finish(config, report);
    };
    if !report.passed {
        return finish(config, report);
    }
    let rehearsal = Rehearsal {
        stage: Stage::Counting,
        boot: boot_id(config)?,
        with_watchdog,
        bootlimit: counter.bootlimit,
        answers: report.answers,
    };
    rehearsal.save(config)?;
    config.bootloader().arm(config.bootloader.tries)?;
    Ok(Ending::Reboot)
}

/// Goes on with the rehearsal that is going on, if there is one.
pub fn resume(config: &Config) -> Result<Option<Ending>> {
    let Some(mut rehearsal) = read::<Rehearsal>(&config.paths.state.join("rehearsal.json"))? else {
        return Ok(None);
    };
    loop {
        let seen = Seen {
            mark: health::mark(&config.paths.kernel_command_line)?,
            environment: config.bootloader().read()?,
            rebooted: rehearsal.boot != boot_id(config)?,
        };
        match judge(rehearsal.stage, &seen) {
            Next::Begin => {
                return match rehearsal.stage {
                    Stage::Counting => {
                        config.bootloader().arm(config.bootloader.tries)?;
                        Ok(Some(Ending::Reboot))
                    }
                    Stage::FallingBack => {
                        config.bootloader().exhaust()?;
                        Ok(Some(Ending::Reboot))
                    }
                    Stage::Watchdog => {
                        let answer =
                            Answer::of(Question::WatchdogFires, Watchdog::find(config)?.starve());
                        rehearsal.answers.push(answer);
                        rehearsal.end(config).map(Some)
                    }
                };
            }
            Next::Enter(stage, answers) => {
                rehearsal.answers.extend(answers);
                rehearsal.enter(stage, config)?;
            }
            Next::Settled(answers) => {
                rehearsal.answers.extend(answers);
                rehearsal.settle(config)?;
                if !rehearsal.with_watchdog {
                    return rehearsal.end(config).map(Some);
                }
                rehearsal.enter(Stage::Watchdog, config)?;
            }
            Next::End(answers) => {
                rehearsal.answers.extend(answers);
                return rehearsal.end(config).map(Some);
            }
        }
    }
}

/// Ends a rehearsal where it is; the counter is settled.
pub fn abandon(config: &Config) -> Result<bool> {
    let Some(rehearsal) = read::<Rehearsal>(&config.paths.state.join("rehearsal.json"))? else {
        return Ok(false);
    };
    rehearsal.settle(config)?;
    remove(&config.paths.state.join("rehearsal.json"))?;
    Ok(true)
}

/// The whole rehearsal, as a table.
fn judge(stage: Stage, seen: &Seen) -> Next {
    let counted = match &seen.environment {
        Environment::Valid { counter, .. } if counter.upgrade_available => Some(counter),
        Environment::Valid { .. } | Environment::Absent | Environment::Corrupt => None,
    };
    let shared = || {
        Answer::passed(
            Question::EnvironmentShared,
            "the bootloader counted where the system reads it",
        )
    };
    let falls_back = || {
        Answer::passed(
            Question::CounterFallsBack,
            "the counter was spent, and the bootloader fell back",
        )
    };
    match (stage, seen.rebooted, seen.mark) {
        (_, false, _) => Next::Begin,
        // The power was cut before the counter was armed, or before it was exhausted.
        (Stage::Counting, true, Mark::Normal) if counted.is_none() => Next::Begin,
        (Stage::FallingBack, true, Mark::Trial { .. })
            if counted.is_some_and(|counter| counter.bootcount < counter.bootlimit) =>
        {
            Next::Begin
        }
        (Stage::Counting, true, Mark::Trial { tries }) => {
            match counted.map(|counter| counter.bootcount) {
                Some(count) if count == tries => Next::Enter(Stage::FallingBack, vec![shared()]),
                count => Next::End(vec![Answer::failed(
                    Question::EnvironmentShared,
                    format!(
                        "the bootloader says that this is boot {tries} of a trial, and the environment that the system reads says {}: \
                         they are not the same environment, compare the bootloader's place for it with the configuration's",
                        count.map_or("nothing".to_owned(), |count| count.to_string())
                    ),
                )]),
            }
        }
        // The power was cut once too often: all tries were used, and that shows both.
        (Stage::Counting, true, Mark::Fallback(Fallback::Exhausted)) => {
            Next::Settled(vec![shared(), falls_back()])
        }
        (Stage::Counting, true, Mark::Fallback(why)) => Next::Settled(vec![Answer::failed(
            Question::EnvironmentShared,
            format!(
                "the bootloader fell back ({}): it cannot write or read the environment's place",
                why.name()
            ),
        )]),
        (Stage::Counting, true, Mark::Normal) => Next::Settled(vec![Answer::failed(
            Question::EnvironmentShared,
            "a trial was armed and the bootloader knew nothing of it: it reads its environment from another place, or does not run the counting script",
        )]),
        (Stage::FallingBack, true, Mark::Fallback(Fallback::Exhausted)) => {
            Next::Settled(vec![falls_back()])
        }
        (Stage::FallingBack, true, mark) => Next::Settled(vec![Answer::failed(
            Question::CounterFallsBack,
            format!(
                "the counter was spent and the bootloader did not fall back ({}): a bad release would be booted for ever",
                match mark {
                    Mark::Normal => "it booted as if nothing were armed".to_owned(),
                    Mark::Trial { tries } => format!("it counted try {tries}"),
                    Mark::Fallback(why) =>
                        format!("it fell back for another reason, {}", why.name()),
                }
            ),
        )]),
        (Stage::Watchdog, true, _) => Next::End(vec![Answer::passed(
            Question::WatchdogFires,
            "nobody fed it, and it reset the unit",
        )]),
    }
}

impl Rehearsal {
    fn save(&self, config: &Config) -> Result<()> {
        record::replace(
            &config.paths.state.join("rehearsal.json"),
            &serde_json::to_vec(self)?,
        )
    }

    fn enter(&mut self, stage: Stage, config: &Config) -> Result<()> {
        self.stage = stage;
        self.boot = boot_id(config)?;
        self.save(config)
    }

    /// The environment as it was. The number of tries is the one value that a trial changes for good.
    fn settle(&self, config: &Config) -> Result<()> {
        let bootloader = config.bootloader();
        match bootloader.read()? {
            Environment::Valid { counter, .. } if counter.bootlimit != self.bootlimit => {
                bootloader.arm(self.bootlimit)?;
            }
            Environment::Valid { .. } | Environment::Absent | Environment::Corrupt => {}
        }
        Ok(bootloader.settle()?)
    }

    fn end(self, config: &Config) -> Result<Ending> {
        self.settle(config)?;
        finish(config, Report::new(self.answers, true))
    }
}

/// The report first: a cut between the two leaves a rehearsal whose end is reached again.
fn finish(config: &Config, report: Report) -> Result<Ending> {
    let state = &config.paths.state;
    record::replace(&state.join("selftest.json"), &serde_json::to_vec(&report)?)?;
    remove(&state.join("rehearsal.json"))?;
    Ok(Ending::Finished(report))
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
    match config.bootloader().read()? {
        Environment::Valid {
            counter,
            damaged: false,
        } if !counter.upgrade_available => {
            Ok(format!("whole, disarmed, {} tries", counter.bootlimit))
        }
        Environment::Valid { damaged: true, .. } => {
            anyhow::bail!(
                "one copy of the boot environment is bad: the next update makes it whole, or the storage is bad"
            )
        }
        Environment::Valid { counter, .. } => anyhow::bail!(
            "a trial is armed ({} of {} boots used): wait until it has ended",
            counter.bootcount,
            counter.bootlimit
        ),
        Environment::Absent => anyhow::bail!(
            "there is no boot environment: the image initialises it, `offshoot-fleet image` does"
        ),
        Environment::Corrupt => anyhow::bail!(
            "no copy of the boot environment is valid: initialise it, and if that does not last replace the storage"
        ),
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
                "{} is not there: the kernel knows no watchdog, build in or load its driver",
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
        let feed_every = |microseconds: u64| {
            Command::new("busctl")
                .args(["set-property", "org.freedesktop.systemd1"])
                .args([
                    "/org/freedesktop/systemd1",
                    "org.freedesktop.systemd1.Manager",
                ])
                .args(["RuntimeWatchdogUSec", "t", &microseconds.to_string()])
                .status()
                .context("starting busctl")
        };
        let stopped = feed_every(0)?;
        ensure!(
            stopped.success(),
            "the service manager does not give the watchdog up"
        );
        let mut device = fs::File::options()
            .write(true)
            .open(&self.device)
            .with_context(|| format!("opening {}", self.device.display()))?;
        rustix::fs::sync();
        device.write_all(b"1").context("starting the watchdog")?;
        std::thread::sleep(self.timeout + WATCHDOG_MARGIN);
        // It did not fire. Leave it as it was.
        device.write_all(b"V").context("stopping the watchdog")?;
        drop(device);
        let half = u64::try_from(self.timeout.as_micros()).unwrap_or(u64::MAX);
        feed_every(half)?;
        anyhow::bail!(
            "nobody fed {} for {} s and it did not reset the unit: a system that hangs would hang for ever",
            self.identity,
            (self.timeout + WATCHDOG_MARGIN).as_secs()
        )
    }
}

fn boot_id(config: &Config) -> Result<String> {
    let path = &config.paths.boot_id;
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    Ok(text.trim().to_owned())
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

#[cfg(test)]
mod tests {
    use bootloader_glue::protocol::Counter;

    use super::*;

    fn seen(mark: Mark, bootcount: Option<u8>) -> Seen {
        let counter = Counter {
            upgrade_available: bootcount.is_some(),
            bootcount: bootcount.unwrap_or(0),
            bootlimit: 3,
            rollback: false,
        };
        Seen {
            mark,
            environment: Environment::Valid {
                counter,
                damaged: false,
            },
            rebooted: true,
        }
    }

    /// The questions that were answered, and how.
    fn answers(next: &Next) -> (&'static str, Vec<(Question, bool)>) {
        let (kind, answers) = match next {
            Next::Begin => return ("begin", vec![]),
            Next::Enter(_, answers) => ("enter", answers),
            Next::Settled(answers) => ("settled", answers),
            Next::End(answers) => ("end", answers),
        };
        let answers = answers.iter();
        (
            kind,
            answers
                .map(|answer| (answer.question, answer.passed))
                .collect(),
        )
    }

    #[test]
    fn every_boot_of_a_rehearsal_has_a_row() {
        use Question::{CounterFallsBack, EnvironmentShared, WatchdogFires};
        use Stage::{Counting, FallingBack, Watchdog};
        let trial = |tries| Mark::Trial { tries };
        let exhausted = Mark::Fallback(Fallback::Exhausted);
        for (stage, seen, kind, expected) in [
            (
                Counting,
                seen(trial(1), Some(1)),
                "enter",
                vec![(EnvironmentShared, true)],
            ),
            (
                Counting,
                seen(trial(2), Some(2)),
                "enter",
                vec![(EnvironmentShared, true)],
            ),
            // The bootloader counts in one place, the system reads another.
            (
                Counting,
                seen(trial(1), Some(0)),
                "end",
                vec![(EnvironmentShared, false)],
            ),
            (
                Counting,
                seen(trial(1), None),
                "end",
                vec![(EnvironmentShared, false)],
            ),
            (
                Counting,
                seen(Mark::Normal, Some(0)),
                "settled",
                vec![(EnvironmentShared, false)],
            ),
            (
                Counting,
                seen(Mark::Fallback(Fallback::Unsaved), Some(0)),
                "settled",
                vec![(EnvironmentShared, false)],
            ),
            (
                Counting,
                seen(exhausted, Some(3)),
                "settled",
                vec![(EnvironmentShared, true), (CounterFallsBack, true)],
            ),
            (
                FallingBack,
                seen(exhausted, Some(3)),
                "settled",
                vec![(CounterFallsBack, true)],
            ),
            (
                FallingBack,
                seen(trial(4), Some(4)),
                "settled",
                vec![(CounterFallsBack, false)],
            ),
            (
                FallingBack,
                seen(Mark::Normal, Some(3)),
                "settled",
                vec![(CounterFallsBack, false)],
            ),
            (
                FallingBack,
                seen(Mark::Fallback(Fallback::Corrupt), None),
                "settled",
                vec![(CounterFallsBack, false)],
            ),
            (
                Watchdog,
                seen(Mark::Normal, None),
                "end",
                vec![(WatchdogFires, true)],
            ),
        ] {
            assert_eq!(
                answers(&judge(stage, &seen)),
                (kind, expected),
                "{stage:?} {seen:?}"
            );
            // On the boot on which it began nothing is known yet.
            let same = Seen {
                rebooted: false,
                ..seen
            };
            assert_eq!(judge(stage, &same), Next::Begin);
        }
    }

    #[test]
    fn a_stage_that_the_power_cut_short_is_begun_again() {
        let trial = Mark::Trial { tries: 2 };
        for (stage, seen) in [
            (Stage::Counting, seen(Mark::Normal, None)),
            (Stage::FallingBack, seen(trial, Some(2))),
        ] {
            assert_eq!(judge(stage, &seen), Next::Begin);
        }
    }
}
