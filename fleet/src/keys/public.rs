//! The public half of a key: SubjectPublicKeyInfo in PEM, as it goes from one machine to another.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, bail};
use ed25519_dalek::VerifyingKey;
use ed25519_dalek::pkcs8::DecodePublicKey as _;
use ed25519_dalek::pkcs8::EncodePublicKey as _;
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use offshoot::trust::schema::{Key, KeyValue};
use pkcs8::der::Document;
use pkcs8::{ObjectIdentifier, SubjectPublicKeyInfoRef};

const LABEL: &str = "PUBLIC KEY";
pub(super) const EC: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const P256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
const P384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");

/// From a file: ed25519, or ECDSA with P-256 or P-384.
pub(crate) fn read_public(path: &Path) -> Result<Key> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    parse(&text).with_context(|| {
        format!(
            "{} is not a public key in PEM: `offshoot-fleet key public` writes one",
            path.display()
        )
    })
}

pub(super) fn parse(pem: &str) -> Result<Key> {
    let (label, document) = Document::from_pem(pem).map_err(|error| anyhow!("{error}"))?;
    if label != LABEL {
        bail!("it holds {label:?}");
    }
    from_der(&document)
}

/// As it is in the metadata.
pub(super) fn from_der(document: &Document) -> Result<Key> {
    if let Ok(key) = VerifyingKey::from_public_key_der(document.as_bytes()) {
        return Ok(Key::ed25519(&key.to_bytes()));
    }
    let info = SubjectPublicKeyInfoRef::try_from(document.as_bytes())
        .map_err(|error| anyhow!("{error}"))?;
    let curve = info.algorithm.parameters_oid().ok();
    let scheme = match (info.algorithm.oid, curve) {
        (EC, Some(P256)) => "ecdsa-sha2-nistp256",
        (EC, Some(P384)) => "ecdsa-sha2-nistp384",
        (kind, _) => bail!("its kind is {kind}: take ed25519, or ECDSA with P-256 or P-384"),
    };
    let public = document
        .to_pem(LABEL, LineEnding::LF)
        .map_err(|error| anyhow!("{error}"))?;
    Ok(Key {
        keytype: "ecdsa".to_owned(),
        scheme: scheme.to_owned(),
        keyval: KeyValue { public },
    })
}

/// The file.
pub(crate) fn to_pem(key: &Key) -> Result<String> {
    if key.keytype != "ed25519" {
        return Ok(key.keyval.public.clone());
    }
    let bytes = super::from_hex(&key.keyval.public).and_then(|bytes| bytes.try_into().ok());
    let public = VerifyingKey::from_bytes(&bytes.context("the key is not ed25519")?);
    public
        .map_err(|error| error.to_string())
        .and_then(|key| {
            key.to_public_key_pem(LineEnding::LF)
                .map_err(|error| error.to_string())
        })
        .map_err(|error| anyhow!("writing the public key: {error}"))
}
