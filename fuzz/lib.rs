//! One function for each parser of bytes that others wrote: it may refuse them, and may not panic, hang, or contradict itself.
//!
//! What is behind a signature or a checksum is reached by making one: the functions sign, and sum, what they are given.
//! `fuzz/targets` hands them to libFuzzer; the agent's tests replay `fuzz/corpus` through them.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use bootloader_glue::uboot::image::{Endian, Flags, Layout};
use bootloader_glue::uboot::{Copies, image, places};
use bootloader_glue::{grub, protocol::Environment, uboot};
use ed25519_dalek::{Signer as _, SigningKey};
use jiff::Timestamp as Time;
use offshoot::commit::{Commit, Sha256};
use offshoot::config::Config;
use offshoot::delta::{self, Mismatch};
use offshoot::record::{self, Record};
use offshoot::trust::goal::{AnyTarget, Goal as _, Newest};
use offshoot::trust::schema::{
    Custom, Delegation, Delegations, Delta, Digested, Envelope, FORMAT, File, Key, Manifest,
    MetaFile, RoleKeys, Root, SPEC_VERSION, Signature, Snapshot, TargetFile, Targets, Timestamp,
    Version, time,
};
use offshoot::trust::verify::{self, CurrentRoot, Floors, Search, Verified};
use offshoot::trust::{Refusal, canonical};
use serde_json::Value;

/// JSON, and the `signed` part of each document, signed by the one key that every role here has.
pub fn metadata(data: &[u8]) {
    if let Ok(envelope) = Envelope::parse("any", data) {
        drop(verify::trusted_root(data));
        drop(envelope.sign_bytes());
    }
    let Ok(signed) = canonical::parse(data) else {
        return;
    };
    let form = canonical::to_bytes(&signed).expect("what was parsed has a form");
    // A control character is itself in the form, which is to be signed and not to be read.
    if form.iter().all(|byte| *byte >= 0x20) {
        assert_eq!(canonical::parse(&form).as_ref(), Ok(&signed));
    }
    manifest(data);
    let version = signed.get("version").and_then(Value::as_u64).unwrap_or(1);
    let Ok(version) = Version::try_from(version) else {
        return;
    };
    let bytes = sign(signed.clone());
    match signed.get("_type").and_then(Value::as_str) {
        Some("root") => {
            let trusted = verify::trusted_root(&bytes);
            let next = verify::accept_root(&CHAIN.root, &bytes);
            for root in trusted.into_iter().chain(next) {
                assert_eq!(root.version, version);
                let floors = Floors::default().raised_by(&root, None, None);
                assert!(!floors.fall_with(&root));
            }
        }
        Some("timestamp") => {
            if let Ok(timestamp) = verify::accept_timestamp(&CHAIN.root, &Floors::default(), &bytes)
            {
                drop(verify::snapshot_limit(&timestamp));
                let floors = Floors::default().raised_by(&CHAIN.root, Some(&timestamp), None);
                let again = verify::accept_timestamp(&CHAIN.root, &floors, &bytes);
                assert!(again.is_ok(), "a timestamp is not below itself");
            }
        }
        Some("snapshot") => {
            let timestamp = timestamp(version);
            let accepted =
                verify::accept_snapshot(&CHAIN.root, &timestamp, &Floors::default(), &bytes);
            if let Ok(snapshot) = accepted {
                drop(verify::targets_limit(&snapshot, "targets"));
                let floors = Floors::default().raised_by(&CHAIN.root, None, Some(&snapshot));
                let again = verify::accept_snapshot(&CHAIN.root, &timestamp, &floors, &bytes);
                assert!(again.is_ok(), "a snapshot is not below itself");
            }
        }
        Some("targets") => targets(version, &bytes),
        _ => {}
    }
}

/// As the top-level targets, and as a channel's.
fn targets(version: Version, bytes: &[u8]) {
    let snapshot = snapshot(version);
    let any = AnyTarget {
        path: "stable/qemu-x86_64/1.0.commit".to_owned(),
    };
    let mut search = Search::new(&CHAIN.root, any.wanted()).expect("a root has targets");
    while let Ok(Some(delegated)) = search.next_role() {
        // The one file is every role's: whatever it delegates to is itself.
        let Ok(role) = verify::accept_role(&CHAIN.root, &snapshot, &delegated, bytes) else {
            break;
        };
        drop(any.sought(&role));
        search.descend(&role, |delegated| any.leads(delegated));
    }
    assert!(search.visited().len() <= verify::MAX_ROLES + 1);
    let newest = Newest {
        channel: "stable".parse().expect("a name"),
        hardware: "qemu-x86_64".parse().expect("an id"),
    };
    if let Ok(top) = verify::accept_targets(&CHAIN.root, &snapshot, bytes) {
        drop(verify::accept_channel(
            &CHAIN.root,
            &snapshot,
            &top,
            &newest.channel,
            bytes,
        ));
    }
    let channel = verify::accept_channel(
        &CHAIN.root,
        &snapshot,
        &CHAIN.targets,
        &newest.channel,
        bytes,
    );
    if let Ok(channel) = channel
        && let Ok(Some(entry)) = channel.newest(&newest.hardware)
    {
        assert_eq!(entry.hardware, newest.hardware);
        drop(verify::accept_manifest(&entry, b"{}"));
        drop(channel.find(&newest.hardware, entry.commit));
    }
}

