//! One refresh, as a conversation: it says what it [wants](Want), is given a [`Reply`], and refuses or goes on.
//!
//! The order is the specification's, but for one thing. An idle poll is one conditional request for `timestamp.json`: if that is the
//! one at hand, and all that it announces is at hand and stands, no root is asked for, since whoever publishes a root signs a new
//! timestamp. In any other case the chain of roots is walked first, so that the keys by which the timestamp is judged are the
//! newest: a signature that then fails is final. [`Refresh::roots_first`] asks for roots first in every case. Each document is kept as
//! soon as it is accepted (5.3.8, 5.4.5, 5.5.7, 5.6.6), and fetched only if the copy on the device is not the one that is announced.
//!
//! Does no I/O, has no clock, and knows no address: paths are relative to the server's root. Retries are the transport's.

mod ask;

use std::collections::BTreeSet;

use jiff::Timestamp as Time;

use super::Refusal;
use super::goal::Goal;
use super::schema::{Root, Snapshot, Timestamp, Version};
use super::store::{self, Files, Store};
use super::verify::{self, CurrentRoot, Delegated, Floors, Role, Search, Target, Verified};

use ask::Ask;
pub(super) use ask::quoted;
pub use ask::{Reply, Want};

const TIMESTAMP: &str = "metadata/timestamp.json";

/// A conversation. A refusal ends it.
#[derive(Debug)]
pub struct Refresh<G: Goal> {
    goal: G,
    system: Time,
    built: Time,
    held: Files,
    held_timestamp: Option<Version>,
    root: Verified<Root>,
    floors: Floors,
    /// No newer root is to be asked for.
    walked: bool,
    /// Every role that any search of this refresh has visited.
    visited: BTreeSet<String>,
    unchanged: bool,
    state: State<G>,
}

/// What a finished refresh found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome<T> {
    /// For a device, the newest release of the channel for the hardware, if it has any.
    pub found: Option<T>,
    /// Nothing on the server is newer than what the device held.
    pub unchanged: bool,
}

#[derive(Debug)]
enum State<G: Goal> {
    Poll,
    /// Is there a newer root? Whether or not, the timestamp is judged after it; without one, it is fetched.
    Root {
        ask: Ask,
        timestamp: Option<Vec<u8>>,
        hops: u32,
    },
    Snapshot {
        ask: Ask,
        fresh: Fresh,
    },
    Role {
        ask: Ask,
        chain: Box<Chain>,
        search: Search,
        delegated: Delegated,
    },
    Target {
        ask: Ask,
        chain: Box<Chain>,
        target: G::Target,
    },
    Keep(Box<Accepted<G>>),
    Done {
        chain: Box<Chain>,
        found: Option<G::Found>,
    },
}

/// What is to be kept before the refresh goes on.
#[derive(Debug)]
enum Accepted<G: Goal> {
    Root {
        root: Document<Verified<Root>>,
        timestamp: Option<Vec<u8>>,
        hops: u32,
    },
    Timestamp(Fresh),
    Snapshot(Box<Chain>),
    Role {
        chain: Box<Chain>,
        search: Search,
        role: Document<Role>,
    },
    Target {
        chain: Box<Chain>,
        name: &'static str,
        bytes: Vec<u8>,
        found: G::Found,
    },
}

#[derive(Debug)]
struct Document<T> {
    bytes: Vec<u8>,
    verified: T,
}

#[derive(Debug)]
struct Fresh {
    root: CurrentRoot,
    timestamp: Document<Verified<Timestamp>>,
}

#[derive(Debug)]
struct Chain {
    root: CurrentRoot,
    snapshot: Document<Verified<Snapshot>>,
}

impl<G: Goal> Refresh<G> {
    /// 5.1: `system` is the system's time, `built` the image's; the floor of the clock is taken from the store.
    pub fn new(store: &Store, goal: G, system: Time, built: Time) -> Self {
        Self {
            goal,
            system,
            built,
            held: store.files().clone(),
            held_timestamp: store.timestamp().map(|timestamp| timestamp.version),
            root: store.root().clone(),
            floors: store.floors().clone(),
            walked: false,
            visited: BTreeSet::new(),
            unchanged: true,
            state: State::Poll,
        }
    }

    /// Asks for newer roots before anything else, as the specification has it.
    pub fn roots_first(mut self) -> Result<Self, Refusal> {
        self.state = self.next_root(None, 0)?;
        Ok(self)
    }

