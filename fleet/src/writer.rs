//! How a file gets where others read it: whole or not at all.
//!
//! **Across a power cut.** A file is written beside its place as `.<name>.part`, synced, renamed, and its directory synced. A cut leaves
//! the former file or the new one, and perhaps a part file, which the next writer removes. What is written first is on the disk
//! before what is written after it is begun: whoever writes the file that names the others last is never seen half done.
//!
//! Of thousands of files each would wait for the disk. Those that are linked ([`Writer::link`]) or put ([`Writer::put`]) are on the disk
//! after [`Writer::settle`], all at once, and what was copied has its name only then. A cut before that leaves some of them, whole, and part files.
//!
//! Does not lock: see [`crate::directory::Lock`].

use std::cell::RefCell;
use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{self, BufReader, Read, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use offshoot::commit::Sha256;
use offshoot::trust::schema::Digested;
use sha2::Digest as _;

/// Files below one directory, which are for everybody to read.
pub(crate) struct Writer {
    base: PathBuf,
    /// What [`Writer::settle`] gives their names.
    put: RefCell<Vec<(PathBuf, PathBuf)>>,
    #[cfg(test)]
    test: Test,
}

/// What a test does to one.
#[cfg(test)]
#[derive(Default)]
struct Test {
    steps: std::cell::Cell<Option<usize>>,
    watch: Option<Box<dyn Fn()>>,
}

impl Writer {
    pub(crate) fn new(base: &Path) -> Self {
        Self {
            base: base.to_owned(),
            put: RefCell::default(),
            #[cfg(test)]
            test: Test::default(),
        }
    }

    /// One that is cut off after so many steps: each file written is four; one that is linked, put, settled or removed is one.
    #[cfg(test)]
    pub(crate) fn cut_after(base: &Path, steps: usize) -> Self {
        let writer = Self::new(base);
        writer.test.steps.set(Some(steps));
        writer
    }

    /// One that is looked at after each step.
    #[cfg(test)]
    pub(crate) fn watched(base: &Path, watch: impl Fn() + 'static) -> Self {
        let mut writer = Self::new(base);
        writer.test.watch = Some(Box::new(watch));
        writer
    }

    #[cfg(test)]
    fn step(&self) -> io::Result<()> {
        if let Some(watch) = &self.test.watch {
            watch();
        }
        match self.test.steps.get() {
            Some(0) => Err(io::Error::other("cut")),
            Some(left) => {
                self.test.steps.set(Some(left - 1));
                Ok(())
            }
            None => Ok(()),
        }
    }

    #[cfg(not(test))]
    #[allow(
        clippy::unused_self,
        clippy::unnecessary_wraps,
        reason = "a test can make it fail"
    )]
    fn step(&self) -> io::Result<()> {
        Ok(())
    }

    pub(crate) fn write(&self, path: &str, bytes: &[u8]) -> Result<()> {
        self.place(path, bytes).map(drop)
    }

    /// Copies a file, and says what was copied.
    pub(crate) fn copy(&self, from: &Path, path: &str) -> Result<Digested> {
        let file = File::open(from).with_context(|| format!("reading {}", from.display()))?;
        self.place(path, BufReader::with_capacity(1 << 16, file))
    }

    fn place(&self, path: &str, mut content: impl Read) -> Result<Digested> {
        let path = self.base.join(path);
        let mut place = || -> io::Result<Digested> {
            let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
                return Err(io::ErrorKind::InvalidInput.into());
            };
            make_directory(directory)?;
            let part = part_of(directory, name);
            self.step()?;
            let mut copy = Copy::to(File::create(&part)?);
            let mut buffer = [0; 1 << 16];
            loop {
                let read = content.read(&mut buffer)?;
                if read == 0 {
                    break;
                }
                let begins = copy.length == 0;
                copy.write_all(&buffer[..read / 2])?;
                if begins {
                    self.step()?;
                }
                copy.write_all(&buffer[read / 2..read])?;
            }
            let file = &copy.file;
            if let Some(time) = distinct_time(&path)? {
                file.set_modified(time)?;
            }
            // Whatever the umask: a web server under another user is to read it.
            set_mode(file, 0o644)?;
            file.sync_all()?;
            self.step()?;
            fs::rename(&part, &path)?;
            File::open(directory)?.sync_all()?;
            self.step()?;
            Ok(copy.digested())
        };
        place().with_context(|| format!("writing {}", path.display()))
    }

    /// A file under another name: the same file if it can be, else a copy. What is there under the name goes.
    pub(crate) fn link(&self, from: &Path, path: &str) -> Result<()> {
        let to = self.base.join(path);
        let link = || -> io::Result<bool> {
            let directory = to.parent().ok_or(io::ErrorKind::InvalidInput)?;
            create_directory(directory)?;
            self.step()?;
            let readable = fs::metadata(from)?.permissions().mode();
            if readable & 0o444 != 0o444 {
                fs::set_permissions(from, Permissions::from_mode(0o644))?;
            }
            match fs::hard_link(from, &to) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    fs::remove_file(&to)?;
                    fs::hard_link(from, &to)?;
                }
                Err(error) if cannot_link(&error) => return Ok(false),
                done => done?,
            }
            Ok(true)
        };
        if !link().with_context(|| format!("linking {}", to.display()))? {
            self.put(from, path)?;
        }
        Ok(())
    }

    /// Copies a file, which has its name after [`Writer::settle`], and says what was copied.
    pub(crate) fn put(&self, from: &Path, path: &str) -> Result<Digested> {
        let file = File::open(from).with_context(|| format!("reading {}", from.display()))?;
        let to = self.base.join(path);
        let put = || -> io::Result<Digested> {
            let (Some(directory), Some(name)) = (to.parent(), to.file_name()) else {
                return Err(io::ErrorKind::InvalidInput.into());
            };
            create_directory(directory)?;
            let part = part_of(directory, name);
            self.step()?;
            let mut copy = Copy::to(File::create(&part)?);
            io::copy(&mut BufReader::with_capacity(1 << 16, file), &mut copy)?;
            set_mode(&copy.file, 0o644)?;
            self.put.borrow_mut().push((part, to.clone()));
            Ok(copy.digested())
        };
        put().with_context(|| format!("writing {}", to.display()))
    }

    /// What was linked and put is on the disk.
    pub(crate) fn settle(&self) -> Result<()> {
        let sync = || -> io::Result<()> {
            self.step()?;
            Ok(rustix::fs::syncfs(File::open(&self.base)?)?)
        };
        let syncing = || format!("syncing {}", self.base.display());
        sync().with_context(syncing)?;
        let put = self.put.take();
        if put.is_empty() {
            return Ok(());
        }
        for (part, to) in put {
            self.step()
                .and_then(|()| fs::rename(&part, &to))
                .with_context(|| format!("writing {}", to.display()))?;
        }
        sync().with_context(syncing)
    }

    /// Gives a directory that is settled its name, which nothing may have.
    pub(crate) fn name(&self, from: &Path, to: &Path) -> Result<()> {
        let place = || -> io::Result<()> {
            self.step()?;
            fs::rename(from, to)?;
            File::open(parent(to))?.sync_all()?;
            self.step()
        };
        place().with_context(|| format!("naming {}", to.display()))
    }

    /// Removes a directory with files in it, one by one.
    pub(crate) fn discard(&self, directory: &Path) -> Result<()> {
        let discard = || -> io::Result<()> {
            self.step()?;
            fs::remove_dir_all(directory)?;
            File::open(parent(directory))?.sync_all()
        };
        discard().with_context(|| format!("removing {}", directory.display()))
    }

    pub(crate) fn remove(&self, path: &Path) -> Result<()> {
        let remove = || -> io::Result<()> {
            self.step()?;
            fs::remove_file(path)
        };
        remove().with_context(|| format!("removing {}", path.display()))
    }

    /// Removes files in a directory below the base, but those whose paths from there are kept, and directories that are empty then.
    pub(crate) fn sweep(&self, directory: &Path, kept: impl Fn(&str) -> bool) -> Result<Swept> {
        let mut swept = Swept::default();
        if directory.exists() {
            self.sweep_into(directory, &kept, &mut swept)?;
        }
        Ok(swept)
    }

    fn sweep_into(
        &self,
        directory: &Path,
        kept: &dyn Fn(&str) -> bool,
        swept: &mut Swept,
    ) -> Result<()> {
        let reading = || format!("reading {}", directory.display());
        let mut entries = Vec::new();
        for entry in fs::read_dir(directory).with_context(reading)? {
            entries.push(entry.with_context(reading)?.path());
        }
        // The superblock of a delta first: without one, what is left of it is not taken for a delta.
        entries.sort_by_key(|path| !path.ends_with("superblock"));
        for path in entries {
            let meta = fs::symlink_metadata(&path).with_context(reading)?;
            let below = path.strip_prefix(&self.base).unwrap_or(&path).to_str();
            if meta.is_dir() {
                self.sweep_into(&path, kept, swept)?;
            } else if !below.is_some_and(kept) {
                self.remove(&path)?;
                swept.files += 1;
                swept.bytes += meta.len();
            }
        }
        let mut left = fs::read_dir(directory).with_context(reading)?;
        if left.next().is_none() {
            fs::remove_dir(directory)
                .with_context(|| format!("removing {}", directory.display()))?;
        }
        Ok(())
    }

    /// Removes what a cut has left half written.
    pub(crate) fn clear_parts(&self) -> Result<()> {
        fn clear(directory: &Path) -> io::Result<()> {
            for entry in fs::read_dir(directory)? {
                let entry = entry?;
                let name = entry.file_name();
                let name = name.to_string_lossy();
                if entry.file_type()?.is_dir() {
                    clear(&entry.path())?;
                } else if name.starts_with('.') && name.ends_with(".part") {
                    fs::remove_file(entry.path())?;
                }
            }
            Ok(())
        }
        clear(&self.base).with_context(|| format!("clearing {}", self.base.display()))
    }
}

