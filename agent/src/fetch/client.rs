//! One server over HTTP/1.1 or HTTP/2, whichever it offers, on one connection that is made when it is needed and kept
//! while it works.
//!
//! Every answer is bounded before it is read: its head in size, its body in bytes, every wait in time. A length that
//! the server states is used only to refuse early.

use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http::header::{self, HeaderName, HeaderValue};
use http::{Request, Response, Uri};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use rustls::ClientConfig;
use tokio::time::{Instant, timeout};

use super::answer::{content_range, plain, range, refusal, stated_length, text, text_of};
use super::connection::{Connection, Meter, tls};
use super::proxy::Proxy;
use super::spool::{Partial, Slot};
use super::url::{Base, check_path};
use super::{Fault, FetchError};
use crate::commit::Sha256;

/// An interrupted transfer is continued at once if the connection brought at least so much more than was ever here;
/// otherwise the caller is told, who waits. A handshake costs some 4 KiB.
pub const WORTH_CONTINUING: u64 = 64 << 10;

/// The body of an answer that is not the file is read up to here to keep the connection, then the connection goes.
const WORTH_DRAINING: u64 = 16 << 10;

/// A connection that was quiet for longer is not used again: whatever translates addresses on the way may have
/// forgotten it without a word, and finding out costs a whole stall.
const WORTH_KEEPING: Duration = Duration::from_secs(20);

const ETAG_LIMIT: usize = 256;

/// How many stalls' time the head of an answer may take, while something comes.
const HEAD_STALLS: u32 = 4;

/// How often a file may be somewhere else, and how long the name of that place may be: object stores sign theirs.
const HOPS: usize = 5;
const LOCATION_LIMIT: usize = 4096;

/// Where the server is and how long to wait for it.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// `https://host[:port]/prefix/`
    pub url: String,
    /// The only authorities to trust, in PEM; without it, those of the system.
    pub ca: Option<PathBuf>,
    /// No byte for so long is a stall.
    pub stall: Duration,
    /// Name lookup, connection and TLS handshake together.
    pub connect: Duration,
    /// Fewer bytes per second than this, over a `stall` of waiting, is too slow. Zero is never.
    pub low_speed: u64,
    /// The device's clock is taken to be no earlier than this when it judges a certificate: a device without a clock
    /// would otherwise find every certificate not valid yet.
    pub floor: jiff::Timestamp,
    /// Permits `http://`, for a bench.
    pub insecure_http: bool,
    /// No more bytes of bodies per second than this. Zero is no cap.
    pub max_rate: u64,
    /// `http://[user:password@]host:port` of a proxy that is asked to CONNECT; without it, what the environment says (`https_proxy`).
    pub proxy: Option<String>,
    /// Hosts, domains and networks that are reached without it, as curl's `no_proxy`.
    pub no_proxy: String,
    /// What shows the server who this is.
    pub identity: Option<Identity>,
    /// Counts the bytes that come over the wire, TLS and all: what is paid for.
    pub received: Arc<AtomicU64>,
}

/// A certificate chain in PEM, and its key.
#[derive(Clone, Debug)]
pub struct Identity {
    pub chain: PathBuf,
    pub key: ClientKey,
}

#[derive(Clone, Debug)]
pub enum ClientKey {
    /// In PEM.
    File(PathBuf),
    /// A command that signs with it, and its arguments.
    Signer(Vec<String>),
}

/// The one server, over a connection that is reused while it works.
pub struct Server {
    base: Base,
    connection: Option<Connection>,
    caller: Arc<Caller>,
}

/// What every request has in common, to whichever host it goes.
pub(super) struct Caller {
    pub(super) config: ServerConfig,
    tls: Arc<ClientConfig>,
    proxy: Proxy,
    user_agent: HeaderValue,
}

/// The answer for a small file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    Body {
        bytes: Bytes,
        etag: Option<String>,
    },
    /// The file is still the one that the entity tag is of.
    NotModified,
    /// There is no such file: 404 or 410, or 403, which an object store answers to those who may not list it.
    NotFound,
}

impl ServerConfig {
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            ca: None,
            stall: Duration::from_secs(30),
            connect: Duration::from_secs(15),
            low_speed: 32,
            floor: jiff::Timestamp::UNIX_EPOCH,
            insecure_http: false,
            max_rate: 0,
            proxy: None,
            no_proxy: String::new(),
            identity: None,
            received: Arc::default(),
        }
    }
}

