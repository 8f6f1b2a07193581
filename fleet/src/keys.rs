//! The keys that sign, one file each, named by role.
//!
//! | role | files |
//! |---|---|
//! | `root` | `root-1.pem`, `root-2.pem`, … |
//! | `timestamp`, `snapshot`, `targets` | `timestamp.pem` …; after a rotation `timestamp-2.pem` … |
//! | a channel | `channel-<name>.pem`, `channel-<name>-2.pem` … |
//!
//! A `.pem` is an ed25519 private key, as it is or encrypted. A `.pkcs11` in its place says which key of which token it is. What is
//! made here is ed25519.
//!
//! A name only says where to look: which key signs for a role is what the role's delegator says. A key that is kept elsewhere is one
//! that this machine cannot sign with, and is said so when its signature is needed. What a key signs for is known without its passphrase.

mod file;
pub(crate) mod passphrase;
mod public;
mod token;

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use ed25519_dalek::{Signer as _, SigningKey};
use offshoot::trust::schema::{Key, RoleKeys, RoleName, Signature};
use serde::Serialize;

pub(crate) use file::write_secret;
use passphrase::Passphrases;
pub(crate) use public::{read_public, to_pem};

/// The directory of keys.
#[derive(Debug)]
pub(crate) struct Keys {
    directory: PathBuf,
    passphrases: Passphrases,
}

pub(crate) struct Signer {
    secret: Secret,
    pub key: Key,
    pub keyid: String,
    /// Its file, without the directory and its extension.
    pub name: String,
}

enum Secret {
    Plain(SigningKey),
    Token {
        uri: token::Uri,
        passphrases: Passphrases,
    },
    Encrypted {
        path: PathBuf,
        passphrases: Passphrases,
    },
}

/// How a key is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kept {
    File,
    Encrypted,
    /// Behind PKCS#11.
    Token,
}

/// The stem of a channel's key file.
pub(crate) fn of_channel(channel: &RoleName) -> String {
    format!("channel-{channel}")
}

impl Keys {
    pub(crate) fn new(directory: PathBuf, passphrases: Passphrases) -> Self {
        Self {
            directory,
            passphrases,
        }
    }

    /// Makes a key and keeps it; never over another one.
    pub(crate) fn generate(&self, stem: &str, kept: Kept) -> Result<Signer> {
        self.is_free(stem)?;
        let path = self.path(stem);
        let secret = file::make()?;
        let passphrase = match kept {
            Kept::File => None,
            // Asked for once, of all that are made in one run.
            Kept::Encrypted => Some(self.passphrases.of_new("the new keys")?),
            Kept::Token => bail!(
                "the keys beside {stem} are in a token, and keys are not made there: make one with its tools, `offshoot-fleet key attach {stem} URI`, `offshoot-fleet key public {stem}`, and name that with --public"
            ),
        };
        let passphrase = passphrase.as_deref().map(String::as_str);
        write_secret(&path, file::text(&secret, passphrase)?.as_bytes())?;
        Signer::new(secret, stem)
    }

    /// Makes a key under the next number that is free.
    pub(crate) fn generate_next(&self, stem: &str, kept: Kept) -> Result<Signer> {
        let mut names = (2u32..).map(|number| format!("{stem}-{number}"));
        let free = names.find(|name| self.is_free(name).is_ok());
        let free = free.with_context(|| format!("no number is free for a key of {stem}"))?;
        self.generate(&free, kept)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.pem"))
    }

    /// A key in a token, under a name; its file says where it is.
    pub(crate) fn attach(&self, name: &str, uri: &str) -> Result<Signer> {
        self.make_directory()?;
        self.is_free(name)?;
        let uri = token::Uri::parse(uri)?;
        let key = token::find(&uri, &self.passphrases)?;
        let path = self.directory.join(format!("{name}.pkcs11"));
        write_secret(&path, token::text(&uri, &key)?.as_bytes())?;
        self.load(&path)
    }

    fn is_free(&self, name: &str) -> Result<()> {
        for path in self.paths(name) {
            ensure!(
                !path.exists(),
                "{} exists, and no key is overwritten: move it away",
                path.display()
            );
        }
        Ok(())
    }

    fn paths(&self, name: &str) -> [PathBuf; 2] {
        [
            self.path(name),
            self.directory.join(format!("{name}.pkcs11")),
        ]
    }

    /// Those of the keys of a role that are here. `stem` is the name of its files without a number.
    pub(crate) fn of(&self, stem: &str, role: &RoleKeys) -> Result<Vec<Signer>> {
        let mut signers = Vec::new();
        for path in self.files(stem)? {
            let signer = self.load(&path)?;
            // A copy under another number is not a second signature.
            let copied = signers
                .iter()
                .any(|held: &Signer| held.keyid == signer.keyid);
            if role.keyids.contains(&signer.keyid) && !copied {
                signers.push(signer);
            }
        }
        Ok(signers)
    }

    /// The key in the file of this name, if there is one.
    pub(crate) fn only(&self, stem: &str) -> Result<Option<Signer>> {
        let found = self.paths(stem).into_iter().find(|path| path.exists());
        found.map(|path| self.load(&path)).transpose()
    }

