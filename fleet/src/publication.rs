//! The signed metadata: what is published now, and how the next publication is made from it.
//!
//! What is read has been verified by the device's own code, from the root in `root.json`, and so has what is signed before any of it is
//! written. Reading does not look at expiry: what has expired is what there is to sign again.
//!
//! **Across a power cut.** Every file but `timestamp.json` has a name that no device asks for until the file that names it is there, and
//! they are written in that order: channels, targets, snapshot, timestamp. A cut before the last leaves the former publication, and
//! files that the next one, which has the same versions, writes again. A root is looked for by its number, so it cannot be held back
//! like this: it comes after a timestamp that is signed by the keys of both roots, and before another one, so that a device meets
//! metadata that it believes whichever root it has found. `root.json` comes after all; the next one who publishes mends it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use jiff::Timestamp as Time;
use offshoot::commit::{Commit, Sha256};
use offshoot::trust::Verified;
use offshoot::trust::schema::{
    Custom, Digested, Envelope, FORMAT, HardwareId, MetaFile, ReleaseVersion, RoleKeys, RoleName,
    Root, SPEC_VERSION, Snapshot, Targets, Timestamp, Version,
};
use offshoot::trust::verify::{self, Floors};
use serde::Serialize;

use crate::directory::{Fleet, Lifetimes};
use crate::keys::{self, Keys, Signer};
use crate::writer::Writer;

/// Nothing has expired then.
const BEFORE_ALL: Time = Time::UNIX_EPOCH;

/// What is published.
#[derive(Clone, Debug)]
pub(crate) struct Publication {
    pub root: Verified<Root>,
    pub timestamp: Verified<Timestamp>,
    pub snapshot: Verified<Snapshot>,
    pub targets: Verified<Targets>,
    pub channels: BTreeMap<RoleName, Targets>,
    files: Files,
}

#[derive(Clone, Debug, Default)]
struct Files {
    root: Vec<u8>,
    timestamp: Vec<u8>,
    snapshot: Vec<u8>,
    targets: Vec<u8>,
    channels: BTreeMap<RoleName, Vec<u8>>,
}

/// What is to be published next.
#[derive(Clone, Debug)]
pub(crate) struct Draft {
    pub root: Root,
    timestamp: Timestamp,
    snapshot: Snapshot,
    pub targets: Targets,
    pub channels: BTreeMap<RoleName, Targets>,
    /// Roles to sign again; the timestamp always is.
    changed: BTreeSet<String>,
    former: Option<Publication>,
}

/// A publication that is not written yet: paths and bytes, in the order to write them.
#[derive(Clone, Debug)]
pub(crate) struct Signed {
    pub publication: Publication,
    files: Vec<(String, Vec<u8>)>,
}

/// What a channel says of one release.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Release {
    pub hardware: HardwareId,
    pub version: ReleaseVersion,
    pub serial: u64,
    pub commit: Commit,
    /// Bytes of the commit object.
    pub length: u64,
    pub manifest: Digested,
}

impl Publication {
    pub(crate) fn read(fleet: &Fleet) -> Result<Self> {
        Self::read_from(fleet, &fleet.public())
    }

    /// A copy of what is published, in another place.
    pub(crate) fn read_from(fleet: &Fleet, public: &Path) -> Result<Self> {
        let metadata = |name: &str| public.join("metadata").join(name);
        let path = fleet.root();
        let mut bytes = read(&path)?;
        let mut root =
            verify::trusted_root(&bytes).with_context(|| format!("reading {}", path.display()))?;
        while let Some(next) = root.version.next() {
            let path = metadata(&format!("{next}.root.json"));
            if !path.exists() {
                break;
            }
            bytes = read(&path)?;
            root = verify::accept_root(&root, &bytes)
                .with_context(|| format!("reading {}", path.display()))?;
        }
        let timestamp = read(&metadata("timestamp.json"))?;
        let named: Timestamp = parse("timestamp", &timestamp)?;
        let announced = verify::snapshot_file(&named)?.version;
        let snapshot = read(&metadata(&format!("{announced}.snapshot.json")))?;
        let named: Snapshot = parse("snapshot", &snapshot)?;
        let mut targets = None;
        let mut channels = BTreeMap::new();
        for (file, announced) in &named.meta {
            let bytes = read(&metadata(&format!("{}.{file}", announced.version)))?;
            match file.strip_suffix(".json") {
                Some("targets") => targets = Some(bytes),
                Some(channel) => drop(channels.insert(channel.parse()?, bytes)),
                None => bail!(
                    "the snapshot lists {file:?}, which is no metadata: publish from a backup of public/"
                ),
            }
        }
        let files = Files {
            root: bytes,
            timestamp,
            snapshot,
            targets: targets.context(
                "the snapshot does not list targets.json: publish from a backup of public/",
            )?,
            channels,
        };
        Self::verify(root, &Floors::default(), files, BEFORE_ALL)
            .with_context(|| format!("verifying {}", metadata("").display()))
    }

