//! The ways to a server: mirrors, redirects, proxies, client certificates, a cap on the rate, and no network at all.

use std::fs;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use offshoot::commit::{Commit, Sha256};
use offshoot::fetch::{
    self, ClientKey, Directory, Fault, Name, Phase, Reply, Server, ServerConfig, Slot, Source,
    Spool,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};

use crate::server::{Answer, Identity, Request, Server as TestServer, Then};

const LENGTH: usize = 300_000;

fn content() -> Vec<u8> {
    (0..LENGTH as u32).map(|n| (n / 7) as u8).collect()
}

/// Where a fetched file goes.
struct Bench {
    identity: Identity,
    spool: Spool,
    _root: tempfile::TempDir,
}

impl Bench {
    fn new(identity: Identity) -> Self {
        let root = tempfile::tempdir().unwrap();
        Self {
            identity,
            spool: Spool::open(root.path().join("spool")).unwrap(),
            _root: root,
        }
    }

    fn config(&self, server: &TestServer) -> ServerConfig {
        ServerConfig {
            ca: Some(self.identity.ca()),
            stall: Duration::from_secs(2),
            ..ServerConfig::new(server.url())
        }
    }

    fn slot(&self) -> Slot {
        self.spool
            .slot(&Commit(Sha256::of(b"release")), Name::Part(0))
    }

    async fn part(&self, source: &mut Source) -> Result<(), Fault> {
        let (slot, digest) = (self.slot(), Sha256::of(&content()));
        let length = LENGTH as u64;
        let outcome = source
            .part("part", length, &digest, &slot, &mut |_| {})
            .await;
        assert_eq!(slot.holds(length, &digest), Ok(outcome.is_ok()));
        outcome.map_err(|error| error.fault)
    }

    fn forget(&self) {
        self.spool.retain(None).unwrap();
    }
}

fn client(config: ServerConfig) -> Server {
    Server::new(config, "offshoot/0.1.0").unwrap()
}

fn honest(request: &Request) -> Answer {
    Answer::file(request, &content())
}

#[tokio::test]
async fn content_may_be_elsewhere_and_metadata_may_not() {
    let bench = Bench::new(Identity::new(&["http/1.1"]));
    let store = TestServer::start(Some(&bench.identity), honest).await;
    let place = format!(
        "https://localhost:{}/bucket/a?signature=%2B1",
        store.address.port()
    );
    let to = place.clone();
    let server = TestServer::start(Some(&bench.identity), move |_| {
        Answer::new(307, "over there").header("location", &to)
    });
    let server = server.await;
    let mut source = Source::from(client(bench.config(&server)));
    let refused = source.small("file", 1000, None).await.unwrap_err().fault;
    assert_eq!(refused, Fault::Redirected { to: place });
    assert_eq!(store.requests(), []);

    assert_eq!(bench.part(&mut source).await, Ok(()));
    assert_eq!(store.requests()[0].path, "/bucket/a?signature=%2B1");
    // A beginning is continued there, too.
    bench.forget();
    let directory = bench.spool.directory(&Commit(Sha256::of(b"release")));
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join("0.part"), &content()[..1000]).unwrap();
    assert_eq!(bench.part(&mut source).await, Ok(()));
    assert_eq!(store.requests()[1].header("range"), Some("bytes=1000-"));
}

#[tokio::test]
async fn redirects_end_and_never_leave_tls() {
    let bench = Bench::new(Identity::new(&["http/1.1"]));
    let plain = TestServer::start(None, honest).await;
    let away = format!("http://localhost:{}/a", plain.address.port());
    for to in [
        "/base/part".to_owned(),
        away,
        "ftp://localhost/a".to_owned(),
        "https://user:word@localhost/a".to_owned(),
        "//localhost/a".to_owned(),
        String::new(),
    ] {
        let location = to.clone();
        let server = TestServer::start(Some(&bench.identity), move |_| {
            Answer::new(302, "").header("location", &location)
        });
        let server = server.await;
        let mut source = Source::from(client(bench.config(&server)));
        let refused = bench.part(&mut source).await.unwrap_err();
        assert_eq!(refused, Fault::Redirected { to });
        assert!(server.requests().len() <= 6);
    }
    assert_eq!(plain.requests(), []);
}

