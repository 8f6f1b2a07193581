//! Where releases come from: a server, its mirrors in the order of the configuration, or a directory. All are trusted alike: not at all.
//!
//! What one place fails to give, the next one is asked for, once each; the place that gave it is asked first from then on, until the next poll
//! begins with the first again. Does not wait between them: whoever asks does that when all have failed.

use super::client::{Reply, Server};
use super::directory::Directory;
use super::many::Wanted;
use super::spool::Slot;
use super::{Fault, FetchError};
use crate::commit::Sha256;

pub struct Source {
    places: Vec<Place>,
    current: usize,
}

enum Place {
    Server(Box<Server>),
    Directory(Directory),
}

impl From<Server> for Source {
    fn from(server: Server) -> Self {
        Self::mirrors(server, Vec::new())
    }
}

impl From<Directory> for Source {
    fn from(directory: Directory) -> Self {
        Self {
            places: vec![Place::Directory(directory)],
            current: 0,
        }
    }
}

impl Source {
    pub fn mirrors(first: Server, others: Vec<Server>) -> Self {
        let servers = std::iter::once(first).chain(others);
        Self {
            places: servers
                .map(|server| Place::Server(Box::new(server)))
                .collect(),
            current: 0,
        }
    }

    /// The first place is asked first again.
    pub fn prefer_first(&mut self) {
        self.current = 0;
    }

    /// [`Server::small`]. An entity tag is sent only to the place that gave it.
    pub async fn small(
        &mut self,
        path: &str,
        limit: u64,
        etag: Option<&str>,
    ) -> Result<Reply, FetchError> {
        let mut first = None;
        for at in self.order() {
            let own = etag.and_then(|etag| etag.split_once(':'));
            let own = own.filter(|(place, _)| *place == at.to_string());
            let outcome = match &mut self.places[at] {
                Place::Server(server) => server.small(path, limit, own.map(|(_, tag)| tag)).await,
                Place::Directory(directory) => directory.small(path, limit).await,
            };
            match outcome {
                Ok(reply) => {
                    self.current = at;
                    return Ok(match reply {
                        Reply::Body { bytes, etag } => Reply::Body {
                            bytes,
                            etag: etag.map(|etag| format!("{at}:{etag}")),
                        },
                        reply @ (Reply::NotModified | Reply::NotFound) => reply,
                    });
                }
                Err(error) => self.keep(&mut first, error)?,
            }
        }
        Err(first.unwrap_or_else(|| nowhere(path)))
    }

    /// [`Server::part`]. What one place has begun, the next one continues.
    pub async fn part(
        &mut self,
        path: &str,
        length: u64,
        sha256: &Sha256,
        slot: &Slot,
        progress: &mut (dyn FnMut(u64) + Send),
    ) -> Result<(), FetchError> {
        let mut first = None;
        for at in self.order() {
            let outcome = match &mut self.places[at] {
                Place::Server(server) => server.part(path, length, sha256, slot, progress).await,
                Place::Directory(directory) => {
                    directory.part(path, length, sha256, slot, progress).await
                }
            };
            match outcome {
                Ok(()) => {
                    self.current = at;
                    return Ok(());
                }
                Err(error) => self.keep(&mut first, error)?,
            }
        }
        Err(first.unwrap_or_else(|| nowhere(path)))
    }

    /// [`Server::many`]. What one place did not give is asked of the next.
    pub async fn many(
        &mut self,
        files: &[Wanted],
        done: &mut (dyn FnMut(u64) + Send),
    ) -> Result<(), FetchError> {
        let mut first = None;
        for at in self.order() {
            // Names of whole files are enough here: what is wrong under them is found before it is used.
            let mut missing = Vec::new();
            for file in files {
                let present = file.slot.present();
                let present = present.map_err(|fault| FetchError {
                    url: file.path.clone(),
                    fault: fault.into(),
                })?;
                if present < file.length || !file.slot.path().exists() {
                    missing.push(file.clone());
                }
            }
            let outcome = match &mut self.places[at] {
                Place::Server(server) => server.many(&missing, done).await,
                Place::Directory(directory) => directory.many(&missing, done).await,
            };
            match outcome {
                Ok(()) => {
                    self.current = at;
                    return Ok(());
                }
                Err(error) => self.keep(&mut first, error)?,
            }
        }
        Err(first.unwrap_or_else(|| nowhere("objects")))
    }

    fn order(&self) -> impl Iterator<Item = usize> + use<> {
        let (current, count) = (self.current, self.places.len());
        (0..count).map(move |turn| (current + turn) % count)
    }

    /// Keeps the first error, which is the preferred place's, and goes on to the next; not with one that is this device's own.
    fn keep(&self, first: &mut Option<FetchError>, error: FetchError) -> Result<(), FetchError> {
        if matches!(error.fault, Fault::Spool(_) | Fault::BadPath { .. }) {
            return Err(error);
        }
        if self.places.len() > 1 {
            tracing::warn!(%error, "trying the next mirror");
        }
        first.get_or_insert(error);
        Ok(())
    }
}

fn nowhere(path: &str) -> FetchError {
    FetchError {
        url: path.to_owned(),
        fault: Fault::BadPath {
            path: path.to_owned(),
        },
    }
}