    pub fn want(&self) -> Want {
        match &self.state {
            State::Poll => Want::Poll {
                path: TIMESTAMP,
                limit: verify::TIMESTAMP_LIMIT,
                conditional: self.held_timestamp.is_some(),
            },
            State::Root { ask, .. } => ask.want(true),
            State::Snapshot { ask, .. } | State::Role { ask, .. } | State::Target { ask, .. } => {
                ask.want(false)
            }
            State::Keep(_) => Want::Keep,
            State::Done { .. } => Want::Done,
        }
    }

    /// Goes on with what the transport found.
    pub fn supply(mut self, reply: Reply) -> Result<Self, Refusal> {
        self.state = match std::mem::replace(&mut self.state, State::Poll) {
            State::Poll => self.polled(reply)?,
            State::Root { timestamp, .. } if reply == Reply::NotFound => {
                self.roots_walked(timestamp)?
            }
            State::Root {
                ask,
                timestamp,
                hops,
            } => {
                let bytes = ask.body(reply)?;
                let verified = verify::accept_root(&self.root, &bytes)?;
                keep(Accepted::Root {
                    root: Document { bytes, verified },
                    timestamp,
                    hops,
                })
            }
            State::Snapshot { ask, fresh } => {
                let bytes = ask.body(reply)?;
                let verified = self.accept_snapshot(&fresh, &bytes)?;
                keep(Accepted::Snapshot(Box::new(Chain {
                    root: fresh.root,
                    snapshot: Document { bytes, verified },
                })))
            }
            State::Role {
                ask,
                chain,
                search,
                delegated,
            } => {
                let bytes = ask.body(reply)?;
                let verified = chain.accept_role(&delegated, &bytes)?;
                keep(Accepted::Role {
                    chain,
                    search,
                    role: Document { bytes, verified },
                })
            }
            State::Target { ask, chain, target } => {
                let bytes = ask.body(reply)?;
                let found = G::accept(&target, bytes.clone())?;
                match G::KEPT_AS {
                    Some(name) => keep(Accepted::Target {
                        chain,
                        name,
                        bytes,
                        found,
                    }),
                    None => State::Done {
                        chain,
                        found: Some(found),
                    },
                }
            }
            State::Keep(accepted) if reply == Reply::Kept => self.kept(*accepted)?,
            State::Keep(_) => return Err(reply.out_of_turn("to be kept")),
            State::Done { .. } => return Err(reply.out_of_turn("nothing")),
        };
        Ok(self)
    }

    /// Keeps what was just accepted.
    pub fn keep(&self, store: &mut Store) -> anyhow::Result<Reply> {
        let State::Keep(accepted) = &self.state else {
            anyhow::bail!("nothing is to be kept: supply what the refresh wants");
        };
        match &**accepted {
            Accepted::Root { root, .. } => store.keep_root(&root.bytes)?,
            Accepted::Timestamp(Fresh { timestamp, .. }) => {
                store.keep_timestamp(&timestamp.bytes, &timestamp.verified)?;
            }
            Accepted::Snapshot(chain) => {
                store.keep_snapshot(&chain.snapshot.bytes, &chain.snapshot.verified)?;
            }
            Accepted::Role { role, .. } => store.keep_role(role.verified.name(), &role.bytes)?,
            Accepted::Target { name, bytes, .. } => store.keep_target(name, bytes)?,
        }
        Ok(Reply::Kept)
    }

    fn kept(&mut self, accepted: Accepted<G>) -> Result<State<G>, Refusal> {
        self.unchanged &= matches!(accepted, Accepted::Root { .. });
        match accepted {
            Accepted::Root {
                root,
                timestamp,
                hops,
            } => {
                self.root = root.verified;
                self.forget_fallen();
                self.floors = std::mem::take(&mut self.floors).raised_by(&self.root, None, None);
                self.next_root(timestamp, hops + 1)
            }
            Accepted::Timestamp(fresh) => self.after_timestamp(fresh),
            Accepted::Snapshot(chain) => self.search(chain),
            Accepted::Role {
                chain,
                search,
                role,
            } => {
                let name = role.verified.name().to_owned();
                self.held.roles.insert(name, role.bytes);
                self.visit(chain, search, &role.verified)
            }
            Accepted::Target { chain, found, .. } => {
                let found = Some(found);
                Ok(State::Done { chain, found })
            }
        }
    }

