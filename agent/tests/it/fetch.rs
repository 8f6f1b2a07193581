//! The fetcher against servers that are slow, broken, hostile, and real.

use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::LazyLock;
use std::time::Duration;

use offshoot::commit::{Commit, Sha256};
use offshoot::fetch::{
    Fault, FetchError, Name, Phase, Reply, Server, ServerConfig, Slot, Spool, SpoolError, TlsFault,
    Wanted,
};

use crate::server::{Answer, Identity, Request, Server as TestServer, Then, Validity};

/// Short for the test, and long enough for a busy machine.
const STALL: Duration = Duration::from_secs(1);
const LENGTH: usize = 1 << 20;

/// A client of a scripted server, and a spool.
struct Bench {
    server: TestServer,
    client: Server,
    spool: Spool,
    // Outlive the rest.
    _identity: Identity,
    _root: tempfile::TempDir,
}

impl Bench {
    async fn new(script: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        Self::with(Identity::new(&["http/1.1"]), |_| {}, script).await
    }

    async fn with(
        identity: Identity,
        configure: impl FnOnce(&mut ServerConfig),
        script: impl Fn(&Request) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let server = TestServer::start(Some(&identity), script).await;
        let mut config = config(server.url(), &identity);
        configure(&mut config);
        let root = tempfile::tempdir().unwrap();
        let spool = Spool::open(root.path().join("spool")).unwrap();
        Self {
            server,
            client: client(config),
            spool,
            _identity: identity,
            _root: root,
        }
    }

    fn slot(&self) -> Slot {
        self.spool.slot(&release(), Name::Part(0))
    }

    /// Where the beginning of the file is.
    fn beginning(&self) -> PathBuf {
        self.spool.directory(&release()).join("0.part")
    }

    fn plant(&self, beginning: &[u8]) {
        fs::create_dir_all(self.spool.directory(&release())).unwrap();
        fs::write(self.beginning(), beginning).unwrap();
    }

    async fn small(&mut self) -> Result<Reply, Fault> {
        self.client
            .small("file", 1000, None)
            .await
            .map_err(|error| error.fault)
    }

    /// Fetches the file that [`content`] is, and checks that it is there exactly if that is said.
    async fn part(&mut self) -> Result<(), Fault> {
        let (slot, content) = (self.slot(), content());
        let digest = Sha256::of(&content);
        let outcome = self
            .client
            .part("part", LENGTH as u64, &digest, &slot, &mut |_| {})
            .await;
        assert_eq!(slot.holds(LENGTH as u64, &digest), Ok(outcome.is_ok()));
        assert!(!(outcome.is_ok() && self.beginning().exists()));
        outcome.map_err(|error| error.fault)
    }

    /// The `Range` and the bytes sent of each request.
    fn ranges(&self) -> Vec<(Option<String>, u64)> {
        let range = |request: &Request| request.header("range").map(str::to_owned);
        self.server
            .requests()
            .iter()
            .map(|request| (range(request), request.sent))
            .collect()
    }
}

fn config(url: String, identity: &Identity) -> ServerConfig {
    ServerConfig {
        ca: Some(identity.ca()),
        ..ServerConfig::new(url)
    }
}

fn client(config: ServerConfig) -> Server {
    Server::new(config, "offshoot/0.1.0").unwrap()
}

fn release() -> Commit {
    Commit(Sha256::of(b"a release"))
}

/// Bytes that differ at every offset that matters.
fn content() -> Vec<u8> {
    static CONTENT: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let words = 0..LENGTH as u32 / 4;
        words
            .flat_map(|word| word.wrapping_mul(0x9e37_79b9).to_le_bytes())
            .collect()
    });
    CONTENT.clone()
}

fn from(offset: usize) -> Option<String> {
    Some(format!("bytes={offset}-"))
}

fn body(bytes: &'static str) -> Result<Reply, Fault> {
    Ok(Reply::Body {
        bytes: bytes.into(),
        etag: None,
    })
}

#[tokio::test]
async fn a_small_file_is_whole_and_a_second_one_shares_its_connection() {
    let mut bench =
        Bench::new(|request| Answer::new(200, request.path.clone()).header("etag", "\"a\"")).await;
    for path in ["metadata/timestamp.json", "metadata/2.snapshot.json"] {
        let reply = bench.client.small(path, 100, None).await;
        let bytes = format!("/base/{path}").into();
        assert_eq!(
            reply,
            Ok(Reply::Body {
                bytes,
                etag: Some("\"a\"".to_owned())
            })
        );
    }
    let requests = bench.server.requests();
    assert_eq!(
        requests
            .iter()
            .map(|request| request.connection)
            .collect::<Vec<_>>(),
        [0, 0]
    );
    let headers = [
        (
            "host",
            &*format!("localhost:{}", bench.server.address.port()),
        ),
        ("user-agent", "offshoot/0.1.0"),
        ("accept-encoding", "identity"),
    ];
    assert_eq!(
        requests[0].headers,
        headers.map(|(name, value)| (name.to_owned(), value.to_owned()))
    );
}

