//! The record: the little that a device cannot observe about itself.
//!
//! Owns `record.0` and `record.1` in the state directory. Each is one line of header and one JSON object:
//!
//! | bytes | meaning |
//! |---|---|
//! | `offshoot-record 1 <generation> <sha256>\n` | format, a counter that grows with every save, the digest of the rest |
//! | JSON | [`Record`] |
//!
//! A save replaces the older copy (temporary name, fsync, rename, fsync of the directory), so the newer copy is never
//! touched: a power cut before, during or after a save leaves either the former record or the new one. Newer means the
//! greater generation, never a clock. A copy that does not verify is renamed to `record.N.corrupt` and reported; when
//! both are bad the record starts afresh, and [`crate::decide`] rebuilds from what can be observed.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::commit::{Commit, Sha256};

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    pub phase: Phase,
    /// Commits that this device does not try again, and why.
    #[serde(default)]
    pub rejections: BTreeMap<Commit, Rejection>,
    /// An operator's word not to install anything.
    #[serde(default)]
    pub hold: Option<Hold>,
    /// The channel that the operator chose over the configured one.
    #[serde(default)]
    pub channel: Option<String>,
}

/// What the device is in the middle of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "lowercase", deny_unknown_fields)]
pub enum Phase {
    #[default]
    Idle,
    /// `target` is being fetched and stored beside the running system. `attempts` counts the applies begun. The cheapest way that
    /// has not failed is taken.
    Staging {
        from: Commit,
        target: Commit,
        attempts: u8,
        #[serde(default)]
        failed: FailedWays,
    },
    /// `target` is to be, or is being, or has been tried by booting it. `attempts` counts the deploys begun.
    Trial {
        from: Commit,
        target: Commit,
        attempts: u8,
    },
}

/// The ways to a release ([`crate::route`]) whose files are wrong or missing on the server, or could not be stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FailedWays {
    pub from_here: bool,
    pub objects: bool,
    pub from_nothing: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rejection {
    pub reason: Reason,
    /// The device's time floor when it was recorded, in seconds since 1970.
    pub at: i64,
}

/// Why a commit is rejected.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Reason {
    /// Required health checks failed on its trial boot.
    Unhealthy { checks: Vec<String> },
    /// Every try was used up and nothing confirmed it: it panicked, hung, lost power or never became ready.
    Unconfirmed,
    /// The bootloader could not write its counter, so the release could not be tried under protection.
    CounterNotSaved,
    /// The boot environment was unreadable during the trial.
    EnvironmentCorrupt,
    /// The bootloader could not load its kernel.
    Unloadable,
    /// It could not be stored or deployed, as often as tried.
    NotInstalled,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hold {
    pub reason: String,
}

/// Rejections that are kept, of a device that is offered bad releases for years. Only the newest release is ever offered.
const REJECTIONS: usize = 64;

impl Record {
    /// Remembers that `commit` is not tried again, and forgets the oldest rejection if there are too many.
    pub fn reject(&mut self, commit: Commit, rejection: Rejection) {
        self.rejections.insert(commit, rejection);
        if self.rejections.len() > REJECTIONS {
            let others = self
                .rejections
                .iter()
                .filter(|(other, _)| **other != commit);
            let oldest = others.min_by_key(|(_, rejection)| rejection.at);
            if let Some(oldest) = oldest.map(|(commit, _)| *commit) {
                self.rejections.remove(&oldest);
            }
        }
    }
}

/// The record's place on disk, and the generation that was read from it.
#[derive(Debug)]
pub struct Store {
    directory: PathBuf,
    generation: u64,
    /// The copy that the next save replaces.
    older: usize,
}

/// What `Store::open` found besides the record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Damage {
    None,
    /// One copy did not verify; the other served.
    OneCopy(PathBuf),
    /// No copy verified: the record starts afresh.
    BothCopies,
}

