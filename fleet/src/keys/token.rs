//! A private key in a token behind PKCS#11, named by a URI (RFC 7512). The token's module is a library of its vendor, and is loaded when
//! something is signed.
//!
//! Below the URI stands the public half, so that what a key signs for is known without its token.
//!
//! ```text
//! pkcs11:token=acme;object=targets?module-path=/usr/lib/softhsm/libsofthsm2.so
//! -----BEGIN PUBLIC KEY-----
//! ```
//!
//! | of the URI | what |
//! |---|---|
//! | `token`, `serial`, `manufacturer`, `model` | which token; those that are not given are any |
//! | `object`, `id` | the key's label and id |
//! | `module-path` | the library |
//! | `pin-source` | a file with the PIN; else it is asked for as a passphrase is |
//!
//! ed25519 (`CKM_EDDSA`), or ECDSA with P-256 or P-384 (`CKM_ECDSA`). A PIN is tried once: tokens lock themselves. Does not make keys.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::mechanism::Mechanism;
use cryptoki::mechanism::eddsa::{EddsaParams, EddsaSignatureScheme};
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::{Session, UserType};
use cryptoki::types::AuthPin;
use offshoot::trust::schema::Key;
use offshoot::trust::verify;
use pkcs8::der::asn1::{AnyRef, BitStringRef, OctetStringRef};
use pkcs8::der::{Decode as _, Document, Encode as _};
use pkcs8::spki::{AlgorithmIdentifierRef, SubjectPublicKeyInfoRef};
use sha2::Digest as _;
use zeroize::Zeroizing;

use super::passphrase::Passphrases;
use super::public;

/// Where a key is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Uri {
    text: String,
    /// As in the table above.
    path: BTreeMap<&'static str, Vec<u8>>,
    module: PathBuf,
    pin: Option<PathBuf>,
}

/// Attributes of a path that are understood.
const PATH: [&str; 7] = [
    "token",
    "serial",
    "manufacturer",
    "model",
    "object",
    "id",
    "type",
];

/// Those that are logged in to, until the process ends. Modules are initialised once in a process.
static OPEN: Mutex<Open> = Mutex::new(Open {
    modules: BTreeMap::new(),
    sessions: BTreeMap::new(),
});

struct Open {
    modules: BTreeMap<PathBuf, Pkcs11>,
    sessions: BTreeMap<String, Session>,
}

/// The URI and the key in a file.
pub(super) fn read(path: &Path) -> Result<(Uri, Key)> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let read = || -> Result<(Uri, Key)> {
        let mut lines = text.lines().map(str::trim);
        let uri = lines.find(|line| line.starts_with("pkcs11:"));
        let uri = Uri::parse(uri.context("no line of it is a URI of PKCS#11")?)?;
        let at = text.find("-----BEGIN");
        Ok((
            uri,
            public::parse(&text[at.context("it has no public key")?..])?,
        ))
    };
    read().with_context(|| {
        format!(
            "reading {}: `offshoot-fleet key attach` writes such files",
            path.display()
        )
    })
}

/// What such a file holds.
pub(super) fn text(uri: &Uri, key: &Key) -> Result<String> {
    Ok(format!("{}\n{}", uri.text, public::to_pem(key)?))
}

/// The public half of the key that a token has.
pub(super) fn find(uri: &Uri, passphrases: &Passphrases) -> Result<Key> {
    uri.with_session(passphrases, |session| {
        uri.object(session, ObjectClass::PRIVATE_KEY)?;
        let object = uri.object(session, ObjectClass::PUBLIC_KEY)?;
        let wanted = [
            AttributeType::KeyType,
            AttributeType::EcParams,
            AttributeType::EcPoint,
        ];
        let (mut kind, mut params, mut point) = (None, Vec::new(), Vec::new());
        for attribute in session.get_attributes(object, &wanted)? {
            match attribute {
                Attribute::KeyType(found) => kind = Some(found),
                Attribute::EcParams(found) => params = found,
                Attribute::EcPoint(found) => point = found,
                _ => {}
            }
        }
        // Some tokens wrap it, and some do not.
        let point = match OctetStringRef::from_der(&point) {
            Ok(wrapped) => wrapped.as_bytes().to_vec(),
            Err(_) => point,
        };
        match kind {
            Some(KeyType::EC_EDWARDS) => {
                let point = point.try_into();
                let point: [u8; 32] = point.map_err(|_| anyhow!("it is not ed25519"))?;
                Ok(Key::ed25519(&point))
            }
            Some(KeyType::EC) => ecdsa(&params, &point).map_err(|error| anyhow!("{error:#}")),
            _ => bail!("it is neither ed25519 nor ECDSA"),
        }
    })
}

