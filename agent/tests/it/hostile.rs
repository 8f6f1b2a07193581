//! The real daemon against servers that mean it harm, one case after the other. Each is refused by the name that the status and the journal
//! give; meanwhile the daemon grows by no more than [`GROWTH`], the spool holds no more than was signed, what is kept of the metadata is what
//! was signed, and no other file changes. When the harm ends, the device updates as if nothing had been.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::pin::Pin;
use std::process::Command;
use std::sync::LazyLock;
use std::time::Duration;

use offshoot::api;
use offshoot::status::PollFailureKind::{Fetch, Refused};
use offshoot::status::{Failure, PollFailureKind, Status};
use tokio::io::{AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

use crate::cli::{Daemon, serve};
use crate::fixture::{self, ROOT_KEYS, SNAPSHOT_KEY, TIMESTAMP_KEY, sign};
use crate::machine::Machine;
use crate::schema::Root;
use crate::server::{Answer, Request, Server, Then};

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// How much more memory than the idle daemon's an attack may cost, in KiB.
const GROWTH: u64 = 8 << 10;

/// What is neither the spool nor metadata in the state directory: the record and the month's count.
const LEDGERS: u64 = 16 << 10;

const CHUNK: usize = 64 << 10;

/// Sixteen megabytes of nothing.
static BOMB: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let script = "head --bytes=16M /dev/zero | gzip --best";
    let shell = Command::new("sh").args(["-c", script]).output();
    shell.unwrap().stdout
});

type Twist = Box<dyn Fn(&Request, Answer) -> Answer + Send>;

/// One device, that has polled an honest server.
struct Attacked {
    machine: Machine,
    server: Server,
    daemon: Daemon,
    idle: u64,
    before: BTreeMap<String, (u64, i64, i64)>,
    /// The metadata that was published before the harm.
    former: Vec<u8>,
}

impl Attacked {
    fn new(machine: Machine) -> Self {
        Self::behind(machine, |port| port)
    }

    /// The device asks at another port than the server's.
    fn behind(machine: Machine, port: impl FnOnce(u16) -> u16) -> Self {
        let server = serve(&machine);
        let own = server.address.port();
        let other = format!("localhost:{}", port(own));
        configure(&machine, &format!("localhost:{own}"), &other);
        // Whatever is not to be slow is given time; nobody asks but this test.
        configure(&machine, "interval = 1", "interval = 3600");
        configure(&machine, "stall = 5", "stall = 1");
        let daemon = Daemon::start(&machine);
        assert_eq!(daemon.status(&["check"]).0, Some(0));
        Self {
            before: files(&machine),
            idle: memory(&daemon, "VmRSS"),
            former: machine.repository.file("timestamp.json").to_vec(),
            machine,
            server,
            daemon,
        }
    }

    fn begin(&self, twist: Twist) {
        *self.machine.twist.lock().unwrap() = twist;
        let clear = format!("/proc/{}/clear_refs", self.daemon.child.id());
        fs::write(clear, "5").unwrap();
    }

    /// Memory, and what is on the disk. `signed` is what may be in the spool.
    fn assert_bounded(&self, name: &str, signed: u64) -> u64 {
        let grown = memory(&self.daemon, "VmHWM").saturating_sub(self.idle);
        let spooled = size(&self.machine.path("state/spool"));
        assert!(spooled <= signed, "{name}: {spooled} bytes of {signed}");
        let tuf = self.machine.path("state/tuf");
        let ledgers = size(&self.machine.path("state")) - spooled - size(&tuf);
        assert!(ledgers <= LEDGERS, "{name}: {ledgers}");
        for entry in fs::read_dir(tuf).unwrap() {
            let path = entry.unwrap().path();
            let kept = fs::read(&path).unwrap();
            let mut published = self.machine.repository.files.values().chain([&self.former]);
            let signed = published.any(|file| *file == kept) || path.ends_with("floors");
            assert!(signed, "{name}: {}", path.display());
        }
        assert_eq!(files(&self.machine), self.before, "{name}");
        grown
    }

    /// Of a step, as soon as one fails.
    fn first_failure(&self) -> Failure {
        let mut revision = 0;
        loop {
            let status = self.after(revision);
            if let Some(failure) = status.failure {
                return failure;
            }
            assert_ne!(status.step, "rebooting");
            revision = status.revision;
        }
    }

