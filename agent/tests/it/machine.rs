//! A whole device in a directory: real libostree, the real deployer, a real boot environment, the real daemon against a real server. What is
//! not real is the power: a [`Machine`] boots as [`bootloader_glue::protocol`] says, which the real GRUB is checked against.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex};

use bootloader_glue::grub;
use bootloader_glue::protocol::{self, Counter, Environment, Mark};
use offshoot::commit::{Commit, Sha256};
use offshoot::config::Config;
use offshoot::deployment::Deployments;
use offshoot::health;
use offshoot::objects::{self, Kind, Object};
use offshoot::record::{self, Record};
use offshoot::trust::schema::{Delta, File, Objects};

use crate::bench::Bench;
use crate::delta;
use crate::fixture::{self, HARDWARE, ROOT_KEYS, Repository};
use crate::server::{Answer, Identity, Request, Server, Then};

/// What the web server does with a request, before the files are looked up.
pub type Twist = Arc<Mutex<Box<dyn Fn(&Request, Answer) -> Answer + Send>>>;

pub struct Machine {
    pub bench: Bench,
    pub repository: Repository,
    pub identity: Identity,
    files: Arc<Mutex<std::collections::BTreeMap<String, Vec<u8>>>>,
    pub twist: Twist,
    pub factory: Commit,
    serial: u64,
}

/// What a boot ended as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Booted {
    pub commit: Commit,
    pub mark: Mark,
}

impl Machine {
    /// A device that runs the release `one` from the factory, and a server with an empty channel.
    pub fn new() -> Self {
        Self::speaking("http/1.1")
    }

    /// The same, with a server that speaks this protocol only.
    pub fn speaking(protocol: &str) -> Self {
        let (bench, factory) = Bench::new();
        // Under a bootloader whose configuration libostree has written.
        let generator = bench.path("generator");
        let text = format!(
            "#!/bin/sh\necho '{}' > \"$2\"\n",
            bootloader_glue::config::MARKER
        );
        fs::write(&generator, text).unwrap();
        fs::set_permissions(&generator, fs::Permissions::from_mode(0o755)).unwrap();
        bench.ostree(&[
            "--repo=sysroot/ostree/repo",
            "config",
            "set",
            "sysroot.bootloader",
            "grub2",
        ]);
        fs::create_dir_all(bench.path("sysroot/boot/grub2")).unwrap();
        symlink(
            "../loader/grub.cfg",
            bench.path("sysroot/boot/grub2/grub.cfg"),
        )
        .unwrap();
        // The factory's image was made with it.
        fs::write(
            bench.path("sysroot/boot/loader/grub.cfg"),
            format!("{}\n", bootloader_glue::config::MARKER),
        )
        .unwrap();

        let mut repository = Repository::new();
        let far = fixture::at("2100-01-01T00:00:00Z");
        repository.root.expires = far;
        repository.timestamp.expires = far;
        repository.snapshot.expires = far;
        repository.targets.expires = far;
        for (channel, _) in repository.channels.values_mut() {
            channel.expires = far;
            channel.targets.clear();
        }
        repository.publish_root(&ROOT_KEYS);
        repository.publish();

        let mut machine = Self {
            bench,
            repository,
            identity: Identity::new(&[protocol]),
            files: Arc::default(),
            twist: Arc::new(Mutex::new(Box::new(|_, answer| answer))),
            factory,
            serial: 0,
        };
        machine.upload();
        for directory in ["etc/offshoot", "efi", "health/required.d", "run", "state"] {
            fs::create_dir_all(machine.path(directory)).unwrap();
        }
        for (copy, block) in grub::fresh(3).iter().enumerate() {
            fs::write(machine.path(&format!("efi/env.{copy}")), block).unwrap();
        }
        let root = machine.repository.file("1.root.json");
        fs::write(machine.path("root.json"), root).unwrap();
        machine.power_on();
        machine
    }

    /// Another device and server like this one, for a test that needs many.
    pub fn copy(&self) -> Self {
        self.copy_speaking("http/1.1")
    }

    pub fn copy_speaking(&self, protocol: &str) -> Self {
        let temp = tempfile::tempdir().unwrap();
        let status = Command::new("cp")
            .arg("-a")
            .arg(self.path("."))
            .arg(temp.path())
            .status();
        assert!(status.unwrap().success());
        let copy = Self {
            bench: Bench { temp },
            repository: self.repository.clone(),
            identity: Identity::new(&[protocol]),
            files: Arc::new(Mutex::new(self.repository.files.clone())),
            twist: Arc::new(Mutex::new(Box::new(|_, answer| answer))),
            factory: self.factory,
            serial: self.serial,
        };
        copy.power_on();
        copy
    }

