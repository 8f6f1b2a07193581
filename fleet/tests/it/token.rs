//! Keys in tokens, which are SoftHSM's.

use std::fs;
use std::process::{Command, Output};

use jiff::Timestamp as Time;
use serde_json::{Value, json};

use crate::bench::Bench;
use crate::device::checked;
use crate::python_tuf;

const MODULE: &str = "/usr/lib/softhsm/libsofthsm2.so";

/// A fleet, and a token called acme whose PIN is in the file pin.
struct Token {
    bench: Bench,
}

impl Token {
    fn new() -> Self {
        let token = Self {
            bench: Bench::new(),
        };
        let tokens = token.bench.path("tokens");
        fs::create_dir(&tokens).unwrap();
        let settings = format!(
            "directories.tokendir = {}\nobjectstore.backend = file\n",
            tokens.display()
        );
        fs::write(token.bench.path("softhsm2.conf"), settings).unwrap();
        fs::write(token.bench.path("pin"), "1234\n").unwrap();
        let init = ["--init-token", "--free", "--label=acme", "--so-pin=4321"];
        token.tool("softhsm2-util", &[&init[..], &["--pin=1234"]].concat());
        token
    }

    fn tool(&self, name: &str, arguments: &[&str]) {
        let output = self.with_token(
            Command::new(name).current_dir(self.bench.path("")),
            arguments,
        );
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    }

    fn with_token(&self, command: &mut Command, arguments: &[&str]) -> Output {
        command
            .env("SOFTHSM2_CONF", self.bench.path("softhsm2.conf"))
            .args(arguments)
            .output()
            .unwrap()
    }

    /// A key in the token, made by `openssl genpkey`.
    fn make(&self, label: &str, id: &str, kind: &[&str]) {
        self.tool("openssl", &[&["genpkey", "-out=key.pem"], kind].concat());
        let names = format!("--label={label} --id={id}");
        let import = ["--import=key.pem", "--token=acme", "--pin=1234"];
        let names: Vec<_> = names.split(' ').collect();
        self.tool("softhsm2-util", &[&import[..], &names].concat());
        fs::remove_file(self.bench.path("key.pem")).unwrap();
    }

    fn output(&self, arguments: &[&str]) -> Output {
        self.with_token(&mut self.bench.command(), arguments)
    }

