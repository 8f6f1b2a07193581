//! One refresh, as a conversation: it says what it [wants](Want), a transport gives it a [`Reply`], and it refuses or goes on.
//!
//! An idle poll is one conditional request for `timestamp.json`, and if nothing is newer the roots are not asked either: whoever
//! publishes a root signs a new timestamp. If the body is new, the chain of roots is walked first, so that the
//! keys by which it is judged are the newest: a signature that then fails is final. Then snapshot, targets, channel and manifest, each
//! only if the copy on the device is not the one that is announced. Roots are kept one by one, all else once, in [`Refresh::finish`].
//!
//! Does no I/O, has no clock, and knows no address: paths are relative to the server's root. Retries are the transport's.

use jiff::Timestamp as Time;

use super::Refusal;
use super::schema::{HardwareId, RoleName, Root, Snapshot, Targets, Timestamp, Version};
use super::store::{self, Files, Store};
use super::verify::{self, Channel, CurrentRoot, Entry, Floors, Release, Verified};

const TIMESTAMP: &str = "metadata/timestamp.json";

/// What a refresh needs next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Want<'a> {
    /// `metadata/timestamp.json`. `conditional`: the device holds one, so the transport may send the `ETag` of the last refresh
    /// that was *finished*; else it must not.
    Poll {
        path: &'static str,
        limit: u64,
        conditional: bool,
    },
    /// A file, and to stop reading after `limit` bytes.
    File {
        path: String,
        limit: u64,
        missing_is_ok: bool,
    },
    /// [`Store::persist_root`] with these bytes, then [`Reply::Kept`].
    KeepRoot(&'a [u8]),
    /// [`Refresh::finish`].
    Done,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    Body(Vec<u8>),
    NotModified,
    NotFound,
    Kept,
}

/// A conversation. A refusal ends it.
#[derive(Debug)]
pub struct Refresh {
    channel: RoleName,
    hardware: HardwareId,
    system: Time,
    built: Time,
    held: Files,
    held_timestamp: Option<Version>,
    root: Verified<Root>,
    floors: Floors,
    state: State,
}

/// What a finished refresh found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The newest release of the channel for the hardware, if it has any.
    pub release: Option<Verified<Release>>,
    /// Nothing on the server is newer than what the device held.
    pub unchanged: bool,
}

#[derive(Debug)]
enum State {
    Poll,
    /// Is there a newer root? Whether or not, the timestamp is judged after it.
    Root {
        ask: Ask,
        timestamp: Vec<u8>,
        hops: u32,
    },
    KeepRoot {
        root: Verified<Root>,
        bytes: Vec<u8>,
        timestamp: Vec<u8>,
        hops: u32,
    },
    Snapshot {
        ask: Ask,
        fresh: Fresh,
    },
    Targets {
        ask: Ask,
        fresh: Fresh,
        snapshot: Document<Snapshot>,
    },
    Channel {
        ask: Ask,
        fresh: Fresh,
        snapshot: Document<Snapshot>,
        targets: Document<Targets>,
    },
    Manifest {
        ask: Ask,
        chain: Box<Chain>,
        entry: Verified<Entry>,
    },
    Done {
        chain: Box<Chain>,
        release: Option<Document<Release>>,
    },
}

#[derive(Clone, Debug)]
struct Ask {
    path: String,
    limit: u64,
}

#[derive(Debug)]
struct Document<T> {
    bytes: Vec<u8>,
    verified: Verified<T>,
}

#[derive(Debug)]
struct Fresh {
    root: CurrentRoot,
    timestamp: Document<Timestamp>,
}

#[derive(Debug)]
struct Chain {
    fresh: Fresh,
    snapshot: Document<Snapshot>,
    targets: Document<Targets>,
    channel: Vec<u8>,
}

impl Refresh {
    /// `system` is the system's time, `built` the image's: the floor of the clock is taken from the store.
    pub fn new(
        store: &Store,
        channel: RoleName,
        hardware: HardwareId,
        system: Time,
        built: Time,
    ) -> Self {
        Self {
            channel,
            hardware,
            system,
            built,
            held: store.files().clone(),
            held_timestamp: store.timestamp().map(|timestamp| timestamp.version),
            root: store.root().clone(),
            floors: store.floors().clone(),
            state: State::Poll,
        }
    }

