//! The real `offshoot daemon` and the verbs that talk to it, as an operator meets them.

use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::Duration;

use offshoot::api;
use offshoot::decide::Why;
use offshoot::status::Status;
use rustix::process::{Pid, Signal, kill_process};

use crate::machine::Machine;
use crate::server::{Answer, Server};

const PROGRAM: &str = env!("CARGO_BIN_EXE_offshoot");

pub struct Daemon {
    root: PathBuf,
    pub child: Child,
}

impl Daemon {
    /// Started, and ready as it tells the service manager.
    pub fn start(machine: &Machine) -> Self {
        let socket = machine.path("notify");
        let manager = UnixDatagram::bind(&socket).unwrap();
        manager
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        let child = Command::new(PROGRAM)
            .arg("--root")
            .arg(machine.path(""))
            .arg("daemon")
            .env("NOTIFY_SOCKET", &socket)
            .env_remove("JOURNAL_STREAM")
            .spawn()
            .unwrap();
        let mut word = [0; 256];
        let length = manager.recv(&mut word).unwrap();
        assert_eq!(&word[..length], b"READY=1\n");
        std::fs::remove_file(socket).unwrap();
        Self {
            root: machine.path(""),
            child,
        }
    }

    pub fn stop(mut self) -> Option<i32> {
        let pid = Pid::from_raw(self.child.id().try_into().unwrap()).unwrap();
        kill_process(pid, Signal::TERM).unwrap();
        self.child.wait().unwrap().code()
    }

    pub fn offshoot(&self, arguments: &[&str]) -> Output {
        offshoot(&self.root, arguments)
    }

