//! Keys, and signing with them where they are.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};
use jiff::Timestamp as Time;
use serde_json::json;

use super::{out, refreshed, say, warn};
use crate::directory::Fleet;
use crate::keys::{self, Kept, Keys, Signer};
use crate::prepared::{self, Content, Goal, Sheet};
use crate::rotate::{self, Change};

#[derive(Subcommand)]
pub(super) enum KeyVerb {
    /// Make a key on the machine where it is to stay, and print its public half.
    ///
    /// The machine needs no other part of a fleet. Take the public half to the operator's directory: `rotate --public FILE` there.
    ///
    /// Example: offshoot-fleet --fleet alice key new --encrypt channel-stable > alice.pub
    New {
        /// The name of its file in `keys`, without .pem: that of the role (root-1, targets, channel-stable).
        name: String,
        /// Give it a passphrase.
        #[arg(long)]
        encrypt: bool,
    },
    /// Use a key that is in a token behind PKCS#11, and print its public half.
    ///
    /// Writes NAME.pkcs11 with the URI and the public half. The PIN is in the URI's pin-source, or asked for as a passphrase is. Make the key
    /// with the token's own tools: ed25519, or ECDSA with P-256 or P-384, which devices verify if their agent has the feature spki.
    ///
    /// Example: offshoot-fleet key attach targets-2 'pkcs11:token=acme;object=targets?module-path=/usr/lib/softhsm/libsofthsm2.so'
    Attach {
        /// The name of its file in `keys`, without .pkcs11.
        name: String,
        /// Which key of which token (RFC 7512), with module-path.
        uri: String,
    },
    /// Print the public half of a key, in PEM.
    Public {
        /// The name of its file in `keys`, without .pem.
        name: String,
    },
    /// Give a key a passphrase.
    ///
    /// The file is PKCS#8, encrypted with AES-256 and a key from scrypt, as `openssl pkey` reads it. Copies that were made before are not
    /// encrypted.
    Encrypt {
        /// The name of a file in `keys`, without .pem.
        name: String,
    },
}

/// Replace a key of a role by a new one, or change how many keys it has and how many of them must sign.
///
/// For a key that was lost or may have been read by others, and for people who come and go. The keys of root, timestamp, snapshot and
/// targets are named by the root, which the root keys sign; a channel's by the targets. Devices follow by themselves; new images take the
/// new root.json. The file of a key that signs no more can be removed then.
///
/// Examples: offshoot-fleet rotate timestamp;
/// offshoot-fleet rotate stable --add-key --public alice.pub --threshold 2 --prepare
#[derive(Args)]
pub(super) struct RotateArguments {
    /// root, timestamp, snapshot, targets, or a channel.
    role: String,
    /// Which of the role's keys is replaced, by its id or the name of its file, if it has more than one.
    #[arg(long)]
    key: Option<String>,
    /// A key more; none is replaced.
    #[arg(long, conflicts_with = "key")]
    add_key: bool,
    /// A key less; none takes its place.
    #[arg(long, value_name = "KEY", conflicts_with_all = ["key", "add_key", "public"])]
    remove_key: Option<String>,
    /// The public half of the new key, which stays where it was made (`key new` and `key public` write one); else a key is made here.
    #[arg(long, value_name = "FILE")]
    public: Option<PathBuf>,
    /// How many of the keys must sign. Without another option, the keys stay as they are.
    #[arg(long, value_name = "N")]
    threshold: Option<u64>,
    /// Others sign: leave what they sign in `prepared`.
    #[arg(long)]
    prepare: bool,
}

/// Sign what a verb with --prepare has left, with the keys that are here.
///
/// Needs nothing but the file and `keys`. What is signed is told: read it. The keys' files are named by the role: root-1.pem, targets.pem,
/// channel-stable.pem. Several people may sign copies of a file; `complete` takes the signatures of all.
///
/// Example: offshoot-fleet --fleet alice sign stable.json
#[derive(Args)]
pub(super) struct SignArguments {
    /// The files, under the names that they have in `prepared`.
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Only tell what would be signed.
    #[arg(long)]
    show: bool,
}

/// Publish what was prepared, when enough keys have signed.
///
/// Takes the signatures of the files that are given, and keeps them; signs with the keys that are here; is exit code 6 while too few have
/// signed, and says who is missing. To give a change up, remove `prepared`.
///
/// Example: offshoot-fleet complete alice/stable.json bob/stable.json
#[derive(Args)]
pub(super) struct CompleteArguments {
    /// Signed copies of files in `prepared`.
    files: Vec<PathBuf>,
}