    /// The status once it is another than this.
    fn after(&self, revision: u64) -> Status {
        let mut stream = UnixStream::connect(api::socket(&self.machine.path("run"))).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let request = format!(
            "GET /v1/status?after={revision} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
    }

    /// The server is honest again: the update is installed.
    fn assert_recovers(self, name: &str) {
        self.machine.twisted(|_, answer| answer);
        let (code, status) = self.daemon.status(&["check"]);
        assert_eq!(code, Some(0), "{name}: {status:?}");
        if status.offer.is_some() {
            let output = self.daemon.offshoot(&["update"]);
            assert_eq!(output.status.code(), Some(0), "{name}: {output:?}");
            assert!(self.machine.rebooted(), "{name}");
        }
        assert_eq!(self.daemon.stop(), Some(0), "{name}");
        drop(self.server);
    }
}

/// What went otherwise than it should, so that one run tells of all.
#[derive(Default)]
struct Ledger {
    wrong: Vec<String>,
}

impl Ledger {
    fn refused(&mut self, name: &str, right: bool, failure: &str) {
        if !right {
            self.wrong.push(format!("{name}: {failure}"));
        }
    }

    fn grown(&mut self, name: &str, kib: u64) {
        println!("{kib:>6} KiB  {name}");
        if kib > GROWTH {
            self.wrong.push(format!("{name}: {kib} KiB more than idle"));
        }
    }

    fn close(self) {
        assert!(self.wrong.is_empty(), "{:#?}", self.wrong);
    }
}

/// Another value of a key of the configuration.
fn configure(machine: &Machine, from: &str, to: &str) {
    let path = machine.path("etc/offshoot/config.toml");
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains(from));
    fs::write(path, text.replace(from, to)).unwrap();
}

/// In KiB.
fn memory(daemon: &Daemon, key: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.child.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(key));
    let digits = line.unwrap().trim_matches(|c: char| !c.is_ascii_digit());
    digits.parse().unwrap()
}

fn walk(directory: &Path, found: &mut impl FnMut(&Path, fs::Metadata)) {
    for entry in fs::read_dir(directory).into_iter().flatten() {
        let path = entry.unwrap().path();
        let metadata = fs::symlink_metadata(&path).unwrap();
        if metadata.is_dir() {
            walk(&path, found);
        } else {
            found(&path, metadata);
        }
    }
}

fn size(directory: &Path) -> u64 {
    let mut sum = 0;
    walk(directory, &mut |_, metadata| sum += metadata.len());
    sum
}

/// Every file of the device that an attack has no business with: its length and when it was written.
fn files(machine: &Machine) -> BTreeMap<String, (u64, i64, i64)> {
    let mut files = BTreeMap::new();
    for part in ["sysroot", "efi", "etc", "health", "root.json", "cmdline"] {
        walk(&machine.path(part), &mut |path, metadata| {
            let stamp = (metadata.len(), metadata.mtime(), metadata.mtime_nsec());
            files.insert(path.display().to_string(), stamp);
        });
    }
    assert!(files.len() > 20);
    files
}

fn on(suffix: &'static str, harm: impl Fn(&Request, Answer) -> Answer + Send + 'static) -> Twist {
    Box::new(move |request, honest| {
        if request.path.ends_with(suffix) {
            harm(request, honest)
        } else {
            honest
        }
    })
}

/// Instead of the file, whatever is asked.
fn always(suffix: &'static str, answer: Answer) -> Twist {
    on(suffix, move |_, _| answer.clone())
}

fn endless() -> Answer {
    Answer::new(200, "x".repeat(CHUNK))
        .unmeasured()
        .then(Then::Repeat)
}

fn encoded() -> Answer {
    Answer::new(200, BOMB.clone()).header("content-encoding", "gzip")
}

fn redirect(to: impl ToString) -> Answer {
    Answer::new(302, "").header("location", to)
}

/// Like the file, and one bit is not.
fn spoiled(_: &Request, mut honest: Answer) -> Answer {
    let middle = honest.body.len() / 2;
    honest.body[middle] ^= 1;
    honest
}

fn shorter(_: &Request, mut honest: Answer) -> Answer {
    honest.body.pop();
    honest
}

fn longer(_: &Request, mut honest: Answer) -> Answer {
    honest.body.push(b'+');
    honest
}

/// A list of many of these.
fn list(element: &str, count: usize) -> String {
    format!("[{}]", vec![element; count].join(","))
}

/// An object of many objects.
fn members(count: usize) -> String {
    let members: Vec<_> = (0..count).map(|n| format!("\"{n}\":{{}}")).collect();
    format!("{{{}}}", members.join(","))
}

fn bomb(piece: &str, length: usize) -> Answer {
    Answer::new(200, piece.repeat(length / piece.len()))
}

fn next_root(machine: &Machine, version: u64, seeds: &[u8]) -> Twist {
    let root = Root {
        version: fixture::version(version),
        ..machine.repository.root.clone()
    };
    always("2.root.json", Answer::new(200, sign(&root, seeds)))
}

