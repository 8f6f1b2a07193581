//! Keys that are not plain files: with a passphrase.

use std::fs;
use std::io::{Read as _, Write as _};
use std::process::{Command, Output, Stdio};

use jiff::Timestamp as Time;
use serde_json::{Value, json};

use crate::bench::{Bench, files};
use crate::device::checked;

const VARIABLE: &str = "OFFSHOOT_FLEET_PASSPHRASE";

/// Without a terminal to ask on.
fn alone(bench: &Bench, arguments: &[&str]) -> Output {
    let mut command = Command::new("setsid");
    command
        .args([
            "--wait",
            env!("CARGO_BIN_EXE_offshoot-fleet"),
            "--json",
            "--fleet=fleet",
        ])
        .args(arguments)
        .current_dir(bench.path(""))
        .stdin(Stdio::null());
    command.output().unwrap()
}

fn openssl(bench: &Bench, arguments: &[&str]) -> Vec<u8> {
    let output = Command::new("openssl")
        .args(arguments)
        .current_dir(bench.path(""))
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    output.stdout
}

fn kept(status: &Value) -> Vec<(&str, &str)> {
    let roles = status["roles"].as_array().unwrap().iter();
    roles
        .map(|role| {
            (
                role["role"].as_str().unwrap(),
                role["keys"][0]["kept"].as_str().unwrap(),
            )
        })
        .collect()
}

fn encrypted() -> Bench {
    let bench = Bench::empty();
    fs::write(bench.path("passphrase"), "open sesame\n").unwrap();
    let init = [
        "init",
        "--encrypt",
        "--channel=stable",
        "--hardware=qemu-x86_64",
        "--passphrase-file=passphrase",
    ];
    bench.run(&init);
    bench
}

#[test]
fn keys_with_a_passphrase_sign_for_who_knows_it_and_are_known_to_who_does_not() {
    let bench = encrypted();
    let status: Value = serde_json::from_slice(&alone(&bench, &["status"]).stdout).unwrap();
    assert_eq!(
        kept(&status),
        [
            ("root", "encrypted"),
            ("timestamp", "file"),
            ("snapshot", "file"),
            ("targets", "encrypted"),
            ("stable", "encrypted"),
        ]
    );
    bench.compose("1.0.0", 9);
    let publish = Bench::publishing("stable", "1.0.0", &["--full"]);
    let before = files(&bench.public().join("metadata"));
    let mut refused = vec![alone(&bench, &publish)];
    fs::write(bench.path("wrong"), "open barley").unwrap();
    refused.push(bench.output(&[&publish[..], &["--passphrase-file=wrong"]].concat()));
    refused.push(bench.output(&[&publish[..], &["--passphrase-file=missing"]].concat()));
    for output in refused {
        assert_eq!(output.status.code(), Some(1), "{output:?}");
    }
    assert_eq!(files(&bench.public().join("metadata")), before);
    // A timer has none, and needs none.
    let output = alone(&bench, &["refresh", "--force"]);
    assert!(output.status.success(), "{output:?}");

    let mut command = bench.command();
    let output = command
        .env(VARIABLE, "open sesame")
        .args(&publish)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    // What joins them is kept like them.
    let mut command = bench.command();
    command
        .env(VARIABLE, "open sesame")
        .args(["rotate", "stable"]);
    assert!(command.output().unwrap().status.success());
    bench.run(&["channel", "add", "beta", "--passphrase-file=passphrase"]);
    let status: Value = serde_json::from_slice(&alone(&bench, &["status"]).stdout).unwrap();
    assert!(
        kept(&status).contains(&("stable", "encrypted"))
            && kept(&status).contains(&("beta", "encrypted"))
    );
    let found = bench
        .device()
        .poll(&bench.public(), Time::now())
        .unwrap()
        .found;
    assert_eq!(checked(&bench.public(), &found.unwrap()), "1.0.0");
    for (path, ..) in files(&bench.path("fleet/keys")) {
        let text = fs::read_to_string(&path).unwrap();
        let plain = ["timestamp.pem", "snapshot.pem"]
            .contains(&path.file_name().unwrap().to_str().unwrap());
        assert_eq!(text.contains("BEGIN PRIVATE KEY"), plain, "{path:?}");
    }
}