pub(super) fn key(keys: &Keys, verb: &KeyVerb, json: bool) -> Result<()> {
    match verb {
        KeyVerb::New { name, encrypt } => {
            let kept = if *encrypt {
                Kept::Encrypted
            } else {
                Kept::File
            };
            public(&keys.make(name, kept)?, json)
        }
        KeyVerb::Attach { name, uri } => public(&keys.attach(name, uri)?, json),
        KeyVerb::Public { name } => public(&keys.named(name)?, json),
        KeyVerb::Encrypt { name } => {
            let done = keys.encrypt(name)?;
            say(json, &json!({"key": name, "changed": done}), || {
                let already = if done { "" } else { " already" };
                format!("{name} has a passphrase{already}")
            })
        }
    }
}

pub(super) fn rotate(
    fleet: &Fleet,
    options: &RotateArguments,
    json: bool,
    now: Time,
) -> Result<()> {
    let change = match (&options.remove_key, options.add_key, options.threshold) {
        (Some(key), _, _) => Change::Remove(key.clone()),
        (None, true, _) => Change::Add,
        (None, false, Some(_)) if options.key.is_none() && options.public.is_none() => Change::Keep,
        (None, false, _) => Change::Replace(options.key.clone()),
    };
    let request = rotate::Request {
        role: options.role.clone(),
        change,
        public: options.public.clone(),
        threshold: options.threshold,
        goal: Goal::of(options.prepare),
    };
    let summary = rotate::rotate(fleet, &request, now)?;
    say(json, &summary, || {
        let mut text = format!(
            "{} takes {} of {} keys",
            summary.role, summary.threshold, summary.keys
        );
        if let Some(keyid) = &summary.keyid {
            text += &format!("\n  new: {keyid}");
        }
        if let Some(path) = &summary.key {
            text += &format!(" ({})", path.display());
        }
        if let Some(keyid) = &summary.replaced {
            text += &format!("\n  no more: {keyid}");
        }
        if !summary.prepared.is_empty() {
            text += &format!("\n{}", to_sign(&summary.prepared));
        }
        text
    })
}

pub(super) fn sign(keys: &Keys, options: &SignArguments, json: bool) -> Result<()> {
    let sheets = options.files.iter();
    let sheets = sheets.map(|file| prepared::sign(keys, file, options.show));
    let sheets = sheets.collect::<Result<Vec<_>>>()?;
    say(json, &json!({ "files": sheets }), || {
        sheets.iter().map(shown).collect::<Vec<_>>().join("\n")
    })
}

fn shown(sheet: &Sheet) -> String {
    let Sheet {
        file,
        role,
        version,
        expires,
        content,
        by,
        missing,
    } = sheet;
    let mut text = format!(
        "{}: {role}, version {version}, until {expires}",
        file.display()
    );
    match content {
        Content::Roles(roles) => {
            for (role, signers) in roles {
                let keys = signers.keyids.join(", ");
                text += &format!("\n  {role}: {} of {keys}", signers.threshold);
            }
        }
        Content::Releases(releases) => {
            for release in releases {
                text += &format!(
                    "\n  {:>4}  {} for {}: {}",
                    release.serial, release.version, release.hardware, release.commit
                );
            }
        }
    }
    for (what, keys) in [("signed by", by), ("may sign", missing)] {
        if !keys.is_empty() {
            text += &format!("\n  {what} {}", keys.join(", "));
        }
    }
    text
}

pub(super) fn complete(
    fleet: &Fleet,
    options: &CompleteArguments,
    json: bool,
    now: Time,
) -> Result<()> {
    let done = prepared::complete(fleet, &options.files, now)?;
    warn(&done.warnings);
    say(json, &done, || match &done.signed[..] {
        [] => "was published already".to_owned(),
        signed => refreshed(signed),
    })
}

fn public(signer: &Signer, json: bool) -> Result<()> {
    let pem = keys::to_pem(&signer.key)?;
    if json {
        let answer = json!({"name": signer.name, "keyid": signer.keyid, "kept": signer.kept(), "public": pem});
        return say(true, &answer, String::new);
    }
    out(pem.as_bytes())
}

pub(super) fn or_prepared(files: &[PathBuf], done: impl FnOnce() -> String) -> String {
    if files.is_empty() {
        done()
    } else {
        to_sign(files)
    }
}

fn to_sign(files: &[PathBuf]) -> String {
    let files: Vec<_> = files
        .iter()
        .map(|file| file.display().to_string())
        .collect();
    format!(
        "to sign: {}\nNext: `offshoot-fleet sign` where the keys are, then `offshoot-fleet complete` here",
        files.join(" ")
    )
}