#[tokio::test]
async fn an_unchanged_file_costs_one_request_and_no_body() {
    let mut bench = Bench::new(|request| Answer::file(request, &content()[..500])).await;
    let first = bench.small().await;
    let Ok(Reply::Body {
        etag: Some(etag), ..
    }) = first
    else {
        panic!("{first:?}")
    };
    assert_eq!(
        bench.client.small("file", 1000, Some(&etag)).await,
        Ok(Reply::NotModified)
    );
    assert_eq!(
        bench.client.small("file", 1000, Some(&etag)).await,
        Ok(Reply::NotModified)
    );
    let sent: Vec<_> = bench
        .server
        .requests()
        .iter()
        .map(|request| (request.connection, request.sent))
        .collect();
    assert_eq!(sent, [(0, 500), (0, 0), (0, 0)]);
}

#[tokio::test]
async fn a_missing_file_is_an_answer_and_keeps_the_connection() {
    for status in [403, 404, 410] {
        let mut bench = Bench::new(move |_| Answer::new(status, "<html>no such file</html>")).await;
        assert_eq!(bench.small().await, Ok(Reply::NotFound));
        assert_eq!(bench.small().await, Ok(Reply::NotFound));
        assert_eq!(bench.server.requests()[1].connection, 0);
        assert_eq!(
            bench.part().await,
            Err(Fault::Status {
                code: status,
                retry_after: None
            })
        );
    }
}

#[tokio::test]
async fn an_endless_error_page_is_not_read() {
    let mut bench = Bench::new(|_| {
        Answer::new(404, [b'x'; 4096])
            .unmeasured()
            .then(Then::Repeat)
    })
    .await;
    assert_eq!(bench.small().await, Ok(Reply::NotFound));
    assert_eq!(bench.small().await, Ok(Reply::NotFound));
    assert_eq!(bench.server.requests()[1].connection, 1);
}

#[tokio::test]
async fn endless_metadata_is_cut_at_the_limit() {
    let mut bench = Bench::new(|_| {
        Answer::new(200, [b'x'; 300])
            .unmeasured()
            .then(Then::Repeat)
    })
    .await;
    assert_eq!(bench.small().await, Err(Fault::TooLong { limit: 1000 }));
}

#[tokio::test]
async fn endless_headers_are_cut() {
    let mut bench = Bench::new(|_| {
        let answer = Answer::new(200, "");
        (0..100).fold(answer, |answer, number| {
            answer.header(&format!("x-{number}"), "y".repeat(900))
        })
    })
    .await;
    assert!(matches!(bench.small().await, Err(Fault::Malformed { .. })));
}

#[tokio::test]
async fn the_limit_itself_is_allowed_and_one_more_is_not() {
    for (length, measured) in [(1000, true), (1000, false), (1001, true), (1001, false)] {
        let mut bench = Bench::new(move |_| {
            let answer = Answer::new(200, vec![b'x'; length]);
            if measured {
                answer
            } else {
                answer.unmeasured().then(Then::Close)
            }
        })
        .await;
        let want = match length {
            1000 => Ok(Reply::Body {
                bytes: vec![b'x'; 1000].into(),
                etag: None,
            }),
            _ => Err(Fault::TooLong { limit: 1000 }),
        };
        assert_eq!(bench.small().await, want, "{length} {measured}");
    }
}