impl Store {
    /// Reads the record below `directory`, setting damaged copies aside. No copy at all is a new device, not damage.
    pub fn open(directory: &Path) -> Result<(Self, Record, Damage)> {
        fs::create_dir_all(directory)
            .with_context(|| format!("creating {}", directory.display()))?;
        let mut newest: Option<(u64, usize, Record)> = None;
        let mut damaged = Vec::new();
        for copy in 0..2 {
            let path = directory.join(format!("record.{copy}"));
            let bytes = match fs::read(&path) {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => {
                    return Err(error).with_context(|| format!("reading {}", path.display()));
                }
            };
            match decode(&bytes) {
                Some((generation, record)) => {
                    if newest
                        .as_ref()
                        .is_none_or(|(newest, ..)| generation > *newest)
                    {
                        newest = Some((generation, copy, record));
                    }
                }
                None => {
                    let aside = directory.join(format!("record.{copy}.corrupt"));
                    fs::rename(&path, &aside)
                        .with_context(|| format!("setting {} aside", path.display()))?;
                    damaged.push(aside);
                }
            }
        }
        let damage = match (damaged.pop(), newest.is_some()) {
            (None, _) => Damage::None,
            (Some(aside), true) => Damage::OneCopy(aside),
            (Some(_), false) => Damage::BothCopies,
        };
        let (generation, newer, record) = newest.unwrap_or((0, 1, Record::default()));
        Ok((
            Self {
                directory: directory.to_owned(),
                generation,
                older: 1 - newer,
            },
            record,
            damage,
        ))
    }

    /// Makes `record` the one that the next start reads.
    pub fn save(&mut self, record: &Record) -> Result<()> {
        let generation = self.generation + 1;
        let path = self.directory.join(format!("record.{}", self.older));
        replace(&path, &encode(generation, record)?)?;
        self.generation = generation;
        self.older = 1 - self.older;
        Ok(())
    }
}

