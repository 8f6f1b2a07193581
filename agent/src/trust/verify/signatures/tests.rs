//! Keys and signatures that `openssl` made.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::json;

use super::*;
use crate::trust::schema::{KeyValue, Signature};

/// A key, and how to sign with it.
struct Pair {
    directory: tempfile::TempDir,
    public: String,
}

fn openssl(directory: &Path, words: &str) {
    let output = Command::new("openssl")
        .args(words.split(' '))
        .current_dir(directory)
        .output()
        .expect("openssl: run `make setup`");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "openssl {words}: {stderr}");
}

impl Pair {
    fn new(kind: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        openssl(directory.path(), &format!("genpkey {kind} -out key"));
        openssl(directory.path(), "pkey -in key -pubout -out public");
        let public = fs::read_to_string(directory.path().join("public")).unwrap();
        Self { directory, public }
    }

    fn ecdsa(curve: &str) -> Self {
        Self::new(&format!("-algorithm EC -pkeyopt ec_paramgen_curve:{curve}"))
    }

    fn rsa(bits: u32) -> Self {
        Self::new(&format!("-algorithm RSA -pkeyopt rsa_keygen_bits:{bits}"))
    }

    fn key(&self, keytype: &str, scheme: &str) -> Key {
        Key {
            keytype: keytype.into(),
            scheme: scheme.into(),
            keyval: KeyValue {
                public: self.public.clone(),
            },
        }
    }

