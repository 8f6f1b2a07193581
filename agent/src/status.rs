//! The one answer to "why am I (not) updating?", as the daemon tells it and `offshoot status` prints it.
//!
//! JSON field names are stable; times are RFC 3339 in UTC by the device's clock, sizes are bytes. Fields may be added, so readers ignore
//! those that they do not know.

use std::fmt::{self, Write as _};

use bootloader_glue::protocol::{Counter, Environment, Fallback, Mark};
use serde::{Deserialize, Serialize};

use crate::commit::Commit;
use crate::decide::{Step, Why};
use crate::device;
use crate::record::{Hold, Phase, Reason};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Grows with every change.
    pub revision: u64,
    /// The agent's version.
    pub agent: String,
    pub booted: Release,
    pub phase: Phase,
    /// What is being done, or `wait`, or `rebooting` when the reboot is on its way, or `observe` when the device cannot be looked at.
    pub step: String,
    /// Why nothing is being done; null while something is.
    pub why: Option<Why>,
    /// What changes this next, if time alone does.
    pub next: Option<Next>,
    pub channel: String,
    pub hardware: String,
    /// The newest release that the channel has for this hardware.
    pub offer: Option<Release>,
    /// How the newest release is fetched, while it is not here.
    pub plan: Option<Plan>,
    /// Of the download that is going on.
    pub progress: Option<Progress>,
    /// Bytes that were fetched this calendar month.
    pub month: u64,
    pub rejections: Vec<Rejected>,
    pub hold: Option<Hold>,
    /// The boot counter can be relied on.
    pub protected: bool,
    /// Why it cannot.
    pub unprotected_because: Option<String>,
    pub boot: Boot,
    /// Null: absent or corrupt, `boot_environment` says which.
    pub environment: Option<Variables>,
    pub boot_environment: BootEnvironment,
    /// In boot order: the first is the bootloader's default.
    pub deployments: Vec<Deployed>,
    pub last_poll: Option<Poll>,
    /// The step that failed last and is to be tried again.
    pub failure: Option<Failure>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Release {
    pub commit: Commit,
    pub version: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Next {
    pub what: NextIs,
    pub at: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NextIs {
    /// The server is asked.
    Poll,
    /// The step that failed is tried again.
    Retry,
    /// A window of time opens.
    Window,
    /// The month's limit begins anew.
    Month,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    pub way: device::Kind,
    /// The deployment that the delta starts from; null: from nothing.
    pub from: Option<Commit>,
    pub total: u64,
    pub missing: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    pub done: u64,
    pub total: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rejected {
    pub commit: Commit,
    pub reason: Reason,
    /// By the device's time floor then.
    pub at: String,
}

/// What the bootloader told this boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Boot {
    Normal,
    Trial { tries: u8 },
    Exhausted,
    Unsaved,
    Corrupt,
    Unloadable,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BootEnvironment {
    Whole,
    /// One copy of two is bad; the next write makes it whole.
    Damaged,
    Absent,
    Corrupt,
}

/// The boot environment's variables, in the names integrators know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Variables {
    pub upgrade_available: bool,
    pub bootcount: u8,
    pub bootlimit: u8,
    pub rollback: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deployed {
    pub commit: Commit,
    pub version: Option<String>,
    pub booted: bool,
    pub pinned: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Poll {
    pub at: String,
    /// Null if the server answered and its metadata verified.
    pub error: Option<PollFailure>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PollFailure {
    pub kind: PollFailureKind,
    /// Its name: a [`crate::fetch::Fault`], or a [`crate::trust::Refusal`], or `device`.
    #[serde(default)]
    pub fault: String,
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PollFailureKind {
    /// The server or the way to it.
    Fetch,
    /// What the server has breaks a rule of the metadata.
    Refused,
    /// This device's own disk or configuration.
    Device,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub step: String,
    /// Its name, where there is one that tells more than `device`.
    #[serde(default)]
    pub fault: String,
    pub message: String,
    /// In a row, without getting further in a download.
    pub times: u32,
}

impl From<Mark> for Boot {
    fn from(mark: Mark) -> Self {
        match mark {
            Mark::Normal => Self::Normal,
            Mark::Trial { tries } => Self::Trial { tries },
            Mark::Fallback(Fallback::Exhausted) => Self::Exhausted,
            Mark::Fallback(Fallback::Unsaved) => Self::Unsaved,
            Mark::Fallback(Fallback::Corrupt) => Self::Corrupt,
            Mark::Fallback(Fallback::Unloadable) => Self::Unloadable,
        }
    }
}

impl From<&Environment> for BootEnvironment {
    fn from(environment: &Environment) -> Self {
        match environment {
            Environment::Absent => Self::Absent,
            Environment::Corrupt => Self::Corrupt,
            Environment::Valid { damaged: true, .. } => Self::Damaged,
            Environment::Valid { damaged: false, .. } => Self::Whole,
        }
    }
}

impl Variables {
    pub fn of(environment: &Environment) -> Option<Self> {
        match environment {
            Environment::Absent | Environment::Corrupt => None,
            Environment::Valid { counter, .. } => Some(counter.into()),
        }
    }
}

impl From<&Counter> for Variables {
    fn from(counter: &Counter) -> Self {
        let Counter {
            upgrade_available,
            bootcount,
            bootlimit,
            rollback,
        } = *counter;
        Self {
            upgrade_available,
            bootcount,
            bootlimit,
            rollback,
        }
    }
}

/// The name of a step in `step`, `failure.step` and the journal's `STEP`.
pub const fn name(step: &Step) -> &'static str {
    match step {
        Step::Wait(_) => "wait",
        Step::Stage { .. } => "stage",
        Step::Abandon => "abandon",
        Step::Fetch { .. } => "fetch",
        Step::Apply { .. } => "apply",
        Step::Prune { .. } => "prune",
        Step::BeginTrial { .. } => "begin-trial",
        Step::Arm => "arm",
        Step::Deploy { .. } => "deploy",
        Step::Reboot => "reboot",
        Step::Confirmed { .. } => "confirmed",
        Step::Reject { .. } => "reject",
        Step::Undeploy { .. } => "undeploy",
        Step::Settle => "settle",
    }
}

/// The kind of a reason, as in JSON and the journal's `REASON`.
pub const fn kind(reason: &Reason) -> &'static str {
    match reason {
        Reason::Unhealthy { .. } => "unhealthy",
        Reason::Unconfirmed => "unconfirmed",
        Reason::CounterNotSaved => "counter-not-saved",
        Reason::EnvironmentCorrupt => "environment-corrupt",
        Reason::Unloadable => "unloadable",
        Reason::NotInstalled => "not-installed",
    }
}

impl Why {
    /// As in JSON and the journal's `WHY`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::AwaitingConfirmation => "awaiting-confirmation",
            Self::NothingOffered => "nothing-offered",
            Self::UpToDate => "up-to-date",
            Self::Rejected => "rejected",
            Self::Held => "held",
            Self::AnotherDefault => "another-default",
            Self::Unprotected => "unprotected",
            Self::Rehearsing => "rehearsing",
            Self::NoRoute => "no-route",
            Self::OverLimit => "over-limit",
            Self::Metered => "metered",
            Self::AwaitingDownloadWindow => "awaiting-download-window",
            Self::AwaitingInstallWindow => "awaiting-install-window",
            Self::AwaitingConsent => "awaiting-consent",
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AwaitingConfirmation => {
                "the running system is on trial and not confirmed yet: its health checks decide"
            }
            Self::NothingOffered => "the server has no release for this channel and hardware",
            Self::UpToDate => "the newest release is running",
            Self::Rejected => {
                "the newest release was tried and rejected: `offshoot retry` allows it again"
            }
            Self::Held => "updates are held: `offshoot hold --release` ends it",
            Self::AnotherDefault => {
                "the next boot is set to another system than the one that runs: reboot into it or make this one the default"
            }
            Self::Unprotected => {
                "a bad release could not be rolled back: the bootloader does not count"
            }
            Self::Rehearsing => {
                "the fallback is being rehearsed (offshoot selftest): it goes on after the next reboot"
            }
            Self::NoRoute => {
                "the newest release has no delta from this one, and none from nothing: the operator publishes one"
            }
            Self::OverLimit => {
                "the newest release is larger than the limit for a release or for what is left of the month: `offshoot update --over-limits` fetches it all the same"
            }
            Self::Metered => {
                "the link is metered: another one is waited for, or `offshoot update --over-limits`"
            }
            Self::AwaitingDownloadWindow => {
                "releases are fetched at another time: `offshoot update` does it now"
            }
            Self::AwaitingInstallWindow => {
                "a release is ready and is tried at another time: `offshoot update` does it now"
            }
            Self::AwaitingConsent => "a release is ready: `offshoot update` installs it and reboots",
        })
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unhealthy { checks } => {
                write!(f, "required health checks failed: {}", checks.join(", "))
            }
            Self::Unconfirmed => f.write_str(
                "it used up its tries: it panicked, hung, lost power or never became healthy",
            ),
            Self::CounterNotSaved => f.write_str("the bootloader could not save its counter"),
            Self::EnvironmentCorrupt => {
                f.write_str("the boot environment was unreadable during its trial")
            }
            Self::Unloadable => f.write_str("the bootloader could not load its kernel"),
            Self::NotInstalled => f.write_str("it could not be stored or deployed"),
        }
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.version {
            Some(version) => write!(f, "{version} ({})", short(self.commit)),
            None => f.write_str(&short(self.commit)),
        }
    }
}

