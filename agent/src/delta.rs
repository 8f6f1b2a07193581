//! What the superblock of a static delta says, before libostree reads it.
//!
//! The superblock was matched to its signed digest, so this guards against a mistake, or a malice, of whoever signs: a delta that
//! is not what its manifest says is refused by name, with nothing written outside the spool. It is GVariant data of the type
//! `(a{sv}tayay(a{sv}aya(say)sstayay)aya(uayttay)a(yaytt))`, libostree's `OSTREE_STATIC_DELTA_SUPERBLOCK_FORMAT`:
//!
//! | member | what it is | what is asked of it |
//! |---|---|---|
//! | 0 `a{sv}` | metadata | |
//! | 1 `t` | time | |
//! | 2 `ay` | the commit it starts from, 32 bytes, or none | the manifest's `from` |
//! | 3 `ay` | the commit it leads to | the target |
//! | 4 `(…)` | the commit object | its sha256 is the target |
//! | 5 `ay` | deltas to apply before | none |
//! | 6 `a(uayttay)` | parts: version, sha256, size, unpacked size, objects | the manifest's parts, digest for digest |
//! | 7 `a(yaytt)` | objects to be fetched one by one | none: the deployer is offline |
//!
//! In a serialised GVariant the ends of the members whose size varies stand at the container's end, last member first; each is as wide
//! as the container's size needs. Does not read parts and does not unpack anything.

use crate::commit::{Commit, Sha256};
use crate::trust::schema::Delta;

/// More than half a million objects.
pub const SUPERBLOCK_LIMIT: u64 = 16 << 20;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    #[error(
        "the superblock is not one of a static delta ({what} lies outside of it): publish the release again"
    )]
    Malformed { what: &'static str },
    #[error(
        "the superblock has {length} bytes, and at most {limit} are read: publish smaller deltas"
    )]
    TooLong { length: u64, limit: u64 },
    #[error(
        "the delta starts from {got:?} where the manifest says {want:?}: publish the release again"
    )]
    From {
        want: Option<Commit>,
        got: Option<Commit>,
    },
    #[error("the delta leads to {got:?}, not to {want}: publish the release again")]
    To { want: Commit, got: Option<Commit> },
    #[error("the commit object in the delta is {got}, not {want}: publish the release again")]
    Commit { want: Commit, got: Commit },
    #[error(
        "the delta needs other deltas first: publish the release again with deltas that stand alone"
    )]
    Prerequisites,
    #[error(
        "the delta leaves objects to be fetched one by one: publish it with no fallback objects (min-fallback-size=0)"
    )]
    Fallbacks,
    #[error("the delta has {got} parts where the manifest has {want}: publish the release again")]
    PartCount { want: usize, got: usize },
    #[error(
        "part {part} of the delta is {got:?} where the manifest has {want}: publish the release again"
    )]
    Part {
        part: usize,
        want: Sha256,
        got: Option<Sha256>,
    },
}

/// The superblock is that of `delta`, and what it makes is `target`.
pub fn check(superblock: &[u8], delta: &Delta, target: Commit) -> Result<(), Mismatch> {
    let length = superblock.len() as u64;
    if length > SUPERBLOCK_LIMIT {
        return Err(Mismatch::TooLong {
            length,
            limit: SUPERBLOCK_LIMIT,
        });
    }
    let all = Container::new(superblock, "the superblock");
    let metadata_end = all.end(0)?;
    let from = all.slice(align(metadata_end) + 8, all.end(1)?, "the origin")?;
    let to = all.slice(all.end(1)?, all.end(2)?, "the goal")?;
    let commit = all.slice(align(all.end(2)?), all.end(3)?, "the commit")?;
    let prerequisites = all.slice(all.end(3)?, all.end(4)?, "the prerequisites")?;
    let parts = all.slice(align(all.end(4)?), all.end(5)?, "the parts")?;
    let fallbacks = all.slice(align(all.end(5)?), all.framing(6)?, "the fallbacks")?;

    let got = digest(from).map(Commit);
    if got != delta.from || (got.is_none() && !from.is_empty()) {
        return Err(Mismatch::From {
            want: delta.from,
            got,
        });
    }
    let got = digest(to).map(Commit);
    if got != Some(target) {
        return Err(Mismatch::To { want: target, got });
    }
    let got = Commit(Sha256::of(commit));
    if got != target {
        return Err(Mismatch::Commit { want: target, got });
    }
    if !prerequisites.is_empty() {
        return Err(Mismatch::Prerequisites);
    }
    if !fallbacks.is_empty() {
        return Err(Mismatch::Fallbacks);
    }
    let digests = part_digests(parts)?;
    if digests.len() != delta.parts.len() {
        return Err(Mismatch::PartCount {
            want: delta.parts.len(),
            got: digests.len(),
        });
    }
    for (part, (got, file)) in digests.into_iter().zip(&delta.parts).enumerate() {
        if got != Some(file.sha256) {
            return Err(Mismatch::Part {
                part,
                want: file.sha256,
                got,
            });
        }
    }
    Ok(())
}

