//! Whether enough keys of a role have signed a file: the one place where signatures are verified and counted.
//!
//! Counts *keys*, not key ids and not signatures: one key under two ids, or in two spellings, is one. A key or a scheme that is
//! not known here never counts and never harms, so a repository may add kinds of keys before all of its devices know them.
//!
//! | keytype | scheme | public | signature |
//! |---|---|---|---|
//! | `ed25519` | `ed25519` | 64 hexadecimal digits | 64 bytes |
//! | `ecdsa`, `ecdsa-sha2-nistp256` | `ecdsa-sha2-nistp256` | PEM | DER |
//! | `ecdsa`, `ecdsa-sha2-nistp384` | `ecdsa-sha2-nistp384` | PEM | DER |
//! | `rsa` (2048 to 8192 bits) | `rsassa-pss-sha256`, `-sha384`, `-sha512`; the salt as long as the digest | PEM | as long as the key |
//!
//! Those in PEM are verified by the TLS library, with the feature `spki`; without it they are kinds that are not known.
//! Does not care what a key id is made from: it is a name, and what it names is what counts.

use std::collections::{BTreeMap, BTreeSet};

use crate::trust::Refusal;
use crate::trust::schema::{Envelope, Key, RoleKeys};

pub(super) fn check(
    role: &str,
    signers: &RoleKeys,
    keys: &BTreeMap<String, Key>,
    envelope: &Envelope,
) -> Result<(), Refusal> {
    check_signers(role, signers)?;
    let message = envelope.sign_bytes()?;
    let mut named = BTreeSet::new();
    let mut counted = BTreeSet::new();
    for signature in &envelope.signatures {
        // 4.2.1, which also bounds the work by the delegator's list of keys and not by the file.
        if !named.insert(&signature.keyid) {
            return Err(Refusal::DuplicateSignature {
                role: role.to_owned(),
                keyid: signature.keyid.clone(),
            });
        }
        if !signers.keyids.contains(&signature.keyid) {
            continue;
        }
        let Some(key) = keys.get(&signature.keyid).and_then(PublicKey::read) else {
            continue;
        };
        if from_hex(&signature.sig).is_some_and(|signature| key.verifies(&message, &signature)) {
            counted.insert(key);
        }
    }
    let have = counted.len() as u64;
    if have < signers.threshold {
        return Err(Refusal::BelowThreshold {
            role: role.to_owned(),
            have,
            need: signers.threshold,
        });
    }
    Ok(())
}

/// Whether this is a signature of a key of a known kind: hexadecimal digits, as in an envelope.
pub fn verifies(key: &Key, message: &[u8], signature: &str) -> bool {
    let (key, signature) = (PublicKey::read(key), from_hex(signature));
    key.zip(signature)
        .is_some_and(|(key, signature)| key.verifies(message, &signature))
}

/// The role can be signed for at all. Judged when the role is, so that a mistake in one role's keys does not keep a device from
/// the root that corrects it.
fn check_signers(role: &str, signers: &RoleKeys) -> Result<(), Refusal> {
    let mut keyids = BTreeSet::new();
    for keyid in &signers.keyids {
        if !keyids.insert(keyid) {
            return Err(Refusal::DuplicateKeyId {
                role: role.to_owned(),
                keyid: keyid.clone(),
            });
        }
    }
    if signers.threshold == 0 || signers.threshold > keyids.len() as u64 {
        return Err(Refusal::BadThreshold {
            role: role.to_owned(),
            threshold: signers.threshold,
            keys: keyids.len(),
        });
    }
    Ok(())
}

/// What two spellings of one key have in common, as text.
pub(super) fn identity(key: &Key) -> String {
    match PublicKey::read(key) {
        Some(key) => key.name(),
        None => format!("{} {}", key.keytype, key.keyval.public),
    }
}

/// A key of a kind that is known here. Equal if it is the same key, whatever it is called and however it is written.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum PublicKey {
    Ed25519([u8; 32]),
    #[cfg(feature = "spki")]
    Spki(spki::PublicKey),
}

