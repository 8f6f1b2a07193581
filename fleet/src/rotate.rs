//! The keys of a role, and how many of them it takes: one is replaced by a new one, joins, or goes.
//!
//! The keys of `root`, `timestamp`, `snapshot` and `targets` are named by the root, so a new root is published, signed by the keys of the
//! one before; a channel's key is named by the targets. Devices follow without a new image.
//!
//! **Across a power cut.** The new key is on the disk before anything names it. A cut leaves one that nothing names, and the same command
//! makes another. What [`crate::publication`] says of the rest holds.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail, ensure};
use jiff::Timestamp as Time;
use offshoot::trust::schema::{Key, RoleKeys};
use serde::Serialize;

use crate::directory::Fleet;
use crate::keys;
use crate::prepared::Goal;
use crate::publication::{Draft, Publication, stem};
use crate::writer::Writer;

/// What the operator asks for.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub role: String,
    pub change: Change,
    /// The public half of the new key, which is kept elsewhere; one is made if `None`.
    pub public: Option<PathBuf>,
    /// How many signatures it takes; as many as before if `None`.
    pub threshold: Option<u64>,
    pub goal: Goal,
}

/// A key is named by its id, or its file in `keys`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// The only key, if none is named.
    Replace(Option<String>),
    Add,
    Remove(String),
    /// Of the threshold alone.
    Keep,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Summary {
    pub role: String,
    /// The file of the new key, if it was made.
    pub key: Option<PathBuf>,
    /// The key that joins.
    pub keyid: Option<String>,
    /// The key that signs no more.
    pub replaced: Option<String>,
    pub keys: usize,
    pub threshold: u64,
    /// The files to sign; empty if it is published.
    pub prepared: Vec<PathBuf>,
}

pub(crate) fn rotate(fleet: &Fleet, request: &Request, now: Time) -> Result<Summary> {
    rotate_with(fleet, request, now, &Writer::new(&fleet.public()))
}

fn rotate_with(fleet: &Fleet, request: &Request, now: Time, writer: &Writer) -> Result<Summary> {
    let _lock = fleet.lock()?;
    let former = Publication::read(fleet)?;
    former.keep_root(fleet)?;
    let (role, keys) = (request.role.as_str(), fleet.keys());
    let (stem, signers) = (stem(role)?, former.signers(role)?);
    let leaves = leaves(fleet, request, &stem, signers)?;
    let mut draft = former.draft();
    let by_root = former.root.roles.contains_key(role);
    draft.change(if by_root { "root" } else { "targets" });
    // Before a key is made in vain.
    let given = Some(role).filter(|role| *role != "root");
    request.goal.check(fleet, &draft, given)?;
    if role != "root" && role != "timestamp" {
        draft.change(role);
    }
    let joins = match (&request.change, &request.public) {
        (Change::Remove(_) | Change::Keep, _) => None,
        (Change::Replace(_) | Change::Add, Some(path)) => {
            let key = keys::read_public(path)?;
            Some((key.keyid()?, key, None))
        }
        (Change::Replace(_) | Change::Add, None) => {
            let signer = keys.generate_next(&stem, keys.kept_like(&stem)?)?;
            let path = keys.path(&signer.name);
            Some((signer.keyid, signer.key, Some(path)))
        }
    };
    let joining = joins.as_ref().map(|(keyid, key, _)| (keyid, key));
    let signers = change(
        &mut draft,
        role,
        joining,
        leaves.as_ref(),
        request.threshold,
    )?;
    writer.clear_parts()?;
    let done = request.goal.reach(fleet, draft, writer, now, now)?;
    let (keyid, key) = joins.map(|(keyid, _, path)| (keyid, path)).unzip();
    Ok(Summary {
        role: role.to_owned(),
        key: key.flatten(),
        keyid,
        replaced: leaves,
        keys: signers.keyids.len(),
        threshold: signers.threshold,
        prepared: done.into_files(),
    })
}

