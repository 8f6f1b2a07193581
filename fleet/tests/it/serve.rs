//! `serve`, to the agent's own client and to curl.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use offshoot::commit::Sha256;
use offshoot::fetch::{Name, Reply, Server, ServerConfig, Spool};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::bench::{Bench, noise};

pub(crate) struct Serving {
    child: Child,
    ready: Value,
    log: PathBuf,
}

impl Serving {
    pub(crate) fn start(bench: &Bench, arguments: &[&str]) -> Self {
        let log = bench.path("log");
        let mut child = bench
            .command()
            .args(["serve", "--listen=127.0.0.1:0", "--log=log"])
            .args(arguments)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        Self {
            child,
            ready: serde_json::from_str(&line).unwrap(),
            log,
        }
    }

    fn url(&self) -> &str {
        self.ready["url"].as_str().unwrap()
    }

    fn ca(&self) -> &str {
        self.ready["ca"].as_str().unwrap()
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Asks it to stop; its exit code and what it logged.
    pub(crate) fn stop(mut self) -> (Option<i32>, Vec<Value>) {
        kill_process(self.pid(), Signal::TERM).unwrap();
        let code = self.child.wait().unwrap().code();
        let log = fs::read_to_string(&self.log).unwrap();
        (
            code,
            log.lines()
                .map(|line| serde_json::from_str(line).unwrap())
                .collect(),
        )
    }

    /// Status, headers (lower case) and body.
    fn curl(&self, path: &str, arguments: &[&str]) -> (u16, String, Vec<u8>) {
        let output = Command::new("curl")
            .args([
                "--silent",
                "--path-as-is",
                "--include",
                "--cacert",
                self.ca(),
            ])
            .args(arguments)
            .arg(format!("{}{path}", self.url()))
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let end = output
            .stdout
            .windows(4)
            .position(|four| four == b"\r\n\r\n")
            .unwrap();
        let head = String::from_utf8(output.stdout[..end].to_vec())
            .unwrap()
            .to_lowercase();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, head, output.stdout[end + 4..].to_vec())
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

pub(crate) fn client(serving: &Serving) -> Server {
    let mut config = ServerConfig::new(serving.url());
    config.ca = Some(serving.ca().into());
    Server::new(config, "offshoot/test").unwrap()
}

pub(crate) fn wait<T>(future: impl Future<Output = T>) -> T {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_all().build().unwrap().block_on(future)
}

#[test]
fn a_device_polls_downloads_and_finds_the_server_again() {
    let bench = Bench::new();
    bench.compose("1.0.0", 200_000);
    bench.publish("stable", "1.0.0", &["--full"]);
    let serving = Serving::start(&bench, &[]);
    let mut server = client(&serving);
    wait(async {
        let poll = "metadata/timestamp.json";
        let Reply::Body { bytes, etag } = server.small(poll, 9999, None).await.unwrap() else {
            panic!("no body");
        };
        assert_eq!(bytes, fs::read(bench.public().join(poll)).unwrap());
        let etag = etag.unwrap();
        assert_eq!(
            server.small(poll, 9999, Some(&etag)).await,
            Ok(Reply::NotModified)
        );
        assert_eq!(
            server.small("metadata/2.root.json", 9999, None).await,
            Ok(Reply::NotFound)
        );
        bench.run(&["refresh", "--force"]);
        let Reply::Body { bytes, .. } = server.small(poll, 9999, Some(&etag)).await.unwrap() else {
            panic!("it changed");
        };
        assert_eq!(bytes, fs::read(bench.public().join(poll)).unwrap());
    });
    let authority = fs::read(serving.ca()).unwrap();
    let (code, log) = serving.stop();
    assert_eq!(code, Some(0));
    let seen: Vec<_> = log
        .iter()
        .map(|line| {
            (
                line["status"].as_u64().unwrap(),
                line["http"].as_str().unwrap(),
            )
        })
        .collect();
    assert_eq!(seen, [(200, "2"), (304, "2"), (404, "2"), (200, "2")]);

    // Started again it has another certificate, of the same authority, and a half file is continued.
    let serving = Serving::start(&bench, &["--name=server.example", "--name=10.0.2.2"]);
    assert_eq!(fs::read(serving.ca()).unwrap(), authority);
    for name in ["server.example", "localhost"] {
        let port = serving.ready["listen"]
            .as_str()
            .unwrap()
            .rsplit_once(':')
            .unwrap()
            .1;
        let output = Command::new("curl")
            .args([
                "--silent",
                "--fail",
                "--output",
                "/dev/null",
                "--cacert",
                serving.ca(),
            ])
            .args(["--resolve", &format!("{name}:{port}:127.0.0.1")])
            .arg(format!("https://{name}:{port}/metadata/timestamp.json"))
            .output()
            .unwrap();
        assert!(output.status.success(), "{name}: {output:?}");
    }
    let mut server = client(&serving);
    let directory = fs::read_dir(bench.public().join("deltas"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap();
    let (commit, path) = (Sha256::of(b"any"), directory.path().join("0"));
    let bytes = fs::read(&path).unwrap();
    let spool = Spool::open(bench.path("spool")).unwrap();
    let slot = spool.slot(&offshoot::commit::Commit(commit), Name::Part(0));
    let half = slot.path().with_extension("part");
    fs::create_dir_all(half.parent().unwrap()).unwrap();
    fs::write(&half, &bytes[..bytes.len() / 2]).unwrap();
    let (length, sha256) = (bytes.len() as u64, Sha256::of(&bytes));
    let path = path.strip_prefix(bench.public()).unwrap().to_str().unwrap();
    wait(server.part(path, length, &sha256, &slot, &mut |_| ())).unwrap();
    assert_eq!(fs::read(slot.path()).unwrap(), bytes);
    let (_, log) = serving.stop();
    let last = log.last().unwrap();
    assert_eq!(last["status"], 206);
    assert_eq!(last["bytes"].as_u64().unwrap(), length - length / 2);
}

#[test]
fn curl_sees_a_proper_server_on_both_protocols() {
    let bench = Bench::new();
    fs::create_dir(bench.public().join("deltas")).unwrap();
    let large = noise(200_000);
    fs::write(bench.public().join("deltas/large"), &large).unwrap();
    fs::write(bench.public().join("deltas/.large.part"), &large).unwrap();
    fs::write(bench.public().join("deltas/empty"), "").unwrap();
    std::os::unix::fs::symlink("../../keys", bench.public().join("deltas/link")).unwrap();
    let poll = "metadata/timestamp.json";
    let small = fs::read(bench.public().join(poll)).unwrap();
    let serving = Serving::start(&bench, &[]);
    for protocol in ["--http1.1", "--http2"] {
        for (path, content) in [(poll, &small), ("deltas/large", &large)] {
            let (status, head, body) = serving.curl(path, &[protocol]);
            assert_eq!((status, &body), (200, content), "{path}");
            assert_eq!(
                header(&head, "content-length").unwrap(),
                content.len().to_string()
            );
            let etag = header(&head, "etag").unwrap().to_owned();
            let (status, head, body) = serving.curl(path, &[protocol, "--head"]);
            assert_eq!((status, body.len()), (200, 0));
            assert_eq!(
                header(&head, "content-length").unwrap(),
                content.len().to_string()
            );
            assert_eq!(header(&head, "etag").unwrap(), etag);

            let same = format!("If-None-Match: \"x\", {etag}");
            let (status, head, body) = serving.curl(path, &[protocol, "--header", &same]);
            assert_eq!(
                (status, body.len(), header(&head, "etag")),
                (304, 0, Some(&*etag))
            );
            let (status, _, _) =
                serving.curl(path, &[protocol, "--header", "If-None-Match: \"x\""]);
            assert_eq!(status, 200);

            let (status, head, body) = serving.curl(path, &[protocol, "--range", "10-19"]);
            assert_eq!((status, &body[..]), (206, &content[10..20]));
            let range = format!("bytes 10-19/{}", content.len());
            assert_eq!(header(&head, "content-range").unwrap(), range);
            let (status, _, body) = serving.curl(path, &[protocol, "--range", "-7"]);
            assert_eq!((status, &body[..]), (206, &content[content.len() - 7..]));
            let (status, head, _) = serving.curl(path, &[protocol, "--range", "999999-"]);
            assert_eq!(status, 416);
            let range = format!("bytes */{}", content.len());
            assert_eq!(header(&head, "content-range").unwrap(), range);
            // A half file of another one is not continued.
            let other = ["--range", "10-19", "--header", "If-Range: \"x\""];
            let (status, _, body) = serving.curl(path, &[&[protocol][..], &other].concat());
            assert_eq!((status, body.len()), (200, content.len()));
            let same = format!("If-Range: {etag}");
            let same = ["--range", "10-19", "--header", &same];
            assert_eq!(
                serving.curl(path, &[&[protocol][..], &same].concat()).0,
                206
            );
        }
        assert_eq!(serving.curl("deltas/empty", &[protocol]).0, 200);
        for path in [
            "",
            "metadata",
            "metadata/",
            "nothing",
            "../keys/root-1.pem",
            "metadata/../../keys/root-1.pem",
            "metadata/%2e%2e/%2e%2e/keys/root-1.pem",
            "..%2fkeys/root-1.pem",
            "/etc/passwd",
            "deltas/.large.part",
            "deltas/link/root-1.pem",
            "deltas/large/x",
        ] {
            assert_eq!(serving.curl(path, &[protocol]).0, 404, "{path}");
        }
        let (status, head, _) = serving.curl(poll, &[protocol, "--request", "PUT"]);
        assert_eq!((status, header(&head, "allow")), (405, Some("get, head")));
    }
    let (code, log) = serving.stop();
    assert_eq!(code, Some(0));
    let of = |http: &str| log.iter().filter(|line| line["http"] == http).count();
    assert_eq!(of("1.1"), of("2"));
    assert!(log.iter().all(|line| line["complete"] == true), "{log:?}");
}

/// A request over plain HTTP, and the connection to read the answer from.
fn ask(serving: &Serving, path: &str) -> BufReader<TcpStream> {
    let mut stream = TcpStream::connect(serving.ready["listen"].as_str().unwrap()).unwrap();
    write!(stream, "GET /{path} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    BufReader::new(stream)
}

fn skip_head(reader: &mut BufReader<TcpStream>) {
    let mut line = String::new();
    while line != "\r\n" {
        line.clear();
        reader.read_line(&mut line).unwrap();
    }
}

#[test]
fn a_large_file_takes_little_memory_and_is_finished_before_the_server_stops() {
    const LENGTH: u64 = 128 << 20;
    let bench = Bench::new();
    fs::File::create(bench.public().join("large"))
        .unwrap()
        .set_len(LENGTH)
        .unwrap();
    let serving = Serving::start(&bench, &["--http"]);
    assert_eq!(serving.ready["ca"], Value::Null);
    let mut reader = ask(&serving, "large");
    skip_head(&mut reader);
    kill_process(serving.pid(), Signal::TERM).unwrap();
    let received =
        std::io::copy(&mut reader.by_ref().take(LENGTH - 1), &mut std::io::sink()).unwrap();
    assert_eq!(received, LENGTH - 1);
    let status = fs::read_to_string(format!("/proc/{}/status", serving.child.id())).unwrap();
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
    assert!(
        peak.unwrap().parse::<u64>().unwrap() < 64 << 10,
        "{peak:?} kB"
    );
    let mut rest = Vec::new();
    reader.read_to_end(&mut rest).unwrap();
    assert_eq!(rest.len(), 1);
    let (code, log) = serving.stop();
    assert_eq!(code, Some(0));
    assert_eq!(
        (&log[0]["bytes"], &log[0]["complete"]),
        (&LENGTH.into(), &true.into())
    );
}

#[test]
fn a_client_that_leaves_is_logged_with_what_it_got() {
    const LENGTH: u64 = 64 << 20;
    let bench = Bench::new();
    fs::File::create(bench.public().join("large"))
        .unwrap()
        .set_len(LENGTH)
        .unwrap();
    let serving = Serving::start(&bench, &["--http"]);
    let mut reader = ask(&serving, "large");
    skip_head(&mut reader);
    drop(reader);
    let (_, log) = serving.stop();
    assert_eq!(log[0]["complete"], false);
    assert!(log[0]["bytes"].as_u64().unwrap() < LENGTH);
}
