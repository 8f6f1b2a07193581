//! Every file that a device may ask for, and what was signed of it.
//!
//! | of | files |
//! |---|---|
//! | the metadata | every root, `timestamp.json`, of each other role the published version and the one before, for a device in the middle of a poll |
//! | each release | the commit object, the manifest, the files of the deltas that it names, the index of its objects, the objects |
//!
//! Reads manifests and indexes; whether the other files are there, and are what was signed, is for the caller to look at.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use offshoot::commit::Sha256;
use offshoot::objects::Object;
use offshoot::trust::schema::{Digested, FORMAT, File, Manifest, RoleName};

use crate::publication::{Publication, Release, releases};
use crate::{delta, objects};

/// Paths below `public`, and what each file must be.
pub(crate) type Files = BTreeMap<String, Digested>;

/// What a release's manifest and index say.
pub(crate) struct Contents {
    pub manifest: Manifest,
    pub objects: Option<Vec<Object>>,
}

/// The files that a release's entry names: enough to find the others.
pub(crate) fn of_entry(channel: &RoleName, release: &Release) -> [(String, Digested); 2] {
    let Release {
        hardware,
        version,
        commit,
        length,
        manifest,
        ..
    } = release;
    let folder = format!("targets/{channel}/{hardware}");
    let object = Digested {
        length: *length,
        sha256: commit.0,
    };
    [
        (format!("{folder}/{commit}.{version}.commit"), object),
        (
            format!("{folder}/{}.{version}.manifest.json", manifest.sha256),
            *manifest,
        ),
    ]
}

/// The manifest of a release that is published.
pub(crate) fn manifest(public: &Path, channel: &RoleName, release: &Release) -> Result<Manifest> {
    let [_, (path, digested)] = of_entry(channel, release);
    let path = public.join(path);
    let read = || -> Result<Manifest> {
        let bytes = std::fs::read(&path)?;
        ensure!(
            Sha256::of(&bytes) == digested.sha256,
            "it is not the file that was signed: put it back from a backup"
        );
        let manifest: Manifest = serde_json::from_slice(&bytes)?;
        ensure!(
            manifest.format == FORMAT
                && manifest.commit == release.commit
                && manifest.version == release.version
                && manifest.hardware == release.hardware,
            "it is of another release: publish it again"
        );
        Ok(manifest)
    };
    read().with_context(|| format!("reading {}", path.display()))
}

pub(crate) fn of_release(public: &Path, channel: &RoleName, release: &Release) -> Result<Contents> {
    let manifest = manifest(public, channel, release)?;
    let objects = manifest
        .objects
        .as_ref()
        .map(|named| objects::read(public, release.commit, &named.index));
    Ok(Contents {
        objects: objects.transpose()?,
        manifest,
    })
}

impl Contents {
    /// The files beside those of the entry.
    pub(crate) fn files(&self) -> impl Iterator<Item = (String, Digested)> {
        let deltas = self.manifest.deltas.iter().flat_map(delta::files);
        let index = self.manifest.objects.iter().map(|objects| &objects.index);
        let named = deltas.chain(index).map(of_file);
        named.chain(self.objects.iter().flatten().map(of_object))
    }
}

pub(crate) fn of_file(file: &File) -> (String, Digested) {
    let File {
        path,
        length,
        sha256,
    } = file;
    let digested = Digested {
        length: *length,
        sha256: *sha256,
    };
    (path.to_string(), digested)
}

pub(crate) fn of_object(object: &Object) -> (String, Digested) {
    let digested = Digested {
        length: object.length,
        sha256: object.sha256,
    };
    (object.path(), digested)
}

/// Adds a file to those that are known; one file is not two.
pub(crate) fn add(files: &mut Files, (path, digested): (String, Digested)) -> Result<()> {
    match files.get(&path) {
        Some(held) => ensure!(
            *held == digested,
            "{path} is signed twice, as {held:?} and as {digested:?}: publish the newer release again"
        ),
        None => drop(files.insert(path, digested)),
    }
    Ok(())
}

/// All that every release names.
pub(crate) fn of_releases(public: &Path, publication: &Publication) -> Result<Files> {
    let mut files = Files::new();
    for (channel, document) in &publication.channels {
        for release in releases(channel, document)? {
            for file in of_entry(channel, &release) {
                add(&mut files, file)?;
            }
            for file in of_release(public, channel, &release)?.files() {
                add(&mut files, file)?;
            }
        }
    }
    Ok(files)
}

/// What the indexes of all releases say of each object.
pub(crate) fn signed_objects(public: &Path, publication: &Publication) -> Result<objects::Signed> {
    let mut signed = objects::Signed::new();
    for (channel, document) in &publication.channels {
        for release in releases(channel, document)? {
            let contents = of_release(public, channel, &release)?;
            for object in contents.objects.into_iter().flatten() {
                signed.insert((object.kind, object.checksum), object);
            }
        }
    }
    Ok(signed)
}

/// The names of metadata files, below `public`.
pub(crate) fn of_metadata(publication: &Publication) -> BTreeSet<String> {
    let mut files = BTreeSet::from(["metadata/timestamp.json".to_owned()]);
    for (role, version, _) in publication.roles() {
        let first = match &*role {
            // The way from any former root.
            "root" => 1,
            _ => version.number().saturating_sub(1),
        };
        for version in first..=version.number() {
            files.insert(format!("metadata/{version}.{role}.json"));
        }
    }
    files
}
