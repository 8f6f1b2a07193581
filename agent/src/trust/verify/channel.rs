//! A channel: a role to which the top-level targets delegate, and the entries that it signs for each hardware.
//!
//! Does not follow delegations below the channel: a channel is found by its name.

use serde_json::Value;

use super::{Role, Target, Verified, mixed_up, same};
use crate::commit::{Commit, Sha256};
use crate::trust::Refusal;
use crate::trust::schema::{
    Custom, Digested, FORMAT, HardwareId, ReleaseVersion, RoleName, TargetFile, TargetPath,
    from_value,
};

/// A channel's role: the only way to an [`Entry`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Channel {
    name: RoleName,
    role: Role,
}

/// What a channel says of one release for one hardware.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub channel: RoleName,
    pub hardware: HardwareId,
    /// The target that is the commit object.
    pub path: TargetPath,
    pub commit: Commit,
    /// Bytes of the commit object.
    pub length: u64,
    pub version: ReleaseVersion,
    pub serial: u64,
    pub manifest: Digested,
}

impl Channel {
    pub(in crate::trust) fn new(name: RoleName, role: Role) -> Self {
        Self { name, role }
    }

    /// The entry for `hardware` with the greatest serial. Entries of a format that this code does not know are not for it.
    pub fn newest(&self, hardware: &HardwareId) -> Result<Option<Verified<Entry>>, Refusal> {
        let mut newest: Option<Entry> = None;
        for entry in self.entries(hardware) {
            let entry = entry?;
            match &newest {
                Some(held) if held.serial > entry.serial => {}
                Some(held) if held.serial == entry.serial => {
                    return Err(Refusal::AmbiguousSerial {
                        path: held.path.to_string(),
                        other: entry.path.to_string(),
                        serial: entry.serial,
                    });
                }
                _ => newest = Some(entry),
            }
        }
        Ok(newest.map(Verified))
    }

    /// The entry for `hardware` that is `commit`; the one with the greatest serial if it was released again.
    pub fn find(
        &self,
        hardware: &HardwareId,
        commit: Commit,
    ) -> Result<Option<Verified<Entry>>, Refusal> {
        let mut found: Option<Entry> = None;
        for entry in self.entries(hardware) {
            let entry = entry?;
            if entry.commit == commit
                && found.as_ref().is_none_or(|held| held.serial < entry.serial)
            {
                found = Some(entry);
            }
        }
        Ok(found.map(Verified))
    }

    /// The entry for `hardware` that names this manifest, which was fetched when it was the newest. What is wrong with others does
    /// not matter: they are judged when they are to be taken.
    pub(in crate::trust) fn of_manifest(
        &self,
        hardware: &HardwareId,
        manifest: &[u8],
    ) -> Option<Verified<Entry>> {
        let digest = Sha256::of(manifest);
        self.entries(hardware)
            .filter_map(Result::ok)
            .find(|entry| entry.manifest.sha256 == digest)
            .map(Verified)
    }

    fn entries<'a>(
        &'a self,
        hardware: &'a HardwareId,
    ) -> impl Iterator<Item = Result<Entry, Refusal>> + 'a {
        let folder = format!("{}/{}/", self.name, hardware);
        let in_folder = move |path: &&String| {
            path.strip_prefix(&folder)
                .is_some_and(|file| file.ends_with(".commit"))
        };
        let targets = &self.role.targets.targets;
        let targets = targets.iter().filter(move |(path, _)| in_folder(path));
        targets.filter_map(|(path, file)| self.entry(hardware, path, file).transpose())
    }

    fn entry(
        &self,
        hardware: &HardwareId,
        path: &str,
        file: &TargetFile,
    ) -> Result<Option<Entry>, Refusal> {
        if !self.role.scope.contains(path) {
            return Err(Refusal::NotDelegated {
                channel: self.name.to_string(),
                path: path.to_owned(),
            });
        }
        let malformed = |why: &str| Refusal::Malformed {
            role: path.to_owned(),
            why: why.to_owned(),
        };
        let Some(custom) = file
            .custom
            .as_ref()
            .and_then(|custom| custom.get("offshoot"))
        else {
            return Err(malformed("it has no custom.offshoot"));
        };
        match custom.get("format").and_then(Value::as_u64) {
            Some(FORMAT) => {}
            Some(_) => return Ok(None),
            None => return Err(malformed("custom.offshoot has no format")),
        }
        let custom: Custom = from_value(path, custom.clone())?;
        let named = format!("{}/{}/{}.commit", self.name, hardware, custom.version);
        same(path, "version", &named, &path)?;
        if !custom.hardware.contains(hardware) {
            let listed: Vec<_> = custom.hardware.iter().map(HardwareId::as_str).collect();
            return Err(mixed_up(path, "hardware", hardware, &listed.join(" ")));
        }
        let Some(sha256) = file.hashes.get("sha256") else {
            return Err(malformed("it has no sha256"));
        };
        Ok(Some(Entry {
            channel: self.name.clone(),
            hardware: hardware.clone(),
            path: path
                .parse()
                .map_err(|_| malformed("its path leaves its folder"))?,
            commit: sha256
                .parse()
                .map_err(|_| malformed("its sha256 is not a digest"))?,
            length: file.length,
            version: custom.version,
            serial: custom.serial,
            manifest: custom.manifest,
        }))
    }
}

impl Entry {
    /// The target that is the release manifest.
    pub fn manifest_path(&self) -> String {
        format!(
            "{}/{}/{}.manifest.json",
            self.channel, self.hardware, self.version
        )
    }
}

impl Verified<Entry> {
    /// The release manifest, to fetch as any target.
    pub fn manifest_target(&self) -> Verified<Target> {
        let hashes = [("sha256".to_owned(), self.manifest.sha256.to_string())];
        Verified(Target {
            path: self.manifest_path(),
            file: TargetFile {
                length: self.manifest.length,
                hashes: hashes.into(),
                custom: None,
            },
        })
    }
}
