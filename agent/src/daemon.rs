//! The daemon: `observe → decide → perform → record`, between polls, at an operator's word, until it is told to stop.
//!
//! One task does all of it, so that there is one order of events; the API's connections and the watchdog are other tasks on the same
//! thread, and speak to it through a channel each way. A download is given up for a command and goes on after it, because what is in the
//! spool stays; a run of the deployer is waited for. Everything that must survive is on disk before the next step, so the daemon may be
//! killed at any moment.
//!
//! - `policy`: what may be done now; `tell`: what is told about it.
//!
//! Does not know how a step is done ([`crate::device`]) or why it is the next one ([`crate::decide`]).

mod policy;
mod tell;

use std::future::Future;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use jiff::tz::TimeZone;
use jiff::{Timestamp as Time, Zoned};
use rustix::rand::{GetRandomFlags, getrandom};
use sd_notify::NotifyState;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::commit::Commit;
use crate::config::{self, Config};
use crate::decide::{Consent, Download, Step, Why};
use crate::device::{self, Device, Observed};
use crate::events;
use crate::fetch::{
    self, Backoff, Directory, Server, ServerConfig, Source, WORTH_CONTINUING, poll_delay,
};
use crate::poll::{PollError, Poller};
use crate::record::Hold;
use crate::status::{self, Status};
use crate::trust::schema::{HardwareId, RoleName, time};
use crate::trust::store::Store;
use crate::trust::{Release, Verified};
use crate::usage::Usage;

/// How often the boot environment is looked at while a trial waits for its confirmation.
const CONFIRMATION_LOOK: Duration = Duration::from_secs(2);

/// How long a reboot may take before it is asked for again.
const REBOOT_LIMIT: Duration = Duration::from_secs(600);

/// The first poll after a start comes within this, or within the interval if that is shorter: after a power cut a whole site starts at once.
const FIRST_POLL: Duration = Duration::from_secs(60);

/// Progress is told no more often than this.
const PROGRESS_PAUSE: Duration = Duration::from_millis(250);

/// What an operator may say. Each is answered when it is done.
#[derive(Debug)]
pub enum Command {
    /// Ask the server now.
    Check(oneshot::Sender<Status>),
    /// Ask the server now, and install what it offers without waiting for further consent, for a window of time or, if `over_limits`, for
    /// another link or another month.
    Update {
        over_limits: bool,
        /// Not from the server, but from this directory.
        from: Option<PathBuf>,
        reply: oneshot::Sender<Result<Status, Status>>,
    },
    /// Follow this channel, or again the configured one.
    Channel(Option<RoleName>, oneshot::Sender<Result<Status>>),
    /// Install nothing, or again something.
    Hold(Option<Hold>, oneshot::Sender<Result<Status>>),
    /// Try this release again.
    Retry(Commit, oneshot::Sender<Result<Option<Status>>>),
}

/// The daemon's end of the channels to the API.
pub struct Ends {
    pub commands: mpsc::Receiver<Command>,
    pub status: watch::Sender<Option<Status>>,
}

struct Daemon {
    config: Config,
    device: Device,
    observed: Observed,
    trust: Store,
    poller: Poller,
    source: Source,
    source_floor: Time,
    /// A directory that an operator has named, until it fails or the next poll is due.
    local: Option<Source>,
    offer: Option<Verified<Release>>,
    /// The release that an operator has told to install.
    allowed: Option<Allowed>,
    usage: Usage,
    /// Bytes of bodies that came, and how many of them are in `usage`.
    received: Arc<AtomicU64>,
    counted: u64,
    /// When a window that is waited for opens, or one that is open closes, or the month ends.
    turn: Option<(status::NextIs, Due)>,
    poll_due: Due,
    poll_backoff: Backoff,
    last_poll: Option<status::Poll>,
    failure: Option<Failed>,
    step_backoff: Backoff,
    /// The reboot was asked for and is on its way.
    rebooting: bool,
    /// What the device waits for, as it was told last.
    told: Option<Why>,
    status: watch::Sender<Option<Status>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Allowed {
    commit: Commit,
    over_limits: bool,
}

/// What did not work, until something does.
struct Failed {
    /// `None`: the device could not be observed.
    step: Option<Step>,
    fault: &'static str,
    message: String,
    /// In a row, without coming further.
    times: u32,
    /// How many bytes there were at the first of them.
    furthest: u64,
    due: Due,
}

/// When something is to be done, and what the device's clock says then.
#[derive(Clone)]
struct Due {
    when: Instant,
    at: String,
}

impl Due {
    fn after(delay: Duration, now: Time) -> Self {
        Self {
            when: Instant::now() + delay,
            at: time::write(now + delay),
        }
    }

