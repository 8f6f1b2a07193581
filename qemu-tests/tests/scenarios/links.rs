//! Links that the kernel of a guest makes slow, long or lossy, with netem, between a device and its server.
//!
//! The daemon is in a network namespace of its own, `device`, whose only link leads to another, `site`. There the server's address is
//! local, and a relay of systemd's leads on to the server. So both ends of the link are Linux's TCP, and netem is in both directions.
//!
//! What is compared: the files of the release, whose sizes are signed, and all bytes in TCP segments that reached the device until the
//! release was ready: handshakes, TLS, heads, metadata, what TCP sent again. Only the headers of the segments are taken
//! off. Links that break, and kills, are told in `agent/tests/it/links.rs`, without netem.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use offshoot::decide::Why;
use offshoot::events;
use qemu_tests::bench::{Bench, Web};
use qemu_tests::release::Release;
use qemu_tests::vm::{Options, PATIENCE, STARTUP_FINISHED};

/// Ethernet, IPv4, and TCP with its time stamps.
const HEADERS: u64 = 14 + 20 + 32;

struct Link {
    bytes_per_second: u64,
    /// What netem is told.
    shape: &'static str,
    /// Megabytes of the release.
    payload: usize,
}

#[test]
fn a_link_of_1_mbit_and_50_ms_brings_an_update_for_its_size() {
    confirms(&Link {
        bytes_per_second: 125_000,
        shape: "rate 1mbit delay 50ms",
        payload: 2,
    });
}

#[test]
fn a_link_of_100_kbit_and_300_ms_that_loses_packets_brings_an_update_for_its_size() {
    confirms(&Link {
        bytes_per_second: 12_500,
        shape: "rate 100kbit delay 300ms loss 2%",
        payload: 1,
    });
}

/// Lets a device behind `link` take a release, and compares what came with what is signed.
fn confirms(link: &Link) {
    let mut bench = Bench::start(Web::Nginx, Options::default()).unwrap();
    let release = Release {
        payload: link.payload,
        ..Release::good("1.1.0")
    };
    let target = bench.publish(&release).unwrap();
    let public = bench.fleet.public();
    let Bench { vm, server, .. } = &mut bench;
    vm.wait_for_event(STARTUP_FINISHED, PATIENCE).unwrap();
    vm.ask([
        "mkdir",
        "-p",
        "/etc/offshoot",
        "/run/systemd/system/offshoot.service.d",
    ])
    .unwrap();
    vm.write_file("/etc/offshoot/ca.pem", server.ca.as_bytes())
        .unwrap();
    // Slow is not stalled, however soon that is.
    let configuration = format!(
        "[server]\nurl = {:?}\nca = \"/etc/offshoot/ca.pem\"\nstall = 5\n\n[install]\nreboot = \"manual\"\n",
        server.url
    );
    vm.write_file("/etc/offshoot/config.toml", configuration.as_bytes())
        .unwrap();
    // Until the next boot only.
    vm.write_file(
        "/run/systemd/system/offshoot.service.d/link.conf",
        b"[Service]\nNetworkNamespacePath=/run/netns/device\n",
    )
    .unwrap();
    let address = server
        .url
        .trim_start_matches("https://")
        .trim_end_matches('/');
    let setup = SETUP
        .replace("SHAPE", link.shape)
        .replace("ADDRESS", address);
    vm.ask(["/bin/sh", "-euc", &setup]).unwrap();

    let begun = Instant::now();
    let ready = Why::AwaitingConsent.name();
    while vm
        .wait_for_event(events::WAITING, PATIENCE * 2)
        .unwrap()
        .field("WHY")
        != Some(ready)
    {}
    let took = begun.elapsed();
    let count = |name: &str| format!("/sys/class/net/wan/statistics/rx_{name}");
    let counted = vm
        .ask([
            "ip",
            "netns",
            "exec",
            "device",
            "cat",
            &count("bytes"),
            &count("packets"),
        ])
        .unwrap();
    let (bytes, packets) = counted.split_once('\n').unwrap();
    let (bytes, packets): (u64, u64) = (bytes.parse().unwrap(), packets.parse().unwrap());
    let wire = bytes - packets * HEADERS;
    let requests = server.requests().unwrap();
    let files: BTreeSet<_> = (requests.iter().map(|request| &request.path))
        .filter(|path| path.starts_with("/deltas/") || path.starts_with("/objects/"))
        .collect();
    let signed: u64 = (files.iter())
        .map(|path| fs::metadata(public.join(&path[1..])).unwrap().len())
        .sum();
    eprintln!("{}: {wire} bytes for {signed} in {took:?}", link.shape);
    assert!(signed > (link.payload << 20) as u64);
    assert!(
        (signed..=signed + signed * 3 / 100).contains(&wire),
        "{wire} bytes over the wire for {signed}: {requests:?}"
    );
    // Shaped it was.
    assert!(took >= Duration::from_secs(signed / link.bytes_per_second));

    vm.start(&["offshoot", "update"]).unwrap();
    let confirmed = vm.wait_for_event(events::CONFIRMED, PATIENCE).unwrap();
    assert_eq!(confirmed.field("COMMIT"), Some(target.to_string().as_str()));
    assert_eq!(vm.booted_commit().unwrap(), target);
}

/// The namespaces, the link, the relay and the daemon. A segment is a packet: no offload.
const SETUP: &str = "
ip netns add site
ip netns add device
ip link add name wan gso_max_segs 1 netns site type veth peer name wan gso_max_segs 1 netns device
ip -n site address add 10.0.2.2/24 dev wan
ip -n device address add 10.0.2.99/24 dev wan
for end in site device; do
    ip -n $end link set wan up
    tc -n $end qdisc add dev wan root netem SHAPE
done
systemd-run --unit=relay --socket-property=ListenStream=ADDRESS --socket-property=NetworkNamespacePath=/run/netns/site \\
    /usr/lib/systemd/systemd-socket-proxyd ADDRESS
systemctl daemon-reload
systemctl restart offshoot.service
";