#[tokio::test]
async fn what_one_mirror_does_not_give_the_next_one_is_asked_for() {
    let bench = Bench::new(Identity::new(&["http/1.1"]));
    let busy = TestServer::start(Some(&bench.identity), |_| Answer::new(503, "")).await;
    let cut = TestServer::start(Some(&bench.identity), |request: &Request| {
        Answer::file(request, &content())
            .cut_at(50_000)
            .then(Then::Cut)
    });
    let cut = cut.await;
    let good = TestServer::start(Some(&bench.identity), |request: &Request| {
        if request.path.ends_with("part") {
            honest(request)
        } else {
            Answer::file(request, b"small")
        }
    });
    let good = good.await;
    let others = vec![client(bench.config(&cut)), client(bench.config(&good))];
    let mut source = Source::mirrors(client(bench.config(&busy)), others);
    assert_eq!(bench.part(&mut source).await, Ok(()));
    // What the second had begun the third has continued.
    let range = good.requests()[0].header("range").map(str::to_owned);
    assert!(range.is_some_and(|range| range != "bytes=0-"));
    assert_eq!(busy.requests().len(), 1);

    // It is asked first from now on, and an entity tag is sent only to the place that gave it.
    let Ok(Reply::Body { etag, .. }) = source.small("file", 1000, None).await else {
        panic!("no file")
    };
    let again = source.small("file", 1000, etag.as_deref()).await;
    assert_eq!(again.unwrap(), Reply::NotModified);
    assert_eq!(busy.requests().len(), 1);
    source.prefer_first();
    let answered = source.small("file", 1000, etag.as_deref()).await;
    assert!(answered.is_ok());
    assert_eq!(busy.requests()[1].header("if-none-match"), None);
}

#[tokio::test]
async fn when_no_mirror_answers_the_first_ones_fault_is_told() {
    let bench = Bench::new(Identity::new(&["http/1.1"]));
    let busy = TestServer::start(Some(&bench.identity), |_| {
        Answer::new(503, "").header("retry-after", 7)
    });
    let (busy, gone) = (
        busy.await,
        TestServer::start(Some(&bench.identity), |_| Answer::new(410, "")).await,
    );
    let mut source = Source::mirrors(
        client(bench.config(&busy)),
        vec![client(bench.config(&gone))],
    );
    let error = bench.part(&mut source).await.unwrap_err();
    let fault = Fault::Status {
        code: 503,
        retry_after: Some(Duration::from_secs(7)),
    };
    assert_eq!(error, fault);
    assert_eq!(gone.requests().len(), 1);
}

/// A proxy that tunnels for those who know the password, and remembers whither.
struct Proxy {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Proxy {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let asked = Arc::<Mutex<Vec<String>>>::default();
        let log = asked.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let log = log.clone();
                tokio::spawn(async move {
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        head.push(stream.read_u8().await.unwrap());
                    }
                    let head = String::from_utf8(head).unwrap().to_lowercase();
                    let place = head.split(' ').nth(1).unwrap().to_owned();
                    log.lock()
                        .unwrap()
                        .push(head.lines().next().unwrap().to_owned());
                    // user:word
                    if !head.contains("proxy-authorization: basic dxnlcjp3b3jk") {
                        let answer = b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n";
                        stream.write_all(answer).await.unwrap();
                        return;
                    }
                    let mut server = TcpStream::connect(place).await.unwrap();
                    stream.write_all(b"HTTP/1.1 200 Yes\r\n\r\n").await.unwrap();
                    let _ = copy_bidirectional(&mut stream, &mut server).await;
                });
            }
        });
        Self { address, asked }
    }
}

#[tokio::test]
async fn a_proxy_tunnels_and_sees_no_more_than_the_servers_name() {
    let bench = Bench::new(Identity::new(&["h2", "http/1.1"]));
    let server = TestServer::start(Some(&bench.identity), honest).await;
    let proxy = Proxy::start().await;
    let through = |url: String, no_proxy: &str| ServerConfig {
        proxy: Some(url),
        no_proxy: no_proxy.to_owned(),
        ..bench.config(&server)
    };
    let url = format!("http://user:word@{}", proxy.address);
    let mut source = Source::from(client(through(url.clone(), "")));
    assert_eq!(bench.part(&mut source).await, Ok(()));
    let asked = format!("connect localhost:{} http/1.1", server.address.port());
    assert_eq!(*proxy.asked.lock().unwrap(), [asked]);
    assert!(server.requests()[0].http2);

    bench.forget();
    let unknown = format!("http://{}", proxy.address);
    let mut source = Source::from(client(through(unknown, "")));
    assert_eq!(
        bench.part(&mut source).await,
        Err(Fault::Proxy { code: 407 })
    );

    // What need not go through it does not.
    let before = proxy.asked.lock().unwrap().len();
    let mut source = Source::from(client(through(url, "example.org,localhost")));
    assert_eq!(bench.part(&mut source).await, Ok(()));
    assert_eq!(proxy.asked.lock().unwrap().len(), before);
    for bad in ["", "proxy:3128:", "socks5://proxy:1080", "https://proxy"] {
        assert!(
            Server::new(through(bad.to_owned(), ""), "offshoot/0.1.0").is_err(),
            "{bad}"
        );
    }
}