/// What was removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Swept {
    pub files: usize,
    pub bytes: u64,
}

impl std::ops::AddAssign for Swept {
    fn add_assign(&mut self, other: Self) {
        self.files += other.files;
        self.bytes += other.bytes;
    }
}

/// A file, and what was written to it.
struct Copy {
    file: File,
    length: u64,
    digest: sha2::Sha256,
}

impl Copy {
    fn to(file: File) -> Self {
        Self {
            file,
            length: 0,
            digest: sha2::Sha256::new(),
        }
    }

    fn digested(self) -> Digested {
        Digested {
            length: self.length,
            sha256: Sha256::from_bytes(self.digest.finalize().into()),
        }
    }
}

impl io::Write for Copy {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.digest.update(&bytes[..written]);
        self.length += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a file is.
pub(crate) fn digest_of(path: &Path) -> Result<(u64, Sha256)> {
    let read = || -> io::Result<(u64, Sha256)> {
        let mut digest = sha2::Sha256::new();
        let length = io::copy(&mut File::open(path)?, &mut digest)?;
        Ok((length, Sha256::from_bytes(digest.finalize().into())))
    };
    read().with_context(|| format!("reading {}", path.display()))
}

fn part_of(directory: &Path, name: &OsStr) -> PathBuf {
    directory.join(format!(".{}.part", name.to_string_lossy()))
}

/// Another disk, or one that has no links, or not so many.
fn cannot_link(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let errno = Errno::from_io_error(error);
    errno.is_some_and(|errno| {
        [
            Errno::XDEV,
            Errno::MLINK,
            Errno::PERM,
            Errno::OPNOTSUPP,
            Errno::NOSYS,
        ]
        .contains(&errno)
    })
}

/// The time that a new file at `path` needs so that web servers tell it from the former one: many make a file's entity tag of its size
/// and its time in whole seconds, and a device that polled between two publications in one second would be told "not modified".
fn distinct_time(path: &Path) -> io::Result<Option<SystemTime>> {
    let former = match fs::metadata(path) {
        Ok(former) => former.modified()?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let seconds = |time: SystemTime| {
        time.duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs())
    };
    // Not left to the file system where the clock has gone on: it may have stamped the file a second ago.
    let least = UNIX_EPOCH + Duration::from_secs(seconds(former) + 1);
    Ok(Some(SystemTime::now().max(least)))
}

/// With all that is missing above it, for everybody to read.
fn create_directory(directory: &Path) -> io::Result<()> {
    if directory.is_dir() {
        return Ok(());
    }
    create_directory(directory.parent().ok_or(io::ErrorKind::NotFound)?)?;
    fs::create_dir(directory)?;
    set_mode(&File::open(directory)?, 0o755)
}

/// A file system without modes, as on a USB stick, has its own; that is in order if everybody may read.
fn set_mode(file: &File, mode: u32) -> io::Result<()> {
    let set = file.set_permissions(Permissions::from_mode(mode));
    match set {
        Err(_) if file.metadata()?.permissions().mode() & 0o444 == 0o444 => Ok(()),
        set => set,
    }
}

/// With all that is missing above it, each of them synced into the one above.
pub(crate) fn make_directory(directory: &Path) -> io::Result<()> {
    if directory.is_dir() {
        return Ok(());
    }
    let Some(parent) = directory.parent() else {
        return Err(io::ErrorKind::NotFound.into());
    };
    if !parent.as_os_str().is_empty() {
        make_directory(parent)?;
    }
    fs::create_dir(directory)?;
    set_mode(&File::open(directory)?, 0o755)?;
    File::open(self::parent(directory))?.sync_all()
}

/// The directory that a path is in.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn what_is_put_has_its_name_when_it_is_settled_and_what_is_linked_is_the_same_file() {
        let temp = tempfile::tempdir().unwrap();
        let base = temp.path().join("public");
        fs::create_dir(&base).unwrap();
        let from = temp.path().join("from");
        fs::write(&from, "content").unwrap();
        fs::set_permissions(&from, Permissions::from_mode(0o600)).unwrap();
        let writer = Writer::new(&base);
        let digested = writer.put(&from, "a/put").unwrap();
        assert_eq!(
            (digested.length, digested.sha256),
            digest_of(&from).unwrap()
        );
        assert!(!base.join("a/put").exists());
        let other = Writer::new(&base);
        other.clear_parts().unwrap();
        assert!(writer.settle().is_err());
        writer.put(&from, "a/put").unwrap();
        writer.settle().unwrap();
        fs::create_dir(base.join("b")).unwrap();
        fs::write(base.join("b/linked"), "other").unwrap();
        writer.link(&from, "b/linked").unwrap();
        writer.settle().unwrap();
        let [from, put, linked] = [&from, &base.join("a/put"), &base.join("b/linked")]
            .map(|path| fs::metadata(path).unwrap());
        assert_eq!(from.ino(), linked.ino());
        assert_ne!(from.ino(), put.ino());
        assert!(
            [put, linked]
                .iter()
                .all(|meta| meta.mode() & 0o777 == 0o644)
        );
    }

    #[test]
    fn a_file_system_with_modes_of_its_own_is_taken_if_everybody_may_read() {
        let modeless = |path: &str| set_mode(&File::open(path).unwrap(), 0o644);
        modeless("/proc/self/status").unwrap();
        modeless("/proc/self/mem").unwrap_err();
    }

    #[test]
    fn a_file_that_is_replaced_has_a_later_second() {
        let temp = tempfile::tempdir().unwrap();
        let writer = Writer::new(temp.path());
        let mut former = 0;
        for content in ["a", "b", "c"] {
            writer.write("file", content.as_bytes()).unwrap();
            let seconds = fs::metadata(temp.path().join("file")).unwrap().mtime();
            assert!(seconds > former);
            former = seconds;
        }
    }
}
