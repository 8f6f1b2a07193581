//! What each way to a release costs, beside what `ostree pull` costs for the same release: bytes on the wire, requests, time, memory.
//!
//! The releases are Debian: a stable release with some packages in older versions, the same with the newer ones, with the next kernel, and with an
//! application added. One nginx serves them, over HTTP/2 and TLS, to both clients; a relay between counts every byte in both directions. A client
//! begins with a sysroot that runs the release before, and is done when the new one is whole in its repository: `ostree pull` ends, or the daemon
//! waits for consent to try the release. What the daemon took is that of its whole life, with every run of the deployer.
//!
//! Needs no machine, but root. Nothing here tells whether the numbers are good: docs/benchmarks.md does.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use bootloader_glue::grub;
use offshoot::commit::Commit;
use offshoot::decide::Why;
use offshoot::status::Status;
use rustix::process::{Pid, Signal, kill_process};

use crate::cache::{Cache, Ingredients};
use crate::os::{self, Packages};
use crate::server::Server;
use crate::{host, run};

const HARDWARE: &str = "pc";
const MAIN: &str = "deb http://deb.debian.org/debian trixie main";
const SECURITY: &str = "deb http://deb.debian.org/debian-security trixie-security main";

/// The kernel of the last point release, though the security archive has a newer one.
const KERNEL: &str = "Package: linux-image*\nPin: release n=trixie\nPin-Priority: 1002\n\n";
/// What the security archive had before the point release brought something newer.
const BEFORE: &str = "Package: *\nPin: release n=trixie-security\nPin-Priority: 1001\n";

/// A channel in which every release has a delta from the one before it, and one with a delta from nothing.
const CHAIN: &str = "chain";
const FULL: &str = "full";

/// Longer than anything takes.
const PATIENCE: Duration = Duration::from_secs(1800);

/// Longer than the daemon keeps a connection that is quiet.
const QUIET: Duration = Duration::from_secs(21);

/// What somebody took for something.
#[derive(Clone, Copy)]
struct Cost {
    wire: u64,
    requests: u64,
    seconds: f64,
    cpu: f64,
    /// KiB. Of the daemon and of the largest run of the deployer together; of `ostree`.
    memory: u64,
}

/// Measures, and prints one table for each pair of releases.
pub fn routes(cache: &Cache) -> Result<()> {
    let steps = [
        ("", [KERNEL, BEFORE].concat(), None),
        ("updates of libraries", KERNEL.to_owned(), None),
        ("another kernel", String::new(), None),
        ("an application (nginx)", String::new(), Some("nginx-light")),
    ];
    let mut trees = Vec::new();
    for (number, (_, preferences, more)) in steps.iter().enumerate() {
        let packages = Packages {
            more: more.as_slice(),
            sources: &[MAIN, SECURITY],
            preferences,
        };
        trees.push(os::tree_of(cache, &format!("routes-{number}"), &packages)?);
    }
    let fleet = Fleet::of(cache, &trees)?;
    let commits = &fleet.commits;
    let server = Server::nginx(&fleet.served)?;
    let bench = Bench {
        fleet: &fleet,
        server: &server,
        scratch: fleet.scratch.path(),
    };
    println!(
        "{:<44} {:>11} {:>6} {:>9} {:>8} {:>7} {:>8}",
        "", "wire bytes", "ratio", "requests", "seconds", "CPU s", "peak MB"
    );
    for to in 1..commits.len() {
        let (from, target) = (commits[to - 1], commits[to]);
        let origin = bench.device(from)?;
        println!("{}: {}", steps[to].0, fleet.difference(from, target)?);
        let channel = |name: &str| format!("{name}-{to}");
        let mut rows = vec![
            (
                "offshoot, delta",
                bench.offshoot(&origin, &channel("delta"), target)?,
            ),
            (
                "ostree pull, static delta",
                bench.ostree(&origin, target, true)?,
            ),
            (
                "offshoot, objects",
                bench.offshoot(&origin, &channel("objects"), target)?,
            ),
            (
                "ostree pull, objects",
                bench.ostree(&origin, target, false)?,
            ),
        ];
        if to == 1 {
            rows.push((
                "offshoot, delta from nothing",
                bench.offshoot(&origin, FULL, target)?,
            ));
        }
        print(&rows);
    }
    let (first, last) = (commits[0], commits[commits.len() - 1]);
    let origin = bench.device(first)?;
    println!("all three at once: {}", fleet.difference(first, last)?);
    print(&[
        (
            "offshoot, chain of three deltas",
            bench.offshoot(&origin, CHAIN, last)?,
        ),
        (
            "offshoot, objects",
            bench.offshoot(&origin, "objects-3", last)?,
        ),
        ("ostree pull, objects", bench.ostree(&origin, last, false)?),
    ]);
    bench.idle(&bench.device(commits[1])?)
}

