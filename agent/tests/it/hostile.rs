//! The real daemon against servers that mean it harm, one case after the other. Each is refused by the name that the status and the journal
//! give; meanwhile the daemon grows by no more than [`GROWTH`], the spool holds no more than was signed, what is kept of the metadata is what
//! was signed, and no other file changes. When the harm ends, the device updates as if nothing had been.
//!
//! `metadata`: what a poll asks for; `content`: deltas and objects; `impostor`: what is not HTTP, or HTTP/2 frame by frame.

mod content;
mod impostor;
mod metadata;

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;
use std::time::Duration;

use offshoot::api;
use offshoot::status::PollFailureKind::{Fetch, Refused};
use offshoot::status::{Failure, PollFailureKind, Status};

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
