//! A private key in a file: PKCS#8 in PEM, as it is or encrypted (PBES2: scrypt and AES-256).
//!
//! Above an encrypted one stands its public half, which other tools skip: so that what it signs for is known without its passphrase.
//!
//! ```text
//! Public-Key: ed25519 <64 hexadecimal digits>
//! -----BEGIN ENCRYPTED PRIVATE KEY-----
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, ensure};
use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{DecodePrivateKey as _, EncodePrivateKey as _, KeypairBytes};
use offshoot::trust::schema::Key;
use pkcs8::pkcs5::{pbes2, scrypt};
use pkcs8::rand_core::{OsRng, RngCore as _};
use pkcs8::{EncryptedPrivateKeyInfo, PrivateKeyInfo, SecretDocument};
use zeroize::Zeroizing;

use super::passphrase::Passphrases;

const PREAMBLE: &str = "Public-Key: ed25519 ";

/// What a file says without a passphrase.
pub(super) enum Content {
    Plain(SigningKey),
    Encrypted(Key),
}

/// A new key.
pub(super) fn make() -> Result<SigningKey> {
    let mut seed = Zeroizing::new([0; 32]);
    let mut filled = 0;
    while filled < seed.len() {
        filled +=
            rustix::rand::getrandom(&mut seed[filled..], rustix::rand::GetRandomFlags::empty())
                .context("asking the kernel for random bytes")?;
    }
    Ok(SigningKey::from_bytes(&seed))
}

/// The file's text; encrypted if there is a passphrase.
pub(super) fn text(key: &SigningKey, passphrase: Option<&str>) -> Result<Zeroizing<String>> {
    // The first version of the format, without the public half: every tool reads it.
    let pair = KeypairBytes {
        secret_key: key.to_bytes(),
        public_key: None,
    };
    let writing = |error| anyhow!("writing a key as PKCS#8: {error}");
    let Some(passphrase) = passphrase else {
        return pair
            .to_pkcs8_pem(LineEnding::LF)
            .map_err(|error| writing(error.to_string()));
    };
    let plain = pair
        .to_pkcs8_der()
        .map_err(|error| writing(error.to_string()))?;
    let info =
        PrivateKeyInfo::try_from(plain.as_bytes()).map_err(|error| writing(error.to_string()))?;
    let encrypted = encrypt(&info, passphrase).map_err(|error| writing(error.to_string()))?;
    let public = super::hex(&key.verifying_key().to_bytes());
    Ok(Zeroizing::new(format!(
        "{PREAMBLE}{public}\n{}",
        *encrypted
    )))
}

/// OpenSSL reads no more than 32 MB of scrypt: five passes of 16 MB cost a guess as much as one of 128 MB.
fn encrypt(info: &PrivateKeyInfo<'_>, passphrase: &str) -> pkcs8::Result<Zeroizing<String>> {
    let (mut salt, mut iv) = ([0; 16], [0; 16]);
    OsRng.fill_bytes(&mut salt);
    OsRng.fill_bytes(&mut iv);
    let cost = scrypt::Params::new(14, 8, 5, scrypt::Params::RECOMMENDED_LEN)
        .map_err(|_| pkcs8::Error::ParametersMalformed)?;
    let with = pbes2::Parameters::scrypt_aes256cbc(cost, &salt, &iv)?;
    let document = info.encrypt_with_params(with, passphrase)?;
    Ok(document.to_pem("ENCRYPTED PRIVATE KEY", LineEnding::LF)?)
}

pub(super) fn read(path: &Path, passphrases: &Passphrases) -> Result<Content> {
    let text = contents(path)?;
    if !text.contains("ENCRYPTED") {
        let secret = SigningKey::from_pkcs8_pem(&text).map_err(|error| {
            anyhow!(
                "{} is not an ed25519 key in PKCS#8 PEM: {error}; put back the one that was made",
                path.display()
            )
        })?;
        return Ok(Content::Plain(secret));
    }
    if let Some(digits) = text.lines().find_map(|line| line.strip_prefix(PREAMBLE)) {
        let public = super::from_hex(digits.trim()).and_then(|bytes| bytes.try_into().ok());
        let public: [u8; 32] = public.with_context(|| {
            format!("{}: what follows {PREAMBLE:?} is not a key", path.display())
        })?;
        return Ok(Content::Encrypted(Key::ed25519(&public)));
    }
    // Encrypted by another tool.
    let secret = open(path, passphrases)?;
    Ok(Content::Encrypted(Key::ed25519(
        &secret.verifying_key().to_bytes(),
    )))
}

/// Decrypts it.
pub(super) fn open(path: &Path, passphrases: &Passphrases) -> Result<SigningKey> {
    let text = contents(path)?;
    let (label, document) = SecretDocument::from_pem(from_begin(&text)).map_err(|error| {
        anyhow!(
            "{} is not PEM: {error}; put back the key that was made",
            path.display()
        )
    })?;
    ensure!(
        label == "ENCRYPTED PRIVATE KEY",
        "{} holds {label:?}, not an encrypted key in PKCS#8",
        path.display()
    );
    let info = EncryptedPrivateKeyInfo::try_from(document.as_bytes()).map_err(|error| {
        anyhow!(
            "{} is not an encrypted key in PKCS#8: {error}; put back the one that was made",
            path.display()
        )
    })?;
    let opened = passphrases.open(&path.display().to_string(), |passphrase| {
        info.decrypt(passphrase)
            .map_err(|_| anyhow!("the passphrase does not open {}", path.display()))
    })?;
    SigningKey::from_pkcs8_der(opened.as_bytes())
        .map_err(|error| anyhow!("{} is not an ed25519 key: {error}", path.display()))
}

fn contents(path: &Path) -> Result<Zeroizing<String>> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    Ok(Zeroizing::new(text))
}

fn from_begin(text: &str) -> &str {
    text.find("-----BEGIN").map_or(text, |at| &text[at..])
}

/// Never over a file that exists, never half, and never readable by others, not even while it is written.
pub(crate) fn write_secret(path: &Path, bytes: &[u8]) -> Result<()> {
    put(path, bytes, |part| {
        // Unlike a rename, this fails if there is a file.
        fs::hard_link(part, path)?;
        fs::remove_file(part)
    })
}

/// The same, over the file that is there.
pub(super) fn replace_secret(path: &Path, bytes: &[u8]) -> Result<()> {
    put(path, bytes, |part| fs::rename(part, path))
}

fn put(path: &Path, bytes: &[u8], name: impl Fn(&Path) -> std::io::Result<()>) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let part = path.with_extension("part");
        if part.exists() {
            fs::remove_file(&part)?;
        }
        let mut options = OpenOptions::new();
        let mut file = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&part)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        name(&part)?;
        File::open(crate::writer::parent(path))?.sync_all()
    };
    write().with_context(|| format!("writing {}", path.display()))
}