/// Too slow for the limit, and never silent for as long as a stall.
const DRIP: Then = Then::Drip(Duration::from_millis(900));

/// A poll, of a server with a new release, that goes wrong.
struct Poll {
    name: &'static str,
    /// Published before the harm begins, beside the release.
    prepare: fn(&mut Machine),
    twist: fn(&Machine) -> Twist,
    kind: PollFailureKind,
    fault: &'static str,
}

fn poll(
    name: &'static str,
    twist: fn(&Machine) -> Twist,
    kind: PollFailureKind,
    fault: &'static str,
) -> Poll {
    Poll {
        name,
        prepare: |_| {},
        twist,
        kind,
        fault,
    }
}

const TIMESTAMP: &str = "/timestamp.json";

/// The snapshot says no more of the others than their versions, as TUF allows.
fn unannounced(machine: &mut Machine) {
    let repository = &mut machine.repository;
    for file in repository.snapshot.meta.values_mut() {
        (file.length, file.hashes) = (None, None);
    }
    let bytes = sign(&repository.snapshot, &[SNAPSHOT_KEY]);
    let announced = fixture::announce(repository.snapshot.version, &bytes);
    let path = format!("metadata/{}.snapshot.json", announced.version);
    repository.files.insert(path, bytes);
    repository.timestamp.meta = BTreeMap::from([("snapshot.json".to_owned(), announced)]);
    repository.publish_timestamp();
    machine.upload();
}

fn polled(polls: Vec<Poll>) {
    let factory = Machine::new();
    let mut ledger = Ledger::default();
    for Poll {
        name,
        prepare,
        twist,
        kind,
        fault,
    } in polls
    {
        let mut attacked = Attacked::new(factory.copy());
        attacked.machine.publish("two");
        prepare(&mut attacked.machine);
        let twist = twist(&attacked.machine);
        attacked.begin(twist);
        let (code, status) = attacked.daemon.status(&["check"]);
        assert_eq!(code, Some(7), "{name}: {status:?}");
        let failure = status.last_poll.unwrap().error.unwrap();
        ledger.refused(
            name,
            (failure.kind, failure.fault.as_str()) == (kind, fault),
            &format!("{failure:?}"),
        );
        ledger.grown(name, attacked.assert_bounded(name, 0));
        attacked.assert_recovers(name);
    }
    ledger.close();
}

#[test]
fn endless_metadata_is_cut_off() {
    polled(vec![
        // Endless.
        poll(
            "endless timestamp",
            |_| always(TIMESTAMP, endless()),
            Fetch,
            "too-long",
        ),
        poll(
            "endless root",
            |_| always("2.root.json", endless()),
            Fetch,
            "too-long",
        ),
        poll(
            "endless snapshot",
            |_| always("snapshot.json", endless()),
            Fetch,
            "too-long",
        ),
        poll(
            "endless targets",
            |_| always(".targets.json", endless()),
            Fetch,
            "too-long",
        ),
        poll(
            "endless channel",
            |_| always(".stable.json", endless()),
            Fetch,
            "too-long",
        ),
        poll(
            "endless manifest",
            |_| always(".manifest.json", endless()),
            Fetch,
            "too-long",
        ),
        poll(
            "a terabyte is stated",
            |_| {
                let answer = Answer::new(200, "")
                    .unmeasured()
                    .header("content-length", 1u64 << 40);
                always(TIMESTAMP, answer.then(Then::Hold))
            },
            Fetch,
            "too-long",
        ),
        poll(
            "endless head",
            |_| {
                let head = Answer::raw("HTTP/1.1 200 OK\r\n", "x: y\r\n".repeat(1000));
                always(TIMESTAMP, head.then(Then::Repeat))
            },
            Fetch,
            "malformed",
        ),
        poll(
            "endless header",
            |_| {
                always(
                    TIMESTAMP,
                    Answer::raw("HTTP/1.1 200 OK\r\nx: ", "y".repeat(CHUNK)).then(Then::Repeat),
                )
            },
            Fetch,
            "malformed",
        ),
        poll(
            "endless chunk extension",
            |_| {
                let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1;";
                always(
                    TIMESTAMP,
                    Answer::raw(head, "y".repeat(CHUNK)).then(Then::Repeat),
                )
            },
            Fetch,
            "interrupted",
        ),
        poll(
            "endless early hints",
            |_| {
                let hint = "HTTP/1.1 103 Early Hints\r\n\r\n";
                always(TIMESTAMP, Answer::raw(hint, hint).then(Then::Repeat))
            },
            Fetch,
            "stalled",
        ),
    ]);
}

