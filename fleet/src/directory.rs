//! The operator's directory: where everything is, and the settings in `fleet.toml`.
//!
//! | path | what |
//! |---|---|
//! | `fleet.toml` | hardware ids, lifetimes of metadata, which deltas; the operator's to edit |
//! | `keys/` | private keys, see [`crate::keys`] |
//! | `repo/` | the OSTree repository |
//! | `public/` | what a web server serves |
//! | `root.json` | the newest root, for images |
//! | `prepared/` | what waits for signatures, see [`crate::prepared`] |
//! | `.lock` | held by whoever publishes |
//! | `.scratch/` | what is being made; removed by the next one who publishes |
//!
//! The channels are not listed in `fleet.toml`: they are what the signed targets delegate.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use jiff::{SignedDuration, Timestamp as Time};
use offshoot::trust::schema::{HardwareId, RoleName};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::keys::Keys;
use crate::keys::passphrase::Passphrases;

pub(crate) const SETTINGS: &str = "fleet.toml";

/// How long another one at work is waited for.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(crate) struct Fleet {
    pub directory: PathBuf,
    pub settings: Settings,
    /// What opens its keys.
    pub passphrases: Passphrases,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Settings {
    /// The kinds of device that releases may be published for.
    pub hardware: Vec<HardwareId>,
    /// From how many former releases a new one gets deltas.
    #[serde(default = "deltas")]
    pub deltas: usize,
    /// To how many former releases the deltas that led to them are named on the way to a new one.
    #[serde(default = "chain")]
    pub chain: usize,
    /// Whether each release also gets a delta from nothing.
    #[serde(default)]
    pub full: bool,
    /// Whether each release also gets its objects one by one.
    #[serde(default = "objects")]
    pub objects: bool,
    #[serde(default)]
    pub lifetimes: Lifetimes,
}

/// How long what a role signs is believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Lifetimes {
    pub root: Lifetime,
    pub targets: Lifetime,
    pub channel: Lifetime,
    pub snapshot: Lifetime,
    pub timestamp: Lifetime,
}

/// Days, hours or minutes: `90d`, `12h`, `30m`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Lifetime {
    count: u32,
    unit: Unit,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    Days,
    Hours,
    Minutes,
}

/// While it exists, nobody else publishes.
#[derive(Debug)]
pub(crate) struct Lock(#[allow(dead_code, reason = "its being open is the lock")] File);

/// Another process holds the lock.
#[derive(Debug, thiserror::Error)]
#[error("another offshoot-fleet is at work in {}: wait for it to end, then try again", .0.display())]
pub(crate) struct Busy(PathBuf);

pub(crate) const fn deltas() -> usize {
    3
}

pub(crate) const fn chain() -> usize {
    10
}

pub(crate) const fn objects() -> bool {
    true
}

impl Default for Lifetimes {
    fn default() -> Self {
        let days = |count| Lifetime {
            count,
            unit: Unit::Days,
        };
        Self {
            root: days(3650),
            targets: days(365),
            channel: days(90),
            snapshot: days(30),
            timestamp: days(7),
        }
    }
}

impl Fleet {
    pub(crate) fn open(directory: &Path) -> Result<Self> {
        let path = directory.join(SETTINGS);
        ensure!(
            path.exists(),
            "{} does not exist: name the operator's directory with --fleet, or make one with `offshoot-fleet init`",
            path.display()
        );
        let text =
            fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let settings =
            toml::from_str(&text).with_context(|| format!("reading {}", path.display()))?;
        Ok(Self {
            directory: directory.to_owned(),
            settings,
            passphrases: Passphrases::default(),
        })
    }

    pub(crate) fn with_passphrases(self, passphrases: Passphrases) -> Self {
        Self {
            passphrases,
            ..self
        }
    }

    pub(crate) fn keys(&self) -> Keys {
        Keys::new(self.directory.join("keys"), self.passphrases.clone())
    }

    pub(crate) fn repo(&self) -> PathBuf {
        self.directory.join("repo")
    }

    pub(crate) fn public(&self) -> PathBuf {
        self.directory.join("public")
    }

    pub(crate) fn metadata(&self, name: &str) -> PathBuf {
        self.public().join("metadata").join(name)
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.directory.join("root.json")
    }

    /// Taken away whole by the next one who asks for it.
    pub(crate) fn scratch(&self, _lock: &Lock) -> Result<PathBuf> {
        let path = self.directory.join(".scratch");
        if path.exists() {
            fs::remove_dir_all(&path).with_context(|| format!("removing {}", path.display()))?;
        }
        fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(path)
    }

    /// Gone with the process that holds it, however that ends. A short while is waited for another one: a refresh by a timer need not
    /// fail because somebody looks.
    pub(crate) fn lock(&self) -> Result<Lock> {
        let path = self.directory.join(".lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(|| format!("opening {}", path.display()))?;
        let give_up = Instant::now() + LOCK_PATIENCE;
        loop {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Lock(file)),
                Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < give_up => {
                    std::thread::sleep(Duration::from_millis(50));
                }
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    return Err(Busy(self.directory.clone()).into());
                }
                Err(error) => {
                    return Err(error).with_context(|| format!("locking {}", path.display()));
                }
            }
        }
    }

    /// A hardware id that is not listed is more likely misspelt than new.
    pub(crate) fn knows(&self, hardware: &HardwareId) -> Result<()> {
        let known: Vec<_> = self
            .settings
            .hardware
            .iter()
            .map(HardwareId::as_str)
            .collect();
        ensure!(
            self.settings.hardware.contains(hardware),
            "{} lists the hardware {known:?}, not {hardware}: add it to `hardware` there if it is a new kind of device",
            self.directory.join(SETTINGS).display()
        );
        Ok(())
    }
}