    fn sign(&self, how: &str) -> String {
        let directory = self.directory.path();
        fs::write(directory.join("message"), unsigned().sign_bytes().unwrap()).unwrap();
        openssl(
            directory,
            &format!("dgst {how} -sign key -out signature message"),
        );
        let signature = fs::read(directory.join("signature")).unwrap();
        signature.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

const PSS: &str = "-sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen";

fn unsigned() -> Envelope {
    Envelope {
        signatures: Vec::new(),
        signed: json!({"what": "all signatures here are of this"}),
    }
}

/// How many of these keys have signed.
fn count(pairs: &[(&Key, &str)]) -> u64 {
    let keyid = |index| format!("key {index}");
    let keys = pairs.iter().map(|(key, _)| (*key).clone());
    let keys = (0..).map(keyid).zip(keys).collect();
    let signers = RoleKeys {
        keyids: (0..pairs.len()).map(keyid).collect(),
        threshold: pairs.len() as u64,
    };
    let signatures = pairs.iter().map(|(_, sig)| (*sig).to_owned());
    let envelope = Envelope {
        signatures: (0..)
            .map(keyid)
            .zip(signatures)
            .map(|(keyid, sig)| Signature { keyid, sig })
            .collect(),
        ..unsigned()
    };
    match check("role", &signers, &keys, &envelope) {
        Ok(()) => signers.threshold,
        Err(Refusal::BelowThreshold { have, .. }) => have,
        Err(refusal) => panic!("{refusal}"),
    }
}

#[test]
fn clause_4_2_2_each_kind_of_key_counts_by_the_names_of_its_scheme() {
    let (p256, p384, rsa) = (Pair::ecdsa("P-256"), Pair::ecdsa("P-384"), Pair::rsa(2048));
    for (pair, keytype, scheme, how) in [
        (&p256, "ecdsa", "ecdsa-sha2-nistp256", "-sha256"),
        (
            &p256,
            "ecdsa-sha2-nistp256",
            "ecdsa-sha2-nistp256",
            "-sha256",
        ),
        (&p384, "ecdsa", "ecdsa-sha2-nistp384", "-sha384"),
        (
            &p384,
            "ecdsa-sha2-nistp384",
            "ecdsa-sha2-nistp384",
            "-sha384",
        ),
        (
            &rsa,
            "rsa",
            "rsassa-pss-sha256",
            &format!("-sha256 {PSS}:32"),
        ),
        (
            &rsa,
            "rsa",
            "rsassa-pss-sha384",
            &format!("-sha384 {PSS}:48"),
        ),
        (
            &rsa,
            "rsa",
            "rsassa-pss-sha512",
            &format!("-sha512 {PSS}:64"),
        ),
    ] {
        let key = pair.key(keytype, scheme);
        let sig = pair.sign(how);
        assert_eq!(count(&[(&key, &sig)]), 1, "{keytype} {scheme}");
        assert_eq!(count(&[(&key, &sig.to_uppercase())]), 1, "{scheme}");
        for spoiled in [
            sig.replacen(char::is_alphabetic, "0", 1),
            format!("{sig}00"),
            sig[..sig.len() - 2].to_owned(),
            sig[1..].to_owned(),
            String::new(),
        ] {
            assert_eq!(count(&[(&key, &spoiled)]), 0, "{scheme} {spoiled}");
        }
    }
}

#[test]
fn clause_4_2_2_a_scheme_that_is_not_the_keys_or_is_not_known_does_not_count() {
    let (p256, p384, rsa) = (Pair::ecdsa("P-256"), Pair::ecdsa("P-384"), Pair::rsa(2048));
    let pss = format!("-sha256 {PSS}:32");
    for (pair, keytype, scheme, how) in [
        (&p384, "ecdsa", "ecdsa-sha2-nistp256", "-sha256"),
        (&p256, "ecdsa", "ecdsa-sha2-nistp384", "-sha384"),
        (&p256, "ecdsa", "ecdsa-sha2-nistp384", "-sha256"),
        (&p256, "ecdsa", "ecdsa-sha2-nistp256", "-sha384"),
        (&p256, "rsa", "rsassa-pss-sha256", "-sha256"),
        (
            &p256,
            "ecdsa-sha2-nistp384",
            "ecdsa-sha2-nistp256",
            "-sha256",
        ),
        (&p256, "ed25519", "ed25519", "-sha256"),
        (&rsa, "ecdsa", "ecdsa-sha2-nistp256", pss.as_str()),
        (&rsa, "rsa", "rsassa-pss-sha512", &pss),
        (&rsa, "rsa", "rsa-pkcs1v15-sha256", "-sha256"),
        (&rsa, "rsa", "rsassa-pss-sha256", "-sha256"),
        // A salt of another length is another scheme.
        (
            &rsa,
            "rsa",
            "rsassa-pss-sha256",
            &format!("-sha256 {PSS}:20"),
        ),
    ] {
        let key = pair.key(keytype, scheme);
        assert_eq!(
            count(&[(&key, &pair.sign(how))]),
            0,
            "{keytype} {scheme} {how}"
        );
    }
}

/// 4.2.2: at least 2048 bits.
#[test]
fn clause_4_2_2_a_short_key_does_not_count() {
    let pair = Pair::rsa(1024);
    let key = pair.key("rsa", "rsassa-pss-sha256");
    let sig = pair.sign(&format!("-sha256 {PSS}:32"));
    assert_eq!(count(&[(&key, &sig)]), 0);
}

#[test]
fn what_is_no_key_does_not_count() {
    let pair = Pair::ecdsa("P-256");
    let good = pair.key("ecdsa", "ecdsa-sha2-nistp256");
    let sig = pair.sign("-sha256");
    let directory = pair.directory.path();
    openssl(
        directory,
        "pkey -in key -pubout -ec_conv_form compressed -out compressed",
    );
    openssl(
        directory,
        "pkey -in key -pubout -outform DER -out public.der",
    );
    let read = |file| fs::read(directory.join(file)).unwrap();
    let text = |file| String::from_utf8(read(file)).unwrap();
    let hex: String = read("public.der")
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    for public in [
        String::new(),
        hex,
        text("key"),
        text("compressed"),
        good.keyval.public.replace("PUBLIC KEY", "CERTIFICATE"),
        good.keyval.public.replacen('M', "", 1),
    ] {
        let mut key = good.clone();
        key.keyval.public = public;
        assert_eq!(count(&[(&key, &sig)]), 0, "{}", key.keyval.public);
    }
}

#[test]
fn clause_5_3_4_a_key_counts_once_however_it_is_written_and_whatever_its_scheme() {
    let (p256, rsa) = (Pair::ecdsa("P-256"), Pair::rsa(2048));
    let key = p256.key("ecdsa", "ecdsa-sha2-nistp256");
    let (first, second) = (p256.sign("-sha256"), p256.sign("-sha256"));
    assert_ne!(first, second, "the nonce is random");
    let mut twin = p256.key("ecdsa-sha2-nistp256", "ecdsa-sha2-nistp256");
    let body = twin.keyval.public.replace('\n', "\r\n");
    twin.keyval.public = format!("text before it\n{body}text after it");
    assert_eq!(count(&[(&key, &first)]), 1);
    assert_eq!(count(&[(&twin, &second)]), 1);
    assert_eq!(count(&[(&key, &first), (&twin, &second)]), 1);
    assert_eq!(identity(&key), identity(&twin));

    let (short, long) = (
        rsa.key("rsa", "rsassa-pss-sha256"),
        rsa.key("rsa", "rsassa-pss-sha512"),
    );
    let (by_short, by_long) = (
        rsa.sign(&format!("-sha256 {PSS}:32")),
        rsa.sign(&format!("-sha512 {PSS}:64")),
    );
    assert_eq!(count(&[(&short, &by_short), (&long, &by_long)]), 1);
    assert_eq!(
        count(&[(&short, &by_short), (&key, &first), (&long, &by_long)]),
        2
    );
    assert_ne!(identity(&short), identity(&key));
}
