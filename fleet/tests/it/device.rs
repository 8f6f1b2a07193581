//! A device over plain files: the agent's own code, and a directory in the server's place.

use std::fs;
use std::path::{Path, PathBuf};

use jiff::Timestamp as Time;
use offshoot::commit::Sha256;
use offshoot::objects::{self, Object};
use offshoot::trust::goal::Newest;
use offshoot::trust::refresh::{Outcome, Refresh, Reply, Want};
use offshoot::trust::schema::{File, Manifest, Objects};
use offshoot::trust::store::Store;
use offshoot::trust::{Release, Verified};

pub(crate) struct Device {
    store: Store,
}

impl Device {
    /// One that has the image's root and has seen nothing yet.
    pub(crate) fn new(directory: &Path, root: &Path) -> Self {
        Self {
            store: Store::open(directory, &fs::read(root).unwrap()).unwrap(),
        }
    }

    /// The version of the root that it has.
    #[allow(dead_code, reason = "not every user of this file asks")]
    pub(crate) fn root(&self) -> u64 {
        self.store.root().version.number()
    }

    /// A poll of `stable` for `qemu-x86_64`.
    pub(crate) fn poll(
        &mut self,
        public: &Path,
        now: Time,
    ) -> anyhow::Result<Outcome<Verified<Release>>> {
        self.poll_moving(|_| public.to_owned(), now)
    }

    /// A poll whose n-th request is answered from `public(n)`.
    pub(crate) fn poll_moving(
        &mut self,
        public: impl Fn(usize) -> PathBuf,
        now: Time,
    ) -> anyhow::Result<Outcome<Verified<Release>>> {
        let goal = Newest {
            channel: "stable".parse()?,
            hardware: "qemu-x86_64".parse()?,
        };
        let mut refresh = Refresh::new(&self.store, goal, now, Time::UNIX_EPOCH);
        let mut requests = 0..;
        loop {
            let reply = match refresh.want() {
                Want::Poll { path, .. } => get(&public(requests.next().unwrap()), path),
                Want::File { path, .. } => get(&public(requests.next().unwrap()), &path),
                Want::Keep => refresh.keep(&mut self.store)?,
                Want::Done => return refresh.finish(&mut self.store),
            };
            refresh = refresh.supply(reply)?;
        }
    }
}

fn get(public: &Path, path: &str) -> Reply {
    match fs::read(public.join(path)) {
        Ok(bytes) => Reply::Body(bytes),
        Err(_) => Reply::NotFound,
    }
}

/// Its version; all of its files are there, and are those that were signed.
pub(crate) fn checked(public: &Path, release: &Verified<Release>) -> String {
    let (entry, manifest) = (&release.entry, &release.manifest);
    let (folder, file) = entry.path.as_str().rsplit_once('/').unwrap();
    let object =
        fs::read(public.join(format!("targets/{folder}/{}.{file}", entry.commit))).unwrap();
    assert_eq!(
        (Sha256::of(&object), object.len() as u64),
        (entry.commit.0, entry.length)
    );
    for delta in &manifest.deltas {
        for File {
            path,
            length,
            sha256,
        } in delta.parts.iter().chain([&delta.superblock])
        {
            let bytes = fs::read(public.join(path.as_str())).unwrap();
            assert_eq!(
                (Sha256::of(&bytes), bytes.len() as u64),
                (*sha256, *length),
                "{path}"
            );
        }
    }
    for object in indexed(public, manifest) {
        let bytes = fs::read(public.join(object.path())).unwrap();
        let want = (object.sha256, object.length);
        assert_eq!((Sha256::of(&bytes), bytes.len() as u64), want, "{object}");
    }
    entry.version.to_string()
}

/// What the index of its objects lists, if it has one.
pub(crate) fn indexed(public: &Path, manifest: &Manifest) -> Vec<Object> {
    let Some(Objects { index }) = &manifest.objects else {
        return Vec::new();
    };
    let bytes = fs::read(public.join(index.path.as_str())).unwrap();
    assert_eq!(
        (Sha256::of(&bytes), bytes.len() as u64),
        (index.sha256, index.length)
    );
    objects::parse(&bytes).unwrap()
}
