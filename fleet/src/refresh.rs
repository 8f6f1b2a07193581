//! Signs again what expires.
//!
//! A role is late in the last third of its lifetime. What follows from a new signature follows: a role's takes a snapshot, and a snapshot
//! takes a timestamp. A role whose keys are kept elsewhere is left as it is, and said.

use std::path::PathBuf;

use anyhow::Result;
use jiff::Timestamp as Time;
use offshoot::trust::schema::Version;
use serde::Serialize;

use crate::directory::Fleet;
use crate::prepared::{self, Done, Goal};
use crate::publication::{Draft, Publication, stem};
use crate::writer::Writer;

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Summary {
    pub signed: Vec<SignedRole>,
    /// What is to be signed elsewhere.
    pub prepared: Vec<PathBuf>,
    pub warnings: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct SignedRole {
    pub role: String,
    pub version: Version,
    #[serde(with = "offshoot::trust::schema::time")]
    pub expires: Time,
}

/// Without `force`, nothing is signed while nothing is late.
pub(crate) fn refresh(fleet: &Fleet, force: bool, now: Time) -> Result<Summary> {
    refresh_with(fleet, force, now, &Writer::new(&fleet.public()))
}

/// What is late and is signed elsewhere is prepared for that.
pub(crate) fn prepare(fleet: &Fleet, now: Time) -> Result<Summary> {
    let _lock = fleet.lock()?;
    let former = Publication::read(fleet)?;
    let mut draft = former.draft();
    for (role, _, expires) in former.roles() {
        let late = fleet.settings.lifetimes.of(&role).is_late(expires, now);
        if late && !is_ready(fleet, &former, &role)? {
            draft.change(&role);
        }
    }
    let prepared = if draft.changed().next().is_some() {
        let writer = Writer::new(&fleet.public());
        let done = Goal::Prepare.reach(fleet, draft, &writer, now, now)?;
        done.into_files()
    } else {
        Vec::new()
    };
    Ok(Summary {
        signed: Vec::new(),
        prepared,
        warnings: Vec::new(),
    })
}

fn refresh_with(fleet: &Fleet, force: bool, now: Time, writer: &Writer) -> Result<Summary> {
    let _lock = fleet.lock()?;
    let former = Publication::read(fleet)?;
    former.keep_root(fleet)?;
    let mut draft = former.draft();
    let mut warnings = Vec::new();
    let changed = renew(fleet, &former, &mut draft, now, &mut warnings)?;
    let lifetime = fleet.settings.lifetimes.timestamp;
    if !changed && !force && !lifetime.is_late(former.timestamp.expires, now) {
        return Ok(Summary {
            signed: Vec::new(),
            prepared: Vec::new(),
            warnings,
        });
    }
    writer.clear_parts()?;
    // Whatever else has expired is no reason to let the timestamp expire too.
    let done = Goal::Publish.reach(fleet, draft, writer, now, Time::UNIX_EPOCH)?;
    let signed = match done {
        Done::Published(publication) => renewed(&former, &publication),
        Done::Prepared(_) => Vec::new(),
    };
    Ok(Summary {
        signed,
        prepared: Vec::new(),
        warnings,
    })
}

/// What is signed now and was not before.
pub(crate) fn renewed(former: &Publication, publication: &Publication) -> Vec<SignedRole> {
    let before = former.roles();
    let signed = publication.roles().into_iter();
    let signed = signed.filter(|role| !before.contains(role));
    signed
        .map(|(role, version, expires)| SignedRole {
            role,
            version,
            expires,
        })
        .collect()
}

/// Whether enough of the role's keys can sign here.
fn is_ready(fleet: &Fleet, former: &Publication, role: &str) -> Result<bool> {
    let signers = former.signers(role)?;
    let held = fleet.keys().of(&stem(role)?, signers)?;
    let ready = held.iter().filter(|signer| signer.is_ready()).count();
    Ok(ready as u64 >= signers.threshold)
}

/// Marks what is late and can be signed here; the timestamp, which is signed anyway, is not marked.
pub(crate) fn renew(
    fleet: &Fleet,
    former: &Publication,
    draft: &mut Draft,
    now: Time,
    warnings: &mut Vec<String>,
) -> Result<bool> {
    let mut changed = false;
    for (role, _, expires) in former.roles() {
        let late = fleet.settings.lifetimes.of(&role).is_late(expires, now);
        if !late || role == "timestamp" || draft.changed().any(|changed| changed == role) {
            continue;
        }
        if prepared::holds(fleet, &role) {
            warnings.push(format!(
                "{role} expires at {expires}, and its next version waits for signatures: `offshoot-fleet complete` it"
            ));
        } else if is_ready(fleet, former, &role)? {
            draft.change(&role);
            changed = true;
        } else {
            warnings.push(format!(
                "{role} expires at {expires}, and its keys are not here, or have a passphrase that was not given: run `offshoot-fleet refresh` where {}.pem is, with --passphrase-file, or with --prepare",
                stem(&role)?
            ));
        }
    }
    Ok(changed)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::bench::{Bench, copy, days, now, seen};
    use crate::status::{WarningKind, status};

    fn roles(summary: &Summary) -> Vec<(&str, u64)> {
        let signed = summary.signed.iter();
        signed
            .map(|signed| (signed.role.as_str(), signed.version.number()))
            .collect()
    }

    #[test]
    fn a_role_is_signed_again_in_its_last_third_and_what_names_it_with_it() {
        let bench = Bench::new();
        for (day, force, want) in [
            (4, false, vec![]),
            (4, true, vec![("timestamp", 3)]),
            (5, false, vec![("timestamp", 3)]),
            (8, false, vec![("timestamp", 3)]),
            (21, false, vec![("timestamp", 3), ("snapshot", 3)]),
            (
                61,
                false,
                vec![("timestamp", 3), ("snapshot", 3), ("stable", 3)],
            ),
            (
                300,
                false,
                vec![
                    ("timestamp", 3),
                    ("snapshot", 3),
                    ("targets", 2),
                    ("stable", 3),
                ],
            ),
            (
                3649,
                false,
                vec![
                    ("root", 2),
                    ("timestamp", 4),
                    ("snapshot", 3),
                    ("targets", 2),
                    ("stable", 3),
                ],
            ),
        ] {
            let name = format!("{day}-{force}");
            let (fleet, now) = (bench.copy("fleet", &name), now(days(day)));
            let before = fs::read(fleet.metadata("timestamp.json")).unwrap();
            let summary = refresh(&fleet, force, now).unwrap();
            assert_eq!(roles(&summary), want, "day {day}");
            assert_eq!(summary.warnings, Vec::<String>::new());
            let after = fs::read(fleet.metadata("timestamp.json")).unwrap();
            assert_eq!(after == before, want.is_empty());
            let mut device = bench.device(&format!("device-{name}"));
            assert_eq!(seen(&mut device, &fleet.public(), now).unwrap(), "1.0.0");
        }
    }

    #[test]
    fn a_device_believes_the_former_signatures_or_the_new_ones_after_a_cut_at_any_write() {
        let bench = Bench::with_root_keys(3, 2);
        let settings = "hardware = [\"qemu-x86_64\"]\n[lifetimes]\n";
        let equal = ["root", "targets", "channel", "snapshot", "timestamp"]
            .map(|role| format!("{role} = \"90d\"\n"));
        fs::write(
            bench.path("fleet/fleet.toml"),
            settings.to_owned() + &equal.concat(),
        )
        .unwrap();
        let late = now(days(70));
        // What is signed for 90 days, and in its last third on the 70th.
        let fleet = bench.copy("fleet", "equal");
        let mut draft = Publication::read(&fleet).unwrap().draft();
        for role in ["root", "targets", "stable"] {
            draft.change(role);
        }
        let signed = draft
            .sign(&fleet.keys(), &fleet.settings.lifetimes, now(3), now(3))
            .unwrap();
        signed.write(&Writer::new(&fleet.public()), &fleet).unwrap();
        seen(&mut bench.device("held"), &fleet.public(), late).unwrap();
        let mut steps = 0;
        loop {
            let fleet = bench.copy("equal", &format!("cut-{steps}"));
            let writer = Writer::cut_after(&fleet.public(), steps);
            let done = refresh_with(&fleet, false, late, &writer).is_ok();
            copy(&bench.path("held"), &bench.path(&format!("held-{steps}")));
            for name in ["held", "fresh"] {
                let mut device = bench.device(&format!("{name}-{steps}"));
                assert_eq!(seen(&mut device, &fleet.public(), late).unwrap(), "1.0.0");
                refresh(&fleet, false, late).unwrap();
                assert_eq!(
                    seen(&mut device, &fleet.public(), now(days(150))).unwrap(),
                    "1.0.0"
                );
            }
            let [kept, published] = [fleet.root(), fleet.metadata("3.root.json")];
            assert!(
                fs::read(kept).unwrap() == fs::read(published).unwrap(),
                "after {steps} steps"
            );
            if done {
                break;
            }
            steps += 1;
        }
        assert_eq!(steps, 6 * 4);
    }

    #[test]
    fn a_role_whose_keys_are_elsewhere_is_left_and_said() {
        let bench = Bench::with_root_keys(3, 2);
        let fleet = bench.fleet();
        for stem in ["root-1", "root-2", "targets", "channel-stable"] {
            fs::remove_file(bench.path(&format!("fleet/keys/{stem}.pem"))).unwrap();
        }
        let summary = refresh(&fleet, false, now(days(3000))).unwrap();
        assert_eq!(roles(&summary), [("timestamp", 3), ("snapshot", 3)]);
        assert_eq!(summary.warnings.len(), 3);
        let kinds: Vec<_> = status(&fleet, now(days(3000))).unwrap().warnings;
        let kinds: Vec<_> = kinds.iter().map(|warning| warning.kind).collect();
        assert_eq!(
            kinds,
            [
                WarningKind::Late,
                WarningKind::Expired,
                WarningKind::Expired
            ]
        );
        fs::remove_file(bench.path("fleet/keys/timestamp.pem")).unwrap();
        refresh(&fleet, true, now(days(3000))).unwrap_err();
    }

    #[test]
    fn a_key_that_is_not_the_roles_signs_nothing() {
        let bench = Bench::new();
        let fleet = bench.fleet();
        let keys = bench.path("fleet/keys");
        fs::copy(keys.join("snapshot.pem"), keys.join("timestamp.pem")).unwrap();
        refresh(&fleet, true, now(2)).unwrap_err();
        // Neither does one key that is there twice.
        let bench = Bench::with_root_keys(2, 2);
        let keys = bench.path("fleet/keys");
        fs::copy(keys.join("root-1.pem"), keys.join("root-2.pem")).unwrap();
        let summary = refresh(&bench.fleet(), false, now(days(3000))).unwrap();
        assert_eq!(summary.warnings.len(), 1);
    }
}