/// How many objects the delta makes, as far as it says so: 33 bytes stand for each, behind the head of its part.
pub fn objects(superblock: &[u8]) -> u64 {
    let all = Container::new(superblock, "the superblock");
    let parts = (|| all.slice(align(all.end(4)?), all.end(5)?, "the parts"))();
    parts.map_or(0, |parts| parts.len() as u64 / 33)
}

/// The sha256 in each member of an `a(uayttay)`.
fn part_digests(bytes: &[u8]) -> Result<Vec<Option<Sha256>>, Mismatch> {
    if bytes.is_empty() {
        return Ok(Vec::new());
    }
    // An array's last end is the end of its last member, and so where the ends begin.
    let array = Container::new(bytes, "the parts");
    let table = array.end(0)?;
    let count = array.count(table)?;
    let mut digests = Vec::new();
    let mut start = 0;
    for member in 0..count {
        let end = array.end(count - 1 - member)?;
        let part = array.slice(align(start), end, "a part")?;
        let tuple = Container::new(part, "a part");
        digests.push(digest(tuple.slice(4, tuple.end(0)?, "a part's sha256")?));
        start = end;
    }
    Ok(digests)
}

fn digest(bytes: &[u8]) -> Option<Sha256> {
    bytes.try_into().map(Sha256::from_bytes).ok()
}

/// The next multiple of eight.
fn align(at: usize) -> usize {
    at.saturating_add(7) & !7
}

/// A serialised container with its table of ends.
struct Container<'a> {
    bytes: &'a [u8],
    what: &'static str,
    /// Bytes of one end.
    width: usize,
}

impl<'a> Container<'a> {
    fn new(bytes: &'a [u8], what: &'static str) -> Self {
        let width = match bytes.len() {
            0..=0xff => 1,
            0x100..=0xffff => 2,
            0x1_0000..=0xffff_ffff => 4,
            _ => 8,
        };
        Self { bytes, what, width }
    }

    /// The n-th end, counted from the container's end.
    fn end(&self, n: usize) -> Result<usize, Mismatch> {
        let at = self.framing(n + 1)?;
        let mut wide = [0; 8];
        wide[..self.width].copy_from_slice(&self.bytes[at..at + self.width]);
        let end = usize::try_from(u64::from_le_bytes(wide));
        end.ok()
            .filter(|end| *end <= self.bytes.len())
            .ok_or(Mismatch::Malformed { what: self.what })
    }

    /// Where a table of `count` ends begins.
    fn framing(&self, count: usize) -> Result<usize, Mismatch> {
        self.bytes
            .len()
            .checked_sub(count * self.width)
            .ok_or(Mismatch::Malformed { what: self.what })
    }

    /// How many ends there are, if their table begins at `table`.
    fn count(&self, table: usize) -> Result<usize, Mismatch> {
        let size = self.bytes.len() - table;
        if size == 0 || !size.is_multiple_of(self.width) {
            return Err(Mismatch::Malformed { what: self.what });
        }
        Ok(size / self.width)
    }

    fn slice(&self, start: usize, end: usize, what: &'static str) -> Result<&'a [u8], Mismatch> {
        self.bytes
            .get(start..end)
            .ok_or(Mismatch::Malformed { what })
    }
}
