//! A web server on a loopback port that does exactly as told, also what no honest server would, and remembers what it
//! was asked. Speaks TLS with a certificate of its own making, HTTP/1.1 byte by byte, and HTTP/2 through hyper.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{Either, Full};
use hyper::body::Frame;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::pki_types::PrivateKeyDer;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

/// A certificate authority and a server certificate that it signed, also as files.
pub struct Identity {
    pub directory: tempfile::TempDir,
    pub tls: Arc<rustls::ServerConfig>,
}

/// When the server's certificate is valid.
#[derive(Clone, Copy, PartialEq)]
pub enum Validity {
    Now,
    Past,
    Future,
}

/// What the server was asked, and how much of a body it sent.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Request {
    /// Counted from zero.
    pub connection: usize,
    pub http2: bool,
    pub path: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub sent: u64,
}

/// What the server answers.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// State the body's length.
    pub length: bool,
    /// Over HTTP/1.1 these bytes instead of the head.
    pub head: Option<Vec<u8>>,
    pub then: Then,
}

/// What the server does after an answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Then {
    Listen,
    /// Ends the connection in order.
    Close,
    /// Ends it without the word that TLS wants.
    Cut,
    /// Says nothing more and keeps the connection.
    Hold,
    /// Sends the body again and again.
    Repeat,
    /// Sends a byte at a time, this far apart, for ever.
    Drip(Duration),
    /// Throws the request away as if it had never arrived.
    Ignore,
}

pub struct Server {
    pub address: SocketAddr,
    log: Arc<Mutex<Vec<Request>>>,
    stop: watch::Sender<()>,
}

impl Identity {
    /// For `localhost`, valid now, offering these protocols.
    pub fn new(protocols: &[&str]) -> Self {
        Self::with(protocols, Validity::Now)
    }

    pub fn with(protocols: &[&str], validity: Validity) -> Self {
        Self::made(protocols, validity, false)
    }

    /// Whoever comes must show a certificate of the same authority: `client.pem`, with `client-key.pem`.
    pub fn for_known_clients() -> Self {
        Self::made(&["http/1.1"], Validity::Now, true)
    }

    fn made(protocols: &[&str], validity: Validity, known_clients: bool) -> Self {
        let mut ca = CertificateParams::new([]).unwrap();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.distinguished_name
            .push(DnType::CommonName, "test authority");
        let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate().unwrap()).unwrap();
        let mut leaf = CertificateParams::new(["localhost".to_owned()]).unwrap();
        (leaf.not_before, leaf.not_after) = match validity {
            Validity::Now => (leaf.not_before, leaf.not_after),
            Validity::Past => (
                rcgen::date_time_ymd(2001, 1, 1),
                rcgen::date_time_ymd(2002, 1, 1),
            ),
            Validity::Future => (
                rcgen::date_time_ymd(3001, 1, 1),
                rcgen::date_time_ymd(3002, 1, 1),
            ),
        };
        let key = KeyPair::generate().unwrap();
        let leaf = leaf.signed_by(&key, &ca).unwrap();

        let client_key = KeyPair::generate().unwrap();
        let client = CertificateParams::new(["device-1".to_owned()]).unwrap();
        let client = client.signed_by(&client_key, &ca).unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(ca.der().clone()).unwrap();

        let directory = tempfile::tempdir().unwrap();
        for (name, pem) in [
            ("client.pem", client.pem()),
            ("client-key.pem", client_key.serialize_pem()),
            ("ca.pem", ca.pem()),
            ("leaf.pem", leaf.pem()),
            ("key.pem", key.serialize_pem()),
        ] {
            std::fs::write(directory.path().join(name), pem).unwrap();
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .unwrap();
        let tls = if known_clients {
            let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(
                Arc::new(roots),
                provider,
            );
            tls.with_client_cert_verifier(verifier.build().unwrap())
        } else {
            tls.with_no_client_auth()
        };
        let mut tls = tls
            .with_single_cert(
                vec![leaf.into()],
                PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            )
            .unwrap();
        tls.alpn_protocols = protocols
            .iter()
            .map(|name| name.as_bytes().to_vec())
            .collect();
        Self {
            directory,
            tls: Arc::new(tls),
        }
    }

