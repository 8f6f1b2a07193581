//! The client workflow of TUF (specification 1.0.34, section 5), one function per document, pure.
//!
//! The order is forced by the arguments: a timestamp needs a [`CurrentRoot`], a snapshot needs a timestamp, and so on to a
//! [`Verified`] release. The one time of a refresh is given to [`current_root`] and travels with it (5.1).

mod channel;
mod delegations;
mod floors;
mod signatures;

use std::collections::BTreeMap;
use std::ops::Deref;

use jiff::Timestamp as Time;
use serde_json::Value;
use sha2::Digest as _;

use super::schema::{
    Envelope, FORMAT, Key, Manifest, MetaFile, RoleKeys, RoleName, Root, Snapshot, Targets,
    Timestamp, from_value,
};
use super::{Refusal, canonical};
use crate::commit::Sha256;

pub use channel::{Channel, Entry};
pub use delegations::{Delegated, MAX_ROLES, Role, Search, Target};
pub use floors::Floors;
pub use signatures::verifies;

/// A root with thirty keys is 10 KiB.
pub const ROOT_LIMIT: u64 = 64 << 10;
/// A timestamp names one file.
pub const TIMESTAMP_LIMIT: u64 = 16 << 10;
/// A snapshot is about 200 bytes for each channel.
pub const SNAPSHOT_LIMIT: u64 = 256 << 10;
/// Targets are about 600 bytes for each release and hardware.
pub const TARGETS_LIMIT: u64 = 4 << 20;
/// Of targets that are not announced by a digest, whoever answers chooses every byte, and a small value takes sixteen times its text in memory.
pub const UNANNOUNCED_LIMIT: u64 = 256 << 10;
/// A manifest is about 200 bytes for each part of each delta.
pub const MANIFEST_LIMIT: u64 = 256 << 10;
/// New roots in one refresh (5.3.3); the next refresh goes on from there.
pub const ROOT_HOPS: u32 = 32;

/// What this module has verified, and nobody else can make. Not serialisable: what comes from a disk is verified again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified<T>(T);

impl<T> Deref for Verified<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

/// A root to judge by, and the time to judge at.
#[derive(Clone, Debug)]
pub struct CurrentRoot {
    root: Verified<Root>,
    judge: Judge,
}

#[derive(Clone, Copy, Debug)]
enum Judge {
    At(Time),
    /// It was judged when it was accepted.
    Accepted,
}

impl Deref for CurrentRoot {
    type Target = Verified<Root>;

    fn deref(&self) -> &Verified<Root> {
        &self.root
    }
}

/// An entry and the manifest that it names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Release {
    pub entry: Entry,
    pub manifest: Manifest,
}

/// 5.2: the root that a device starts from is signed by its own threshold; whether it has expired does not matter yet.
pub fn trusted_root(bytes: &[u8]) -> Result<Verified<Root>, Refusal> {
    let (envelope, root) = root(bytes)?;
    signatures::check("root", role(&root, "root")?, &root.keys, &envelope)?;
    Ok(Verified(root))
}

/// 5.3.4 to 5.3.6: the next root is signed by a threshold of the trusted root's keys and of its own, and its version is the next.
pub fn accept_root(trusted: &Verified<Root>, bytes: &[u8]) -> Result<Verified<Root>, Refusal> {
    let (envelope, root) = root(bytes)?;
    signatures::check("root", role(trusted, "root")?, &trusted.keys, &envelope)?;
    signatures::check("root", role(&root, "root")?, &root.keys, &envelope)?;
    if trusted.version.next() != Some(root.version) {
        return Err(Refusal::RootNotSequential {
            have: trusted.version.number(),
            got: root.version.number(),
        });
    }
    Ok(Verified(root))
}

/// 5.3.10: the newest root has not expired.
pub fn current_root(root: Verified<Root>, now: Time) -> Result<CurrentRoot, Refusal> {
    let root = CurrentRoot {
        root,
        judge: Judge::At(now),
    };
    root.judge("root", root.expires)?;
    Ok(root)
}

/// A root to verify again, after a restart, what was fresh when it was accepted.
pub(super) fn stored_root(root: Verified<Root>) -> CurrentRoot {
    CurrentRoot {
        root,
        judge: Judge::Accepted,
    }
}

