//! The lowest versions, and the earliest time, that a device still believes.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp as Time;

use super::{Verified, signatures};
use crate::trust::schema::{Root, Snapshot, Timestamp};

/// The lowest versions that are still believed. They outlive the files that they were read from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Floors {
    pub root: u64,
    pub timestamp: u64,
    pub snapshot: u64,
    /// By file name, as a snapshot lists them.
    pub roles: BTreeMap<String, u64>,
    /// The latest `issued` of a verified timestamp.
    pub clock: Option<Time>,
    /// The keys that stood for the timestamp and the snapshot when these floors were set.
    pub keys: BTreeSet<String>,
}

impl Floors {
    /// 5.3.11: a key of the timestamp or the snapshot that stood when these floors were set stands no more. It was taken away for a
    /// reason, so the versions and the time that it may have signed bind nobody. A root older than the floors takes nothing away: it
    /// is what is left when the newer one was lost.
    pub fn fall_with(&self, root: &Verified<Root>) -> bool {
        root.version.number() >= self.root && !self.keys.is_subset(&online_keys(root))
    }

    /// What is left of them under this root.
    #[must_use]
    pub fn under(self, root: &Verified<Root>) -> Self {
        if !self.fall_with(root) {
            return self;
        }
        Self {
            root: self.root,
            ..Self::default()
        }
    }

    /// The floors that these documents set, where they are higher.
    #[must_use]
    pub fn raised_by(
        self,
        root: &Verified<Root>,
        timestamp: Option<&Verified<Timestamp>>,
        snapshot: Option<&Verified<Snapshot>>,
    ) -> Self {
        let mut floors = self.under(root);
        // Not of a root that stands in for one that was lost: the newer one may have taken its keys away.
        if root.version.number() >= floors.root {
            floors.root = root.version.number();
            floors.keys.extend(online_keys(root));
        }
        if let Some(timestamp) = timestamp {
            floors.timestamp = floors.timestamp.max(timestamp.version.number());
            floors.clock = floors.clock.max(timestamp.issued);
            if let Some(announced) = timestamp.meta.get("snapshot.json") {
                floors.snapshot = floors.snapshot.max(announced.version.number());
            }
        }
        for (file, listed) in snapshot.iter().flat_map(|snapshot| &snapshot.meta) {
            let floor = floors.roles.entry(file.clone()).or_default();
            *floor = listed.version.number().max(*floor);
        }
        floors
    }
}

/// The keys whose theft 5.3.11 recovers from.
pub(super) fn online_keys(root: &Root) -> BTreeSet<String> {
    let roles = ["timestamp", "snapshot"]
        .iter()
        .filter_map(|role| Some((role, root.roles.get(*role)?)));
    roles
        .flat_map(|(role, signers)| {
            signers
                .keyids
                .iter()
                .filter_map(|keyid| root.keys.get(keyid))
                .map(move |key| (role, key))
        })
        .map(|(role, key)| format!("{role} {}", signatures::identity(key)))
        .collect()
}
