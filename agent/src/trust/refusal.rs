//! Why a piece of metadata was refused: one variant per rule, with the numbers and names that a test and an operator need.
//!
//! Roles are named as in file names: `root`, `timestamp`, `snapshot`, `targets`, or the channel's name. Each text ends with the remedy.

use jiff::Timestamp;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    // The bytes.
    #[error("JSON is not UTF-8 from byte {at}: publish the file again")]
    NotUtf8 { at: usize },
    #[error("JSON is broken at line {line}, column {column}: publish the file again")]
    NotJson { line: usize, column: usize },
    #[error("JSON has bytes after its end: publish the file again")]
    TrailingBytes,
    #[error("JSON object has the key {key:?} twice: sign the file again with each key once")]
    DuplicateKey { key: String },
    #[error(
        "JSON has the number {number}, which is not a 64-bit integer: sign the file again with integers only"
    )]
    NotAnInteger { number: String },
    #[error("JSON is nested deeper than {limit}: sign a flatter file")]
    TooDeep { limit: usize },

    // The documents.
    #[error("{role} metadata does not fit the TUF schema: {why}; sign the file again")]
    Malformed { role: String, why: String },
    #[error("{role} metadata has _type {got:?}: publish a {want:?} file under that name")]
    WrongType {
        role: String,
        want: String,
        got: String,
    },
    #[error("{role} metadata has spec_version {got:?}: this device reads 1.x, sign it as that")]
    UnknownSpec { role: String, got: String },
    #[error("root does not define the role {role}: sign a root that does")]
    NoSuchRole { role: String },
    #[error(
        "the role {role} lists the key id {keyid} twice: sign its delegator again with each key id once"
    )]
    DuplicateKeyId { role: String, keyid: String },
    #[error(
        "the role {role} has a threshold of {threshold} over {keys} keys: sign its delegator again with 1 to {keys}"
    )]
    BadThreshold {
        role: String,
        threshold: u64,
        keys: usize,
    },

    #[error("{role} metadata delegates twice to {name:?}: sign it again with each role once")]
    DuplicateDelegation { role: String, name: String },
    #[error(
        "{role} metadata delegates to {name:?}, which no role may be called: use another name, of at most 64 bytes"
    )]
    BadRoleName { role: String, name: String },
    #[error(
        "{role} metadata delegates to {name:?} both by paths and by path_hash_prefixes: sign it again with one of them"
    )]
    TwoScopes { role: String, name: String },

    // The signatures.
    #[error("{role} metadata has two signatures of the key id {keyid}: sign it once with each key")]
    DuplicateSignature { role: String, keyid: String },
    #[error(
        "{role} metadata is signed by {have} of the {need} keys it needs: sign it with more keys of the role, or rotate the root"
    )]
    BelowThreshold { role: String, have: u64, need: u64 },

    // Versions and time.
    #[error("root goes from version {have} to {got}: publish version {have} + 1")]
    RootNotSequential { have: u64, got: u64 },
    #[error(
        "{role} metadata went back from version {have} to {got}: publish a version above {have}"
    )]
    RolledBack { role: String, have: u64, got: u64 },
    #[error(
        "snapshot no longer lists {role}, which had version {have}: publish a snapshot that lists it"
    )]
    RoleVanished { role: String, have: u64 },
    #[error(
        "{role} metadata has version {got} where version {want} was announced: publish the announced version"
    )]
    WrongVersion { role: String, want: u64, got: u64 },
    #[error(
        "{role} metadata expired at {expires}, and it is {now}: refresh the repository's metadata, or set the device's clock"
    )]
    Expired {
        role: String,
        expires: Timestamp,
        now: Timestamp,
    },

    // Bytes against what was announced.
    #[error("{role} is longer than {limit} bytes: publish a smaller file")]
    TooLong { role: String, limit: u64 },
    #[error("{role} has {got} bytes where {want} were announced: publish the announced file")]
    WrongLength { role: String, want: u64, got: u64 },
    #[error("{role} has the digest {got} where {want} was announced: publish the announced file")]
    WrongDigest {
        role: String,
        want: String,
        got: String,
    },
    #[error("{role} is announced with the hash {algorithm:?}: announce sha256 or sha512")]
    UnknownHash { role: String, algorithm: String },

    #[error("{role} is announced without a hash: announce its sha256")]
    NoHash { role: String },

    // Targets, channels and releases.
    #[error("no role that may sign for it has {path:?}: publish it, or ask for another path")]
    NoSuchTarget { path: String },
    #[error("the search for {wanted} has seen {limit} roles: delegate in a flatter way")]
    TooManyRoles { wanted: String, limit: usize },
    #[error(
        "targets do not delegate the channel {channel}: publish the channel, or change `channel` in the configuration"
    )]
    NoSuchChannel { channel: String },
    #[error("snapshot does not list {role}: publish a snapshot that lists it")]
    NotInSnapshot { role: String },
    #[error(
        "{path} is outside of what the channel {channel} may sign: publish it in the channel's own folder"
    )]
    NotDelegated { channel: String, path: String },
    #[error(
        "{path} and {other} have the same serial {serial}: publish one of them with a greater serial"
    )]
    AmbiguousSerial {
        path: String,
        other: String,
        serial: u64,
    },
    #[error(
        "{path} says that {what} is {got:?}, and {want:?} was signed for: publish the release again"
    )]
    MixedUp {
        path: String,
        what: &'static str,
        want: String,
        got: String,
    },
    #[error(
        "{path} has format {got}, and this device reads {want}: update the device through an older release first"
    )]
    UnknownFormat { path: String, want: u64, got: u64 },

    // The refresh.
    #[error("the server has no {path}: publish the repository completely")]
    Missing { path: String },
    #[error("the transport answered {reply} to {want}: check the caches and proxies on the way")]
    OutOfTurn { want: String, reply: &'static str },
}