fn print(rows: &[(&str, Cost)]) {
    let base = rows.first().map_or(1, |(_, cost)| cost.wire);
    for (name, cost) in rows {
        let Cost {
            wire,
            requests,
            seconds,
            cpu,
            memory,
        } = cost;
        let (ratio, memory) = (*wire as f64 / base as f64, *memory as f64 / 1024.0);
        println!(
            "  {name:<42} {wire:>11} {ratio:>6.2} {requests:>9} {seconds:>8.1} {cpu:>7.1} {memory:>8.1}"
        );
    }
}

/// The operator's directory, and what the web server serves of it.
struct Fleet {
    directory: PathBuf,
    served: PathBuf,
    /// Oldest first.
    commits: Vec<Commit>,
    scratch: tempfile::TempDir,
}

impl Fleet {
    /// With a release of each tree: made once, which takes minutes.
    fn of(cache: &Cache, trees: &[PathBuf]) -> Result<Self> {
        let ingredients = (trees.iter()).fold(
            Ingredients::default().path(&host::program("offshoot-fleet")?)?,
            |all, tree| all.text(&tree.display().to_string()),
        );
        let made = cache.entry("routes", ingredients, |directory| {
            host::timed("publishing the releases", || make(directory, trees))
        })?;
        let scratch = cache.scratch()?;
        // What is published, and an object, is never rewritten in place.
        run!("cp", "-al", made.join("fleet"), scratch.path())?;
        let commits = fs::read_to_string(made.join("commits"))?;
        let fleet = Self {
            directory: scratch.path().join("fleet"),
            served: scratch.path().join("served"),
            commits: commits.lines().map(str::parse).collect::<Result<_, _>>()?,
            scratch,
        };
        // It may be days old.
        host::run(&mut command(&fleet.directory, "refresh")?)?;
        fs::create_dir(&fleet.served)?;
        for name in ["metadata", "targets", "deltas", "objects"] {
            symlink(
                fleet.directory.join("public").join(name),
                fleet.served.join(name),
            )?;
        }
        symlink(fleet.directory.join("repo"), fleet.served.join("repo"))?;
        Ok(fleet)
    }

    /// How much of the new release the former one does not have.
    fn difference(&self, from: Commit, to: Commit) -> Result<String> {
        let list = |commit: Commit| -> Result<std::collections::BTreeSet<String>> {
            let repo = format!("--repo={}", self.directory.join("repo").display());
            let list = run!("ostree", repo, "ls", "-R", "-C", commit.to_string(), "/")?;
            Ok(list
                .lines()
                .filter(|line| line.starts_with('-'))
                .map(str::to_owned)
                .collect())
        };
        let (former, new) = (list(from)?, list(to)?);
        let changed = new.difference(&former).count();
        Ok(format!("{changed} of {} files differ", new.len()))
    }
}

fn command(fleet: &Path, verb: &str) -> Result<Command> {
    let mut command = Command::new(host::program("offshoot-fleet")?);
    command.args(["--json", "--fleet"]).arg(fleet).arg(verb);
    Ok(command)
}

