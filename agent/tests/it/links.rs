//! Slow and failing links between a whole device and its server: a relay in between delays, limits and drops, and counts what goes over the wire.
//!
//! The relay works on streams, so it knows delay, rate and broken connections; lost packets are the kernel's business below it.
//! `qemu-tests/tests/scenarios/links.rs` has links that netem shapes and breaks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use offshoot::decide::Why;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep_until};

use crate::bench::noise;
use crate::machine::Machine;
use crate::update::{Daemon, PATIENCE};

/// What a link is like, towards the device.
#[derive(Clone, Copy)]
struct Link {
    bytes_per_second: u64,
    delay: Duration,
    /// Every connection breaks after so many bytes.
    breaks_after: Option<u64>,
    /// Every other connection is refused.
    away: bool,
}

struct Relay {
    port: u16,
    /// Bytes that went to the device, and connections.
    sent: Arc<AtomicU64>,
    connections: Arc<AtomicU64>,
}

impl Relay {
    async fn start(to: u16, link: Link) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (sent, connections) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let counts = (sent.clone(), connections.clone());
        tokio::spawn(async move {
            while let Ok((device, _)) = listener.accept().await {
                let number = counts.1.fetch_add(1, Ordering::Relaxed);
                if link.away && number % 2 == 1 {
                    continue;
                }
                let sent = counts.0.clone();
                tokio::spawn(async move {
                    let server = TcpStream::connect(("127.0.0.1", to)).await.unwrap();
                    relay(device, server, link, sent).await;
                });
            }
        });
        Self {
            port,
            sent,
            connections,
        }
    }
}

async fn relay(device: TcpStream, server: TcpStream, link: Link, sent: Arc<AtomicU64>) {
    let (mut from_device, mut to_device) = device.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let up = async move {
        let mut buffer = [0; 4096];
        while let Ok(read @ 1..) = from_device.read(&mut buffer).await {
            tokio::time::sleep(link.delay).await;
            if to_server.write_all(&buffer[..read]).await.is_err() {
                break;
            }
        }
    };
    // What was read is on its way for the delay, while more is read behind it.
    let (line, mut end) = tokio::sync::mpsc::channel::<(Instant, Vec<u8>)>(64);
    let read = async move {
        let mut buffer = [0; 1400];
        while let Ok(read @ 1..) = from_server.read(&mut buffer).await {
            let due = Instant::now() + link.delay;
            if line.send((due, buffer[..read].to_vec())).await.is_err() {
                break;
            }
        }
    };
    let write = async move {
        let mut free = Instant::now();
        let mut left = link.breaks_after.unwrap_or(u64::MAX);
        while let Some((due, bytes)) = end.recv().await {
            let time = bytes.len() as f64 / link.bytes_per_second as f64;
            free = free.max(due) + Duration::from_secs_f64(time);
            sleep_until(free).await;
            if to_device.write_all(&bytes).await.is_err() {
                break;
            }
            sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            left = left.saturating_sub(bytes.len() as u64);
            if left == 0 {
                break;
            }
        }
    };
    let rest = async {
        tokio::join!(up, read);
        std::future::pending().await
    };
    tokio::select! {
        () = write => {}
        () = rest => {}
    }
}

