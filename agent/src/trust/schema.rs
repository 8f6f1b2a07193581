//! The documents of a repository, for the device to read and for the operator's tool to write.
//!
//! A signature covers the canonical form of the `signed` *value*, not of these structs, so fields that are unknown here stay signed.
//! Does not decide what to believe: that is [`super::verify`].

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use jiff::Timestamp as Time;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Refusal, canonical};
use crate::commit::{Commit, Sha256};

/// What this code writes as `spec_version`; it reads every 1.x.
pub const SPEC_VERSION: &str = "1.0.34";

/// The format of an entry's `custom.offshoot` and of the release manifest.
pub const FORMAT: u64 = 1;

/// The file: `signed` is kept as it was parsed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Envelope {
    pub signatures: Vec<Signature>,
    pub signed: Value,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signature {
    pub keyid: String,
    /// Hexadecimal digits.
    pub sig: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    pub keytype: String,
    pub scheme: String,
    pub keyval: KeyValue,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyValue {
    /// Hexadecimal digits (ed25519), or SubjectPublicKeyInfo in PEM (ecdsa, rsa). Kinds of keys that are unknown here may have none.
    #[serde(default)]
    pub public: String,
}

/// Who signs for a role, and how many of them it takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoleKeys {
    pub keyids: Vec<String>,
    pub threshold: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "_type", rename = "root")]
pub struct Root {
    pub spec_version: String,
    pub version: Version,
    #[serde(with = "time")]
    pub expires: Time,
    #[serde(default)]
    pub consistent_snapshot: bool,
    pub keys: BTreeMap<String, Key>,
    pub roles: BTreeMap<String, RoleKeys>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "_type", rename = "timestamp")]
pub struct Timestamp {
    pub spec_version: String,
    pub version: Version,
    #[serde(with = "time")]
    pub expires: Time,
    /// When it was signed: a lower bound for the clock. Not in TUF, which allows further fields.
    #[serde(
        default,
        with = "time::optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub issued: Option<Time>,
    /// Keyed `snapshot.json`.
    pub meta: BTreeMap<String, MetaFile>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "_type", rename = "snapshot")]
pub struct Snapshot {
    pub spec_version: String,
    pub version: Version,
    #[serde(with = "time")]
    pub expires: Time,
    /// Keyed `targets.json`, `<channel>.json`.
    pub meta: BTreeMap<String, MetaFile>,
}

/// The top-level targets, or a channel's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "_type", rename = "targets")]
pub struct Targets {
    pub spec_version: String,
    pub version: Version,
    #[serde(with = "time")]
    pub expires: Time,
    pub targets: BTreeMap<String, TargetFile>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delegations: Option<Delegations>,
}

/// A metadata file as another metadata file announces it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetaFile {
    pub version: Version,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub length: Option<u64>,
    /// By algorithm, hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hashes: Option<BTreeMap<String, String>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetFile {
    pub length: u64,
    /// By algorithm, hexadecimal digits.
    pub hashes: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub custom: Option<Value>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delegations {
    pub keys: BTreeMap<String, Key>,
    pub roles: Vec<Delegation>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delegation {
    pub name: String,
    #[serde(flatten)]
    pub signers: RoleKeys,
    #[serde(default)]
    pub terminating: bool,
    /// Patterns in which `*` stands for any characters but `/`, and `?` for one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub paths: Vec<String>,
    /// Instead of `paths`: how the sha256 of a target's path begins, in hexadecimal digits.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub path_hash_prefixes: Vec<String>,
}

/// `custom.offshoot` of the target `<channel>/<hardware>/<version>.commit`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Custom {
    pub format: u64,
    pub version: ReleaseVersion,
    pub serial: u64,
    pub hardware: Vec<HardwareId>,
    pub manifest: Digested,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Digested {
    pub length: u64,
    pub sha256: Sha256,
}

/// The release manifest: not signed itself, but named by digest in the entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub format: u64,
    pub commit: Commit,
    pub version: ReleaseVersion,
    pub hardware: HardwareId,
    pub deltas: Vec<Delta>,
    /// Every object of the release, one by one, for a device that no delta is for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub objects: Option<Objects>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Objects {
    /// [`crate::objects`]
    pub index: File,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Delta {
    /// `None`: from nothing.
    pub from: Option<Commit>,
    /// A former release, on the way to this one; `None`: this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<Commit>,
    /// The bytes it unpacks to.
    pub usize: u64,
    pub superblock: File,
    pub parts: Vec<File>,
}

/// A file on the server; `path` is relative to its root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    pub path: TargetPath,
    pub length: u64,
    pub sha256: Sha256,
}

