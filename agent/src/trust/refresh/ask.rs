//! What a refresh asks for, and the answers; and how what it asks for is spelled.

use crate::trust::Refusal;

/// What a refresh needs next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Want {
    /// `metadata/timestamp.json`. `conditional`: the device holds one, so the transport may send the `ETag` of the last refresh
    /// that was *finished*; else it must not.
    Poll {
        path: &'static str,
        limit: u64,
        conditional: bool,
    },
    /// A file, and to stop reading after `limit` bytes.
    File {
        path: String,
        limit: u64,
        missing_is_ok: bool,
    },
    /// [`keep`](super::Refresh::keep), which gives the reply.
    Keep,
    /// [`finish`](super::Refresh::finish).
    Done,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    Body(Vec<u8>),
    NotModified,
    NotFound,
    Kept,
}

#[derive(Clone, Debug)]
pub(super) struct Ask {
    pub(super) path: String,
    pub(super) limit: u64,
}

impl Ask {
    pub(super) fn want(&self, missing_is_ok: bool) -> Want {
        Want::File {
            path: self.path.clone(),
            limit: self.limit,
            missing_is_ok,
        }
    }

    pub(super) fn body(self, reply: Reply) -> Result<Vec<u8>, Refusal> {
        match reply {
            Reply::Body(body) if body.len() as u64 > self.limit => Err(Refusal::TooLong {
                role: self.path,
                limit: self.limit,
            }),
            Reply::Body(body) => Ok(body),
            Reply::NotFound => Err(Refusal::Missing { path: self.path }),
            reply @ (Reply::NotModified | Reply::Kept) => Err(reply.out_of_turn(&self.path)),
        }
    }
}

impl Reply {
    pub(super) fn out_of_turn(&self, want: &str) -> Refusal {
        let reply = match self {
            Self::Body(_) => "a body",
            Self::NotModified => "not modified",
            Self::NotFound => "not found",
            Self::Kept => "kept",
        };
        Refusal::OutOfTurn {
            want: want.to_owned(),
            reply,
        }
    }
}

/// A name as one segment of a URL, and of a file's path: the role `../a` is the file `..%2Fa.json`.
pub(in crate::trust) fn quoted(name: &str) -> String {
    let mut text = String::new();
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                text.push(char::from(byte));
            }
            _ => text.push_str(&format!("%{byte:02X}")),
        }
    }
    text
}