    fn is_past(&self) -> bool {
        self.when <= Instant::now()
    }
}

/// Runs until `stop`.
pub async fn run(config: Config, ends: Ends, stop: impl Future<Output = ()>) -> Result<()> {
    let mut stop = pin!(stop);
    let Ends {
        mut commands,
        status,
    } = ends;
    let mut daemon = Daemon::new(config, status).await?;
    let booted = daemon.observed.facts.booted;
    tracing::info!(MESSAGE_ID = events::STARTED, COMMIT = %booted, "running {}", status::short(booted));
    let _watchdog = watchdog();
    notify(&[NotifyState::Ready]);
    loop {
        let step = daemon.look().await;
        daemon.tell(step.as_ref());
        let due = step.as_ref().filter(|step| daemon.is_due(step));
        // A download ends with its window; what is in the spool stays.
        let closes = match (&daemon.turn, due) {
            (Some((_, turn)), Some(Step::Fetch { .. })) => Some(turn.when),
            _ => None,
        };
        let command = tokio::select! {
            biased;
            () = &mut stop => break,
            command = commands.recv() => command,
            () = tokio::time::sleep_until(daemon.wake(step.as_ref())) => None,
        };
        let command = match (command, due) {
            (Some(command), _) => Some(command),
            (None, Some(step)) => tokio::select! {
                biased;
                () = &mut stop => break,
                // A download stays in the spool; nothing else is interrupted.
                command = commands.recv(), if matches!(step, Step::Fetch { .. }) => command,
                () = tokio::time::sleep_until(closes.unwrap_or_else(Instant::now)), if closes.is_some() => None,
                () = daemon.perform(step) => None,
            },
            (None, None) if daemon.poll_due.is_past() => tokio::select! {
                biased;
                () = &mut stop => break,
                () = daemon.poll() => None,
            },
            (None, None) => None,
        };
        if let Some(command) = command {
            daemon.obey(command).await;
        } else if due == Some(&Step::Reboot) && daemon.failure.is_none() {
            daemon.rebooting = true;
            daemon.tell(step.as_ref());
            daemon.rebooting = false;
            tokio::select! {
                () = &mut stop => break,
                () = tokio::time::sleep(REBOOT_LIMIT) => {}
            }
        }
    }
    notify(&[NotifyState::Stopping]);
    Ok(())
}

impl Daemon {
    async fn new(config: Config, status: watch::Sender<Option<Status>>) -> Result<Self> {
        let (device, damage) = Device::open(&config)?;
        for path in device::damaged(&damage, &config.paths.state) {
            tracing::error!(MESSAGE_ID = events::DAMAGED, FILE = %path.display(), "the record was corrupt: set aside as {}", path.display());
        }
        let root = &config.paths.root_metadata;
        let shipped = std::fs::read(root).with_context(|| {
            format!(
                "reading {}: the image ships the trusted root there",
                root.display()
            )
        })?;
        let trust = Store::open(config.paths.state.join("tuf"), &shipped)?;
        for aside in trust.set_aside() {
            tracing::error!(
                MESSAGE_ID = events::DAMAGED,
                FILE = aside.file,
                "{} was corrupt and is set aside: {}",
                aside.file,
                aside.why
            );
        }
        let channel = device.record().channel.as_ref();
        let channel: RoleName = channel
            .unwrap_or(&config.device.channel)
            .parse()
            .context("the channel")?;
        let hardware: HardwareId = config
            .device
            .hardware
            .parse()
            .context("device.hardware in the configuration")?;
        let (usage, aside) = Usage::open(&config.paths.state)?;
        if let Some(path) = aside {
            tracing::error!(MESSAGE_ID = events::DAMAGED, FILE = %path.display(), "the month's count was corrupt: set aside as {}", path.display());
        }
        let offer = trust.accepted(&channel, &hardware);
        let observed = device
            .observe(
                offer.as_ref(),
                |_, _| Download::AwaitsWindow,
                |_| Consent::AwaitsOperator,
            )
            .await?;
        let interval = config.poll_interval();
        let first = FIRST_POLL
            .min(interval)
            .mul_f64(random() as f64 / u64::MAX as f64);
        let floor = trust.now(Time::now(), Time::UNIX_EPOCH);
        let received = Arc::<AtomicU64>::default();
        Ok(Self {
            source: source(&config, floor, &received)?,
            source_floor: floor,
            local: None,
            poller: Poller::new(channel, hardware),
            poll_due: Due::after(first, trust.now(Time::now(), Time::UNIX_EPOCH)),
            poll_backoff: Backoff::new(Duration::from_secs(5).min(interval), interval),
            step_backoff: Backoff::new(Duration::from_secs(2), Duration::from_secs(3600)),
            config,
            device,
            observed,
            trust,
            offer,
            allowed: None,
            usage,
            received,
            counted: 0,
            turn: None,
            last_poll: None,
            failure: None,
            rebooting: false,
            told: None,
            status,
        })
    }

