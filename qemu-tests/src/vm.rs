//! A machine in QEMU with the disk of a device: watched over its serial console and its journal, asked through the guest
//! agent, reset and cut off from its power.
//!
//! Owns one QEMU process and the overlay on which it writes; both go when the [`Vm`] is dropped.
//!
//! What a power cut loses: [`Vm::cut_power`] kills QEMU with SIGKILL. Gone are the guest's memory with every dirty page
//! in it, and QEMU's own: the overlay's cluster map is written when the guest flushes, so that what went to a fresh
//! cluster since the last flush is lost too, as in a disk with a volatile cache. What the guest flushed stays, because
//! the host's page cache outlives QEMU (`cache=unsafe` only spares the host's own fsync). What the bench cannot lose is
//! an unflushed overwrite of a cluster that was flushed before, and no sector is ever torn.

mod guest;
mod offshoot;
mod options;
mod watch;

use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use tempfile::TempDir;

pub use self::guest::Output;
pub use self::options::Options;
pub use self::watch::{Event, Line};
use self::watch::{Source, Watch};
use crate::board::Board;
use crate::cache::Cache;
use crate::run;
use crate::uboot::Uboot;

/// How long anything may take that has no deadline of its own. Emulation on a busy machine is slow; a hang is for ever.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// systemd's "startup finished": everything that the boot had to start is started.
pub const STARTUP_FINISHED: &str = "b07a249cd024414a82dd00cd181378ff";

const FIRMWARE_CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
const FIRMWARE_VARIABLES: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";

pub struct Vm {
    options: Options,
    /// The overlay, the firmware's variables and the sockets.
    directory: TempDir,
    watch: Watch,
    running: Option<Running>,
}

struct Running {
    qemu: Child,
    qmp: UnixStream,
    agent: UnixStream,
}

impl Vm {
    /// A machine on a fresh overlay of `disk`, switched on.
    pub fn boot(disk: &Path) -> Result<Self> {
        Self::boot_with(disk, Options::default())
    }

