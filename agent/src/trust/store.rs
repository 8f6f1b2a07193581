//! The metadata that a device has accepted, and the floors below which it believes nothing.
//!
//! One directory: `root.json`, `timestamp.json`, `snapshot.json`, `targets.json`, `<channel>.json` and `manifest` (that of the
//! release last seen) byte for byte as they came, and `floors`: the sha256 of what follows it, a newline, and canonical JSON.
//!
//! **Across a power cut.** Every file is written beside its place, synced, renamed and the directory synced, so each is the former
//! or the new. A new root is kept as soon as it is accepted (5.3.8). All else is written only after everything up to the manifest was
//! verified, with `timestamp.json` last: a cut before it leaves the former timestamp, to which the newer files do not belong,
//! so they are not used and are fetched again; a cut after it loses nothing.
//!
//! **Floors.** A version floor has two carriers: the signed files themselves, and `floors`. What counts is the higher, so that one
//! corrupt file, whichever it is, lowers no floor. A device that loses both is what it was when it left the factory, and says so.
//!
//! **Trust in the disk.** Each file is verified again when it is read, under `root.json`, or under the image's root if that is not
//! older. Expiry is not: what was fresh when it was accepted stays accepted through a reboot. What does not verify is renamed to
//! `*.corrupt` and reported; it is fetched again.
//!
//! **The clock.** `floors` also keeps the latest `issued` of a verified timestamp, and only that. The system's time never enters it:
//! a clock that was wrong once, in the future, would otherwise expire everything for ever. A clock that went back is a fact, and
//! [`Store::now`] lifts it. Should a stolen timestamp key sign a time in the future, the root that takes that key away also drops
//! the time. Does not read or set the system's clock.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{ErrorKind, Read as _, Write as _};
use std::path::PathBuf;

use anyhow::Context as _;
use jiff::Timestamp as Time;
use serde::{Deserialize, Serialize};

use super::schema::{HardwareId, RoleName, Root, Snapshot, Timestamp, time};
use super::verify::{self, CurrentRoot, Floors, Verified};
use super::{Refusal, Release, canonical, schema};
use crate::commit::Sha256;

/// The time to judge by: never before `floor`.
pub fn now(system: Time, floor: Option<Time>) -> Time {
    floor.map_or(system, |floor| floor.max(system))
}

/// The directory, as it was last read or written.
#[derive(Debug)]
pub struct Store {
    directory: PathBuf,
    root: Verified<Root>,
    timestamp: Option<Verified<Timestamp>>,
    files: Files,
    floors: Floors,
    set_aside: Vec<SetAside>,
}

/// The bytes of what was verified together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Files {
    pub(super) timestamp: Option<Vec<u8>>,
    pub(super) snapshot: Option<Vec<u8>>,
    pub(super) targets: Option<Vec<u8>>,
    pub(super) channels: BTreeMap<RoleName, Vec<u8>>,
    pub(super) manifest: Option<Vec<u8>>,
}

/// A file that was found unusable: it is now `<file>.corrupt`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetAside {
    pub file: String,
    pub why: String,
}

impl Store {
    /// Reads the directory, and makes it if there is none. `shipped_root` is the root in the image.
    pub fn open(directory: impl Into<PathBuf>, shipped_root: &[u8]) -> anyhow::Result<Self> {
        let directory = directory.into();
        fs::create_dir_all(&directory)
            .with_context(|| format!("making {}", directory.display()))?;
        let root = verify::trusted_root(shipped_root).context(
            "the root in the image cannot be trusted: install an image with a root that is signed",
        )?;
        let mut store = Self {
            directory,
            root,
            timestamp: None,
            files: Files::default(),
            floors: Floors::default(),
            set_aside: Vec::new(),
        };
        store.read_root()?;
        store.read_floors()?;
        store.read_files()?;
        Ok(store)
    }

    /// What [`Store::open`] found unusable.
    pub fn set_aside(&self) -> &[SetAside] {
        &self.set_aside
    }

    pub fn root(&self) -> &Verified<Root> {
        &self.root
    }

    pub fn floors(&self) -> &Floors {
        &self.floors
    }

    /// The time to judge by: never before the image was built, nor before a verified timestamp was signed.
    pub fn now(&self, system: Time, built: Time) -> Time {
        now(system, self.floors.clock.max(Some(built)))
    }