    /// There is something to do, and it did not fail a moment ago.
    fn is_due(&self, step: &Step) -> bool {
        let failing = self
            .failure
            .as_ref()
            .is_some_and(|failed| failed.step.as_ref() == Some(step) && !failed.due.is_past());
        !matches!(step, Step::Wait(_)) && !failing
    }

    /// When to look again without anybody's word.
    fn wake(&self, step: Option<&Step>) -> Instant {
        let poll = match &self.turn {
            Some((_, turn)) => self.poll_due.when.min(turn.when),
            None => self.poll_due.when,
        };
        match step {
            Some(Step::Wait(Why::AwaitingConfirmation)) => {
                poll.min(Instant::now() + CONFIRMATION_LOOK)
            }
            Some(Step::Wait(_)) => poll,
            Some(step) if self.is_due(step) => Instant::now(),
            Some(_) | None => match &self.failure {
                Some(failed) => poll.min(failed.due.when),
                None => poll,
            },
        }
    }

    async fn obey(&mut self, command: Command) {
        // Whoever asked may have gone; what was asked for is done all the same.
        match command {
            Command::Check(reply) => {
                self.poll().await;
                let _ = reply.send(self.answer().await);
            }
            Command::Update {
                over_limits,
                from,
                reply,
            } => {
                self.local = from.map(|path| Directory::new(path).into());
                self.ask().await;
                self.allowed = self.offer.as_ref().map(|offer| Allowed {
                    commit: offer.entry.commit,
                    over_limits,
                });
                self.failure = None;
                let status = self.answer().await;
                let _ = reply.send(if status.why.is_none() {
                    Ok(status)
                } else {
                    Err(status)
                });
            }
            Command::Channel(channel, reply) => {
                let result = self.follow(channel).await;
                let _ = reply.send(result);
            }
            Command::Hold(hold, reply) => {
                let result = self.device.change(|record| record.hold = hold);
                let status = self.answer().await;
                let _ = reply.send(result.map(|()| status));
            }
            Command::Retry(commit, reply) => {
                let known = self.device.record().rejections.contains_key(&commit);
                let result = self.device.change(|record| {
                    record.rejections.remove(&commit);
                });
                let status = self.answer().await;
                let _ = reply.send(result.map(|()| known.then_some(status)));
            }
        }
    }

    /// The status after a command.
    async fn answer(&mut self) -> Status {
        let step = self.look().await;
        self.tell(step.as_ref())
    }

    async fn follow(&mut self, channel: Option<RoleName>) -> Result<Status> {
        let name = match &channel {
            Some(channel) => channel.clone(),
            None => self
                .config
                .device
                .channel
                .parse()
                .context("device.channel in the configuration")?,
        };
        self.device
            .change(|record| record.channel = channel.map(String::from))?;
        if name != self.poller.channel {
            self.poller = Poller::new(name, self.poller.hardware.clone());
            self.offer = None;
            self.poll().await;
        }
        Ok(self.answer().await)
    }

    /// Asks the servers, the first one first.
    async fn poll(&mut self) {
        self.local = None;
        self.source.prefer_first();
        if let Err(error) = self.lift_source_floor(Time::now()) {
            tracing::error!("{error:#}");
        }
        self.ask().await;
    }

