//! What is published, copied to where devices ask for it.
//!
//! | destination | by |
//! |---|---|
//! | `/srv/www/updates` | files, each whole or not at all |
//! | `user@host:path`, `host:path`, `rsync://host/module` | [`rsync`], the program |
//! | `s3://bucket/prefix` | [`s3`], the interface of Amazon's object store, which others have too |
//!
//! Only what a device may ask for is copied, in this order: content, metadata, `timestamp.json`. What is there and is the same is not sent
//! again, so the same command goes on where one was interrupted. What was published is verified first; what is damaged is not spread.
//!
//! **Across a power cut, here or there.** Until `timestamp.json` is replaced, which is one step at every destination, a device finds the
//! former publication whole. With `--delete`, what nothing names goes after that.
//!
//! Does not sign anything, and does not read what devices are sent: [`crate::fsck`] does, of a copy that is mounted.

mod directory;
mod rsync;
mod s3;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context as _, Result, bail, ensure};
use offshoot::trust::schema::Digested;
use serde::Serialize;

use crate::content::{self, Files};
use crate::directory::Fleet;
use crate::publication::Publication;

pub(crate) use s3::Service;

/// All that is ever removed from a destination is in these.
const FOLDERS: [&str; 4] = ["metadata", "targets", "deltas", "objects"];

const TIMESTAMP: &str = "metadata/timestamp.json";

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Destination {
    Directory(PathBuf),
    /// As rsync is told.
    Rsync(String),
    S3 {
        bucket: String,
        prefix: String,
    },
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Options {
    /// Remove what no device asks for any more.
    pub delete: bool,
    /// What rsync runs instead of ssh.
    pub rsh: Option<String>,
    pub service: Service,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Summary {
    pub files: usize,
    /// What was not there, or was other.
    pub sent: usize,
    pub bytes: u64,
    pub removed: usize,
}

/// What there is to be.
struct Plan {
    public: PathBuf,
    content: Files,
    /// But for the timestamp.
    metadata: BTreeMap<String, Vec<u8>>,
    timestamp: Vec<u8>,
}

pub(crate) fn push(fleet: &Fleet, destination: &Destination, options: &Options) -> Result<Summary> {
    // A publication in between would be half of each.
    let _lock = fleet.lock()?;
    let plan = Plan::of(fleet)?;
    match destination {
        Destination::Directory(path) => directory::push(&plan, path, options.delete),
        Destination::Rsync(to) => rsync::push(&plan, to, options),
        Destination::S3 { bucket, prefix } => s3::push(&plan, bucket, prefix, options),
    }
}

impl Plan {
    fn of(fleet: &Fleet) -> Result<Self> {
        let public = fleet.public();
        let publication = Publication::read(fleet)?;
        let content = content::of_releases(&public, &publication)?;
        for (path, Digested { length, .. }) in &content {
            let found = fs::metadata(public.join(path)).map(|meta| meta.len());
            ensure!(
                matches!(found, Ok(found) if found == *length),
                "{} is not there with its {length} bytes, and nothing is sent: `offshoot-fleet fsck` says more",
                public.join(path).display()
            );
        }
        let mut metadata = BTreeMap::new();
        for path in content::of_metadata(&publication) {
            let file = public.join(&path);
            // Of a first version there is none before it, and `prune` may have removed it.
            if file.exists() {
                let bytes =
                    fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
                metadata.insert(path, bytes);
            }
        }
        let timestamp = metadata
            .remove(TIMESTAMP)
            .context("there is no timestamp")?;
        Ok(Self {
            public,
            content,
            metadata,
            timestamp,
        })
    }

    fn count(&self) -> usize {
        self.content.len() + self.metadata.len() + 1
    }

    /// Every name that stays.
    fn names(&self) -> BTreeSet<&str> {
        let content = self.content.keys().chain(self.metadata.keys());
        content.map(String::as_str).chain([TIMESTAMP]).collect()
    }
}

/// A file that is to be sent is not the one that was signed.
fn damaged(path: &Path) -> anyhow::Error {
    anyhow::anyhow!(
        "{} is not what was signed, and the rest is not sent: `offshoot-fleet fsck` says more",
        path.display()
    )
}

impl FromStr for Destination {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        if let Some(place) = text.strip_prefix("s3://") {
            let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
            let prefix = prefix.trim_matches('/');
            ensure!(
                !bucket.is_empty(),
                "{text:?} names no bucket: write s3://BUCKET/PREFIX"
            );
            return Ok(Self::S3 {
                bucket: bucket.to_owned(),
                prefix: prefix.to_owned(),
            });
        }
        if let Some((scheme, _)) = text.split_once("://")
            && scheme != "rsync"
        {
            bail!(
                "{text:?}: what is copied to is a directory, HOST:PATH, rsync://HOST/MODULE or s3://BUCKET/PREFIX"
            );
        }
        // As rsync itself tells them apart.
        let first = text.split('/').next().unwrap_or(text);
        Ok(if first.contains(':') {
            Self::Rsync(text.to_owned())
        } else {
            ensure!(
                !text.is_empty(),
                "the destination is empty: name a directory"
            );
            Self::Directory(text.into())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_destination_is_told_by_how_it_is_written() {
        let rsync = |text: &str| Destination::Rsync(text.to_owned());
        let s3 = |bucket: &str, prefix: &str| Destination::S3 {
            bucket: bucket.to_owned(),
            prefix: prefix.to_owned(),
        };
        for (text, want) in [
            ("/srv/www", Destination::Directory("/srv/www".into())),
            ("www", Destination::Directory("www".into())),
            ("./a:b", Destination::Directory("./a:b".into())),
            ("web:www", rsync("web:www")),
            ("me@web:/srv/www/", rsync("me@web:/srv/www/")),
            ("web::module/x", rsync("web::module/x")),
            ("rsync://web/module", rsync("rsync://web/module")),
            ("s3://bucket", s3("bucket", "")),
            ("s3://bucket/a/b/", s3("bucket", "a/b")),
        ] {
            assert_eq!(text.parse::<Destination>().unwrap(), want, "{text}");
        }
        for bad in ["", "s3://", "s3:///a", "ftp://host/a", "https://host"] {
            assert!(bad.parse::<Destination>().is_err(), "{bad}");
        }
    }
}