/// As hexadecimal digits of what metadata holds.
pub(super) fn sign(
    uri: &Uri,
    key: &Key,
    bytes: &[u8],
    passphrases: &Passphrases,
) -> Result<String> {
    let signature = uri.with_session(passphrases, |session| {
        let object = uri.object(session, ObjectClass::PRIVATE_KEY)?;
        let hash = match key.scheme.as_str() {
            "ed25519" => {
                let pure = EddsaParams::new(EddsaSignatureScheme::Ed25519);
                return Ok(session.sign(&Mechanism::Eddsa(pure), object, bytes)?);
            }
            "ecdsa-sha2-nistp256" => sha2::Sha256::digest(bytes).to_vec(),
            "ecdsa-sha2-nistp384" => sha2::Sha384::digest(bytes).to_vec(),
            other => bail!("keys of the scheme {other} do not sign here"),
        };
        Ok(der(&session.sign(&Mechanism::Ecdsa, object, &hash)?))
    })?;
    let signature = super::hex(&signature);
    ensure!(
        verify::verifies(key, bytes, &signature),
        "{} is not the key that was attached: attach it again under another name, and rotate to it",
        uri.text
    );
    Ok(signature)
}

impl Uri {
    pub(super) fn parse(text: &str) -> Result<Self> {
        let inner = text.strip_prefix("pkcs11:");
        let inner = inner.with_context(|| {
            format!("{text:?} is not a URI of PKCS#11: it begins with pkcs11: (RFC 7512)")
        })?;
        let (names, query) = inner.split_once('?').unwrap_or((inner, ""));
        let mut path = BTreeMap::new();
        for (name, value) in attributes(names, ';')? {
            let known = PATH.into_iter().find(|known| *known == name);
            let known = known
                .with_context(|| format!("{text}: {name:?} is none of {}", PATH.join(", ")))?;
            path.insert(known, value);
        }
        ensure!(
            path.contains_key("object") || path.contains_key("id"),
            "{text} names no key: add object=LABEL or id=%01"
        );
        path.remove("type");
        let (mut module, mut pin) = (None, None);
        for (name, value) in attributes(query, '&')? {
            let value = String::from_utf8(value);
            let value = value.with_context(|| format!("{text}: {name} is not UTF-8"))?;
            match name {
                "module-path" => module = Some(PathBuf::from(value)),
                "pin-source" => {
                    let path = value.strip_prefix("file:").unwrap_or(&value);
                    pin = Some(PathBuf::from(path.strip_prefix("//").unwrap_or(path)));
                }
                "pin-value" => bail!("a PIN in a URI is no secret: take pin-source=FILE, or none"),
                _others => {}
            }
        }
        let module = module.with_context(|| {
            format!("{text} does not say ?module-path=FILE, the library of the token's vendor")
        })?;
        Ok(Self {
            text: text.to_owned(),
            path,
            module,
            pin,
        })
    }

    /// Whether its PIN can be had.
    pub(super) fn is_ready(&self, passphrases: &Passphrases) -> bool {
        self.pin.is_some() || passphrases.are_at_hand()
    }

    fn with_session<T>(
        &self,
        passphrases: &Passphrases,
        work: impl Fn(&Session) -> Result<T>,
    ) -> Result<T> {
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        let token: Vec<_> = self
            .path
            .iter()
            .filter(|(name, _)| !["object", "id"].contains(name))
            .collect();
        let name = format!("{} {token:?}", self.module.display());
        if !open.sessions.contains_key(&name) {
            let session = self.log_in(&mut open.modules, passphrases);
            let session = session.with_context(|| format!("opening {}", self.text))?;
            open.sessions.insert(name.clone(), session);
        }
        let session = open.sessions.get(&name).context("the session is gone")?;
        work(session).with_context(|| format!("asking {}", self.text))
    }

    fn log_in(
        &self,
        modules: &mut BTreeMap<PathBuf, Pkcs11>,
        passphrases: &Passphrases,
    ) -> Result<Session> {
        if !modules.contains_key(&self.module) {
            let module = Pkcs11::new(&self.module)
                .with_context(|| format!("loading {}", self.module.display()))?;
            module.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK))?;
            modules.insert(self.module.clone(), module);
        }
        let module = modules.get(&self.module).context("the module is gone")?;
        let mut found = Vec::new();
        for slot in module.get_slots_with_initialized_token()? {
            let info = module.get_token_info(slot)?;
            let is = |name: &str, value: &str| {
                self.path
                    .get(name)
                    .is_none_or(|wanted| wanted == value.as_bytes())
            };
            if is("token", info.label())
                && is("serial", info.serial_number())
                && is("manufacturer", info.manufacturer_id())
                && is("model", info.model())
            {
                found.push(slot);
            }
        }
        let [slot] = found[..] else {
            bail!(
                "{} of the tokens of {} are this one: the URI must name one",
                found.len(),
                self.module.display()
            );
        };
        let session = module.open_ro_session(slot)?;
        let pin = match &self.pin {
            Some(path) => {
                let text = fs::read_to_string(path).map(Zeroizing::new);
                let text = text.with_context(|| format!("reading {}", path.display()))?;
                AuthPin::from(text.trim_end_matches(['\r', '\n']).to_owned())
            }
            None => AuthPin::from(passphrases.pin(&self.text)?.to_string()),
        };
        session.login(UserType::User, Some(&pin)).context(
            "the token does not take the PIN, and locks itself after a few that are wrong",
        )?;
        Ok(session)
    }

    fn object(&self, session: &Session, class: ObjectClass) -> Result<ObjectHandle> {
        let mut template = vec![Attribute::Class(class)];
        if let Some(label) = self.path.get("object") {
            template.push(Attribute::Label(label.clone()));
        }
        if let Some(id) = self.path.get("id") {
            template.push(Attribute::Id(id.clone()));
        }
        let found = session.find_objects(&template)?;
        let [object] = found[..] else {
            bail!(
                "the token has {} objects of the class {class} that it names: there must be one",
                found.len()
            );
        };
        Ok(object)
    }
}

