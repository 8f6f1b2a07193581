//! The GRUB environment: two copies, `env.0` and `env.1`, in a directory of the EFI system partition.
//!
//! | bytes of a copy | meaning |
//! |---|---|
//! | 0–24 | `# GRUB Environment Block\n` |
//! | 25–… | `upgrade_available=0\nbootcount=0\nbootlimit=3\nrollback=0\noffshoot_seq=0\noffshoot_check=0:0:3:0:0\n` |
//! | …–1023 | `#` |
//!
//! Every value is one digit, so a copy never changes its layout and all of it lies in the first 512-byte sector.
//! `offshoot_check` repeats the values: GRUB script cannot compute a CRC, it can compare strings. A copy is valid when the check
//! equals the values and each is in range. `offshoot_seq` counts writes modulo three; of two valid copies the second is newer
//! when its number is the first's plus one, otherwise the first.
//!
//! Every write, GRUB's too, replaces the older copy in place with the next number: one sector, no allocation, no rename. A power cut
//! leaves the former environment (the write did not happen, or left an invalid copy beside the one that was read) or the new one.
//! A file that does not exist is made under another name and renamed. This module does not know what the values are for.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, FlockOperation, fadvise, flock};

use crate::protocol::{Counter, Environment};
use crate::{Error, Verb};

/// The size of a copy, in bytes. GRUB keeps whatever size it finds.
pub const SIZE: usize = 1024;

const SIGNATURE: &[u8] = b"# GRUB Environment Block\n";
const SECTOR: usize = 512;

/// Both copies of a fresh, disarmed environment, for whoever makes an image.
pub fn fresh(bootlimit: u8) -> [Vec<u8>; 2] {
    let counter = Counter {
        upgrade_available: false,
        bootcount: 0,
        bootlimit,
        rollback: false,
    };
    [encode(&counter, 1), encode(&counter, 0)]
}

pub fn encode(counter: &Counter, seq: u8) -> Vec<u8> {
    let Counter {
        upgrade_available,
        bootcount,
        bootlimit,
        rollback,
    } = *counter;
    let (armed, rollback) = (u8::from(upgrade_available), u8::from(rollback));
    let text = format!(
        "upgrade_available={armed}\nbootcount={bootcount}\nbootlimit={bootlimit}\nrollback={rollback}\n\
         offshoot_seq={seq}\noffshoot_check={armed}:{bootcount}:{bootlimit}:{rollback}:{seq}\n"
    );
    let mut block = [SIGNATURE, text.as_bytes()].concat();
    debug_assert!(block.len() <= SECTOR);
    block.resize(SIZE, b'#');
    block
}

/// The values of a copy and its number, if it is valid. Reads as GRUB reads: the last of two lines for one variable counts.
pub fn decode(block: &[u8]) -> Option<(Counter, u8)> {
    let [
        mut armed,
        mut count,
        mut limit,
        mut rollback,
        mut seq,
        mut check,
    ] = [const { None::<Vec<u8>> }; 6];
    for (name, value) in variables(block.strip_prefix(SIGNATURE)?) {
        match name {
            b"upgrade_available" => armed = Some(value),
            b"bootcount" => count = Some(value),
            b"bootlimit" => limit = Some(value),
            b"rollback" => rollback = Some(value),
            b"offshoot_seq" => seq = Some(value),
            b"offshoot_check" => check = Some(value),
            _ => {}
        }
    }
    let (armed, count, limit, rollback, seq) = (armed?, count?, limit?, rollback?, seq?);
    if check?
        != [&armed, &count, &limit, &rollback, &seq]
            .map(Vec::as_slice)
            .join(&b':')
    {
        return None;
    }
    let digit = |value: &[u8], least: u8, most: u8| match value {
        [digit @ b'0'..=b'9'] if (least..=most).contains(&(digit - b'0')) => Some(digit - b'0'),
        _ => None,
    };
    let counter = Counter {
        upgrade_available: digit(&armed, 0, 1)? == 1,
        bootcount: digit(&count, 0, 9)?,
        bootlimit: digit(&limit, 1, 9)?,
        rollback: digit(&rollback, 0, 1)? == 1,
    };
    Some((counter, digit(&seq, 0, 2)?))
}