#[tokio::test]
async fn every_wrong_answer_for_a_small_file_has_its_own_error() {
    type Script = fn(&Request) -> Answer;
    let seconds = |seconds| Some(Duration::from_secs(seconds));
    let table: Vec<(Script, Result<Reply, Fault>)> = vec![
        (|_| Answer::new(200, "whole"), body("whole")),
        (
            |_| Answer::new(200, "truncated").cut_at(5).then(Then::Close),
            Err(Fault::Interrupted { got: 5 }),
        ),
        (
            |_| Answer::new(200, "truncated").cut_at(5).then(Then::Cut),
            Err(Fault::Interrupted { got: 5 }),
        ),
        (
            |_| Answer::new(200, "cut").unmeasured().then(Then::Cut),
            Err(Fault::Interrupted { got: 3 }),
        ),
        (
            |_| Answer::new(200, "closed").unmeasured().then(Then::Close),
            body("closed"),
        ),
        (
            |_| Answer::new(200, "").then(Then::Ignore),
            Err(Fault::Interrupted { got: 0 }),
        ),
        (
            |_| Answer::new(200, b"\x1f\x8b").header("content-encoding", "gzip"),
            Err(Fault::Encoded {
                encoding: "gzip".to_owned(),
            }),
        ),
        (
            |_| Answer::new(200, "same").header("content-encoding", "identity"),
            body("same"),
        ),
        (
            |_| Answer::new(302, "").header("location", "http://elsewhere/"),
            Err(Fault::Redirected {
                to: "http://elsewhere/".to_owned(),
            }),
        ),
        (
            |_| Answer::new(308, ""),
            Err(Fault::Redirected { to: String::new() }),
        ),
        (
            |_| Answer::new(304, "").unmeasured(),
            Err(Fault::Status {
                code: 304,
                retry_after: None,
            }),
        ),
        (
            |_| Answer::new(206, "half"),
            Err(Fault::Status {
                code: 206,
                retry_after: None,
            }),
        ),
        (
            |_| Answer::new(500, "oops"),
            Err(Fault::Status {
                code: 500,
                retry_after: None,
            }),
        ),
        (
            |_| Answer::new(429, "").header("retry-after", 120),
            Err(Fault::Status {
                code: 429,
                retry_after: seconds(120),
            }),
        ),
        (
            |_| {
                Answer::new(503, "")
                    .header("date", "Wed, 21 Oct 2015 07:28:00 GMT")
                    .header("retry-after", "Wed, 21 Oct 2015 07:30:00 GMT")
            },
            Err(Fault::Status {
                code: 503,
                retry_after: seconds(120),
            }),
        ),
    ];
    for (row, (script, want)) in table.into_iter().enumerate() {
        let mut bench = Bench::new(script).await;
        assert_eq!(bench.small().await, want, "row {row}");
        assert_eq!(bench.server.requests().len(), 1, "row {row}");
    }
}

#[tokio::test]
async fn an_error_names_the_url_and_when_to_come_back() {
    let mut bench = Bench::new(|_| Answer::new(503, "").header("retry-after", 7)).await;
    let fault = Fault::Status {
        code: 503,
        retry_after: Some(Duration::from_secs(7)),
    };
    let error = FetchError {
        url: format!("{}file", bench.server.url()),
        fault,
    };
    assert_eq!(error.retry_after(), Some(Duration::from_secs(7)));
    assert_eq!(bench.client.small("file", 1, None).await, Err(error));
}

#[tokio::test]
async fn what_does_not_speak_http_is_malformed() {
    let mut bench = Bench::new(|_| Answer::new(200, "").header("a header\0", "x")).await;
    assert!(matches!(bench.small().await, Err(Fault::Malformed { .. })));
}

#[tokio::test]
async fn silence_is_a_stall_before_and_within_an_answer() {
    for body in ["", "abc"] {
        let identity = Identity::new(&["http/1.1"]);
        let mut bench = Bench::with(
            identity,
            |config| config.stall = STALL,
            move |_| {
                Answer::new(200, body)
                    .unmeasured()
                    .header("content-length", 10)
                    .then(Then::Hold)
            },
        )
        .await;
        assert_eq!(bench.small().await, Err(Fault::Stalled { after: STALL }));
    }
}

#[tokio::test]
async fn a_part_that_stalls_is_kept_for_the_next_try() {
    let mut bench = Bench::with(
        Identity::new(&["http/1.1"]),
        |config| config.stall = STALL,
        |request| match request.connection {
            0 => Answer::file(request, &content())
                .cut_at(500_000)
                .then(Then::Hold),
            _ => Answer::file(request, &content()),
        },
    )
    .await;
    assert_eq!(bench.part().await, Err(Fault::Stalled { after: STALL }));
    assert_eq!(bench.part().await, Ok(()));
    assert_eq!(
        bench.ranges(),
        [(None, 500_000), (from(500_000), LENGTH as u64 - 500_000)]
    );
}

#[tokio::test]
async fn bytes_that_drip_are_too_slow() {
    let mut bench = Bench::with(
        Identity::new(&["http/1.1"]),
        |config| (config.stall, config.low_speed) = (STALL, 100_000),
        |_| {
            Answer::new(200, "")
                .unmeasured()
                .then(Then::Drip(Duration::from_millis(5)))
        },
    )
    .await;
    assert_eq!(bench.small().await, Err(Fault::TooSlow { floor: 100_000 }));
}