#[test]
fn slow_metadata_is_given_up() {
    polled(vec![
        // Slow.
        poll(
            "silence",
            |_| always(TIMESTAMP, Answer::raw("", "").then(Then::Hold)),
            Fetch,
            "stalled",
        ),
        poll(
            "slow head",
            |_| always(TIMESTAMP, Answer::raw("HTTP/1.1 200 ", "").then(DRIP)),
            Fetch,
            "stalled",
        ),
        poll(
            "head alone",
            |_| on(TIMESTAMP, |_, honest| honest.cut_at(0).then(Then::Hold)),
            Fetch,
            "stalled",
        ),
        poll(
            "slow body",
            |_| on(TIMESTAMP, |_, honest| honest.cut_at(0).then(DRIP)),
            Fetch,
            "too-slow",
        ),
    ]);
}

#[test]
fn metadata_of_a_wrong_length_or_that_bursts_is_refused() {
    polled(vec![
        // Wrong length.
        poll(
            "short snapshot",
            |_| on("snapshot.json", shorter),
            Refused,
            "wrong-length",
        ),
        poll(
            "long snapshot",
            |_| on("snapshot.json", longer),
            Fetch,
            "too-long",
        ),
        poll(
            "short channel",
            |_| on(".stable.json", shorter),
            Refused,
            "wrong-length",
        ),
        poll(
            "short manifest",
            |_| on(".manifest.json", shorter),
            Refused,
            "wrong-length",
        ),
        poll(
            "body breaks off",
            |_| {
                on("snapshot.json", |_, honest| {
                    honest.cut_at(100).then(Then::Cut)
                })
            },
            Fetch,
            "interrupted",
        ),
        poll(
            "nothing",
            |_| always(TIMESTAMP, Answer::new(200, "")),
            Refused,
            "not-json",
        ),
        // Bombs.
        poll("gzip", |_| always(TIMESTAMP, encoded()), Fetch, "encoded"),
        poll(
            "gzip that is not stated",
            |_| always(TIMESTAMP, Answer::new(200, &BOMB[..8000])),
            Refused,
            "not-utf8",
        ),
        poll(
            "gzip as transfer encoding",
            |_| {
                let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n";
                always(TIMESTAMP, Answer::raw(head, BOMB.clone()).then(Then::Close))
            },
            Refused,
            "not-utf8",
        ),
        poll(
            "nested root",
            |_| always("2.root.json", bomb("[", 60_000)),
            Refused,
            "too-deep",
        ),
        poll(
            "object of objects",
            |_| always("2.root.json", Answer::new(200, members(5000))),
            Refused,
            "malformed",
        ),
        poll(
            "root of noughts",
            |_| always("2.root.json", Answer::new(200, list("0", 30_000))),
            Refused,
            "malformed",
        ),
        poll(
            "timestamp of lists",
            |_| always(TIMESTAMP, Answer::new(200, list("[]", 5000))),
            Refused,
            "malformed",
        ),
        poll(
            "key twice",
            |_| {
                on(TIMESTAMP, |_, honest| {
                    let text = String::from_utf8(honest.body).unwrap();
                    Answer::new(200, text.replacen('{', "{\"signatures\":[],", 1))
                })
            },
            Refused,
            "duplicate-key",
        ),
        Poll {
            prepare: unannounced,
            ..poll(
                "channel of noughts, not announced",
                |_| always(".stable.json", Answer::new(200, list("0", 2_000_000))),
                Fetch,
                "too-long",
            )
        },
        Poll {
            prepare: unannounced,
            ..poll(
                "channel of objects, not announced",
                |_| always(".stable.json", Answer::new(200, members(300_000))),
                Fetch,
                "too-long",
            )
        },
        Poll {
            prepare: unannounced,
            ..poll(
                "small channel of noughts, not announced",
                |_| always(".stable.json", Answer::new(200, list("0", 130_000))),
                Refused,
                "malformed",
            )
        },
        Poll {
            prepare: unannounced,
            ..poll(
                "small channel of objects, not announced",
                |_| always(".stable.json", Answer::new(200, members(20_000))),
                Refused,
                "malformed",
            )
        },
        // Redirects.
        poll(
            "redirect to itself",
            |_| on(TIMESTAMP, |request, _| redirect(&request.path)),
            Fetch,
            "redirected",
        ),
    ]);
}

