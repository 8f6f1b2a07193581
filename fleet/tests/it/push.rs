//! `push`: by the real rsync, and to a real store.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use jiff::Timestamp as Time;
use offshoot::fetch::{Server, ServerConfig, Source};
use offshoot::poll::Poller;
use offshoot::trust::store::Store;
use serde_json::{Value, json};

use crate::bench::Bench;
use crate::device::{Device, checked};
use crate::serve::wait;

/// Runs what rsync wants run on the host here, and keeps count; fails from the n-th time on, where n is in the file `working`.
const RSH: &str = "#!/bin/sh\nset -eu\necho x >> \"$0.calls\"\n\
    [ \"$(wc -l < \"$0.calls\")\" -le \"$(cat \"$0.working\")\" ] || exit 255\nshift\nexec \"$@\"\n";

fn rsh(bench: &Bench, working: usize) -> String {
    let path = bench.path("rsh");
    fs::write(&path, RSH).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(bench.path("rsh.calls"), "").unwrap();
    fs::write(bench.path("rsh.working"), working.to_string()).unwrap();
    path.to_str().unwrap().to_owned()
}

/// The version that a device sees there, which has seen nothing before.
fn seen(bench: &Bench, www: &str) -> Option<String> {
    let state = tempfile::tempdir().unwrap();
    let root = bench.public().join("metadata/1.root.json");
    let mut device = Device::new(state.path(), &root);
    let public = bench.path(www);
    let found = device.poll(&public, Time::now()).ok()?.found?;
    Some(checked(&public, &found))
}

#[test]
fn rsync_copies_content_first_and_the_timestamp_last() {
    let bench = Bench::new();
    for (turn, version) in ["1.0.0", "1.1.0"].into_iter().enumerate() {
        bench.compose(version, 3000 + turn);
        bench.publish("stable", version, &["--full"]);
        let former = (turn > 0).then(|| "1.0.0".to_owned());
        // Three connections; each of them may fail.
        for working in 0..3 {
            let rsh = rsh(&bench, working);
            let www = format!("host:{}", bench.path("www").display());
            let output = bench.output(&["push", &www, "--rsh", &rsh]);
            assert_eq!(output.status.code(), Some(1), "{output:?}");
            assert_eq!(seen(&bench, "www"), former, "{version} {working}");
        }
        let rsh = rsh(&bench, 9);
        let www = format!("host:{}", bench.path("www").display());
        let pushed = bench.run(&["push", &www, "--rsh", &rsh]);
        // The others were sent before.
        assert_eq!(pushed["sent"], 1);
        assert_eq!(seen(&bench, "www").as_deref(), Some(version));
        let again = bench.run(&["push", &www, "--rsh", &rsh]);
        assert_eq!((&again["sent"], &again["bytes"]), (&json!(0), &json!(0)));
        assert_eq!(again["files"], pushed["files"]);
    }
    let mode = |path: &str| fs::metadata(bench.path(path)).unwrap().permissions().mode() & 0o777;
    assert_eq!(
        (mode("www/metadata"), mode("www/metadata/timestamp.json")),
        (0o755, 0o644)
    );

    // What nothing names any more goes when it is asked, and what was never ours stays.
    fs::write(bench.path("www/index.html"), "own").unwrap();
    bench.run(&["prune", "--keep=1"]);
    let www = format!("host:{}", bench.path("www").display());
    let rsh = rsh(&bench, 9);
    let kept = bench.run(&["push", &www, "--rsh", &rsh]);
    assert_eq!(kept["removed"], 0);
    let swept = bench.run(&["push", &www, "--rsh", &rsh, "--delete"]);
    assert!(swept["removed"].as_u64() > Some(0));
    fs::remove_file(bench.path("www/index.html")).unwrap();
    let report = bench.run(&["fsck", "--public", "www"]);
    assert_eq!(report["problems"], json!([]));
    assert_eq!(report["unreferenced"]["paths"], json!([]));
    assert_eq!(seen(&bench, "www").as_deref(), Some("1.1.0"));
}