/// Composes a release of each tree, and publishes it in a channel for each way to it.
fn make(directory: &Path, trees: &[PathBuf]) -> Result<()> {
    let fleet = directory.join("fleet");
    fs::create_dir(&fleet)?;
    let steps = 1..trees.len();
    let each = |name: &str| {
        steps
            .clone()
            .map(|to| format!("{name}-{to}"))
            .collect::<Vec<_>>()
    };
    let channels = [
        each("delta"),
        each("objects"),
        vec![CHAIN.to_owned(), FULL.to_owned()],
    ]
    .concat();
    host::run(
        command(&fleet, "init")?
            .args(["--hardware", HARDWARE])
            .args(
                channels
                    .iter()
                    .map(|channel| format!("--channel={channel}")),
            ),
    )?;
    let mut commits: Vec<String> = Vec::new();
    for (number, tree) in trees.iter().enumerate() {
        let composed = host::run(
            command(&fleet, "compose")?
                .args(["--branch", "os", "--timestamp", "1767225600"])
                .args(["--release", &number.to_string()])
                .arg("--tree")
                .arg(tree),
        )?;
        let composed: serde_json::Value = serde_json::from_str(&composed)?;
        let commit = composed["commit"]
            .as_str()
            .context("compose names no commit")?;
        ensure!(
            !commits.iter().any(|former| former == commit),
            "release {number} is no other than a former one: the archives have nothing newer today"
        );
        commits.push(commit.to_owned());
    }
    let publish = |channel: &str, number: usize, more: &[&str]| {
        host::run(
            command(&fleet, "publish")?
                .args(["--channel", channel, "--hardware", HARDWARE])
                .args(["--release", &number.to_string()])
                .args(more)
                .arg(&commits[number]),
        )
    };
    publish(CHAIN, 0, &["--deltas=0", "--no-objects"])?;
    for to in steps {
        let (delta, objects) = (format!("delta-{to}"), format!("objects-{to}"));
        publish(&delta, to - 1, &["--deltas=0", "--no-objects"])?;
        publish(&delta, to, &["--deltas=1", "--no-objects"])?;
        publish(&objects, to, &["--deltas=0"])?;
        publish(CHAIN, to, &["--deltas=1", "--no-objects"])?;
        // As `ostree` makes them unless told otherwise.
        let repo = format!("--repo={}", fleet.join("repo").display());
        let (from, to) = (
            format!("--from={}", commits[to - 1]),
            format!("--to={}", commits[to]),
        );
        run!("ostree", repo, "static-delta", "generate", from, to)?;
    }
    // As large whatever the device had before: once is enough.
    publish(FULL, 1, &["--deltas=0", "--no-objects", "--full"])?;
    run!(
        "ostree",
        format!("--repo={}", fleet.join("repo").display()),
        "summary",
        "--update"
    )?;
    fs::write(directory.join("commits"), commits.join("\n"))?;
    Ok(())
}

struct Bench<'a> {
    fleet: &'a Fleet,
    server: &'a Server,
    scratch: &'a Path,
}

/// A device in a directory, that goes with this. Its deployments are immutable, which keeps it from going.
struct Device {
    root: tempfile::TempDir,
    commit: Commit,
}

impl Drop for Device {
    fn drop(&mut self) {
        let script = "chattr -f -i sysroot/ostree/deploy/*/deploy/*.?";
        let _ = Command::new("sh")
            .args(["-c", script])
            .current_dir(self.root.path())
            .status();
    }
}

impl Device {
    fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path)
    }
}

