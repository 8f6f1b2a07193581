//! One request, one file, or why not.
//!
//! A path is percent-decoded once and must then be one that a publication can name: no `..`, no hidden file, which is what is being
//! written. Symbolic links are not followed. Memory is bounded: large files go out in pieces, as fast as the client takes them.

use std::fs::File;
use std::io::{self, Read as _};
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode, Version};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use jiff::Timestamp as Time;
use offshoot::commit::Sha256;
use offshoot::trust::schema::{TargetPath, time};
use rustix::fs::{Mode, OFlags};
use serde_json::json;
use tokio::io::{AsyncRead as _, AsyncSeekExt as _, ReadBuf};

use super::Log;

/// Read whole, and known by their digest. All metadata but a large channel's is.
const SMALL: u64 = 64 << 10;
/// A piece of a larger file.
const PIECE: usize = 64 << 10;

pub(super) struct Answerer {
    root: Arc<File>,
    pub(super) log: Log,
}

/// A file as it is now.
struct Found {
    length: u64,
    etag: String,
    content: Content,
}

enum Content {
    Nothing,
    Whole(Bytes),
    Pieces { file: tokio::fs::File, left: u64 },
}

/// A response's body, and the line that it leaves in the log when it is gone.
pub(super) struct Sent {
    content: Content,
    line: Line,
}

struct Line {
    log: Log,
    peer: SocketAddr,
    method: Method,
    path: String,
    version: &'static str,
    range: Option<String>,
    status: StatusCode,
    expected: u64,
    bytes: u64,
}

impl Answerer {
    pub(super) fn new(root: File, log: Log) -> Self {
        Self {
            root: Arc::new(root),
            log,
        }
    }

    pub(super) async fn answer(
        &self,
        peer: SocketAddr,
        request: Request<Incoming>,
    ) -> Response<Sent> {
        let mut line = Line {
            log: self.log.clone(),
            peer,
            method: request.method().clone(),
            path: request.uri().path().to_owned(),
            version: match request.version() {
                Version::HTTP_2 => "2",
                Version::HTTP_11 => "1.1",
                _ => "1.0",
            },
            range: text(request.headers(), &header::RANGE).map(str::to_owned),
            status: StatusCode::OK,
            expected: 0,
            bytes: 0,
        };
        let (status, headers, content) = self.respond(&request).await;
        line.status = status;
        line.expected = content.left();
        let content = match *request.method() {
            Method::HEAD => Content::Nothing,
            _ => content,
        };
        let mut response = Response::new(Sent { content, line });
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        response
    }

    async fn respond(&self, request: &Request<Incoming>) -> (StatusCode, HeaderMap, Content) {
        let mut headers = HeaderMap::new();
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            headers.insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
            return (StatusCode::METHOD_NOT_ALLOWED, headers, Content::Nothing);
        }
        let found = match decode(request.uri().path()) {
            Some(path) => self.find(path).await,
            None => Ok(None),
        };
        let mut found = match found {
            Ok(Some(found)) => found,
            Ok(None) => return (StatusCode::NOT_FOUND, headers, Content::Nothing),
            Err(error) => {
                self.log
                    .write(&json!({"path": request.uri().path(), "error": error.to_string()}));
                return (StatusCode::INTERNAL_SERVER_ERROR, headers, Content::Nothing);
            }
        };
        let json = request.uri().path().ends_with(".json");
        let kind = if json {
            "application/json"
        } else {
            "application/octet-stream"
        };
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
        headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        // Every other name is that of one content.
        let fresh = request.uri().path().ends_with("/timestamp.json");
        let cache = if fresh {
            "no-cache"
        } else {
            "max-age=31536000, immutable"
        };
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static(cache));
        put(&mut headers, header::ETAG, &found.etag);
        if text(request.headers(), &header::IF_NONE_MATCH)
            .is_some_and(|tags| names(tags, &found.etag))
        {
            headers.remove(header::CONTENT_TYPE);
            return (StatusCode::NOT_MODIFIED, headers, Content::Nothing);
        }
        let same = text(request.headers(), &header::IF_RANGE).is_none_or(|tag| tag == found.etag);
        let range = text(request.headers(), &header::RANGE).filter(|_| same);
        match range.and_then(|range| parse_range(range, found.length)) {
            None => {
                put(
                    &mut headers,
                    header::CONTENT_LENGTH,
                    &found.length.to_string(),
                );
                (StatusCode::OK, headers, found.content)
            }
            Some(None) => {
                headers.remove(header::CONTENT_TYPE);
                put(
                    &mut headers,
                    header::CONTENT_RANGE,
                    &format!("bytes */{}", found.length),
                );
                (StatusCode::RANGE_NOT_SATISFIABLE, headers, Content::Nothing)
            }
            Some(Some((first, length))) => {
                if let Err(error) = found.content.narrow(first, length).await {
                    self.log
                        .write(&json!({"path": request.uri().path(), "error": error.to_string()}));
                    return (
                        StatusCode::INTERNAL_SERVER_ERROR,
                        HeaderMap::new(),
                        Content::Nothing,
                    );
                }
                let range = format!("bytes {first}-{}/{}", first + length - 1, found.length);
                put(&mut headers, header::CONTENT_RANGE, &range);
                put(&mut headers, header::CONTENT_LENGTH, &length.to_string());
                (StatusCode::PARTIAL_CONTENT, headers, found.content)
            }
        }
    }

    async fn find(&self, path: TargetPath) -> io::Result<Option<Found>> {
        let root = Arc::clone(&self.root);
        let found = tokio::task::spawn_blocking(move || find(&root, &path)).await;
        found.map_err(io::Error::other)?
    }
}

