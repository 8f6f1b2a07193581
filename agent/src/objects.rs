//! The index of a release's objects: what a device that has no delta to it fetches one by one.
//!
//! The manifest names the index by digest; the index names every object of the release, as the server has it in an OSTree archive
//! repository, `objects/<two digits>/<the other 62>.<kind>`:
//!
//! | bytes | meaning |
//! |---|---|
//! | `offshoot-objects 1\n` | format |
//! | for each object, in strictly ascending order of kind and checksum: | |
//! | 1 | kind: `c` commit, `f` file (`.filez`), `m` dirmeta, `t` dirtree |
//! | 32 | checksum |
//! | 8 | length of the file on the server, little-endian |
//! | 8 | bytes that it takes in a repository, little-endian (`f` only) |
//! | 32 | sha256 of the file on the server (`f` only; of the others the checksum is that) |
//!
//! So every byte that libostree is given was first matched to a signed digest, without unpacking anything here.

use std::fmt;

use crate::commit::Sha256;

const MAGIC: &[u8] = b"offshoot-objects 1\n";

/// More than half a million files.
pub const INDEX_LIMIT: u64 = 48 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Commit,
    File,
    DirMeta,
    DirTree,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Object {
    pub kind: Kind,
    pub checksum: Sha256,
    /// Of the file on the server.
    pub length: u64,
    /// What it takes in a repository.
    pub usize: u64,
    /// Of the file on the server.
    pub sha256: Sha256,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadIndex {
    #[error(
        "the index of objects is not one of format 1: update the device through an older release first"
    )]
    Format,
    #[error(
        "the index of objects breaks off or is out of order at byte {at}: publish the release again"
    )]
    Malformed { at: usize },
}

impl Kind {
    const ALL: [Self; 4] = [Self::Commit, Self::File, Self::DirMeta, Self::DirTree];

    const fn letter(self) -> u8 {
        match self {
            Self::Commit => b'c',
            Self::File => b'f',
            Self::DirMeta => b'm',
            Self::DirTree => b't',
        }
    }

    /// How its files end on the server.
    pub const fn extension(self) -> &'static str {
        match self {
            Self::Commit => "commit",
            Self::File => "filez",
            Self::DirMeta => "dirmeta",
            Self::DirTree => "dirtree",
        }
    }

    pub fn from_extension(extension: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.extension() == extension)
    }
}

impl Object {
    /// Where it is on the server.
    pub fn path(&self) -> String {
        let checksum = self.checksum.to_string();
        let (folder, name) = checksum.split_at(2);
        format!("objects/{folder}/{name}.{}", self.kind.extension())
    }
}

/// `<checksum>.<kind>`: what it is called beside others of its release.
impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.checksum, self.kind.extension())
    }
}

pub fn parse(bytes: &[u8]) -> Result<Vec<Object>, BadIndex> {
    let mut rest = bytes.strip_prefix(MAGIC).ok_or(BadIndex::Format)?;
    let mut objects: Vec<Object> = Vec::new();
    while !rest.is_empty() {
        let malformed = BadIndex::Malformed {
            at: bytes.len() - rest.len(),
        };
        let object = take(&mut rest).ok_or(malformed.clone())?;
        let key = (object.kind, object.checksum);
        if objects
            .last()
            .is_some_and(|last| (last.kind, last.checksum) >= key)
        {
            return Err(malformed);
        }
        objects.push(object);
    }
    Ok(objects)
}

/// The index of these objects, in whichever order they come.
pub fn write(mut objects: Vec<Object>) -> Vec<u8> {
    objects.sort_by_key(|object| (object.kind, object.checksum));
    objects.dedup_by_key(|object| (object.kind, object.checksum));
    let mut bytes = MAGIC.to_vec();
    for object in objects {
        bytes.push(object.kind.letter());
        bytes.extend(object.checksum.as_bytes());
        bytes.extend(object.length.to_le_bytes());
        if object.kind == Kind::File {
            bytes.extend(object.usize.to_le_bytes());
            bytes.extend(object.sha256.as_bytes());
        }
    }
    bytes
}

fn take(rest: &mut &[u8]) -> Option<Object> {
    let letter = *rest.split_off_first()?;
    let kind = Kind::ALL.into_iter().find(|kind| kind.letter() == letter)?;
    let mut digest = || Some(Sha256::from_bytes(rest.split_off(..32)?.try_into().ok()?));
    let checksum = digest()?;
    let mut number = || Some(u64::from_le_bytes(rest.split_off(..8)?.try_into().ok()?));
    let length = number()?;
    let (usize, sha256) = if kind == Kind::File {
        let usize = number()?;
        (
            usize,
            Sha256::from_bytes(rest.split_off(..32)?.try_into().ok()?),
        )
    } else {
        (length, checksum)
    };
    Some(Object {
        kind,
        checksum,
        length,
        usize,
        sha256,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn object(kind: Kind, n: u8) -> Object {
        let checksum = Sha256::of(&[n]);
        Object {
            kind,
            checksum,
            length: u64::from(n),
            usize: if kind == Kind::File { 1000 } else { n.into() },
            sha256: if kind == Kind::File {
                Sha256::of(b"z")
            } else {
                checksum
            },
        }
    }

    #[test]
    fn an_index_is_read_as_it_was_written_and_each_object_has_its_place() {
        let objects = [
            object(Kind::DirTree, 1),
            object(Kind::File, 2),
            object(Kind::Commit, 3),
            object(Kind::File, 2),
            object(Kind::DirMeta, 4),
        ];
        let bytes = write(objects.to_vec());
        let read = parse(&bytes).unwrap();
        let kinds: Vec<_> = read.iter().map(|object| object.kind).collect();
        assert_eq!(
            kinds,
            [Kind::Commit, Kind::File, Kind::DirMeta, Kind::DirTree]
        );
        assert!(read.contains(&objects[0]) && read.contains(&objects[1]));
        let name = objects[1].checksum.to_string();
        let path = format!("objects/{}/{}.filez", &name[..2], &name[2..]);
        assert_eq!(objects[1].path(), path);
        assert_eq!(Kind::from_extension("dirtree"), Some(Kind::DirTree));
        assert_eq!(Kind::from_extension("file"), None);
    }

    #[test]
    fn an_index_that_is_cut_or_out_of_order_is_refused() {
        let bytes = write(vec![object(Kind::File, 1), object(Kind::DirMeta, 2)]);
        assert_eq!(parse(b"offshoot-objects 2\n"), Err(BadIndex::Format));
        let starts = [MAGIC.len(), MAGIC.len() + 1 + 32 + 8 + 8 + 32, bytes.len()];
        for length in MAGIC.len()..bytes.len() {
            let outcome = parse(&bytes[..length]);
            if starts.contains(&length) {
                assert!(outcome.is_ok());
            } else {
                assert!(matches!(outcome, Err(BadIndex::Malformed { at }) if starts.contains(&at)));
            }
        }
        // Twice the same, and backwards.
        let twice = [&bytes[..], &bytes[starts[1]..]].concat();
        assert_eq!(parse(&twice), Err(BadIndex::Malformed { at: bytes.len() }));
        let unknown = [MAGIC, b"x"].concat();
        assert_eq!(
            parse(&unknown),
            Err(BadIndex::Malformed { at: MAGIC.len() })
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_index_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let bytes = [MAGIC, &bytes].concat();
            if let Ok(objects) = parse(&bytes) {
                prop_assert_eq!(write(objects), bytes);
            }
        }
    }
}