#[test]
fn metadata_that_was_swapped_mixed_or_half_published_is_refused() {
    polled(vec![
        // Swapped.
        poll(
            "spoiled timestamp",
            |_| {
                on(TIMESTAMP, |_, honest| {
                    let text = String::from_utf8(honest.body).unwrap();
                    Answer::new(200, text.replacen("\"version\":3", "\"version\":9", 2))
                })
            },
            Refused,
            "below-threshold",
        ),
        poll(
            "timestamp by another key",
            |machine| {
                always(
                    TIMESTAMP,
                    Answer::new(200, sign(&machine.repository.timestamp, &[SNAPSHOT_KEY])),
                )
            },
            Refused,
            "below-threshold",
        ),
        poll(
            "snapshot as timestamp",
            |machine| {
                always(
                    TIMESTAMP,
                    Answer::new(200, machine.repository.file("3.snapshot.json")),
                )
            },
            Refused,
            "below-threshold",
        ),
        poll(
            "another channel",
            |machine| {
                always(
                    "3.stable.json",
                    Answer::new(200, machine.repository.file("3.beta.json")),
                )
            },
            Refused,
            "wrong-length",
        ),
        poll(
            "spoiled snapshot",
            |_| on("snapshot.json", spoiled),
            Refused,
            "wrong-digest",
        ),
        poll(
            "spoiled targets",
            |_| on(".targets.json", spoiled),
            Refused,
            "wrong-digest",
        ),
        poll(
            "spoiled channel",
            |_| on(".stable.json", spoiled),
            Refused,
            "wrong-digest",
        ),
        poll(
            "spoiled manifest",
            |_| on(".manifest.json", spoiled),
            Refused,
            "wrong-digest",
        ),
        // Mixed versions.
        poll(
            "former snapshot",
            |machine| {
                always(
                    "3.snapshot.json",
                    Answer::new(200, machine.repository.file("2.snapshot.json")),
                )
            },
            Refused,
            "wrong-digest",
        ),
        poll(
            "former targets",
            |machine| {
                always(
                    "3.targets.json",
                    Answer::new(200, machine.repository.file("2.targets.json")),
                )
            },
            Refused,
            "wrong-digest",
        ),
        poll(
            "former timestamp",
            |machine| {
                let mut timestamp = machine.repository.timestamp.clone();
                timestamp.version = fixture::version(1);
                // The device has seen the second.
                always(
                    TIMESTAMP,
                    Answer::new(200, sign(&timestamp, &[TIMESTAMP_KEY])),
                )
            },
            Refused,
            "rolled-back",
        ),
        poll(
            "root after the next",
            |machine| next_root(machine, 3, &ROOT_KEYS),
            Refused,
            "root-not-sequential",
        ),
        poll(
            "root by one key",
            |machine| next_root(machine, 2, &ROOT_KEYS[..1]),
            Refused,
            "below-threshold",
        ),
        // Half-published.
        poll(
            "no timestamp",
            |_| always(TIMESTAMP, Answer::new(404, "")),
            Refused,
            "missing",
        ),
        poll(
            "no snapshot",
            |_| always("snapshot.json", Answer::new(404, "")),
            Refused,
            "missing",
        ),
        poll(
            "no targets",
            |_| always(".targets.json", Answer::new(404, "")),
            Refused,
            "missing",
        ),
        poll(
            "no channel",
            |_| always(".stable.json", Answer::new(404, "")),
            Refused,
            "missing",
        ),
        poll(
            "no manifest",
            |_| always(".manifest.json", Answer::new(404, "")),
            Refused,
            "missing",
        ),
        poll(
            "a page to log in",
            |_| {
                always(
                    TIMESTAMP,
                    Answer::new(200, "<html>Welcome to our hotel.</html>"),
                )
            },
            Refused,
            "not-json",
        ),
        poll(
            "out of order",
            |_| always(TIMESTAMP, Answer::new(503, "")),
            Fetch,
            "status",
        ),
    ]);
}

/// A download that goes wrong. `http/1.1`: a delta in a superblock and a part, `/0`. `h2`: objects, behind an index.
struct Download {
    name: &'static str,
    twist: Twist,
    fault: &'static str,
}

fn download(name: &'static str, twist: Twist, fault: &'static str) -> Download {
    Download { name, twist, fault }
}

/// Digits of digests, which no compression makes small.
fn noise(length: usize) -> String {
    let digits = |n: usize| offshoot::commit::Sha256::of(&n.to_le_bytes()).to_string();
    (0..length / 64).map(digits).collect()
}