impl Bench<'_> {
    /// A device that runs this release, and knows the fleet.
    fn device(&self, commit: Commit) -> Result<Device> {
        let device = Device {
            root: tempfile::tempdir_in(self.scratch)?,
            commit,
        };
        let sysroot = device.path("sysroot");
        let (at, repo) = (sysroot.display(), sysroot.join("ostree/repo"));
        let (option, repo) = (
            format!("--sysroot={at}"),
            format!("--repo={}", repo.display()),
        );
        fs::create_dir(&sysroot)?;
        run!("ostree", "admin", "init-fs", "--modern", &sysroot)?;
        run!("ostree", "admin", "os-init", &option, "os")?;
        run!(
            "ostree",
            &repo,
            "config",
            "set",
            "sysroot.bootloader",
            "none"
        )?;
        run!(
            "ostree",
            &repo,
            "pull-local",
            self.fleet.directory.join("repo"),
            commit.to_string()
        )?;
        run!(
            "ostree",
            "admin",
            "deploy",
            &option,
            "--os=os",
            "--karg=rw",
            commit.to_string()
        )?;
        run!(
            "ostree",
            &repo,
            "config",
            "set",
            "sysroot.bootloader",
            "grub2"
        )?;
        // Where a device's root has the physical one mounted, this one has a link to it.
        let deployment = sysroot.join(format!("ostree/deploy/os/deploy/{commit}.0"));
        run!("chattr", "-i", &deployment)?;
        fs::remove_dir(deployment.join("sysroot"))?;
        symlink("../../../../..", deployment.join("sysroot"))?;
        fs::create_dir_all(sysroot.join("boot/grub2"))?;
        symlink("../loader/grub.cfg", sysroot.join("boot/grub2/grub.cfg"))?;
        let marker = bootloader_glue::config::MARKER;
        fs::write(sysroot.join("boot/loader/grub.cfg"), format!("{marker}\n"))?;
        let generator = device.path("generator");
        fs::write(&generator, format!("#!/bin/sh\necho '{marker}' > \"$2\"\n"))?;
        fs::set_permissions(generator, fs::Permissions::from_mode(0o755))?;
        for directory in ["etc/offshoot", "efi", "health/required.d", "run", "state"] {
            fs::create_dir_all(device.path(directory))?;
        }
        for (copy, block) in grub::fresh(3).iter().enumerate() {
            fs::write(device.path(&format!("efi/env.{copy}")), block)?;
        }
        fs::copy(
            self.fleet.directory.join("root.json"),
            device.path("root.json"),
        )?;
        fs::write(device.path("ca.pem"), &self.server.ca)?;
        fs::write(
            device.path("cmdline"),
            format!("rw {}\n", bootloader_glue::protocol::Mark::Normal),
        )?;
        fs::write(
            device.path("boot_id"),
            "00000000-0000-4000-8000-000000000000\n",
        )?;
        Ok(device)
    }

    /// The same device as often as it takes.
    fn copy(&self, origin: &Device) -> Result<Device> {
        let device = Device {
            root: tempfile::tempdir_in(self.scratch)?,
            commit: origin.commit,
        };
        run!("cp", "-a", origin.path("."), device.path("."))?;
        let deployment = format!("sysroot/ostree/deploy/os/deploy/{}.0", device.commit);
        symlink(device.path(&deployment), device.path("root"))?;
        // So that nobody writes out what was copied but we.
        run!("sync", "--file-system", device.path("."))?;
        Ok(device)
    }

    fn relay(&self) -> Result<Relay> {
        let port = self.server.url.trim_end_matches('/').rsplit(':').next();
        Relay::start(
            port.and_then(|port| port.parse().ok())
                .context("the server has no port")?,
        )
    }

    fn offshoot(&self, origin: &Device, channel: &str, target: Commit) -> Result<Cost> {
        let device = self.copy(origin)?;
        let relay = self.relay()?;
        let before = self.server.requests()?.len();
        let since = Instant::now();
        let daemon = Daemon::start(&device, &relay, channel)?;
        daemon.ask(&device, "POST", "/v1/check")?;
        let stored = daemon.until(&device, |status| status.why == Some(Why::AwaitingConsent))?;
        let seconds = since.elapsed().as_secs_f64();
        ensure!(
            stored.offer.is_some_and(|offer| offer.commit == target),
            "another release is offered"
        );
        let daemon_memory = daemon.memory("VmHWM")?;
        let (cpu, largest) = daemon.stop(&device)?;
        let requests = (self.server.requests()?.len() - before) as u64;
        Ok(Cost {
            wire: relay.bytes(),
            requests,
            seconds,
            cpu,
            memory: daemon_memory + largest,
        })
    }

    fn ostree(&self, origin: &Device, target: Commit, deltas: bool) -> Result<Cost> {
        let device = self.copy(origin)?;
        let relay = self.relay()?;
        let before = self.server.requests()?.len();
        let repo = format!("--repo={}", device.path("sysroot/ostree/repo").display());
        self.remote(&device, &relay)?;
        let mut pull = timed(&device);
        pull.args(["ostree", &repo, "pull", "bench"])
            .arg(target.to_string());
        if !deltas {
            pull.arg("--disable-static-deltas");
        }
        let since = Instant::now();
        host::run(&mut pull)?;
        let seconds = since.elapsed().as_secs_f64();
        let (cpu, memory) = took(&device)?;
        let requests = (self.server.requests()?.len() - before) as u64;
        Ok(Cost {
            wire: relay.bytes(),
            requests,
            seconds,
            cpu,
            memory,
        })
    }

    fn remote(&self, device: &Device, relay: &Relay) -> Result<()> {
        let repo = format!("--repo={}", device.path("sysroot/ostree/repo").display());
        let url = format!("https://localhost:{}/repo", relay.port);
        let ca = format!("--set=tls-ca-path={}", device.path("ca.pem").display());
        run!(
            "ostree",
            repo,
            "remote",
            "add",
            "--no-gpg-verify",
            ca,
            "bench",
            url,
            "os"
        )
        .map(drop)
    }

    /// A poll that finds nothing new, again and again.
    fn idle(&self, origin: &Device) -> Result<()> {
        const POLLS: u64 = 10;
        let device = self.copy(origin)?;
        let relay = self.relay()?;
        // Nothing newer than what runs.
        let daemon = Daemon::start(&device, &relay, FULL)?;
        daemon.ask(&device, "PUT", "/v1/hold")?;
        daemon.ask(&device, "POST", "/v1/check")?;
        let before = relay.bytes();
        for _ in 0..POLLS {
            daemon.ask(&device, "POST", "/v1/check")?;
        }
        let kept = (relay.bytes() - before) / POLLS;
        std::thread::sleep(QUIET);
        let before = relay.bytes();
        daemon.ask(&device, "POST", "/v1/check")?;
        let new = relay.bytes() - before;
        let memory = daemon.memory("VmRSS")?;
        daemon.stop(&device)?;
        self.remote(&device, &relay)?;
        let repo = format!("--repo={}", device.path("sysroot/ostree/repo").display());
        let poll = |device: &Device| -> Result<u64> {
            let before = relay.bytes();
            let mut pull = timed(device);
            host::run(pull.args([
                "ostree",
                &repo,
                "pull",
                "--commit-metadata-only",
                "bench",
                "os",
            ]))?;
            Ok(relay.bytes() - before)
        };
        poll(&device)?;
        let ostree = poll(&device)?;
        let (_, ostree_memory) = took(&device)?;
        println!("a poll that finds nothing new");
        println!("  offshoot, on a connection that was kept: {kept} bytes on the wire");
        println!(
            "  offshoot, on a new connection: {new} bytes on the wire; the idle daemon has {memory} KiB resident"
        );
        println!(
            "  ostree pull --commit-metadata-only: {ostree} bytes on the wire, {ostree_memory} KiB at most"
        );
        Ok(())
    }
}