/// The variables after the signature, in order, as GRUB finds them: `#` starts a line to skip, a backslash takes the next byte as it
/// is, names and values are C strings, and what is cut off ends the list.
fn variables(text: &[u8]) -> Vec<(&[u8], Vec<u8>)> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < text.len() {
        let comment = text[at] == b'#';
        let value_at = if comment {
            at
        } else {
            match text[at..].iter().position(|byte| *byte == b'=') {
                Some(length) => at + length + 1,
                None => break,
            }
        };
        let mut value = Vec::new();
        let mut end = value_at;
        while end < text.len() && text[end] != b'\n' {
            if text[end] == b'\\' {
                end += 1;
            }
            value.extend(text.get(end));
            end += 1;
        }
        if !comment {
            if end >= text.len() {
                break;
            }
            let string = |bytes: &[u8]| {
                bytes
                    .iter()
                    .position(|byte| *byte == 0)
                    .unwrap_or(bytes.len())
            };
            let name = &text[at..value_at - 1];
            value.truncate(string(&value));
            found.push((&name[..string(name)], value));
        }
        at = end + 1;
    }
    found
}

/// The environment of a device, held under lock from [`Held::lock`] to the drop.
pub(crate) struct Held {
    directory: PathBuf,
    _lock: File,
    copies: [Copy; 2],
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Copy {
    Missing,
    Invalid,
    Valid(Counter, u8),
}

impl Held {
    /// Reads both copies, and keeps everybody else of ours out until dropped.
    pub(crate) fn lock(directory: &Path) -> Result<Self, Error> {
        let lock =
            File::open(directory).map_err(|error| Error::io("opening", directory, &error))?;
        flock(&lock, FlockOperation::LockExclusive)
            .map_err(|error| Error::io("locking", directory, &error.into()))?;
        let mut copies = [Copy::Missing, Copy::Missing];
        for (n, copy) in copies.iter_mut().enumerate() {
            let path = directory.join(format!("env.{n}"));
            *copy = match read(&path) {
                Ok(block) => {
                    decode(&block).map_or(Copy::Invalid, |(counter, seq)| Copy::Valid(counter, seq))
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => Copy::Missing,
                Err(error) => return Err(Error::io("reading", &path, &error)),
            };
        }
        Ok(Self {
            directory: directory.to_owned(),
            _lock: lock,
            copies,
        })
    }

    pub(crate) fn environment(&self) -> Environment {
        match (self.newer(), &self.copies) {
            (Some((_, counter, _)), [Copy::Valid(..), Copy::Valid(..)]) => Environment::Valid {
                counter,
                damaged: false,
            },
            (Some((_, counter, _)), _) => Environment::Valid {
                counter,
                damaged: true,
            },
            (None, [Copy::Missing, Copy::Missing]) => Environment::Absent,
            (None, _) => Environment::Corrupt,
        }
    }

    fn newer(&self) -> Option<(usize, Counter, u8)> {
        match &self.copies {
            [Copy::Valid(_, first), Copy::Valid(counter, seq)] if (first + 1) % 3 == *seq => {
                Some((1, *counter, *seq))
            }
            [Copy::Valid(counter, seq), _] => Some((0, *counter, *seq)),
            [_, Copy::Valid(counter, seq)] => Some((1, *counter, *seq)),
            _ => None,
        }
    }

    /// Makes `counter` what is read from now on: one write of the older copy, read back.
    pub(crate) fn write(&mut self, counter: Counter, verb: Verb) -> Result<(), Error> {
        let (older, seq) = self
            .newer()
            .map_or((0, 0), |(newer, _, seq)| (1 - newer, (seq + 1) % 3));
        let path = self.directory.join(format!("env.{older}"));
        let block = encode(&counter, seq);
        let written = match self.in_place(older) {
            true => overwrite(&path, &block),
            false => create(&path, &block),
        };
        written.map_err(|error| Error::io("writing", &path, &error))?;
        let back = read(&path).map_err(|error| Error::io("reading back", &path, &error))?;
        if back != block {
            return Err(Error::NotReadBack { verb, path });
        }
        self.copies[older] = Copy::Valid(counter, seq);
        Ok(())
    }

    /// The file is there at its size. Its blocks are then its own, whatever its content.
    fn in_place(&self, copy: usize) -> bool {
        let path = self.directory.join(format!("env.{copy}"));
        fs::metadata(&path).is_ok_and(|meta| meta.is_file() && meta.len() == SIZE as u64)
    }
}

/// Past the page cache where the kernel lets us: what counts is on the disk.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    fadvise(&file, 0, None, Advice::DontNeed)?;
    let mut block = Vec::new();
    file.take(64 * 1024).read_to_end(&mut block)?;
    Ok(block)
}

fn overwrite(path: &Path, block: &[u8]) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    file.write_all_at(block, 0)?;
    file.sync_all()
}

fn create(path: &Path, block: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = File::create(&temporary)?;
    file.write_all(block)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}