fn downloaded(protocol: &str, downloads: Vec<Download>) {
    let mut ledger = Ledger::default();
    let mut factory = Machine::speaking(protocol);
    let commit = factory.bench.release("two", &noise(1_000_000));
    let (deltas, objects) = match protocol {
        "h2" => (Vec::new(), Some(factory.objects(commit))),
        _ => (vec![factory.delta(Some(factory.factory), commit)], None),
    };
    let content = factory.repository.files.iter();
    let content =
        content.filter(|(path, _)| path.starts_with("deltas/") || path.starts_with("objects/"));
    let signed = content.map(|(_, bytes)| bytes.len() as u64).sum();
    for Download { name, twist, fault } in downloads {
        let mut attacked = Attacked::new(factory.copy_speaking(protocol));
        attacked.begin(twist);
        (attacked.machine).release("two", commit, deltas.clone(), objects.clone());
        assert_eq!(attacked.daemon.status(&["check"]).0, Some(0), "{name}");
        let failure = attacked.first_failure();
        ledger.refused(
            name,
            (failure.step.as_str(), failure.fault.as_str()) == ("fetch", fault),
            &format!("{failure:?}"),
        );
        ledger.grown(name, attacked.assert_bounded(name, signed));
        attacked.assert_recovers(name);
    }
    ledger.close();
}

#[test]
fn a_hostile_delta_is_refused_by_name_and_stays_in_the_spool() {
    downloaded(
        "http/1.1",
        vec![
            download("endless part", always("/0", endless()), "too-long"),
            download(
                "endless superblock",
                always("/superblock", endless()),
                "too-long",
            ),
            download(
                "a terabyte is stated",
                always(
                    "/0",
                    Answer::new(200, "")
                        .unmeasured()
                        .header("content-length", 1u64 << 40)
                        .then(Then::Hold),
                ),
                "wrong-length",
            ),
            download(
                "endless head",
                always(
                    "/0",
                    Answer::raw("HTTP/1.1 200 OK\r\n", "x: y\r\n".repeat(1000)).then(Then::Repeat),
                ),
                "malformed",
            ),
            download(
                "silence",
                always("/0", Answer::raw("", "").then(Then::Hold)),
                "stalled",
            ),
            download(
                "half of it, then silence",
                on("/0", |_, honest| honest.cut_at(50_000).then(Then::Hold)),
                "stalled",
            ),
            download(
                "slow head",
                always("/0", Answer::raw("HTTP/1.1 200 ", "").then(DRIP)),
                "stalled",
            ),
            download(
                "slow body",
                on("/0", |_, honest| honest.cut_at(50_000).then(DRIP)),
                "too-slow",
            ),
            download("short part", on("/0", shorter), "wrong-length"),
            download("long part", on("/0", longer), "wrong-length"),
            download(
                "short part, not stated",
                on("/0", |request, honest| {
                    shorter(request, honest).unmeasured().then(Then::Close)
                }),
                "wrong-length",
            ),
            download(
                "long part, not stated",
                on("/0", |request, honest| {
                    longer(request, honest).unmeasured().then(Then::Close)
                }),
                "too-long",
            ),
            download(
                "part breaks off",
                on("/0", |_, honest| honest.cut_at(50_000).then(Then::Cut)),
                "interrupted",
            ),
            download("gzip", always("/0", encoded()), "encoded"),
            download(
                "redirect to itself",
                on("/0", |request, _| redirect(&request.path)),
                "redirected",
            ),
            download(
                "redirects in a circle",
                on("/0", |request, _| {
                    redirect(if request.path.starts_with("/base/there") {
                        "/base/back/0"
                    } else {
                        "/base/there/0"
                    })
                }),
                "redirected",
            ),
            download(
                "redirect to another protocol",
                always("/0", redirect("http://localhost:80/0")),
                "redirected",
            ),
            download(
                "redirect to a file",
                always("/0", redirect("file:///etc/shadow")),
                "redirected",
            ),
            download("spoiled part", on("/0", spoiled), "wrong-digest"),
            download(
                "spoiled superblock",
                on("/superblock", spoiled),
                "wrong-digest",
            ),
            download(
                "part without its superblock",
                always("/superblock", Answer::new(404, "")),
                "status",
            ),
            download(
                "superblock without its part",
                always("/0", Answer::new(404, "")),
                "status",
            ),
            download(
                "another range",
                on("/0", |request, honest| match request.header("range") {
                    None => honest.cut_at(200_000).then(Then::Cut),
                    Some(_) => Answer::new(206, "x".repeat(100_000))
                        .header("content-range", "bytes 0-99999/600000"),
                }),
                "malformed",
            ),
            download(
                "a range of another file",
                on("/0", |request, honest| match request.header("range") {
                    None => honest.cut_at(200_000).then(Then::Cut),
                    Some(_) => {
                        let range =
                            format!("bytes 200000-{}/9999999", 200_000 + honest.body.len() - 1);
                        Answer::new(206, honest.body).header("content-range", range)
                    }
                }),
                "wrong-length",
            ),
            download(
                "a range that nobody asked for",
                on("/0", |_, honest| Answer {
                    status: 206,
                    ..honest
                }),
                "status",
            ),
            download(
                "no range is ever right",
                on("/0", |request, honest| match request.header("range") {
                    None => honest.cut_at(200_000).then(Then::Cut),
                    Some(_) => Answer::new(416, ""),
                }),
                "interrupted",
            ),
            download(
                "the rest is spoiled",
                on("/0", |request, honest| match request.header("range") {
                    None => honest.cut_at(200_000).then(Then::Cut),
                    Some(_) => spoiled(request, honest),
                }),
                "wrong-digest",
            ),
        ],
    );
}