    pub fn want(&self) -> Want<'_> {
        let file = |ask: &Ask| Want::File {
            path: ask.path.clone(),
            limit: ask.limit,
            missing_is_ok: false,
        };
        match &self.state {
            State::Poll => Want::Poll {
                path: TIMESTAMP,
                limit: verify::TIMESTAMP_LIMIT,
                conditional: self.held_timestamp.is_some(),
            },
            State::Root { ask, .. } => Want::File {
                path: ask.path.clone(),
                limit: ask.limit,
                missing_is_ok: true,
            },
            State::KeepRoot { bytes, .. } => Want::KeepRoot(bytes),
            State::Snapshot { ask, .. }
            | State::Targets { ask, .. }
            | State::Channel { ask, .. }
            | State::Manifest { ask, .. } => file(ask),
            State::Done { .. } => Want::Done,
        }
    }

    /// Goes on with what the transport found.
    pub fn supply(mut self, reply: Reply) -> Result<Self, Refusal> {
        self.state = match std::mem::replace(&mut self.state, State::Poll) {
            State::Poll => self.polled(reply)?,
            State::Root { timestamp, .. } if reply == Reply::NotFound => {
                self.judge_new(timestamp)?
            }
            State::Root {
                ask,
                timestamp,
                hops,
            } => {
                let bytes = ask.body(reply)?;
                State::KeepRoot {
                    root: verify::accept_root(&self.root, &bytes)?,
                    bytes,
                    timestamp,
                    hops,
                }
            }
            State::KeepRoot {
                root,
                timestamp,
                hops,
                ..
            } if reply == Reply::Kept => {
                self.floors = std::mem::take(&mut self.floors).under(&root);
                self.root = root;
                self.next_root(timestamp, hops + 1)?
            }
            State::Snapshot { ask, fresh } => self.snapshot(fresh, ask.body(reply)?)?,
            State::Targets {
                ask,
                fresh,
                snapshot,
            } => self.targets(fresh, snapshot, ask.body(reply)?)?,
            State::Channel {
                ask,
                fresh,
                snapshot,
                targets,
            } => self.channel(fresh, snapshot, targets, ask.body(reply)?)?,
            State::Manifest { ask, chain, entry } => {
                let bytes = ask.body(reply)?;
                State::Done {
                    chain,
                    release: Some(Document {
                        verified: verify::accept_manifest(&entry, &bytes)?,
                        bytes,
                    }),
                }
            }
            State::KeepRoot { .. } => return Err(reply.out_of_turn("root.json")),
            State::Done { .. } => return Err(reply.out_of_turn("nothing")),
        };
        Ok(self)
    }

    /// Keeps what was verified, all of it at once; an idle poll writes nothing.
    pub fn finish(self, store: &mut Store) -> anyhow::Result<Outcome> {
        let State::Done { chain, release } = self.state else {
            anyhow::bail!("the refresh is not done: supply what it wants first");
        };
        let (release, manifest) = release
            .map(|release| (release.verified, release.bytes))
            .unzip();
        let files = Files {
            timestamp: Some(chain.fresh.timestamp.bytes),
            snapshot: Some(chain.snapshot.bytes),
            targets: Some(chain.targets.bytes),
            channels: [(self.channel, chain.channel)].into(),
            manifest,
        };
        let unchanged = files == self.held;
        store.persist(
            files,
            &chain.fresh.timestamp.verified,
            &chain.snapshot.verified,
        )?;
        Ok(Outcome { release, unchanged })
    }

    fn polled(&mut self, reply: Reply) -> Result<State, Refusal> {
        let held = self
            .held
            .timestamp
            .take_if(|_| self.held_timestamp.is_some());
        let body = match (reply, held) {
            // The copy on the device, whether the server or the bytes say so.
            (Reply::NotModified, Some(held)) => return self.judge_held(held),
            (Reply::Body(body), Some(held)) if body == held => return self.judge_held(held),
            (reply, held) => {
                self.held.timestamp = held;
                Ask {
                    path: TIMESTAMP.to_owned(),
                    limit: verify::TIMESTAMP_LIMIT,
                }
                .body(reply)?
            }
        };
        self.next_root(body, 0)
    }

    /// The timestamp that was verified before, at this time. The roots are asked only if the one at hand has expired.
    fn judge_held(&mut self, bytes: Vec<u8>) -> Result<State, Refusal> {
        self.held.timestamp = Some(bytes.clone());
        match self.current_root() {
            Ok(root) => {
                let verified = verify::accept_timestamp(&root, &self.floors, &bytes)?;
                self.after_timestamp(Fresh {
                    root,
                    timestamp: Document { bytes, verified },
                })
            }
            Err(_) => self.next_root(bytes, 0),
        }
    }

    /// 5.3.3
    fn next_root(&mut self, timestamp: Vec<u8>, hops: u32) -> Result<State, Refusal> {
        match self.root.version.next() {
            Some(next) if hops < verify::ROOT_HOPS => {
                let ask = Ask {
                    path: format!("metadata/{next}.root.json"),
                    limit: verify::ROOT_LIMIT,
                };
                Ok(State::Root {
                    ask,
                    timestamp,
                    hops,
                })
            }
            Some(_) | None => self.judge_new(timestamp),
        }
    }

    fn judge_new(&mut self, bytes: Vec<u8>) -> Result<State, Refusal> {
        self.floors = std::mem::take(&mut self.floors).under(&self.root);
        let root = self.current_root()?;
        let verified = verify::accept_timestamp(&root, &self.floors, &bytes)?;
        // 5.4.3: of two with one version the first is kept, as long as the root's keys still sign for it.
        if let Some(held) = self.held.timestamp.clone()
            && self.held_timestamp == Some(verified.version)
        {
            match verify::accept_timestamp(&root, &self.floors, &held) {
                Ok(verified) => {
                    return self.after_timestamp(Fresh {
                        root,
                        timestamp: Document {
                            bytes: held,
                            verified,
                        },
                    });
                }
                Err(refusal @ Refusal::Expired { .. }) => return Err(refusal),
                Err(_) => {}
            }
        }
        self.after_timestamp(Fresh {
            root,
            timestamp: Document { bytes, verified },
        })
    }

    /// 5.3.10, and that a root which was lost is found again before anything else is believed.
    fn current_root(&self) -> Result<CurrentRoot, Refusal> {
        let (have, got) = (self.floors.root, self.root.version.number());
        if got < have {
            return Err(Refusal::RolledBack {
                role: "root".to_owned(),
                have,
                got,
            });
        }
        verify::current_root(
            self.root.clone(),
            store::now(self.system, self.floors.clock.max(Some(self.built))),
        )
    }

    fn after_timestamp(&mut self, fresh: Fresh) -> Result<State, Refusal> {
        if let Some(bytes) = self.held.snapshot.clone() {
            let held = verify::accept_snapshot(
                &fresh.root,
                &fresh.timestamp.verified,
                &self.floors,
                &bytes,
            );
            if let Some(verified) = usable(held)? {
                return self.after_snapshot(fresh, Document { bytes, verified });
            }
        }
        let path = self.metadata_path(
            "snapshot",
            verify::snapshot_file(&fresh.timestamp.verified)?.version,
        );
        let limit = verify::snapshot_limit(&fresh.timestamp.verified)?;
        Ok(State::Snapshot {
            ask: Ask { path, limit },
            fresh,
        })
    }

    fn snapshot(&mut self, fresh: Fresh, bytes: Vec<u8>) -> Result<State, Refusal> {
        let verified =
            verify::accept_snapshot(&fresh.root, &fresh.timestamp.verified, &self.floors, &bytes)?;
        self.after_snapshot(fresh, Document { bytes, verified })
    }

    fn after_snapshot(
        &mut self,
        fresh: Fresh,
        snapshot: Document<Snapshot>,
    ) -> Result<State, Refusal> {
        if let Some(bytes) = self.held.targets.clone()
            && let Some(verified) = usable(verify::accept_targets(
                &fresh.root,
                &snapshot.verified,
                &bytes,
            ))?
        {
            return self.after_targets(fresh, snapshot, Document { bytes, verified });
        }
        let ask = self.ask_role(&snapshot.verified, "targets")?;
        Ok(State::Targets {
            ask,
            fresh,
            snapshot,
        })
    }

    fn targets(
        &mut self,
        fresh: Fresh,
        snapshot: Document<Snapshot>,
        bytes: Vec<u8>,
    ) -> Result<State, Refusal> {
        let verified = verify::accept_targets(&fresh.root, &snapshot.verified, &bytes)?;
        self.after_targets(fresh, snapshot, Document { bytes, verified })
    }

    fn after_targets(
        &mut self,
        fresh: Fresh,
        snapshot: Document<Snapshot>,
        targets: Document<Targets>,
    ) -> Result<State, Refusal> {
        verify::is_channel(&snapshot.verified, &targets.verified, &self.channel)?;
        if let Some(bytes) = self.held.channels.get(&self.channel).cloned() {
            let held = verify::accept_channel(
                &fresh.root,
                &snapshot.verified,
                &targets.verified,
                &self.channel,
                &bytes,
            );
            if let Some(channel) = usable(held)? {
                return self.after_channel(
                    Chain {
                        fresh,
                        snapshot,
                        targets,
                        channel: bytes,
                    },
                    &channel,
                );
            }
        }
        let ask = self.ask_role(&snapshot.verified, self.channel.as_str())?;
        Ok(State::Channel {
            ask,
            fresh,
            snapshot,
            targets,
        })
    }

    fn channel(
        &mut self,
        fresh: Fresh,
        snapshot: Document<Snapshot>,
        targets: Document<Targets>,
        bytes: Vec<u8>,
    ) -> Result<State, Refusal> {
        let channel = verify::accept_channel(
            &fresh.root,
            &snapshot.verified,
            &targets.verified,
            &self.channel,
            &bytes,
        )?;
        self.after_channel(
            Chain {
                fresh,
                snapshot,
                targets,
                channel: bytes,
            },
            &channel,
        )
    }

    fn after_channel(&mut self, chain: Chain, channel: &Channel) -> Result<State, Refusal> {
        let chain = Box::new(chain);
        let Some(entry) = channel.newest(&self.hardware)? else {
            return Ok(State::Done {
                chain,
                release: None,
            });
        };
        if let Some(bytes) = self.held.manifest.clone()
            && let Some(verified) = usable(verify::accept_manifest(&entry, &bytes))?
        {
            return Ok(State::Done {
                chain,
                release: Some(Document { bytes, verified }),
            });
        }
        let ask = Ask {
            path: self.manifest_path(&entry),
            limit: verify::manifest_limit(&entry)?,
        };
        Ok(State::Manifest { ask, chain, entry })
    }

    fn ask_role(&self, snapshot: &Verified<Snapshot>, role: &str) -> Result<Ask, Refusal> {
        let path = self.metadata_path(role, verify::role_file(snapshot, role)?.version);
        Ok(Ask {
            path,
            limit: verify::targets_limit(snapshot, role)?,
        })
    }

    /// 5.3.12
    fn metadata_path(&self, role: &str, version: Version) -> String {
        if self.root.consistent_snapshot {
            format!("metadata/{version}.{role}.json")
        } else {
            format!("metadata/{role}.json")
        }
    }

    /// 5.7.3
    fn manifest_path(&self, entry: &Entry) -> String {
        let path = entry.manifest_path();
        match path.rsplit_once('/') {
            Some((folder, file)) if self.root.consistent_snapshot => {
                format!("targets/{folder}/{}.{file}", entry.manifest.sha256)
            }
            _ => format!("targets/{path}"),
        }
    }
}

