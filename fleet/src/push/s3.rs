//! To an object store that speaks the interface of Amazon's.
//!
//! An object is there whole or not at all. What is there is compared by its length and its entity tag, which is the MD5 of an object that
//! was sent in one piece; of others (encrypted by the store, sent in parts) by the sha256 that is kept with it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use futures_util::TryStreamExt as _;
use md5::Digest as _;
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::path::Path;
use object_store::{
    Attribute, Attributes, BackoffConfig, GetOptions, ObjectMeta, ObjectStore, ObjectStoreExt as _,
    PutMultipartOptions, PutOptions, PutPayload, RetryConfig, WriteMultipart,
};
use offshoot::commit::Sha256;
use tokio::task::JoinSet;

use super::{FOLDERS, Options, Plan, Summary, TIMESTAMP, damaged};

/// Requests in flight.
const IN_FLIGHT: usize = 16;

/// What is sent in one piece, and the size of the pieces of what is larger.
const PIECE: usize = 8 << 20;

/// Pieces of one file in flight.
const PIECES: usize = 4;

const SHA256: Attribute = Attribute::Metadata(std::borrow::Cow::Borrowed("sha256"));

/// Where the store is, beside what the environment says (`AWS_…`).
#[derive(Clone, Debug, Default)]
pub(crate) struct Service {
    pub endpoint: Option<String>,
    pub region: Option<String>,
}

#[derive(Clone)]
struct Store {
    s3: Arc<AmazonS3>,
    bucket: String,
    prefix: Path,
}

/// A file to be there.
struct Wanted {
    path: String,
    from: From,
    sha256: Sha256,
}

enum From {
    File(PathBuf),
    Bytes(Vec<u8>),
}

pub(super) fn push(plan: &Plan, bucket: &str, prefix: &str, options: &Options) -> Result<Summary> {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().build().context("starting")?;
    runtime.block_on(async {
        let store = Store::open(bucket, prefix, &options.service)?;
        let there = store.list().await?;
        let mut summary = Summary {
            files: plan.count(),
            ..Summary::default()
        };
        let content = plan.content.iter().map(|(path, want)| Wanted {
            path: path.clone(),
            from: From::File(plan.public.join(path)),
            sha256: want.sha256,
        });
        store.send(content.collect(), &there, &mut summary).await?;
        let of = |path: &str, bytes: &[u8]| Wanted {
            path: path.to_owned(),
            from: From::Bytes(bytes.to_owned()),
            sha256: Sha256::of(bytes),
        };
        let metadata = plan.metadata.iter().map(|(path, bytes)| of(path, bytes));
        store.send(metadata.collect(), &there, &mut summary).await?;
        let timestamp = vec![of(TIMESTAMP, &plan.timestamp)];
        store.send(timestamp, &there, &mut summary).await?;
        if options.delete {
            let names = plan.names();
            let gone = there.keys().filter(|path| {
                let folder = path.split('/').next().unwrap_or_default();
                FOLDERS.contains(&folder) && !names.contains(path.as_str())
            });
            summary.removed = store.remove(gone.cloned().collect()).await?;
        }
        Ok(summary)
    })
}

impl Store {
    fn open(bucket: &str, prefix: &str, service: &Service) -> Result<Self> {
        // rustls wants to be told, because more than one library could be linked; an error says that it has been.
        drop(rustls::crypto::ring::default_provider().install_default());
        let mut builder = AmazonS3Builder::from_env().with_bucket_name(bucket);
        let Service { endpoint, region } = service;
        if let Some(endpoint) = endpoint {
            builder = builder
                .with_allow_http(endpoint.starts_with("http://"))
                .with_endpoint(endpoint);
        }
        if let Some(region) = region {
            builder = builder.with_region(region);
        }
        let retry = RetryConfig {
            backoff: BackoffConfig::default(),
            max_retries: 5,
            retry_timeout: Duration::from_secs(60),
        };
        let s3 = builder.with_retry(retry).build();
        Ok(Self {
            s3: Arc::new(s3.with_context(|| {
                format!("s3://{bucket}: set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, --region and --endpoint")
            })?),
            bucket: bucket.to_owned(),
            prefix: Path::parse(prefix).with_context(|| format!("the prefix {prefix:?}"))?,
        })
    }

    fn location(&self, path: &str) -> Result<Path> {
        let whole = match self.prefix.as_ref() {
            "" => path.to_owned(),
            prefix => format!("{prefix}/{path}"),
        };
        Path::parse(&whole).with_context(|| format!("the name {whole:?}"))
    }

