//! One connection to the server: found, trusted, and speaking the better protocol of those that it offers.

use std::fs;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::time_provider::TimeProvider;
use rustls::{CertificateError, ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, lookup_host};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;

use super::client::{ClientKey, Identity};
use super::proxy::Proxy;
use super::url::Base;
use super::{Fault, Phase, TlsFault, signer};

const HEAD_LIMIT: usize = 32 << 10;
const HEADERS_LIMIT: usize = 64;
/// How much may be on its way over HTTP/2 before it is written to the spool.
const WINDOW: u32 = 1 << 20;

/// What may come beside what was asked for: certificates, what was sent ahead, and for each request a head.
const BESIDE: u64 = 2 * WINDOW as u64;
const BESIDE_EACH: u64 = HEAD_LIMIT as u64;

/// A connection, driven by a task that ends with it.
pub(super) struct Connection {
    pub(super) sender: Sender,
    driver: JoinHandle<()>,
    pub(super) meter: Arc<Meter>,
    /// When it last answered.
    pub(super) used: Instant,
}

pub(super) enum Sender {
    Http1(http1::SendRequest<Empty<Bytes>>),
    Http2(http2::SendRequest<Empty<Bytes>>),
}

impl Sender {
    pub(super) fn is_http2(&self) -> bool {
        match self {
            Self::Http1(_) => false,
            Self::Http2(_) => true,
        }
    }
}

impl Connection {
    /// Looks up the server, connects and shakes hands, all within `limit`; through a proxy where there is one.
    pub(super) async fn to(
        base: &Base,
        tls: &Arc<ClientConfig>,
        proxy: &Proxy,
        limit: Duration,
        received: &Arc<AtomicU64>,
    ) -> Result<Self, Fault> {
        let deadline = Instant::now() + limit;
        let stream: Box<dyn Stream> = match proxy.between(base) {
            Some(hop) => Box::new(hop.tunnel(base, deadline).await?),
            None => Box::new(connect(&base.host, base.port, deadline).await?),
        };
        let meter = Arc::<Meter>::default();
        let stream: Box<dyn Stream> = Box::new(Counted {
            stream,
            received: received.clone(),
            meter: meter.clone(),
        });
        if base.scheme == "http" {
            return Self::over(stream, false, meter).await;
        }
        let tls = within(
            deadline,
            Phase::Handshake,
            TlsConnector::from(tls.clone()).connect(base.name.clone(), stream),
        )
        .await?;
        let http2 = tls.get_ref().1.alpn_protocol() == Some(b"h2");
        Self::over(Box::new(tls), http2, meter).await
    }

    async fn over(stream: Box<dyn Stream>, http2: bool, meter: Arc<Meter>) -> Result<Self, Fault> {
        let io = TokioIo::new(stream);
        let log = |ended: hyper::Result<()>| {
            if let Err(error) = ended {
                tracing::debug!(
                    error = &error as &dyn std::error::Error,
                    "the connection ended"
                );
            }
        };
        if http2 {
            let mut builder = http2::Builder::new(TokioExecutor::new());
            builder
                .initial_stream_window_size(WINDOW)
                .initial_connection_window_size(WINDOW)
                .max_header_list_size(HEAD_LIMIT as u32);
            let (sender, connection) = builder
                .handshake(io)
                .await
                .map_err(|error| meter.broken(&error, 0))?;
            let driver = tokio::spawn(async move { log(connection.await) });
            Ok(Self {
                sender: Sender::Http2(sender),
                driver,
                meter,
                used: Instant::now(),
            })
        } else {
            let mut builder = http1::Builder::new();
            builder.max_headers(HEADERS_LIMIT).max_buf_size(HEAD_LIMIT);
            let (sender, connection) = builder
                .handshake(io)
                .await
                .map_err(|error| meter.broken(&error, 0))?;
            let driver = tokio::spawn(async move { log(connection.await) });
            Ok(Self {
                sender: Sender::Http1(sender),
                driver,
                meter,
                used: Instant::now(),
            })
        }
    }