#[tokio::test]
async fn a_kept_connection_that_the_server_closed_is_replaced_once() {
    let mut bench = Bench::new(|request| match request.path.as_str() {
        "/base/first" => Answer::new(200, "one"),
        _ if request.connection == 0 => Answer::new(200, "").then(Then::Ignore),
        _ => Answer::new(200, "two"),
    })
    .await;
    assert_eq!(
        bench.client.small("first", 9, None).await,
        Ok(body("one").unwrap())
    );
    assert_eq!(bench.small().await, body("two"));
    assert_eq!(
        bench
            .server
            .requests()
            .iter()
            .map(|request| request.connection)
            .collect::<Vec<_>>(),
        [0, 0, 1]
    );
}

#[tokio::test]
async fn a_part_is_fetched_once() {
    let mut bench = Bench::new(|request| Answer::file(request, &content())).await;
    assert_eq!(bench.part().await, Ok(()));
    assert_eq!(bench.part().await, Ok(()));
    assert_eq!(bench.ranges(), [(None, LENGTH as u64)]);
}

#[tokio::test]
async fn no_byte_is_sent_twice_however_often_the_connection_drops() {
    let drops = |request: &Request| {
        let length = 70_000 + request.connection * 10_000;
        let then = if request.connection.is_multiple_of(2) {
            Then::Cut
        } else {
            Then::Close
        };
        let answer = Answer::file(request, &content());
        if answer.body.len() > length {
            answer.cut_at(length).then(then)
        } else {
            answer
        }
    };
    let mut bench = Bench::new(drops).await;
    let mut heard = Vec::new();
    let (slot, digest) = (bench.slot(), Sha256::of(&content()));
    let mut hear = |bytes| heard.push(bytes);
    assert_eq!(
        bench
            .client
            .part("part", LENGTH as u64, &digest, &slot, &mut hear)
            .await,
        Ok(())
    );
    assert_eq!(slot.holds(LENGTH as u64, &digest), Ok(true));
    assert!(heard.is_sorted());
    assert_eq!((heard[0], heard[heard.len() - 1]), (0, LENGTH as u64));

    let ranges = bench.ranges();
    let mut offset = 0;
    for (number, (range, sent)) in ranges.iter().enumerate() {
        assert_eq!(*range, if number == 0 { None } else { from(offset) });
        offset += *sent as usize;
    }
    assert_eq!((offset, ranges.len()), (LENGTH, 10));
}

#[tokio::test]
async fn a_connection_that_brings_too_little_is_the_callers_to_retry() {
    let mut bench = Bench::new(|request| {
        Answer::file(request, &content())
            .cut_at(40_000)
            .then(Then::Cut)
    })
    .await;
    assert_eq!(bench.part().await, Err(Fault::Interrupted { got: 40_000 }));
    assert_eq!(bench.part().await, Err(Fault::Interrupted { got: 40_000 }));
    assert_eq!(bench.ranges(), [(None, 40_000), (from(40_000), 40_000)]);
    assert_eq!(bench.slot().present(), Ok(80_000));
}

#[tokio::test]
async fn a_server_that_ignores_ranges_and_drops_is_not_asked_for_ever() {
    let mut bench =
        Bench::new(|_| Answer::new(200, content()).cut_at(300_000).then(Then::Cut)).await;
    assert_eq!(bench.part().await, Err(Fault::Interrupted { got: 300_000 }));
    assert_eq!(bench.ranges(), [(None, 300_000), (from(300_000), 300_000)]);
}

#[tokio::test]
async fn a_beginning_from_before_a_reboot_is_continued() {
    let mut bench = Bench::new(|request| Answer::file(request, &content())).await;
    bench.plant(&content()[..1_000_000]);
    assert_eq!(bench.part().await, Ok(()));
    assert_eq!(
        bench.ranges(),
        [(from(1_000_000), LENGTH as u64 - 1_000_000)]
    );
}

#[tokio::test]
async fn a_whole_beginning_needs_no_server() {
    let mut bench = Bench::new(|_| Answer::new(500, "")).await;
    bench.plant(&content());
    assert_eq!(bench.part().await, Ok(()));
    assert_eq!(bench.ranges(), []);
}