    fn blame(&self, doing: &str, error: object_store::Error) -> anyhow::Error {
        use object_store::Error;
        let remedy = match &error {
            Error::NotFound { .. } => "make the bucket, or correct its name",
            Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => {
                "permit these keys to list, read, write and delete there, or correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            }
            _other => "check --endpoint, --region and the network; the same command goes on",
        };
        let place = format!("s3://{}", self.bucket);
        anyhow!(error).context(format!("{doing} {place}: {remedy}"))
    }

    /// What is there, by its path below the prefix.
    async fn list(&self) -> Result<BTreeMap<String, ObjectMeta>> {
        let prefix = Some(&self.prefix).filter(|prefix| !prefix.as_ref().is_empty());
        let all: Vec<ObjectMeta> = self
            .s3
            .list(prefix)
            .try_collect()
            .await
            .map_err(|error| self.blame("listing", error))?;
        let below = all.into_iter().map(|meta| {
            let path = meta.location.as_ref();
            let path = path.strip_prefix(self.prefix.as_ref()).unwrap_or(path);
            (path.trim_start_matches('/').to_owned(), meta)
        });
        Ok(below.collect())
    }

    /// Sends what is not there, many at a time; all of it is there when this returns.
    async fn send(
        &self,
        files: Vec<Wanted>,
        there: &BTreeMap<String, ObjectMeta>,
        summary: &mut Summary,
    ) -> Result<()> {
        let mut running = JoinSet::new();
        let mut waiting = files.into_iter();
        let mut outcome = Ok(());
        loop {
            while outcome.is_ok() && running.len() < IN_FLIGHT {
                let Some(file) = waiting.next() else { break };
                let (store, held) = (self.clone(), there.get(&file.path).cloned());
                running.spawn(async move { store.one(file, held).await });
            }
            match running.join_next().await {
                None => return outcome,
                Some(done) => match done.context("sending")? {
                    Ok(Some(bytes)) => {
                        summary.sent += 1;
                        summary.bytes += bytes;
                    }
                    Ok(None) => {}
                    Err(error) if outcome.is_ok() => outcome = Err(error),
                    // The first one is told.
                    Err(_) => {}
                },
            }
        }
    }

    /// How many bytes were sent, if any had to be.
    async fn one(&self, file: Wanted, held: Option<ObjectMeta>) -> Result<Option<u64>> {
        let location = self.location(&file.path)?;
        let (bytes, place) = match file.from {
            From::Bytes(bytes) => (bytes, PathBuf::from(&file.path)),
            From::File(path) => {
                let read = tokio::fs::read(&path).await;
                (
                    read.with_context(|| format!("reading {}", path.display()))?,
                    path,
                )
            }
        };
        ensure!(Sha256::of(&bytes) == file.sha256, damaged(&place));
        let length = bytes.len() as u64;
        if let Some(held) = held
            && held.size == length
            && self.is_same(&held, &bytes, file.sha256).await?
        {
            return Ok(None);
        }
        let mut attributes = Attributes::new();
        attributes.insert(SHA256, file.sha256.to_string().into());
        // A name that says what it is never means another file; the timestamp does, from one release to the next.
        let (cache, kind) = match file.path.as_str() {
            TIMESTAMP => ("no-cache", "application/json"),
            path if path.ends_with(".json") => ("max-age=31536000, immutable", "application/json"),
            _ => ("max-age=31536000, immutable", "application/octet-stream"),
        };
        attributes.insert(Attribute::CacheControl, cache.into());
        attributes.insert(Attribute::ContentType, kind.into());
        let sent = if bytes.len() <= PIECE {
            let options = PutOptions {
                attributes,
                ..PutOptions::default()
            };
            let put = self
                .s3
                .put_opts(&location, PutPayload::from(bytes), options);
            put.await.map(drop)
        } else {
            self.in_pieces(&location, &bytes, attributes).await
        };
        sent.map_err(|error| self.blame(&format!("sending {} to", file.path), error))?;
        Ok(Some(length))
    }

    async fn in_pieces(
        &self,
        location: &Path,
        bytes: &[u8],
        attributes: Attributes,
    ) -> object_store::Result<()> {
        let options = PutMultipartOptions {
            attributes,
            ..PutMultipartOptions::default()
        };
        let upload = self.s3.put_multipart_opts(location, options).await?;
        let mut upload = WriteMultipart::new_with_chunk_size(upload, PIECE);
        for piece in bytes.chunks(PIECE) {
            if let Err(error) = upload.wait_for_capacity(PIECES).await {
                // The store keeps, and bills, pieces that were not given up.
                drop(upload.abort().await);
                return Err(error);
            }
            upload.write(piece);
        }
        upload.finish().await.map(drop)
    }

    async fn is_same(&self, held: &ObjectMeta, bytes: &[u8], sha256: Sha256) -> Result<bool> {
        let digest: [u8; 16] = md5::Md5::digest(bytes).into();
        let md5: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        if held.e_tag.as_deref().map(|tag| tag.trim_matches('"')) == Some(&md5) {
            return Ok(true);
        }
        let options = GetOptions {
            head: true,
            ..GetOptions::default()
        };
        let head = self.s3.get_opts(&held.location, options).await;
        let head = head.map_err(|error| self.blame("asking", error))?;
        let kept = head.attributes.get(&SHA256);
        Ok(kept.is_some_and(|kept| **kept == *sha256.to_string()))
    }

    async fn remove(&self, paths: Vec<String>) -> Result<usize> {
        let mut running = JoinSet::new();
        let mut removed = 0;
        let mut waiting = paths.into_iter();
        loop {
            while running.len() < IN_FLIGHT {
                let Some(path) = waiting.next() else { break };
                let (store, location) = (self.clone(), self.location(&path)?);
                running.spawn(async move { store.s3.delete(&location).await });
            }
            let Some(done) = running.join_next().await else {
                return Ok(removed);
            };
            done.context("removing")?
                .map_err(|error| self.blame("removing from", error))?;
            removed += 1;
        }
    }
}