    /// The release that was last accepted for this channel and hardware, without looking at the clock. `None` if it is not all there.
    pub fn accepted(
        &self,
        channel: &RoleName,
        hardware: &HardwareId,
    ) -> Result<Option<Verified<Release>>, Refusal> {
        let Some(timestamp) = &self.timestamp else {
            return Ok(None);
        };
        let Files {
            snapshot: Some(snapshot),
            targets: Some(targets),
            channels,
            manifest: Some(manifest),
            ..
        } = &self.files
        else {
            return Ok(None);
        };
        let Some(bytes) = channels.get(channel) else {
            return Ok(None);
        };
        let root = self.stored_root();
        let snapshot = verify::accept_snapshot(&root, timestamp, &self.floors, snapshot)?;
        let targets = verify::accept_targets(&root, &snapshot, targets)?;
        let channel = verify::accept_channel(&root, &snapshot, &targets, channel, bytes)?;
        let Some(entry) = channel.newest(hardware)? else {
            return Ok(None);
        };
        verify::accept_manifest(&entry, manifest).map(Some)
    }

    /// Keeps a root that the trusted one has led to (5.3.8).
    pub fn persist_root(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        let root = verify::accept_root(&self.root, bytes).context("keeping a root")?;
        self.write("root.json", bytes)?;
        self.floors = std::mem::take(&mut self.floors).under(&root);
        self.floors.root = self.floors.root.max(root.version.number());
        self.root = root;
        self.write_floors()?;
        // Of what the keys of before have signed, only what these would sign too is still believed.
        self.verify_files();
        Ok(())
    }

    pub(super) fn files(&self) -> &Files {
        &self.files
    }

    pub(super) fn timestamp(&self) -> Option<&Verified<Timestamp>> {
        self.timestamp.as_ref()
    }

    /// Keeps what a refresh has verified. Writes nothing that is already there.
    pub(super) fn persist(
        &mut self,
        files: Files,
        timestamp: &Verified<Timestamp>,
        snapshot: &Verified<Snapshot>,
    ) -> anyhow::Result<()> {
        let held = std::mem::take(&mut self.files);
        // Until all is written, the store answers as one that holds nothing.
        self.timestamp = None;
        for (channel, bytes) in &files.channels {
            if held.channels.get(channel) != Some(bytes) {
                self.write(&format!("{channel}.json"), bytes)?;
            }
        }
        for (name, former, bytes) in [
            ("manifest", &held.manifest, &files.manifest),
            ("targets.json", &held.targets, &files.targets),
            ("snapshot.json", &held.snapshot, &files.snapshot),
            ("timestamp.json", &held.timestamp, &files.timestamp),
        ] {
            match bytes {
                Some(bytes) if former.as_ref() != Some(bytes) => self.write(name, bytes)?,
                Some(_) | None => {}
            }
        }
        let floors = self
            .floors
            .clone()
            .raised_by(&self.root, timestamp, Some(snapshot));
        if floors != self.floors {
            self.floors = floors;
            self.write_floors()?;
        }
        if held.manifest.is_some() && files.manifest.is_none() {
            self.remove("manifest")?;
        }
        // After the timestamp that needs them no more: one channel's metadata may be megabytes.
        for channel in held
            .channels
            .keys()
            .filter(|channel| !files.channels.contains_key(*channel))
        {
            self.remove(&format!("{channel}.json"))?;
        }
        self.files = files;
        self.timestamp = Some(timestamp.clone());
        Ok(())
    }

    fn stored_root(&self) -> CurrentRoot {
        verify::stored_root(self.root.clone())
    }

    fn read_root(&mut self) -> anyhow::Result<()> {
        let Some(bytes) = self.read("root.json", verify::ROOT_LIMIT)? else {
            return Ok(());
        };
        match verify::trusted_root(&bytes) {
            // The image's own, if they are equal: /usr is harder to change than /var.
            Ok(root) if root.version > self.root.version => self.root = root,
            Ok(_) => {}
            Err(refusal) => self.put_aside("root.json", refusal)?,
        }
        Ok(())
    }

