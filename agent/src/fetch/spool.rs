//! The spool: the files of the release being fetched, until the deployer has applied them.
//!
//! Owns everything in its directory. The layout is
//!
//! | path | what |
//! |---|---|
//! | `<commit>/superblock`, `0`, `1`, … | a delta to that commit: whole files, each once matched to its signed digest |
//! | `<commit>/index`, `<checksum>.filez`, `.dirtree`, … | the index of its objects, and those that were missing |
//! | `<commit>/<name>.part` | the beginning of a file that is being fetched |
//!
//! What a power cut leaves, at each point:
//! - while a file grows: its `.part`, which is the bytes of the last checkpoint ([`CHECKPOINT`] bytes apart) and perhaps
//!   more. All of it is hashed again when the transfer continues, so a file system that kept a length without its bytes
//!   costs one more download, never a wrong file;
//! - between the sync of a whole `.part` and its rename: a `.part` of full length, which is hashed and renamed without
//!   asking the server;
//! - after the rename, before the directory is synced: either of the two above;
//! - while [`Spool::retain`] deletes: some of what was to be deleted, which the next call deletes.
//!
//! Whoever reads a file here checks it with [`Slot::holds`] first; a name alone promises nothing. Does not decide what
//! is kept, and never writes more than the signed length of a file.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::io::Errno;
use sha2::Digest as _;

use crate::commit::{Commit, Sha256};
use crate::objects::Kind;

/// A growing file is synced whenever this many bytes have come, so that a power cut costs no more than them again.
const CHECKPOINT: u64 = 4 << 20;

/// The spool directory.
#[derive(Clone, Debug)]
pub struct Spool {
    root: PathBuf,
}

/// The name of a file in the spool. There are no others, so none can be hostile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Name {
    Superblock,
    Part(u32),
    /// The index of the release's objects.
    Index,
    Object(Kind, Sha256),
}

/// The place of one file in the spool, whether or not it is there.
#[derive(Clone, Debug)]
pub struct Slot {
    directory: PathBuf,
    name: Name,
}

/// The spool cannot be read or written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpoolError {
    #[error("writing {}: no space left; free some, or enlarge the file system", path.display())]
    NoSpace { path: PathBuf },
    #[error("{}: {}; check the file system and its permissions", path.display(), io::Error::from_raw_os_error(*errno))]
    Io { path: PathBuf, errno: i32 },
}

impl Spool {
    /// The spool in `root`, made if it is not there.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, SpoolError> {
        let root = root.into();
        make_directory(&root)?;
        Ok(Self { root })
    }

    /// The place of a file of the release `commit`.
    pub fn slot(&self, commit: &Commit, name: Name) -> Slot {
        Slot {
            directory: self.directory(commit),
            name,
        }
    }

    /// Where the files of the release `commit` are.
    pub fn directory(&self, commit: &Commit) -> PathBuf {
        self.root.join(commit.to_string())
    }

    /// Deletes everything but the release `keep`, and in that everything that has no business there.
    pub fn retain(&self, keep: Option<&Commit>) -> Result<(), SpoolError> {
        let kept = keep.map(|commit| self.directory(commit));
        for path in entries(&self.root)? {
            if Some(&path) == kept.as_ref() && is_directory(&path)? {
                for path in entries(&path)? {
                    let name = path
                        .file_name()
                        .and_then(|name| name.to_str())
                        .unwrap_or("");
                    let known = name
                        .strip_suffix(".part")
                        .unwrap_or(name)
                        .parse::<Name>()
                        .is_ok();
                    if !known || !is_file(&path)? {
                        remove(&path)?;
                    }
                }
            } else {
                remove(&path)?;
            }
        }
        Ok(())
    }
}

impl Slot {
    /// Where the whole file is, once it is there.
    pub fn path(&self) -> PathBuf {
        self.directory.join(self.name.to_string())
    }

