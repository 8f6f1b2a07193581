//! Whether enough keys of a role have signed a file.
//!
//! Counts *keys*, not key ids and not signatures: one key under two ids, or two signatures with one id, is one.
//! A key of a kind that is not known here never counts.

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
    let mut tried = BTreeSet::new();
    let mut counted = BTreeSet::new();
    for signature in &envelope.signatures {
        // The first signature of each key id only, so that the work is bounded by the delegator and not by the file.
        if !signers.keyids.contains(&signature.keyid) || !tried.insert(&signature.keyid) {
            continue;
        }
        let Some(key) = keys.get(&signature.keyid) else {
            continue;
        };
        if verify(key, &message, &signature.sig) {
            counted.insert(identity(key));
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

/// The role can be signed for at all.
pub(super) fn check_signers(role: &str, signers: &RoleKeys) -> Result<(), Refusal> {
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

/// What two spellings of one key have in common.
pub(super) fn identity(key: &Key) -> String {
    key.keyval.public.to_ascii_lowercase()
}

fn verify(key: &Key, message: &[u8], signature: &str) -> bool {
    match (key.keytype.as_str(), key.scheme.as_str()) {
        ("ed25519", "ed25519") => verify_ed25519(&key.keyval.public, message, signature),
        _ => false,
    }
}

/// Strictly: no weak key, no signature that another verifier could judge differently.
fn verify_ed25519(public: &str, message: &[u8], signature: &str) -> bool {
    let Some(public) = from_hex(public) else {
        return false;
    };
    let Some(signature) = from_hex(signature) else {
        return false;
    };
    let Ok(key) = ed25519_dalek::VerifyingKey::from_bytes(&public) else {
        return false;
    };
    !key.is_weak()
        && key
            .verify_strict(message, &ed25519_dalek::Signature::from_bytes(&signature))
            .is_ok()
}

fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let nibble = |digit: u8| char::from(digit).to_digit(16);
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = u8::try_from(nibble(pair[0])? << 4 | nibble(pair[1])?).ok()?;
    }
    Some(bytes)
}