#[test]
fn hostile_objects_are_refused_by_name_and_stay_in_the_spool() {
    let index = |harm: fn(&Request, Answer) -> Answer| -> Twist {
        Box::new(move |request, honest| {
            if request.path.contains("/objects/index-") {
                harm(request, honest)
            } else {
                honest
            }
        })
    };
    downloaded(
        "h2",
        vec![
            download("endless index", index(|_, _| endless()), "too-long"),
            download("spoiled index", index(spoiled), "wrong-digest"),
            download("short index", index(shorter), "wrong-length"),
            download("no index", index(|_, _| Answer::new(404, "")), "status"),
            download("endless objects", always(".filez", endless()), "too-long"),
            download("spoiled objects", on(".filez", spoiled), "wrong-digest"),
            download(
                "spoiled directories",
                on(".dirtree", spoiled),
                "wrong-digest",
            ),
            download("short objects", on(".filez", shorter), "wrong-length"),
            download("long objects", on(".filez", longer), "wrong-length"),
            download("gzip", always(".filez", encoded()), "encoded"),
            download(
                "no objects",
                always(".filez", Answer::new(404, "")),
                "status",
            ),
            download(
                "redirects",
                on(".filez", |request, _| redirect(&request.path)),
                "redirected",
            ),
            download(
                "long header",
                on(".filez", |_, honest| honest.header("x", "y".repeat(40_000))),
                "interrupted",
            ),
        ],
    );
}

/// What somebody who is no web server does with a connection.
type Raw = Box<dyn Fn(TcpStream, TlsAcceptor) -> Doing + Send>;
type Doing = Pin<Box<dyn Future<Output = io::Result<()>> + Send>>;

/// Stands between the device and the server: brings it what the server says, and then does something else.
struct Impostor {
    port: u16,
    /// It is done with the server.
    alone: watch::Sender<bool>,
}

impl Impostor {
    fn start(server: u16, tls: TlsAcceptor, raw: Raw) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let port = listener.local_addr().unwrap().port();
        let (alone, told) = watch::channel(false);
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime.unwrap().block_on(async move {
                let listener = TcpListener::from_std(listener).unwrap();
                while let Ok((mut tcp, _)) = listener.accept().await {
                    let mut told = told.clone();
                    if *told.borrow_and_update() {
                        // Ends when the device has had enough.
                        tokio::spawn(raw(tcp, tls.clone()));
                    } else {
                        tokio::spawn(async move {
                            let mut server = TcpStream::connect(("127.0.0.1", server)).await?;
                            tokio::select! {
                                _ = copy_bidirectional(&mut tcp, &mut server) => {}
                                _ = told.changed() => {}
                            }
                            io::Result::Ok(())
                        });
                    }
                }
            });
        });
        Self { port, alone }
    }
}

fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let head = [
        length[1], length[2], length[3], kind, flags, 0, 0, 0, stream,
    ];
    [&head[..], payload].concat()
}

/// Shakes hands as HTTP/2 does, and says so once the device has asked for something. What the device sends after that is forgotten.
async fn http2(tcp: TcpStream, tls: TlsAcceptor) -> io::Result<impl AsyncWrite + Unpin + Send> {
    let (mut read, mut write) = tokio::io::split(tls.accept(tcp).await?);
    write.write_all(&frame(4, 0, 0, b"")).await?;
    read.read_exact(&mut [0; 24]).await?;
    loop {
        let mut head = [0; 9];
        read.read_exact(&mut head).await?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        read.read_exact(&mut vec![0; length as usize]).await?;
        match (head[3], head[4] & 1) {
            (1, _) => break,
            (4, 0) => write.write_all(&frame(4, 1, 0, b"")).await?,
            _ => {}
        }
    }
    tokio::spawn(async move { tokio::io::copy(&mut read, &mut tokio::io::sink()).await });
    Ok(write)
}