    /// Whether the whole file is there, of this length and digest. Reads all of it.
    pub fn holds(&self, length: u64, sha256: &Sha256) -> Result<bool, SpoolError> {
        let path = self.path();
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(SpoolError::new(&path, error)),
        };
        if file
            .metadata()
            .map_err(|error| SpoolError::new(&path, error))?
            .len()
            != length
        {
            return Ok(false);
        }
        let (hash, read) = hash(&file, length).map_err(|error| SpoolError::new(&path, error))?;
        Ok(read == length && Sha256::from_bytes(hash.finalize().into()) == *sha256)
    }

    /// How many bytes of the file are here, whole or not, and not yet checked.
    pub fn present(&self) -> Result<u64, SpoolError> {
        for path in [self.path(), self.partial_path()] {
            match fs::metadata(&path) {
                Ok(metadata) => return Ok(metadata.len()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(SpoolError::new(&path, error)),
            }
        }
        Ok(0)
    }

    /// Puts a small file there, whole. It is not synced: what a power cut takes of it is found by [`Slot::holds`] and fetched again, which
    /// costs less than to sync thousands of small files.
    pub(super) fn put(&self, bytes: &[u8]) -> Result<(), SpoolError> {
        make_directory(&self.directory)?;
        let (partial, whole) = (self.partial_path(), self.path());
        fs::write(&partial, bytes).map_err(|error| SpoolError::new(&partial, error))?;
        fs::rename(&partial, &whole).map_err(|error| SpoolError::new(&whole, error))
    }

    /// The unfinished file, with what there is of it; a beginning longer than the whole may be is thrown away.
    pub(super) fn resume(&self, length: u64) -> Result<Partial, SpoolError> {
        make_directory(&self.directory)?;
        let path = self.partial_path();
        let fail = |error| SpoolError::new(&path, error);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(fail)?;
        let found = file.metadata().map_err(fail)?.len();
        let (hash, present) = hash(&file, found.min(length)).map_err(fail)?;
        let mut partial = Partial {
            file,
            path,
            whole: self.path(),
            hash,
            present,
            limit: length,
            synced: present,
        };
        if found > length {
            partial.restart()?;
        }
        Ok(partial)
    }

    fn partial_path(&self) -> PathBuf {
        self.directory.join(format!("{}.part", self.name))
    }
}

/// A file that is being fetched: its bytes so far and their running digest.
pub(super) struct Partial {
    file: File,
    path: PathBuf,
    whole: PathBuf,
    hash: sha2::Sha256,
    present: u64,
    limit: u64,
    synced: u64,
}

/// A finished file has another digest than the signed one.
pub(super) struct Mismatch {
    pub(super) partial: Partial,
    pub(super) got: Sha256,
}

impl Partial {
    pub(super) fn present(&self) -> u64 {
        self.present
    }

    /// Adds `bytes`, or nothing and false if they go past the limit.
    pub(super) fn append(&mut self, bytes: &[u8]) -> Result<bool, SpoolError> {
        let present = self.present + bytes.len() as u64;
        if present > self.limit {
            return Ok(false);
        }
        self.file
            .write_all(bytes)
            .map_err(|error| SpoolError::new(&self.path, error))?;
        self.hash.update(bytes);
        self.present = present;
        Ok(true)
    }

    /// Whether enough has come since the last checkpoint to be worth a new one.
    pub(super) fn wants_checkpoint(&self) -> bool {
        self.present - self.synced >= CHECKPOINT
    }

    pub(super) fn checkpoint(mut self) -> Result<Self, SpoolError> {
        self.file
            .sync_data()
            .map_err(|error| SpoolError::new(&self.path, error))?;
        self.synced = self.present;
        Ok(self)
    }

    /// Throws away what there is.
    pub(super) fn restart(&mut self) -> Result<(), SpoolError> {
        let fail = |error| SpoolError::new(&self.path, error);
        self.file.set_len(0).map_err(fail)?;
        self.file.seek(SeekFrom::Start(0)).map_err(fail)?;
        self.hash = sha2::Sha256::new();
        self.present = 0;
        self.synced = 0;
        Ok(())
    }