struct Daemon {
    process: Child,
    id: Pid,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Gone already, if all went well.
        if matches!(self.process.try_wait(), Ok(None)) {
            let _ = kill_process(self.id, Signal::TERM);
            let _ = self.process.wait();
        }
    }
}

impl Daemon {
    fn start(device: &Device, relay: &Relay, channel: &str) -> Result<Self> {
        let at = |path: &str| device.path(path).display().to_string();
        let config = format!(
            "[server]\nurl = 'https://localhost:{}/'\nca = '{}'\n[device]\nhardware = '{HARDWARE}'\nchannel = '{channel}'\n\
             [install]\nreboot = 'manual'\n[bootloader]\nenvironment = '{}'\n\
             [paths]\nstate = '{}'\nrun = '{}'\nroot = '{}'\nsysroot = '{}'\nboot = '{}'\nkernel_command_line = '{}'\n\
             boot_id = '{}'\nwatchdog_class = '{}'\ndeployer = '{}'\nbootloader_generator = '{}'\nroot_metadata = '{}'\nhealth = ['{}']\n",
            relay.port,
            at("ca.pem"),
            at("efi"),
            at("state"),
            at("run"),
            at("root"),
            at("sysroot"),
            at("sysroot/boot"),
            at("cmdline"),
            at("boot_id"),
            at("watchdog0"),
            host::program("offshoot-deployer")?.display(),
            at("generator"),
            at("root.json"),
            at("health"),
        );
        fs::write(device.path("etc/offshoot/config.toml"), config)?;
        let ready = device.path("notify");
        let manager = std::os::unix::net::UnixDatagram::bind(&ready)?;
        manager.set_read_timeout(Some(Duration::from_secs(30)))?;
        let process = timed(device)
            .arg("sh")
            .args(["-c", "echo $$ > \"$0\"; exec \"$@\""])
            .arg(device.path("pid"))
            .arg(host::program("offshoot")?)
            .arg("--root")
            .arg(device.path(""))
            .arg("daemon")
            .env("NOTIFY_SOCKET", &ready)
            .stdin(Stdio::null())
            .stderr(fs::File::create(device.path("log"))?)
            .spawn()?;
        manager.recv(&mut [0; 256]).with_context(|| {
            let log = fs::read_to_string(device.path("log"));
            format!("waiting for the daemon to be ready: {log:?}")
        })?;
        let id = fs::read_to_string(device.path("pid"))?
            .trim()
            .parse()
            .ok()
            .and_then(Pid::from_raw);
        Ok(Self {
            process,
            id: id.context("the daemon has no id")?,
        })
    }