    fn run(&self, arguments: &[&str]) -> Value {
        let output = self.output(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Its key signs for a role alone, from now on; its id.
    fn rotate(&self, role: &str, name: &str, uri: &str) -> Value {
        let uri = format!("{uri}?module-path={MODULE}");
        let pin = "--passphrase-file=pin";
        let mut key = self.run(&["key", "attach", name, &uri, pin]);
        assert_eq!(key["kept"], json!("token"));
        fs::write(self.bench.path("public"), key["public"].as_str().unwrap()).unwrap();
        let summary = self.run(&["rotate", role, "--public=public", pin]);
        assert_eq!(summary["keyid"], key["keyid"]);
        key["keyid"].take()
    }

    fn device_sees(&self, version: &str) {
        let public = self.bench.public();
        let found = self.bench.device().poll(&public, Time::now()).unwrap();
        assert_eq!(checked(&public, &found.found.unwrap()), version);
    }
}

#[test]
fn every_role_is_signed_by_keys_that_no_file_holds() {
    let token = Token::new();
    let bench = &token.bench;
    let curve = |name: &str| format!("-pkeyopt=ec_paramgen_curve:{name}");
    let kinds = [
        ("root", "root-2", vec!["-algorithm=ed25519".to_owned()]),
        (
            "targets",
            "targets-2",
            vec!["-algorithm=EC".to_owned(), curve("P-256")],
        ),
        (
            "stable",
            "channel-stable-2",
            vec!["-algorithm=EC".to_owned(), curve("P-384")],
        ),
        (
            "snapshot",
            "snapshot-2",
            vec!["-algorithm=ed25519".to_owned()],
        ),
        (
            "timestamp",
            "timestamp-2",
            vec!["-algorithm=ed25519".to_owned()],
        ),
    ];
    for (number, (role, name, kind)) in kinds.iter().enumerate() {
        let kind: Vec<_> = kind.iter().flat_map(|one| one.splitn(2, '=')).collect();
        let id = format!("{number:02x}");
        token.make(role, &id, &kind);
        token.rotate(
            role,
            name,
            &format!("pkcs11:token=acme;object={role};id=%{id}"),
        );
    }
    for name in [
        "root-1",
        "targets",
        "channel-stable",
        "snapshot",
        "timestamp",
    ] {
        fs::remove_file(bench.path(&format!("fleet/keys/{name}.pem"))).unwrap();
    }
    bench.compose("1.0.0", 9);
    let publish = Bench::publishing("stable", "1.0.0", &["--full", "--passphrase-file=pin"]);
    token.run(&publish);
    token.device_sees("1.0.0");
    token.run(&["fsck"]);
    let versions = python_tuf::versions(bench, "stable/qemu-x86_64/1.0.0.commit");
    assert_eq!(versions["root"], json!(5));
    // What is asked needs no token.
    let status = bench.run(&["status"]);
    let kept = status["roles"].as_array().unwrap().iter();
    let kept: Vec<_> = kept
        .map(|role| (&role["keys"][0]["kept"], &role["keys"][0]["file"]))
        .collect();
    assert_eq!(kept.len(), 6);
    assert_eq!(
        kept.iter().filter(|kept| *kept.0 == json!("token")).count(),
        5
    );
    assert_eq!(status["warnings"], json!([]));
    // No key is made in a token.
    assert_eq!(
        token
            .output(&["rotate", "timestamp", "--passphrase-file=pin"])
            .status
            .code(),
        Some(1)
    );
    let one = &status["roles"][1]["keys"][0]["keyid"];
    let pem = token.run(&["key", "public", "timestamp-2"]);
    assert_eq!(pem["keyid"], *one);
}

#[test]
fn a_token_that_does_not_sign_publishes_nothing() {
    let token = Token::new();
    let bench = &token.bench;
    token.make("timestamp", "01", &["-algorithm", "ed25519"]);
    token.make("other", "02", &["-algorithm", "ed25519"]);
    let pin = format!("&pin-source=file:{}", bench.path("pin").display());
    token.rotate(
        "timestamp",
        "timestamp-2",
        "pkcs11:token=acme;object=timestamp",
    );
    let file = bench.path("fleet/keys/timestamp-2.pkcs11");
    // As a timer has it: the PIN is in a file.
    let pinned = format!("{MODULE}{pin}");
    let text = fs::read_to_string(&file).unwrap().replace(MODULE, &pinned);
    let with = |from: &str, to: &str, code: i32| {
        fs::write(&file, text.replace(from, to)).unwrap();
        let before = fs::read(bench.public().join("metadata/timestamp.json")).unwrap();
        let output = token.output(&["refresh", "--force"]);
        assert_eq!(output.status.code(), Some(code), "{from} {to}: {output:?}");
        let after = fs::read(bench.public().join("metadata/timestamp.json")).unwrap();
        assert_eq!(after == before, code != 0);
    };
    with("", "", 0);
    for (from, to) in [
        (MODULE, "/usr/lib/nothing.so"),
        (&pin, &format!("{pin}-missing")),
        (&pin, ""),
        ("token=acme", "token=other"),
        ("object=timestamp", "object=missing"),
        ("object=timestamp", "object=other"),
    ] {
        with(from, to, 1);
    }
    fs::write(bench.path("pin"), "1235").unwrap();
    with("", "", 1);
    fs::write(bench.path("pin"), "1234").unwrap();
    with("", "", 0);
    bench.compose("1.0.0", 9);
    token.run(&Bench::publishing("stable", "1.0.0", &["--full"]));
    token.device_sees("1.0.0");
}