    /// How a key that joins those of a role is kept: as they are.
    pub(crate) fn kept_like(&self, stem: &str) -> Result<Kept> {
        for path in self.files(stem)? {
            let kept = self.load(&path)?.kept();
            if kept != Kept::File {
                return Ok(kept);
            }
        }
        Ok(Kept::File)
    }

    /// A key of any name, on a machine that may have no other part of a fleet.
    pub(crate) fn make(&self, name: &str, kept: Kept) -> Result<Signer> {
        self.make_directory()?;
        self.generate(name, kept)
    }

    fn make_directory(&self) -> Result<()> {
        if self.directory.exists() {
            return Ok(());
        }
        crate::writer::make_directory(&self.directory)
            .and_then(|()| fs::set_permissions(&self.directory, Permissions::from_mode(0o700)))
            .with_context(|| format!("making {}", self.directory.display()))
    }

    /// The key of this name.
    pub(crate) fn named(&self, name: &str) -> Result<Signer> {
        let found = self.only(name)?;
        found.with_context(|| format!("there is no {}", self.path(name).display()))
    }

    /// Encrypts the key in a file that is not; false if it was.
    pub(crate) fn encrypt(&self, name: &str) -> Result<bool> {
        let path = self.path(name);
        let file::Content::Plain(secret) = file::read(&path, &self.passphrases)? else {
            return Ok(false);
        };
        let passphrase = self.passphrases.of_new(&path.display().to_string())?;
        file::replace_secret(&path, file::text(&secret, Some(&passphrase))?.as_bytes())?;
        Ok(true)
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// What may hold keys of a role.
    pub(crate) fn files(&self, stem: &str) -> Result<BTreeSet<PathBuf>> {
        let reading = || format!("reading {}", self.directory.display());
        let mut files = BTreeSet::new();
        for entry in fs::read_dir(&self.directory).with_context(reading)? {
            let path = entry.with_context(reading)?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let rest = name.and_then(|name| {
                let name = name.strip_suffix(".pem").or(name.strip_suffix(".pkcs11"));
                name?.strip_prefix(stem)
            });
            let numbered = |rest: &str| {
                rest.strip_prefix('-')
                    .is_some_and(|number| number.parse::<u32>().is_ok())
            };
            if rest.is_some_and(|rest| rest.is_empty() || numbered(rest)) {
                files.insert(path);
            }
        }
        Ok(files)
    }

    fn load(&self, path: &Path) -> Result<Signer> {
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        if path.extension().is_some_and(|end| end == "pkcs11") {
            let (uri, key) = token::read(path)?;
            let passphrases = self.passphrases.clone();
            return Signer::with_key(Secret::Token { uri, passphrases }, key, &name);
        }
        match file::read(path, &self.passphrases)? {
            file::Content::Plain(secret) => Signer::new(secret, &name),
            file::Content::Encrypted(key) => {
                let secret = Secret::Encrypted {
                    path: path.to_owned(),
                    passphrases: self.passphrases.clone(),
                };
                Signer::with_key(secret, key, &name)
            }
        }
    }
}

impl Signer {
    fn new(secret: SigningKey, name: &str) -> Result<Self> {
        let key = Key::ed25519(&secret.verifying_key().to_bytes());
        Self::with_key(Secret::Plain(secret), key, name)
    }

    fn with_key(secret: Secret, key: Key, name: &str) -> Result<Self> {
        Ok(Self {
            secret,
            keyid: key.keyid()?,
            key,
            name: name.to_owned(),
        })
    }

    pub(crate) const fn kept(&self) -> Kept {
        match self.secret {
            Secret::Plain(_) => Kept::File,
            Secret::Encrypted { .. } => Kept::Encrypted,
            Secret::Token { .. } => Kept::Token,
        }
    }

    /// Whether it can sign without somebody who is not there.
    pub(crate) fn is_ready(&self) -> bool {
        match &self.secret {
            Secret::Plain(_) => true,
            Secret::Encrypted { passphrases, .. } => passphrases.are_at_hand(),
            Secret::Token { uri, passphrases } => uri.is_ready(passphrases),
        }
    }

    pub(crate) fn sign(&self, bytes: &[u8]) -> Result<Signature> {
        let opened;
        let secret = match &self.secret {
            Secret::Plain(secret) => secret,
            Secret::Encrypted { path, passphrases } => {
                opened = file::open(path, passphrases)?;
                let key = Key::ed25519(&opened.verifying_key().to_bytes());
                ensure!(
                    key == self.key,
                    "{} is not the key that it says it is: put back the one that was made",
                    path.display()
                );
                &opened
            }
            Secret::Token { uri, passphrases } => {
                return Ok(Signature {
                    keyid: self.keyid.clone(),
                    sig: token::sign(uri, &self.key, bytes, passphrases)?,
                });
            }
        };
        Ok(Signature {
            keyid: self.keyid.clone(),
            sig: hex(&secret.sign(bytes).to_bytes()),
        })
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes().chunks(2);
    let byte = |pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    text.bytes()
        .all(|byte| byte.is_ascii_hexdigit())
        .then(|| digits.map(byte).collect())?
}
