//! Signing that is split over people and machines.
//!
//! A verb with `--prepare` leaves in `prepared/` the metadata that people sign: `root.json`, `targets.json`, `<channel>.json`, each an
//! envelope of TUF with a place for every key that may sign, empty until it has (`"sig": ""`). [`sign`] fills the places of the keys
//! that it has, on any machine. [`complete`] collects the signatures, signs snapshot and timestamp, and publishes.
//!
//! **Across a power cut.** `prepared/` gets its name when it is whole, and a file in it is replaced whole. It goes after what it holds is
//! published, and what is published already is not published again: the same command completes it.
//!
//! One change is prepared at a time. Others may be published meanwhile, of other roles.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use jiff::Timestamp as Time;
use offshoot::trust::schema::{Envelope, RoleKeys, RoleName, Root, Targets, Version, time};
use serde::Serialize;
use serde_json::Value;

use crate::directory::Fleet;
use crate::keys::Keys;
use crate::publication::{Below, Draft, Publication, releases, stem};
use crate::refresh;
use crate::writer::{Writer, parent};

const DIRECTORY: &str = "prepared";
const PART: &str = ".prepared.part";

/// What becomes of a draft.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Goal {
    Publish,
    /// People sign first.
    Prepare,
}

#[derive(Clone, Debug)]
pub(crate) enum Done {
    Published(Box<Publication>),
    /// The files to sign.
    Prepared(Vec<PathBuf>),
}

impl Done {
    /// Of what was prepared.
    pub(crate) fn into_files(self) -> Vec<PathBuf> {
        match self {
            Self::Published(_) => Vec::new(),
            Self::Prepared(files) => files,
        }
    }
}

impl Goal {
    pub(crate) const fn of(prepare: bool) -> Self {
        if prepare {
            Self::Prepare
        } else {
            Self::Publish
        }
    }

    /// Refuses what [`Goal::reach`] would, before anything is done in vain; `except` is a role that is given new keys yet.
    pub(crate) fn check(self, fleet: &Fleet, draft: &Draft, except: Option<&str>) -> Result<()> {
        let path = fleet.directory.join(DIRECTORY);
        match self {
            Self::Prepare => {
                ensure!(
                    !path.exists(),
                    "{} holds a change that waits for signatures: `offshoot-fleet complete` it, or remove the directory to give it up",
                    path.display()
                );
                Ok(())
            }
            Self::Publish => {
                for role in draft.changed() {
                    ensure!(
                        !holds(fleet, role),
                        "{}/{role}.json waits for signatures, and would be outdated: `offshoot-fleet complete` it, or remove the directory to give it up",
                        path.display()
                    );
                }
                draft.check(&fleet.keys(), except)
            }
        }
    }

    /// `at` is when a device must believe it.
    pub(crate) fn reach(
        self,
        fleet: &Fleet,
        draft: Draft,
        writer: &Writer,
        now: Time,
        at: Time,
    ) -> Result<Done> {
        self.check(fleet, &draft, None)?;
        let (keys, lifetimes) = (fleet.keys(), &fleet.settings.lifetimes);
        if self == Self::Publish {
            let signed = draft.sign(&keys, lifetimes, now, at)?;
            signed.write(writer, fleet)?;
            return Ok(Done::Published(Box::new(signed.publication)));
        }
        let files = draft.prepare(&keys, lifetimes, now)?;
        let (part, whole) = (fleet.directory.join(PART), fleet.directory.join(DIRECTORY));
        if part.exists() {
            fs::remove_dir_all(&part).with_context(|| format!("removing {}", part.display()))?;
        }
        let directory = Writer::new(&part);
        let mut paths = Vec::new();
        for (role, envelope) in files {
            let name = format!("{role}.json");
            directory.write(&name, &envelope.to_bytes()?)?;
            paths.push(whole.join(name));
        }
        writer.name(&part, &whole)?;
        Ok(Done::Prepared(paths))
    }
}

/// Whether this role's file waits for signatures.
pub(crate) fn holds(fleet: &Fleet, role: &str) -> bool {
    let path = fleet.directory.join(DIRECTORY);
    path.join(format!("{role}.json")).exists()
}

/// What is prepared, on top of what is published; `None` if nothing is. What is published already is left out.
pub(crate) fn draft(fleet: &Fleet, former: &Publication) -> Result<Option<Draft>> {
    let Some(files) = read(fleet)? else {
        return Ok(None);
    };
    let mut draft = former.draft();
    for (role, envelope) in files {
        draft.take(&role, envelope)?;
    }
    draft.follow_keys();
    Ok(Some(draft))
}

