//! A fleet of one: an operator, a server and a device that follows it.

use anyhow::Result;
use offshoot::commit::Commit;
use tempfile::TempDir;

use crate::cache::Cache;
use crate::fleet::Fleet;
use crate::image::{self, Image};
use crate::release::Release;
use crate::server::Server;
use crate::vm::{Options, PATIENCE, STARTUP_FINISHED, Vm};

pub struct Bench {
    pub vm: Vm,
    pub server: Server,
    pub fleet: Fleet,
    /// The release that the factory installed.
    pub first: Commit,
    cache: Cache,
    _directory: TempDir,
}

/// Which server devices ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Web {
    Fleet,
    Nginx,
}

impl Bench {
    /// Everything built and started; the device is on its way up and not configured yet.
    pub fn start(web: Web, options: Options) -> Result<Self> {
        let cache = Cache::open()?;
        let Image {
            disk,
            commit,
            fleet,
        } = image::factory(&cache, options.board)?;
        let directory = cache.scratch()?;
        let fleet = Fleet::copy(options.board, &fleet, &directory.path().join("fleet"))?;
        let server = match web {
            Web::Fleet => Server::of_fleet(fleet.directory())?,
            Web::Nginx => Server::nginx(&fleet.public())?,
        };
        Ok(Self {
            vm: Vm::boot_with(&disk, options)?,
            server,
            fleet,
            first: commit,
            cache,
            _directory: directory,
        })
    }

    /// Waits until the device is up, and tells it which server to ask; `more` is added to its configuration.
    pub fn configure(&mut self, more: &str) -> Result<()> {
        self.configure_with(more, |_| Ok(()))
    }

    /// The same; `prepare` changes what else is to be changed before the device asks for the first time.
    pub fn configure_with(
        &mut self,
        more: &str,
        prepare: impl FnOnce(&mut Vm) -> Result<()>,
    ) -> Result<()> {
        self.vm.wait_for_event(STARTUP_FINISHED, PATIENCE)?;
        prepare(&mut self.vm)?;
        self.write_configuration(&format!("\n[poll]\ninterval = 2\n\n{more}"))?;
        self.vm.ask(["systemctl", "restart", "offshoot.service"])?;
        Ok(())
    }

    /// Which server the device is to ask, when it starts next; `more` goes on in the table `[server]`.
    pub fn write_configuration(&mut self, more: &str) -> Result<()> {
        let Self { vm, server, .. } = self;
        vm.ask(["mkdir", "-p", "/etc/offshoot"])?;
        // The image has the fleet's own; another server has another.
        vm.write_file("/etc/offshoot/ca.pem", server.ca.as_bytes())?;
        let configuration = format!(
            "[server]\nurl = {:?}\nca = \"/etc/offshoot/ca.pem\"\n{more}",
            server.url
        );
        vm.write_file("/etc/offshoot/config.toml", configuration.as_bytes())?;
        // A scenario may cut the power at once, and what an operator has written is not what it tests.
        vm.ask(["sync"])?;
        Ok(())
    }

    /// Composes and publishes a release.
    pub fn publish(&self, release: &Release) -> Result<Commit> {
        self.fleet.publish(&self.cache, release)
    }
}

impl Drop for Bench {
    /// A scenario that failed says what the machine and its device said.
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.vm.transcript());
            let journal = [
                "journalctl",
                "--no-pager",
                "--output=short-monotonic",
                "--unit=offshoot*",
                "--lines=400",
            ];
            match self.vm.run(journal) {
                Ok(output) => eprintln!("-- journal in the guest\n{}", output.stdout),
                Err(error) => eprintln!("-- the guest does not answer: {error:#}"),
            }
        }
    }
}