impl PublicKey {
    fn read(key: &Key) -> Option<Self> {
        match (key.keytype.as_str(), key.scheme.as_str()) {
            ("ed25519", "ed25519") => {
                let bytes = from_hex(&key.keyval.public)?;
                Some(Self::Ed25519(bytes.try_into().ok()?))
            }
            #[cfg(feature = "spki")]
            (keytype, scheme) => {
                spki::PublicKey::read(keytype, scheme, &key.keyval.public).map(Self::Spki)
            }
            #[cfg(not(feature = "spki"))]
            _ => None,
        }
    }

    fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        match self {
            Self::Ed25519(key) => ed25519(key, message, signature),
            #[cfg(feature = "spki")]
            Self::Spki(key) => key.verifies(message, signature),
        }
    }

    fn name(&self) -> String {
        match self {
            Self::Ed25519(key) => {
                let digits: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
                format!("ed25519 {digits}")
            }
            #[cfg(feature = "spki")]
            Self::Spki(key) => key.name(),
        }
    }
}

/// Strictly: no weak key, no signature that another verifier could judge differently.
fn ed25519(key: &[u8; 32], message: &[u8], signature: &[u8]) -> bool {
    let Ok(signature) = ed25519_dalek::Signature::from_slice(signature) else {
        return false;
    };
    let Ok(key) = ed25519_dalek::VerifyingKey::from_bytes(key) else {
        return false;
    };
    !key.is_weak() && key.verify_strict(message, &signature).is_ok()
}

#[cfg(feature = "spki")]
mod spki {
    use std::cmp::Ordering;

    use rustls_pki_types::pem::PemObject as _;
    use rustls_pki_types::{SignatureVerificationAlgorithm, SubjectPublicKeyInfoDer};
    use webpki::{RawPublicKeyEntity, ring};

    use crate::commit::Sha256;

    /// The DER form, of which a key that verifies anything has one; the scheme is not part of what it is.
    #[derive(Debug)]
    pub(super) struct PublicKey {
        der: SubjectPublicKeyInfoDer<'static>,
        algorithm: &'static dyn SignatureVerificationAlgorithm,
    }

    impl PublicKey {
        pub(super) fn read(keytype: &str, scheme: &str, pem: &str) -> Option<Self> {
            let algorithm = match (keytype, scheme) {
                ("ecdsa" | "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp256") => ring::ECDSA_P256_SHA256,
                ("ecdsa" | "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp384") => ring::ECDSA_P384_SHA384,
                ("rsa", "rsassa-pss-sha256") => ring::RSA_PSS_2048_8192_SHA256_LEGACY_KEY,
                ("rsa", "rsassa-pss-sha384") => ring::RSA_PSS_2048_8192_SHA384_LEGACY_KEY,
                ("rsa", "rsassa-pss-sha512") => ring::RSA_PSS_2048_8192_SHA512_LEGACY_KEY,
                _ => return None,
            };
            let der = SubjectPublicKeyInfoDer::from_pem_slice(pem.as_bytes()).ok()?;
            Some(Self { der, algorithm })
        }

        /// Not if the key is of another kind than the scheme.
        pub(super) fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
            RawPublicKeyEntity::try_from(&self.der).is_ok_and(|key| {
                key.verify_signature(self.algorithm, message, signature)
                    .is_ok()
            })
        }

        pub(super) fn name(&self) -> String {
            format!("spki {}", Sha256::of(&self.der))
        }
    }

    impl Ord for PublicKey {
        fn cmp(&self, other: &Self) -> Ordering {
            self.der.as_ref().cmp(other.der.as_ref())
        }
    }

    impl PartialOrd for PublicKey {
        fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
            Some(self.cmp(other))
        }
    }

    impl PartialEq for PublicKey {
        fn eq(&self, other: &Self) -> bool {
            self.cmp(other) == Ordering::Equal
        }
    }

    impl Eq for PublicKey {}
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let nibble = |digit: u8| char::from(digit).to_digit(16);
    let pairs = text.as_bytes().chunks(2).map(|pair| match *pair {
        [high, low] => u8::try_from(nibble(high)? << 4 | nibble(low)?).ok(),
        _ => None,
    });
    pairs.collect()
}

#[cfg(test)]
#[cfg(feature = "spki")]
mod tests;
