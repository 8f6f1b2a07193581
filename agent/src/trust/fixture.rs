//! Small repositories in memory, signed with real keys, for the tests to publish and then to spoil.

use std::collections::BTreeMap;
use std::sync::{LazyLock, OnceLock};

use ed25519_dalek::{Signer as _, SigningKey};
use jiff::Timestamp as Time;
use serde::Serialize;

use super::Refusal;
use super::goal::{Goal, Newest};
use super::refresh::{Refresh, Reply, Want};
use super::schema::{
    Custom, Delegation, Delegations, Delta, Digested, Envelope, FORMAT, File, HardwareId, Key,
    Manifest, MetaFile, Objects, RoleKeys, RoleName, Root, SPEC_VERSION, Signature, Snapshot,
    TargetFile, Targets, Timestamp, Version, time,
};
use super::store::Store;
use crate::commit::{Commit, Sha256};

pub(crate) const HARDWARE: &str = "qemu-x86_64";

/// What the fixture is signed with: a key is made from one byte.
pub(crate) const ROOT_KEYS: [u8; 3] = [1, 2, 3];
pub(crate) const TIMESTAMP_KEY: u8 = 10;
pub(crate) const SNAPSHOT_KEY: u8 = 20;
pub(crate) const TARGETS_KEY: u8 = 30;
pub(crate) const STABLE_KEY: u8 = 40;
pub(crate) const BETA_KEY: u8 = 50;

/// A server: `files` is what it has, the other fields are what the next [`Repository::publish`] signs.
#[derive(Clone)]
pub(crate) struct Repository {
    pub(crate) root: Root,
    pub(crate) timestamp: Timestamp,
    pub(crate) timestamp_key: u8,
    pub(crate) snapshot: Snapshot,
    pub(crate) snapshot_key: u8,
    pub(crate) targets: Targets,
    pub(crate) channels: BTreeMap<String, (Targets, u8)>,
    pub(crate) files: BTreeMap<String, Vec<u8>>,
}

pub(crate) fn at(text: &str) -> Time {
    time::parse(text).unwrap()
}

/// A moment at which nothing in the fixture has expired.
pub(crate) fn now() -> Time {
    at("2026-02-01T00:00:00Z")
}

pub(crate) fn channel(name: &str) -> RoleName {
    name.parse().unwrap()
}

pub(crate) fn hardware() -> HardwareId {
    HARDWARE.parse().unwrap()
}

pub(crate) fn version(number: u64) -> Version {
    number.try_into().unwrap()
}

pub(crate) fn commit(version: &str) -> Commit {
    Commit(Sha256::of(version.as_bytes()))
}

/// Made once: without optimisation a key takes longer than a test.
fn pair(seed: u8) -> &'static (SigningKey, Key, String) {
    static PAIRS: [OnceLock<(SigningKey, Key, String)>; 256] = [const { OnceLock::new() }; 256];
    PAIRS[usize::from(seed)].get_or_init(|| {
        let secret = SigningKey::from_bytes(&[seed; 32]);
        let key = Key::ed25519(&secret.verifying_key().to_bytes());
        let keyid = key.keyid().unwrap();
        (secret, key, keyid)
    })
}

pub(crate) fn key(seed: u8) -> Key {
    pair(seed).1.clone()
}

pub(crate) fn keyid(seed: u8) -> String {
    pair(seed).2.clone()
}

pub(crate) fn keys(seeds: &[u8]) -> BTreeMap<String, Key> {
    seeds.iter().map(|&seed| (keyid(seed), key(seed))).collect()
}

pub(crate) fn signers(seeds: &[u8], threshold: u64) -> RoleKeys {
    RoleKeys {
        keyids: seeds.iter().map(|&seed| keyid(seed)).collect(),
        threshold,
    }
}

pub(crate) fn signature(envelope: &Envelope, seed: u8) -> Signature {
    let signature = pair(seed).0.sign(&envelope.sign_bytes().unwrap());
    Signature {
        keyid: keyid(seed),
        sig: signature
            .to_bytes()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect(),
    }
}

