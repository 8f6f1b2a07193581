//! The next publication: what changes, and who has signed it.
//!
//! A role's file is signed by the keys that the draft gives the role, and by those that it had: until the root or the targets that name
//! the new ones are there, devices judge by the old ones. What is short of signatures is not written.
//!
//! Snapshot and timestamp name the others' bytes, signatures and all. So the files that people sign can be prepared ([`Draft::prepare`]),
//! and those two are signed when the others are complete, by the keys that are here.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp as Time;
use offshoot::commit::Sha256;
use offshoot::trust::schema::{
    Envelope, Key, MetaFile, RoleKeys, RoleName, Root, SPEC_VERSION, Signature, Snapshot, Targets,
    Timestamp, Version,
};
use offshoot::trust::verify::{self, Floors};
use serde::Serialize;

use super::{BEFORE_ALL, Files, Publication, parse, signers, stem};
use crate::directory::{Fleet, Lifetimes};
use crate::keys::{Keys, Signer};
use crate::writer::Writer;

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
    /// Files that are dated, and signed at least in part.
    prepared: BTreeMap<String, Envelope>,
    former: Option<Publication>,
}

/// A publication that is not written yet: paths and bytes, in the order to write them.
#[derive(Clone, Debug)]
pub(crate) struct Signed {
    pub publication: Publication,
    files: Vec<(String, Vec<u8>)>,
}

/// Too few keys have signed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Below {
    pub role: String,
    pub have: u64,
    pub need: u64,
    /// The ids of the keys that have not signed.
    pub missing: Vec<String>,
    #[serde(skip)]
    keys: PathBuf,
    #[serde(skip)]
    prepared: bool,
}

impl std::error::Error for Below {}

impl std::fmt::Display for Below {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            role,
            have,
            need,
            missing,
            keys,
            prepared,
        } = self;
        let missing = missing.join(", ");
        write!(
            f,
            "{role} has {have} of the {need} signatures that it takes, and these of its keys have not signed or are not in {}: {missing}. ",
            keys.display()
        )?;
        if *prepared {
            write!(
                f,
                "Take prepared/{role}.json to where one of them is, run `offshoot-fleet sign {role}.json` there, and `offshoot-fleet complete {role}.json` here"
            )
        } else {
            write!(
                f,
                "Run this where they are, or with --prepare, and `offshoot-fleet sign` where they are"
            )
        }
    }
}

impl Draft {
    /// What is published, until it is changed.
    pub(super) fn after(former: &Publication) -> Self {
        Self {
            root: (*former.root).clone(),
            timestamp: (*former.timestamp).clone(),
            snapshot: (*former.snapshot).clone(),
            targets: (*former.targets).clone(),
            channels: former.channels.clone(),
            changed: BTreeSet::new(),
            prepared: BTreeMap::new(),
            former: Some(former.clone()),
        }
    }

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
            prepared: BTreeMap::new(),
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

    pub(crate) fn changed(&self) -> impl Iterator<Item = &str> {
        self.changed.iter().map(String::as_str)
    }

    /// A file that was prepared takes the place of what is published. False if it is published already.
    pub(crate) fn take(&mut self, role: &str, envelope: Envelope) -> Result<bool> {
        let former = self.former.as_ref().context("nothing is published")?;
        let bytes = envelope.to_bytes()?;
        let (version, published) = match role {
            "root" => (Some(former.root.version), Some(&former.files.root)),
            role => {
                let announced = former.snapshot.meta.get(&format!("{role}.json"));
                let bytes = match role {
                    "targets" => Some(&former.files.targets),
                    channel => former.files.channels.get(&channel.parse::<RoleName>()?),
                };
                (announced.map(|file| file.version), bytes)
            }
        };
        if let Some(published) = published
            && Envelope::parse(role, published)?.signed == envelope.signed
        {
            return Ok(false);
        }
        let found = if role == "root" {
            self.root = parse(role, &bytes)?;
            self.root.version
        } else {
            let document: Targets = parse(role, &bytes)?;
            let version = document.version;
            match role {
                "targets" => self.targets = document,
                channel => drop(self.channels.insert(channel.parse()?, document)),
            }
            version
        };
        ensure!(
            found == after(version)?,
            "prepared/{role}.json is version {found}, and {} is what would follow now: something else was published since; remove `prepared` and prepare it again",
            after(version)?
        );
        self.change(role);
        self.prepared.insert(role.to_owned(), envelope);
        Ok(true)
    }