impl Server {
    /// Reads the configuration and the trusted authorities; connects to nothing. `user_agent` is `offshoot/<version>`.
    pub fn new(config: ServerConfig, user_agent: &str) -> anyhow::Result<Self> {
        let base = Base::parse(&config.url, config.insecure_http)
            .with_context(|| format!("the server's url {:?}", config.url))?;
        let tls = tls(config.ca.as_deref(), config.identity.as_ref(), config.floor)?;
        let proxy = Proxy::new(config.proxy.as_deref(), &config.no_proxy)?;
        let user_agent = HeaderValue::from_str(user_agent)
            .with_context(|| format!("the user agent {user_agent:?}"))?;
        Ok(Self {
            base,
            connection: None,
            caller: Arc::new(Caller {
                config,
                tls: Arc::new(tls),
                proxy,
                user_agent,
            }),
        })
    }

    /// A small file, whole, or an error if it is longer than `limit`. With the `etag` of an earlier answer the server
    /// may say that nothing changed.
    pub async fn small(
        &mut self,
        path: &str,
        limit: u64,
        etag: Option<&str>,
    ) -> Result<Reply, FetchError> {
        let outcome = self.read_small(path, limit, etag).await;
        self.blame(path, outcome)
    }

    /// A file of known length and sha256 into the spool. Continues where an earlier try ended, even one before a
    /// reboot, and at once after a connection that brought enough. `progress` hears how many bytes are in the spool;
    /// the count falls back to zero when they prove wrong. Nothing is asked for when the file is already there.
    pub async fn part(
        &mut self,
        path: &str,
        length: u64,
        sha256: &Sha256,
        slot: &Slot,
        progress: &mut (dyn FnMut(u64) + Send),
    ) -> Result<(), FetchError> {
        let outcome = self.fill(path, length, sha256, slot, progress).await;
        self.blame(path, outcome)
    }

    /// Names the file in an error, and drops the connection on which it happened.
    pub(super) fn blame<T>(
        &mut self,
        path: &str,
        outcome: Result<T, Fault>,
    ) -> Result<T, FetchError> {
        outcome.map_err(|fault| {
            self.connection = None;
            FetchError {
                url: format!("{}{path}", self.base),
                fault,
            }
        })
    }

