//! The client's key, where it is not a file: in a TPM, a secure element or another device that PKCS#11 speaks to.
//!
//! A command that the configuration names signs for it, once in each handshake. The contract:
//!
//! | | |
//! |---|---|
//! | last argument | `ecdsa-p256-sha256` or `ecdsa-p384-sha384`: the certificate's key says which |
//! | standard input | the message, to be hashed and signed |
//! | standard output | the signature in DER, and nothing else |
//! | exit code | 0; anything else refuses the connection |
//!
//! It is given [`LIMIT`]; the daemon waits for it and does nothing else meanwhile. A power cut leaves nothing. The key is never in the daemon's
//! memory, and whatever library speaks to the device is not in its process.
//!
//! RSA is left out: TLS 1.3 wants PSS with a salt as long as the hash, which many TPMs cannot make.

use std::io::{Read as _, Write as _};
use std::process::{Command, Stdio};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal, kill_process};
use rustls::pki_types::CertificateDer;
use rustls::server::ParsedCertificate;
use rustls::sign::{CertifiedKey, SigningKey, SingleCertAndKey};
use rustls::{OtherError, SignatureAlgorithm, SignatureScheme};

/// A TPM takes a quarter of a second, one that is being initialised a few.
const LIMIT: Duration = Duration::from_secs(10);

/// More than any signature in DER.
const SIGNATURE_LIMIT: u64 = 1024;

/// Why there is no signature.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}")]
pub(super) struct NotSigned {
    pub(super) what: String,
}

#[derive(Clone, Debug)]
struct Elsewhere {
    command: Vec<String>,
    scheme: SignatureScheme,
    name: &'static str,
}

/// Shows this chain, whose key the command has.
pub(super) fn certified(
    chain: Vec<CertificateDer<'static>>,
    command: Vec<String>,
) -> anyhow::Result<SingleCertAndKey> {
    if command.is_empty() {
        bail!("server.identity.signer is empty: name the command that signs");
    }
    let leaf = chain.first().context("it holds no certificate")?;
    let key = ParsedCertificate::try_from(leaf)
        .context("reading it")?
        .subject_public_key_info();
    // The curves' object identifiers, as they stand in the key's description.
    let is_of = |curve: &[u8]| {
        key.windows(curve.len())
            .take(32)
            .any(|found| found == curve)
    };
    let (scheme, name) = if is_of(b"\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07") {
        (SignatureScheme::ECDSA_NISTP256_SHA256, "ecdsa-p256-sha256")
    } else if is_of(b"\x06\x05\x2b\x81\x04\x00\x22") {
        (SignatureScheme::ECDSA_NISTP384_SHA384, "ecdsa-p384-sha384")
    } else {
        bail!(
            "its key is not on P-256 or P-384, which `signer` is for: give the device such a key"
        );
    };
    let key = Elsewhere {
        command,
        scheme,
        name,
    };
    Ok(CertifiedKey::new(chain, Arc::new(key)).into())
}

impl SigningKey for Elsewhere {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn rustls::sign::Signer>> {
        if offered.contains(&self.scheme) {
            Some(Box::new(self.clone()))
        } else {
            None
        }
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        SignatureAlgorithm::ECDSA
    }
}

impl rustls::sign::Signer for Elsewhere {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rustls::Error> {
        ask(&self.command, self.name, message).map_err(|error| {
            let what = format!("{error:#}");
            rustls::Error::Other(OtherError(Arc::new(NotSigned { what })))
        })
    }

    fn scheme(&self) -> SignatureScheme {
        self.scheme
    }
}

fn ask(command: &[String], name: &str, message: &[u8]) -> anyhow::Result<Vec<u8>> {
    let [program, arguments @ ..] = command else {
        bail!("no command");
    };
    let mut child = Command::new(program)
        .args(arguments)
        .arg(name)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {program}"))?;
    let id = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let message = message.to_vec();
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut signed = move || {
            if let Some(mut stdin) = child.stdin.take() {
                match stdin.write_all(&message) {
                    // It ended without reading: its exit code says why.
                    Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
                    written => written?,
                }
            }
            let mut signature = Vec::new();
            if let Some(stdout) = child.stdout.take() {
                stdout.take(SIGNATURE_LIMIT).read_to_end(&mut signature)?;
            }
            Ok((signature, child.wait()?))
        };
        let outcome: std::io::Result<_> = signed();
        // Nobody waits any more if it took too long.
        let _ = sender.send(outcome);
    });
    match receiver.recv_timeout(LIMIT) {
        Ok(Ok((signature, status))) if status.success() && !signature.is_empty() => Ok(signature),
        Ok(Ok((_, status))) => bail!("{program} made no signature and ended with {status}"),
        Ok(Err(error)) => Err(error).with_context(|| format!("asking {program}")),
        Err(_) => {
            if let Some(id) = id {
                // Gone already, or now.
                let _ = kill_process(id, Signal::KILL);
            }
            bail!("{program} made no signature in {LIMIT:?}")
        }
    }
}
