//! Bytes from the server to the spool.
//!
//! Owns the connection to a server ([`Server`]), the choice between mirrors and directories ([`Source`]), what can go wrong with it sorted by who is to blame ([`Fault`]),
//! how long to wait before asking again ([`Backoff`], [`poll_delay`]), and the directory that holds what is being
//! fetched ([`Spool`], whose header says what a power cut leaves).
//!
//! Trusts nothing that the server says: a file is what its signed length and digest say, and everything else is cut
//! short. Does not read a byte of what it fetches, choose what to fetch, or sleep.
//!
//! # Why no `If-Range`?
//! Every large file is named by a signed digest, so the digest decides whether the halves belong together. Entity tags
//! differ between the edges of many networks for the same bytes; a tag that differs would throw away a good half and
//! pay for it twice. The price is one more download of a file that changed under its name, which is a broken server.
//!
//! # Why are redirects followed for content only?
//! A file with a signed digest is the same wherever it comes from, and object stores answer with a place elsewhere. Metadata is asked for at the
//! place that the operator meant: a redirect there hides a second host and a round trip in every poll of every device, and the remedy
//! is to configure the place that it points to.

use std::fmt;
use std::io;
use std::time::Duration;

use crate::commit::Sha256;

mod answer;
mod client;
mod connection;
mod directory;
mod many;
mod proxy;
mod signer;
mod source;
mod spool;
mod url;

pub use client::{ClientKey, Identity, Reply, Server, ServerConfig, WORTH_CONTINUING};
pub use directory::Directory;
pub use many::Wanted;
pub use source::Source;
pub use spool::{Name, NotAName, Slot, Spool, SpoolError};
pub use url::BadUrl;

/// A file could not be fetched: which, and whose fault it is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{url}: {fault}")]
pub struct FetchError {
    pub url: String,
    pub fault: Fault,
}

/// What went wrong, nearest the device first.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The device's own disk.
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// The path cannot be part of a URL as it stands.
    #[error(
        "{path:?} is not a relative path of plain segments; nothing was asked for, correct the release that names it"
    )]
    BadPath { path: String },
    /// The network between, or a server that is not there.
    #[error("{phase} failed: {kind}; check the address, the network and the server")]
    Unreachable { phase: Phase, kind: io::ErrorKind },
    /// The server's certificate, or the device's clock or trust in it.
    #[error("the server's certificate was refused: {0}")]
    Tls(TlsFault),
    /// The client's key, which is not a file.
    #[error("the client's key did not sign: {what}; try `server.identity.signer` by hand")]
    NotSigned { what: String },
    /// The proxy that the configuration names.
    #[error("the proxy answered {code} to CONNECT; {}", proxy_remedy(*.code))]
    Proxy { code: u16 },
    /// Nothing arrived for this long.
    #[error("no byte came for {after:?}; a later try continues from here")]
    Stalled { after: Duration },
    /// Something arrived, but slower than is worth the connection.
    #[error(
        "fewer than {floor} bytes/s came; a later try continues from here, or lower the limit for this link"
    )]
    TooSlow { floor: u64 },
    /// The connection ended in the middle of an answer.
    #[error("the connection ended after {got} bytes; a later try continues from here")]
    Interrupted { got: u64 },
    /// Much more came than was asked for, and it carried nothing.
    #[error("{bytes} bytes came on the connection, most of them for nothing; look for tampering")]
    Flooded { bytes: u64 },
    /// The server answered, but not with the file.
    #[error("the server answered {code}{}; {}", Wait(*.retry_after), remedy(*.code))]
    Status {
        code: u16,
        retry_after: Option<Duration>,
    },
    #[error(
        "the server redirects to {to:?}, which is not followed for metadata, too often, or to what is not https; configure that address instead"
    )]
    Redirected { to: String },
    #[error(
        "the server sent it with Content-Encoding {encoding:?}; serve the files exactly as published"
    )]
    Encoded { encoding: String },
    #[error("the answer is not correct HTTP: {what}; check the server and any proxy before it")]
    Malformed { what: String },
    /// What the server has under this name is not what was signed.
    #[error("the server sends more than {limit} bytes; publish again, or look for tampering")]
    TooLong { limit: u64 },
    #[error(
        "the file has {got} bytes where {want} were signed; publish again, or look for tampering"
    )]
    WrongLength { want: u64, got: u64 },
    #[error(
        "the file has sha256 {got} where {want} was signed; publish again, or look for tampering"
    )]
    WrongDigest { want: Sha256, got: Sha256 },
}

