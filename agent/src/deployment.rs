//! What `offshoot-deployer` says to the daemon: one JSON object a run. The daemon never links libostree; it reads these.

use serde::{Deserialize, Serialize};

use crate::commit::Commit;

/// `offshoot-deployer status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deployments {
    /// The running deployment's place in `deployments`; none outside of one.
    pub booted: Option<usize>,
    /// In boot order: the first is what the bootloader boots by default.
    pub deployments: Vec<Deployment>,
    /// Free bytes of the file system with the repository, and of `/boot`.
    pub repo_free: u64,
    pub boot_free: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deployment {
    pub commit: Commit,
    pub version: Option<String>,
    /// When the commit was made, in seconds since 1970.
    pub timestamp: u64,
    pub os: String,
    pub pinned: bool,
    pub staged: bool,
}

/// `offshoot-deployer stored`: which of the commits are complete in the repository, and held there by a ref.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    pub complete: Vec<Commit>,
}

/// `offshoot-deployer missing`: which objects of an index are not in the repository.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing {
    /// One hexadecimal digit for four objects of the index, the first in the highest bit; ones are missing.
    pub missing: String,
}

impl Missing {
    pub fn new(missing: &[bool]) -> Self {
        let digit = |four: &[bool]| {
            let bits = (0..4u32).filter(|n| four.get(*n as usize) == Some(&true));
            char::from_digit(bits.map(|n| 8 >> n).sum(), 16).unwrap_or('0')
        };
        Self {
            missing: missing.chunks(4).map(digit).collect(),
        }
    }

    /// Whether each of `count` objects is missing; `None` if it speaks of another number of them.
    pub fn of(&self, count: usize) -> Option<Vec<bool>> {
        if self.missing.len() != count.div_ceil(4) {
            return None;
        }
        let mut all = Vec::with_capacity(count + 3);
        for digit in self.missing.chars() {
            let digit = digit.to_digit(16)?;
            all.extend((0..4).map(|n| digit & (8 >> n) != 0));
        }
        all.truncate(count);
        Some(all)
    }
}

/// What a writing verb did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// False when everything was so already.
    pub changed: bool,
}

/// Why a verb did not do it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    pub kind: FailureKind,
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// Another program holds the sysroot's lock.
    Busy,
    /// A file system has too little room.
    NoSpace,
    /// The delta is not for this commit, or its parts do not check.
    CorruptDelta,
    /// Objects of the commit are missing or do not check.
    IncompleteCommit,
    /// The running deployment is not to be touched.
    Booted,
    /// The sysroot is not set up as an update needs it.
    Unsuited,
    /// libostree's own word.
    Ostree,
}

impl FailureKind {
    /// As in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Busy => "busy",
            Self::NoSpace => "no-space",
            Self::CorruptDelta => "corrupt-delta",
            Self::IncompleteCommit => "incomplete-commit",
            Self::Booted => "booted",
            Self::Unsuited => "unsuited",
            Self::Ostree => "ostree",
        }
    }

    /// The exit code of `offshoot-deployer`.
    pub const fn code(self) -> u8 {
        match self {
            Self::Ostree => 1,
            Self::Busy => 3,
            Self::NoSpace => 4,
            Self::CorruptDelta => 5,
            Self::IncompleteCommit => 6,
            Self::Booted => 7,
            Self::Unsuited => 8,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_read_as_it_was_written() {
        for count in 0..20 {
            let missing: Vec<bool> = (0..count).map(|n| n % 3 == 1 || n == 8).collect();
            let written = Missing::new(&missing);
            assert_eq!(written.of(count), Some(missing));
            assert_eq!(written.of(count + 4), None);
        }
        let odd = Missing {
            missing: "g".to_owned(),
        };
        assert_eq!(odd.of(4), None);
    }
}