    pub fn ca(&self) -> PathBuf {
        self.directory.path().join("ca.pem")
    }
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }
}

impl Answer {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: body.into(),
            length: true,
            head: None,
            then: Then::Listen,
        }
    }

    pub fn header(mut self, name: &str, value: impl ToString) -> Self {
        self.headers.push((name.to_owned(), value.to_string()));
        self
    }

    pub fn then(self, then: Then) -> Self {
        Self { then, ..self }
    }

    /// Sends only the beginning of the body, though the stated length is of all of it.
    pub fn cut_at(self, bytes: usize) -> Self {
        let length = self.body.len();
        let mut answer = if self.length {
            self.header("content-length", length)
        } else {
            self
        };
        answer.length = false;
        answer.body.truncate(bytes);
        answer
    }

    /// These bytes and then the body, byte by byte.
    pub fn raw(head: &str, body: impl Into<Vec<u8>>) -> Self {
        Self {
            head: Some(head.as_bytes().to_vec()),
            ..Self::new(200, body)
        }
    }

    pub fn unmeasured(self) -> Self {
        Self {
            length: false,
            ..self
        }
    }

    /// What an honest server answers for a file with this content.
    pub fn file(request: &Request, content: &[u8]) -> Self {
        let etag = format!("\"{}\"", offshoot::commit::Sha256::of(content));
        if request.header("if-none-match") == Some(&etag) {
            return Self::new(304, "").header("etag", etag).unmeasured();
        }
        let from = request.header("range").map(|range| {
            range
                .strip_prefix("bytes=")
                .and_then(|range| range.strip_suffix('-'))
                .unwrap()
                .parse::<usize>()
                .unwrap()
        });
        match from {
            None => Self::new(200, content).header("etag", etag),
            Some(from) if from < content.len() => Self::new(206, &content[from..])
                .header("etag", etag)
                .header(
                    "content-range",
                    format!("bytes {from}-{}/{}", content.len() - 1, content.len()),
                ),
            Some(_) => {
                Self::new(416, "").header("content-range", format!("bytes */{}", content.len()))
            }
        }
    }
}

impl Server {
    /// Answers each request as `script` says. Without an identity it speaks plain HTTP.
    pub async fn start(
        identity: Option<&Identity>,
        script: impl Fn(&Request) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let log = Arc::<Mutex<Vec<Request>>>::default();
        let (stop, stopped) = watch::channel(());
        let tls = identity.map(|identity| TlsAcceptor::from(identity.tls.clone()));
        let desk = Desk {
            log: log.clone(),
            script: Arc::new(script),
            stopped,
        };
        tokio::spawn(async move {
            for connection in 0.. {
                let Ok((tcp, _)) = listener.accept().await else {
                    return;
                };
                let (tls, desk) = (tls.clone(), desk.clone());
                // Whatever ends a connection is the client's business and shows there.
                tokio::spawn(async move { desk.connection(connection, tcp, tls).await.ok() });
            }
        });
        Self { address, log, stop }
    }

    pub fn url(&self) -> String {
        format!("https://localhost:{}/base/", self.address.port())
    }

    pub fn requests(&self) -> Vec<Request> {
        self.log.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.send_replace(());
    }
}

/// A body over HTTP/2 that repeats itself for ever.
struct Endless(Bytes);

impl hyper::body::Body for Endless {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(Some(Ok(Frame::data(self.0.clone()))))
    }
}

#[derive(Clone)]
struct Desk {
    log: Arc<Mutex<Vec<Request>>>,
    script: Arc<dyn Fn(&Request) -> Answer + Send + Sync>,
    stopped: watch::Receiver<()>,
}