    pub fn path(&self, path: &str) -> PathBuf {
        self.bench.path(path)
    }

    /// Publishes a release of the channel `stable`, with a delta from the factory's.
    pub fn publish(&mut self, version: &str) -> Commit {
        self.publish_with(version, |_| {})
    }

    /// Publishes a release whose deltas are not what they were.
    pub fn publish_with(&mut self, version: &str, spoil: impl FnOnce(&mut Vec<Delta>)) -> Commit {
        let commit = self.bench.release(version, version);
        let mut deltas = vec![self.delta(Some(self.factory), commit)];
        spoil(&mut deltas);
        self.release(version, commit, deltas, None);
        commit
    }

    /// Makes a delta and puts it on the server.
    pub fn delta(&mut self, from: Option<Commit>, to: Commit) -> Delta {
        let directory = self.bench.delta(from, to);
        let name = from.map_or("empty".to_owned(), |from| from.to_string());
        let url = format!("deltas/{name}-{to}");
        for entry in fs::read_dir(&directory).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            let bytes = fs::read(entry.path()).unwrap();
            self.repository.files.insert(format!("{url}/{name}"), bytes);
        }
        delta::describe(&directory, from, &url)
    }

    /// Puts every object of a commit on the server, and their index.
    pub fn objects(&mut self, commit: Commit) -> Objects {
        let only = format!("only-{commit}");
        let repo = format!("--repo={only}");
        self.bench.ostree(&[&repo, "init", "--mode=archive"]);
        self.bench
            .ostree(&[&repo, "pull-local", "server", &commit.to_string()]);
        let mut objects = Vec::new();
        for folder in fs::read_dir(self.path(&only).join("objects")).unwrap() {
            let folder = folder.unwrap();
            for file in fs::read_dir(folder.path()).unwrap() {
                let file = file.unwrap();
                let name = file.file_name().into_string().unwrap();
                let (rest, extension) = name.split_once('.').unwrap();
                let bytes = fs::read(file.path()).unwrap();
                let checksum = format!("{}{rest}", folder.file_name().display());
                let object = Object {
                    kind: Kind::from_extension(extension).unwrap(),
                    checksum: checksum.parse().unwrap(),
                    length: bytes.len() as u64,
                    usize: bytes.len() as u64,
                    sha256: Sha256::of(&bytes),
                };
                self.repository.files.insert(object.path(), bytes);
                objects.push(object);
            }
        }
        let index = objects::write(objects);
        let path = format!("objects/index-{commit}");
        let file = File {
            path: path.parse().unwrap(),
            length: index.len() as u64,
            sha256: Sha256::of(&index),
        };
        self.repository.files.insert(path, index);
        Objects { index: file }
    }

    /// Publishes a release that can be reached so.
    pub fn release(
        &mut self,
        version: &str,
        commit: Commit,
        deltas: Vec<Delta>,
        objects: Option<Objects>,
    ) {
        let name = commit.to_string();
        let object = format!("server/objects/{}/{}.commit", &name[..2], &name[2..]);
        let object = fs::read(self.path(&object)).unwrap();
        self.serial += 1;
        let serial = self.serial;
        (self.repository).release_of("stable", version, serial, &object, deltas, objects);
        self.repository.publish();
        self.upload();
    }

    /// Makes what is published what the server has.
    pub fn upload(&mut self) {
        *self.files.lock().unwrap() = self.repository.files.clone();
    }

    pub async fn server(&self) -> Server {
        let (files, twist) = (self.files.clone(), self.twist.clone());
        let server = Server::start(Some(&self.identity), move |request| {
            let path = request.path.strip_prefix("/base/").unwrap();
            let honest = match files.lock().unwrap().get(path) {
                Some(content) => Answer::file(request, content),
                None => Answer::new(404, ""),
            };
            twist.lock().unwrap()(request, honest)
        });
        let server = server.await;
        let at = |path: &str| self.path(path).display().to_string();
        let config = format!(
            "[server]\nurl = '{}'\nca = '{}'\nstall = 5\n[device]\nhardware = '{HARDWARE}'\nchannel = 'stable'\n\
             [poll]\ninterval = 1\n[install]\nreboot_command = ['touch', '{}']\n[bootloader]\nenvironment = '{}'\n\
             [paths]\nstate = '{}'\nrun = '{}'\nroot = '{}'\nsysroot = '{}'\nboot = '{}'\nkernel_command_line = '{}'\n\
             boot_id = '{}'\nwatchdog_class = '{}'\ndeployer = '{}'\nbootloader_generator = '{}'\nroot_metadata = '{}'\nhealth = ['{}']\n",
            server.url(),
            self.identity.ca().display(),
            at("rebooted"),
            at("efi"),
            at("state"),
            at("run"),
            at("root"),
            at("sysroot"),
            at("sysroot/boot"),
            at("cmdline"),
            at("boot_id"),
            at("watchdog0"),
            env!("CARGO_BIN_EXE_offshoot-deployer"),
            at("generator"),
            at("root.json"),
            at("health"),
        );
        fs::write(self.path("etc/offshoot/config.toml"), config).unwrap();
        server
    }

    /// After [`Machine::server`].
    pub fn config(&self) -> Config {
        Config::load(self.bench.temp.path()).unwrap()
    }

    /// The bootloader's turn: it counts, chooses, and tells the kernel. Whatever ran is gone.
    pub fn power_on(&self) -> Booted {
        let boot = protocol::boot(&self.environment(), self.deployments().len(), true);
        if let Some(counter) = boot.saved {
            self.save(counter);
        }
        self.start(boot)
    }

    /// A boot under a bootloader that has decided so, whatever the environment says.
    pub fn start(&self, boot: protocol::Boot) -> Booted {
        let deployments = self.deployments();
        let commit = deployments[boot.entry];
        let deployment = self.path(&format!("sysroot/ostree/deploy/os/deploy/{commit}.0"));
        let root = self.path("root");
        if root.symlink_metadata().is_ok() {
            fs::remove_file(&root).unwrap();
        }
        symlink(deployment, root).unwrap();
        fs::write(self.path("cmdline"), format!("rw {}\n", boot.mark)).unwrap();
        // Any name that no boot had before.
        let boot_id = Sha256::of(&fs::read(self.path("boot_id")).unwrap_or_default());
        fs::write(self.path("boot_id"), boot_id.to_string()).unwrap();
        let rebooted = self.path("rebooted");
        if rebooted.exists() {
            fs::remove_file(rebooted).unwrap();
        }
        Booted {
            commit,
            mark: boot.mark,
        }
    }

    /// What systemd's units do on a trial that is well.
    pub fn confirm(&self) {
        health::confirm(&self.config()).unwrap();
    }

    pub fn rebooted(&self) -> bool {
        self.path("rebooted").exists()
    }

    pub fn deployments(&self) -> Vec<Commit> {
        let status: Deployments = self.bench.done(&["status"]);
        let deployments = status.deployments.into_iter();
        deployments.map(|deployment| deployment.commit).collect()
    }

    pub fn record(&self) -> Record {
        record::peek(&self.path("state")).unwrap()
    }

    pub fn environment(&self) -> Environment {
        let bootloader = bootloader_glue::Bootloader::Grub {
            environment: self.path("efi"),
            boot: self.path("sysroot/boot"),
        };
        bootloader.read().unwrap()
    }

    pub fn armed(&self) -> bool {
        match self.environment() {
            Environment::Valid { counter, .. } => counter.upgrade_available,
            Environment::Absent | Environment::Corrupt => panic!("no environment"),
        }
    }

    /// As GRUB saves: the older copy, with the next number.
    fn save(&self, counter: Counter) {
        let paths = [0, 1].map(|copy| self.path(&format!("efi/env.{copy}")));
        let copies = paths
            .each_ref()
            .map(|path| grub::decode(&fs::read(path).unwrap()));
        let (older, seq) = match copies {
            [Some((_, first)), Some((_, second))] if (first + 1) % 3 == second => (0, second),
            [Some((_, first)), _] => (1, first),
            [None, Some((_, second))] => (0, second),
            [None, None] => panic!("no environment"),
        };
        fs::write(&paths[older], grub::encode(&counter, (seq + 1) % 3)).unwrap();
    }

    /// From now on the server answers so.
    pub fn twisted(&self, twist: impl Fn(&Request, Answer) -> Answer + Send + 'static) {
        *self.twist.lock().unwrap() = Box::new(twist);
    }

    /// From now on the server drops a connection after so many bytes of a delta.
    pub fn dropping_after(&self, bytes: usize) {
        self.twisted(move |request, answer| {
            if request.path.starts_with("/base/deltas/") && answer.body.len() > bytes {
                answer.cut_at(bytes).then(Then::Cut)
            } else {
                answer
            }
        });
    }
}