    /// As a device does.
    fn verify(root: Verified<Root>, floors: &Floors, files: Files, at: Time) -> Result<Self> {
        let current = verify::current_root(root.clone(), at)?;
        let timestamp = verify::accept_timestamp(&current, floors, &files.timestamp)?;
        verify::snapshot_limit(&timestamp)?;
        let snapshot = verify::accept_snapshot(&current, &timestamp, floors, &files.snapshot)?;
        verify::targets_limit(&snapshot, "targets")?;
        let targets = verify::accept_targets(&current, &snapshot, &files.targets)?;
        let mut channels = BTreeMap::new();
        for (name, bytes) in &files.channels {
            // `offshoot-fleet prune` makes a channel smaller.
            verify::targets_limit(&snapshot, name.as_str())?;
            let channel = verify::accept_channel(&current, &snapshot, &targets, name, bytes)?;
            let document: Targets = parse(name.as_str(), bytes)?;
            for release in releases(name, &document)? {
                channel.newest(&release.hardware)?;
            }
            channels.insert(name.clone(), document);
        }
        Ok(Self {
            root,
            timestamp,
            snapshot,
            targets,
            channels,
            files,
        })
    }

    /// `root.json` is the root that is published. It is written after that, so a cut may have left the one before.
    pub(crate) fn keep_root(&self, fleet: &Fleet) -> Result<()> {
        if !fleet.root().exists() || read(&fleet.root())? != self.files.root {
            Writer::new(&fleet.directory).write("root.json", &self.files.root)?;
        }
        Ok(())
    }

    pub(crate) fn channel(&self, name: &RoleName) -> Result<&Targets> {
        self.channels.get(name).with_context(|| {
            let names = crate::directory::names(self.channels.keys());
            format!("there is no channel {name}: it is one of {names}, or a new one after `offshoot-fleet channel add {name}`")
        })
    }

    pub(crate) fn draft(&self) -> Draft {
        Draft {
            root: (*self.root).clone(),
            timestamp: (*self.timestamp).clone(),
            snapshot: (*self.snapshot).clone(),
            targets: (*self.targets).clone(),
            channels: self.channels.clone(),
            changed: BTreeSet::new(),
            former: Some(self.clone()),
        }
    }

    /// Each role: its name, version and expiry. In the order in which a device reads them.
    pub(crate) fn roles(&self) -> Vec<(String, Version, Time)> {
        let mut roles = vec![
            ("root".to_owned(), self.root.version, self.root.expires),
            (
                "timestamp".to_owned(),
                self.timestamp.version,
                self.timestamp.expires,
            ),
            (
                "snapshot".to_owned(),
                self.snapshot.version,
                self.snapshot.expires,
            ),
            (
                "targets".to_owned(),
                self.targets.version,
                self.targets.expires,
            ),
        ];
        for (name, channel) in &self.channels {
            roles.push((name.to_string(), channel.version, channel.expires));
        }
        roles
    }

    /// When a device that follows a channel believes it no more.
    pub(crate) fn believed_until(&self, channel: &RoleName) -> Time {
        let expires = [
            self.root.expires,
            self.timestamp.expires,
            self.snapshot.expires,
            self.targets.expires,
        ];
        let channel = self.channels.get(channel).map(|channel| channel.expires);
        expires
            .into_iter()
            .chain(channel)
            .fold(Time::MAX, Time::min)
    }

    /// Which keys sign for a role.
    pub(crate) fn signers(&self, role: &str) -> Result<&RoleKeys> {
        signers(&self.root, &self.targets, role)
            .with_context(|| format!("there is no role or channel {role}"))
    }
}

impl Draft {
    /// The first one, with channels that have no release.
    pub(crate) fn first(root: Root, targets: Targets, channels: &[RoleName]) -> Self {
        let spec_version = SPEC_VERSION.to_owned();
        let empty = Targets {
            spec_version: spec_version.clone(),
            version: Version::FIRST,
            expires: BEFORE_ALL,
            targets: BTreeMap::new(),
            delegations: None,
        };
        let mut draft = Self {
            root,
            timestamp: Timestamp {
                spec_version: spec_version.clone(),
                version: Version::FIRST,
                expires: BEFORE_ALL,
                issued: None,
                meta: BTreeMap::new(),
            },
            snapshot: Snapshot {
                spec_version,
                version: Version::FIRST,
                expires: BEFORE_ALL,
                meta: BTreeMap::new(),
            },
            targets,
            channels: channels
                .iter()
                .map(|name| (name.clone(), empty.clone()))
                .collect(),
            changed: BTreeSet::new(),
            former: None,
        };
        draft.change("root");
        draft.change("targets");
        for channel in channels {
            draft.change(channel.as_str());
        }
        draft
    }