#[tokio::test]
async fn a_server_that_knows_its_clients_is_shown_the_certificate() {
    let bench = Bench::new(Identity::for_known_clients());
    let server = TestServer::start(Some(&bench.identity), honest).await;
    let at = |name: &str| bench.identity.directory.path().join(name);
    let known = ServerConfig {
        identity: Some(fetch::Identity {
            chain: at("client.pem"),
            key: ClientKey::File(at("client-key.pem")),
        }),
        ..bench.config(&server)
    };
    let mut source = Source::from(client(known.clone()));
    assert_eq!(bench.part(&mut source).await, Ok(()));
    bench.forget();
    let mut source = Source::from(client(bench.config(&server)));
    assert!(bench.part(&mut source).await.is_err());
    assert_eq!(server.requests().len(), 1);
    // The key of somebody else, and no key: said at the start.
    for key in [at("key.pem"), at("ca.pem"), at("nowhere")] {
        let wrong = ServerConfig {
            identity: Some(fetch::Identity {
                chain: at("client.pem"),
                key: ClientKey::File(key),
            }),
            ..known.clone()
        };
        assert!(Server::new(wrong, "offshoot/0.1.0").is_err());
    }
}

#[tokio::test]
async fn a_cap_on_the_rate_is_kept_and_is_no_stall() {
    let bench = Bench::new(Identity::new(&["h2"]));
    let server = TestServer::start(Some(&bench.identity), honest).await;
    let capped = ServerConfig {
        max_rate: 100_000,
        stall: Duration::from_secs(1),
        low_speed: 200_000,
        ..bench.config(&server)
    };
    let received = capped.received.clone();
    let mut source = Source::from(client(capped));
    let since = Instant::now();
    assert_eq!(bench.part(&mut source).await, Ok(()));
    // All but the last piece was paused for.
    assert!(
        since.elapsed() > Duration::from_secs(2),
        "{:?}",
        since.elapsed()
    );
    let received = received.load(std::sync::atomic::Ordering::Relaxed);
    // Over the wire, with TLS and the frames of HTTP/2.
    let length = LENGTH as u64;
    assert!(
        received > length && received < length + length / 20 + 6000,
        "{received}"
    );
}

#[tokio::test]
async fn a_directory_is_a_server_and_trusted_as_little() {
    let bench = Bench::new(Identity::new(&["http/1.1"]));
    let stick = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| fs::write(stick.path().join(name), bytes).unwrap();
    let mut source = Source::from(Directory::new(stick.path()));
    assert_eq!(source.small("file", 10, None).await, Ok(Reply::NotFound));
    write("file", b"0123456789");
    let small = source.small("file", 10, Some("tag")).await;
    assert!(matches!(small, Ok(Reply::Body { bytes, etag: None }) if bytes == "0123456789"));
    write("file", b"0123456789+");
    let long = source.small("file", 10, None).await.unwrap_err().fault;
    assert_eq!(long, Fault::TooLong { limit: 10 });
    fs::create_dir(stick.path().join("directory")).unwrap();
    let directory = source.small("directory", 10, None).await;
    assert_eq!(directory, Ok(Reply::NotFound));
    let climbing = source.small("../file", 10, None).await.unwrap_err().fault;
    assert!(matches!(climbing, Fault::BadPath { .. }));

    let missing = bench.part(&mut source).await.unwrap_err();
    assert!(matches!(missing, Fault::Status { code: 404, .. }));
    write("part", &content()[1..]);
    let short = bench.part(&mut source).await.unwrap_err();
    let (want, got) = (LENGTH as u64, LENGTH as u64 - 1);
    assert_eq!(short, Fault::WrongLength { want, got });
    write("part", &[&content()[..], b"+"].concat());
    let long = bench.part(&mut source).await.unwrap_err();
    assert_eq!(long, Fault::TooLong { limit: want });
    let mut swapped = content();
    swapped[7] ^= 1;
    write("part", &swapped);
    let wrong = bench.part(&mut source).await.unwrap_err();
    assert!(matches!(wrong, Fault::WrongDigest { .. }));
    // The beginning of what was wrong is in the spool, and does not spoil what is right.
    write("part", &content());
    assert_eq!(bench.part(&mut source).await, Ok(()));
    bench.forget();
    fs::remove_file(stick.path().join("part")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", stick.path().join("part")).unwrap();
    let device = bench.part(&mut source).await.unwrap_err();
    assert!(matches!(device, Fault::Status { code: 404, .. }));
    let reading = Fault::Unreachable {
        phase: Phase::Read,
        kind: std::io::ErrorKind::NotADirectory,
    };
    let through_a_file = source.small("file/x", 10, None).await.unwrap_err().fault;
    assert_eq!(through_a_file, reading);
}