#[test]
fn what_is_damaged_or_cannot_be_reached_is_said() {
    let bench = Bench::new();
    bench.compose("1.0.0", 9);
    bench.publish("stable", "1.0.0", &["--full"]);
    bench.fails(&["push", "ftp://host/path"], 2);
    bench.fails(&["push", "/proc/nowhere"], 1);
    bench.fails(&["push", "host:www", "--rsh", "false"], 1);
    let local = bench.run(&["push", "www"]);
    assert_eq!(local["sent"], local["files"]);
    let object = bench.public().join("deltas");
    let delta = fs::read_dir(object)
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let mut bytes = fs::read(delta.join("0")).unwrap();
    bytes[0] ^= 1;
    fs::write(delta.join("0"), bytes).unwrap();
    let rsh = rsh(&bench, 9);
    bench.fails(&["push", "host:other", "--rsh", &rsh], 1);
    assert_eq!(fs::read(bench.path("rsh.calls")).unwrap(), b"");
}

/// moto's S3, as `make setup` installs it. Ends when its standard input does, so with the tests at the latest.
struct S3 {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    url: String,
}

impl S3 {
    fn start() -> Self {
        let cache = std::env::var_os("OFFSHOOT_CACHE").map_or_else(
            || PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache/offshoot"),
            PathBuf::from,
        );
        let python = cache.join("python-s3/bin/python");
        let mut child = Command::new(&python)
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/s3/server.py"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}; run `make setup`", python.display()));
        let mut store = Self {
            stdin: child.stdin.take().unwrap(),
            stdout: BufReader::new(child.stdout.take().unwrap()),
            child,
            url: String::new(),
        };
        store.url = store.line()["url"].as_str().unwrap().to_owned();
        store
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// What was asked for since the last call; from now on only so many writes are taken.
    fn take(&mut self, writes: Option<usize>) -> Vec<Value> {
        writeln!(self.stdin, "{}", json!({"writes": writes})).unwrap();
        let answer = self.line();
        answer.as_array().unwrap().clone()
    }

    fn push(&self, bench: &Bench, more: &[&str]) -> std::process::Output {
        let mut command = bench.command();
        command
            .env("AWS_ACCESS_KEY_ID", "key")
            .env("AWS_SECRET_ACCESS_KEY", "secret")
            .args([
                "push",
                "s3://bucket/a/b",
                "--region=us-east-1",
                "--endpoint",
                &self.url,
            ])
            .args(more);
        command.output().unwrap()
    }

    fn pushed(&self, bench: &Bench, more: &[&str]) -> Value {
        let output = self.push(bench, more);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// What a device sees there, by the agent's own client.
    fn seen(&self, bench: &Bench) -> Option<String> {
        let mut config = ServerConfig::new(format!("{}/bucket/a/b/", self.url));
        config.insecure_http = true;
        let mut source = Source::from(Server::new(config, "offshoot/test").unwrap());
        let root = fs::read(bench.path("fleet/root.json")).unwrap();
        let state = tempfile::tempdir().unwrap();
        let mut store = Store::open(state.path(), &root).unwrap();
        let mut poller = Poller::new("stable".parse().unwrap(), "qemu-x86_64".parse().unwrap());
        let poll = poller.poll(&mut source, &mut store, Time::now(), Time::UNIX_EPOCH);
        let found = wait(poll).ok()?.found?;
        Some(found.entry.version.to_string())
    }

    fn curl(&self, path: &str, arguments: &[&str]) -> Vec<u8> {
        let output = Command::new("curl")
            .args(["--silent", "--fail"])
            .args(arguments)
            .arg(format!("{}/{path}", self.url))
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        output.stdout
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn writes(asked: &[Value]) -> Vec<&str> {
    let writes = asked.iter().filter(|request| request["method"] == "PUT");
    writes
        .map(|request| request["path"].as_str().unwrap())
        .collect()
}

#[test]
fn a_store_has_the_former_publication_or_the_new_one_after_a_cut_at_any_write() {
    let bench = Bench::new();
    let mut store = S3::start();
    bench.compose("1.0.0", 9);
    bench.publish("stable", "1.0.0", &["--full"]);
    let first = store.pushed(&bench, &[]);
    assert_eq!(first["sent"], first["files"]);
    let asked = store.take(None);
    let order: Vec<_> = writes(&asked)
        .into_iter()
        .map(|path| path.strip_prefix("/bucket/a/b/").unwrap())
        .collect();
    assert_eq!(order.len() as u64, first["sent"].as_u64().unwrap());
    let metadata = order
        .iter()
        .position(|path| path.starts_with("metadata/"))
        .unwrap();
    assert!(
        order[metadata..]
            .iter()
            .all(|path| path.starts_with("metadata/"))
    );
    assert_eq!(order.last(), Some(&"metadata/timestamp.json"));
    let headers = |path: &str| {
        let text = store.curl(&format!("bucket/a/b/{path}"), &["--head"]);
        String::from_utf8(text).unwrap().to_lowercase()
    };
    assert!(headers("metadata/timestamp.json").contains("cache-control: no-cache\r"));
    assert!(headers("metadata/1.root.json").contains("immutable"));
    assert_eq!(store.seen(&bench).as_deref(), Some("1.0.0"));

    bench.compose("1.1.0", 9);
    bench.publish("stable", "1.1.0", &["--full"]);
    let mut sent = 0;
    loop {
        store.take(Some(3));
        let output = store.push(&bench, &[]);
        let asked = store.take(None);
        sent += writes(&asked).len();
        if output.status.success() {
            break;
        }
        assert_eq!(store.seen(&bench).as_deref(), Some("1.0.0"), "after {sent}");
    }
    assert_eq!(store.seen(&bench).as_deref(), Some("1.1.0"));
    // Nothing was sent twice, and nothing is sent again.
    let again = store.pushed(&bench, &[]);
    assert_eq!((&again["sent"], &again["bytes"]), (&json!(0), &json!(0)));
    assert!(writes(&store.take(None)).is_empty());
    assert!(sent < again["files"].as_u64().unwrap() as usize);

    bench.run(&["prune", "--keep=1"]);
    let swept = store.pushed(&bench, &["--delete"]);
    assert!(swept["removed"].as_u64() > Some(0));
    let left = store.curl("bucket?list-type=2&max-keys=1000", &[]);
    let left = String::from_utf8(left).unwrap().matches("<Key>").count();
    assert_eq!(left as u64, swept["files"].as_u64().unwrap());
    assert_eq!(store.seen(&bench).as_deref(), Some("1.1.0"));
}

#[test]
fn a_large_file_goes_in_parts_and_is_known_again() {
    let bench = Bench::new();
    let mut store = S3::start();
    // What there is no bucket for, and what there are no keys for.
    let output = bench.output(&[
        "push",
        "s3://nowhere",
        "--region=us-east-1",
        "--endpoint",
        &store.url,
    ]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let commit = bench.compose("1.0.0", 20 << 20);
    bench.publish("stable", "1.0.0", &["--full"]);
    store.pushed(&bench, &[]);
    let asked = store.take(None);
    let parts = asked.iter().filter(|request| {
        request["method"] == "PUT" && request["query"].as_str().unwrap().contains("partNumber=")
    });
    // The file is in the delta and among the objects: three parts each.
    assert_eq!(parts.count(), 6);
    let name = format!("deltas/empty-{commit}/0");
    let there = store.curl(&format!("bucket/a/b/{name}"), &[]);
    assert!(there == fs::read(bench.public().join(name)).unwrap());
    assert_eq!(store.pushed(&bench, &[])["sent"], 0);
}