fn find(root: &File, path: &TargetPath) -> io::Result<Option<Found>> {
    let mut file = root.try_clone()?;
    let mut segments = path.as_str().split('/').peekable();
    while let Some(segment) = segments.next() {
        if segment.starts_with('.') {
            return Ok(None);
        }
        let mut flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        if segments.peek().is_some() {
            flags |= OFlags::DIRECTORY;
        }
        file = match rustix::fs::openat(&file, segment, flags, Mode::empty()) {
            Ok(file) => file.into(),
            Err(
                rustix::io::Errno::NOENT
                | rustix::io::Errno::NOTDIR
                | rustix::io::Errno::LOOP
                | rustix::io::Errno::NAMETOOLONG
                | rustix::io::Errno::NXIO,
            ) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
    }
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Ok(None);
    }
    let length = meta.len();
    if length > SMALL {
        let etag = format!(
            "\"{:x}-{:x}-{:x}-{length:x}\"",
            meta.mtime(),
            meta.mtime_nsec(),
            meta.ino()
        );
        let content = Content::Pieces {
            file: file.into(),
            left: length,
        };
        return Ok(Some(Found {
            length,
            etag,
            content,
        }));
    }
    let mut bytes = Vec::new();
    file.take(SMALL).read_to_end(&mut bytes)?;
    Ok(Some(Found {
        length: bytes.len() as u64,
        etag: format!("\"{}\"", Sha256::of(&bytes)),
        content: Content::Whole(bytes.into()),
    }))
}

/// The path that a publication names, if the URL's path can be one.
fn decode(path: &str) -> Option<TargetPath> {
    let mut bytes = path.strip_prefix('/')?.bytes();
    let mut decoded = Vec::new();
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let digits = [bytes.next()?, bytes.next()?];
                let digits = std::str::from_utf8(&digits).ok()?;
                u8::from_str_radix(digits, 16).ok()?
            }
            byte => byte,
        });
    }
    String::from_utf8(decoded).ok()?.parse().ok()
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