/// 5.4.2 to 5.4.4: the timestamp is signed, is not older than the one before, names no older snapshot, and has not expired.
/// An equal version is accepted: the caller then keeps the one that it holds.
pub fn accept_timestamp(
    root: &CurrentRoot,
    floors: &Floors,
    bytes: &[u8],
) -> Result<Verified<Timestamp>, Refusal> {
    let timestamp: Timestamp = document(
        "timestamp",
        "timestamp",
        role(root, "timestamp")?,
        &root.keys,
        bytes,
    )?;
    not_below("timestamp", floors.timestamp, timestamp.version.number())?;
    not_below(
        "snapshot",
        floors.snapshot,
        snapshot_file(&timestamp)?.version.number(),
    )?;
    if timestamp
        .issued
        .is_some_and(|issued| issued >= timestamp.expires)
    {
        return Err(Refusal::Malformed {
            role: "timestamp".to_owned(),
            why: "it is issued after it expires".to_owned(),
        });
    }
    root.judge("timestamp", timestamp.expires)?;
    Ok(Verified(timestamp))
}

/// 5.5.2 to 5.5.6: the snapshot is the one that the timestamp names, is signed, has every role that was there, none of them older.
pub fn accept_snapshot(
    root: &CurrentRoot,
    timestamp: &Verified<Timestamp>,
    floors: &Floors,
    bytes: &[u8],
) -> Result<Verified<Snapshot>, Refusal> {
    let announced = snapshot_file(timestamp)?;
    matches_announced("snapshot", announced, bytes)?;
    let snapshot: Snapshot = document(
        "snapshot",
        "snapshot",
        role(root, "snapshot")?,
        &root.keys,
        bytes,
    )?;
    has_version("snapshot", announced, snapshot.version.number())?;
    for (file, &have) in &floors.roles {
        let role = file.strip_suffix(".json").unwrap_or(file);
        let Some(listed) = snapshot.meta.get(file) else {
            return Err(Refusal::RoleVanished {
                role: role.to_owned(),
                have,
            });
        };
        not_below(role, have, listed.version.number())?;
    }
    root.judge("snapshot", snapshot.expires)?;
    Ok(Verified(snapshot))
}

/// 5.5.5: the snapshot that was accepted before. It is signed, and need not be the one that the timestamp names by now.
pub(super) fn trusted_snapshot(
    root: &CurrentRoot,
    bytes: &[u8],
) -> Result<Verified<Snapshot>, Refusal> {
    document(
        "snapshot",
        "snapshot",
        role(root, "snapshot")?,
        &root.keys,
        bytes,
    )
    .map(Verified)
}

/// 5.6.2 to 5.6.5, for the top-level targets and for each role that is delegated to (5.6.7): they are those that the snapshot names,
/// signed by the keys that the role above, and not another one, gives them, and not expired.
pub fn accept_role(
    root: &CurrentRoot,
    snapshot: &Verified<Snapshot>,
    delegated: &Delegated,
    bytes: &[u8],
) -> Result<Role, Refusal> {
    let name = &delegated.name;
    let announced = role_file(snapshot, name)?;
    matches_announced(name, announced, bytes)?;
    let role = signed_role(delegated, bytes)?;
    has_version(name, announced, role.version.number())?;
    root.judge(name, role.expires)?;
    Ok(role)
}

/// The role as it was accepted before: signed, whatever the snapshot names by now.
pub(super) fn signed_role(delegated: &Delegated, bytes: &[u8]) -> Result<Role, Refusal> {
    let Delegated {
        name,
        signers,
        keys,
        ..
    } = delegated;
    let targets: Targets = document(name, "targets", signers, keys, bytes)?;
    delegations::check_delegations(name, &targets)?;
    Ok(delegated.role(Verified(targets)))
}

/// The top-level targets.
pub fn accept_targets(
    root: &CurrentRoot,
    snapshot: &Verified<Snapshot>,
    bytes: &[u8],
) -> Result<Verified<Targets>, Refusal> {
    let top = Delegated::top(root)?;
    Ok(accept_role(root, snapshot, &top, bytes)?.targets)
}

/// A channel: the role of that name to which the top-level targets delegate.
pub fn accept_channel(
    root: &CurrentRoot,
    snapshot: &Verified<Snapshot>,
    targets: &Verified<Targets>,
    name: &RoleName,
    bytes: &[u8],
) -> Result<Channel, Refusal> {
    let delegated = channel_role(targets, name)?;
    let role = accept_role(root, snapshot, &delegated, bytes)?;
    Ok(Channel::new(name.clone(), role))
}

