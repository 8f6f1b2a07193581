//! How a file gets where others read it: whole or not at all.
//!
//! **Across a power cut.** A file is written beside its place as `.<name>.part`, synced, renamed, and its directory synced. A cut leaves
//! the former file or the new one, and perhaps a part file, which the next writer removes. What is written first is on the disk
//! before what is written after it is begun: whoever writes the file that names the others last is never seen half done.
//!
//! Does not lock: see [`crate::directory::Lock`].

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
            #[cfg(test)]
            test: Test::default(),
        }
    }

    /// One that is cut off after so many steps: each file written is four, each removed is one.
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
            let part = directory.join(format!(".{}.part", name.to_string_lossy()));
            self.step()?;
            let mut file = File::create(&part)?;
            let (mut length, mut digest) = (0, sha2::Sha256::new());
            let mut buffer = [0; 1 << 16];
            loop {
                let read = content.read(&mut buffer)?;
                if read == 0 {
                    break;
                }
                file.write_all(&buffer[..read / 2])?;
                if length == 0 {
                    self.step()?;
                }
                file.write_all(&buffer[read / 2..read])?;
                digest.update(&buffer[..read]);
                length += read as u64;
            }
            if let Some(time) = distinct_time(&path)? {
                file.set_modified(time)?;
            }
            // Whatever the umask: a web server under another user is to read it.
            file.set_permissions(Permissions::from_mode(0o644))?;
            file.sync_all()?;
            self.step()?;
            fs::rename(&part, &path)?;
            File::open(directory)?.sync_all()?;
            self.step()?;
            let sha256 = Sha256::from_bytes(digest.finalize().into());
            Ok(Digested { length, sha256 })
        };
        place().with_context(|| format!("writing {}", path.display()))
    }

    pub(crate) fn remove(&self, path: &Path) -> Result<()> {
        let remove = || -> io::Result<()> {
            self.step()?;
            fs::remove_file(path)
        };
        remove().with_context(|| format!("removing {}", path.display()))
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
    let least = seconds(former) + 1;
    Ok((seconds(SystemTime::now()) < least).then(|| UNIX_EPOCH + Duration::from_secs(least)))
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
    fs::set_permissions(directory, Permissions::from_mode(0o755))?;
    let parent = if parent.as_os_str().is_empty() {
        Path::new(".")
    } else {
        parent
    };
    File::open(parent)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

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