/// The key that goes.
fn leaves(
    fleet: &Fleet,
    request: &Request,
    stem: &str,
    signers: &RoleKeys,
) -> Result<Option<String>> {
    let named = match &request.change {
        Change::Add | Change::Keep => return Ok(None),
        Change::Replace(named) => named.as_deref(),
        Change::Remove(named) => Some(named.as_str()),
    };
    let held = fleet.keys().of(stem, signers)?;
    let named = named.map(|key| {
        let file = held.iter().find(|signer| signer.name == key);
        file.map_or(key, |signer| signer.keyid.as_str())
    });
    match (named, &signers.keyids[..]) {
        (None, [only]) => Ok(Some(only.clone())),
        (named, all) => {
            let found = all.iter().find(|one| named == Some(one.as_str()));
            let found = found.with_context(|| {
                format!(
                    "{} has the keys {all:?}: name one of them, or its file, with --key",
                    request.role
                )
            })?;
            Ok(Some(found.clone()))
        }
    }
}

fn change(
    draft: &mut Draft,
    role: &str,
    joins: Option<(&String, &Key)>,
    leaves: Option<&String>,
    threshold: Option<u64>,
) -> Result<RoleKeys> {
    let change = |signers: &mut RoleKeys| -> Result<RoleKeys> {
        if let Some((keyid, _)) = joins {
            ensure!(
                !signers.keyids.contains(keyid),
                "{keyid} is a key of {role} already"
            );
        }
        let place = signers.keyids.iter().position(|one| Some(one) == leaves);
        match (place, joins) {
            (Some(place), Some((keyid, _))) => signers.keyids[place].clone_from(keyid),
            (Some(place), None) => drop(signers.keyids.remove(place)),
            (None, Some((keyid, _))) => signers.keyids.push(keyid.clone()),
            (None, None) => {}
        }
        signers.threshold = threshold.unwrap_or(signers.threshold);
        let keys = signers.keyids.len();
        ensure!(
            (1..=keys as u64).contains(&signers.threshold),
            "{role} would have {keys} keys and take the signatures of {}: --threshold is 1 to the number of keys",
            signers.threshold
        );
        Ok(signers.clone())
    };
    let place = |keys: &mut BTreeMap<String, Key>, used: bool| {
        if let Some((keyid, key)) = joins {
            keys.insert(keyid.clone(), key.clone());
        }
        if let Some(leaves) = leaves.filter(|_| !used) {
            keys.remove(leaves);
        }
    };
    let is_used = |signers: &RoleKeys| signers.keyids.iter().any(|keyid| Some(keyid) == leaves);
    if let Some(signers) = draft.root.roles.get_mut(role) {
        let signers = change(signers)?;
        let used = draft.root.roles.values().any(is_used);
        place(&mut draft.root.keys, used);
        return Ok(signers);
    }
    let Some(delegations) = draft.targets.delegations.as_mut() else {
        bail!("the targets delegate no channel");
    };
    let mut roles = delegations.roles.iter_mut();
    let delegation = roles.find(|delegation| delegation.name == role);
    let delegation = delegation.with_context(|| format!("there is no channel {role}"))?;
    let signers = change(&mut delegation.signers)?;
    let mut roles = delegations.roles.iter();
    let used = roles.any(|delegation| is_used(&delegation.signers));
    place(&mut delegations.keys, used);
    Ok(signers)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::fs;
    use std::rc::Rc;

    use super::*;
    use crate::bench::{Bench, copy, now, replacing, request, seen};
    use crate::publish::{self, publish};

    const ROLES: [&str; 5] = ["root", "timestamp", "snapshot", "targets", "stable"];

    /// The id and the file of a role's first key.
    fn first(fleet: &Fleet, role: &str) -> (String, String) {
        let publication = Publication::read(fleet).unwrap();
        let signers = publication.signers(role).unwrap();
        let held = fleet.keys().of(&stem(role).unwrap(), signers).unwrap();
        let held = held
            .into_iter()
            .find(|signer| signer.keyid == signers.keyids[0])
            .unwrap();
        (held.keyid, held.name)
    }

    #[test]
    fn devices_follow_a_rotation_that_is_cut_off_after_any_write() {
        let bench = Bench::with_root_keys(3, 2);
        seen(
            &mut bench.device("held"),
            &bench.path("fleet/public"),
            now(2),
        )
        .unwrap();
        for role in ROLES {
            let (gone, name) = first(&bench.fleet(), role);
            let mut steps = 0;
            loop {
                let fleet = bench.copy("fleet", &format!("{role}-{steps}"));
                let public = fleet.public();
                let writer = Writer::cut_after(&public, steps);
                let done =
                    rotate_with(&fleet, &replacing(role, Some(&name)), now(3), &writer).is_ok();
                let held = format!("held-{role}-{steps}");
                copy(&bench.path("held"), &bench.path(&held));
                let mut devices = [
                    bench.device(&held),
                    bench.device(&format!("fresh-{role}-{steps}")),
                ];
                for device in &mut devices {
                    assert_eq!(
                        seen(device, &public, now(4)).unwrap(),
                        "1.0.0",
                        "{role} {steps}"
                    );
                }
                if Publication::read(&fleet)
                    .unwrap()
                    .signers(role)
                    .unwrap()
                    .keyids[0]
                    == gone
                {
                    assert!(!done);
                    rotate(&fleet, &replacing(role, Some(&gone)), now(5)).unwrap();
                }
                // What is published then is signed by the new key alone.
                fs::remove_file(fleet.keys().path(&name)).unwrap();
                let bare = publish::Request {
                    deltas: Some(0),
                    full: false,
                    ..request("1.1.0")
                };
                publish(&fleet, &bare, now(6)).unwrap();
                for device in &mut devices {
                    assert_eq!(
                        seen(device, &public, now(7)).unwrap(),
                        "1.1.0",
                        "{role} {steps}"
                    );
                }
                if done {
                    break;
                }
                steps += 1;
            }
        }
    }

    #[test]
    fn a_device_that_polls_all_the_while_has_the_new_root_in_the_end() {
        let bench = Bench::new();
        for role in ROLES {
            let fleet = bench.copy("fleet", role);
            let device = RefCell::new(bench.device(&format!("device-{role}")));
            let public = fleet.public();
            let poll = move || {
                let mut device = device.borrow_mut();
                assert_eq!(
                    seen(&mut device, &public, now(4)).unwrap(),
                    "1.0.0",
                    "{role}"
                );
                device.root()
            };
            let poll = Rc::new(poll);
            let watch = Rc::clone(&poll);
            let writer = Writer::watched(&fleet.public(), move || {
                watch();
            });
            rotate_with(&fleet, &replacing(role, None), now(3), &writer).unwrap();
            let root = Publication::read(&fleet).unwrap().root.version.number();
            assert_eq!(
                (root, poll()),
                (if role == "stable" { 1 } else { 2 }, root),
                "{role}"
            );
        }
    }

    #[test]
    fn a_key_that_is_lost_or_was_stolen_signs_no_more() {
        let bench = Bench::with_root_keys(3, 2);
        for (second, role) in (3..).zip(ROLES) {
            let fleet = bench.fleet();
            let (gone, name) = first(&fleet, role);
            fs::remove_file(fleet.keys().path(&name)).unwrap();
            let summary = rotate(&fleet, &replacing(role, Some(&gone)), now(second)).unwrap();
            assert_eq!(summary.replaced.as_ref(), Some(&gone));
            let publication = Publication::read(&fleet).unwrap();
            assert_eq!(
                publication.signers(role).unwrap().keyids[0],
                summary.keyid.unwrap()
            );
            assert!(!publication.root.keys.contains_key(&gone));
            let delegations = publication.targets.delegations.as_ref().unwrap();
            assert!(!delegations.keys.contains_key(&gone));
        }
        let root = bench.fleet().metadata("5.root.json");
        assert!(fs::read(bench.fleet().root()).unwrap() == fs::read(root).unwrap());
        assert_eq!(
            seen(
                &mut bench.device("fresh"),
                &bench.path("fleet/public"),
                now(9)
            )
            .unwrap(),
            "1.0.0"
        );
    }

    #[test]
    fn what_cannot_be_rotated_makes_no_key() {
        let bench = Bench::with_root_keys(3, 2);
        let fleet = bench.fleet();
        let count = || fs::read_dir(bench.path("fleet/keys")).unwrap().count();
        let before = count();
        rotate(&fleet, &replacing("root", None), now(2)).unwrap_err();
        rotate(&fleet, &replacing("root", Some("0")), now(2)).unwrap_err();
        rotate(&fleet, &replacing("nightly", None), now(2)).unwrap_err();
        fs::remove_file(bench.path("fleet/keys/root-1.pem")).unwrap();
        fs::remove_file(bench.path("fleet/keys/root-2.pem")).unwrap();
        rotate(&fleet, &replacing("timestamp", None), now(2)).unwrap_err();
        assert_eq!(count(), before - 2);
        // A channel's key is not the root's business.
        rotate(&fleet, &replacing("stable", None), now(2)).unwrap();
    }
}