pub(super) fn channel_role(
    targets: &Verified<Targets>,
    name: &RoleName,
) -> Result<Delegated, Refusal> {
    Delegated::by(targets)
        .find(|delegated| delegated.name == name.as_str())
        .ok_or_else(|| Refusal::NoSuchChannel {
            channel: name.to_string(),
        })
}

/// 5.7.3: the file is the one that its targets role signs for.
pub fn accept_target(target: &Verified<Target>, bytes: &[u8]) -> Result<(), Refusal> {
    let Target { path, file } = &target.0;
    has_length(path, file.length, bytes)?;
    if file.hashes.is_empty() {
        return Err(Refusal::NoHash { role: path.clone() });
    }
    has_hashes(path, &file.hashes, bytes)
}

/// The manifest is the one that the entry names, and it speaks of the same release.
pub fn accept_manifest(
    entry: &Verified<Entry>,
    bytes: &[u8],
) -> Result<Verified<Release>, Refusal> {
    accept_target(&entry.manifest_target(), bytes)?;
    let path = entry.manifest_path();
    let value = canonical::parse(bytes)?;
    // Before the fields: another format has other fields.
    if let Some(got) = value
        .get("format")
        .and_then(Value::as_u64)
        .filter(|got| *got != FORMAT)
    {
        return Err(Refusal::UnknownFormat {
            path,
            want: FORMAT,
            got,
        });
    }
    let manifest: Manifest = from_value(&path, value)?;
    same(&path, "commit", &entry.commit, &manifest.commit)?;
    same(&path, "version", &entry.version, &manifest.version)?;
    same(&path, "hardware", &entry.hardware, &manifest.hardware)?;
    Ok(Verified(Release {
        entry: entry.0.clone(),
        manifest,
    }))
}

/// How many bytes of the snapshot to fetch at most.
pub fn snapshot_limit(timestamp: &Verified<Timestamp>) -> Result<u64, Refusal> {
    limit("snapshot", snapshot_file(timestamp)?.length, SNAPSHOT_LIMIT)
}

/// How many bytes of a targets role to fetch at most.
pub fn targets_limit(snapshot: &Verified<Snapshot>, role: &str) -> Result<u64, Refusal> {
    let file = role_file(snapshot, role)?;
    let most = match &file.hashes {
        Some(_) => TARGETS_LIMIT,
        None => UNANNOUNCED_LIMIT,
    };
    limit(role, file.length, most)
}

/// What the timestamp announces of the snapshot.
pub fn snapshot_file(timestamp: &Timestamp) -> Result<&MetaFile, Refusal> {
    let missing = || Refusal::Malformed {
        role: "timestamp".to_owned(),
        why: "it does not name snapshot.json".to_owned(),
    };
    timestamp.meta.get("snapshot.json").ok_or_else(missing)
}

/// What the snapshot announces of a targets role.
pub fn role_file<'a>(snapshot: &'a Snapshot, role: &str) -> Result<&'a MetaFile, Refusal> {
    snapshot
        .meta
        .get(&format!("{role}.json"))
        .ok_or_else(|| Refusal::NotInSnapshot {
            role: role.to_owned(),
        })
}

impl CurrentRoot {
    fn judge(&self, role: &str, expires: Time) -> Result<(), Refusal> {
        match self.judge {
            Judge::At(now) if now >= expires => Err(Refusal::Expired {
                role: role.to_owned(),
                expires,
                now,
            }),
            Judge::At(_) | Judge::Accepted => Ok(()),
        }
    }
}

fn root(bytes: &[u8]) -> Result<(Envelope, Root), Refusal> {
    let envelope = Envelope::parse("root", bytes)?;
    let root: Root = signed_as("root", "root", envelope.signed.clone())?;
    // A root without keys for them could only be followed by another root.
    for name in ["root", "timestamp", "snapshot", "targets"] {
        role(&root, name)?;
    }
    Ok((envelope, root))
}