    pub fn status(&self, arguments: &[&str]) -> (Option<i32>, Status) {
        let output = self.offshoot(arguments);
        let status = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}: {output:?}"));
        (output.status.code(), status)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Gone already if the test went well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The machine's server, on a thread of its own: the tests here wait for processes.
pub fn serve(machine: &Machine) -> Server {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let server = runtime.block_on(machine.server());
    std::thread::spawn(move || runtime.block_on(std::future::pending::<()>()));
    server
}

fn offshoot(root: &Path, arguments: &[&str]) -> Output {
    Command::new(PROGRAM)
        .arg("--root")
        .arg(root)
        .arg("--json")
        .args(arguments)
        .output()
        .unwrap()
}

#[test]
fn every_verb_ends_with_its_code() {
    let machine = Machine::new();
    let _server = serve(&machine);
    assert_eq!(
        offshoot(&machine.path(""), &["status"]).status.code(),
        Some(4)
    );
    assert_eq!(
        offshoot(&machine.path(""), &["upgrade"]).status.code(),
        Some(2)
    );

    let daemon = Daemon::start(&machine);
    let (code, status) = daemon.status(&["check"]);
    assert_eq!((code, status.why), (Some(0), Some(Why::NothingOffered)));
    let (code, status) = daemon.status(&["status"]);
    assert_eq!((code, status.booted.commit), (Some(0), machine.factory));
    let (code, status) = daemon.status(&["update"]);
    assert_eq!((code, status.why), (Some(6), Some(Why::NothingOffered)));
    let (code, status) = daemon.status(&["hold", "a demonstration"]);
    assert_eq!(code, Some(0));
    assert_eq!(status.hold.unwrap().reason, "a demonstration");
    let (code, status) = daemon.status(&["hold", "--release"]);
    assert_eq!((code, status.hold), (Some(0), None));
    let unknown = machine.factory.to_string();
    assert_eq!(daemon.offshoot(&["retry", &unknown]).status.code(), Some(1));
    let output = daemon.offshoot(&["channel"]);
    assert_eq!(output.stdout, b"{\"channel\":\"stable\"}\n");
    let (code, status) = daemon.status(&["channel", "beta"]);
    assert_eq!((code, status.channel.as_str()), (Some(0), "beta"));
    // A channel that the server does not have: it is followed, and the poll says so.
    assert_eq!(daemon.status(&["channel", "nightly"]).0, Some(7));
    assert_eq!(
        daemon.offshoot(&["channel", "No Such"]).status.code(),
        Some(1)
    );
    let (code, status) = daemon.status(&["channel", "--reset"]);
    assert_eq!((code, status.channel.as_str()), (Some(0), "stable"));
    machine.twisted(|_, _| Answer::new(503, ""));
    assert_eq!(daemon.status(&["check"]).0, Some(7));
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn everybody_may_look_and_only_root_may_change() {
    let machine = Machine::new();
    let _server = serve(&machine);
    let daemon = Daemon::start(&machine);
    // The temporary directory is private; the socket is not.
    let open = Command::new("chmod")
        .arg("a+rx")
        .arg(machine.path(""))
        .status();
    assert!(open.unwrap().success());
    let nobody = |method: &str, path: &str| {
        let output = Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .args(["curl", "--silent", "--output", "/dev/null"])
            .args(["--write-out", "%{http_code}", "--request", method])
            .arg("--unix-socket")
            .arg(machine.path("run/offshoot.sock"))
            .arg(format!("http://offshoot{path}"))
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(nobody("GET", "/v1/status"), "200");
    for (method, path) in [
        ("POST", "/v1/update"),
        ("POST", "/v1/check"),
        ("DELETE", "/v1/hold"),
        ("PUT", "/v1/channel"),
    ] {
        assert_eq!(nobody(method, path), "403", "{method} {path}");
    }
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn a_hostile_client_is_refused_and_the_daemon_stays() {
    let machine = Machine::new();
    let _server = serve(&machine);
    let daemon = Daemon::start(&machine);
    let talk = |request: &[u8]| {
        let mut stream = UnixStream::connect(api::socket(&machine.path("run"))).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        // It may be refused before all of it is said.
        let _ = stream.write_all(request);
        let mut answer = [0; 12];
        match stream.read_exact(&mut answer) {
            Ok(()) => String::from_utf8(answer.to_vec()).unwrap(),
            Err(_) => String::new(),
        }
    };
    let head = |line: &str, length: usize| {
        format!(
            "{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
        )
    };
    let long = "x".repeat(5000);
    for (request, code) in [
        ("nonsense\r\n\r\n".to_owned(), "HTTP/1.1 400"),
        (head("GET /v1/status?after=x", 0), "HTTP/1.1 400"),
        (head("GET /", 0), "HTTP/1.1 404"),
        (head("PUT /v1/hold", 2) + "{}", "HTTP/1.1 400"),
        (head("PUT /v1/hold", 9) + "{\"a\": \"b\"", "HTTP/1.1 400"),
        (head("PUT /v1/hold", long.len()) + &long, "HTTP/1.1 400"),
        (head("DELETE /v1/rejections/x", 0), "HTTP/1.1 400"),
        (
            format!("GET /{} HTTP/1.1\r\n", "y".repeat(60_000)),
            "HTTP/1.1 431",
        ),
    ] {
        let answer = talk(request.as_bytes());
        let start: String = request.chars().take(40).collect();
        assert!(
            answer == code || (code.ends_with("431") && answer.is_empty()),
            "{start}: {answer}"
        );
    }
    // More connections than are served at a time, all silent, then gone.
    let silent: Vec<_> = (0..40)
        .map(|_| UnixStream::connect(api::socket(&machine.path("run"))).unwrap())
        .collect();
    drop(silent);
    assert_eq!(daemon.status(&["status"]).0, Some(0));
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn update_follows_until_the_reboot() {
    let mut machine = Machine::new();
    let _server = serve(&machine);
    let daemon = Daemon::start(&machine);
    daemon.status(&["hold", "until told"]);
    let target = machine.publish("two");
    let (code, status) = daemon.status(&["update"]);
    assert_eq!((code, status.why), (Some(6), Some(Why::Held)));
    daemon.status(&["hold", "--release"]);
    let output = daemon.offshoot(&["update"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let lines = String::from_utf8(output.stdout).unwrap();
    let last: Status = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
    assert_eq!(last.step, "rebooting");
    assert_eq!(last.offer.unwrap().commit, target);
    assert!(machine.rebooted());
    assert_eq!(daemon.stop(), Some(0));
}