#[test]
fn openssl_reads_what_is_encrypted_and_what_openssl_encrypts_is_read() {
    let bench = encrypted();
    let public = |path: &str| {
        openssl(
            &bench,
            &[
                "pkey",
                "-in",
                path,
                "-passin",
                "pass:open sesame",
                "-pubout",
                "-outform",
                "DER",
            ],
        )
    };
    let targets = fs::read_to_string(bench.path("fleet/keys/targets.pem")).unwrap();
    let digits = targets
        .lines()
        .next()
        .unwrap()
        .strip_prefix("Public-Key: ed25519 ")
        .unwrap();
    let der = public("fleet/keys/targets.pem");
    let found: String = der[der.len() - 32..]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert_eq!(found, digits);

    // A key that was made plain gets one later, and stays the same key.
    let before = public("fleet/keys/timestamp.pem");
    let encrypt = [
        "key",
        "encrypt",
        "timestamp",
        "--passphrase-file=passphrase",
    ];
    assert_eq!(bench.run(&encrypt)["changed"], json!(true));
    assert_eq!(bench.run(&encrypt)["changed"], json!(false));
    assert_eq!(public("fleet/keys/timestamp.pem"), before);
    bench.fails(
        &["key", "encrypt", "nothing", "--passphrase-file=passphrase"],
        1,
    );
    bench.run(&["refresh", "--force", "--passphrase-file=passphrase"]);

    let path = "fleet/keys/snapshot.pem";
    let text = openssl(
        &bench,
        &[
            "pkey",
            "-in",
            path,
            "-aes256",
            "-passout",
            "pass:open sesame",
        ],
    );
    fs::write(bench.path(path), text).unwrap();
    bench.compose("1.0.0", 9);
    bench.publish("stable", "1.0.0", &["--passphrase-file=passphrase"]);
    // What is above a key speaks of that key.
    let stable = fs::read_to_string(bench.path("fleet/keys/channel-stable.pem")).unwrap();
    let (says, _) = targets.split_once('\n').unwrap();
    let (_, holds) = stable.split_once('\n').unwrap();
    fs::write(
        bench.path("fleet/keys/targets.pem"),
        format!("{says}\n{holds}"),
    )
    .unwrap();
    bench.fails(&["rotate", "stable", "--passphrase-file=passphrase"], 1);
    fs::write(bench.path("fleet/keys/targets.pem"), stable).unwrap();
    bench.fails(&["rotate", "stable", "--passphrase-file=passphrase"], 6);
}

#[test]
fn a_passphrase_is_asked_for_on_the_terminal() {
    let bench = Bench::empty();
    let typed = |arguments: &str, lines: &[&str]| {
        let program = env!("CARGO_BIN_EXE_offshoot-fleet");
        let mut command = Command::new("script");
        command
            .args([
                "--quiet",
                "--return",
                "--command",
                &format!("{program} --fleet fleet {arguments}"),
                "/dev/null",
            ])
            .env_remove(VARIABLE)
            .current_dir(bench.path(""))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut typing = child.stdin.take().unwrap();
        let mut shown = Vec::new();
        let output = child.stdout.as_mut().unwrap();
        for line in lines {
            // Each question ends so.
            while !shown.ends_with(b": ") {
                let mut byte = [0];
                output.read_exact(&mut byte).unwrap();
                shown.push(byte[0]);
            }
            writeln!(typing, "{line}").unwrap();
            shown.push(b'\n');
        }
        drop(typing);
        output.read_to_end(&mut shown).unwrap();
        (
            child.wait().unwrap(),
            String::from_utf8_lossy(&shown).into_owned(),
        )
    };
    let init = "init --encrypt --hardware=qemu-x86_64";
    let (status, _) = typed(init, &["one", "two"]);
    assert_eq!(status.code(), Some(1));
    fs::remove_dir_all(bench.path("fleet")).unwrap();
    let (status, shown) = typed(init, &["open sesame", "open sesame"]);
    assert!(status.success() && !shown.contains("sesame"), "{shown}");
    // Twice for the key that is made; the others have the same one.
    let (status, shown) = typed("rotate stable", &["open sesame", "open sesame"]);
    assert!(status.success() && !shown.contains("sesame"), "{shown}");
    // One that is wrong opens nothing.
    let (status, _) = typed(
        "channel add beta",
        &["open barley", "open barley", "barley"],
    );
    assert_eq!(status.code(), Some(1));
    fs::write(bench.path("passphrase"), "open sesame").unwrap();
    bench.run(&["rotate", "snapshot", "--passphrase-file=passphrase"]);
}