/// Reads the record without setting anything aside, for programs that only look.
pub fn peek(directory: &Path) -> Result<Record> {
    let mut newest: Option<(u64, Record)> = None;
    for copy in 0..2 {
        let path = directory.join(format!("record.{copy}"));
        match fs::read(&path) {
            Ok(bytes) => {
                if let Some((generation, record)) = decode(&bytes)
                    && newest
                        .as_ref()
                        .is_none_or(|(newest, _)| generation > *newest)
                {
                    newest = Some((generation, record));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
        }
    }
    Ok(newest.map_or_else(Record::default, |(_, record)| record))
}

/// Replaces the file at `path` so that a power cut leaves the former content or all of the new one.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = path.with_extension("new");
    let write = || -> io::Result<()> {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        let directory = path.parent().unwrap_or(Path::new("/"));
        File::open(directory)?.sync_all()
    };
    write().with_context(|| format!("writing {}", path.display()))
}

fn encode(generation: u64, record: &Record) -> Result<Vec<u8>> {
    let json = serde_json::to_vec(record).context("encoding the record")?;
    let mut bytes = format!(
        "offshoot-record 1 {generation} {}\n",
        digest(generation, &json)
    )
    .into_bytes();
    bytes.extend(json);
    Ok(bytes)
}

/// A copy's generation and the record in it, if it verifies.
pub fn decode(bytes: &[u8]) -> Option<(u64, Record)> {
    let end = bytes.iter().position(|byte| *byte == b'\n')?;
    let header = std::str::from_utf8(&bytes[..end]).ok()?;
    let json = &bytes[end + 1..];
    let rest = header.strip_prefix("offshoot-record 1 ")?;
    let (generation, sum) = rest.split_once(' ')?;
    let generation = generation.parse().ok()?;
    if sum != digest(generation, json).to_string() {
        return None;
    }
    Some((generation, serde_json::from_slice(json).ok()?))
}

/// The generation is part of what is checked: a flipped bit in it must not make an older copy the newer one.
fn digest(generation: u64, json: &[u8]) -> Sha256 {
    let mut checked = generation.to_be_bytes().to_vec();
    checked.extend(json);
    Sha256::of(&checked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_oldest_rejection_makes_room_and_never_the_new_one() {
        let commit = |n: usize| Commit(Sha256::of(&n.to_be_bytes()));
        let mut record = Record::default();
        for n in 0..REJECTIONS + 2 {
            // A clock that was set back: the last one has the least time.
            let at = if n == REJECTIONS + 1 { -1 } else { n as i64 };
            let reason = Reason::Unconfirmed;
            record.reject(commit(n), Rejection { reason, at });
        }
        let expected = (2..REJECTIONS + 2).map(commit).collect();
        let kept: std::collections::BTreeSet<_> = record.rejections.into_keys().collect();
        assert_eq!(kept, expected);
    }

    fn record(n: u8) -> Record {
        let commit = Commit(Sha256::of(&[n]));
        let reason = Reason::Unhealthy {
            checks: vec![format!("check-{n}")],
        };
        Record {
            phase: Phase::Staging {
                from: commit,
                target: commit,
                attempts: n,
                failed: FailedWays {
                    objects: n % 2 == 1,
                    ..FailedWays::default()
                },
            },
            rejections: [(
                commit,
                Rejection {
                    reason,
                    at: i64::from(n),
                },
            )]
            .into(),
            hold: Some(Hold {
                reason: "n".repeat(usize::from(n)),
            }),
            channel: None,
        }
    }

    fn saved(upto: u8) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let (mut store, first, damage) = Store::open(directory.path()).unwrap();
        assert_eq!((first, damage), (Record::default(), Damage::None));
        for n in 1..=upto {
            store.save(&record(n)).unwrap();
        }
        directory
    }

    #[test]
    fn the_last_record_saved_is_the_one_read() {
        for upto in 1..6 {
            let directory = saved(upto);
            let (_, read, damage) = Store::open(directory.path()).unwrap();
            assert_eq!((read, damage), (record(upto), Damage::None));
            assert_eq!(peek(directory.path()).unwrap(), record(upto));
        }
    }

    #[test]
    fn a_save_never_touches_the_newer_copy() {
        let directory = saved(4);
        let newer = fs::read(directory.path().join("record.1")).unwrap();
        let (mut store, ..) = Store::open(directory.path()).unwrap();
        store.save(&record(5)).unwrap();
        assert_eq!(fs::read(directory.path().join("record.1")).unwrap(), newer);
    }

    #[test]
    fn both_copies_damaged_start_afresh_and_are_set_aside() {
        let directory = saved(2);
        for copy in 0..2 {
            fs::write(directory.path().join(format!("record.{copy}")), b"junk").unwrap();
        }
        let (mut store, read, damage) = Store::open(directory.path()).unwrap();
        assert_eq!((read, damage), (Record::default(), Damage::BothCopies));
        assert_eq!(
            fs::read(directory.path().join("record.0.corrupt")).unwrap(),
            b"junk"
        );
        store.save(&record(9)).unwrap();
        assert_eq!(Store::open(directory.path()).unwrap().1, record(9));
    }

    #[test]
    fn an_unknown_field_is_damage_not_a_guess() {
        let json = br#"{"phase":{"phase":"idle"},"surprise":1}"#;
        let mut bytes = format!("offshoot-record 1 3 {}\n", digest(3, json)).into_bytes();
        bytes.extend(json);
        assert_eq!(decode(&bytes), None);
    }

    proptest! {
        #[test]
        fn any_damage_to_one_copy_yields_the_former_record_or_the_new_one(
            copy in 0..2usize, cut in 0..400usize, flip in proptest::option::of((0..400usize, 0..8u8)),
        ) {
            let directory = saved(4);
            let path = directory.path().join(format!("record.{copy}"));
            let mut bytes = fs::read(&path).unwrap();
            bytes.truncate(cut.min(bytes.len()));
            if let Some((at, bit)) = flip && !bytes.is_empty() {
                let at = at % bytes.len();
                bytes[at] ^= 1 << bit;
            }
            fs::write(&path, &bytes).unwrap();
            let (_, read, _) = Store::open(directory.path()).unwrap();
            prop_assert!(read == record(3) || read == record(4));
        }
    }
}