    fn read_floors(&mut self) -> anyhow::Result<()> {
        let Some(bytes) = self.read("floors", verify::SNAPSHOT_LIMIT)? else {
            return Ok(());
        };
        match parse_floors(&bytes) {
            Ok(floors) => self.floors = floors.under(&self.root),
            Err(why) => self.put_aside("floors", why)?,
        }
        // Not of `root.json` alone: if that file is lost, the image's root may not stand in for it for ever.
        self.floors.root = self.floors.root.max(self.root.version.number());
        Ok(())
    }

    /// Each file under the one above it. What verifies, but belongs to another publication, is not corrupt: a cut may leave it.
    fn read_files(&mut self) -> anyhow::Result<()> {
        self.files = Files {
            timestamp: self.read("timestamp.json", verify::TIMESTAMP_LIMIT)?,
            snapshot: self.read("snapshot.json", verify::SNAPSHOT_LIMIT)?,
            targets: self.read("targets.json", verify::TARGETS_LIMIT)?,
            channels: self.read_channels()?,
            manifest: self.read("manifest", verify::MANIFEST_LIMIT)?,
        };
        for (file, refusal) in self.verify_files() {
            self.put_aside(&file, refusal)?;
        }
        Ok(())
    }

    /// Forgets each file that does not verify under the one above it, and tells which of them are corrupt. What verifies, but
    /// belongs to another publication, is not: a power cut may leave it.
    fn verify_files(&mut self) -> Vec<(String, Refusal)> {
        let mut corrupt = Vec::new();
        let root = self.stored_root();
        self.timestamp = None;
        let Some(bytes) = self.files.timestamp.take() else {
            return corrupt;
        };
        let accepted = verify::accept_timestamp(&root, &self.floors, &bytes);
        let Some(timestamp) = sift("timestamp.json", accepted, &mut corrupt) else {
            return corrupt;
        };
        self.floors = std::mem::take(&mut self.floors).raised_by(&self.root, &timestamp, None);
        self.timestamp = Some(timestamp.clone());
        self.files.timestamp = Some(bytes);

        let Some(bytes) = self.files.snapshot.take() else {
            return corrupt;
        };
        let accepted = verify::accept_snapshot(&root, &timestamp, &self.floors, &bytes);
        let Some(snapshot) = sift("snapshot.json", accepted, &mut corrupt) else {
            return corrupt;
        };
        self.floors =
            std::mem::take(&mut self.floors).raised_by(&self.root, &timestamp, Some(&snapshot));
        self.files.snapshot = Some(bytes);

        let Some(bytes) = self.files.targets.take() else {
            return corrupt;
        };
        let accepted = verify::accept_targets(&root, &snapshot, &bytes);
        let Some(targets) = sift("targets.json", accepted, &mut corrupt) else {
            return corrupt;
        };
        self.files.targets = Some(bytes);

        for (channel, bytes) in std::mem::take(&mut self.files.channels) {
            let accepted = verify::accept_channel(&root, &snapshot, &targets, &channel, &bytes);
            if sift(&format!("{channel}.json"), accepted, &mut corrupt).is_some() {
                self.files.channels.insert(channel, bytes);
            }
        }
        corrupt
    }