/// The bytes that the signatures of `signed` cover.
pub fn sign_bytes(signed: &Value) -> Result<Vec<u8>, Refusal> {
    canonical::to_bytes(signed)
}

impl Envelope {
    /// An envelope that nobody has signed yet.
    pub fn unsigned<T: Serialize>(signed: &T) -> Result<Self, Refusal> {
        Ok(Self {
            signatures: Vec::new(),
            signed: to_value(signed)?,
        })
    }

    pub fn sign_bytes(&self) -> Result<Vec<u8>, Refusal> {
        sign_bytes(&self.signed)
    }

    /// The file.
    pub fn to_bytes(&self) -> Result<Vec<u8>, Refusal> {
        serde_json::to_vec(self).map_err(|error| malformed("envelope", error))
    }

    /// Reads the file of `role`; unknown fields of the envelope are ignored, those of `signed` are kept.
    pub fn parse(role: &str, bytes: &[u8]) -> Result<Self, Refusal> {
        from_value(role, canonical::parse(bytes)?)
    }
}

impl Key {
    pub fn ed25519(public: &[u8; 32]) -> Self {
        let public = public.iter().map(|byte| format!("{byte:02x}")).collect();
        Self {
            keytype: "ed25519".to_owned(),
            scheme: "ed25519".to_owned(),
            keyval: KeyValue { public },
        }
    }

    /// The key id that is written; one that is read is any string.
    pub fn keyid(&self) -> Result<String, Refusal> {
        Ok(Sha256::of(&canonical::to_bytes(&to_value(self)?)?).to_string())
    }
}

impl TargetFile {
    pub fn of(bytes: &[u8]) -> Self {
        let hashes = BTreeMap::from([("sha256".to_owned(), Sha256::of(bytes).to_string())]);
        Self {
            length: bytes.len() as u64,
            hashes,
            custom: None,
        }
    }

    pub fn with_custom(mut self, custom: &Custom) -> Result<Self, Refusal> {
        let members = serde_json::Map::from_iter([("offshoot".to_owned(), to_value(custom)?)]);
        self.custom = Some(members.into());
        Ok(self)
    }
}

impl Manifest {
    /// The file: canonical JSON, so that one manifest has one digest.
    pub fn to_bytes(&self) -> Result<Vec<u8>, Refusal> {
        canonical::to_bytes(&to_value(self)?)
    }
}

impl Delta {
    /// The bytes to download; `None` if they do not fit 64 bits.
    pub fn download(&self) -> Option<u64> {
        self.parts
            .iter()
            .try_fold(self.superblock.length, |sum, part| {
                sum.checked_add(part.length)
            })
    }
}

pub(super) fn from_value<T: DeserializeOwned>(role: &str, value: Value) -> Result<T, Refusal> {
    serde_json::from_value(value).map_err(|error| malformed(role, error))
}

fn to_value<T: Serialize>(document: &T) -> Result<Value, Refusal> {
    serde_json::to_value(document).map_err(|error| malformed("unsigned", error))
}

fn malformed(role: &str, why: impl ToString) -> Refusal {
    Refusal::Malformed {
        role: role.to_owned(),
        why: why.to_string(),
    }
}

/// A version of a metadata file: at least 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct Version(u64);

/// The name of a channel, which is also the name of its role and of its files.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RoleName(String);

/// A kind of device, as in `<channel>/<hardware>/`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HardwareId(String);

/// What people call a release. It orders nothing: `serial` does.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ReleaseVersion(String);

/// A relative path on the server that stays where it is put, on a disk and in a URL.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TargetPath(String);

/// The text breaks the rule of its kind.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a {kind}: expected {rule}")]
pub struct NotA {
    pub kind: &'static str,
    pub text: String,
    pub rule: &'static str,
}

impl Version {
    pub const FIRST: Self = Self(1);

    pub const fn number(self) -> u64 {
        self.0
    }