    /// Roles whose keys are others are signed by them.
    pub(crate) fn follow_keys(&mut self) {
        let Some(former) = &self.former else { return };
        if self.root.roles.get("snapshot") != former.root.roles.get("snapshot") {
            self.changed.insert("snapshot".to_owned());
        }
    }

    /// Refuses if the keys here are too few for a role, before anything is done in vain; `except` is given new ones yet.
    pub(crate) fn check(&self, keys: &Keys, except: Option<&str>) -> Result<()> {
        let signing = self.signing(keys);
        let named = self.changed().any(|role| role != "root");
        let snapshot = named.then_some("snapshot");
        let all = self.changed().chain(snapshot).chain(["timestamp"]);
        for role in all.filter(|role| Some(*role) != except) {
            let held = signing.held(role)?.into_iter();
            signing.enough(role, &held.map(|signer| signer.keyid).collect())?;
        }
        Ok(())
    }

    /// Refuses if too few have signed what was prepared, with those who are here.
    pub(crate) fn check_prepared(&self, keys: &Keys) -> Result<()> {
        let signing = self.signing(keys);
        for (role, envelope) in &self.prepared {
            let mut able: BTreeSet<_> = signing
                .prepared_signatures(role, envelope)?
                .into_keys()
                .collect();
            able.extend(signing.held(role)?.into_iter().map(|signer| signer.keyid));
            signing.enough(role, &able)?;
        }
        Ok(())
    }

    /// Those that were prepared, and how many keys have signed each of them; none signs here.
    pub(crate) fn progress(&self, keys: &Keys) -> Result<Vec<Below>> {
        let signing = self.signing(keys);
        let mut all = Vec::new();
        for (role, envelope) in &self.prepared {
            let signatures = signing.prepared_signatures(role, envelope)?;
            let signed = signatures.into_keys().collect();
            all.push(signing.count(role, &signed)?);
        }
        Ok(all)
    }