/// How far a connection got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Resolve,
    Connect,
    Handshake,
    /// Of a directory.
    Read,
}

/// Why a certificate was refused. The clock is told apart, because a device whose clock is wrong mends itself otherwise
/// than one whose server is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TlsFault {
    #[error("it is not valid yet; the device's clock may be behind")]
    NotYetValid,
    #[error("it has expired; renew it, or the device's clock is ahead")]
    Expired,
    #[error("it is for another name; correct the configured address or the certificate")]
    WrongName,
    #[error("no trusted authority signed it; correct the configured CA or the certificate")]
    Untrusted,
    #[error("{0}; check the server's TLS configuration")]
    Other(String),
}

impl FetchError {
    /// It is the file that is wrong or not there, not the way to it: the next try will find the same.
    pub fn is_of_the_file(&self) -> bool {
        matches!(
            self.fault,
            Fault::TooLong { .. }
                | Fault::WrongLength { .. }
                | Fault::WrongDigest { .. }
                | Fault::Status {
                    code: 404 | 410,
                    ..
                }
        )
    }

    /// How long the server asked to be left alone.
    pub fn retry_after(&self) -> Option<Duration> {
        match &self.fault {
            Fault::Status { retry_after, .. } => *retry_after,
            Fault::Spool(_)
            | Fault::BadPath { .. }
            | Fault::Unreachable { .. }
            | Fault::Tls(_)
            | Fault::NotSigned { .. }
            | Fault::Proxy { .. }
            | Fault::Stalled { .. }
            | Fault::TooSlow { .. }
            | Fault::Interrupted { .. }
            | Fault::Flooded { .. }
            | Fault::Redirected { .. }
            | Fault::Encoded { .. }
            | Fault::Malformed { .. }
            | Fault::TooLong { .. }
            | Fault::WrongLength { .. }
            | Fault::WrongDigest { .. } => None,
        }
    }
}

impl Fault {
    /// As in JSON and the journal's `FAULT`.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Spool(SpoolError::NoSpace { .. }) => "no-space",
            Self::Spool(SpoolError::Io { .. }) => "spool",
            Self::BadPath { .. } => "bad-path",
            Self::Unreachable { .. } => "unreachable",
            Self::Tls(_) => "tls",
            Self::NotSigned { .. } => "not-signed",
            Self::Proxy { .. } => "proxy",
            Self::Stalled { .. } => "stalled",
            Self::TooSlow { .. } => "too-slow",
            Self::Interrupted { .. } => "interrupted",
            Self::Flooded { .. } => "flooded",
            Self::Status { .. } => "status",
            Self::Redirected { .. } => "redirected",
            Self::Encoded { .. } => "encoded",
            Self::Malformed { .. } => "malformed",
            Self::TooLong { .. } => "too-long",
            Self::WrongLength { .. } => "wrong-length",
            Self::WrongDigest { .. } => "wrong-digest",
        }
    }
}

/// Full-jitter exponential backoff: after the n-th failure in a row a random share of `base * 2^n`, at most `cap`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backoff {
    pub base: Duration,
    pub cap: Duration,
    failures: u32,
}

impl Backoff {
    /// A server may not silence a device for longer than this, whatever its `Retry-After` says.
    pub const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(24 * 60 * 60);

    pub const fn new(base: Duration, cap: Duration) -> Self {
        Self {
            base,
            cap,
            failures: 0,
        }
    }