    async fn read_small(
        &mut self,
        path: &str,
        limit: u64,
        etag: Option<&str>,
    ) -> Result<Reply, Fault> {
        // An entity tag that cannot be a header is one we never returned: ask without it.
        let condition = etag.and_then(|etag| HeaderValue::from_str(etag).ok());
        let conditional = condition.is_some();
        let answer = self
            .ask(path, condition.map(|etag| (header::IF_NONE_MATCH, etag)))
            .await?;
        match answer.status().as_u16() {
            200 => {}
            304 if conditional => {
                self.drain(answer).await;
                return Ok(Reply::NotModified);
            }
            403 | 404 | 410 => {
                self.drain(answer).await;
                return Ok(Reply::NotFound);
            }
            _ => return Err(refusal(&answer)),
        }
        plain(&answer)?;
        let etag = match answer.headers().get(header::ETAG).map(HeaderValue::to_str) {
            Some(Ok(etag)) if etag.len() <= ETAG_LIMIT => Some(etag.to_owned()),
            // Without a tag that can be sent back, the next answer is simply whole.
            Some(_) | None => None,
        };
        if stated_length(answer.headers()).is_some_and(|length| length > limit) {
            return Err(Fault::TooLong { limit });
        }
        let mut flow = self.flow(answer);
        let mut bytes = Vec::new();
        while let Some(chunk) = flow.chunk().await? {
            if (bytes.len() + chunk.len()) as u64 > limit {
                return Err(Fault::TooLong { limit });
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(Reply::Body {
            bytes: bytes.into(),
            etag,
        })
    }

    async fn fill(
        &mut self,
        path: &str,
        length: u64,
        sha256: &Sha256,
        slot: &Slot,
        progress: &mut (dyn FnMut(u64) + Send),
    ) -> Result<(), Fault> {
        let wanted = (slot.clone(), *sha256);
        let found = blocking(move || {
            let (slot, sha256) = wanted;
            Ok(if slot.holds(length, &sha256)? {
                None
            } else {
                Some(slot.resume(length)?)
            })
        });
        let Some(mut partial) = found.await? else {
            progress(length);
            return Ok(());
        };
        // Whether the bytes come from more than one answer, so that a wrong digest may be an old mistake of ours, of
        // the disk's or of an earlier server's, and one fetch from zero is owed.
        let mut stitched = partial.present() > 0;
        let mut owed = true;
        let mut furthest = partial.present();
        loop {
            progress(partial.present());
            if partial.present() < length {
                partial = match self.transfer(path, length, partial, progress).await? {
                    Transfer::Whole(partial) => partial,
                    Transfer::Interrupted(partial, fault) => {
                        if partial.present() < furthest + WORTH_CONTINUING {
                            return Err(fault);
                        }
                        tracing::info!(
                            path,
                            at = partial.present(),
                            "continuing after an interruption"
                        );
                        self.connection = None;
                        furthest = partial.present();
                        stitched = true;
                        partial
                    }
                };
                if partial.present() < length {
                    continue;
                }
            }
            let sha256 = *sha256;
            let mismatch = match blocking(move || Ok(partial.finish(&sha256)?)).await? {
                Ok(()) => return Ok(()),
                Err(mismatch) => mismatch,
            };
            partial = mismatch.partial;
            partial.restart()?;
            if !(stitched && owed) {
                return Err(Fault::WrongDigest {
                    want: sha256,
                    got: mismatch.got,
                });
            }
            tracing::warn!(path, got = %mismatch.got, "the continued file has a wrong digest; fetching it from zero");
            owed = false;
            stitched = false;
            furthest = 0;
        }
    }

    /// Asks for what is missing, once, and adds what comes.
    async fn transfer(
        &mut self,
        path: &str,
        length: u64,
        mut partial: Partial,
        progress: &mut (dyn FnMut(u64) + Send),
    ) -> Result<Transfer, Fault> {
        // Where the server has sent us; the connection to it lasts as long as this file.
        let mut elsewhere: Option<(Base, String)> = None;
        let mut connection = None;
        let mut hops = 0;
        let answer = loop {
            let from = partial.present();
            let range = if from > 0 {
                Some((header::RANGE, range(from)?))
            } else {
                None
            };
            let answer = match &elsewhere {
                None => self.ask(path, range).await,
                Some((base, target)) => self.caller.ask(base, target, &mut connection, range).await,
            };
            let answer = match answer {
                Err(fault @ Fault::Interrupted { .. }) => {
                    return Ok(Transfer::Interrupted(partial, fault));
                }
                answer => answer?,
            };
            match answer.status().as_u16() {
                301 | 302 | 303 | 307 | 308 if hops < HOPS => {
                    hops += 1;
                    let to = text_of(&answer, header::LOCATION, LOCATION_LIMIT);
                    let base = elsewhere.as_ref().map_or(&self.base, |(base, _)| base);
                    let next = base.follow(&to, self.caller.config.insecure_http);
                    let next = next.ok_or_else(|| refusal(&answer))?;
                    tracing::debug!(path, %to, "redirected");
                    if elsewhere.is_none() {
                        self.drain(answer).await;
                    }
                    connection = None;
                    elsewhere = Some(next);
                }
                200 => {
                    // What is encoded has another length, too.
                    plain(&answer)?;
                    if stated_length(answer.headers()).is_some_and(|stated| stated != length) {
                        let got = stated_length(answer.headers()).unwrap_or(0);
                        return Err(Fault::WrongLength { want: length, got });
                    }
                    if from > 0 {
                        tracing::info!(path, "the server ignores ranges; fetching from zero");
                        partial.restart()?;
                    }
                    break answer;
                }
                206 if from > 0 => {
                    match content_range(answer.headers()) {
                        Some((first, last, _)) if (first, last) != (from, length - 1) => {}
                        Some((_, _, total)) if total.is_none_or(|total| total == length) => {
                            break answer;
                        }
                        Some((_, _, total)) => {
                            return Err(Fault::WrongLength {
                                want: length,
                                got: total.unwrap_or(0),
                            });
                        }
                        None => {}
                    }
                    // The next try is a plain one, so that a server that is wrong about ranges only costs bytes.
                    partial.restart()?;
                    let what = format!(
                        "206 to bytes={from}- has Content-Range {:?}",
                        text(&answer, header::CONTENT_RANGE)
                    );
                    return Err(Fault::Malformed { what });
                }
                416 if from > 0 => {
                    partial.restart()?;
                    self.drain(answer).await;
                }
                _ => return Err(refusal(&answer)),
            }
        };
        plain(&answer)?;
        let mut flow = self.flow(answer);
        loop {
            let chunk = match flow.chunk().await {
                Ok(Some(chunk)) => chunk,
                Ok(None) if partial.present() == length => return Ok(Transfer::Whole(partial)),
                Ok(None) => {
                    return Err(Fault::WrongLength {
                        want: length,
                        got: partial.present(),
                    });
                }
                Err(fault @ Fault::Interrupted { .. }) => {
                    return Ok(Transfer::Interrupted(partial, fault));
                }
                Err(fault) => return Err(fault),
            };
            if !partial.append(&chunk)? {
                return Err(Fault::TooLong { limit: length });
            }
            progress(partial.present());
            if partial.wants_checkpoint() {
                partial = blocking(move || Ok(partial.checkpoint()?)).await?;
            }
        }
    }

    async fn ask(
        &mut self,
        path: &str,
        extra: Option<(HeaderName, HeaderValue)>,
    ) -> Result<Response<Incoming>, Fault> {
        check_path(path)?;
        let target = format!("{}{path}", self.base.prefix);
        self.caller
            .ask(&self.base, &target, &mut self.connection, extra)
            .await
    }

    /// A connection that can be used now, made if there is none.
    pub(super) async fn connect(&mut self) -> Result<&Connection, Fault> {
        let kept = self.connection.take();
        let kept = kept.filter(|connection| connection.used.elapsed() < WORTH_KEEPING);
        let connection = match kept {
            Some(connection) => connection,
            None => self.caller.connect(&self.base).await?,
        };
        Ok(self.connection.insert(connection))
    }

    /// What requests in flight share.
    pub(super) fn shared(&self) -> (Arc<Caller>, &Base) {
        (self.caller.clone(), &self.base)
    }

    fn flow(&self, answer: Response<Incoming>) -> Flow {
        Flow::new(answer, &self.caller.config)
    }

    /// Reads what is left of an answer that is not needed, so that the connection can be kept; too much, and it goes.
    async fn drain(&mut self, answer: Response<Incoming>) {
        let mut flow = self.flow(answer);
        loop {
            match flow.chunk().await {
                Ok(None) => return,
                Ok(Some(_)) if flow.got <= WORTH_DRAINING => {}
                Ok(Some(_)) | Err(_) => {
                    self.connection = None;
                    return;
                }
            }
        }
    }
}

impl Caller {
    /// Sends a request and waits for the head of its answer. A kept connection may have been closed by the server just
    /// then; that alone is tried again at once.
    async fn ask(
        &self,
        base: &Base,
        target: &str,
        kept_connection: &mut Option<Connection>,
        extra: Option<(HeaderName, HeaderValue)>,
    ) -> Result<Response<Incoming>, Fault> {
        loop {
            let (mut connection, kept) = match kept_connection.take() {
                Some(connection) if connection.used.elapsed() < WORTH_KEEPING => (connection, true),
                Some(_) | None => (self.connect(base).await?, false),
            };
            let request =
                self.request(base, target, connection.sender.is_http2(), extra.clone())?;
            match self.head(connection.send(request)).await {
                Err(Fault::Interrupted { .. }) if kept => {}
                Err(fault) => return Err(fault),
                Ok(answer) => {
                    connection.used = Instant::now();
                    *kept_connection = Some(connection);
                    tracing::debug!(target, status = answer.status().as_u16(), "answered");
                    return Ok(answer);
                }
            }
        }
    }

    /// Waits for the head of an answer for as long as something comes, and no longer than [`HEAD_STALLS`]: it may share a piece of 16 KiB with
    /// what follows it.
    pub(super) async fn head<T>(
        &self,
        answer: impl Future<Output = Result<T, Fault>>,
    ) -> Result<T, Fault> {
        let ServerConfig {
            stall, received, ..
        } = &self.config;
        let mut answer = pin!(answer);
        let mut already = received.load(Ordering::Relaxed);
        for _ in 0..HEAD_STALLS {
            if let Ok(outcome) = timeout(*stall, answer.as_mut()).await {
                return outcome;
            }
            let now = received.load(Ordering::Relaxed);
            if now == already {
                break;
            }
            already = now;
        }
        Err(Fault::Stalled { after: *stall })
    }

    async fn connect(&self, base: &Base) -> Result<Connection, Fault> {
        let ServerConfig {
            connect, received, ..
        } = &self.config;
        Connection::to(base, &self.tls, &self.proxy, *connect, received).await
    }

    pub(super) fn request(
        &self,
        base: &Base,
        target: &str,
        http2: bool,
        extra: Option<(HeaderName, HeaderValue)>,
    ) -> Result<Request<Empty<Bytes>>, Fault> {
        let Base {
            scheme, authority, ..
        } = base;
        let bad = || Fault::BadPath {
            path: target.to_owned(),
        };
        let uri = if http2 {
            format!("{scheme}://{authority}{target}")
        } else {
            target.to_owned()
        };
        let uri: Uri = uri.parse().map_err(|_| bad())?;
        let mut request = Request::new(Empty::new());
        *request.uri_mut() = uri;
        let headers = request.headers_mut();
        if !http2 {
            let host = HeaderValue::from_str(authority.as_str());
            headers.insert(header::HOST, host.map_err(|_| bad())?);
        }
        headers.insert(header::USER_AGENT, self.user_agent.clone());
        headers.insert(
            header::ACCEPT_ENCODING,
            HeaderValue::from_static("identity"),
        );
        headers.extend(extra);
        Ok(request)
    }
}

/// How a transfer ended that did not end in an error.
enum Transfer {
    Whole(Partial),
    Interrupted(Partial, Fault),
}

/// The body of an answer, with the stall and low-speed timers. Only waiting counts, so that a slow disk is not mistaken
/// for a slow server; and what counts is what comes over the wire, because a piece of TLS or HTTP/2 is 16 KiB, which takes its time on
/// a slow link and is seen only when it is whole.
pub(super) struct Flow {
    body: Incoming,
    got: u64,
    stall: Duration,
    low_speed: u64,
    waited: Duration,
    max_rate: u64,
    /// When the bytes that came are paid for, at `max_rate`.
    paid: Instant,
    received: Arc<AtomicU64>,
    /// What had been received when the low-speed window began.
    before: u64,
    meter: Arc<Meter>,
}

impl Flow {
    pub(super) fn new(answer: Response<Incoming>, config: &ServerConfig) -> Self {
        let ServerConfig {
            stall,
            low_speed,
            max_rate,
            ..
        } = *config;
        Self {
            got: 0,
            stall,
            low_speed,
            waited: Duration::ZERO,
            max_rate,
            paid: Instant::now(),
            received: config.received.clone(),
            before: config.received.load(Ordering::Relaxed),
            meter: Meter::of(&answer),
            body: answer.into_body(),
        }
    }

    pub(super) async fn chunk(&mut self) -> Result<Option<Bytes>, Fault> {
        loop {
            // What is not read holds the sender up. Our own pause is not the server's stall.
            tokio::time::sleep_until(self.paid).await;
            let since = Instant::now();
            let already = self.received.load(Ordering::Relaxed);
            let frame = timeout(self.stall, self.body.frame()).await;
            self.waited += since.elapsed();
            let received = self.received.load(Ordering::Relaxed);
            let data = match frame {
                Err(_) if received == already => {
                    return Err(Fault::Stalled { after: self.stall });
                }
                // A piece is on its way.
                Err(_) => Bytes::new(),
                Ok(None) => return Ok(None),
                Ok(Some(Err(error))) => return Err(self.meter.broken(&error, self.got)),
                // Trailers say nothing that is wanted.
                Ok(Some(Ok(frame))) => frame.into_data().unwrap_or_default(),
            };
            self.got += data.len() as u64;
            self.meter.took(data.len() as u64);
            if self.max_rate > 0 {
                let share = data.len() as f64 / self.max_rate as f64;
                self.paid = self.paid.max(since) + Duration::from_secs_f64(share);
            }
            if self.waited >= self.stall {
                let in_window = received - self.before;
                if u128::from(in_window) * 1000
                    < u128::from(self.low_speed) * self.waited.as_millis()
                {
                    return Err(Fault::TooSlow {
                        floor: self.low_speed,
                    });
                }
                self.waited = Duration::ZERO;
                self.before = received;
            }
            if !data.is_empty() {
                return Ok(Some(data));
            }
        }
    }
}

/// Runs what waits for the disk where it holds up nothing else.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Fault> + Send + 'static,
) -> Result<T, Fault> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(ended) => match ended.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is going down, and this future with it.
            Err(_) => Err(Fault::Interrupted { got: 0 }),
        },
    }
}