/// Enough of a commit to recognise it.
pub fn short(commit: Commit) -> String {
    commit.to_string()[..12].to_owned()
}

impl Status {
    /// One line: what the device is doing, or why it does nothing.
    pub fn summary(&self) -> String {
        if let Some(failure) = &self.failure {
            return format!("{} failed: {}", failure.step, failure.message);
        }
        match (&self.why, &self.offer) {
            (Some(why), _) => why.to_string(),
            (None, _) if self.step == "rebooting" => "rebooting into the new system".to_owned(),
            (None, Some(offer)) => match self.progress {
                Some(Progress { done, total }) => {
                    format!("fetching {offer}: {}", Share { done, total })
                }
                None => format!("{} {offer}", self.step),
            },
            (None, None) => self.step.clone(),
        }
    }
}

/// `12.3 of 45.6 MB (27 %)`
pub struct Share {
    pub done: u64,
    pub total: u64,
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mb = |bytes: u64| bytes as f64 / 1e6;
        let percent = (self.done.saturating_mul(100))
            .checked_div(self.total)
            .unwrap_or(100);
        write!(
            f,
            "{:.1} of {:.1} MB ({percent} %)",
            mb(self.done),
            mb(self.total)
        )
    }
}

/// What `offshoot status` prints.
impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |key: &str, value: &str| writeln!(f, "{key:>11}  {value}");
        line("running", &self.booted.to_string())?;
        line("state", &self.summary())?;
        if let Some(next) = &self.next {
            let what = match next.what {
                NextIs::Poll => "the server is asked",
                NextIs::Retry => "it is tried again",
                NextIs::Window => "the window opens",
                NextIs::Month => "the month's limit begins anew",
            };
            line("next", &format!("{what} at {}", next.at))?;
        }
        line(
            "channel",
            &format!("{} for {}", self.channel, self.hardware),
        )?;
        match (&self.offer, &self.plan) {
            (Some(offer), Some(plan)) => {
                let share = Share {
                    done: plan.total - plan.missing.min(plan.total),
                    total: plan.total,
                };
                let way = match (plan.way, plan.from) {
                    (device::Kind::Deltas, Some(from)) => format!("the delta from {}", short(from)),
                    (device::Kind::Deltas, None) => "the delta from nothing".to_owned(),
                    (device::Kind::Objects, _) => "the missing objects".to_owned(),
                };
                line("newest", &format!("{offer}, {share} of {way} here"))?;
            }
            (Some(offer), None) => line("newest", &offer.to_string())?,
            (None, _) => line("newest", "none known")?,
        }
        if let Some(poll) = &self.last_poll {
            let outcome = poll
                .error
                .as_ref()
                .map_or("answered", |error| error.message.as_str());
            line("last poll", &format!("{}, {outcome}", poll.at))?;
        }
        for rejected in &self.rejections {
            let text = format!("{}: {}", short(rejected.commit), rejected.reason);
            line("rejected", &text)?;
        }
        if let Some(hold) = &self.hold {
            line("held", &hold.reason)?;
        }
        match (&self.unprotected_because, &self.environment) {
            (Some(why), _) => line("unprotected", why)?,
            (None, Some(counter)) if counter.upgrade_available => line(
                "counter",
                &format!(
                    "armed, {} of {} boots used{}",
                    counter.bootcount,
                    counter.bootlimit,
                    if counter.rollback { ", given up" } else { "" }
                ),
            )?,
            (None, Some(_)) => line("counter", "disarmed")?,
            (None, None) => line("counter", "no boot environment yet")?,
        }
        let mut deployments = String::new();
        for (place, deployed) in self.deployments.iter().enumerate() {
            let release = Release {
                commit: deployed.commit,
                version: deployed.version.clone(),
            };
            let separator = if place > 0 { ", " } else { "" };
            let note = if deployed.booted { " running" } else { "" };
            write!(deployments, "{separator}{release}{note}")?;
        }
        line("boot order", &deployments)
    }
}
