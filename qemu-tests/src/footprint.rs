//! How much memory the idle daemon takes, beside a process that links libostree.
//!
//! The other process is `ostree pull`, waiting for a server that accepts its connection and never answers: libostree initialised, a
//! repository opened, its HTTP client started, nothing fetched yet. An agent that lets libostree fetch holds at least that much from its first
//! poll on; it would add TLS, its own code and what earlier fetches left in the heap. Both run in the same guest, on the same libraries.

use std::net::TcpListener;

use anyhow::{Context as _, Result};
use offshoot::events;

use crate::bench::{Bench, Web};
use crate::vm::{Options, PATIENCE, Vm};

/// In KiB.
struct Memory {
    /// Resident, with what is shared with others.
    resident: u64,
    /// Resident, what is shared divided among those who share it.
    proportional: u64,
    /// What goes when the process goes.
    private: u64,
}

/// Measures, and prints one table.
pub fn footprint() -> Result<()> {
    let mut bench = Bench::start(Web::Fleet, Options::default())?;
    bench.configure("")?;
    let Bench { vm, .. } = &mut bench;
    // After the first polls: what they allocate is part of it.
    for _ in 0..5 {
        vm.wait_for_event(events::POLLED, PATIENCE)?;
    }
    let daemon = vm.ask([
        "systemctl",
        "show",
        "--property=MainPID",
        "--value",
        "offshoot.service",
    ])?;
    let daemon = measure(vm, &daemon)?;

    let silent = TcpListener::bind("127.0.0.1:0")?;
    let port = silent.local_addr()?.port();
    let repository = "/var/tmp/bench-repository";
    vm.ask(["ostree", "init", "--mode=bare", "--repo", repository])?;
    let url = format!("http://10.0.2.2:{port}/");
    let remote = [
        "ostree",
        "remote",
        "add",
        "--no-sign-verify",
        "--no-gpg-verify",
        "--repo",
        repository,
        "bench",
        &url,
    ];
    vm.ask(remote)?;
    let pull = format!("ostree pull --repo {repository} bench os >/dev/null 2>&1 & echo $!");
    let pull = vm.ask(["/bin/sh", "-c", &pull])?;
    let (connection, _) = silent
        .accept()
        .context("waiting for ostree pull to connect")?;
    let libostree = measure(vm, &pull)?;
    drop(connection);

    println!("idle in the same guest, KiB      RSS      PSS  private");
    for (name, memory) in [
        ("offshoot daemon", &daemon),
        ("ostree pull, waiting", &libostree),
    ] {
        let Memory {
            resident,
            proportional,
            private,
        } = memory;
        println!("{name:<24}    {resident:>8} {proportional:>8} {private:>8}");
    }
    let ratio = |of: fn(&Memory) -> u64| of(&libostree) as f64 / of(&daemon) as f64;
    println!(
        "{:<24}    {:>8.2} {:>8.2} {:>8.2}",
        "ratio",
        ratio(|memory| memory.resident),
        ratio(|memory| memory.proportional),
        ratio(|memory| memory.private)
    );
    Ok(())
}

fn measure(vm: &mut Vm, process: &str) -> Result<Memory> {
    let rollup = vm.ask(["cat", &format!("/proc/{process}/smaps_rollup")])?;
    let sum = |names: &[&str]| -> Result<u64> {
        let mut sum = 0;
        for name in names {
            let value = rollup
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
                .with_context(|| format!("smaps_rollup has no {name}: {rollup}"))?;
            let value = value.trim().trim_end_matches(" kB");
            sum += value
                .parse::<u64>()
                .with_context(|| format!("{name}: {value}"))?;
        }
        Ok(sum)
    };
    Ok(Memory {
        resident: sum(&["Rss"])?,
        proportional: sum(&["Pss"])?,
        private: sum(&["Private_Clean", "Private_Dirty"])?,
    })
}