    /// Checks all bytes against the signed digest and gives the file its name, durably.
    pub(super) fn finish(self, sha256: &Sha256) -> Result<Result<(), Box<Mismatch>>, SpoolError> {
        let got = Sha256::from_bytes(self.hash.clone().finalize().into());
        if got != *sha256 {
            return Ok(Err(Box::new(Mismatch { partial: self, got })));
        }
        self.file
            .sync_all()
            .map_err(|error| SpoolError::new(&self.path, error))?;
        fs::rename(&self.path, &self.whole).map_err(|error| SpoolError::new(&self.whole, error))?;
        if let Some(directory) = self.whole.parent() {
            sync_directory(directory)?;
        }
        Ok(Ok(()))
    }
}

impl SpoolError {
    fn new(path: &Path, error: io::Error) -> Self {
        let path = path.to_owned();
        let errno = error.raw_os_error().unwrap_or(Errno::IO.raw_os_error());
        if [Errno::NOSPC, Errno::DQUOT]
            .map(Errno::raw_os_error)
            .contains(&errno)
        {
            Self::NoSpace { path }
        } else {
            Self::Io { path, errno }
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Superblock => f.write_str("superblock"),
            Self::Part(number) => write!(f, "{number}"),
            Self::Index => f.write_str("index"),
            Self::Object(kind, checksum) => write!(f, "{checksum}.{}", kind.extension()),
        }
    }
}

/// No file in the spool has this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no file in the spool has this name")]
pub struct NotAName;

impl FromStr for Name {
    type Err = NotAName;

    fn from_str(text: &str) -> Result<Self, NotAName> {
        let name = match text {
            "superblock" => Self::Superblock,
            "index" => Self::Index,
            object if object.contains('.') => {
                let (checksum, extension) = object.split_once('.').ok_or(NotAName)?;
                let kind = Kind::from_extension(extension).ok_or(NotAName)?;
                Self::Object(kind, checksum.parse().map_err(|_| NotAName)?)
            }
            number => Self::Part(number.parse().map_err(|_| NotAName)?),
        };
        // One spelling each: `+1` and `01` are numbers too.
        if name.to_string() == text {
            Ok(name)
        } else {
            Err(NotAName)
        }
    }
}

/// The digest of the first `limit` bytes of `file`, and how many there were.
fn hash(mut file: &File, limit: u64) -> io::Result<(sha2::Sha256, u64)> {
    let mut hash = sha2::Sha256::new();
    let mut buffer = vec![0; 64 << 10];
    let mut total = 0;
    while total < limit {
        let room = usize::try_from(limit - total)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        match file.read(&mut buffer[..room])? {
            0 => break,
            read => {
                hash.update(&buffer[..read]);
                total += read as u64;
            }
        }
    }
    Ok((hash, total))
}

/// Makes `path` and what is above it, and syncs the directory that holds it.
fn make_directory(path: &Path) -> Result<(), SpoolError> {
    if path.is_dir() {
        return Ok(());
    }
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|error| SpoolError::new(path, error))?;
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync_directory(parent),
        _ => Ok(()),
    }
}

fn sync_directory(path: &Path) -> Result<(), SpoolError> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(|error| SpoolError::new(path, error))
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>, SpoolError> {
    fs::read_dir(directory)
        .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
        .map_err(|error| SpoolError::new(directory, error))
}

fn is_directory(path: &Path) -> Result<bool, SpoolError> {
    Ok(fs::symlink_metadata(path)
        .map_err(|error| SpoolError::new(path, error))?
        .is_dir())
}

fn is_file(path: &Path) -> Result<bool, SpoolError> {
    Ok(fs::symlink_metadata(path)
        .map_err(|error| SpoolError::new(path, error))?
        .is_file())
}