    async fn ask(&mut self) {
        let built = self.built();
        let outcome = self
            .poller
            .poll(
                self.local.as_mut().unwrap_or(&mut self.source),
                &mut self.trust,
                Time::now(),
                built,
            )
            .await;
        if outcome.is_err() {
            self.local = None;
        }
        self.count(false);
        let at = time::write(self.now());
        let delay = match outcome {
            Ok(outcome) => {
                let offer = outcome
                    .found
                    .as_ref()
                    .map(|release| release.entry.commit.to_string())
                    .unwrap_or_default();
                tracing::info!(
                    MESSAGE_ID = events::POLLED,
                    OFFER = offer,
                    unchanged = outcome.unchanged,
                    "the server answered"
                );
                let former = self.offer.as_ref().map(|offer| offer.entry.commit);
                self.offer = outcome.found;
                if self.offer.as_ref().map(|offer| offer.entry.commit) != former {
                    // Another release may do better.
                    self.failure = None;
                }
                self.poll_backoff.worked();
                self.last_poll = Some(status::Poll { at, error: None });
                poll_delay(self.config.poll_interval(), random())
            }
            Err(error) => {
                let (kind, retry_after) = match &error {
                    PollError::Fetch(error) => {
                        (status::PollFailureKind::Fetch, error.retry_after())
                    }
                    PollError::Refused(_) => (status::PollFailureKind::Refused, None),
                    PollError::Device(_) => (status::PollFailureKind::Device, None),
                };
                let delay = self.poll_backoff.failed(random(), retry_after);
                let message = error.to_string();
                tracing::warn!(
                    MESSAGE_ID = events::POLL_FAILED,
                    FAULT = error.name(),
                    RETRY_SECONDS = delay.as_secs(),
                    "the poll failed: {message}"
                );
                self.last_poll = Some(status::Poll {
                    at,
                    error: Some(status::PollFailure {
                        kind,
                        fault: error.name().to_owned(),
                        message,
                    }),
                });
                delay
            }
        };
        self.poll_due = Due::after(delay, self.now());
    }

    /// Certificates are judged by a time that is not before what is known.
    fn lift_source_floor(&mut self, now: Time) -> Result<()> {
        let floor = self.trust.now(now, self.built());
        // Not for every second that passes: the connection is worth keeping.
        if self.source_floor < floor && now < floor {
            self.source = source(&self.config, floor, &self.received)?;
            self.source_floor = floor;
        }
        Ok(())
    }

    /// When the running image was made.
    fn built(&self) -> Time {
        let booted = self.observed.facts.booted;
        let mut deployments = self.observed.deployments.deployments.iter();
        let deployment = deployments.find(|deployment| deployment.commit == booted);
        let seconds = deployment.map_or(0, |deployment| deployment.timestamp);
        // A time that cannot be is a floor that does not bind.
        i64::try_from(seconds)
            .map(Time::from_second)
            .map_or(Time::UNIX_EPOCH, |time| time.unwrap_or(Time::UNIX_EPOCH))
    }

    fn now(&self) -> Time {
        self.trust.now(Time::now(), self.built())
    }

    /// Adds what the server has sent since to the month's count. Not being able to keep it stops nothing.
    fn count(&mut self, save: bool) {
        let now = self.now().to_zoned(TimeZone::system());
        let received = self.received.load(Ordering::Relaxed);
        count(&mut self.usage, &mut self.counted, received, &now, save);
    }

    async fn perform(&mut self, step: &Step) {
        let now = self.now();
        let template = self.status.borrow().clone();
        let sender = self.status.clone();
        let mut last = None::<Instant>;
        let received = self.received.clone();
        let zoned = now.to_zoned(TimeZone::system());
        let (usage, counted) = (&mut self.usage, &mut self.counted);
        let mut furthest = 0;
        let mut progress = |done: u64, total: u64| {
            furthest = done.max(furthest);
            let received = received.load(Ordering::Relaxed);
            count(usage, counted, received, &zoned, false);
            let due = last.is_none_or(|last| last.elapsed() >= PROGRESS_PAUSE) || done == total;
            if let (true, Some(template)) = (due, &template) {
                last = Some(Instant::now());
                sender.send_modify(|status| {
                    let revision = status.as_ref().map_or(0, |status| status.revision) + 1;
                    *status = Some(Status {
                        revision,
                        progress: Some(status::Progress { done, total }),
                        ..template.clone()
                    });
                });
            }
        };
        if *step == Step::Reboot {
            // Before it: nobody may hear it afterwards.
            tell::report(step);
        }
        let result = self
            .device
            .perform(
                step,
                self.offer.as_ref(),
                self.local.as_mut().unwrap_or(&mut self.source),
                now,
                &mut progress,
            )
            .await;
        if result.is_err() {
            // Pulled out, or not what it was: the servers are asked.
            self.local = None;
        }
        self.count(matches!(step, Step::Fetch { .. }));
        match result {
            Ok(()) => {
                self.failure = None;
                self.step_backoff.worked();
                if *step != Step::Reboot {
                    tell::report(step);
                }
            }
            Err(error) => self.failed(Some(step), furthest, error.name(), &format!("{error:#}")),
        }
    }