impl Desk {
    async fn connection(
        self,
        connection: usize,
        tcp: TcpStream,
        tls: Option<TlsAcceptor>,
    ) -> io::Result<()> {
        let Some(tls) = tls else {
            return self.http1(connection, tcp, false).await;
        };
        let stream = tls.accept(tcp).await?;
        if stream.get_ref().1.alpn_protocol() == Some(b"h2") {
            self.http2(connection, stream).await;
            return Ok(());
        }
        self.http1(connection, stream, true).await
    }

    /// Notes the request and looks up its answer.
    fn answer(&self, request: Request) -> (usize, Answer) {
        let answer = (self.script)(&request);
        let mut log = self.log.lock().unwrap();
        log.push(request);
        (log.len() - 1, answer)
    }

    async fn http1(
        mut self,
        connection: usize,
        mut stream: impl AsyncRead + AsyncWrite + Unpin,
        tls: bool,
    ) -> io::Result<()> {
        let mut buffer = Vec::new();
        loop {
            let end = loop {
                if let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                    break end;
                }
                if stream.read_buf(&mut buffer).await? == 0 {
                    return Ok(());
                }
            };
            let head = String::from_utf8(buffer.drain(..end + 4).collect()).unwrap();
            let mut lines = head.trim_end().split("\r\n");
            let path = lines.next().unwrap().split(' ').nth(1).unwrap().to_owned();
            let headers = lines
                .map(|line| line.split_once(": ").unwrap())
                .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
                .collect();
            let (index, answer) = self.answer(Request {
                connection,
                http2: false,
                path,
                headers,
                sent: 0,
            });
            if answer.then == Then::Ignore {
                return Ok(());
            }
            let mut head = format!("HTTP/1.1 {} Scripted\r\n", answer.status);
            for (name, value) in &answer.headers {
                head += &format!("{name}: {value}\r\n");
            }
            if answer.length {
                head += &format!("content-length: {}\r\n", answer.body.len());
            }
            let head = answer.head.unwrap_or(format!("{head}\r\n").into_bytes());
            stream.write_all(&head).await?;
            loop {
                stream.write_all(&answer.body).await?;
                stream.flush().await?;
                self.log.lock().unwrap()[index].sent += answer.body.len() as u64;
                if answer.then != Then::Repeat {
                    break;
                }
            }
            match answer.then {
                Then::Listen | Then::Repeat => {}
                Then::Close => return stream.shutdown().await,
                Then::Cut => {
                    assert!(tls, "only TLS tells a cut from a close");
                    return Ok(());
                }
                Then::Hold | Then::Ignore => {
                    // Until the test is over.
                    let _ = self.stopped.changed().await;
                    return Ok(());
                }
                Then::Drip(pause) => {
                    let mut ticks = tokio::time::interval(pause);
                    loop {
                        ticks.tick().await;
                        stream.write_all(b".").await?;
                        stream.flush().await?;
                    }
                }
            }
        }
    }

    async fn http2(
        self,
        connection: usize,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    ) {
        let service = service_fn(move |request: http::Request<hyper::body::Incoming>| {
            let headers = request.headers().iter();
            let headers = headers
                .map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()))
                .collect();
            let path = request.uri().path().to_owned();
            let (index, answer) = self.answer(Request {
                connection,
                http2: true,
                path,
                headers,
                sent: 0,
            });
            self.log.lock().unwrap()[index].sent = answer.body.len() as u64;
            let mut response = http::Response::builder().status(answer.status);
            for (name, value) in &answer.headers {
                response = response.header(name, value);
            }
            let body = Bytes::from(answer.body);
            let body = match answer.then {
                Then::Repeat => Either::Right(Endless(body)),
                _ => Either::Left(Full::new(body)),
            };
            let response = response.body(body).unwrap();
            std::future::ready(Ok::<_, Infallible>(response))
        });
        let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        let _ = connection
            .serve_connection(TokioIo::new(stream), service)
            .await;
    }
}
