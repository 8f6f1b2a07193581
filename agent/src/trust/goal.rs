//! What a refresh looks for, once the top-level metadata is known to be fresh: which delegations lead to it (5.6.7), and which file
//! is fetched in the end (5.7).
//!
//! | goal | finds | of the delegations, follows |
//! |---|---|---|
//! | [`Newest`], the device's | the newest release of a channel for a hardware, and its manifest | the one named as the channel |
//! | [`AnyTarget`] | the target of a path, and its bytes | those that may sign for the path |
//! | [`TopLevel`] | nothing | none |

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::fmt::Debug;

use super::Refusal;
use super::schema::{HardwareId, RoleName};
use super::verify::{self, Channel, Delegated, Entry, Release, Role, Target, Verified};

pub trait Goal {
    /// What a role says of it.
    type Target: Debug;
    /// That, and its file.
    type Found: Debug;

    /// The most bytes that the file may have.
    const LIMIT: u64;
    /// As what a [`Store`](super::store::Store) keeps the file. A device has one such goal, and keeps only what leads to it.
    const KEPT_AS: Option<&'static str>;

    /// What a refusal calls it.
    fn wanted(&self) -> String;

    /// Whether the search goes on to this role (5.6.7.2).
    fn leads(&self, to: &Delegated) -> bool;

    /// What this role says of it, if anything (5.6.7.1).
    fn sought(&self, role: &Role) -> Result<Option<Self::Target>, Refusal>;

    fn file(target: &Self::Target) -> Verified<Target>;

    /// 5.7.3
    fn accept(target: &Self::Target, bytes: Vec<u8>) -> Result<Self::Found, Refusal>;

    /// 5.7.2: whether it is in order that no role had it.
    fn missing(&self, visited: &BTreeSet<String>) -> Result<(), Refusal>;
}

/// The newest release of a channel for a hardware. Not to have one is no error; not to have the channel is.
#[derive(Clone, Debug)]
pub struct Newest {
    pub channel: RoleName,
    pub hardware: HardwareId,
}

/// A target by its path, from whichever role it is found in first.
#[derive(Clone, Debug)]
pub struct AnyTarget {
    pub path: String,
}

/// Only that the top-level metadata is fresh.
#[derive(Clone, Copy, Debug)]
pub struct TopLevel;

/// A target's bytes, which are what its role signs for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Download {
    pub target: Verified<Target>,
    pub bytes: Vec<u8>,
}

impl Goal for Newest {
    type Target = Verified<Entry>;
    type Found = Verified<Release>;

    const LIMIT: u64 = verify::MANIFEST_LIMIT;
    const KEPT_AS: Option<&'static str> = Some("manifest");

    fn wanted(&self) -> String {
        format!("the channel {}", self.channel)
    }

    /// Once there, it leads nowhere else.
    fn leads(&self, to: &Delegated) -> bool {
        to.name() == self.channel.as_str()
    }

    fn sought(&self, role: &Role) -> Result<Option<Verified<Entry>>, Refusal> {
        if role.name() != self.channel.as_str() {
            return Ok(None);
        }
        Channel::new(self.channel.clone(), role.clone()).newest(&self.hardware)
    }

    fn file(entry: &Verified<Entry>) -> Verified<Target> {
        entry.manifest_target()
    }

    fn accept(entry: &Verified<Entry>, bytes: Vec<u8>) -> Result<Verified<Release>, Refusal> {
        verify::accept_manifest(entry, &bytes)
    }

    fn missing(&self, visited: &BTreeSet<String>) -> Result<(), Refusal> {
        if visited.contains(self.channel.as_str()) {
            return Ok(());
        }
        Err(Refusal::NoSuchChannel {
            channel: self.channel.to_string(),
        })
    }
}

impl Goal for AnyTarget {
    type Target = Verified<Target>;
    type Found = Download;

    /// It is held in memory.
    const LIMIT: u64 = 64 << 20;
    const KEPT_AS: Option<&'static str> = None;

    fn wanted(&self) -> String {
        format!("the target {:?}", self.path)
    }

    fn leads(&self, to: &Delegated) -> bool {
        to.may_sign(&self.path)
    }

    fn sought(&self, role: &Role) -> Result<Option<Verified<Target>>, Refusal> {
        Ok(role.target(&self.path))
    }

    fn file(target: &Verified<Target>) -> Verified<Target> {
        target.clone()
    }

    fn accept(target: &Verified<Target>, bytes: Vec<u8>) -> Result<Download, Refusal> {
        verify::accept_target(target, &bytes)?;
        Ok(Download {
            target: target.clone(),
            bytes,
        })
    }

    fn missing(&self, _: &BTreeSet<String>) -> Result<(), Refusal> {
        Err(Refusal::NoSuchTarget {
            path: self.path.clone(),
        })
    }
}

impl Goal for TopLevel {
    type Target = Infallible;
    type Found = Infallible;

    const LIMIT: u64 = 0;
    const KEPT_AS: Option<&'static str> = None;

    fn wanted(&self) -> String {
        "nothing".to_owned()
    }

    fn leads(&self, _: &Delegated) -> bool {
        false
    }

    fn sought(&self, _: &Role) -> Result<Option<Infallible>, Refusal> {
        Ok(None)
    }

    fn file(target: &Infallible) -> Verified<Target> {
        match *target {}
    }

    fn accept(target: &Infallible, _: Vec<u8>) -> Result<Infallible, Refusal> {
        match *target {}
    }

    fn missing(&self, _: &BTreeSet<String>) -> Result<(), Refusal> {
        Ok(())
    }
}