    /// An empty channel, which the targets must delegate.
    pub(crate) fn add_channel(&mut self, name: RoleName) {
        self.change(name.as_str());
        let channel = Targets {
            version: Version::FIRST,
            targets: BTreeMap::new(),
            delegations: None,
            ..self.targets.clone()
        };
        self.channels.insert(name, channel);
    }

    /// This role is to be signed again.
    pub(crate) fn change(&mut self, role: &str) {
        self.changed.insert(role.to_owned());
    }

    /// Signs what changed and what has to follow it, and verifies all of it as a device would `at` that time.
    pub(crate) fn sign(
        mut self,
        keys: &Keys,
        lifetimes: &Lifetimes,
        now: Time,
        at: Time,
    ) -> Result<Signed> {
        if let Some(issued) = self.timestamp.issued {
            ensure!(
                issued <= now,
                "the last publication was signed at {issued}, and this machine's clock says {now}: set the clock"
            );
        }
        let former = self.former.take();
        let mut bytes = former
            .as_ref()
            .map_or_else(Files::default, |former| former.files.clone());
        let signing = Signing {
            keys,
            root: self.root.clone(),
            targets: self.targets.clone(),
            former: former.as_ref(),
        };
        let mut files = Vec::new();
        let mut meta = self.snapshot.meta.clone();
        for (name, channel) in &mut self.channels {
            if self.changed.contains(name.as_str()) {
                let file = format!("{name}.json");
                channel.version = after(meta.get(&file).map(|former| former.version))?;
                channel.expires = lifetimes.channel.from(now)?;
                let signed = signing.sign(name.as_str(), channel)?;
                meta.insert(file, announce(channel.version, &signed));
                files.push((format!("{}.{name}.json", channel.version), signed.clone()));
                bytes.channels.insert(name.clone(), signed);
            }
        }
        if self.changed.contains("targets") {
            let targets = &mut self.targets;
            targets.version = after(meta.get("targets.json").map(|former| former.version))?;
            targets.expires = lifetimes.targets.from(now)?;
            bytes.targets = signing.sign("targets", targets)?;
            let announced = announce(targets.version, &bytes.targets);
            meta.insert("targets.json".to_owned(), announced);
            files.push((
                format!("{}.targets.json", targets.version),
                bytes.targets.clone(),
            ));
        }
        if meta != self.snapshot.meta || self.changed.contains("snapshot") {
            let snapshot = &mut self.snapshot;
            snapshot.version = after(former.as_ref().map(|former| former.snapshot.version))?;
            snapshot.expires = lifetimes.snapshot.from(now)?;
            snapshot.meta = meta;
            bytes.snapshot = signing.sign("snapshot", snapshot)?;
            files.push((
                format!("{}.snapshot.json", snapshot.version),
                bytes.snapshot.clone(),
            ));
        }
        let timestamp = &mut self.timestamp;
        timestamp.version = after(former.as_ref().map(|former| former.timestamp.version))?;
        timestamp.expires = lifetimes.timestamp.from(now)?;
        timestamp.issued = Some(now);
        let snapshot = announce(self.snapshot.version, &bytes.snapshot);
        timestamp.meta = BTreeMap::from([("snapshot.json".to_owned(), snapshot)]);
        bytes.timestamp = signing.sign("timestamp", timestamp)?;
        files.push(("timestamp.json".to_owned(), bytes.timestamp.clone()));

        let root = match &former {
            Some(former) if !self.changed.contains("root") => former.root.clone(),
            former => {
                self.root.version = after(former.as_ref().map(|former| former.root.version))?;
                self.root.expires = lifetimes.root.from(now)?;
                bytes.root = signing.sign("root", &self.root)?;
                files.push((
                    format!("{}.root.json", self.root.version),
                    bytes.root.clone(),
                ));
                if former.is_some() {
                    // Devices that took the timestamp before the root was there look for it after the next.
                    timestamp.version = after(Some(timestamp.version))?;
                    bytes.timestamp = signing.sign("timestamp", timestamp)?;
                    files.push(("timestamp.json".to_owned(), bytes.timestamp.clone()));
                }
                match former {
                    Some(former) => verify::accept_root(&former.root, &bytes.root)?,
                    None => verify::trusted_root(&bytes.root)?,
                }
            }
        };
        let floors = former.as_ref().map_or_else(Floors::default, |former| {
            Floors::default().raised_by(
                &former.root,
                Some(&former.timestamp),
                Some(&former.snapshot),
            )
        });
        let publication = Publication::verify(root, &floors, bytes, at)
            .context("nothing is published: devices would refuse it")?;
        Ok(Signed { publication, files })
    }
}