fn put(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

/// `If-None-Match` compares weakly: `W/` does not matter.
fn names(tags: &str, etag: &str) -> bool {
    tags.split(',')
        .map(str::trim)
        .any(|tag| tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == etag)
}

/// First byte and length; `Some(None)` if there are none such. `None` for what is not one range of bytes: the whole file is the answer.
fn parse_range(range: &str, length: u64) -> Option<Option<(u64, u64)>> {
    let number = |text: &str| -> Option<u64> {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        // Past 64 bits it is past every file.
        digits.then(|| text.parse().unwrap_or(u64::MAX))
    };
    let (first, last) = range.strip_prefix("bytes=")?.trim().split_once('-')?;
    let (first, last) = match (first, last) {
        ("", suffix) => {
            let suffix = number(suffix)?.min(length);
            (
                length - suffix,
                length.checked_sub(1).filter(|_| suffix > 0),
            )
        }
        (first, "") => (number(first)?, length.checked_sub(1)),
        (first, last) => {
            let (first, last) = (number(first)?, number(last)?);
            if last < first {
                return None;
            }
            (first, length.checked_sub(1).map(|end| end.min(last)))
        }
    };
    Some(
        last.filter(|last| first <= *last)
            .map(|last| (first, last - first + 1)),
    )
}

impl Content {
    fn left(&self) -> u64 {
        match self {
            Self::Nothing => 0,
            Self::Whole(bytes) => bytes.len() as u64,
            Self::Pieces { left, .. } => *left,
        }
    }

    async fn narrow(&mut self, first: u64, length: u64) -> io::Result<()> {
        match self {
            Self::Nothing => {}
            Self::Whole(bytes) => {
                let (Ok(first), Ok(length)) = (usize::try_from(first), usize::try_from(length))
                else {
                    return Err(io::ErrorKind::InvalidInput.into());
                };
                *bytes = bytes.slice(first..first + length);
            }
            Self::Pieces { file, left } => {
                file.seek(io::SeekFrom::Start(first)).await?;
                *left = length;
            }
        }
        Ok(())
    }
}

impl Body for Sent {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let piece = match &mut self.content {
            Content::Nothing => return Poll::Ready(None),
            Content::Whole(bytes) => std::mem::take(bytes),
            Content::Pieces { file, left } => {
                let most = usize::try_from(*left).map_or(PIECE, |left| left.min(PIECE));
                let mut piece = vec![0; most];
                let mut buffer = ReadBuf::new(&mut piece);
                ready!(Pin::new(file).poll_read(context, &mut buffer))?;
                let read = buffer.filled().len();
                if read == 0 && most > 0 {
                    // The client is told by a connection that ends too early.
                    return Poll::Ready(Some(Err(io::ErrorKind::UnexpectedEof.into())));
                }
                *left -= read as u64;
                piece.truncate(read);
                piece.into()
            }
        };
        if piece.is_empty() {
            return Poll::Ready(None);
        }
        self.line.bytes += piece.len() as u64;
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.content.left() == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.content.left())
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let sent = self.method == Method::HEAD || self.bytes == self.expected;
        self.log.write(&json!({
            "time": time::write(Time::now()),
            "peer": self.peer.to_string(),
            "method": self.method.as_str(),
            "path": self.path,
            "range": self.range,
            "status": self.status.as_u16(),
            "bytes": self.bytes,
            "complete": sent,
            "http": self.version,
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_what_there_is_of_it() {
        for (range, want) in [
            ("bytes=0-0", Some(Some((0, 1)))),
            ("bytes=2-5", Some(Some((2, 4)))),
            ("bytes=2-", Some(Some((2, 8)))),
            ("bytes=2-99999999999999999999999", Some(Some((2, 8)))),
            ("bytes=-3", Some(Some((7, 3)))),
            ("bytes=-30", Some(Some((0, 10)))),
            ("bytes=9-9", Some(Some((9, 1)))),
            ("bytes=10-", Some(None)),
            ("bytes=10-11", Some(None)),
            ("bytes=-0", Some(None)),
            ("bytes=5-2", None),
            ("bytes=0-1,3-4", None),
            ("bytes=a-b", None),
            ("bytes=-", None),
            ("lines=0-1", None),
        ] {
            assert_eq!(parse_range(range, 10), want, "{range}");
        }
        assert_eq!(parse_range("bytes=0-", 0), Some(None));
        assert_eq!(parse_range("bytes=-1", 0), Some(None));
    }

    #[test]
    fn a_path_is_one_that_a_publication_can_name() {
        for (path, want) in [
            ("/metadata/timestamp.json", Some("metadata/timestamp.json")),
            ("/a/1.0%2Brc%7E1.commit", Some("a/1.0+rc~1.commit")),
            ("/", None),
            ("", None),
            ("metadata", None),
            ("/../keys/root-1.pem", None),
            ("/metadata/..%2f..%2fkeys/root-1.pem", None),
            ("/metadata/%2e%2e/%2e%2e/keys", None),
            ("//etc/passwd", None),
            ("/a%00b", None),
            ("/a%", None),
            ("/a%zz", None),
            ("/a%ff", None),
        ] {
            assert_eq!(decode(path).map(String::from).as_deref(), want, "{path}");
        }
    }

    #[test]
    fn an_entity_tag_is_found_in_a_list() {
        assert!(names("\"a\", W/\"b\"", "\"b\""));
        assert!(names("*", "\"b\""));
        assert!(!names("\"a\"", "\"b\""));
        assert!(!names("b", "\"b\""));
    }
}
