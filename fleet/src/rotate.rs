//! A key of a role is replaced by a new one.
//!
//! The keys of `root`, `timestamp`, `snapshot` and `targets` are named by the root, so a new root is published, signed by the keys of the
//! one before; a channel's key is named by the targets. Devices follow without a new image.
//!
//! **Across a power cut.** The new key is on the disk before anything names it. A cut leaves one that nothing names, and the same command
//! makes another. What [`crate::publication`] says of the rest holds.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp as Time;
use offshoot::trust::schema::{Key, RoleKeys};
use serde::Serialize;

use crate::directory::Fleet;
use crate::keys::Signer;
use crate::publication::{Draft, Publication, stem};
use crate::writer::Writer;

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Summary {
    pub role: String,
    /// The file of the new key.
    pub key: PathBuf,
    pub keyid: String,
    /// The key that signs no more.
    pub replaced: String,
}

/// `key` is an id, or the name of a file in `keys`.
pub(crate) fn rotate(fleet: &Fleet, role: &str, key: Option<&str>, now: Time) -> Result<Summary> {
    rotate_with(fleet, role, key, now, &Writer::new(&fleet.public()))
}

fn rotate_with(
    fleet: &Fleet,
    role: &str,
    key: Option<&str>,
    now: Time,
    writer: &Writer,
) -> Result<Summary> {
    let _lock = fleet.lock()?;
    let former = Publication::read(fleet)?;
    former.keep_root(fleet)?;
    let signers = former.signers(role)?;
    let held = fleet.keys().of(&stem(role)?, signers)?;
    let named = key.map(|key| {
        let file = held.iter().find(|signer| signer.name == key);
        file.map_or(key, |signer| signer.keyid.as_str())
    });
    let replaced = match (named, &signers.keyids[..]) {
        (None, [only]) => only,
        (named, all) => {
            let found = all.iter().find(|one| named == Some(one.as_str()));
            found.with_context(|| {
                format!("{role} has the keys {all:?}: name one of them, or its file, with --key")
            })?
        }
    };
    // Before a key is made in vain.
    let here = fleet
        .keys()
        .of(&stem("root")?, former.signers("root")?)?
        .len() as u64;
    let by_root = former.root.roles.contains_key(role);
    ensure!(
        !by_root || here >= former.signers("root")?.threshold,
        "the root names the keys of {role}, and {here} of the {} root keys that it takes to sign one are in {}",
        former.signers("root")?.threshold,
        fleet.keys().directory().display()
    );
    let stem = stem(role)?;
    let signer = fleet
        .keys()
        .generate_next(&stem, fleet.keys().kept_like(&stem)?)?;
    let mut draft = former.draft();
    if by_root {
        draft.change("root");
    } else {
        draft.change("targets");
    }
    if role != "root" && role != "timestamp" {
        draft.change(role);
    }
    replace(&mut draft, role, replaced, &signer)?;
    writer.clear_parts()?;
    let signed = draft.sign(&fleet.keys(), &fleet.settings.lifetimes, now, now)?;
    signed.write(writer, fleet)?;
    Ok(Summary {
        role: role.to_owned(),
        key: fleet.keys().path(&signer.name),
        keyid: signer.keyid,
        replaced: replaced.clone(),
    })
}

fn replace(draft: &mut Draft, role: &str, replaced: &str, signer: &Signer) -> Result<()> {
    let swap = |signers: &mut RoleKeys| {
        for keyid in &mut signers.keyids {
            if keyid == replaced {
                keyid.clone_from(&signer.keyid);
            }
        }
    };
    let add = |keys: &mut std::collections::BTreeMap<String, Key>, used: bool| {
        keys.insert(signer.keyid.clone(), signer.key.clone());
        if !used {
            keys.remove(replaced);
        }
    };
    let is_used = |signers: &RoleKeys| signers.keyids.iter().any(|keyid| keyid == replaced);
    if let Some(signers) = draft.root.roles.get_mut(role) {
        swap(signers);
        let used = draft.root.roles.values().any(is_used);
        add(&mut draft.root.keys, used);
        return Ok(());
    }
    let delegations = draft.targets.delegations.as_mut();
    let delegations = delegations.context("the targets delegate no channel")?;
    let mut roles = delegations.roles.iter_mut();
    let delegation = roles.find(|delegation| delegation.name == role);
    swap(
        &mut delegation
            .with_context(|| format!("there is no channel {role}"))?
            .signers,
    );
    let used = delegations
        .roles
        .iter()
        .any(|delegation| is_used(&delegation.signers));
    add(&mut delegations.keys, used);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::fs;
    use std::rc::Rc;

    use super::*;
    use crate::bench::{Bench, copy, now, request, seen};
    use crate::publish::{Request, publish};

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
                let done = rotate_with(&fleet, role, Some(&name), now(3), &writer).is_ok();
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
                    rotate(&fleet, role, Some(&gone), now(5)).unwrap();
                }
                // What is published then is signed by the new key alone.
                fs::remove_file(fleet.keys().path(&name)).unwrap();
                let bare = Request {
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
            rotate_with(&fleet, role, None, now(3), &writer).unwrap();
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
            let summary = rotate(&fleet, role, Some(&gone), now(second)).unwrap();
            assert_eq!(summary.replaced, gone);
            let publication = Publication::read(&fleet).unwrap();
            assert_eq!(publication.signers(role).unwrap().keyids[0], summary.keyid);
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
        rotate(&fleet, "root", None, now(2)).unwrap_err();
        rotate(&fleet, "root", Some("0"), now(2)).unwrap_err();
        rotate(&fleet, "nightly", None, now(2)).unwrap_err();
        fs::remove_file(bench.path("fleet/keys/root-1.pem")).unwrap();
        fs::remove_file(bench.path("fleet/keys/root-2.pem")).unwrap();
        rotate(&fleet, "timestamp", None, now(2)).unwrap_err();
        assert_eq!(count(), before - 2);
        // A channel's key is not the root's business.
        rotate(&fleet, "stable", None, now(2)).unwrap();
    }
}