#[tokio::test]
async fn a_corrupt_beginning_costs_one_fetch_from_zero() {
    for present in [500_000, LENGTH, LENGTH + 1] {
        let mut bench = Bench::new(|request| Answer::file(request, &content())).await;
        let mut corrupt = content();
        corrupt.push(0);
        corrupt[77] ^= 1;
        bench.plant(&corrupt[..present]);
        assert_eq!(bench.part().await, Ok(()));
        let mut want = vec![(None, LENGTH as u64)];
        if present < LENGTH {
            want.insert(0, (from(present), (LENGTH - present) as u64));
        }
        assert_eq!(bench.ranges(), want);
    }
}

#[tokio::test]
async fn a_corrupt_whole_file_is_replaced() {
    let mut bench = Bench::new(|request| Answer::file(request, &content())).await;
    bench.plant(b"");
    fs::write(bench.slot().path(), vec![7; LENGTH]).unwrap();
    assert_eq!(bench.part().await, Ok(()));
}

#[tokio::test]
async fn wrong_bytes_are_refused_at_once_and_leave_nothing_behind() {
    let wrong = vec![7; LENGTH];
    let got = Sha256::of(&wrong);
    let mut bench = Bench::new(move |request| Answer::file(request, &wrong)).await;
    let want = Sha256::of(&content());
    assert_eq!(bench.part().await, Err(Fault::WrongDigest { want, got }));
    assert_eq!(bench.slot().present(), Ok(0));
    // Continued from a good beginning, the fault may be ours: one more fetch, from zero.
    bench.plant(&content()[..100_000]);
    assert_eq!(bench.part().await, Err(Fault::WrongDigest { want, got }));
    assert_eq!(
        bench.ranges()[1..],
        [
            (from(100_000), LENGTH as u64 - 100_000),
            (None, LENGTH as u64)
        ]
    );
}

#[tokio::test]
async fn wrong_bytes_in_pieces_are_fetched_twice_and_no_more() {
    let wrong = vec![7; LENGTH];
    let (want, got) = (Sha256::of(&content()), Sha256::of(&wrong));
    let mut bench = Bench::new(move |request| match request.header("range") {
        None => Answer::file(request, &wrong)
            .cut_at(600_000)
            .then(Then::Cut),
        // Past any sensible number, break the loop so that the test ends.
        Some(_) if request.connection > 9 => Answer::new(500, ""),
        Some(_) => Answer::file(request, &wrong).then(Then::Close),
    })
    .await;
    assert_eq!(bench.part().await, Err(Fault::WrongDigest { want, got }));
    let once = [(None, 600_000), (from(600_000), LENGTH as u64 - 600_000)];
    assert_eq!(bench.ranges(), [once.clone(), once].concat());
}

#[tokio::test]
async fn every_wrong_answer_for_a_part_has_its_own_error() {
    type Script = fn(&Request) -> Answer;
    let want = LENGTH as u64;
    let malformed = |range: &str| Fault::Malformed {
        what: format!("206 to bytes=100000- has Content-Range {range:?}"),
    };
    let table: Vec<(&str, Script, Fault)> = vec![
        (
            "shorter",
            |_| Answer::new(200, "x"),
            Fault::WrongLength { want, got: 1 },
        ),
        (
            "longer",
            |_| Answer::new(200, vec![0; LENGTH + 1]),
            Fault::WrongLength {
                want,
                got: want + 1,
            },
        ),
        (
            "shorter, unmeasured",
            |_| {
                Answer::new(200, &content()[..200_000])
                    .unmeasured()
                    .then(Then::Close)
            },
            Fault::WrongLength { want, got: 200_000 },
        ),
        (
            "endless",
            |_| Answer::new(200, [0; 4096]).unmeasured().then(Then::Repeat),
            Fault::TooLong { limit: want },
        ),
        (
            "a range of another file",
            |_| Answer::new(206, "x").header("content-range", "bytes 100000-1048575/2000000"),
            Fault::WrongLength {
                want,
                got: 2_000_000,
            },
        ),
        (
            "another range",
            |_| Answer::new(206, "x").header("content-range", "bytes 0-1048575/1048576"),
            malformed("bytes 0-1048575/1048576"),
        ),
        (
            "less of the range",
            |_| Answer::new(206, "x").header("content-range", "bytes 100000-1048574/1048576"),
            malformed("bytes 100000-1048574/1048576"),
        ),
        ("no range", |_| Answer::new(206, "x"), malformed("")),
        (
            "more than the range",
            |_| {
                Answer::new(206, vec![0; LENGTH])
                    .unmeasured()
                    .header("content-range", "bytes 100000-1048575/1048576")
                    .then(Then::Close)
            },
            Fault::TooLong { limit: want },
        ),
        (
            "no answer to 416",
            |_| Answer::new(416, ""),
            Fault::Status {
                code: 416,
                retry_after: None,
            },
        ),
        (
            "gzip",
            |_| {
                Answer::new(200, "")
                    .unmeasured()
                    .header("content-encoding", "gzip")
            },
            Fault::Encoded {
                encoding: "gzip".to_owned(),
            },
        ),
        (
            "redirect",
            |_| Answer::new(307, ""),
            Fault::Redirected { to: String::new() },
        ),
        (
            "busy",
            |_| Answer::new(429, "").header("retry-after", 5),
            Fault::Status {
                code: 429,
                retry_after: Some(Duration::from_secs(5)),
            },
        ),
    ];
    for (name, script, fault) in table {
        let mut bench = Bench::new(script).await;
        bench.plant(&content()[..100_000]);
        assert_eq!(bench.part().await, Err(fault), "{name}");
        assert!(bench.slot().present().unwrap() <= want, "{name}");
    }
}

