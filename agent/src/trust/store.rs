//! The metadata that a device has accepted, and the floors below which it believes nothing.
//!
//! One directory: `root.json`, `timestamp.json`, `snapshot.json`, `targets.json`, `<role>.json` (of a device, its channel) and
//! `manifest` (that of the release last seen) byte for byte as they came, and `floors`: the sha256 of what follows it, a newline, and JSON.
//!
//! **Across a power cut.** Every file is written beside its place, synced, renamed and the directory synced, so each is the former
//! or the new. Each is kept as soon as it is accepted, in the order root, timestamp, snapshot, targets, channel, manifest, and what
//! raises a floor is followed by `floors`. A cut between any two leaves what a refusal at that place leaves: newer files above, which
//! are believed, and former ones below, which are fetched again.
//!
//! **Floors.** A version floor has two carriers: the signed files themselves, and `floors`. What counts is the higher, so that one
//! corrupt file, whichever it is, lowers no floor. A device that loses both is what it was when it left the factory, and says so.
//!
//! **The release last accepted.** [`Store::accepted`] asks what the channel and the manifest that are here say together, not whether
//! the timestamp names them: a newer timestamp whose files could not be had takes nothing back. What a newer channel no longer
//! lists, it does take back.
//!
//! **Trust in the disk.** Each file's signatures are verified again when it is read, under `root.json`, or under the image's root if
//! that is not older. Expiry is not: what was fresh when it was accepted stays accepted through a reboot. What does not verify is
//! renamed to `*.corrupt` and reported; it is fetched again.
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

use super::refresh::quoted;
use super::schema::{Envelope, HardwareId, RoleName, Root, Snapshot, Timestamp, time};
use super::verify::{self, Channel, CurrentRoot, Delegated, Floors, Verified};
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