pub(crate) fn sign(document: &impl Serialize, seeds: &[u8]) -> Vec<u8> {
    let mut envelope = Envelope::unsigned(document).unwrap();
    envelope.signatures = seeds
        .iter()
        .map(|&seed| signature(&envelope, seed))
        .collect();
    envelope.to_bytes().unwrap()
}

pub(crate) fn announce(version: Version, bytes: &[u8]) -> MetaFile {
    let hashes = BTreeMap::from([("sha256".to_owned(), Sha256::of(bytes).to_string())]);
    MetaFile {
        version,
        length: Some(bytes.len() as u64),
        hashes: Some(hashes),
    }
}

/// What a device looks for.
pub(crate) fn newest(channel: &str) -> Newest {
    Newest {
        channel: self::channel(channel),
        hardware: hardware(),
    }
}

/// Carries the refresh out until it is done; `answer` is the transport, and hears whether the request may be conditional.
pub(crate) fn carry_out<G: Goal>(
    mut refresh: Refresh<G>,
    store: &mut Store,
    mut answer: impl FnMut(&str, bool) -> Reply,
) -> Result<Refresh<G>, Refusal> {
    loop {
        let reply = match refresh.want() {
            Want::Poll {
                path, conditional, ..
            } => answer(path, conditional),
            Want::File { path, .. } => answer(&path, false),
            Want::Keep => refresh.keep(store).unwrap(),
            Want::Done => return Ok(refresh),
        };
        refresh = refresh.supply(reply)?;
    }
}

impl Repository {
    /// Root 1 and one release in each of two channels, published once.
    pub(crate) fn new() -> Self {
        // Signing is slow without optimisation.
        static FIRST: LazyLock<Repository> = LazyLock::new(Repository::first);
        FIRST.clone()
    }

    fn first() -> Self {
        let spec_version = SPEC_VERSION.to_owned();
        let roles = [
            ("root", signers(&ROOT_KEYS, 2)),
            ("timestamp", signers(&[TIMESTAMP_KEY], 1)),
            ("snapshot", signers(&[SNAPSHOT_KEY], 1)),
            ("targets", signers(&[TARGETS_KEY], 1)),
        ];
        let root = Root {
            spec_version: spec_version.clone(),
            version: Version::FIRST,
            expires: at("2030-01-01T00:00:00Z"),
            consistent_snapshot: true,
            keys: keys(&[1, 2, 3, TIMESTAMP_KEY, SNAPSHOT_KEY, TARGETS_KEY]),
            roles: roles
                .map(|(name, signers)| (name.to_owned(), signers))
                .into(),
        };
        let targets = Targets {
            spec_version: spec_version.clone(),
            version: Version::FIRST,
            expires: at("2027-01-01T00:00:00Z"),
            targets: BTreeMap::new(),
            delegations: None,
        };
        let delegate = |name: &str, seed| Delegation {
            name: name.to_owned(),
            signers: signers(&[seed], 1),
            terminating: true,
            paths: vec![format!("{name}/*/*")],
            path_hash_prefixes: Vec::new(),
        };
        let delegations = Delegations {
            keys: keys(&[STABLE_KEY, BETA_KEY]),
            roles: vec![delegate("stable", STABLE_KEY), delegate("beta", BETA_KEY)],
        };
        let channel = Targets {
            expires: at("2026-04-01T00:00:00Z"),
            ..targets.clone()
        };
        let mut repository = Self {
            root,
            timestamp: Timestamp {
                spec_version: spec_version.clone(),
                version: Version::FIRST,
                expires: at("2026-02-08T00:00:00Z"),
                issued: Some(at("2026-01-31T00:00:00Z")),
                meta: BTreeMap::new(),
            },
            timestamp_key: TIMESTAMP_KEY,
            snapshot: Snapshot {
                spec_version,
                version: Version::FIRST,
                expires: at("2026-03-01T00:00:00Z"),
                meta: BTreeMap::new(),
            },
            snapshot_key: SNAPSHOT_KEY,
            channels: BTreeMap::from([
                ("stable".to_owned(), (channel.clone(), STABLE_KEY)),
                ("beta".to_owned(), (channel, BETA_KEY)),
            ]),
            targets: Targets {
                delegations: Some(delegations),
                ..targets
            },
            files: BTreeMap::new(),
        };
        repository.release("stable", "1.0", 1);
        repository.release("beta", "1.1", 1);
        repository.publish_root(&ROOT_KEYS);
        repository.publish();
        repository
    }