#[tokio::test]
async fn a_server_that_is_wrong_about_ranges_is_asked_for_the_whole_file_next() {
    let mut bench = Bench::new(|request| match request.header("range") {
        Some(_) => Answer::new(206, content()).header("content-range", "bytes 0-1048575/1048576"),
        None => Answer::file(request, &content()),
    })
    .await;
    bench.plant(&content()[..100_000]);
    assert!(matches!(bench.part().await, Err(Fault::Malformed { .. })));
    assert_eq!(bench.part().await, Ok(()));
}

#[tokio::test]
async fn a_server_that_ignores_or_cannot_satisfy_a_range_is_asked_for_the_whole_file() {
    for status in [200, 416] {
        let mut bench = Bench::new(move |request| match request.header("range") {
            Some(_) if status == 416 => Answer::new(416, ""),
            _ => Answer::new(200, content()),
        })
        .await;
        // Of the wrong bytes, to show that they are gone.
        bench.plant(&[7; 100_000]);
        assert_eq!(bench.part().await, Ok(()), "{status}");
        assert_eq!(bench.ranges()[0].0, from(100_000));
        assert_eq!(bench.ranges().len(), if status == 416 { 2 } else { 1 });
    }
}

#[tokio::test]
async fn a_full_disk_is_named() {
    let mut bench = Bench::new(|request| Answer::file(request, &content())).await;
    fs::create_dir_all(bench.spool.directory(&release())).unwrap();
    std::os::unix::fs::symlink("/dev/full", bench.beginning()).unwrap();
    let path = bench.beginning();
    assert_eq!(
        bench.part().await,
        Err(Fault::Spool(SpoolError::NoSpace { path }))
    );
}

#[tokio::test]
async fn a_path_that_climbs_is_never_sent() {
    let mut bench = Bench::new(|_| Answer::new(200, "")).await;
    let error = bench.client.small("../secret", 10, None).await.unwrap_err();
    assert_eq!(
        error.fault,
        Fault::BadPath {
            path: "../secret".to_owned()
        }
    );
    assert_eq!(bench.server.requests(), []);
}

#[tokio::test]
async fn http2_is_used_when_offered_and_does_everything_the_other_does() {
    let script = |request: &Request| match request.path.as_str() {
        "/base/file" => Answer::new(200, "small"),
        "/base/part" => Answer::file(request, &content()),
        "/base/large" => Answer::new(200, content()),
        _ => Answer::new(404, "no"),
    };
    let mut bench = Bench::with(Identity::new(&["h2", "http/1.1"]), |_| {}, script).await;
    bench.plant(&content()[..300_000]);
    assert_eq!(bench.small().await, body("small"));
    assert_eq!(
        bench.client.small("missing", 10, None).await,
        Ok(Reply::NotFound)
    );
    assert_eq!(bench.part().await, Ok(()));
    let requests = bench.server.requests();
    assert!(
        requests
            .iter()
            .all(|request| request.http2 && request.connection == 0),
        "{requests:?}"
    );
    assert_eq!(bench.ranges()[2], (from(300_000), LENGTH as u64 - 300_000));
    let too_long = bench.client.small("large", 10, None).await.unwrap_err();
    assert_eq!(too_long.fault, Fault::TooLong { limit: 10 });
    assert_eq!(bench.small().await, body("small"));
}