    /// The files of what changed, for people to sign, with a place for each key that may, and signed by those that are here.
    pub(crate) fn prepare(
        mut self,
        keys: &Keys,
        lifetimes: &Lifetimes,
        now: Time,
    ) -> Result<Vec<(String, Envelope)>> {
        self.date(lifetimes, now)?;
        let signing = self.signing(keys);
        let mut files = Vec::new();
        for role in &self.changed {
            let envelope = match role.as_str() {
                "root" => signing.collect(role, &self.root, true)?,
                "targets" => signing.collect(role, &self.targets, true)?,
                // Signed when the rest is complete.
                "snapshot" | "timestamp" => continue,
                channel => {
                    let document = self.channels.get(&channel.parse()?);
                    let document = document.context("the channel is gone")?;
                    signing.collect(channel, document, true)?
                }
            };
            files.push((role.clone(), envelope));
        }
        Ok(files)
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
        self.date(lifetimes, now)?;
        let signing = self.signing(keys);
        let former = self.former.clone();
        let mut bytes = former
            .as_ref()
            .map_or_else(Files::default, |former| former.files.clone());
        let mut files = Vec::new();
        let mut meta = self.snapshot.meta.clone();
        for (name, channel) in &self.channels {
            if self.changed.contains(name.as_str()) {
                let signed = signing.sign(name.as_str(), channel)?;
                meta.insert(format!("{name}.json"), announce(channel.version, &signed));
                files.push((format!("{}.{name}.json", channel.version), signed.clone()));
                bytes.channels.insert(name.clone(), signed);
            }
        }
        if self.changed.contains("targets") {
            let version = self.targets.version;
            bytes.targets = signing.sign("targets", &self.targets)?;
            meta.insert("targets.json".to_owned(), announce(version, &bytes.targets));
            files.push((format!("{version}.targets.json"), bytes.targets.clone()));
        }
        let mut snapshot = self.snapshot.clone();
        if meta != snapshot.meta || self.changed.contains("snapshot") {
            snapshot.version = after(former.as_ref().map(|former| former.snapshot.version))?;
            snapshot.expires = lifetimes.snapshot.from(now)?;
            snapshot.meta = meta;
            bytes.snapshot = signing.sign("snapshot", &snapshot)?;
            files.push((
                format!("{}.snapshot.json", snapshot.version),
                bytes.snapshot.clone(),
            ));
        }
        let mut timestamp = self.timestamp.clone();
        timestamp.version = after(former.as_ref().map(|former| former.timestamp.version))?;
        timestamp.expires = lifetimes.timestamp.from(now)?;
        timestamp.issued = Some(now);
        let snapshot = announce(snapshot.version, &bytes.snapshot);
        timestamp.meta = BTreeMap::from([("snapshot.json".to_owned(), snapshot)]);
        bytes.timestamp = signing.sign("timestamp", &timestamp)?;
        files.push(("timestamp.json".to_owned(), bytes.timestamp.clone()));

        let root = match &former {
            Some(former) if !self.changed.contains("root") => former.root.clone(),
            former => {
                bytes.root = signing.sign("root", &self.root)?;
                files.push((
                    format!("{}.root.json", self.root.version),
                    bytes.root.clone(),
                ));
                if former.is_some() {
                    // Devices that took the timestamp before the root was there look for it after the next.
                    timestamp.version = after(Some(timestamp.version))?;
                    bytes.timestamp = signing.sign("timestamp", &timestamp)?;
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

    /// Versions and expiries of the root, the targets and the channels that change, but those that are prepared.
    fn date(&mut self, lifetimes: &Lifetimes, now: Time) -> Result<()> {
        let (changed, prepared) = (&self.changed, &self.prepared);
        let undated = |role: &str| changed.contains(role) && !prepared.contains_key(role);
        let meta = &self.snapshot.meta;
        let former = |file: &str| meta.get(file).map(|former| former.version);
        for (name, channel) in &mut self.channels {
            if undated(name.as_str()) {
                channel.version = after(former(&format!("{name}.json")))?;
                channel.expires = lifetimes.channel.from(now)?;
            }
        }
        if undated("targets") {
            self.targets.version = after(former("targets.json"))?;
            self.targets.expires = lifetimes.targets.from(now)?;
        }
        if undated("root") {
            let former = self.former.as_ref().map(|former| former.root.version);
            self.root.version = after(former)?;
            self.root.expires = lifetimes.root.from(now)?;
        }
        Ok(())
    }

    fn signing<'a>(&'a self, keys: &'a Keys) -> Signing<'a> {
        Signing { keys, draft: self }
    }
}

/// Who signs, now and until now.
struct Signing<'a> {
    keys: &'a Keys,
    draft: &'a Draft,
}

type Signers<'a> = (&'a RoleKeys, &'a BTreeMap<String, Key>);

impl Signing<'_> {
    /// The complete file of a role.
    fn sign(&self, role: &str, document: &impl Serialize) -> Result<Vec<u8>> {
        let mut envelope = self.collect(role, document, false)?;
        envelope
            .signatures
            .retain(|signature| !signature.sig.is_empty());
        let signed = envelope.signatures.iter();
        let signed = signed.map(|signature| signature.keyid.clone()).collect();
        self.enough(role, &signed)?;
        Ok(envelope.to_bytes()?)
    }

    /// The signatures that there are, and those that can be made here. Where there is none yet of a key that may sign, an empty one. Who
    /// prepares is not asked for passphrases that are not at hand.
    fn collect(&self, role: &str, document: &impl Serialize, preparing: bool) -> Result<Envelope> {
        let mut envelope = Envelope::unsigned(document)?;
        let mut signatures = match self.draft.prepared.get(role) {
            Some(prepared) => self.prepared_signatures(role, prepared)?,
            None => BTreeMap::new(),
        };
        let signed = signatures.keys().cloned().collect();
        if signatures.is_empty() || self.enough(role, &signed).is_err() {
            let bytes = envelope.sign_bytes()?;
            for signer in self.held(role)? {
                if !signatures.contains_key(&signer.keyid) && (!preparing || signer.is_ready()) {
                    let signature = signer.sign(&bytes)?;
                    signatures.insert(signature.keyid, signature.sig);
                }
            }
        }
        for keyid in self.may(role)? {
            let sig = signatures.remove(&keyid).unwrap_or_default();
            envelope.signatures.push(Signature { keyid, sig });
        }
        Ok(envelope)
    }

    /// Those that are good, by their keys' ids.
    fn prepared_signatures(
        &self,
        role: &str,
        envelope: &Envelope,
    ) -> Result<BTreeMap<String, String>> {
        let message = envelope.sign_bytes()?;
        let (own, former) = self.signers(role)?;
        let mut good = BTreeMap::new();
        for Signature { keyid, sig } in &envelope.signatures {
            let mut keys = [Some(own), former].into_iter().flatten();
            let key = keys.find_map(|(signers, keys)| {
                signers
                    .keyids
                    .contains(keyid)
                    .then(|| keys.get(keyid))
                    .flatten()
            });
            if key.is_some_and(|key| verify::verifies(key, &message, sig)) {
                good.insert(keyid.clone(), sig.clone());
            }
        }
        Ok(good)
    }

    /// The keys that a role has, and those that it had.
    fn signers(&self, role: &str) -> Result<(Signers<'_>, Option<Signers<'_>>)> {
        let own = signers(&self.draft.root, &self.draft.targets, role)
            .with_context(|| format!("there is no role or channel {role}"))?;
        let former = self.draft.former.as_ref();
        let former = former.and_then(|former| signers(&former.root, &former.targets, role));
        Ok((own, former))
    }

    /// The ids of all of them.
    fn may(&self, role: &str) -> Result<Vec<String>> {
        let ((own, _), former) = self.signers(role)?;
        let mut may = own.keyids.clone();
        if let Some((former, _)) = former {
            let more = former
                .keyids
                .iter()
                .filter(|keyid| !own.keyids.contains(keyid));
            may.extend(more.cloned());
        }
        Ok(may)
    }

    /// Those of them that are here.
    fn held(&self, role: &str) -> Result<Vec<Signer>> {
        let all = RoleKeys {
            keyids: self.may(role)?,
            threshold: 1,
        };
        self.keys.of(&stem(role)?, &all)
    }

    /// A root is believed by those who believe the one before, so it takes enough of its keys as well. Of other roles, a key that is
    /// replaced may be one that was lost.
    fn enough(&self, role: &str, signed: &BTreeSet<String>) -> Result<()> {
        let count = self.count(role, signed)?;
        ensure!(count.have >= count.need, count);
        Ok(())
    }

    /// How many have signed, of those of whom the most are missing.
    fn count(&self, role: &str, signed: &BTreeSet<String>) -> Result<Below> {
        let ((own, _), former) = self.signers(role)?;
        let former = former.filter(|_| role == "root").map(|(former, _)| former);
        let count = |signers: &RoleKeys| {
            let missing = signers.keyids.iter();
            let missing: Vec<_> = missing
                .filter(|keyid| !signed.contains(*keyid))
                .cloned()
                .collect();
            Below {
                role: role.to_owned(),
                have: (signers.keyids.len() - missing.len()) as u64,
                need: signers.threshold,
                missing,
                keys: self.keys.directory().to_owned(),
                prepared: self.draft.prepared.contains_key(role),
            }
        };
        let (own, former) = (count(own), former.map(count));
        let short = |count: &Below| count.need.saturating_sub(count.have);
        Ok(match former {
            Some(former) if short(&former) > short(&own) => former,
            Some(_) | None => own,
        })
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
