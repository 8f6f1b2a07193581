//! The private keys: ed25519, PKCS#8 in PEM, one file each, named by role.
//!
//! | role | files |
//! |---|---|
//! | `root` | `root-1.pem`, `root-2.pem`, … |
//! | `timestamp`, `snapshot`, `targets` | `timestamp.pem` …; after a rotation `timestamp-2.pem` … |
//! | a channel | `channel-<name>.pem`, `channel-<name>-2.pem` … |
//!
//! A name only says where to look: which key signs for a role is what the role's delegator says. A key that is kept elsewhere is one
//! that this machine cannot sign with, and is said so when its signature is needed.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, ensure};
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{DecodePrivateKey as _, EncodePrivateKey as _, KeypairBytes};
use ed25519_dalek::{Signer as _, SigningKey};
use offshoot::trust::schema::{Envelope, Key, RoleKeys, RoleName, Signature};
use serde::Serialize;

/// The directory of keys.
#[derive(Debug)]
pub(crate) struct Keys {
    directory: PathBuf,
}

pub(crate) struct Signer {
    secret: SigningKey,
    pub key: Key,
    pub keyid: String,
    /// Its file, without the directory and `.pem`.
    pub name: String,
}

/// The stem of a channel's key file.
pub(crate) fn of_channel(channel: &RoleName) -> String {
    format!("channel-{channel}")
}

impl Keys {
    pub(crate) fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// Makes a key and keeps it; never over another one.
    pub(crate) fn generate(&self, stem: &str) -> Result<Signer> {
        let mut seed = [0; 32];
        let mut filled = 0;
        while filled < seed.len() {
            filled +=
                rustix::rand::getrandom(&mut seed[filled..], rustix::rand::GetRandomFlags::empty())
                    .context("asking the kernel for random bytes")?;
        }
        let signer = Signer::new(SigningKey::from_bytes(&seed), stem)?;
        // The first version of the format, without the public half: every tool reads it.
        let pair = KeypairBytes {
            secret_key: seed,
            public_key: None,
        };
        let pem = pair
            .to_pkcs8_pem(LineEnding::LF)
            .map_err(|error| anyhow!("writing a key as PKCS#8: {error}"))?;
        write_secret(&self.path(stem), pem.as_bytes())?;
        Ok(signer)
    }

    /// Makes a key under the next number that is free.
    pub(crate) fn generate_next(&self, stem: &str) -> Result<Signer> {
        let mut names = (2u32..).map(|number| format!("{stem}-{number}"));
        let free = names.find(|name| !self.path(name).exists());
        self.generate(&free.with_context(|| format!("no number is free for a key of {stem}"))?)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.pem"))
    }

    /// Those of the keys of a role that are here. `stem` is the name of its files without a number.
    pub(crate) fn of(&self, stem: &str, role: &RoleKeys) -> Result<Vec<Signer>> {
        let mut signers = Vec::new();
        for path in self.files(stem)? {
            let signer = load(&path)?;
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
        let path = self.path(stem);
        path.exists().then(|| load(&path)).transpose()
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
            let rest = name.and_then(|name| name.strip_suffix(".pem")?.strip_prefix(stem));
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
}

impl Signer {
    fn new(secret: SigningKey, name: &str) -> Result<Self> {
        let key = Key::ed25519(&secret.verifying_key().to_bytes());
        let keyid = key.keyid()?;
        let name = name.to_owned();
        Ok(Self {
            secret,
            key,
            keyid,
            name,
        })
    }
}

/// The file of a role, signed by all of `signers`.
pub(crate) fn sign(document: &impl Serialize, signers: &[Signer]) -> Result<Vec<u8>> {
    let mut envelope = Envelope::unsigned(document)?;
    let bytes = envelope.sign_bytes()?;
    for signer in signers {
        let signature = signer.secret.sign(&bytes).to_bytes();
        envelope.signatures.push(Signature {
            keyid: signer.keyid.clone(),
            sig: signature.iter().map(|byte| format!("{byte:02x}")).collect(),
        });
    }
    Ok(envelope.to_bytes()?)
}

/// Never over a file that exists, never half, and never readable by others, not even while it is written.
pub(crate) fn write_secret(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let (Some(directory), part) = (path.parent(), path.with_extension("part")) else {
            return Err(std::io::ErrorKind::InvalidInput.into());
        };
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
        // Unlike a rename, this fails if there is a file.
        fs::hard_link(&part, path)?;
        fs::remove_file(&part)?;
        File::open(directory)?.sync_all()
    };
    write().with_context(|| format!("writing {}", path.display()))
}

fn load(path: &Path) -> Result<Signer> {
    let pem = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    ensure!(
        !pem.contains("ENCRYPTED"),
        "{} is encrypted: decrypt it for the time of signing (openssl pkey -in … -out …)",
        path.display()
    );
    let secret = SigningKey::from_pkcs8_pem(&pem).map_err(|error| {
        anyhow!(
            "{} is not an ed25519 key in PKCS#8 PEM: {error}; put back the one that init made",
            path.display()
        )
    })?;
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    Signer::new(secret, &name)
}