#[tokio::test]
async fn certificates_are_refused_for_the_right_reason() {
    let ok = |_: &Request| Answer::new(200, "");
    for (validity, fault) in [
        (Validity::Past, TlsFault::Expired),
        (Validity::Future, TlsFault::NotYetValid),
    ] {
        let mut bench = Bench::with(Identity::with(&["h2"], validity), |_| {}, ok).await;
        assert_eq!(bench.small().await, Err(Fault::Tls(fault)));
    }

    let other = Identity::new(&[]);
    let mut bench = Bench::with(
        Identity::new(&["h2"]),
        |config| config.ca = Some(other.ca()),
        ok,
    )
    .await;
    assert_eq!(bench.small().await, Err(Fault::Tls(TlsFault::Untrusted)));

    let address =
        |config: &mut ServerConfig| config.url = config.url.replace("localhost", "127.0.0.1");
    let mut bench = Bench::with(Identity::new(&["h2"]), address, ok).await;
    assert_eq!(bench.small().await, Err(Fault::Tls(TlsFault::WrongName)));
    assert_eq!(bench.server.requests(), []);
}

#[tokio::test]
async fn a_clock_that_is_behind_is_taken_to_be_at_the_floor() {
    // The certificate is not valid before 3001, and the floor says that it is 3001 already.
    let floor = "3001-06-01T00:00:00Z".parse().unwrap();
    let identity = Identity::with(&["h2"], Validity::Future);
    let mut bench = Bench::with(
        identity,
        |config| config.floor = floor,
        |_| Answer::new(200, "late"),
    )
    .await;
    assert_eq!(bench.small().await, body("late"));
}

#[tokio::test]
async fn a_server_that_is_not_there_is_unreachable_and_named_by_phase() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let identity = Identity::new(&[]);
    let mut config = config(format!("https://127.0.0.1:{port}/"), &identity);
    config.connect = STALL;
    // Accepted by the kernel, answered by nobody.
    let fault = client(config.clone())
        .small("x", 1, None)
        .await
        .unwrap_err()
        .fault;
    assert_eq!(
        fault,
        Fault::Unreachable {
            phase: Phase::Handshake,
            kind: io::ErrorKind::TimedOut
        }
    );
    // Bound, so that nobody else is there, but not listening.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let port = socket.local_addr().unwrap().port();
    config.url = format!("https://127.0.0.1:{port}/");
    let fault = client(config).small("x", 1, None).await.unwrap_err().fault;
    assert_eq!(
        fault,
        Fault::Unreachable {
            phase: Phase::Connect,
            kind: io::ErrorKind::ConnectionRefused
        }
    );
}

#[tokio::test]
async fn plain_http_is_for_a_bench_that_asks_for_it() {
    let server = TestServer::start(None, |_| Answer::new(200, "plain")).await;
    let mut config = ServerConfig::new(format!("http://{}/", server.address));
    config.ca = Some(Identity::new(&[]).ca());
    assert!(Server::new(config.clone(), "offshoot/0.1.0").is_err());
    let identity = Identity::new(&[]);
    config.ca = Some(identity.ca());
    config.insecure_http = true;
    assert_eq!(
        client(config).small("x", 10, None).await.unwrap(),
        body("plain").unwrap()
    );
}

#[test]
fn a_pinned_ca_that_cannot_be_used_is_an_error_at_the_start() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ca.pem");
    for content in [
        None,
        Some(""),
        Some("not a certificate"),
        Some("-----BEGIN CERTIFICATE-----\nAAAA\n"),
    ] {
        if let Some(content) = content {
            fs::write(&path, content).unwrap();
        }
        let config = ServerConfig {
            ca: Some(path.clone()),
            ..ServerConfig::new("https://localhost/")
        };
        assert!(
            Server::new(config, "offshoot/0.1.0").is_err(),
            "{content:?}"
        );
    }
}

/// nginx as Debian ships it, on a socket that it inherits, so that it can be asked before it has started.
struct Nginx {
    child: Child,
    directory: tempfile::TempDir,
    port: u16,
}

