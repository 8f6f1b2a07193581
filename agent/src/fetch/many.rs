//! Many small files of known digests, with many requests in flight where the server speaks HTTP/2.
//!
//! Each file is held in memory until its digest is checked, so files larger than [`SMALL`] go the way of [`Server::part`], one after the other.
//! A power cut or a kill costs what was in flight.

use std::collections::HashSet;
use std::sync::Arc;

use http::Response;
use hyper::body::Incoming;
use tokio::task::JoinSet;

use super::answer::{plain, refusal, stated_length};
use super::client::{Caller, Flow, Server, blocking};
use super::connection::{Connection, Meter, Sender};
use super::spool::Slot;
use super::url::check_path;
use super::{Fault, FetchError};
use crate::commit::Sha256;

/// What is held in memory, at most, for each request in flight.
const SMALL: u64 = 128 << 10;

/// Requests in flight.
const IN_FLIGHT: usize = 24;

/// A file to be fetched.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub path: String,
    pub length: u64,
    pub sha256: Sha256,
    pub slot: Slot,
}

impl Server {
    /// Brings all of `files` into the spool, or as many as can be had before the first error. `done` hears the length of each.
    pub async fn many(
        &mut self,
        files: &[Wanted],
        done: &mut (dyn FnMut(u64) + Send),
    ) -> Result<(), FetchError> {
        let (small, large): (Vec<_>, Vec<_>) = files.iter().partition(|file| file.length <= SMALL);
        let mut rest = small;
        let together = loop {
            let mut here = HashSet::new();
            let outcome = self.in_flight(&rest, &mut here, done).await;
            match outcome {
                // Web servers end a connection after a thousand requests or so: what came was worth another one.
                Err(error)
                    if matches!(error.fault, Fault::Interrupted { .. }) && !here.is_empty() =>
                {
                    rest.retain(|file| !here.contains(&file.path));
                }
                outcome => break outcome?,
            }
        };
        if !together {
            self.one_by_one(&rest, done).await?;
        }
        self.one_by_one(&large, done).await
    }

    async fn one_by_one(
        &mut self,
        files: &[&Wanted],
        done: &mut (dyn FnMut(u64) + Send),
    ) -> Result<(), FetchError> {
        for file in files {
            let Wanted {
                path,
                length,
                sha256,
                slot,
            } = file;
            self.part(path, *length, sha256, slot, &mut |_| {}).await?;
            done(*length);
        }
        Ok(())
    }

    /// False if the server does not speak HTTP/2. `here` are the paths of those that came.
    async fn in_flight(
        &mut self,
        files: &[&Wanted],
        here: &mut HashSet<String>,
        done: &mut (dyn FnMut(u64) + Send),
    ) -> Result<bool, FetchError> {
        if files.is_empty() {
            return Ok(true);
        }
        let connection = match self.connect().await {
            Ok(connection) => connection,
            Err(fault) => return self.blame(&files[0].path, Err(fault)),
        };
        let Connection {
            sender: Sender::Http2(sender),
            meter,
            ..
        } = connection
        else {
            return Ok(false);
        };
        let (sender, meter) = (sender.clone(), meter.clone());
        let mut running = JoinSet::new();
        let mut waiting = files.iter();
        let mut outcome = Ok(());
        loop {
            while outcome.is_ok() && running.len() < IN_FLIGHT {
                let Some(file) = waiting.next() else { break };
                let (caller, base) = self.shared();
                let (sender, meter, file) = (sender.clone(), meter.clone(), (**file).clone());
                let target = format!("{}{}", base.prefix, file.path);
                let request =
                    check_path(&file.path).and_then(|()| caller.request(base, &target, true, None));
                running.spawn(async move {
                    let fetched = match request {
                        Ok(request) => one(sender, request, &caller, &meter, &file).await,
                        Err(fault) => Err(fault),
                    };
                    (file, fetched)
                });
            }
            // A task that was cancelled or panicked says nothing; there is no other way for it to be missing.
            let Some(Ok((file, fetched))) = running.join_next().await else {
                break;
            };
            match fetched {
                Ok(()) => {
                    done(file.length);
                    here.insert(file.path);
                }
                Err(fault) if outcome.is_ok() => outcome = self.blame(&file.path, Err(fault)),
                Err(_) => {}
            }
        }
        outcome.map(|()| true)
    }
}

async fn one(
    mut sender: hyper::client::conn::http2::SendRequest<http_body_util::Empty<bytes::Bytes>>,
    request: http::Request<http_body_util::Empty<bytes::Bytes>>,
    caller: &Arc<Caller>,
    meter: &Arc<Meter>,
    file: &Wanted,
) -> Result<(), Fault> {
    let asked = async {
        meter.asked();
        let lost = |error: hyper::Error| meter.broken(&error, 0);
        sender.ready().await.map_err(lost)?;
        let answer = sender.send_request(request).await.map_err(lost)?;
        Ok(meter.reads(answer))
    };
    let answer: Response<Incoming> = caller.head(asked).await?;
    if answer.status().as_u16() != 200 {
        return Err(refusal(&answer));
    }
    plain(&answer)?;
    let want = file.length;
    if let Some(got) = stated_length(answer.headers()).filter(|got| *got != want) {
        return Err(Fault::WrongLength { want, got });
    }
    let mut flow = Flow::new(answer, &caller.config);
    let mut bytes = Vec::new();
    while let Some(chunk) = flow.chunk().await? {
        if (bytes.len() + chunk.len()) as u64 > want {
            return Err(Fault::TooLong { limit: want });
        }
        bytes.extend_from_slice(&chunk);
    }
    let got = bytes.len() as u64;
    if got != want {
        return Err(Fault::WrongLength { want, got });
    }
    let (digest, wanted, slot) = (Sha256::of(&bytes), file.sha256, file.slot.clone());
    if digest != wanted {
        return Err(Fault::WrongDigest {
            want: wanted,
            got: digest,
        });
    }
    blocking(move || Ok(slot.put(&bytes)?)).await
}