impl Ask {
    fn body(self, reply: Reply) -> Result<Vec<u8>, Refusal> {
        match reply {
            Reply::Body(body) if body.len() as u64 > self.limit => Err(Refusal::TooLong {
                role: self.path,
                limit: self.limit,
            }),
            Reply::Body(body) => Ok(body),
            Reply::NotFound => Err(Refusal::Missing { path: self.path }),
            reply @ (Reply::NotModified | Reply::Kept) => Err(reply.out_of_turn(&self.path)),
        }
    }
}

impl Reply {
    fn out_of_turn(&self, want: &str) -> Refusal {
        let reply = match self {
            Self::Body(_) => "a body",
            Self::NotModified => "not modified",
            Self::NotFound => "not found",
            Self::Kept => "kept",
        };
        Refusal::OutOfTurn {
            want: want.to_owned(),
            reply,
        }
    }
}

/// The copy on the device, if it is what is announced. One that is, and has expired, would be fetched in vain.
fn usable<T>(held: Result<T, Refusal>) -> Result<Option<T>, Refusal> {
    match held {
        Ok(document) => Ok(Some(document)),
        Err(refusal @ Refusal::Expired { .. }) => Err(refusal),
        Err(_) => Ok(None),
    }
}

#[cfg(test)]
mod tests;
