//! The signed metadata: what is published now, and how the next publication is made from it.
//!
//! What is read has been verified by the device's own code, from the root in `root.json`, and so has what is signed before any of it is
//! written. Reading does not look at expiry: what has expired is what there is to sign again.
//!
//! **Across a power cut.** Every file but `timestamp.json` has a name that no device asks for until the file that names it is there, and
//! they are written in that order: root, channels, targets, snapshot, timestamp. A cut before the last leaves the former publication,
//! and files that the next one, which has the same versions, writes again. A root is one that devices look for by its number, so it
//! comes first, and `root.json` after all: if that is older than what is published, the next publication writes it again.

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

#[derive(Clone, Debug)]
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
    pub manifest: Digested,
}

impl Publication {
    pub(crate) fn read(fleet: &Fleet) -> Result<Self> {
        let path = fleet.root();
        let mut bytes = read(&path)?;
        let mut root =
            verify::trusted_root(&bytes).with_context(|| format!("reading {}", path.display()))?;
        while let Some(next) = root.version.next() {
            let path = fleet.metadata(&format!("{next}.root.json"));
            if !path.exists() {
                break;
            }
            bytes = read(&path)?;
            root = verify::accept_root(&root, &bytes)
                .with_context(|| format!("reading {}", path.display()))?;
        }
        let timestamp = read(&fleet.metadata("timestamp.json"))?;
        let named: Timestamp = parse("timestamp", &timestamp)?;
        let announced = verify::snapshot_file(&named)?.version;
        let snapshot = read(&fleet.metadata(&format!("{announced}.snapshot.json")))?;
        let named: Snapshot = parse("snapshot", &snapshot)?;
        let mut targets = None;
        let mut channels = BTreeMap::new();
        for (file, announced) in &named.meta {
            let bytes = read(&fleet.metadata(&format!("{}.{file}", announced.version)))?;
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
            .with_context(|| format!("verifying {}", fleet.metadata("").display()))
    }

    /// As a device does.
    fn verify(root: Verified<Root>, floors: &Floors, files: Files, at: Time) -> Result<Self> {
        let current = verify::current_root(root.clone(), at)?;
        let timestamp = verify::accept_timestamp(&current, floors, &files.timestamp)?;
        let snapshot = verify::accept_snapshot(&current, &timestamp, floors, &files.snapshot)?;
        let targets = verify::accept_targets(&current, &snapshot, &files.targets)?;
        let mut channels = BTreeMap::new();
        for (name, bytes) in &files.channels {
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

    /// Where the keys of a role are looked for, and which they are.
    pub(crate) fn signers(&self, role: &str) -> Result<(String, RoleKeys)> {
        signers(&self.root, &self.targets, role)
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
        let mut files = Vec::new();
        let mut bytes = Files {
            root: Vec::new(),
            timestamp: Vec::new(),
            snapshot: Vec::new(),
            targets: Vec::new(),
            channels: BTreeMap::new(),
        };
        if let Some(former) = &self.former {
            bytes = former.files.clone();
        }

        let mut root = self.former.as_ref().map(|former| former.root.clone());
        if self.changed.contains("root") {
            self.root.expires = lifetimes.root.from(now)?;
            if let Some(former) = &root {
                self.root.version = next(former.version)?;
            }
            let (stem, own) = signers(&self.root, &self.targets, "root")?;
            let mut with = enough(keys, "root", &stem, &own)?;
            if let Some(former) = &root {
                let (stem, former) = signers(former, &self.targets, "root")?;
                let more = enough(keys, "root", &stem, &former)?;
                with.extend(
                    more.into_iter()
                        .filter(|signer| !own.keyids.contains(&signer.keyid)),
                );
            }
            bytes.root = keys::sign(&self.root, &with)?;
            root = Some(match &root {
                Some(former) => verify::accept_root(former, &bytes.root)?,
                None => verify::trusted_root(&bytes.root)?,
            });
            files.push((
                format!("{}.root.json", self.root.version),
                bytes.root.clone(),
            ));
        }
        let root = root.context("the first publication signs a root")?;

        let mut meta = self.snapshot.meta.clone();
        let (root_document, targets) = (&self.root, &self.targets);
        for (name, channel) in &mut self.channels {
            if self.changed.contains(name.as_str()) {
                let (stem, signers) = signers(root_document, targets, name.as_str())?;
                let with = enough(keys, name.as_str(), &stem, &signers)?;
                if let Some(former) = meta.get(&format!("{name}.json")) {
                    channel.version = next(former.version)?;
                }
                channel.expires = lifetimes.channel.from(now)?;
                let signed = keys::sign(channel, &with)?;
                meta.insert(format!("{name}.json"), announce(channel.version, &signed));
                files.push((format!("{}.{name}.json", channel.version), signed.clone()));
                bytes.channels.insert(name.clone(), signed);
            }
        }
        if self.changed.contains("targets") {
            let (stem, signers) = signers(&self.root, &self.targets, "targets")?;
            let with = enough(keys, "targets", &stem, &signers)?;
            if let Some(former) = meta.get("targets.json") {
                self.targets.version = next(former.version)?;
            }
            self.targets.expires = lifetimes.targets.from(now)?;
            bytes.targets = keys::sign(&self.targets, &with)?;
            meta.insert(
                "targets.json".to_owned(),
                announce(self.targets.version, &bytes.targets),
            );
            files.push((
                format!("{}.targets.json", self.targets.version),
                bytes.targets.clone(),
            ));
        }
        if meta != self.snapshot.meta || self.changed.contains("snapshot") {
            let (stem, signers) = signers(&self.root, &self.targets, "snapshot")?;
            let with = enough(keys, "snapshot", &stem, &signers)?;
            if self.former.is_some() {
                self.snapshot.version = next(self.snapshot.version)?;
            }
            self.snapshot.expires = lifetimes.snapshot.from(now)?;
            self.snapshot.meta = meta;
            bytes.snapshot = keys::sign(&self.snapshot, &with)?;
            files.push((
                format!("{}.snapshot.json", self.snapshot.version),
                bytes.snapshot.clone(),
            ));
        }
        let (stem, signers) = signers(&self.root, &self.targets, "timestamp")?;
        let with = enough(keys, "timestamp", &stem, &signers)?;
        if self.former.is_some() {
            self.timestamp.version = next(self.timestamp.version)?;
        }
        self.timestamp.expires = lifetimes.timestamp.from(now)?;
        self.timestamp.issued = Some(now);
        let snapshot = announce(self.snapshot.version, &bytes.snapshot);
        self.timestamp.meta = BTreeMap::from([("snapshot.json".to_owned(), snapshot)]);
        bytes.timestamp = keys::sign(&self.timestamp, &with)?;
        files.push(("timestamp.json".to_owned(), bytes.timestamp.clone()));

        let floors = self.former.as_ref().map_or_else(Floors::default, |former| {
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
                manifest: custom.manifest,
            })
        };
        releases.push(read().with_context(|| format!("reading {path} of the channel {channel}"))?);
    }
    releases.sort_by_key(|release| release.serial);
    Ok(releases)
}

fn signers(root: &Root, targets: &Targets, role: &str) -> Result<(String, RoleKeys)> {
    if let Some(signers) = root.roles.get(role) {
        return Ok((role.to_owned(), signers.clone()));
    }
    let delegations = targets
        .delegations
        .iter()
        .flat_map(|delegations| &delegations.roles);
    let delegation = delegations
        .into_iter()
        .find(|delegation| delegation.name == role);
    let delegation = delegation.with_context(|| format!("the targets do not delegate {role}"))?;
    Ok((keys::of_channel(&role.parse()?), delegation.signers.clone()))
}

fn enough(keys: &Keys, role: &str, stem: &str, signers: &RoleKeys) -> Result<Vec<Signer>> {
    let found = keys.of(stem, signers)?;
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

fn next(version: Version) -> Result<Version> {
    version.next().context("there is no greater version number")
}

fn parse<T: serde::de::DeserializeOwned + Serialize>(role: &str, bytes: &[u8]) -> Result<T> {
    let signed = Envelope::parse(role, bytes)?.signed;
    serde_json::from_value(signed).with_context(|| format!("reading {role} metadata"))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("reading {}", path.display()))
}