    /// A link that breaks again and again, and brings something each time, is not asked less often for it.
    fn failed(&mut self, step: Option<&Step>, furthest: u64, fault: &'static str, message: &str) {
        let before = (self.failure.as_ref()).filter(|failed| failed.step.as_ref() == step);
        let further = before.is_some_and(|failed| furthest >= failed.furthest + WORTH_CONTINUING);
        if further {
            self.step_backoff.worked();
        }
        let (times, furthest) = match before {
            Some(failed) if !further => (failed.times + 1, failed.furthest),
            Some(_) | None => (1, furthest),
        };
        let delay = self.step_backoff.failed(random(), None);
        let name = step.map_or("observe", status::name);
        tracing::warn!(
            MESSAGE_ID = events::STEP_FAILED,
            STEP = name,
            FAULT = fault,
            RETRY_SECONDS = delay.as_secs(),
            "{name} failed: {message}"
        );
        self.failure = Some(Failed {
            step: step.cloned(),
            fault,
            message: message.to_owned(),
            times,
            furthest,
            due: Due::after(delay, self.now()),
        });
    }
}

fn client(identity: &config::Identity) -> Result<fetch::Identity> {
    let key = match (&identity.key, identity.signer.as_slice()) {
        (Some(key), []) => fetch::ClientKey::File(key.clone()),
        (None, [_, ..]) => fetch::ClientKey::Signer(identity.signer.clone()),
        (Some(_), [_, ..]) | (None, []) => {
            anyhow::bail!(
                "server.identity has to have one of `key` and `signer`: put the key's file or the command there"
            )
        }
    };
    let chain = identity.certificate.clone();
    Ok(fetch::Identity { chain, key })
}

fn source(config: &Config, floor: Time, received: &Arc<AtomicU64>) -> Result<Source> {
    let config::Server {
        url,
        mirrors,
        ca,
        identity,
        insecure_http,
        stall,
        low_speed,
        max_rate,
        proxy,
        no_proxy,
    } = &config.server;
    let identity = identity.as_ref().map(client).transpose()?;
    let server = |url: &String| {
        let settings = ServerConfig {
            ca: ca.clone(),
            stall: Duration::from_secs(*stall),
            low_speed: *low_speed,
            max_rate: *max_rate,
            proxy: proxy.clone(),
            no_proxy: no_proxy.clone(),
            identity: identity.clone(),
            insecure_http: *insecure_http,
            floor,
            received: received.clone(),
            ..ServerConfig::new(url)
        };
        Server::new(settings, concat!("offshoot/", env!("CARGO_PKG_VERSION")))
    };
    // A directory is a server, too: a mounted share.
    if let Some(path) = url.strip_prefix("file://") {
        return Ok(Directory::new(path).into());
    }
    let others = mirrors.iter().map(server).collect::<Result<_>>()?;
    Ok(Source::mirrors(server(url)?, others))
}

fn count(usage: &mut Usage, counted: &mut u64, received: u64, now: &Zoned, save: bool) {
    let bytes = received.saturating_sub(*counted);
    *counted = received;
    if let Err(error) = usage.count(bytes, now, save) {
        tracing::error!("{error:#}");
    }
}

/// Uniform; without the kernel's random numbers the devices of a fleet are merely less spread.
fn random() -> u64 {
    let mut bytes = [0; 8];
    match getrandom(&mut bytes, GetRandomFlags::empty()) {
        Ok(8) => u64::from_ne_bytes(bytes),
        Ok(_) | Err(_) => u64::MAX / 2,
    }
}

/// Tells the service manager, if there is one.
fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "the service manager was not told");
    }
}

/// Shows the service manager that this thread is not stuck.
fn watchdog() -> Option<AbortOnDrop> {
    let pause = sd_notify::watchdog_enabled()? / 2;
    Some(AbortOnDrop(tokio::spawn(async move {
        let mut ticks = tokio::time::interval(pause);
        loop {
            ticks.tick().await;
            notify(&[NotifyState::Watchdog]);
        }
    })))
}

struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