/// As a release manifest of an entry that names it.
fn manifest(data: &[u8]) {
    let hardware = "qemu-x86_64".parse().expect("an id");
    let custom = Custom {
        format: FORMAT,
        version: "1.0".parse().expect("a version"),
        serial: 1,
        hardware: vec![hardware],
        manifest: Digested {
            length: data.len() as u64,
            sha256: Sha256::of(data),
        },
    };
    let target = TargetFile::of(b"commit")
        .with_custom(&custom)
        .expect("JSON");
    let mut document = (*CHAIN.targets).clone();
    document
        .targets
        .insert("stable/qemu-x86_64/1.0.commit".to_owned(), target);
    let bytes = sign(Envelope::unsigned(&document).expect("JSON").signed);
    let stable = "stable".parse().expect("a name");
    let snapshot = snapshot(document.version);
    let channel = verify::accept_channel(&CHAIN.root, &snapshot, &CHAIN.targets, &stable, &bytes);
    let entry = channel.and_then(|channel| channel.newest(&custom.hardware[0]));
    let Ok(Some(entry)) = entry else {
        unreachable!("the channel is signed and lists one release");
    };
    match verify::accept_manifest(&entry, data) {
        Ok(release) => {
            let written = release.manifest.to_bytes().expect("JSON");
            let again = canonical::parse(&written).expect("what was written");
            let again: Manifest = serde_json::from_value(again).expect("what was written");
            assert_eq!(again, release.manifest);
        }
        Err(refusal) => assert!(
            !matches!(
                refusal,
                Refusal::WrongDigest { .. } | Refusal::WrongLength { .. }
            ),
            "it is the one that is named"
        ),
    }
}

/// A copy of the GRUB environment.
pub fn grub_env(data: &[u8]) {
    let with_signature = [b"# GRUB Environment Block\n", data].concat();
    for block in [data, &with_signature] {
        if let Some((counter, seq)) = grub::decode(block) {
            assert_eq!(
                grub::decode(&grub::encode(&counter, seq)),
                Some((counter, seq))
            );
        }
    }
}

/// A copy of the U-Boot environment, under the checksum that it should have, and `fw_env.config`.
pub fn uboot_env(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        drop(places::parse(text));
    }
    for redundant in [false, true] {
        for endian in [Endian::Little, Endian::Big] {
            let head = if redundant { 5 } else { 4 };
            let layout = Layout {
                size: data.len() + head,
                redundant,
                endian,
            };
            let sum = image::crc32(data);
            let mut bytes = match endian {
                Endian::Little => sum.to_le_bytes().to_vec(),
                Endian::Big => sum.to_be_bytes().to_vec(),
            };
            bytes.resize(head, 1);
            bytes.extend(data);
            let Some((variables, flag)) = layout.decode(&bytes) else {
                continue;
            };
            if let Ok(again) = layout.encode(&variables, flag) {
                assert_eq!(layout.decode(&again), Some((variables.clone(), flag)));
            }
            let counter = uboot::counter(&variables);
            let copies = vec![Some(bytes); 1 + usize::from(redundant)];
            let copies = Copies::new(layout, Flags::Incremental, &copies);
            let valid = matches!(copies.environment(), Environment::Valid { .. });
            assert_eq!(valid, counter.is_some());
            drop(copies.write(&variables));
        }
    }
}

/// A copy of the record, and what is under its digest.
pub fn record(data: &[u8]) {
    drop(record::decode(data));
    if let Ok(record) = serde_json::from_slice::<Record>(data) {
        let json = serde_json::to_vec(&record).expect("JSON");
        let again: Record = serde_json::from_slice(&json).expect("what was written");
        assert_eq!(again, record);
    }
}

/// The image's configuration and the operator's, with a NUL between them.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let (image, operator) = text.split_once('\0').unwrap_or((text, ""));
    let texts = [("image", image), ("operator", operator)];
    let texts = texts.map(|(file, text)| (file.to_owned(), text.to_owned()));
    if let Ok(config) = Config::parse(&texts) {
        drop(config.bootloader());
        config.poll_interval();
    }
}