impl Nginx {
    fn start(identity: &Identity) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().display();
        let keys = identity.directory.path().display();
        fs::create_dir(directory.path().join("www")).unwrap();
        let conf = format!(
            "daemon off; user root; worker_processes 1; pid {root}/pid; error_log {root}/error;
             events {{}}
             http {{
               log_format asked '$server_protocol $status \"$http_range\" $body_bytes_sent';
               access_log {root}/access asked;
               client_body_temp_path {root}/1; proxy_temp_path {root}/2; fastcgi_temp_path {root}/3;
               uwsgi_temp_path {root}/4; scgi_temp_path {root}/5;
               server {{
                 listen 127.0.0.1:{port} ssl http2;
                 ssl_certificate {keys}/leaf.pem; ssl_certificate_key {keys}/key.pem;
                 root {root}/www;
                 keepalive_requests 40;
               }}
             }}"
        );
        let conf_path = directory.path().join("nginx.conf");
        fs::write(&conf_path, conf).unwrap();
        let mut command = Command::new("nginx");
        command
            .arg("-e")
            .arg(directory.path().join("error"))
            .arg("-p")
            .arg(directory.path())
            .arg("-c")
            .arg(conf_path);
        // nginx takes over listening sockets by number, as when one binary replaces another.
        let inherited = File::from(rustix::io::dup(&listener).unwrap());
        rustix::io::fcntl_setfd(&inherited, rustix::io::FdFlags::empty()).unwrap();
        command.env(
            "NGINX",
            format!("{};", std::os::fd::AsRawFd::as_raw_fd(&inherited)),
        );
        let child = command.spawn().unwrap();
        Self {
            child,
            directory,
            port,
        }
    }

    fn publish(&self, name: &str, content: &[u8]) {
        fs::write(self.directory.path().join("www").join(name), content).unwrap();
    }

    /// Ends it, so that its log is complete, and returns the log.
    fn finish(mut self) -> Vec<String> {
        self.end();
        let log = fs::read_to_string(self.directory.path().join("access")).unwrap();
        log.lines().map(str::to_owned).collect()
    }

    /// In order, because a killed master leaves its worker behind.
    fn end(&mut self) {
        if self.child.try_wait().unwrap().is_none() {
            let process = rustix::process::Pid::from_child(&self.child);
            rustix::process::kill_process(process, rustix::process::Signal::TERM).unwrap();
            self.child.wait().unwrap();
        }
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        self.end();
    }
}

#[tokio::test]
async fn nginx_serves_ranges_and_entity_tags_over_http2() {
    let identity = Identity::new(&[]);
    let nginx = Nginx::start(&identity);
    nginx.publish("timestamp.json", b"{}");
    nginx.publish("part", &content());
    let mut client = client(config(
        format!("https://localhost:{}/", nginx.port),
        &identity,
    ));

    let first = client.small("timestamp.json", 100, None).await;
    let Ok(Reply::Body {
        bytes,
        etag: Some(etag),
    }) = first
    else {
        panic!("{first:?}")
    };
    assert_eq!(bytes, "{}");
    assert_eq!(
        client.small("timestamp.json", 100, Some(&etag)).await,
        Ok(Reply::NotModified)
    );
    assert_eq!(
        client.small("2.root.json", 100, None).await,
        Ok(Reply::NotFound)
    );

    let root = tempfile::tempdir().unwrap();
    let spool = Spool::open(root.path()).unwrap();
    let (slot, digest) = (
        spool.slot(&release(), Name::Part(0)),
        Sha256::of(&content()),
    );
    fs::create_dir(spool.directory(&release())).unwrap();
    fs::write(
        spool.directory(&release()).join("0.part"),
        &content()[..600_000],
    )
    .unwrap();
    assert_eq!(
        client
            .part("part", LENGTH as u64, &digest, &slot, &mut |_| {})
            .await,
        Ok(())
    );
    assert_eq!(slot.holds(LENGTH as u64, &digest), Ok(true));

    drop(client);
    let log = nginx.finish();
    assert_eq!(log[..2], [r#"HTTP/2.0 200 "-" 2"#, r#"HTTP/2.0 304 "-" 0"#]);
    assert!(log[2].starts_with(r#"HTTP/2.0 404 "-""#), "{log:?}");
    assert_eq!(log[3..], [r#"HTTP/2.0 206 "bytes=600000-" 448576"#]);
}

#[tokio::test]
async fn nginx_ends_a_connection_after_some_requests_and_every_file_comes_once() {
    let identity = Identity::new(&[]);
    let nginx = Nginx::start(&identity);
    let root = tempfile::tempdir().unwrap();
    let spool = Spool::open(root.path()).unwrap();
    let files: Vec<Wanted> = (0..150u32)
        .map(|number| {
            let content = vec![number as u8; 1000];
            nginx.publish(&number.to_string(), &content);
            Wanted {
                path: number.to_string(),
                length: 1000,
                sha256: Sha256::of(&content),
                slot: spool.slot(&release(), Name::Part(number)),
            }
        })
        .collect();
    let mut client = client(config(
        format!("https://localhost:{}/", nginx.port),
        &identity,
    ));
    let mut bytes = 0;
    let fetched = client.many(&files, &mut |length| bytes += length).await;
    assert_eq!((fetched, bytes), (Ok(()), 150_000));
    drop(client);
    assert_eq!(nginx.finish().len(), 150);
}