impl Settings {
    /// The file that `init` writes.
    pub(crate) fn to_toml(hardware: &[HardwareId]) -> String {
        let list: Vec<_> = hardware
            .iter()
            .map(|id| format!("{:?}", id.as_str()))
            .collect();
        let Lifetimes {
            root,
            targets,
            channel,
            snapshot,
            timestamp,
        } = Lifetimes::default();
        format!(
            "\
# The kinds of device that releases may be published for.
hardware = [{}]

# From how many former releases of the channel and hardware a new one gets deltas.
deltas = {}

# For devices that are further behind: how many former releases may be on the way to a new one, by the deltas that led to them.
chain = {}

# Whether each release also gets a delta from nothing, for devices that have none of those releases.
full = false

# Whether each release also gets its objects one by one, for devices that no delta is for: they download those that they do not have.
objects = true

# How long what a role signs is believed: days, hours or minutes (d, h, m). `offshoot-fleet refresh` signs again in the last third.
[lifetimes]
root = \"{root}\"
targets = \"{targets}\"
channel = \"{channel}\"
snapshot = \"{snapshot}\"
timestamp = \"{timestamp}\"
",
            list.join(", "),
            deltas(),
            chain(),
        )
    }
}

impl Lifetimes {
    pub(crate) fn of(&self, role: &str) -> Lifetime {
        match role {
            "root" => self.root,
            "targets" => self.targets,
            "snapshot" => self.snapshot,
            "timestamp" => self.timestamp,
            _channel => self.channel,
        }
    }
}

impl Lifetime {
    fn duration(self) -> SignedDuration {
        let count = i64::from(self.count);
        match self.unit {
            Unit::Days => SignedDuration::from_hours(24 * count),
            Unit::Hours => SignedDuration::from_hours(count),
            Unit::Minutes => SignedDuration::from_mins(count),
        }
    }

    /// When what is signed now expires.
    pub(crate) fn from(self, now: Time) -> Result<Time> {
        now.checked_add(self.duration())
            .map_err(|error| anyhow!("a lifetime of {self} ends after the calendar: {error}"))
    }

    /// It is time to sign again: less than a third is left.
    pub(crate) fn is_late(self, expires: Time, now: Time) -> bool {
        now.duration_until(expires) < self.duration() / 3
    }
}

impl FromStr for Lifetime {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let refuse = || anyhow!("{text:?} is not a lifetime: write 90d, 12h or 30m");
        let unit = match text.chars().last() {
            Some('d') => Unit::Days,
            Some('h') => Unit::Hours,
            Some('m') => Unit::Minutes,
            Some(_) | None => return Err(refuse()),
        };
        let count: u32 = text[..text.len() - 1].parse().map_err(|_| refuse())?;
        // A hundred years: the calendar has an end.
        let lifetime = Self { count, unit };
        if count == 0 || lifetime.duration() > SignedDuration::from_hours(24 * 36_525) {
            return Err(refuse());
        }
        Ok(lifetime)
    }
}

impl TryFrom<String> for Lifetime {
    type Error = anyhow::Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Lifetime> for String {
    fn from(lifetime: Lifetime) -> Self {
        lifetime.to_string()
    }
}

impl std::fmt::Display for Lifetime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let unit = match self.unit {
            Unit::Days => 'd',
            Unit::Hours => 'h',
            Unit::Minutes => 'm',
        };
        write!(f, "{}{unit}", self.count)
    }
}

/// The channels' names, to choose one from.
pub(crate) fn names<'a>(channels: impl Iterator<Item = &'a RoleName>) -> String {
    channels
        .map(RoleName::as_str)
        .collect::<Vec<_>>()
        .join(", ")
}