/// How far it is.
pub(crate) fn progress(fleet: &Fleet, former: &Publication) -> Result<Vec<Below>> {
    match draft(fleet, former)? {
        Some(draft) => draft.progress(&fleet.keys()),
        None => Ok(Vec::new()),
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Completed {
    pub signed: Vec<refresh::SignedRole>,
    pub warnings: Vec<String>,
}

/// Publishes what is prepared, with the signatures that `files` bring.
pub(crate) fn complete(fleet: &Fleet, files: &[PathBuf], now: Time) -> Result<Completed> {
    complete_with(fleet, files, now, &Writer::new(&fleet.public()))
}

fn complete_with(
    fleet: &Fleet,
    files: &[PathBuf],
    now: Time,
    writer: &Writer,
) -> Result<Completed> {
    let _lock = fleet.lock()?;
    let former = Publication::read(fleet)?;
    former.keep_root(fleet)?;
    let directory = fleet.directory.join(DIRECTORY);
    collect(fleet, files)?;
    let mut draft = draft(fleet, &former)?.with_context(|| {
        format!(
            "nothing is prepared, there is no {}: name the verb with --prepare first",
            directory.display()
        )
    })?;
    let mut done = Completed {
        signed: Vec::new(),
        warnings: Vec::new(),
    };
    if draft.changed().next().is_some() {
        refresh::renew(fleet, &former, &mut draft, now, &mut done.warnings)?;
        draft.check_prepared(&fleet.keys())?;
        writer.clear_parts()?;
        let signed = draft.sign(&fleet.keys(), &fleet.settings.lifetimes, now, now)?;
        signed.write(writer, fleet)?;
        done.signed = refresh::renewed(&former, &signed.publication);
    }
    writer.discard(&directory)?;
    Ok(done)
}

/// Adds the signatures in files that others have signed to those that are here.
fn collect(fleet: &Fleet, files: &[PathBuf]) -> Result<()> {
    let mut prepared = read(fleet)?.unwrap_or_default();
    for path in files {
        let (role, signed) = open(path)?;
        let own = prepared
            .get_mut(&role)
            .filter(|own| own.signed == signed.signed);
        let own = own.with_context(|| {
            format!(
                "{} is not what was prepared as {role}.json: sign the file in {}",
                path.display(),
                fleet.directory.join(DIRECTORY).display()
            )
        })?;
        for signature in signed.signatures {
            let place = own.signatures.iter_mut();
            let mut place = place.filter(|place| place.keyid == signature.keyid);
            if let Some(place) = place.next()
                && !signature.sig.is_empty()
            {
                place.sig = signature.sig;
            }
        }
        Writer::new(&fleet.directory.join(DIRECTORY))
            .write(&format!("{role}.json"), &own.to_bytes()?)?;
    }
    Ok(())
}

fn read(fleet: &Fleet) -> Result<Option<BTreeMap<String, Envelope>>> {
    let directory = fleet.directory.join(DIRECTORY);
    if !directory.exists() {
        return Ok(None);
    }
    let reading = || format!("reading {}", directory.display());
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(&directory).with_context(reading)? {
        let path = entry.with_context(reading)?.path();
        if path.extension().is_some_and(|end| end == "json") {
            let (role, envelope) = open(&path)?;
            files.insert(role, envelope);
        }
    }
    Ok(Some(files))
}

/// The role, which is the file's name, and what is in it.
fn open(path: &Path) -> Result<(String, Envelope)> {
    let role = path.file_name().and_then(|name| name.to_str());
    let role = role.and_then(|name| name.strip_suffix(".json"));
    let role = role.with_context(|| {
        format!(
            "{} is not named like the role that it is for: root.json, targets.json, or CHANNEL.json",
            path.display()
        )
    })?;
    let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    let envelope =
        Envelope::parse(role, &bytes).with_context(|| format!("reading {}", path.display()))?;
    let kind = envelope.signed.get("_type").and_then(Value::as_str);
    let wanted = match role {
        "root" => "root",
        "snapshot" | "timestamp" => bail!(
            "{}: {role} is not signed by hand, `offshoot-fleet complete` does it",
            path.display()
        ),
        _targets => "targets",
    };
    ensure!(
        kind == Some(wanted),
        "{} holds metadata of the type {}, and its name says {wanted}: do not sign it",
        path.display(),
        kind.unwrap_or("that it does not say")
    );
    Ok((role.to_owned(), envelope))
}

/// A file that people sign, and what they sign there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Sheet {
    pub file: PathBuf,
    pub role: String,
    pub version: Version,
    #[serde(with = "time")]
    pub expires: Time,
    pub content: Content,
    /// The keys that signed now.
    pub by: Vec<String>,
    /// The keys that may sign and have not.
    pub missing: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Content {
    /// Who signs for each role.
    Roles(BTreeMap<String, RoleKeys>),
    /// Of a channel: hardware, version, serial and commit, the newest last.
    Releases(Vec<Release>),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Release {
    pub hardware: String,
    pub version: String,
    pub serial: u64,
    pub commit: String,
}

/// Signs with the keys that are here and may; or only tells.
pub(crate) fn sign(keys: &Keys, path: &Path, only_tell: bool) -> Result<Sheet> {
    let (role, mut envelope) = open(path)?;
    let places = envelope.signatures.iter();
    let wanted = RoleKeys {
        keyids: places.map(|place| place.keyid.clone()).collect(),
        threshold: 1,
    };
    let mut sheet = sheet(path, role, &envelope)?;
    if !only_tell {
        let stem = stem(&sheet.role)?;
        let held = keys.of(&stem, &wanted)?;
        ensure!(
            !held.is_empty(),
            "{} has none of the keys that may sign {}, {}: their files are named {stem}.pem, {stem}-2.pem and so on",
            keys.directory().display(),
            path.display(),
            wanted.keyids.join(", ")
        );
        let message = envelope.sign_bytes()?;
        for signer in held {
            let mut places = envelope.signatures.iter_mut();
            let place = places.find(|place| place.keyid == signer.keyid);
            if let Some(place) = place.filter(|place| place.sig.is_empty()) {
                place.sig = signer.sign(&message)?.sig;
                sheet.by.push(signer.keyid);
            }
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if !sheet.by.is_empty() {
            Writer::new(parent(path)).write(&name, &envelope.to_bytes()?)?;
        }
    }
    let empty = envelope.signatures.iter();
    let empty = empty.filter(|place| place.sig.is_empty());
    sheet.missing = empty.map(|place| place.keyid.clone()).collect();
    Ok(sheet)
}

fn sheet(path: &Path, role: String, envelope: &Envelope) -> Result<Sheet> {
    let reading = || format!("reading {}", path.display());
    let signed = envelope.signed.clone();
    let (version, expires, content) = if role == "root" {
        let root: Root = serde_json::from_value(signed).with_context(reading)?;
        (root.version, root.expires, Content::Roles(root.roles))
    } else {
        let targets: Targets = serde_json::from_value(signed).with_context(reading)?;
        let content = if let Some(delegations) = &targets.delegations {
            let roles = delegations.roles.iter();
            let roles = roles.map(|role| (role.name.clone(), role.signers.clone()));
            Content::Roles(roles.collect())
        } else {
            let channel: RoleName = role.parse().with_context(reading)?;
            let releases = releases(&channel, &targets)?.into_iter();
            let releases = releases.map(|release| Release {
                hardware: release.hardware.to_string(),
                version: release.version.to_string(),
                serial: release.serial,
                commit: release.commit.to_string(),
            });
            Content::Releases(releases.collect())
        };
        (targets.version, targets.expires, content)
    };
    Ok(Sheet {
        file: path.to_owned(),
        role,
        version,
        expires,
        content,
        by: Vec::new(),
        missing: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{Bench, copy, now, replacing, request, seen};
    use crate::publish::{self, publish};
    use crate::rotate::{self, rotate};

    /// Moves the keys of a role to another machine.
    fn take_away(fleet: &Fleet, stem: &str) -> Keys {
        let elsewhere = fleet.directory.join("elsewhere");
        fs::create_dir_all(&elsewhere).unwrap();
        for path in fleet.keys().files(stem).unwrap() {
            fs::rename(&path, elsewhere.join(path.file_name().unwrap())).unwrap();
        }
        Keys::new(elsewhere, crate::keys::passphrase::Passphrases::default())
    }

    fn preparing(role: &str) -> rotate::Request {
        rotate::Request {
            goal: Goal::Prepare,
            ..replacing(role, None)
        }
    }

    #[test]
    fn devices_see_the_former_publication_or_the_next_after_a_cut_at_any_write() {
        let bench = Bench::with_root_keys(1, 1);
        for (role, steps_of) in [
            ("root", 3 * 4),
            ("snapshot", 4 * 4),
            ("targets", 5 * 4),
            ("stable", 4 * 4),
        ] {
            let fleet = bench.copy("fleet", role);
            let elsewhere = take_away(&fleet, "root");
            let targets = take_away(&fleet, "targets");
            rotate(&fleet, &preparing(role), now(2)).unwrap();
            let directory = fleet.directory.join(DIRECTORY);
            for path in fs::read_dir(&directory).unwrap() {
                let path = path.unwrap().path();
                let keys = if path.ends_with("root.json") {
                    &elsewhere
                } else {
                    &targets
                };
                if !path.ends_with("stable.json") {
                    assert_eq!(sign(keys, &path, false).unwrap().by.len(), 1, "{path:?}");
                }
            }
            let mut steps = 0;
            loop {
                let fleet = bench.copy(role, &format!("{role}-{steps}"));
                let public = fleet.public();
                let mut device = bench.device(&format!("device-{role}-{steps}"));
                seen(&mut device, &bench.path("fleet/public"), now(2)).unwrap();
                let writer = Writer::cut_after(&public, steps);
                let done = complete_with(&fleet, &[], now(3), &writer).is_ok();
                assert_eq!(seen(&mut device, &public, now(4)).unwrap(), "1.0.0");
                if done {
                    break;
                }
                complete(&fleet, &[], now(5)).unwrap();
                assert!(!fleet.directory.join(DIRECTORY).exists());
                assert_eq!(seen(&mut device, &public, now(6)).unwrap(), "1.0.0");
                let (new, old) = [&fleet, &bench.fleet()]
                    .map(|fleet| Publication::read(fleet).unwrap())
                    .into();
                assert_ne!(
                    new.signers(role).unwrap(),
                    old.signers(role).unwrap(),
                    "{role} {steps}"
                );
                steps += 1;
            }
            assert_eq!(steps, steps_of + 1, "{role}");
        }
    }

    #[test]
    fn what_is_prepared_is_there_whole_or_not_at_all() {
        let bench = Bench::new();
        let prepare = publish::Request {
            prepare: true,
            deltas: Some(0),
            full: false,
            ..request("1.1.0")
        };
        let mut steps = 0;
        loop {
            let fleet = bench.copy("fleet", &format!("cut-{steps}"));
            let writer = Writer::cut_after(&fleet.public(), steps);
            let done = publish::publish_with(&fleet, &prepare, now(2), &writer).is_ok();
            let mut device = bench.device(&format!("device-{steps}"));
            assert_eq!(seen(&mut device, &fleet.public(), now(3)).unwrap(), "1.0.0");
            let former = Publication::read(&fleet).unwrap();
            if draft(&fleet, &former).unwrap().is_none() {
                publish(&fleet, &prepare, now(4)).unwrap();
            }
            complete(&fleet, &[], now(5)).unwrap();
            assert_eq!(seen(&mut device, &fleet.public(), now(6)).unwrap(), "1.1.0");
            if done {
                break;
            }
            steps += 1;
        }
    }

    #[test]
    fn what_is_published_meanwhile_does_not_outdate_what_is_prepared_of_another_role() {
        let bench = Bench::new();
        let fleet = bench.fleet();
        rotate(&fleet, &preparing("timestamp"), now(2)).unwrap();
        publish(&fleet, &request("1.1.0"), now(3)).unwrap();
        refresh::refresh(&fleet, true, now(4)).unwrap();
        // A second change, one of the same role, and what removes files, wait.
        rotate(&fleet, &preparing("stable"), now(5)).unwrap_err();
        rotate(&fleet, &replacing("snapshot", None), now(5)).unwrap_err();
        crate::prune::prune(&fleet, 1, Goal::Publish, now(5)).unwrap_err();
        copy(&bench.path("fleet/prepared"), &bench.path("former"));
        let completed = complete(&fleet, &[], now(6)).unwrap();
        let roles: Vec<_> = completed.signed.iter().map(|role| &role.role).collect();
        assert_eq!(roles, ["root", "timestamp"]);
        complete(&fleet, &[], now(7)).unwrap_err();
        // What is published already is done.
        copy(&bench.path("former"), &bench.path("fleet/prepared"));
        assert_eq!(complete(&fleet, &[], now(8)).unwrap().signed, []);
        // Another root since.
        rotate(&fleet, &replacing("root", None), now(9)).unwrap();
        copy(&bench.path("former"), &bench.path("fleet/prepared"));
        let status = crate::status::status(&fleet, now(9)).unwrap();
        let kinds: Vec<_> = status.warnings.iter().map(|warning| warning.kind).collect();
        assert_eq!(kinds, [crate::status::WarningKind::PreparedOutdated]);
        complete(&fleet, &[], now(9)).unwrap_err();
        let mut device = bench.device("device");
        assert_eq!(seen(&mut device, &fleet.public(), now(9)).unwrap(), "1.1.0");
    }
}