    /// A device forgets what did not lead to its goal. An idle poll writes nothing.
    pub fn finish(self, store: &mut Store) -> anyhow::Result<Outcome<G::Found>> {
        let State::Done { found, .. } = self.state else {
            anyhow::bail!("the refresh is not done: supply what it wants first");
        };
        if G::KEPT_AS.is_some() {
            store.forget_all_but(&self.visited, found.is_some())?;
        }
        Ok(Outcome {
            found,
            unchanged: self.unchanged,
        })
    }

    /// When it is done, what it found, and a refresh that looks for something else in the same metadata. `copy` is what may be the
    /// file already.
    pub fn look_for<H: Goal>(
        self,
        goal: H,
        copy: Option<Vec<u8>>,
    ) -> Result<(Option<G::Found>, Refresh<H>), Refusal> {
        let State::Done { chain, found } = self.state else {
            return Err(Refusal::OutOfTurn {
                want: "more of the refresh".to_owned(),
                reply: "another goal",
            });
        };
        let mut refresh = Refresh {
            goal,
            system: self.system,
            built: self.built,
            held: Files {
                target: copy,
                ..self.held
            },
            held_timestamp: self.held_timestamp,
            root: self.root,
            floors: self.floors,
            walked: self.walked,
            visited: self.visited,
            unchanged: self.unchanged,
            state: State::Poll,
        };
        refresh.state = refresh.search(chain)?;
        Ok((found, refresh))
    }

    /// 5.4.1. The copy on the device is the one, whether the server or the bytes say so.
    fn polled(&mut self, reply: Reply) -> Result<State<G>, Refusal> {
        let held = self
            .held
            .timestamp
            .clone()
            .filter(|_| self.held_timestamp.is_some());
        let body = match (reply, &held) {
            (Reply::NotModified, Some(held)) => held.clone(),
            (reply, _) => Ask {
                path: TIMESTAMP.to_owned(),
                limit: verify::TIMESTAMP_LIMIT,
            }
            .body(reply)?,
        };
        if self.walked {
            return self.judge(body);
        }
        if Some(&body) == held.as_ref() {
            match self.judge(body.clone()) {
                Ok(state) if !state.asks_for_top_level() => return Ok(state),
                // It may be a newer root that is missing.
                Ok(_) | Err(_) => {}
            }
        }
        self.next_root(Some(body), 0)
    }