    pub(super) async fn send(
        &mut self,
        request: Request<Empty<Bytes>>,
    ) -> Result<Response<Incoming>, Fault> {
        self.meter.asked();
        let answer = match &mut self.sender {
            Sender::Http1(sender) => match sender.ready().await {
                Ok(()) => sender.send_request(request).await,
                Err(error) => Err(error),
            },
            Sender::Http2(sender) => match sender.ready().await {
                Ok(()) => sender.send_request(request).await,
                Err(error) => Err(error),
            },
        };
        match answer {
            Ok(answer) => Ok(self.meter.reads(answer)),
            Err(error) => Err(self.meter.broken(&error, 0)),
        }
    }
}

/// A TCP connection to a host that is looked up.
pub(super) async fn connect(host: &str, port: u16, deadline: Instant) -> Result<TcpStream, Fault> {
    let addresses: Vec<_> = within(deadline, Phase::Resolve, lookup_host((host, port)))
        .await?
        .collect();
    let mut outcome = Err(Fault::Unreachable {
        phase: Phase::Resolve,
        kind: io::ErrorKind::NotFound,
    });
    for (tried, address) in addresses.iter().enumerate() {
        // A dead address, as IPv6 often is, may use only its share of the time.
        let now = Instant::now();
        let share = deadline.saturating_duration_since(now) / (addresses.len() - tried) as u32;
        outcome = within(now + share, Phase::Connect, TcpStream::connect(address)).await;
        if outcome.is_ok() {
            break;
        }
    }
    let tcp = outcome?;
    within(deadline, Phase::Connect, async { tcp.set_nodelay(true) }).await?;
    Ok(tcp)
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// Certificates are judged by the system's clock, but never as if it were earlier than the floor.
#[derive(Debug)]
struct FlooredClock {
    floor: UnixTime,
}

impl TimeProvider for FlooredClock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::now().max(self.floor))
    }
}

/// What to offer and whom to trust: only the authorities in `ca`, or those of the system.
pub(super) fn tls(
    ca: Option<&Path>,
    identity: Option<&Identity>,
    floor: jiff::Timestamp,
) -> anyhow::Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    match ca {
        Some(path) => {
            let pem =
                fs::read(path).with_context(|| format!("reading the CA {}", path.display()))?;
            for certificate in CertificateDer::pem_slice_iter(&pem) {
                let certificate =
                    certificate.with_context(|| format!("the CA {} as PEM", path.display()))?;
                roots
                    .add(certificate)
                    .with_context(|| format!("a certificate in the CA {}", path.display()))?;
            }
            if roots.is_empty() {
                bail!(
                    "the CA {} contains no certificate; put one there in PEM",
                    path.display()
                );
            }
        }
        None => {
            let found = rustls_native_certs::load_native_certs();
            let (added, _) = roots.add_parsable_certificates(found.certs);
            if added == 0 {
                let why = found
                    .errors
                    .first()
                    .map_or("none were found".to_owned(), ToString::to_string);
                bail!(
                    "the system has no trusted certificates: {why}; install ca-certificates or configure a CA"
                );
            }
        }
    }
    let floor = FlooredClock {
        floor: UnixTime::since_unix_epoch(Duration::from_secs(
            floor.as_second().try_into().unwrap_or(0),
        )),
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let trusting = ClientConfig::builder_with_details(provider, Arc::new(floor))
        .with_safe_default_protocol_versions()
        .context("choosing TLS versions")?
        .with_root_certificates(roots);
    let mut tls = match identity {
        None => trusting.with_no_client_auth(),
        Some(Identity { chain, key }) => {
            let certificates = CertificateDer::pem_file_iter(chain)
                .and_then(Iterator::collect::<Result<Vec<_>, _>>)
                .with_context(|| format!("reading the client certificate {}", chain.display()))?;
            match key {
                ClientKey::File(key) => {
                    let secret = PrivateKeyDer::from_pem_file(key)
                        .with_context(|| format!("reading the client key {}", key.display()))?;
                    trusting
                        .with_client_auth_cert(certificates, secret)
                        .with_context(|| {
                            format!(
                                "the client key {} and certificate {}",
                                key.display(),
                                chain.display()
                            )
                        })?
                }
                ClientKey::Signer(command) => {
                    let certified = signer::certified(certificates, command.clone())
                        .with_context(|| format!("the client certificate {}", chain.display()))?;
                    trusting.with_client_cert_resolver(Arc::new(certified))
                }
            }
        }
    };
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(tls)
}