    fn read_channels(&mut self) -> anyhow::Result<BTreeMap<RoleName, Vec<u8>>> {
        let mut channels = BTreeMap::new();
        let reading = || format!("reading {}", self.directory.display());
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.directory).with_context(reading)? {
            names.push(entry.with_context(reading)?.file_name());
        }
        for name in names {
            // Names that are no channel's are somebody else's.
            let Some(channel) = name.to_str().and_then(|name| name.strip_suffix(".json")) else {
                continue;
            };
            let Ok(channel) = channel.parse::<RoleName>() else {
                continue;
            };
            if let Some(bytes) = self.read(&format!("{channel}.json"), verify::TARGETS_LIMIT)? {
                channels.insert(channel, bytes);
            }
        }
        Ok(channels)
    }

    /// The file, `None` if there is none or it had to be set aside.
    fn read(&mut self, name: &str, limit: u64) -> anyhow::Result<Option<Vec<u8>>> {
        let mut bytes = Vec::new();
        let read = File::open(self.directory.join(name))
            .and_then(|file| file.take(limit + 1).read_to_end(&mut bytes));
        match read {
            Ok(_) if bytes.len() as u64 > limit => self.put_aside(
                name,
                Refusal::TooLong {
                    role: name.to_owned(),
                    limit,
                },
            )?,
            Ok(_) => return Ok(Some(bytes)),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            // A bad sector must not stop updates for ever: the file can be fetched again.
            Err(error) => self.put_aside(name, error)?,
        }
        Ok(None)
    }

    fn put_aside(&mut self, name: &str, why: impl ToString) -> anyhow::Result<()> {
        let aside = self.directory.join(format!("{name}.corrupt"));
        fs::rename(self.directory.join(name), &aside)
            .with_context(|| format!("setting aside {}", aside.display()))?;
        self.set_aside.push(SetAside {
            file: name.to_owned(),
            why: why.to_string(),
        });
        Ok(())
    }

    fn write(&self, name: &str, bytes: &[u8]) -> anyhow::Result<()> {
        let (part, path) = (
            self.directory.join(format!("{name}.part")),
            self.directory.join(name),
        );
        let write = || -> std::io::Result<()> {
            let mut file = File::create(&part)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&part, &path)?;
            File::open(&self.directory)?.sync_all()
        };
        write().with_context(|| format!("writing {}", path.display()))
    }

    fn remove(&self, name: &str) -> anyhow::Result<()> {
        let path = self.directory.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).with_context(|| format!("removing {}", path.display()))
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }

    fn write_floors(&self) -> anyhow::Result<()> {
        self.write("floors", &floors_bytes(&self.floors)?)
    }
}

/// `None` for what was refused, which is noted where the file cannot have been written so.
fn sift<T>(
    file: &str,
    accepted: Result<T, Refusal>,
    corrupt: &mut Vec<(String, Refusal)>,
) -> Option<T> {
    match accepted {
        Ok(document) => return Some(document),
        // Of another publication, or of a channel that is no more.
        Err(
            Refusal::WrongVersion { .. }
            | Refusal::WrongLength { .. }
            | Refusal::WrongDigest { .. }
            | Refusal::RolledBack { .. }
            | Refusal::RoleVanished { .. }
            | Refusal::NoSuchChannel { .. }
            | Refusal::NotInSnapshot { .. },
        ) => {}
        Err(refusal) => corrupt.push((file.to_owned(), refusal)),
    }
    None
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FloorsFile {
    format: u64,
    root: u64,
    timestamp: u64,
    snapshot: u64,
    roles: BTreeMap<String, u64>,
    #[serde(with = "time::optional")]
    clock: Option<Time>,
    keys: BTreeSet<String>,
}

fn floors_bytes(floors: &Floors) -> anyhow::Result<Vec<u8>> {
    let Floors {
        root,
        timestamp,
        snapshot,
        roles,
        clock,
        keys,
    } = floors.clone();
    let file = FloorsFile {
        format: 1,
        root,
        timestamp,
        snapshot,
        roles,
        clock,
        keys,
    };
    let body = canonical::to_bytes(&serde_json::to_value(file)?)?;
    Ok([Sha256::of(&body).to_string().as_bytes(), b"\n", &body].concat())
}

fn parse_floors(bytes: &[u8]) -> Result<Floors, Refusal> {
    let malformed = |why: &str| Refusal::Malformed {
        role: "floors".to_owned(),
        why: why.to_owned(),
    };
    let Some((digest, body)) = bytes.split_at_checked(64) else {
        return Err(malformed("it is cut off"));
    };
    let Some(body) = body.strip_prefix(b"\n") else {
        return Err(malformed("it has no digest"));
    };
    let got = Sha256::of(body).to_string();
    if digest != got.as_bytes() {
        return Err(Refusal::WrongDigest {
            role: "floors".to_owned(),
            want: String::from_utf8_lossy(digest).into_owned(),
            got,
        });
    }
    let file: FloorsFile = schema::from_value("floors", canonical::parse(body)?)?;
    if file.format != 1 {
        return Err(Refusal::UnknownFormat {
            path: "floors".to_owned(),
            want: 1,
            got: file.format,
        });
    }
    let FloorsFile {
        format: _,
        root,
        timestamp,
        snapshot,
        roles,
        clock,
        keys,
    } = file;
    Ok(Floors {
        root,
        timestamp,
        snapshot,
        roles,
        clock,
        keys,
    })
}

#[cfg(test)]
mod tests;