/// A machine whose server is behind the link, and a release of about `size` bytes.
async fn behind(link: Link, size: u64) -> (Machine, crate::server::Server, Relay, u64) {
    let mut machine = Machine::speaking("h2");
    let server = machine.server().await;
    let relay = Relay::start(server.address.port(), link).await;
    let config = machine.path("etc/offshoot/config.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    let own = format!("localhost:{}", server.address.port());
    let text = text.replace(&own, &format!("localhost:{}", relay.port));
    std::fs::write(&config, text).unwrap();
    let noise = noise(0..size / 32);
    let commit = machine.bench.release("two", &noise);
    let delta = machine.delta(Some(machine.factory), commit);
    let signed = delta.download().unwrap();
    machine.release("two", commit, vec![delta], None);
    (machine, server, relay, signed)
}

/// Bodies came once; everything else (handshakes, heads, metadata) is bounded for each connection.
fn assert_frugal(relay: &Relay, server: &crate::server::Server, signed: u64) {
    let deltas = server.requests().into_iter();
    let deltas = deltas.filter(|request| request.path.contains("/deltas/"));
    let (sent, connections) = (
        relay.sent.load(Ordering::Relaxed),
        relay.connections.load(Ordering::Relaxed),
    );
    let requests = deltas.count() as u64;
    let most = signed + signed * 3 / 100 + connections * 6000 + requests * 200 + 30_000;
    assert!(
        sent <= most,
        "{sent} bytes over the wire for {signed}, in {connections} connections"
    );
}

#[tokio::test]
async fn a_slow_link_brings_an_update_for_little_more_than_its_size() {
    for (bytes_per_second, delay, size) in [(125_000, 50, 600_000), (12_500, 300, 60_000)] {
        let link = Link {
            bytes_per_second,
            delay: Duration::from_millis(delay),
            breaks_after: None,
            away: false,
        };
        let (machine, server, relay, signed) = behind(link, size).await;
        Daemon::start(&machine).until_reboot(&machine).await;
        assert_frugal(&relay, &server, signed);
    }
}

#[tokio::test]
async fn a_link_that_breaks_every_moment_brings_every_byte_once() {
    let link = Link {
        bytes_per_second: 250_000,
        delay: Duration::from_millis(20),
        breaks_after: Some(200_000),
        away: false,
    };
    let (machine, server, relay, signed) = behind(link, 1_500_000).await;
    Daemon::start(&machine).until_reboot(&machine).await;
    assert!(relay.connections.load(Ordering::Relaxed) > 3);
    assert_continued(&server);
    // What was on its way when a connection broke is lost: at most the windows of HTTP/2.
    let most = signed + relay.connections.load(Ordering::Relaxed) * 80_000 + 60_000;
    assert!(relay.sent.load(Ordering::Relaxed) <= most);
}

#[tokio::test]
async fn a_link_that_is_away_after_every_break_is_tried_again_soon() {
    let link = Link {
        bytes_per_second: 250_000,
        delay: Duration::ZERO,
        breaks_after: Some(100_000),
        away: true,
    };
    let (machine, _server, relay, _) = behind(link, 1_500_000).await;
    let mut daemon = Daemon::start(&machine);
    let (mut revision, mut failed, begun) = (0, false, Instant::now());
    loop {
        let status = daemon.wait(|status| status.revision > revision).await;
        revision = status.revision;
        // Waits that double with every failure would be minutes by now.
        assert!(begun.elapsed() < 2 * PATIENCE, "{status:?}");
        if let Some(failure) = status.failure {
            // Each came further than the one before, so it is the first of its kind.
            assert_eq!(failure.times, 1, "{failure:?}");
            failed = true;
        }
        if status.step == "rebooting" {
            break;
        }
    }
    assert!(failed);
    assert!(relay.connections.load(Ordering::Relaxed) > 12);
}

#[tokio::test]
async fn ten_kills_in_the_middle_of_a_download_cost_no_byte_twice() {
    let link = Link {
        bytes_per_second: 250_000,
        delay: Duration::ZERO,
        breaks_after: None,
        away: false,
    };
    let (machine, server, _relay, signed) = behind(link, 2_000_000).await;
    for kill in 1..=10 {
        let mut daemon = Daemon::start(&machine);
        let goal = signed * kill / 12;
        daemon
            .wait(|status| {
                status
                    .progress
                    .is_some_and(|progress| progress.done >= goal)
            })
            .await;
        daemon.cut();
    }
    let mut daemon = Daemon::start(&machine);
    daemon.wait(|status| status.step == "rebooting").await;
    daemon.cut();
    assert_continued(&server);
    machine.power_on();
    let mut daemon = Daemon::start(&machine);
    daemon.waits(Why::AwaitingConfirmation).await;
}

/// Every request for a file goes on where the one before it ended, as far as the device had it.
fn assert_continued(server: &crate::server::Server) {
    let mut last = std::collections::BTreeMap::new();
    let mut continued = 0;
    for request in server.requests() {
        if !request.path.contains("/deltas/") {
            continue;
        }
        let from: u64 = request.header("range").map_or(0, |range| {
            let range = range.strip_prefix("bytes=").unwrap();
            range.strip_suffix('-').unwrap().parse().unwrap()
        });
        if let Some(before) = last.insert(request.path.clone(), from) {
            assert!(
                from > before,
                "{}: from {from} after {before}",
                request.path
            );
            continued += 1;
        }
    }
    assert!(continued > 0);
}
