//! Signs again what expires.
//!
//! A role is late in the last third of its lifetime. What follows from a new signature follows: a role's takes a snapshot, and a snapshot
//! takes a timestamp. A role whose keys are kept elsewhere is left as it is, and said.

use anyhow::Result;
use jiff::Timestamp as Time;
use offshoot::trust::schema::Version;
use serde::Serialize;

use crate::directory::Fleet;
use crate::publication::{Draft, Publication};
use crate::writer::Writer;

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Summary {
    pub signed: Vec<SignedRole>,
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
    let _lock = fleet.lock()?;
    let former = Publication::read(fleet)?;
    let mut draft = former.draft();
    let mut warnings = Vec::new();
    let changed = renew(fleet, &former, &mut draft, now, &mut warnings)?;
    let lifetime = fleet.settings.lifetimes.timestamp;
    if !changed && !force && !lifetime.is_late(former.timestamp.expires, now) {
        return Ok(Summary {
            signed: Vec::new(),
            warnings,
        });
    }
    let writer = Writer::new(&fleet.public());
    writer.clear_parts()?;
    // Whatever else has expired is no reason to let the timestamp expire too.
    let signed = draft.sign(
        &fleet.keys(),
        &fleet.settings.lifetimes,
        now,
        Time::UNIX_EPOCH,
    )?;
    signed.write(&writer, fleet)?;
    let before = former.roles();
    let signed = signed.publication.roles().into_iter();
    let signed = signed.filter(|role| !before.contains(role));
    Ok(Summary {
        signed: signed
            .map(|(role, version, expires)| SignedRole {
                role,
                version,
                expires,
            })
            .collect(),
        warnings,
    })
}

/// Marks what is late and can be signed here; the timestamp, which is signed anyway, is not marked.
pub(crate) fn renew(
    fleet: &Fleet,
    former: &Publication,
    draft: &mut Draft,
    now: Time,
    warnings: &mut Vec<String>,
) -> Result<bool> {
    let keys = fleet.keys();
    let mut changed = false;
    for (role, _, expires) in former.roles() {
        let late = fleet.settings.lifetimes.of(&role).is_late(expires, now);
        if !late || role == "timestamp" {
            continue;
        }
        let (stem, signers) = former.signers(&role)?;
        if keys.of(&stem, &signers)?.len() as u64 >= signers.threshold {
            draft.change(&role);
            changed = true;
        } else {
            warnings.push(format!(
                "{role} expires at {expires}, and its keys are not here: run `offshoot-fleet refresh` where {stem}.pem is"
            ));
        }
    }
    Ok(changed)
}