/// The bytes of what was verified.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Files {
    pub(super) timestamp: Option<Vec<u8>>,
    pub(super) snapshot: Option<Vec<u8>>,
    /// The top-level targets, and what they delegate to.
    pub(super) roles: BTreeMap<String, Vec<u8>>,
    /// The file that is looked for: of a device, the manifest.
    pub(super) target: Option<Vec<u8>>,
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

    /// The release that was last accepted for this channel and hardware, without looking at the clock. `None` if it is not all
    /// there, or is no longer listed, or those who signed for it may not any more: why, the next refresh says.
    pub fn accepted(&self, channel: &RoleName, hardware: &HardwareId) -> Option<Verified<Release>> {
        // Files of two publications may be here, and none of them may keep a device from starting.
        self.release(channel, hardware).unwrap_or(None)
    }

    fn release(
        &self,
        channel: &RoleName,
        hardware: &HardwareId,
    ) -> Result<Option<Verified<Release>>, Refusal> {
        let roles = &self.files.roles;
        let (Some(targets), Some(bytes), Some(manifest)) = (
            roles.get("targets"),
            roles.get(channel.as_str()),
            &self.files.target,
        ) else {
            return Ok(None);
        };
        let targets = verify::signed_role(&Delegated::top(&self.stored_root())?, targets)?;
        let role = verify::signed_role(&verify::channel_role(&targets, channel)?, bytes)?;
        match Channel::new(channel.clone(), role).of_manifest(hardware, manifest) {
            Some(entry) => verify::accept_manifest(&entry, manifest).map(Some),
            None => Ok(None),
        }
    }

    pub(super) fn files(&self) -> &Files {
        &self.files
    }

    pub(super) fn timestamp(&self) -> Option<&Verified<Timestamp>> {
        self.timestamp.as_ref()
    }

    /// A root that the trusted one has led to (5.3.8).
    pub(super) fn keep_root(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        let root = verify::accept_root(&self.root, bytes).context("keeping a root")?;
        self.write("root.json", bytes)?;
        self.root = root;
        // Before the floors: they say on the next start, should this be cut off, that there is something to forget.
        self.forget_fallen()?;
        self.floors = std::mem::take(&mut self.floors).raised_by(&self.root, None, None);
        self.write_floors()?;
        // Of what the keys of before have signed, only what these would sign too is still believed.
        self.verify_files();
        Ok(())
    }

    /// 5.4.5
    pub(super) fn keep_timestamp(
        &mut self,
        bytes: &[u8],
        timestamp: &Verified<Timestamp>,
    ) -> anyhow::Result<()> {
        self.write("timestamp.json", bytes)?;
        self.files.timestamp = Some(bytes.to_owned());
        self.timestamp = Some(timestamp.clone());
        self.raise_floors(Some(timestamp), None)
    }

    /// 5.5.7
    pub(super) fn keep_snapshot(
        &mut self,
        bytes: &[u8],
        snapshot: &Verified<Snapshot>,
    ) -> anyhow::Result<()> {
        self.write("snapshot.json", bytes)?;
        self.files.snapshot = Some(bytes.to_owned());
        self.raise_floors(None, Some(snapshot))
    }

    /// 5.6.6
    pub(super) fn keep_role(&mut self, role: &str, bytes: &[u8]) -> anyhow::Result<()> {
        self.write(&format!("{}.json", quoted(role)), bytes)?;
        self.files.roles.insert(role.to_owned(), bytes.to_owned());
        Ok(())
    }

    /// 5.7.3
    pub(super) fn keep_target(&mut self, name: &str, bytes: &[u8]) -> anyhow::Result<()> {
        self.write(name, bytes)?;
        self.files.target = Some(bytes.to_owned());
        Ok(())
    }

    /// Removes the roles that did not lead to what a device looks for, one of which may be megabytes, and its file if it found none.
    pub(super) fn forget_all_but(
        &mut self,
        roles: &BTreeSet<String>,
        target: bool,
    ) -> anyhow::Result<()> {
        let names: Vec<_> = self.files.roles.keys().cloned().collect();
        for name in names.iter().filter(|name| !roles.contains(*name)) {
            self.remove(&format!("{}.json", quoted(name)))?;
            self.files.roles.remove(name);
        }
        if !target && self.files.target.is_some() {
            self.remove("manifest")?;
            self.files.target = None;
        }
        Ok(())
    }

    /// 5.3.11
    fn forget_fallen(&mut self) -> anyhow::Result<()> {
        if self.floors.fall_with(&self.root) {
            self.floors = std::mem::take(&mut self.floors).under(&self.root);
            self.remove("timestamp.json")?;
            self.remove("snapshot.json")?;
            self.timestamp = None;
            self.files.timestamp = None;
            self.files.snapshot = None;
        }
        Ok(())
    }

    fn raise_floors(
        &mut self,
        timestamp: Option<&Verified<Timestamp>>,
        snapshot: Option<&Verified<Snapshot>>,
    ) -> anyhow::Result<()> {
        let floors = self
            .floors
            .clone()
            .raised_by(&self.root, timestamp, snapshot);
        if floors != self.floors {
            self.floors = floors;
            self.write_floors()?;
        }
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
            Ok(floors) => self.floors = floors,
            Err(why) => self.put_aside("floors", why)?,
        }
        self.forget_fallen()?;
        // Not of `root.json` alone: if that file is lost, the image's root may not stand in for it for ever.
        self.floors.root = self.floors.root.max(self.root.version.number());
        Ok(())
    }

    fn read_files(&mut self) -> anyhow::Result<()> {
        self.files = Files {
            timestamp: self.read("timestamp.json", verify::TIMESTAMP_LIMIT)?,
            snapshot: self.read("snapshot.json", verify::SNAPSHOT_LIMIT)?,
            roles: self.read_roles()?,
            target: self.read("manifest", verify::MANIFEST_LIMIT)?,
        };
        for (file, refusal) in self.verify_files() {
            self.put_aside(&file, refusal)?;
        }
        Ok(())
    }

    /// Forgets each file whose signatures do not verify, and raises the floors by the others. Whether one names the other is for
    /// the refresh to see: a power cut, or a refusal half-way, leaves files of two publications.
    fn verify_files(&mut self) -> Vec<(String, Refusal)> {
        let mut corrupt = Vec::new();
        let root = self.stored_root();
        self.timestamp = None;
        let mut sift = |file: &str, refusal| corrupt.push((file.to_owned(), refusal));

        let accepted = self.files.timestamp.as_deref().map(|bytes| {
            // Below the floors is a former timestamp, which a cut before the rename leaves behind a written `floors`.
            verify::accept_timestamp(&root, &self.floors, bytes)
        });
        match accepted {
            Some(Ok(timestamp)) => self.timestamp = Some(timestamp),
            Some(Err(refusal)) => {
                self.files.timestamp = None;
                if !matches!(refusal, Refusal::RolledBack { .. }) {
                    sift("timestamp.json", refusal);
                }
            }
            None => {}
        }
        let accepted = self.files.snapshot.as_deref();
        let snapshot = match accepted.map(|bytes| verify::trusted_snapshot(&root, bytes)) {
            Some(Ok(snapshot)) => Some(snapshot),
            Some(Err(refusal)) => {
                self.files.snapshot = None;
                sift("snapshot.json", refusal);
                None
            }
            None => None,
        };
        self.floors = std::mem::take(&mut self.floors).raised_by(
            &self.root,
            self.timestamp.as_ref(),
            snapshot.as_ref(),
        );

        let targets =
            self.files.roles.get("targets").map(|bytes| {
                Delegated::top(&root).and_then(|top| verify::signed_role(&top, bytes))
            });
        let targets = match targets {
            Some(Ok(targets)) => Some(targets),
            Some(Err(refusal)) => {
                self.files.roles.remove("targets");
                sift("targets.json", refusal);
                None
            }
            None => None,
        };
        // A role further down is verified when a search comes to it; here, that it is metadata at all.
        self.files.roles.retain(|name, bytes| {
            let above = targets.iter().flat_map(|targets| Delegated::by(targets));
            let verified = match above.into_iter().find(|above| above.name() == name) {
                Some(above) => verify::signed_role(&above, bytes).map(drop),
                None => Envelope::parse(name, bytes).map(drop),
            };
            match verified {
                Ok(()) => true,
                // Signed for by the keys of another publication.
                Err(Refusal::BelowThreshold { .. }) => false,
                Err(refusal) => {
                    sift(&format!("{}.json", quoted(name)), refusal);
                    false
                }
            }
        });
        corrupt
    }

    fn read_roles(&mut self) -> anyhow::Result<BTreeMap<String, Vec<u8>>> {
        let mut roles = BTreeMap::new();
        let reading = || format!("reading {}", self.directory.display());
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.directory).with_context(reading)? {
            names.push(entry.with_context(reading)?.file_name());
        }
        for file in names {
            // Names that are no role's are somebody else's.
            let Some(name) = file.to_str().and_then(|file| file.strip_suffix(".json")) else {
                continue;
            };
            let Some(role) = unquoted(name) else {
                continue;
            };
            if matches!(role.as_str(), "root" | "timestamp" | "snapshot") {
                continue;
            }
            if let Some(bytes) = self.read(&format!("{name}.json"), verify::TARGETS_LIMIT)? {
                roles.insert(role, bytes);
            }
        }
        Ok(roles)
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

/// The name that [`quoted`] gives this text, if it does.
fn unquoted(text: &str) -> Option<String> {
    let mut parts = text.split('%');
    let mut bytes = parts.next()?.as_bytes().to_vec();
    for part in parts {
        let (digits, rest) = part.split_at_checked(2)?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        bytes.extend_from_slice(rest.as_bytes());
    }
    let name = String::from_utf8(bytes).ok()?;
    (quoted(&name) == text).then_some(name)
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
    // Not in the canonical form, which no parser reads if a role's name has a control character.
    let body = serde_json::to_vec(&file)?;
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