/// Who signs, now and until now.
struct Signing<'a> {
    keys: &'a Keys,
    root: Root,
    targets: Targets,
    former: Option<&'a Publication>,
}

impl Signing<'_> {
    /// The file of a role, by the keys that it has, and by those that it had: until the root or the targets that name the new ones are
    /// there, devices judge by the old ones.
    fn sign(&self, role: &str, document: &impl Serialize) -> Result<Vec<u8>> {
        let own = signers(&self.root, &self.targets, role)
            .with_context(|| format!("there is no role or channel {role}"))?;
        let mut with = enough(self.keys, role, own)?;
        let former = self
            .former
            .and_then(|former| signers(&former.root, &former.targets, role));
        if let Some(former) = former {
            // A root is believed by those who believe the one before. Of other roles, a key that is replaced may be one that was lost.
            let more = match role {
                "root" => enough(self.keys, role, former)?,
                _ => self.keys.of(&stem(role)?, former)?,
            };
            with.extend(
                more.into_iter()
                    .filter(|signer| !own.keyids.contains(&signer.keyid)),
            );
        }
        keys::sign(document, &with)
    }
}

impl Signed {
    /// The last of these writes is what publishes.
    pub(crate) fn write(&self, writer: &Writer, fleet: &Fleet) -> Result<()> {
        for (name, bytes) in &self.files {
            writer.write(&format!("metadata/{name}"), bytes)?;
        }
        self.publication.keep_root(fleet)
    }
}

/// The releases of a channel, oldest first.
pub(crate) fn releases(channel: &RoleName, document: &Targets) -> Result<Vec<Release>> {
    let mut releases = Vec::new();
    for (path, target) in &document.targets {
        let Some(name) = path.strip_suffix(".commit") else {
            continue;
        };
        let read = || -> Result<Release> {
            let hardware = name
                .split('/')
                .nth(1)
                .context("it is in no folder of a hardware")?;
            let custom = target
                .custom
                .as_ref()
                .and_then(|custom| custom.get("offshoot"));
            let custom: Custom =
                serde_json::from_value(custom.context("it has no custom.offshoot")?.clone())?;
            ensure!(
                custom.format == FORMAT,
                "its format is {}, and this offshoot-fleet writes {FORMAT}: use the newer one",
                custom.format
            );
            let sha256: Sha256 = target
                .hashes
                .get("sha256")
                .context("it has no sha256")?
                .parse()?;
            Ok(Release {
                hardware: hardware.parse()?,
                version: custom.version,
                serial: custom.serial,
                commit: Commit(sha256),
                length: target.length,
                manifest: custom.manifest,
            })
        };
        releases.push(read().with_context(|| format!("reading {path} of the channel {channel}"))?);
    }
    releases.sort_by_key(|release| release.serial);
    Ok(releases)
}

fn signers<'a>(root: &'a Root, targets: &'a Targets, role: &str) -> Option<&'a RoleKeys> {
    let delegations = targets.delegations.iter();
    let mut roles = delegations.flat_map(|delegations| &delegations.roles);
    root.roles.get(role).or_else(|| {
        let delegation = roles.find(|delegation| delegation.name == role);
        delegation.map(|delegation| &delegation.signers)
    })
}

/// The name of a role's key files.
pub(crate) fn stem(role: &str) -> Result<String> {
    match role {
        "root" | "timestamp" | "snapshot" | "targets" => Ok(role.to_owned()),
        channel => Ok(keys::of_channel(&channel.parse()?)),
    }
}

fn enough(keys: &Keys, role: &str, signers: &RoleKeys) -> Result<Vec<Signer>> {
    let stem = stem(role)?;
    let found = keys.of(&stem, signers)?;
    ensure!(
        found.len() as u64 >= signers.threshold,
        "{} has {} of the {} keys that it takes to sign {role}: put {stem}.pem there, or do this where it is",
        keys.directory().display(),
        found.len(),
        signers.threshold
    );
    Ok(found)
}

fn announce(version: Version, bytes: &[u8]) -> MetaFile {
    let hashes = BTreeMap::from([("sha256".to_owned(), Sha256::of(bytes).to_string())]);
    MetaFile {
        version,
        length: Some(bytes.len() as u64),
        hashes: Some(hashes),
    }
}

/// The version after the one that is published.
fn after(former: Option<Version>) -> Result<Version> {
    match former {
        Some(version) => version.next().context("there is no greater version number"),
        None => Ok(Version::FIRST),
    }
}

fn parse<T: serde::de::DeserializeOwned + Serialize>(role: &str, bytes: &[u8]) -> Result<T> {
    let signed = Envelope::parse(role, bytes)?.signed;
    serde_json::from_value(signed).with_context(|| format!("reading {role} metadata"))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("reading {}", path.display()))
}