fn remove(path: &Path) -> Result<(), SpoolError> {
    tracing::info!(path = %path.display(), "removing from the spool");
    let removed = if is_directory(path)? {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    removed.map_err(|error| SpoolError::new(path, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn commit(text: &str) -> Commit {
        Commit(Sha256::of(text.as_bytes()))
    }

    fn tree(root: &Path) -> Vec<String> {
        let mut found = Vec::new();
        let mut todo = vec![root.to_owned()];
        while let Some(directory) = todo.pop() {
            for path in entries(&directory).unwrap() {
                found.push(path.strip_prefix(root).unwrap().display().to_string());
                if is_directory(&path).unwrap() {
                    todo.push(path);
                }
            }
        }
        found.sort();
        found
    }

    #[test]
    fn names_have_one_spelling_each() {
        for name in [Name::Superblock, Name::Part(0), Name::Part(u32::MAX)] {
            assert_eq!(name.to_string().parse(), Ok(name));
        }
        for bad in [
            "",
            ".",
            "..",
            "../0",
            "01",
            "+1",
            "-1",
            "4294967296",
            "0.part",
            "Superblock",
            "superblock/",
        ] {
            assert_eq!(bad.parse::<Name>(), Err(NotAName), "{bad}");
        }
    }

    #[test]
    fn retain_keeps_the_known_names_of_one_release_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let spool = Spool::open(root.path().join("spool")).unwrap();
        let (kept, other) = (commit("kept"), commit("other"));
        for commit in [&kept, &other] {
            fs::create_dir(spool.directory(commit)).unwrap();
            for name in [
                "0",
                "1.part",
                "superblock",
                "superblock.part",
                "x",
                "0.part.part",
                "01",
            ] {
                fs::write(spool.directory(commit).join(name), name).unwrap();
            }
            fs::create_dir_all(spool.directory(commit).join("7/8")).unwrap();
            std::os::unix::fs::symlink("/", spool.directory(commit).join("9")).unwrap();
        }
        fs::write(spool.root.join("stray"), "").unwrap();

        spool.retain(Some(&kept)).unwrap();
        let names = ["", "/0", "/1.part", "/superblock", "/superblock.part"];
        assert_eq!(tree(&spool.root), names.map(|name| format!("{kept}{name}")));

        spool.retain(None).unwrap();
        assert_eq!(tree(&spool.root), [""; 0]);
    }

    #[test]
    fn a_file_has_its_name_only_when_whole_and_right() {
        let root = tempfile::tempdir().unwrap();
        let spool = Spool::open(root.path()).unwrap();
        let slot = spool.slot(&commit("a"), Name::Part(3));
        let digest = Sha256::of(b"abcdef");
        assert_eq!((slot.present(), slot.holds(6, &digest)), (Ok(0), Ok(false)));

        let mut partial = slot.resume(6).unwrap();
        assert_eq!(partial.append(b"abc"), Ok(true));
        drop(partial);
        assert_eq!((slot.present(), slot.holds(6, &digest)), (Ok(3), Ok(false)));

        let mut partial = slot.resume(6).unwrap();
        assert_eq!(partial.present(), 3);
        assert_eq!(partial.append(b"defg"), Ok(false));
        assert_eq!(partial.append(b"def"), Ok(true));
        assert!(partial.finish(&digest).unwrap().is_ok());
        assert_eq!((slot.present(), slot.holds(6, &digest)), (Ok(6), Ok(true)));
        assert_eq!(slot.holds(6, &Sha256::of(b"abcdeg")), Ok(false));
        assert_eq!(slot.holds(5, &digest), Ok(false));
    }

    #[test]
    fn a_beginning_longer_than_the_whole_is_thrown_away() {
        let root = tempfile::tempdir().unwrap();
        let slot = Spool::open(root.path())
            .unwrap()
            .slot(&commit("a"), Name::Superblock);
        let mut partial = slot.resume(100).unwrap();
        assert_eq!(partial.append(&[7; 100]), Ok(true));
        drop(partial);
        assert_eq!(slot.resume(100).unwrap().present(), 100);
        assert_eq!(slot.resume(99).unwrap().present(), 0);
        assert_eq!(slot.present(), Ok(0));
    }
}
