//! Offshoot's main job, live on the terminal: a device takes a good release, then a broken one, and nobody touches it.
//!
//! Everything that is told happened: the operator's lines are what was run, the device's are its journal, GRUB's and the kernel's are
//! the serial console. Owns the telling; what is told is built and run by the modules that the tests use.

use std::collections::BTreeMap;
use std::io::{IsTerminal as _, Write as _};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use offshoot::commit::Commit;
use offshoot::events;
use offshoot::status::{Status, short};

use crate::bench::{Bench, Web};
use crate::image::FIRST;
use crate::release::{Fault, Release};
use crate::vm::{Event, Line, Options, PATIENCE, STARTUP_FINISHED};

const GOOD: &str = "1.1.0";
const BAD: &str = "1.2.0";

/// Tells the device's download progress to its journal: `offshoot status --follow`, as anybody could run it.
const FOLLOW_UNIT: &str = "\
[Service]
ExecStart=/usr/bin/offshoot status --follow --json
SyslogIdentifier=offshoot
";

/// Whose line it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Bench,
    Operator,
    Grub,
    Kernel,
    Device,
}

struct Teller {
    start: Instant,
    colour: bool,
    /// The versions of commits, to recognise them by.
    versions: BTreeMap<String, String>,
    /// The newest release that the device was told of.
    offer: String,
    /// The quarter of the download that was told last.
    quarter: u64,
}

/// Tells both stories. An error says which step failed and what the machine said last.
pub fn demo() -> Result<()> {
    let mut teller = Teller {
        start: Instant::now(),
        colour: std::io::stdout().is_terminal(),
        versions: BTreeMap::new(),
        offer: String::new(),
        quarter: 0,
    };
    teller.heading("A device that nobody stands next to")?;
    teller.tell(
        Who::Bench,
        "an OS of Debian packages, a fleet with its keys, release 1.0.0, a device's disk",
    )?;
    teller.tell(
        Who::Bench,
        "  (built once and kept; the first time it takes a minute or two)",
    )?;
    let mut bench = Bench::start(Web::Fleet, Options::default())
        .context("building what the demonstration needs")?;
    teller.name(bench.first, FIRST);
    let url = bench.server.url.clone();
    teller.tell(
        Who::Operator,
        &format!("serves the fleet's files at {url} (offshoot-fleet serve)"),
    )?;
    teller.tell(
        Who::Bench,
        "the device is switched on: QEMU, UEFI, GRUB, OSTree",
    )?;
    teller.until(&mut bench, STARTUP_FINISHED)?;
    teller.tell(
        Who::Bench,
        "its operator writes the server's address into /etc/offshoot/config.toml",
    )?;
    bench.configure("").context("configuring the device")?;
    bench.vm.write_file(
        "/run/systemd/system/bench-follow.service",
        FOLLOW_UNIT.as_bytes(),
    )?;
    bench
        .vm
        .ask(["systemctl", "start", "bench-follow.service"])?;
    teller.until(&mut bench, events::POLLED)?;
    teller.status(&mut bench)?;

    teller.heading("A good release: it is kept when it has proved healthy")?;
    // Enough to see it come.
    let release = Release {
        payload: 8,
        ..Release::good(GOOD)
    };
    let good = publish(&mut teller, &bench, &release)?;
    teller.until(&mut bench, events::CONFIRMED)?;
    anyhow::ensure!(
        bench.vm.booted_commit()? == good,
        "the device confirmed {GOOD} and does not run it"
    );
    teller.until(&mut bench, events::POLLED)?;
    teller.status(&mut bench)?;

    teller
        .heading("A broken release: GRUB counts the boots that nobody confirms, and goes back")?;
    let bad = publish(&mut teller, &bench, &Release::bad(BAD, Fault::KernelPanics))?;
    teller.until(&mut bench, events::REJECTED)?;
    teller.until(&mut bench, events::SETTLED)?;
    teller.until(&mut bench, events::WAITING)?;
    let status = teller.status(&mut bench)?;
    anyhow::ensure!(
        status.booted.commit == good && status.rejections.iter().any(|one| one.commit == bad),
        "the device does not run {GOOD} with {BAD} rejected"
    );
    teller.heading("Done")?;
    teller.tell(
        Who::Bench,
        &format!("{GOOD} was kept because it proved healthy; {BAD} was tried, given up and is not tried again"),
    )?;
    teller.tell(
        Who::Bench,
        "`make shell` is a root shell on such a device; docs/boot-protocol.md says what GRUB counts",
    )
}

fn publish(teller: &mut Teller, bench: &Bench, release: &Release) -> Result<Commit> {
    let what = match release.fault {
        None => "composes and publishes",
        Some(_) => "publishes, by mistake, a kernel that panics:",
    };
    let version = &release.version;
    teller.tell(Who::Operator, &format!("{what} {version}"))?;
    let commit = bench
        .publish(release)
        .with_context(|| format!("publishing {version}"))?;
    teller.name(commit, version);
    teller.tell(
        Who::Operator,
        &format!(
            "{version} is out: commit {}, signed, with a delta from the release before",
            short(commit)
        ),
    )?;
    Ok(commit)
}