/// One thing, and another again and again, in pieces of some size.
fn flood(first: Vec<u8>, again: Vec<u8>) -> Raw {
    let again = again.repeat(1 + 4000 / again.len());
    Box::new(move |tcp, tls| {
        let (first, again) = (first.clone(), again.clone());
        Box::pin(async move {
            let mut stream = http2(tcp, tls).await?;
            stream.write_all(&first).await?;
            loop {
                stream.write_all(&again).await?;
            }
        })
    })
}

#[test]
fn whoever_answers_instead_of_a_web_server_is_refused_by_name() {
    // `:status: 200`
    let status = || frame(1, 4, 1, &[0x88]);
    let interim = || frame(1, 4, 1, b"\x08\x03103");
    let literal = [&[0x00, 0x01, b'x', 0x7f, 0x81, 0x7f][..], &[b'y'; 16_384]].concat();
    let plain = |answer: &'static [u8], then_holds: bool| -> Raw {
        Box::new(move |mut tcp, _| {
            Box::pin(async move {
                tcp.write_all(answer).await?;
                if then_holds {
                    tcp.read_to_end(&mut Vec::new()).await?;
                }
                Ok(())
            })
        })
    };
    let cases: Vec<(&str, Raw, &str)> = vec![
        ("silence", plain(b"", true), "unreachable"),
        ("hangs up", plain(b"", false), "unreachable"),
        (
            "another protocol",
            plain(b"SSH-2.0-OpenSSH_10.0\r\n", true),
            "tls",
        ),
        (
            "goes away",
            flood(frame(7, 0, 0, &[0; 8]), frame(7, 0, 0, &[0; 8])),
            "interrupted",
        ),
        (
            "takes it back",
            flood(frame(3, 0, 1, &[0, 0, 0, 2]), frame(6, 0, 0, &[0; 8])),
            "interrupted",
        ),
        (
            "pushes",
            flood(frame(5, 4, 1, &[0, 0, 0, 2, 0x88]), vec![0]),
            "interrupted",
        ),
        (
            "endless header block",
            flood(frame(1, 0, 1, &[0x88]), frame(9, 0, 1, &[0x88; 100])),
            "interrupted",
        ),
        (
            "endless header",
            flood(
                frame(1, 0, 1, &literal[..16_384]),
                frame(9, 0, 1, &[b'y'; 16_384]),
            ),
            "interrupted",
        ),
        (
            "endless early hints",
            flood(Vec::new(), interim()),
            "stalled",
        ),
        (
            "frame too large",
            flood(status(), frame(0, 0, 1, &[b'x'; 1 << 20])),
            "interrupted",
        ),
        (
            "endless body",
            flood(status(), frame(0, 0, 1, &[b'x'; 16_384])),
            "too-long",
        ),
        (
            "body of nothing",
            flood(status(), frame(0, 0, 1, b"")),
            "interrupted",
        ),
        (
            "pings instead of a body",
            flood(status(), frame(6, 0, 0, &[0; 8])),
            "stalled",
        ),
        (
            "pings instead of a head",
            flood(Vec::new(), frame(6, 0, 0, &[0; 8])),
            "stalled",
        ),
        (
            "settings instead of a body",
            flood(status(), frame(4, 0, 0, b"")),
            "stalled",
        ),
        (
            "windows instead of a body",
            flood(status(), frame(8, 0, 0, &[0, 0, 0, 1])),
            "stalled",
        ),
        (
            "frames of no known kind",
            flood(status(), frame(99, 0, 0, &[0; 100])),
            "stalled",
        ),
    ];
    let mut ledger = Ledger::default();
    let factory = Machine::new();
    for (name, raw, fault) in cases {
        let machine = factory.copy_speaking("h2");
        let tls = TlsAcceptor::from(machine.identity.tls.clone());
        let mut impostor = None;
        let mut attacked = Attacked::behind(machine, |server| {
            impostor.insert(Impostor::start(server, tls, raw)).port
        });
        attacked.machine.publish("two");
        attacked.begin(Box::new(|_, honest| honest));
        let impostor = impostor.unwrap();
        impostor.alone.send_replace(true);
        let (code, status) = attacked.daemon.status(&["check"]);
        assert_eq!(code, Some(7), "{name}: {status:?}");
        let failure = status.last_poll.unwrap().error.unwrap();
        ledger.refused(name, failure.fault == fault, &format!("{failure:?}"));
        ledger.grown(name, attacked.assert_bounded(name, 0));
        impostor.alone.send_replace(false);
        attacked.assert_recovers(name);
    }
    ledger.close();
}
