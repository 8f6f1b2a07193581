//! One poll: carries out what [`Refresh`] wants over the connection, and keeps the result.
//!
//! Owns the entity tag of the timestamp. It is kept only when a refresh was finished: a tag of metadata that was refused, or whose rest did
//! not arrive, would make the server say "not modified" about something the device does not hold. It is not kept across restarts: the
//! first poll then costs a few hundred bytes more.
//!
//! A power cut leaves what [`crate::trust::store`] says. Retries and schedules are the daemon's.

use jiff::Timestamp as Time;

use crate::fetch::{self, FetchError, Source};
use crate::trust::goal::Newest;
use crate::trust::refresh::{Outcome, Refresh, Reply, Want};
use crate::trust::schema::{HardwareId, RoleName};
use crate::trust::store::Store;
use crate::trust::{Refusal, Release, Verified};

#[derive(Debug, thiserror::Error)]
pub enum PollError {
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("{0:#}")]
    Device(anyhow::Error),
}

impl PollError {
    /// As in JSON and the journal's `FAULT`.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Fetch(error) => error.fault.name(),
            Self::Refused(refusal) => refusal.name(),
            Self::Device(_) => "device",
        }
    }
}

/// What is polled for, and the entity tag of the last finished poll.
#[derive(Debug)]
pub struct Poller {
    pub channel: RoleName,
    pub hardware: HardwareId,
    etag: Option<String>,
}

impl Poller {
    pub fn new(channel: RoleName, hardware: HardwareId) -> Self {
        Self {
            channel,
            hardware,
            etag: None,
        }
    }

    /// Brings `store` up to what the server has. `system` is the system's time, `built` the running image's.
    pub async fn poll(
        &mut self,
        source: &mut Source,
        store: &mut Store,
        system: Time,
        built: Time,
    ) -> Result<Outcome<Verified<Release>>, PollError> {
        let goal = Newest {
            channel: self.channel.clone(),
            hardware: self.hardware.clone(),
        };
        let mut refresh = Refresh::new(store, goal, system, built);
        let former = self.etag.clone();
        let mut etag = None;
        loop {
            let reply = match refresh.want() {
                Want::Poll {
                    path,
                    limit,
                    conditional,
                } => {
                    let condition = former.as_deref().filter(|_| conditional);
                    match source.small(path, limit, condition).await? {
                        fetch::Reply::Body { bytes, etag: new } => {
                            etag = new;
                            Reply::Body(bytes.into())
                        }
                        fetch::Reply::NotModified => {
                            etag.clone_from(&former);
                            Reply::NotModified
                        }
                        fetch::Reply::NotFound => Reply::NotFound,
                    }
                }
                // Whether it may be missing is for the refresh to judge.
                Want::File { path, limit, .. } => match source.small(&path, limit, None).await? {
                    fetch::Reply::Body { bytes, .. } => Reply::Body(bytes.into()),
                    fetch::Reply::NotModified => Reply::NotModified,
                    fetch::Reply::NotFound => Reply::NotFound,
                },
                Want::Keep => refresh.keep(store).map_err(PollError::Device)?,
                Want::Done => break,
            };
            refresh = refresh.supply(reply)?;
        }
        let outcome = refresh.finish(store).map_err(PollError::Device)?;
        self.etag = etag;
        Ok(outcome)
    }
}