impl Teller {
    fn name(&mut self, commit: Commit, version: &str) {
        self.versions.insert(commit.to_string(), version.to_owned());
    }

    fn heading(&self, text: &str) -> Result<()> {
        let (on, off) = self.style("1");
        let mut out = std::io::stdout().lock();
        writeln!(out, "\n{on}{text}{off}")?;
        Ok(out.flush()?)
    }

    fn tell(&self, who: Who, text: &str) -> Result<()> {
        let (name, style) = match who {
            Who::Bench => ("bench", "2"),
            Who::Operator => ("operator", "36"),
            Who::Grub => ("grub", "33"),
            Who::Kernel => ("kernel", "31"),
            Who::Device => ("device", "32"),
        };
        let (on, off) = self.style(style);
        let seconds = self.start.elapsed().as_secs();
        let mut out = std::io::stdout().lock();
        writeln!(
            out,
            "{:3}:{:02}  {on}{name:<8}{off}  {text}",
            seconds / 60,
            seconds % 60
        )?;
        Ok(out.flush()?)
    }

    fn style(&self, code: &str) -> (String, &'static str) {
        match self.colour {
            true => (format!("\x1b[{code}m"), "\x1b[0m"),
            false => (String::new(), ""),
        }
    }

    /// What an operator on the device would read.
    fn status(&self, bench: &mut Bench) -> Result<Status> {
        self.tell(Who::Device, "# offshoot status")?;
        for line in bench.vm.ask(["offshoot", "status"])?.lines() {
            self.tell(Who::Device, &format!("    {}", line.trim_start()))?;
        }
        bench.vm.status()
    }

    /// Tells what happens until the device's journal has the event.
    fn until(&mut self, bench: &mut Bench, message_id: &str) -> Result<()> {
        // Far beyond what any step takes: a trial that panics three times is several boots.
        let deadline = Instant::now() + 4 * PATIENCE;
        loop {
            let Some(line) = bench.vm.next_line(deadline)? else {
                bail!(
                    "nothing came of it in {:?}; the machine said:\n{}",
                    4 * PATIENCE,
                    bench.vm.transcript()
                );
            };
            if let Some((who, text)) = self.words(&line) {
                self.tell(who, &text)?;
            }
            if let Line::Journal(event) = line
                && event.message_id() == Some(message_id)
            {
                return Ok(());
            }
        }
    }

    fn words(&mut self, line: &Line) -> Option<(Who, String)> {
        match line {
            Line::Serial(line) => {
                if let Some(decision) = line.strip_prefix("offshoot: ") {
                    return Some((Who::Grub, decision.to_owned()));
                }
                let (_, text) = line.split_once("] ")?;
                let told = ["Kernel panic", "Rebooting in"]
                    .iter()
                    .any(|start| text.starts_with(start));
                told.then(|| (Who::Kernel, text.to_owned()))
            }
            Line::Journal(event) => self.event(event).map(|text| (Who::Device, text)),
        }
    }

    fn event(&mut self, event: &Event) -> Option<String> {
        let message = event.field("MESSAGE")?;
        let Some(id) = event.message_id() else {
            return self.progress(message);
        };
        let told = [
            events::STAGED,
            events::FETCHED,
            events::APPLIED,
            events::ARMED,
            events::DEPLOYED,
            events::REBOOTING,
            events::STARTED,
            events::HEALTHY,
            events::UNHEALTHY,
            events::CONFIRMING,
            events::CONFIRMED,
            events::REJECTED,
            events::UNDEPLOYED,
            events::SETTLED,
            events::WAITING,
            events::STEP_FAILED,
        ];
        if id == events::POLLED {
            let offer = event.field("OFFER")?;
            if offer == self.offer {
                return None;
            }
            offer.clone_into(&mut self.offer);
            let version = self.versions.get(offer)?;
            return Some(format!("asked the server: the newest release is {version}"));
        }
        told.contains(&id).then(|| self.with_versions(message))
    }

    /// A quarter of the download at a time.
    fn progress(&mut self, line: &str) -> Option<String> {
        let progress = serde_json::from_str::<Status>(line).ok()?.progress?;
        let quarter = (4 * progress.done).checked_div(progress.total)?;
        if quarter == self.quarter {
            return None;
        }
        self.quarter = quarter % 4;
        let megabytes = |bytes: u64| bytes as f64 / 1e6;
        Some(format!(
            "fetching: {:.1} of {:.1} MB",
            megabytes(progress.done),
            megabytes(progress.total)
        ))
    }

    /// Commits in a message, with the versions that a reader knows them by.
    fn with_versions(&self, message: &str) -> String {
        let mut text = message.to_owned();
        for (commit, version) in &self.versions {
            let short = &commit[..12];
            text = text.replace(short, &format!("{version} ({short})"));
        }
        text
    }
}