    /// `None` past the last 64-bit number.
    pub fn next(self) -> Option<Self> {
        self.0.checked_add(1).map(Self)
    }
}

impl TryFrom<u64> for Version {
    type Error = NotA;

    fn try_from(number: u64) -> Result<Self, NotA> {
        match number {
            0 => Err(NotA {
                kind: "version",
                text: number.to_string(),
                rule: "1 or more",
            }),
            _ => Ok(Self(number)),
        }
    }
}

impl From<Version> for u64 {
    fn from(version: Version) -> Self {
        version.0
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One segment of a path: not empty, not hidden, short enough for a file name with a digest and a suffix around it.
fn is_segment(text: &str, admits: impl Fn(u8) -> bool) -> bool {
    (1..=128).contains(&text.len()) && !text.starts_with('.') && text.bytes().all(admits)
}

fn is_channel(text: &str) -> bool {
    // A channel named as a top-level role would share its files.
    !matches!(
        text,
        "root" | "timestamp" | "snapshot" | "targets" | "mirrors"
    ) && is_segment(
        text,
        |byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-'),
    )
}

fn is_hardware(text: &str) -> bool {
    is_segment(text, |byte| {
        byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-')
    })
}

fn is_release(text: &str) -> bool {
    is_segment(text, |byte| {
        byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-' | b'+' | b'~')
    })
}

fn is_path(text: &str) -> bool {
    let plain =
        |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'\\' | b'%' | b'?' | b'#' | b':');
    text.len() <= 1024
        && text.split('/').all(|segment| {
            !matches!(segment, "" | "." | "..")
                && segment.len() <= 255
                && segment.bytes().all(plain)
        })
}

macro_rules! text {
    ($($name:ident, $kind:literal, $holds:ident, $rule:literal;)*) => {$(
        impl $name {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = NotA;

            fn try_from(text: String) -> Result<Self, NotA> {
                if $holds(&text) { Ok(Self(text)) } else { Err(NotA { kind: $kind, text: text.chars().take(80).collect(), rule: $rule }) }
            }
        }

        impl FromStr for $name {
            type Err = NotA;

            fn from_str(text: &str) -> Result<Self, NotA> {
                text.to_owned().try_into()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    )*};
}

text! {
    RoleName, "channel name", is_channel,
        "1 to 128 of a-z 0-9 . _ -, no leading dot, and not root, timestamp, snapshot, targets or mirrors";
    HardwareId, "hardware id", is_hardware, "1 to 128 of A-Z a-z 0-9 . _ -, no leading dot";
    ReleaseVersion, "release version", is_release, "1 to 128 of A-Z a-z 0-9 . _ - + ~, no leading dot";
    TargetPath, "target path", is_path,
        "at most 1024 printable ASCII characters without \\ % ? # :, in segments of 1 to 255 that are not . or ..";
}

/// `YYYY-MM-DDTHH:MM:SSZ`, and nothing else.
pub mod time {
    use super::*;

    pub fn parse(text: &str) -> Result<Time, NotA> {
        let refuse = || NotA {
            kind: "time",
            text: text.chars().take(80).collect(),
            rule: "YYYY-MM-DDTHH:MM:SSZ",
        };
        let time: Time = text.parse().map_err(|_| refuse())?;
        // The one spelling: the parser admits fractions, offsets and lower case, the writer does not make them.
        if write(time) == text {
            Ok(time)
        } else {
            Err(refuse())
        }
    }

    pub fn write(time: Time) -> String {
        jiff::tz::Offset::UTC
            .to_datetime(time)
            .strftime("%Y-%m-%dT%H:%M:%SZ")
            .to_string()
    }

    pub fn serialize<S: serde::Serializer>(time: &Time, writer: S) -> Result<S::Ok, S::Error> {
        writer.serialize_str(&write(*time))
    }

    pub fn deserialize<'de, D: serde::Deserializer<'de>>(reader: D) -> Result<Time, D::Error> {
        parse(&String::deserialize(reader)?).map_err(serde::de::Error::custom)
    }

    pub mod optional {
        use super::*;

        pub fn serialize<S: serde::Serializer>(
            time: &Option<Time>,
            writer: S,
        ) -> Result<S::Ok, S::Error> {
            time.map(write).serialize(writer)
        }

        pub fn deserialize<'de, D: serde::Deserializer<'de>>(
            reader: D,
        ) -> Result<Option<Time>, D::Error> {
            let text = Option::<String>::deserialize(reader)?;
            text.map(|text| parse(&text))
                .transpose()
                .map_err(serde::de::Error::custom)
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_name_is_what_its_file_can_be_called() {
        let long = "a".repeat(129);
        for good in ["stable", "beta-2", "a.b_c", &long[1..]] {
            assert_eq!(
                good.parse::<RoleName>().map(String::from),
                Ok(good.to_owned())
            );
        }
        for bad in [
            "",
            ".",
            "..",
            ".a",
            "a/b",
            "../a",
            "Stable",
            "a b",
            "a\0",
            "é",
            "root",
            "timestamp",
            "snapshot",
            "targets",
            "mirrors",
            &long,
        ] {
            assert_eq!(
                bad.parse::<RoleName>().map_err(|error| error.kind),
                Err("channel name"),
                "{bad}"
            );
        }
        assert_eq!(
            "Rev.B_x86-64".parse::<HardwareId>().map(String::from),
            Ok("Rev.B_x86-64".to_owned())
        );
        assert_eq!(
            "1.4.0~rc1+b2".parse::<ReleaseVersion>().map(String::from),
            Ok("1.4.0~rc1+b2".to_owned())
        );
        for bad in ["", ".1", "a/b", "a%2f", "a b", "é"] {
            assert_eq!(
                bad.parse::<HardwareId>().map_err(|error| error.kind),
                Err("hardware id"),
                "{bad}"
            );
            assert_eq!(
                bad.parse::<ReleaseVersion>().map_err(|error| error.kind),
                Err("release version"),
                "{bad}"
            );
        }
    }

    #[test]
    fn a_path_stays_below_where_it_is_put() {
        for good in [
            "a",
            "deltas/empty-00/superblock",
            "stable/qemu-x86_64/1.4.0~rc+1.commit",
            "a/..b/.c",
        ] {
            assert_eq!(
                good.parse::<TargetPath>().map(String::from),
                Ok(good.to_owned())
            );
        }
        let long = "a/".repeat(512) + "a";
        for bad in [
            "", "/a", "a/", "a//b", ".", "..", "a/../b", "a/./b", "a\\b", "a%2e", "a\nb", "a b",
            "é", "a?b", "a#b", "http://a", &long,
        ] {
            assert_eq!(
                bad.parse::<TargetPath>().map_err(|error| error.kind),
                Err("target path"),
                "{bad}"
            );
        }
    }

    #[test]
    fn clause_4_2_3_a_time_has_one_spelling() {
        let text = "2026-01-31T23:59:59Z";
        assert_eq!(time::parse(text).map(time::write), Ok(text.to_owned()));
        for bad in [
            "2026-01-31T23:59:59z",
            "2026-01-31t23:59:59Z",
            "2026-01-31 23:59:59Z",
            "2026-01-31T23:59:59+00:00",
            "2026-01-31T23:59:59.5Z",
            "2026-01-31T23:59Z",
            "2026-02-30T00:00:00Z",
            "2026-01-31T24:00:00Z",
            "2026-01-31T23:59:60Z",
            "+002026-01-31T23:59:59Z",
            "2026-01-31T23:59:59Z[UTC]",
            " 2026-01-31T23:59:59Z",
            "2026-01-31",
            "",
        ] {
            assert_eq!(
                time::parse(bad).map_err(|error| error.kind),
                Err("time"),
                "{bad}"
            );
        }
    }

    #[test]
    fn a_version_is_at_least_one() {
        assert_eq!(
            Version::try_from(0).map_err(|error| error.kind),
            Err("version")
        );
        assert_eq!(Version::try_from(1), Ok(Version::FIRST));
        assert_eq!(Version(u64::MAX).next(), None);
        for bad in [json!(0), json!(-1), json!("1"), json!(null)] {
            assert!(serde_json::from_value::<Version>(bad).is_err());
        }
    }

    #[test]
    fn documents_are_written_as_the_specification_spells_them() {
        let expires = time::parse("2026-01-31T23:59:59Z").unwrap();
        let spec_version = SPEC_VERSION.to_owned();
        let key = Key::ed25519(&[0xab; 32]);
        let signers = RoleKeys {
            keyids: vec![key.keyid().unwrap()],
            threshold: 1,
        };
        let meta = MetaFile {
            version: Version::FIRST,
            length: None,
            hashes: None,
        };
        let timestamp = Timestamp {
            spec_version: spec_version.clone(),
            version: Version(3),
            expires,
            issued: None,
            meta: BTreeMap::from([("snapshot.json".to_owned(), meta)]),
        };
        assert_eq!(
            Envelope::unsigned(&timestamp).unwrap().signed,
            json!({"_type": "timestamp", "spec_version": "1.0.34", "version": 3, "expires": "2026-01-31T23:59:59Z",
                   "meta": {"snapshot.json": {"version": 1}}}),
        );
        let issued = Timestamp {
            issued: Some(expires),
            ..timestamp
        };
        assert_eq!(
            Envelope::unsigned(&issued).unwrap().signed["issued"],
            json!("2026-01-31T23:59:59Z")
        );

        let hardware: HardwareId = "qemu-x86_64".parse().unwrap();
        let custom = Custom {
            format: FORMAT,
            version: "1.4.0".parse().unwrap(),
            serial: 7,
            hardware: vec![hardware.clone()],
            manifest: Digested {
                length: 812,
                sha256: Sha256::of(b""),
            },
        };
        let targets = Targets {
            spec_version,
            version: Version::FIRST,
            expires,
            targets: BTreeMap::from([(
                "s/q/1.commit".to_owned(),
                TargetFile::of(b"").with_custom(&custom).unwrap(),
            )]),
            delegations: Some(Delegations {
                keys: BTreeMap::from([(signers.keyids[0].clone(), key)]),
                roles: vec![Delegation {
                    name: "stable".into(),
                    signers: signers.clone(),
                    terminating: true,
                    paths: vec!["stable/*/*".into()],
                    path_hash_prefixes: vec![],
                }],
            }),
        };
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let signed = Envelope::unsigned(&targets).unwrap().signed;
        assert_eq!(
            signed,
            json!({"_type": "targets", "spec_version": "1.0.34", "version": 1, "expires": "2026-01-31T23:59:59Z",
                   "targets": {"s/q/1.commit": {"length": 0, "hashes": {"sha256": empty}, "custom": {"offshoot": {
                       "format": 1, "version": "1.4.0", "serial": 7, "hardware": ["qemu-x86_64"],
                       "manifest": {"length": 812, "sha256": empty}}}}},
                   "delegations": {
                       "keys": {signers.keyids[0].clone(): {"keytype": "ed25519", "scheme": "ed25519", "keyval": {"public": "ab".repeat(32)}}},
                       "roles": [{"name": "stable", "keyids": signers.keyids, "threshold": 1, "terminating": true, "paths": ["stable/*/*"]}]}}),
        );
        assert_eq!(from_value::<Targets>("targets", signed), Ok(targets));

        let file = File {
            path: "deltas/empty-0/superblock".parse().unwrap(),
            length: 1,
            sha256: Sha256::of(b""),
        };
        let manifest = Manifest {
            format: FORMAT,
            commit: empty.parse().unwrap(),
            version: "1.4.0".parse().unwrap(),
            hardware,
            objects: None,
            deltas: vec![Delta {
                from: None,
                to: None,
                usize: 5,
                superblock: file,
                parts: vec![],
            }],
        };
        let text = format!(
            r#"{{"commit":"{empty}","deltas":[{{"from":null,"parts":[],"superblock":{{"length":1,"path":"deltas/empty-0/superblock","sha256":"{empty}"}},"usize":5}}],"format":1,"hardware":"qemu-x86_64","version":"1.4.0"}}"#
        );
        assert_eq!(
            manifest
                .to_bytes()
                .map(|bytes| String::from_utf8(bytes).unwrap()),
            Ok(text.clone())
        );
        let unknown = text.replacen("{", r#"{"more":1,"#, 1);
        assert_eq!(
            from_value::<Manifest>("m", canonical::parse(text.as_bytes()).unwrap()),
            Ok(manifest)
        );
        assert!(
            from_value::<Manifest>("m", canonical::parse(unknown.as_bytes()).unwrap()).is_err()
        );
    }
}
