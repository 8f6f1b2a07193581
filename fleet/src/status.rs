//! What is published, until when it is believed, and what is wrong with it. Reads only, without the lock.
//!
//! Files are looked at by their length, not their digest.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use anyhow::{Context as _, Result};
use jiff::Timestamp as Time;
use offshoot::commit::Commit;
use offshoot::trust::schema::{HardwareId, ReleaseVersion, RoleName, Version, time};
use serde::Serialize;

use crate::directory::Fleet;
use crate::keys::{self, Kept, Signer};
use crate::publication::{Below, Publication, Release, releases, stem};
use crate::publish::{self, DeltaSummary};
use crate::{content, objects, prepared};

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Status {
    pub roles: Vec<Role>,
    pub channels: BTreeMap<RoleName, BTreeMap<HardwareId, Vec<ReleaseStatus>>>,
    /// What waits for signatures.
    pub prepared: Vec<Below>,
    pub warnings: Vec<Warning>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Role {
    pub role: String,
    pub version: Version,
    #[serde(with = "time")]
    pub expires: Time,
    /// `refresh` would sign it again.
    pub late: bool,
    pub keys: Vec<RoleKey>,
    /// How many of them it takes.
    pub threshold: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct RoleKey {
    pub keyid: String,
    /// The name of its file in `keys`, if it is here.
    pub file: Option<String>,
    pub kept: Option<Kept>,
}

/// Newest first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct ReleaseStatus {
    pub version: ReleaseVersion,
    pub serial: u64,
    pub commit: Commit,
    pub deltas: Vec<DeltaSummary>,
    pub objects: Option<objects::Summary>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Warning {
    pub kind: WarningKind,
    pub text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum WarningKind {
    /// Devices refuse it.
    Expired,
    /// Its last third has begun.
    Late,
    /// A private key may be read by others.
    KeyReadable,
    /// A file that a release names is not there, or has another length.
    FileDamaged,
    /// No device can download the newest release.
    NoWay,
    /// What is prepared cannot be published any more.
    PreparedOutdated,
    /// The next release cannot have a delta from the newest one.
    CommitMissing,
}

pub(crate) fn status(fleet: &Fleet, now: Time) -> Result<Status> {
    let publication = Publication::read(fleet)?;
    let mut warnings = Vec::new();
    let mut roles = Vec::new();
    for (role, version, expires) in publication.roles() {
        let (stem, signers) = (stem(&role)?, publication.signers(&role)?);
        let held = fleet.keys().of(&stem, signers)?;
        let keys = signers.keyids.iter().map(|keyid| {
            let here = held.iter().find(|signer| signer.keyid == *keyid);
            RoleKey {
                keyid: keyid.clone(),
                file: here.map(|signer| signer.name.clone()),
                kept: here.map(Signer::kept),
            }
        });
        let late = fleet.settings.lifetimes.of(&role).is_late(expires, now);
        let remedy = if held.len() as u64 >= signers.threshold {
            "run `offshoot-fleet refresh`".to_owned()
        } else {
            format!(
                "run `offshoot-fleet refresh` where {stem}.pem is, or with --prepare here and `offshoot-fleet sign` there"
            )
        };
        if expires <= now {
            let text = format!("{role} expired at {expires}, devices refuse it: {remedy}");
            warnings.push(WarningKind::Expired.with(text));
        } else if late {
            let text = format!("{role} expires at {expires}: {remedy}");
            warnings.push(WarningKind::Late.with(text));
        }
        roles.push(Role {
            role,
            version,
            expires,
            late,
            keys: keys.collect(),
            threshold: signers.threshold,
        });
    }
    let prepared = prepared::progress(fleet, &publication).unwrap_or_else(|error| {
        warnings.push(WarningKind::PreparedOutdated.with(format!("{error:#}")));
        Vec::new()
    });
    keys_of_others(fleet, &publication, &mut warnings)?;
    let repo = publish::open_repo(&fleet.repo())?;
    let mut channels = BTreeMap::new();
    let mut seen = BTreeSet::new();
    for (name, document) in &publication.channels {
        let mut by_hardware: BTreeMap<HardwareId, Vec<ReleaseStatus>> = BTreeMap::new();
        for release in releases(name, document)? {
            let (deltas, objects) = contents(fleet, name, &release, &mut seen, &mut warnings)?;
            by_hardware
                .entry(release.hardware.clone())
                .or_default()
                .insert(
                    0,
                    ReleaseStatus {
                        version: release.version,
                        serial: release.serial,
                        commit: release.commit,
                        deltas,
                        objects,
                    },
                );
        }
        for (hardware, releases) in &by_hardware {
            let Some(newest) = releases.first() else {
                continue;
            };
            let named = format!("{} of {name} for {hardware}", newest.version);
            if newest.deltas.is_empty() && newest.objects.is_none() && releases.len() > 1 {
                let text = format!(
                    "{named} has no delta and no objects, so no device can download it: publish the next release with one of them"
                );
                warnings.push(WarningKind::NoWay.with(text));
            }
            if !publish::is_complete(&repo, newest.commit)? {
                let text = format!(
                    "the commit {} of {named} is not in {}: the next release will have no delta from it, pull it again",
                    newest.commit,
                    fleet.repo().display()
                );
                warnings.push(WarningKind::CommitMissing.with(text));
            }
        }
        channels.insert(name.clone(), by_hardware);
    }
    Ok(Status {
        roles,
        channels,
        prepared,
        warnings,
    })
}

fn keys_of_others(
    fleet: &Fleet,
    publication: &Publication,
    warnings: &mut Vec<Warning>,
) -> Result<()> {
    let channels = publication.channels.keys().map(keys::of_channel);
    let roles = ["root", "timestamp", "snapshot", "targets"].map(str::to_owned);
    for stem in roles.into_iter().chain(channels) {
        for path in fleet.keys().files(&stem)? {
            let meta =
                fs::metadata(&path).with_context(|| format!("reading {}", path.display()))?;
            let mode = meta.permissions().mode() & 0o777;
            if mode & 0o077 != 0 {
                let path = path.display();
                let text =
                    format!("{path} has mode {mode:o}, others may read it: chmod 600 {path}");
                warnings.push(WarningKind::KeyReadable.with(text));
            }
        }
    }
    Ok(())
}

/// What cannot be read is a warning, like every file that is not there.
fn contents(
    fleet: &Fleet,
    channel: &RoleName,
    release: &Release,
    seen: &mut BTreeSet<String>,
    warnings: &mut Vec<Warning>,
) -> Result<(Vec<DeltaSummary>, Option<objects::Summary>)> {
    let contents = match content::of_release(&fleet.public(), channel, release) {
        Ok(contents) => contents,
        Err(error) => {
            let text = format!(
                "{error:#}: devices cannot update to {}, put it back from a backup",
                release.version
            );
            warnings.push(WarningKind::FileDamaged.with(text));
            return Ok((Vec::new(), None));
        }
    };
    let entry = content::of_entry(channel, release);
    for (path, want) in entry.into_iter().chain(contents.files()) {
        // Many releases name the same delta, and the same object.
        if !seen.insert(path.clone()) {
            continue;
        }
        let path = fleet.public().join(path);
        let found = fs::metadata(&path).map(|meta| meta.len());
        if !matches!(found, Ok(length) if length == want.length) {
            let found = found.map_or_else(
                |error| error.to_string(),
                |length| format!("{length} bytes"),
            );
            let text = format!(
                "{} of {}: {found} instead of {}; put it back from a backup",
                path.display(),
                release.version,
                want.length
            );
            warnings.push(WarningKind::FileDamaged.with(text));
        }
    }
    let deltas = contents.manifest.deltas.iter().map(DeltaSummary::of);
    let objects = contents.objects.as_deref().map(objects::Summary::of);
    Ok((deltas.collect::<Result<_>>()?, objects))
}

impl WarningKind {
    fn with(self, text: String) -> Warning {
        Warning { kind: self, text }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (channel, by_hardware) in &self.channels {
            writeln!(
                f,
                "{channel}{}",
                if by_hardware.is_empty() {
                    ": no releases"
                } else {
                    ""
                }
            )?;
            for (hardware, releases) in by_hardware {
                writeln!(f, "  {hardware}")?;
                for release in releases {
                    let ReleaseStatus {
                        version,
                        serial,
                        commit,
                        deltas,
                        objects,
                    } = release;
                    writeln!(f, "    {serial:>4}  {version:<12}  {commit}")?;
                    for delta in deltas.iter().filter(|delta| delta.to.is_none()) {
                        let from = delta.from.map_or("nothing".to_owned(), |from| {
                            let held = releases.iter().find(|release| release.commit == from);
                            held.map_or(from.to_string(), |held| held.version.to_string())
                        });
                        writeln!(
                            f,
                            "          from {from}: {} bytes, {} unpacked",
                            delta.download, delta.usize
                        )?;
                    }
                    if let Some(objects) = objects {
                        writeln!(
                            f,
                            "          objects: {} of {} bytes, {} unpacked",
                            objects.count, objects.download, objects.usize
                        )?;
                    }
                }
            }
        }
        for role in &self.roles {
            let Role {
                role,
                version,
                expires,
                keys,
                threshold,
                ..
            } = role;
            let here = keys.iter().filter(|key| key.file.is_some()).count();
            let elsewhere = if (here as u64) < *threshold {
                ", keys elsewhere"
            } else {
                ""
            };
            writeln!(f, "{role:<12} {version:>5}  until {expires}{elsewhere}")?;
        }
        for Below {
            role,
            have,
            need,
            missing,
            ..
        } in &self.prepared
        {
            let missing = missing.join(", ");
            writeln!(
                f,
                "prepared/{role}.json has {have} of {need} signatures; may sign: {missing}"
            )?;
        }
        for warning in &self.warnings {
            writeln!(f, "warning: {}", warning.text)?;
        }
        Ok(())
    }
}