    pub fn boot_with(disk: &Path, options: Options) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("offshoot-vm-").tempdir()?;
        run!(
            "qemu-img",
            "create",
            "-q",
            "-fqcow2",
            "-Fraw",
            "-b",
            fs::canonicalize(disk).with_context(|| format!("finding {}", disk.display()))?,
            directory.path().join("disk.qcow2")
        )?;
        let (firmware, name) = match options.board {
            Board::Pc => (PathBuf::from(FIRMWARE_VARIABLES), "variables.fd"),
            Board::Virt(count) => (Uboot::build(&Cache::open()?, count)?.image(), "u-boot.bin"),
        };
        fs::copy(&firmware, directory.path().join(name))
            .with_context(|| format!("copying {}: `make setup` installs it", firmware.display()))?;
        let watch = Watch::new();
        let mut vm = Self {
            options,
            directory,
            watch,
            running: None,
        };
        vm.power_on()?;
        Ok(vm)
    }

    /// Switches the machine on again, with the disk as the last power cut or shutdown left it.
    pub fn power_on(&mut self) -> Result<()> {
        anyhow::ensure!(self.running.is_none(), "the machine is already on");
        let sockets = ["qmp", "agent", "serial", "journal"].map(|name| self.path(name));
        let mut listeners = Vec::new();
        for socket in &sockets {
            if socket.exists() {
                fs::remove_file(socket)?;
            }
            listeners.push(
                UnixListener::bind(socket)
                    .with_context(|| format!("listening on {}", socket.display()))?,
            );
        }
        let log = fs::File::create(self.path("qemu.log"))?;
        let mut qemu = self
            .qemu()
            .stdin(match self.options.console {
                true => Stdio::inherit(),
                false => Stdio::null(),
            })
            .stdout(match self.options.console {
                true => Stdio::inherit(),
                false => Stdio::from(log.try_clone()?),
            })
            .stderr(log)
            .spawn()
            .context("starting QEMU: `make setup` installs it")?;
        // QEMU connects to all of them before it runs the first instruction.
        let streams = listeners
            .iter()
            .map(|listener| accept(listener, &mut qemu, &self.path("qemu.log")))
            .collect::<Result<Vec<_>>>();
        let Ok([qmp, agent, serial, journal]) = <[UnixStream; 4]>::try_from(match streams {
            Ok(streams) => streams,
            Err(error) => {
                qemu.kill()?;
                qemu.wait()?;
                return Err(error);
            }
        }) else {
            bail!("four listeners accept four connections");
        };
        self.watch.power_on();
        self.watch.read(Source::Serial, serial);
        self.watch.read(Source::Journal, journal);
        self.watch.read(Source::Qmp, qmp.try_clone()?);
        self.watch.read(Source::Agent, agent.try_clone()?);
        self.running = Some(Running { qemu, qmp, agent });
        self.qmp("qmp_capabilities", json!({}))?;
        self.qmp("cont", json!({}))?;
        Ok(())
    }

    /// Pulls the plug. See the module's header for what is lost.
    pub fn cut_power(&mut self) -> Result<()> {
        let mut running = self.running.take().context("the machine is off already")?;
        running.qemu.kill().context("killing QEMU")?;
        running.qemu.wait()?;
        self.watch.drain(PATIENCE)
    }

    /// Presses the reset button.
    pub fn reset(&mut self) -> Result<()> {
        self.qmp("system_reset", json!({})).map(drop)
    }

    /// Waits until the machine has switched itself off, or somebody typed so at its console.
    pub fn wait_for_power_off(&mut self, timeout: Duration) -> Result<()> {
        self.watch.drain(timeout)?;
        if let Some(mut running) = self.running.take() {
            running.qemu.wait()?;
        }
        Ok(())
    }

    /// Waits for the next journal entry with this message id that no earlier wait has returned or passed over.
    pub fn wait_for_event(&mut self, message_id: &str, timeout: Duration) -> Result<Event> {
        let what = format!("the event {message_id}");
        self.watch.wait(&what, timeout, |watch| {
            watch.next_event(|event| event.message_id() == Some(message_id))
        })
    }

    /// Waits for the next line on the serial console that contains `text`.
    pub fn wait_for_serial(&mut self, text: &str, timeout: Duration) -> Result<String> {
        let what = format!("{text:?} on the serial console");
        self.watch
            .wait(&what, timeout, |watch| watch.next_serial(text))
    }

    /// The next line of the serial console or entry of the journal, in the order of arrival; none if `deadline` comes first. Its place
    /// is its own: other waits do not take lines away from it.
    pub fn next_line(&mut self, deadline: Instant) -> Result<Option<Line>> {
        self.watch.next_line(deadline)
    }

    /// Waits until the machine resets, whoever did it: a reboot, the watchdog, a panic, the reset button.
    pub fn wait_for_reset(&mut self, timeout: Duration) -> Result<()> {
        self.watch
            .wait("a reset", timeout, |watch| watch.next_qmp("RESET"))
            .map(drop)
    }

    /// Waits until the watchdog fires.
    pub fn wait_for_watchdog(&mut self, timeout: Duration) -> Result<()> {
        self.watch
            .wait("the watchdog", timeout, |watch| watch.next_qmp("WATCHDOG"))
            .map(drop)
    }

    /// Cuts the watchdog's wire to the reset line, until the machine is switched off.
    pub fn disconnect_watchdog(&mut self) -> Result<()> {
        self.qmp("watchdog-set-action", json!({"action": "none"}))
            .map(drop)
    }

    /// How often the machine was reset since it was made.
    pub fn resets(&self) -> usize {
        self.watch.count_qmp("RESET")
    }

    /// How often its watchdog has fired.
    pub fn watchdog_resets(&self) -> usize {
        self.watch.count_qmp("WATCHDOG")
    }

    /// The journal entries with this message id that were seen so far, of all boots.
    pub fn events(&self, message_id: &str) -> Vec<Event> {
        self.watch.events(message_id)
    }

    /// Everything that was seen so far, for a failure's message.
    pub fn transcript(&self) -> String {
        self.watch.tail(usize::MAX)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn qemu(&self) -> Command {
        // The machine goes with the thread that started it, even when that is killed.
        let mut command = Command::new("setpriv");
        command
            .arg("--pdeathsig=KILL")
            .arg(match self.options.board {
                Board::Pc => "qemu-system-x86_64",
                Board::Virt(_) => "qemu-system-aarch64",
            });
        self.options.arguments(&mut command, self.directory.path());
        command
    }

    /// One QMP command and its answer.
    fn qmp(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let running = self.running.as_mut().context("the machine is off")?;
        watch::write_line(
            &mut running.qmp,
            &json!({"execute": command, "arguments": arguments}),
        )?;
        self.watch
            .wait(&format!("QMP's answer to {command}"), PATIENCE, |watch| {
                watch.answer(Source::Qmp)
            })?
            .map_err(|error| anyhow::anyhow!("QMP {command}: {error}"))
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if let Some(running) = &mut self.running {
            // Nothing is left to be done about a process that cannot be killed.
            let _ = running.qemu.kill();
            let _ = running.qemu.wait();
        }
    }
}

fn accept(listener: &UnixListener, qemu: &mut Child, log: &Path) -> Result<UnixStream> {
    // A QEMU that refuses its arguments never connects; accept() has no time limit, so ask in turns.
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                if let Some(status) = qemu.try_wait()? {
                    bail!("QEMU: {status}\n{}", fs::read_to_string(log)?);
                }
                anyhow::ensure!(
                    Instant::now() < deadline,
                    "QEMU does not connect to its sockets"
                );
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) => return Err(error.into()),
        }
    }
}