    /// The wait after one more failure. `random` is uniform; `retry_after` is a lower bound, and the jitter is added to
    /// it, because a server that sends everybody away for a minute does not want everybody back in the same second.
    pub fn failed(&mut self, random: u64, retry_after: Option<Duration>) -> Duration {
        let span = self
            .base
            .saturating_mul(2u32.saturating_pow(self.failures))
            .min(self.cap);
        self.failures = self.failures.saturating_add(1);
        let bound = retry_after
            .unwrap_or(Duration::ZERO)
            .min(Self::LONGEST_RETRY_AFTER);
        bound + share(span, random)
    }

    /// Forgets the failures: something worked.
    pub fn worked(&mut self) {
        self.failures = 0;
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self::new(Duration::from_secs(1), Duration::from_secs(60 * 60))
    }
}

/// The wait until the next poll: `interval` give or take a tenth, so that devices started together drift apart.
pub fn poll_delay(interval: Duration, random: u64) -> Duration {
    interval - interval / 10 + share(interval / 5, random)
}

/// The part of `span` that `random` is of all numbers: zero up to but not including `span`.
fn share(span: Duration, random: u64) -> Duration {
    let nanos = (span.as_nanos() * u128::from(random)) >> 64;
    Duration::new(
        (nanos / 1_000_000_000) as u64,
        (nanos % 1_000_000_000) as u32,
    )
}

fn remedy(code: u16) -> &'static str {
    match code {
        401 | 403 | 407 => "permit this device to read it",
        404 | 410 => "publish it again",
        429 | 500..=599 => "the server is busy or broken, a later try may do better",
        _ => "check what this address serves",
    }
}

fn proxy_remedy(code: u16) -> &'static str {
    match code {
        401 | 407 => "put a user and a password that it knows into its URL",
        403 => "permit this device to reach the server through it, or add the server to no_proxy",
        502..=504 => "it does not reach the server",
        _ => "check its address",
    }
}

struct Wait(Option<Duration>);

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(wait) => write!(f, " and asks to wait {} s", wait.as_secs()),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Resolve => "looking up the server's name",
            Self::Connect => "connecting to the server",
            Self::Handshake => "the TLS handshake",
            Self::Read => "reading the directory",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HALF: u64 = 1 << 63;

    #[test]
    fn backoff_doubles_up_to_the_cap_and_starts_again_after_success() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
        let halves: Vec<u128> = (0..9)
            .map(|_| backoff.failed(HALF, None).as_millis())
            .collect();
        assert_eq!(
            halves,
            [500, 1000, 2000, 4000, 8000, 16000, 30000, 30000, 30000]
        );
        backoff.worked();
        assert_eq!(backoff.failed(HALF, None), Duration::from_millis(500));
    }

    #[test]
    fn backoff_never_overflows_and_stays_below_its_cap() {
        let mut backoff = Backoff::default();
        for _ in 0..100 {
            assert!(backoff.failed(u64::MAX, None) < Duration::from_secs(3600));
        }
        let mut patient = Backoff::new(Duration::from_secs(u64::MAX / 2), Duration::from_secs(7));
        assert_eq!(patient.failed(0, None), Duration::ZERO);
        assert_eq!(patient.failed(HALF, None), Duration::from_millis(3500));
    }

    #[test]
    fn retry_after_is_a_lower_bound_that_keeps_its_jitter_and_is_itself_bounded() {
        let minute = Some(Duration::from_secs(60));
        let mut backoff = Backoff::default();
        assert_eq!(backoff.failed(0, minute), Duration::from_secs(60));
        assert_eq!(backoff.failed(HALF, minute), Duration::from_secs(61));
        assert_eq!(
            backoff.failed(0, Some(Duration::MAX)),
            Backoff::LONGEST_RETRY_AFTER
        );
    }

    #[test]
    fn poll_delay_is_the_interval_give_or_take_a_tenth() {
        let interval = Duration::from_secs(600);
        assert_eq!(poll_delay(interval, 0), Duration::from_secs(540));
        assert_eq!(poll_delay(interval, HALF), interval);
        assert_eq!(poll_delay(interval, u64::MAX).as_secs(), 659);
        assert_eq!(poll_delay(Duration::ZERO, u64::MAX), Duration::ZERO);
    }
}
