//! A directory in a server's place: a USB stick, a mounted share, a bundle that `offshoot-fleet bundle` has written. It holds what a server serves, and
//! is trusted as little.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use super::client::{Reply, blocking};
use super::many::Wanted;
use super::spool::Slot;
use super::url::check_path;
use super::{Fault, FetchError};
use crate::commit::Sha256;

const CHUNK: usize = 64 << 10;

#[derive(Clone, Debug)]
pub struct Directory {
    path: PathBuf,
}

impl Directory {
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// A small file, whole, or an error if it is longer than `limit`.
    pub(super) async fn small(&self, path: &str, limit: u64) -> Result<Reply, FetchError> {
        let file = self.path.join(path);
        let checked = check_path(path);
        let read = blocking(move || {
            checked?;
            let mut bytes = Vec::new();
            let read = open(&file).and_then(|file| file.take(limit + 1).read_to_end(&mut bytes));
            match read {
                Ok(_) if bytes.len() as u64 > limit => Err(Fault::TooLong { limit }),
                Ok(_) => Ok(Reply::Body {
                    bytes: bytes.into(),
                    etag: None,
                }),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Reply::NotFound),
                Err(error) => Err(unreadable(&error)),
            }
        });
        read.await.map_err(|fault| self.blame(path, fault))
    }

    /// A file of known length and sha256 into the spool, on from where it ended.
    pub(super) async fn part(
        &self,
        path: &str,
        length: u64,
        sha256: &Sha256,
        slot: &Slot,
        progress: &mut (dyn FnMut(u64) + Send),
    ) -> Result<(), FetchError> {
        let file = self.path.join(path);
        let (checked, slot, sha256) = (check_path(path), slot.clone(), *sha256);
        let copied = blocking(move || {
            checked?;
            if slot.holds(length, &sha256)? {
                return Ok(());
            }
            // Twice: what was in the spool may be the beginning of another file.
            for _ in 0..2 {
                let mut partial = slot.resume(length)?;
                let began = partial.present();
                let mut source = open(&file).map_err(|error| match error.kind() {
                    io::ErrorKind::NotFound => Fault::Status {
                        code: 404,
                        retry_after: None,
                    },
                    _ => unreadable(&error),
                })?;
                source
                    .seek(SeekFrom::Start(began))
                    .map_err(|error| unreadable(&error))?;
                let mut buffer = vec![0; CHUNK];
                loop {
                    match source
                        .read(&mut buffer)
                        .map_err(|error| unreadable(&error))?
                    {
                        0 => break,
                        read if partial.append(&buffer[..read])? => {}
                        _ => return Err(Fault::TooLong { limit: length }),
                    }
                    if partial.wants_checkpoint() {
                        partial = partial.checkpoint()?;
                    }
                }
                if partial.present() < length {
                    return Err(Fault::WrongLength {
                        want: length,
                        got: partial.present(),
                    });
                }
                let Err(mismatch) = partial.finish(&sha256)? else {
                    return Ok(());
                };
                let got = mismatch.got;
                let mut partial = mismatch.partial;
                partial.restart()?;
                if began == 0 {
                    return Err(Fault::WrongDigest { want: sha256, got });
                }
            }
            Err(Fault::Interrupted { got: 0 })
        });
        copied.await.map_err(|fault| self.blame(path, fault))?;
        progress(length);
        Ok(())
    }

    pub(super) async fn many(
        &self,
        files: &[Wanted],
        done: &mut (dyn FnMut(u64) + Send),
    ) -> Result<(), FetchError> {
        for file in files {
            let Wanted {
                path,
                length,
                sha256,
                slot,
            } = file;
            self.part(path, *length, sha256, slot, &mut |_| {}).await?;
            done(*length);
        }
        Ok(())
    }

    fn blame(&self, path: &str, fault: Fault) -> FetchError {
        FetchError {
            url: self.path.join(path).display().to_string(),
            fault,
        }
    }
}

/// A plain file, and nothing that a stick's file system may pretend to have in its place.
fn open(path: &Path) -> io::Result<File> {
    let file = File::open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::ErrorKind::NotFound.into())
    }
}

fn unreadable(error: &io::Error) -> Fault {
    Fault::Unreachable {
        phase: super::Phase::Read,
        kind: error.kind(),
    }
}