    /// 5.3.3
    fn next_root(&mut self, timestamp: Option<Vec<u8>>, hops: u32) -> Result<State<G>, Refusal> {
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
            Some(_) | None => self.roots_walked(timestamp),
        }
    }

    fn roots_walked(&mut self, timestamp: Option<Vec<u8>>) -> Result<State<G>, Refusal> {
        self.walked = true;
        match timestamp {
            Some(timestamp) => self.judge(timestamp),
            None => {
                // 5.3.10, before the next request.
                self.current_root()?;
                Ok(State::Poll)
            }
        }
    }

    /// 5.3.11, as the store does it.
    fn forget_fallen(&mut self) {
        if self.floors.fall_with(&self.root) {
            self.floors = std::mem::take(&mut self.floors).under(&self.root);
            self.held_timestamp = None;
            self.held.timestamp = None;
            self.held.snapshot = None;
        }
    }

    /// The timestamp, under the newest root there is.
    fn judge(&mut self, bytes: Vec<u8>) -> Result<State<G>, Refusal> {
        let root = self.current_root()?;
        let verified = verify::accept_timestamp(&root, &self.floors, &bytes)?;
        // 5.4.3.1: of two with one version the first is kept, as long as the root's keys still sign for it. The refresh goes on with
        // it, because an earlier one may have ended here.
        if let Some(held) = self.held.timestamp.clone()
            && self.held_timestamp == Some(verified.version)
        {
            match verify::accept_timestamp(&root, &self.floors, &held) {
                Ok(verified) => {
                    let timestamp = Document {
                        bytes: held,
                        verified,
                    };
                    return self.after_timestamp(Fresh { root, timestamp });
                }
                Err(refusal @ Refusal::Expired { .. }) => return Err(refusal),
                Err(_) => {}
            }
        }
        let timestamp = Document { bytes, verified };
        Ok(keep(Accepted::Timestamp(Fresh { root, timestamp })))
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

    fn accept_snapshot(&self, fresh: &Fresh, bytes: &[u8]) -> Result<Verified<Snapshot>, Refusal> {
        verify::accept_snapshot(&fresh.root, &fresh.timestamp.verified, &self.floors, bytes)
    }

    fn after_timestamp(&mut self, fresh: Fresh) -> Result<State<G>, Refusal> {
        if let Some(bytes) = self.held.snapshot.clone()
            && let Some(verified) = usable(self.accept_snapshot(&fresh, &bytes))?
        {
            return self.search(Box::new(Chain {
                root: fresh.root,
                snapshot: Document { bytes, verified },
            }));
        }
        let announced = verify::snapshot_file(&fresh.timestamp.verified)?;
        let ask = Ask {
            path: self.metadata_path("snapshot", announced.version),
            limit: verify::snapshot_limit(&fresh.timestamp.verified)?,
        };
        Ok(State::Snapshot { ask, fresh })
    }

    /// 5.6, from the top-level targets.
    fn search(&mut self, chain: Box<Chain>) -> Result<State<G>, Refusal> {
        let search = Search::new(&chain.root, self.goal.wanted())?;
        self.search_on(chain, search)
    }

    fn search_on(&mut self, chain: Box<Chain>, mut search: Search) -> Result<State<G>, Refusal> {
        let Some(delegated) = search.next_role()? else {
            self.goal.missing(search.visited())?;
            return Ok(State::Done { chain, found: None });
        };
        let name = delegated.name();
        let announced = verify::role_file(&chain.snapshot.verified, name)?;
        if let Some(bytes) = self.held.roles.get(name)
            && let Some(role) = usable(chain.accept_role(&delegated, bytes))?
        {
            return self.visit(chain, search, &role);
        }
        let ask = Ask {
            path: self.metadata_path(name, announced.version),
            limit: verify::targets_limit(&chain.snapshot.verified, name)?,
        };
        Ok(State::Role {
            ask,
            chain,
            search,
            delegated,
        })
    }

    /// 5.6.7.1
    fn visit(
        &mut self,
        chain: Box<Chain>,
        mut search: Search,
        role: &Role,
    ) -> Result<State<G>, Refusal> {
        self.visited.insert(role.name().to_owned());
        let Some(target) = self.goal.sought(role)? else {
            search.descend(role, |delegated| self.goal.leads(delegated));
            return self.search_on(chain, search);
        };
        let file = G::file(&target);
        if let Some(bytes) = self.held.target.clone()
            && verify::accept_target(&file, &bytes).is_ok()
        {
            let found = Some(G::accept(&target, bytes)?);
            return Ok(State::Done { chain, found });
        }
        let ask = Ask {
            path: self.target_path(&file)?,
            limit: verify::limit(&file.path, Some(file.file.length), G::LIMIT)?,
        };
        Ok(State::Target { ask, chain, target })
    }

    /// 5.3.12
    fn metadata_path(&self, role: &str, version: Version) -> String {
        let role = quoted(role);
        if self.root.consistent_snapshot {
            format!("metadata/{version}.{role}.json")
        } else {
            format!("metadata/{role}.json")
        }
    }

    /// 5.7.3
    fn target_path(&self, target: &Target) -> Result<String, Refusal> {
        let segments: Vec<_> = target.path.split('/').map(quoted).collect();
        let path = segments.join("/");
        if !self.root.consistent_snapshot {
            return Ok(format!("targets/{path}"));
        }
        let hashes = &target.file.hashes;
        let hash = hashes
            .get("sha256")
            .or_else(|| hashes.values().next())
            .ok_or_else(|| Refusal::NoHash {
                role: target.path.clone(),
            })?;
        Ok(match path.rsplit_once('/') {
            Some((folder, file)) => format!("targets/{folder}/{hash}.{file}"),
            None => format!("targets/{hash}.{path}"),
        })
    }
}

impl<G: Goal> State<G> {
    fn asks_for_top_level(&self) -> bool {
        match self {
            Self::Snapshot { .. } => true,
            Self::Role { delegated, .. } => delegated.name() == "targets",
            Self::Poll
            | Self::Root { .. }
            | Self::Target { .. }
            | Self::Keep(_)
            | Self::Done { .. } => false,
        }
    }
}

fn keep<G: Goal>(accepted: Accepted<G>) -> State<G> {
    State::Keep(Box::new(accepted))
}

impl Chain {
    fn accept_role(&self, delegated: &Delegated, bytes: &[u8]) -> Result<Role, Refusal> {
        verify::accept_role(&self.root, &self.snapshot.verified, delegated, bytes)
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