/// `name=value`, with the value's percent signs resolved.
fn attributes(text: &str, separator: char) -> Result<Vec<(&str, Vec<u8>)>> {
    let mut all = Vec::new();
    for attribute in text.split(separator).filter(|one| !one.is_empty()) {
        let (name, value) = attribute
            .split_once('=')
            .with_context(|| format!("{attribute:?} is not name=value"))?;
        let mut bytes = Vec::new();
        let mut rest = value.bytes();
        while let Some(byte) = rest.next() {
            if byte == b'%' {
                let digits: Vec<u8> = rest.by_ref().take(2).collect();
                let digit = std::str::from_utf8(&digits).ok().and_then(super::from_hex);
                let digit = digit.filter(|_| digits.len() == 2);
                bytes.extend(digit.with_context(|| {
                    format!("{attribute:?}: after % come two hexadecimal digits")
                })?);
            } else {
                bytes.push(byte);
            }
        }
        all.push((name, bytes));
    }
    Ok(all)
}

fn ecdsa(params: &[u8], point: &[u8]) -> Result<Key> {
    let write = || -> pkcs8::der::Result<Document> {
        let info = SubjectPublicKeyInfoRef {
            algorithm: AlgorithmIdentifierRef {
                oid: public::EC,
                parameters: Some(AnyRef::from_der(params)?),
            },
            subject_public_key: BitStringRef::from_bytes(point)?,
        };
        Document::try_from(info.to_der()?)
    };
    public::from_der(&write().map_err(|error| anyhow!("reading its public half: {error}"))?)
}

/// Two numbers of equal length, as a sequence of two integers.
fn der(raw: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    for number in raw.chunks(raw.len().div_ceil(2).max(1)) {
        let zeros = number.iter().take_while(|byte| **byte == 0).count();
        let number = &number[zeros.min(number.len().saturating_sub(1))..];
        // Else it would be negative.
        let sign = usize::from(number.first().is_some_and(|byte| byte & 0x80 != 0));
        // P-384 has the longest, of 49 bytes.
        body.extend([2, (number.len() + sign) as u8]);
        body.extend(&[0][..sign]);
        body.extend(number);
    }
    let mut sequence = vec![0x30, body.len() as u8];
    sequence.append(&mut body);
    sequence
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_as_short_as_they_can_be_and_never_negative() {
        for (raw, want) in [
            (vec![1, 2], vec![0x30, 6, 2, 1, 1, 2, 1, 2]),
            (vec![0, 1, 0, 0], vec![0x30, 6, 2, 1, 1, 2, 1, 0]),
            (
                vec![0x80, 0, 0, 0x80],
                vec![0x30, 9, 2, 3, 0, 0x80, 0, 2, 2, 0, 0x80],
            ),
        ] {
            assert_eq!(der(&raw), want);
        }
    }

    #[test]
    fn a_uri_names_a_key_a_module_and_perhaps_a_pin() {
        let uri = Uri::parse(
            "pkcs11:token=two%20words;id=%01%ff;type=private?module-path=/lib/a.so&pin-source=file:/etc/pin",
        )
        .unwrap();
        assert_eq!(uri.path["token"], b"two words");
        assert_eq!(uri.path["id"], [1, 0xff]);
        assert_eq!(
            (uri.module, uri.pin),
            ("/lib/a.so".into(), Some("/etc/pin".into()))
        );
        for wrong in [
            "targets",
            "pkcs11:token=a?module-path=/lib/a.so",
            "pkcs11:object=a",
            "pkcs11:object=a;slot-id=1?module-path=/lib/a.so",
            "pkcs11:object=%0?module-path=/lib/a.so",
            "pkcs11:object=%+1?module-path=/lib/a.so",
            "pkcs11:object?module-path=/lib/a.so",
            "pkcs11:object=a?module-path=/lib/a.so&pin-value=1234",
        ] {
            assert!(Uri::parse(wrong).is_err(), "{wrong}");
        }
    }
}