    /// Adds a release to a channel, for the next publication: one whose commit object is its version.
    pub(crate) fn release(&mut self, channel: &str, version: &str, serial: u64) {
        let file = |name: &str| {
            let path = format!("deltas/empty-{}/{name}", commit(version));
            File {
                path: path.parse().unwrap(),
                length: 5,
                sha256: Sha256::of(name.as_bytes()),
            }
        };
        let delta = Delta {
            from: None,
            to: None,
            usize: 9,
            superblock: file("superblock"),
            parts: vec![file("0")],
        };
        self.release_of(
            channel,
            version,
            serial,
            version.as_bytes(),
            vec![delta],
            None,
        );
    }

    /// Adds a release of this commit object, which these deltas lead to, and whose objects these are.
    pub(crate) fn release_of(
        &mut self,
        channel: &str,
        version: &str,
        serial: u64,
        object: &[u8],
        deltas: Vec<Delta>,
        objects: Option<Objects>,
    ) {
        let manifest = Manifest {
            format: FORMAT,
            commit: Commit(Sha256::of(object)),
            version: version.parse().unwrap(),
            hardware: hardware(),
            deltas,
            objects,
        };
        let bytes = manifest.to_bytes().unwrap();
        let digested = Digested {
            length: bytes.len() as u64,
            sha256: Sha256::of(&bytes),
        };
        let custom = Custom {
            format: FORMAT,
            version: version.parse().unwrap(),
            serial,
            hardware: vec![hardware()],
            manifest: digested,
        };
        let folder = format!("{channel}/{HARDWARE}");
        let targets = &mut self.channels.get_mut(channel).unwrap().0.targets;
        targets.insert(
            format!("{folder}/{version}.commit"),
            TargetFile::of(object).with_custom(&custom).unwrap(),
        );
        targets.insert(
            format!("{folder}/{version}.manifest.json"),
            TargetFile::of(&bytes),
        );
        self.files.insert(
            format!(
                "targets/{folder}/{}.{version}.manifest.json",
                digested.sha256
            ),
            bytes,
        );
    }

    pub(crate) fn publish_root(&mut self, seeds: &[u8]) {
        self.files.insert(
            format!("metadata/{}.root.json", self.root.version),
            sign(&self.root, seeds),
        );
    }

    /// Signs all but the root, and makes the version of each one greater for the next time.
    pub(crate) fn publish(&mut self) {
        let mut meta = BTreeMap::new();
        let targets = [("targets".to_owned(), (&mut self.targets, TARGETS_KEY))];
        let channels = self
            .channels
            .iter_mut()
            .map(|(name, (channel, seed))| (name.clone(), (channel, *seed)));
        for (name, (document, seed)) in channels.chain(targets) {
            let bytes = sign(document, &[seed]);
            meta.insert(format!("{name}.json"), announce(document.version, &bytes));
            self.files
                .insert(format!("metadata/{}.{name}.json", document.version), bytes);
            document.version = document.version.next().unwrap();
        }
        self.snapshot.meta = meta;
        let bytes = sign(&self.snapshot, &[self.snapshot_key]);
        self.timestamp.meta = BTreeMap::from([(
            "snapshot.json".to_owned(),
            announce(self.snapshot.version, &bytes),
        )]);
        self.files.insert(
            format!("metadata/{}.snapshot.json", self.snapshot.version),
            bytes,
        );
        self.snapshot.version = self.snapshot.version.next().unwrap();
        self.publish_timestamp();
    }

    /// Signs the timestamp again, over the same snapshot.
    pub(crate) fn publish_timestamp(&mut self) {
        self.files.insert(
            "metadata/timestamp.json".to_owned(),
            sign(&self.timestamp, &[self.timestamp_key]),
        );
        self.timestamp.version = self.timestamp.version.next().unwrap();
    }

    pub(crate) fn file(&self, name: &str) -> &[u8] {
        &self.files[&format!("metadata/{name}")]
    }
}