/// Waits for a step of the connection, until the deadline.
async fn within<T>(
    deadline: Instant,
    phase: Phase,
    step: impl Future<Output = io::Result<T>>,
) -> Result<T, Fault> {
    match timeout_at(deadline, step).await {
        Err(_) => Err(Fault::Unreachable {
            phase,
            kind: io::ErrorKind::TimedOut,
        }),
        Ok(Ok(done)) => Ok(done),
        Ok(Err(error)) => Err(
            match error
                .get_ref()
                .and_then(|inner| inner.downcast_ref::<rustls::Error>())
            {
                Some(rustls::Error::Other(rustls::OtherError(inner))) => {
                    match inner.downcast_ref::<signer::NotSigned>() {
                        Some(signer::NotSigned { what }) => Fault::NotSigned { what: what.clone() },
                        None => Fault::Tls(TlsFault::Other(inner.to_string())),
                    }
                }
                Some(error) => Fault::Tls(refused(error)),
                None => Fault::Unreachable {
                    phase,
                    kind: error.kind(),
                },
            },
        ),
    }
}

fn refused(error: &rustls::Error) -> TlsFault {
    let rustls::Error::InvalidCertificate(error) = error else {
        return TlsFault::Other(error.to_string());
    };
    match error {
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            TlsFault::NotYetValid
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => TlsFault::Expired,
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            TlsFault::WrongName
        }
        CertificateError::UnknownIssuer | CertificateError::BadSignature => TlsFault::Untrusted,
        // rustls may learn to tell more apart.
        other => TlsFault::Other(format!("{other:?}")),
    }
}

/// How much came over one connection, and for what. A server cannot make the device pay for more than it asked for by much: frames that carry
/// nothing end the connection, also between two requests.
#[derive(Default)]
pub(super) struct Meter {
    came: AtomicU64,
    asked: AtomicU64,
    taken: AtomicU64,
}

impl Meter {
    /// A request was sent.
    pub(super) fn asked(&self) {
        self.asked.fetch_add(1, Ordering::Relaxed);
    }

    /// The body of this answer comes over this connection.
    pub(super) fn reads(self: &Arc<Self>, mut answer: Response<Incoming>) -> Response<Incoming> {
        answer.extensions_mut().insert(self.clone());
        answer
    }

    /// Of the connection that the answer came over.
    pub(super) fn of(answer: &Response<Incoming>) -> Arc<Self> {
        answer
            .extensions()
            .get::<Arc<Self>>()
            .cloned()
            .unwrap_or_default()
    }

    /// So many bytes were of a body.
    pub(super) fn took(&self, bytes: u64) {
        self.taken.fetch_add(bytes, Ordering::Relaxed);
    }

    fn is_flooded(&self) -> bool {
        let [came, asked, taken] =
            [&self.came, &self.asked, &self.taken].map(|count| count.load(Ordering::Relaxed));
        came > BESIDE + asked * BESIDE_EACH + 2 * taken
    }

    /// A connection that failed after it was made: what came was not HTTP, or it ended.
    pub(super) fn broken(&self, error: &hyper::Error, got: u64) -> Fault {
        if self.is_flooded() {
            let bytes = self.came.load(Ordering::Relaxed);
            return Fault::Flooded { bytes };
        }
        if error.is_parse() || error.is_parse_status() || error.is_parse_too_large() {
            return Fault::Malformed {
                what: error.to_string(),
            };
        }
        tracing::debug!(error = error as &dyn std::error::Error, got, "interrupted");
        Fault::Interrupted { got }
    }
}

/// Counts what comes.
struct Counted {
    stream: Box<dyn Stream>,
    received: Arc<AtomicU64>,
    meter: Arc<Meter>,
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.meter.is_flooded() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(context, buffer);
        let read = buffer.filled().len() - before;
        self.received.fetch_add(read as u64, Ordering::Relaxed);
        self.meter.came.fetch_add(read as u64, Ordering::Relaxed);
        polled
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// TLS, a tunnel or plain TCP.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}