impl Refusal {
    /// The rule's name, as in JSON and the journal's `FAULT`.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::NotUtf8 { .. } => "not-utf8",
            Self::NotJson { .. } => "not-json",
            Self::TrailingBytes => "trailing-bytes",
            Self::DuplicateKey { .. } => "duplicate-key",
            Self::NotAnInteger { .. } => "not-an-integer",
            Self::TooDeep { .. } => "too-deep",
            Self::Malformed { .. } => "malformed",
            Self::WrongType { .. } => "wrong-type",
            Self::UnknownSpec { .. } => "unknown-spec",
            Self::NoSuchRole { .. } => "no-such-role",
            Self::DuplicateKeyId { .. } => "duplicate-key-id",
            Self::BadThreshold { .. } => "bad-threshold",
            Self::DuplicateDelegation { .. } => "duplicate-delegation",
            Self::BadRoleName { .. } => "bad-role-name",
            Self::TwoScopes { .. } => "two-scopes",
            Self::DuplicateSignature { .. } => "duplicate-signature",
            Self::BelowThreshold { .. } => "below-threshold",
            Self::RootNotSequential { .. } => "root-not-sequential",
            Self::RolledBack { .. } => "rolled-back",
            Self::RoleVanished { .. } => "role-vanished",
            Self::WrongVersion { .. } => "wrong-version",
            Self::Expired { .. } => "expired",
            Self::TooLong { .. } => "too-long",
            Self::WrongLength { .. } => "wrong-length",
            Self::WrongDigest { .. } => "wrong-digest",
            Self::UnknownHash { .. } => "unknown-hash",
            Self::NoHash { .. } => "no-hash",
            Self::NoSuchTarget { .. } => "no-such-target",
            Self::TooManyRoles { .. } => "too-many-roles",
            Self::NoSuchChannel { .. } => "no-such-channel",
            Self::NotInSnapshot { .. } => "not-in-snapshot",
            Self::NotDelegated { .. } => "not-delegated",
            Self::AmbiguousSerial { .. } => "ambiguous-serial",
            Self::MixedUp { .. } => "mixed-up",
            Self::UnknownFormat { .. } => "unknown-format",
            Self::Missing { .. } => "missing",
            Self::OutOfTurn { .. } => "out-of-turn",
        }
    }
}