/// The superblock of a static delta, whose ends and parts the manifest has right.
pub fn delta_superblock(data: &[u8]) {
    let file = |sha256| File {
        path: "a".parse().expect("a path"),
        length: 1,
        sha256,
    };
    let mut target = Commit(Sha256::of(b""));
    let mut delta = Delta {
        from: None,
        to: None,
        usize: 1,
        superblock: file(Sha256::of(data)),
        parts: Vec::new(),
    };
    // Each refusal says what the superblock has: the manifest then has it, too.
    for _ in 0..64 {
        match delta::check(data, &delta, target) {
            Err(Mismatch::From { want, got }) => {
                assert_eq!(want, delta.from);
                if got == delta.from {
                    return;
                }
                delta.from = got;
            }
            Err(Mismatch::To {
                want,
                got: Some(got),
            }) => {
                assert!(want == target && got != target);
                target = got;
            }
            Err(Mismatch::PartCount { want, got }) => {
                assert_eq!(want, delta.parts.len());
                // As many as there are: bounded by the bytes.
                assert!(got <= data.len());
                delta.parts = vec![file(Sha256::of(b"")); got];
            }
            Err(Mismatch::Part {
                part,
                got: Some(got),
                ..
            }) => delta.parts[part] = file(got),
            Ok(()) | Err(_) => return,
        }
    }
}

struct Chain {
    root: CurrentRoot,
    targets: Verified<Targets>,
}

/// Everything that is not the input.
static CHAIN: LazyLock<Chain> = LazyLock::new(|| {
    let root = Root {
        spec_version: SPEC_VERSION.to_owned(),
        version: Version::FIRST,
        expires: expires(),
        consistent_snapshot: true,
        keys: keys(),
        roles: ["root", "timestamp", "snapshot", "targets"]
            .map(|role| (role.to_owned(), signers()))
            .into(),
    };
    let bytes = sign(Envelope::unsigned(&root).expect("JSON").signed);
    let root = verify::trusted_root(&bytes).expect("signed");
    let root = verify::current_root(root, Time::UNIX_EPOCH).expect("fresh");
    let targets = Targets {
        spec_version: SPEC_VERSION.to_owned(),
        version: Version::FIRST,
        expires: expires(),
        targets: BTreeMap::new(),
        delegations: Some(Delegations {
            keys: keys(),
            roles: vec![Delegation {
                name: "stable".to_owned(),
                signers: signers(),
                terminating: true,
                paths: vec!["stable/*/*".to_owned()],
                path_hash_prefixes: Vec::new(),
            }],
        }),
    };
    let bytes = sign(Envelope::unsigned(&targets).expect("JSON").signed);
    let named = snapshot_under(&root, Version::FIRST);
    let targets = verify::accept_targets(&root, &named, &bytes).expect("signed");
    Chain { root, targets }
});

/// One that names the snapshot of this version.
fn timestamp(version: Version) -> Verified<Timestamp> {
    timestamp_under(&CHAIN.root, version)
}

fn timestamp_under(root: &CurrentRoot, version: Version) -> Verified<Timestamp> {
    let timestamp = Timestamp {
        spec_version: SPEC_VERSION.to_owned(),
        version: Version::FIRST,
        expires: expires(),
        issued: None,
        meta: BTreeMap::from([("snapshot.json".to_owned(), announced(version))]),
    };
    let bytes = sign(Envelope::unsigned(&timestamp).expect("JSON").signed);
    verify::accept_timestamp(root, &Floors::default(), &bytes).expect("signed")
}

/// One that names the roles there may be, in this version.
fn snapshot(version: Version) -> Verified<Snapshot> {
    snapshot_under(&CHAIN.root, version)
}

fn snapshot_under(root: &CurrentRoot, version: Version) -> Verified<Snapshot> {
    let roles = ["targets", "stable", "beta", "a", "b"];
    let snapshot = Snapshot {
        spec_version: SPEC_VERSION.to_owned(),
        version: Version::FIRST,
        expires: expires(),
        meta: roles
            .map(|role| (format!("{role}.json"), announced(version)))
            .into(),
    };
    let bytes = sign(Envelope::unsigned(&snapshot).expect("JSON").signed);
    let timestamp = timestamp_under(root, Version::FIRST);
    verify::accept_snapshot(root, &timestamp, &Floors::default(), &bytes).expect("signed")
}

fn announced(version: Version) -> MetaFile {
    MetaFile {
        version,
        length: None,
        hashes: None,
    }
}

fn expires() -> Time {
    time::parse("2100-01-01T00:00:00Z").expect("a time")
}

static PAIR: LazyLock<SigningKey> = LazyLock::new(|| SigningKey::from_bytes(&[7; 32]));

/// The id that the corpus delegates by.
const KEYID: &str = "key";

fn keys() -> BTreeMap<String, Key> {
    let key = Key::ed25519(&PAIR.verifying_key().to_bytes());
    BTreeMap::from([(KEYID.to_owned(), key)])
}

fn signers() -> RoleKeys {
    RoleKeys {
        keyids: vec![KEYID.to_owned()],
        threshold: 1,
    }
}

fn sign(signed: Value) -> Vec<u8> {
    let mut envelope = Envelope {
        signatures: Vec::new(),
        signed,
    };
    let message = envelope.sign_bytes().expect("what was parsed has a form");
    let digits = PAIR.sign(&message).to_bytes();
    envelope.signatures.push(Signature {
        keyid: KEYID.to_owned(),
        sig: digits.iter().map(|byte| format!("{byte:02x}")).collect(),
    });
    envelope.to_bytes().expect("JSON")
}
