//! Links that the kernel of a guest makes slow, long, lossy or broken, with netem, between a device and its server.
//!
//! The daemon is in a network namespace of its own, `device`, whose only link leads to another, `site`. There the server's address is
//! local, and a relay of systemd's leads on to the server. So both ends of the link are Linux's TCP, and netem is in both directions.
//!
//! What is compared: the files of the release, whose sizes are signed, and all bytes in TCP segments that reached the device until the
//! release was ready: handshakes, TLS, heads, metadata, what TCP sent again, what was on its way at a kill. Only the headers of the
//! segments are taken off.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
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
    /// Seconds without a byte after which the device begins anew.
    stall: u64,
    /// Megabytes of the release.
    payload: usize,
    /// Run in the guest during the download.
    trouble: &'static str,
}

#[test]
fn a_link_of_1_mbit_and_50_ms_brings_an_update_for_its_size() {
    confirms(&Link {
        bytes_per_second: 125_000,
        shape: "rate 1mbit delay 50ms",
        stall: 30,
        payload: 2,
        trouble: "",
    });
}

#[test]
fn a_link_of_100_kbit_and_300_ms_that_loses_packets_brings_an_update_for_its_size() {
    confirms(&Link {
        bytes_per_second: 12_500,
        shape: "rate 100kbit delay 300ms loss 2%",
        stall: 30,
        payload: 1,
        trouble: "",
    });
}

/// In every minute the link is down for longer than the device waits for a byte; and there are ten kills, one each time another so many
/// bytes have come, and a note of what the device has then.
const DROPS_AND_KILLS: &str = r"
while sleep 50; do
    ip -n site link set wan down
    sleep 10
    ip -n site link set wan up
    echo >> /run/drops
done &
for kill in 1 2 3 4 5 6 7 8 9 10; do
    until [ $(ip netns exec device cat /sys/class/net/wan/statistics/rx_bytes) -gt $((kill * 2000000)) ]; do
        sleep 0.1
    done
    systemctl kill --signal=KILL offshoot.service
    systemctl stop offshoot.service
    stat --format='%n %s' /var/lib/offshoot/spool/*/*.part >> /run/kills
    systemctl start offshoot.service
done
wait
";

#[test]
fn a_link_that_drops_every_minute_and_ten_kills_cost_no_byte_twice() {
    // A short queue: what is in it at a kill comes for nothing.
    let mut bench = confirms(&Link {
        bytes_per_second: 125_000,
        shape: "rate 1mbit delay 50ms limit 16",
        stall: 5,
        payload: 24,
        trouble: DROPS_AND_KILLS,
    });
    let requests = bench.server.requests().unwrap();
    let kills = bench.vm.ask(["cat", "/var/lib/kills"]).unwrap();
    let kills: Vec<_> = kills.lines().collect();
    assert_eq!(kills.len(), 10, "{kills:?}");
    for kill in kills {
        // It went on where it was.
        let (file, here) = kill.rsplit_once(' ').unwrap();
        let (name, range) = (
            Path::new(file).file_stem().unwrap(),
            format!("bytes={here}-"),
        );
        assert!(
            requests.iter().any(|request| {
                Path::new(&request.path).file_name() == Some(name) && request.range == range
            }),
            "{kill}: {requests:?}"
        );
    }
}

/// Lets a device behind `link` take a release, and compares what came with what is signed.
fn confirms(link: &Link) -> Bench {
    let mut bench = Bench::start(Web::Nginx, Options::default()).unwrap();
    let release = Release {
        payload: link.payload,
        ..Release::good("1.1.0")
    };
    let target = bench.publish(&release).unwrap();
    let public = bench.fleet.public();
    bench.vm.wait_for_event(STARTUP_FINISHED, PATIENCE).unwrap();
    let more = format!("stall = {}\n\n[install]\nreboot = \"manual\"\n", link.stall);
    bench.write_configuration(&more).unwrap();
    let Bench { vm, server, .. } = &mut bench;
    vm.ask(["mkdir", "-p", "/run/systemd/system/offshoot.service.d"])
        .unwrap();
    // Until the next boot only.
    vm.write_file(
        "/run/systemd/system/offshoot.service.d/link.conf",
        b"[Service]\nNetworkNamespacePath=/run/netns/device\n",
    )
    .unwrap();
    vm.write_file("/run/trouble", link.trouble.as_bytes())
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
    if link.shape.contains("loss") {
        let lost = vm.ask([
            "tc", "-n", "site", "-s", "-j", "qdisc", "show", "dev", "wan",
        ]);
        let lost: serde_json::Value = serde_json::from_str(&lost.unwrap()).unwrap();
        assert_ne!(lost[0]["drops"].as_u64().unwrap(), 0, "{lost}");
    }
    if !link.trouble.is_empty() {
        let drops = vm.ask(["grep", "--count", "", "/run/drops"]).unwrap();
        assert!(drops.parse::<u32>().unwrap() >= 2, "{drops}");
        vm.ask(["cp", "/run/kills", "/var/lib/kills"]).unwrap();
    }

    vm.start(&["offshoot", "update"]).unwrap();
    let confirmed = vm.wait_for_event(events::CONFIRMED, PATIENCE).unwrap();
    assert_eq!(confirmed.field("COMMIT"), Some(target.to_string().as_str()));
    assert_eq!(vm.booted_commit().unwrap(), target);
    bench
}

/// The namespaces, the link, the relay, what happens meanwhile, and the daemon. A segment is a packet: no offload.
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
systemd-run --unit=trouble /bin/sh /run/trouble
";
