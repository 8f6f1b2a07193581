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

mod draft;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use jiff::Timestamp as Time;
use offshoot::commit::{Commit, Sha256};
use offshoot::trust::Verified;
use offshoot::trust::schema::{
    Custom, Digested, Envelope, FORMAT, HardwareId, Key, ReleaseVersion, RoleKeys, RoleName, Root,
    Snapshot, Targets, Timestamp, Version,
};
use offshoot::trust::verify::{self, Floors};
use serde::Serialize;

use crate::directory::Fleet;
use crate::keys;
use crate::writer::Writer;

pub(crate) use draft::{Below, Draft};

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
        Draft::after(self)
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
        let (signers, _) = signers(&self.root, &self.targets, role)
            .with_context(|| format!("there is no role or channel {role}"))?;
        Ok(signers)
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

/// Who signs for a role, and the keys by their ids.
fn signers<'a>(
    root: &'a Root,
    targets: &'a Targets,
    role: &str,
) -> Option<(&'a RoleKeys, &'a BTreeMap<String, Key>)> {
    if let Some(signers) = root.roles.get(role) {
        return Some((signers, &root.keys));
    }
    let delegations = targets.delegations.as_ref()?;
    let mut roles = delegations.roles.iter();
    let delegation = roles.find(|delegation| delegation.name == role)?;
    Some((&delegation.signers, &delegations.keys))
}

/// The name of a role's key files.
pub(crate) fn stem(role: &str) -> Result<String> {
    match role {
        "root" | "timestamp" | "snapshot" | "targets" => Ok(role.to_owned()),
        channel => Ok(keys::of_channel(&channel.parse()?)),
    }
}

fn parse<T: serde::de::DeserializeOwned + Serialize>(role: &str, bytes: &[u8]) -> Result<T> {
    let signed = Envelope::parse(role, bytes)?.signed;
    serde_json::from_value(signed).with_context(|| format!("reading {role} metadata"))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("reading {}", path.display()))
}
