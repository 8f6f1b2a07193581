//! python-tuf, which publishes and serves (`peer.py`), and a device beside it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use jiff::Timestamp as Time;
use offshoot::trust::Refusal;
use serde_json::{Value, json};

use super::client;
use super::process::Process;

/// A repository that python-tuf made and serves.
pub(crate) struct Peer {
    process: Option<Process>,
    directory: tempfile::TempDir,
    url: String,
}

/// Those that no test is using: python-tuf takes longer to start than most tests.
static IDLE: Mutex<Vec<Process>> = Mutex::new(Vec::new());

pub(crate) struct Device {
    directory: tempfile::TempDir,
    url: String,
    pub(crate) now: Time,
}

impl Peer {
    /// Serves a repository whose keys are of this scheme: version 1 of each role.
    pub(crate) fn new(scheme: &str) -> Self {
        let mut peer = Self {
            process: Some(idle().pop().unwrap_or_else(Process::start)),
            directory: tempfile::tempdir().unwrap(),
            url: String::new(),
        };
        let public = peer.public();
        peer.by("new", json!({"directory": public, "scheme": scheme}));
        let url = peer.by("serve", json!({"directory": public}));
        peer.url = url.as_str().unwrap().to_owned();
        peer
    }

    pub(crate) fn public(&self) -> PathBuf {
        self.directory.path().join("public")
    }

    /// Calls a method of `peer.py` by its arguments' names.
    pub(crate) fn by(&mut self, name: &str, arguments: Value) -> Value {
        self.call(json!({"do": name, "by": arguments}))
    }

    /// Calls a method of `peer.py`.
    pub(crate) fn with<const N: usize>(&mut self, name: &str, arguments: [&str; N]) -> Value {
        self.call(json!({"do": name, "with": arguments.as_slice()}))
    }

    /// Signs and publishes the next version of each role.
    pub(crate) fn publish<const N: usize>(&mut self, roles: [&str; N]) {
        self.with("publish", roles);
    }

    /// What was asked for since this was asked, in order.
    pub(crate) fn requested(&mut self) -> Vec<String> {
        serde_json::from_value(self.with("requested", [])).unwrap()
    }

    pub(crate) fn read(&self, file: &str) -> Vec<u8> {
        fs::read(self.public().join("metadata").join(file)).unwrap()
    }

    pub(crate) fn write(&self, file: &str, bytes: &[u8]) {
        fs::write(self.public().join("metadata").join(file), bytes).unwrap();
    }

    pub(crate) fn remove(&self, file: &str) {
        fs::remove_file(self.public().join("metadata").join(file)).unwrap();
    }

    /// Publishes a file of metadata again, changed after it was signed.
    pub(crate) fn spoil(&self, file: &str, change: impl FnOnce(&mut Value)) {
        let mut value: Value = serde_json::from_slice(&self.read(file)).unwrap();
        change(&mut value);
        self.write(file, &serde_json::to_vec(&value).unwrap());
    }

    /// A device that trusts the first root.
    pub(crate) fn device(&self) -> Device {
        let device = Device {
            directory: tempfile::tempdir().unwrap(),
            url: self.url.clone(),
            now: "2030-01-01T00:00:00Z".parse().unwrap(),
        };
        device.init(&self.read("1.root.json")).unwrap();
        device
    }

    fn call(&mut self, request: Value) -> Value {
        let answer = self.process.as_mut().unwrap().call(&request);
        answer.unwrap_or_else(|error| panic!("{request}: {error}"))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Of one in the middle of an answer nobody knows what it says next.
        if !std::thread::panicking() {
            idle().extend(self.process.take());
        }
    }
}

fn idle() -> MutexGuard<'static, Vec<Process>> {
    IDLE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Device {
    pub(crate) fn init(&self, root: &[u8]) -> Result<(), Refusal> {
        let path = self.directory.path().join("shipped");
        fs::write(&path, root).unwrap();
        self.run(&["init", path.to_str().unwrap()])
    }

    pub(crate) fn refresh(&self) -> Result<(), Refusal> {
        let url = format!("{}metadata/", self.url);
        self.run(&["--metadata-url", &url, "refresh"])
    }

    pub(crate) fn download(&self, names: &[&str]) -> Result<(), Refusal> {
        let (metadata, targets) = (
            format!("{}metadata/", self.url),
            format!("{}targets/", self.url),
        );
        let directory = self.downloads();
        let mut words = vec!["--metadata-url", &metadata, "--target-base-url", &targets];
        words.extend(["--target-dir", directory.to_str().unwrap()]);
        words.extend(names.iter().flat_map(|name| ["--target-name", name]));
        words.push("download");
        self.run(&words)
    }

    /// What is kept of each role, by version.
    pub(crate) fn versions(&self) -> BTreeMap<String, u64> {
        let mut versions = BTreeMap::new();
        for entry in fs::read_dir(self.metadata()).unwrap() {
            let path = entry.unwrap().path();
            if path
                .extension()
                .is_some_and(|extension| extension == "json")
            {
                let document: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
                let role = path.file_stem().unwrap().to_str().unwrap().to_owned();
                versions.insert(role, document["signed"]["version"].as_u64().unwrap());
            }
        }
        versions
    }

    pub(crate) fn version(&self, role: &str) -> Option<u64> {
        self.versions().get(role).copied()
    }

    /// Root, timestamp, snapshot and targets; 0 is none.
    pub(crate) fn top(&self) -> [u64; 4] {
        ["root", "timestamp", "snapshot", "targets"].map(|role| self.version(role).unwrap_or(0))
    }

    pub(crate) fn kept(&self, file: &str) -> Vec<u8> {
        fs::read(self.metadata().join(file)).unwrap()
    }

    /// The contents of what was downloaded.
    pub(crate) fn downloaded(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.downloads()) else {
            return Vec::new();
        };
        let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
            .iter()
            .map(|file| fs::read_to_string(file).unwrap())
            .collect()
    }

    fn metadata(&self) -> PathBuf {
        self.directory.path().join("metadata")
    }

    fn downloads(&self) -> PathBuf {
        self.directory.path().join("targets")
    }

    fn run(&self, words: &[&str]) -> Result<(), Refusal> {
        let metadata = self.metadata();
        let words = ["tuf-conformance", "--metadata-dir", as_str(&metadata)]
            .iter()
            .chain(words)
            .map(OsString::from)
            .collect::<Vec<_>>();
        client::run(words.into_iter(), self.now)
            .map_err(|error| error.downcast::<Refusal>().unwrap())
    }
}

fn as_str(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub(crate) fn rolled_back<T>(role: &str, have: u64, got: u64) -> Result<T, Refusal> {
    let role = role.to_owned();
    Err(Refusal::RolledBack { role, have, got })
}

pub(crate) fn below<T>(role: &str, have: u64, need: u64) -> Result<T, Refusal> {
    let role = role.to_owned();
    Err(Refusal::BelowThreshold { role, have, need })
}

pub(crate) fn missing<T>(path: &str) -> Result<T, Refusal> {
    let path = path.to_owned();
    Err(Refusal::Missing { path })
}