fn document<T: serde::de::DeserializeOwned>(
    role: &str,
    kind: &str,
    signers: &RoleKeys,
    keys: &BTreeMap<String, Key>,
    bytes: &[u8],
) -> Result<T, Refusal> {
    let envelope = Envelope::parse(role, bytes)?;
    signatures::check(role, signers, keys, &envelope)?;
    signed_as(role, kind, envelope.signed)
}

/// 4.2: the document is of its role's type, and of a specification that is read here.
fn signed_as<T: serde::de::DeserializeOwned>(
    role: &str,
    kind: &str,
    signed: Value,
) -> Result<T, Refusal> {
    let text = |field: &str| {
        signed
            .get(field)
            .and_then(Value::as_str)
            .unwrap_or_default()
    };
    if text("_type") != kind {
        return Err(Refusal::WrongType {
            role: role.to_owned(),
            want: kind.to_owned(),
            got: text("_type").to_owned(),
        });
    }
    let minor = text("spec_version").strip_prefix("1.");
    if !minor.is_some_and(|minor| {
        !minor.is_empty()
            && minor
                .bytes()
                .all(|byte| byte.is_ascii_digit() || byte == b'.')
    }) {
        return Err(Refusal::UnknownSpec {
            role: role.to_owned(),
            got: text("spec_version").to_owned(),
        });
    }
    from_value(role, signed)
}

fn role<'a>(root: &'a Root, role: &str) -> Result<&'a RoleKeys, Refusal> {
    root.roles.get(role).ok_or_else(|| Refusal::NoSuchRole {
        role: role.to_owned(),
    })
}

fn not_below(role: &str, have: u64, got: u64) -> Result<(), Refusal> {
    if got < have {
        Err(Refusal::RolledBack {
            role: role.to_owned(),
            have,
            got,
        })
    } else {
        Ok(())
    }
}

fn has_version(role: &str, announced: &MetaFile, got: u64) -> Result<(), Refusal> {
    let want = announced.version.number();
    if got == want {
        Ok(())
    } else {
        Err(Refusal::WrongVersion {
            role: role.to_owned(),
            want,
            got,
        })
    }
}

fn has_length(role: &str, want: u64, bytes: &[u8]) -> Result<(), Refusal> {
    let got = bytes.len() as u64;
    if got == want {
        Ok(())
    } else {
        Err(Refusal::WrongLength {
            role: role.to_owned(),
            want,
            got,
        })
    }
}

/// Length and hashes where they are announced.
fn matches_announced(role: &str, announced: &MetaFile, bytes: &[u8]) -> Result<(), Refusal> {
    if let Some(length) = announced.length {
        has_length(role, length, bytes)?;
    }
    match &announced.hashes {
        Some(hashes) => has_hashes(role, hashes, bytes),
        None => Ok(()),
    }
}

/// All of the hashes, and none that cannot be checked.
fn has_hashes(role: &str, hashes: &BTreeMap<String, String>, bytes: &[u8]) -> Result<(), Refusal> {
    for (algorithm, want) in hashes {
        let got = match algorithm.as_str() {
            "sha256" => Sha256::of(bytes).to_string(),
            "sha512" => sha2::Sha512::digest(bytes)
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect(),
            _ => {
                return Err(Refusal::UnknownHash {
                    role: role.to_owned(),
                    algorithm: algorithm.clone(),
                });
            }
        };
        if got != *want {
            return Err(Refusal::WrongDigest {
                role: role.to_owned(),
                want: want.clone(),
                got,
            });
        }
    }
    Ok(())
}

pub(super) fn limit(role: &str, announced: Option<u64>, most: u64) -> Result<u64, Refusal> {
    match announced {
        Some(length) if length > most => Err(Refusal::TooLong {
            role: role.to_owned(),
            limit: most,
        }),
        Some(length) => Ok(length),
        None => Ok(most),
    }
}

fn same<T: PartialEq + ToString>(
    path: &str,
    what: &'static str,
    want: &T,
    got: &(impl PartialEq<T> + ToString),
) -> Result<(), Refusal> {
    if got == want {
        Ok(())
    } else {
        Err(mixed_up(path, what, want, got))
    }
}

fn mixed_up(path: &str, what: &'static str, want: &impl ToString, got: &impl ToString) -> Refusal {
    Refusal::MixedUp {
        path: path.to_owned(),
        what,
        want: want.to_string(),
        got: got.to_string(),
    }
}

#[cfg(test)]
mod tests;