    fn ask(&self, device: &Device, method: &str, path: &str) -> Result<Status> {
        let mut stream = UnixStream::connect(offshoot::api::socket(&device.path("run")))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let body = if method == "PUT" {
            "{\"reason\":\"bench\"}"
        } else {
            ""
        };
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (_, body) = answer
            .split_once("\r\n\r\n")
            .context("the daemon says nothing")?;
        serde_json::from_str(body).with_context(|| format!("reading {answer:?}"))
    }

    fn until(&self, device: &Device, wanted: impl Fn(&Status) -> bool) -> Result<Status> {
        let mut revision = 0;
        loop {
            let status = self.ask(device, "GET", &format!("/v1/status?after={revision}"))?;
            if wanted(&status) {
                return Ok(status);
            }
            // One is tried again, and what it took counts.
            if let Some(failure) = status.failure.filter(|failure| failure.times > 2) {
                bail!("{} failed: {}", failure.step, failure.message);
            }
            revision = status.revision;
        }
    }

    /// In KiB.
    fn memory(&self, key: &str) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id.as_raw_nonzero()))?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        let line = line.with_context(|| format!("the daemon's status has no {key}"))?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    }

    fn stop(mut self, device: &Device) -> Result<(f64, u64)> {
        kill_process(self.id, Signal::TERM)?;
        ensure!(self.process.wait()?.success(), "the daemon ended badly");
        took(device)
    }
}

/// A program whose processor time and memory are told by [`took`], with those that it waited for.
fn timed(device: &Device) -> Command {
    let mut command = Command::new("/usr/bin/time");
    command
        .arg("--format=%U %S %M")
        .arg("--output")
        .arg(device.path("time"));
    command
}

/// Seconds of the processor, and the KiB of the largest process.
fn took(device: &Device) -> Result<(f64, u64)> {
    let told = fs::read_to_string(device.path("time"))?;
    let mut words = told.split_whitespace();
    let mut next = || words.next().with_context(|| format!("reading {told:?}"));
    let cpu = next()?.parse::<f64>()? + next()?.parse::<f64>()?;
    Ok((cpu, next()?.parse()?))
}

/// Between a client and the server: counts.
struct Relay {
    port: u16,
    bytes: Arc<AtomicU64>,
    open: Arc<Mutex<Vec<TcpStream>>>,
}

impl Relay {
    fn start(server: u16) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let relay = Self {
            port: listener.local_addr()?.port(),
            bytes: Arc::default(),
            open: Arc::default(),
        };
        let (bytes, open) = (relay.bytes.clone(), relay.open.clone());
        std::thread::spawn(move || -> Result<()> {
            for client in listener.incoming() {
                let (client, server) = (client?, TcpStream::connect(("127.0.0.1", server))?);
                for (mut from, mut to) in [
                    (client.try_clone()?, server.try_clone()?),
                    (server.try_clone()?, client.try_clone()?),
                ] {
                    to.set_nodelay(true)?;
                    let bytes = bytes.clone();
                    // Ends when either side does.
                    std::thread::spawn(move || {
                        let mut buffer = [0; 64 << 10];
                        while let Ok(read @ 1..) = from.read(&mut buffer) {
                            bytes.fetch_add(read as u64, Ordering::Relaxed);
                            if to.write_all(&buffer[..read]).is_err() {
                                break;
                            }
                        }
                        let _ = to.shutdown(Shutdown::Write);
                    });
                }
                if let Ok(mut open) = open.lock() {
                    open.extend([client, server]);
                }
            }
            Ok(())
        });
        Ok(relay)
    }

    /// That went in either direction.
    fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        for stream in self.open.lock().iter().flat_map(|open| open.iter()) {
            // It may be over already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}
