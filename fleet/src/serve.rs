//! `public/` over HTTPS, for a bench or a small site: HTTP/1.1 and HTTP/2, entity tags, one range.
//!
//! The certificate authority is made once and kept in `keys/`: devices are given `serve-ca.pem`. The server's own certificate is made at each
//! start, for the names that are asked for, and its key is never written. Both are valid at any time, for devices whose clock is not set yet.
//!
//! Writes nothing but that authority and the log. Does not lock: what is published while it serves is whole, file by file.

mod answer;

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::TlsAcceptor;

use crate::directory::Fleet;
use crate::keys::write_secret;
use crate::writer::Writer;
use answer::Answerer;

/// How long a client may take to say hello, or to send a request's head.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long transfers may go on after the signal to stop.
const FAREWELL: Duration = Duration::from_secs(10);
/// More wait in the kernel's queue.
const CONNECTIONS: usize = 1024;

/// What the operator asks for.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub listen: SocketAddr,
    pub http: bool,
    /// Names and addresses for the certificate, beside that of `listen` and the machine itself.
    pub names: Vec<String>,
    pub log: Option<PathBuf>,
}

/// Where requests are told, one JSON object a line.
#[derive(Clone)]
pub(crate) struct Log(Arc<Mutex<Box<dyn Write + Send>>>);

impl Log {
    fn open(path: Option<&Path>) -> Result<Self> {
        let to: Box<dyn Write + Send> = match path {
            Some(path) => Box::new(
                File::options()
                    .create(true)
                    .append(true)
                    .open(path)
                    .with_context(|| format!("opening {}", path.display()))?,
            ),
            None => Box::new(io::stderr()),
        };
        Ok(Self(Arc::new(Mutex::new(to))))
    }

    fn write(&self, line: &Value) {
        let mut to = self
            .0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        // In one piece, so that lines do not mix. A log that is full is no reason to stop serving.
        drop(to.write_all(format!("{line}\n").as_bytes()));
    }
}

/// Serves until it is told to stop. `ready` is told where, as soon as it listens.
pub(crate) fn serve(fleet: &Fleet, options: &Options, ready: impl FnOnce(&Value)) -> Result<()> {
    let public = fleet.public();
    let root = File::open(&public).with_context(|| format!("opening {}", public.display()))?;
    let log = Log::open(options.log.as_deref())?;
    let (tls, ca) = if options.http {
        (None, None)
    } else {
        let (config, ca) = tls(&fleet.directory.join("keys"), options)?;
        (Some(TlsAcceptor::from(Arc::new(config))), Some(ca))
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the runtime")?;
    runtime.block_on(async {
        let listener = TcpListener::bind(options.listen).await.with_context(|| {
            format!(
                "listening on {}: choose another address with --listen",
                options.listen
            )
        })?;
        let address = listener
            .local_addr()
            .context("asking for the own address")?;
        let scheme = if options.http { "http" } else { "https" };
        let mut stop = signal(SignalKind::terminate()).context("waiting for signals")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("waiting for signals")?;
        ready(&json!({
            "url": format!("{scheme}://{}/", reachable(address)),
            "listen": address.to_string(),
            "ca": ca,
        }));
        let answerer = Arc::new(Answerer::new(root, log.clone()));
        let graceful = GracefulShutdown::new();
        let room = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let permit = Arc::clone(&room)
                .acquire_owned()
                .await
                .context("counting connections")?;
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = stop.recv() => break,
                _ = interrupt.recv() => break,
            };
            match accepted {
                Ok((stream, peer)) => {
                    let connection = Connection {
                        answerer: Arc::clone(&answerer),
                        watcher: graceful.watcher(),
                        peer,
                        _permit: permit,
                    };
                    tokio::spawn(connection.handle(tls.clone(), stream));
                }
                Err(error) => {
                    log.write(&json!({"error": format!("accepting a connection: {error}")}));
                    // Out of descriptors, most likely: they come back as transfers end.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
        drop(listener);
        tokio::select! {
            () = graceful.shutdown() => {}
            () = tokio::time::sleep(FAREWELL) => {}
        }
        Ok(())
    })
}

struct Connection {
    answerer: Arc<Answerer>,
    watcher: hyper_util::server::graceful::Watcher,
    peer: SocketAddr,
    _permit: OwnedSemaphorePermit,
}

impl Connection {
    async fn handle(self, tls: Option<TlsAcceptor>, stream: TcpStream) {
        let Some(tls) = tls else {
            return self.speak(stream).await;
        };
        let why = match tokio::time::timeout(PATIENCE, tls.accept(stream)).await {
            Ok(Ok(stream)) => return self.speak(stream).await,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no handshake came".to_owned(),
        };
        let peer = self.peer.to_string();
        self.answerer
            .log
            .write(&json!({"peer": peer, "error": format!("TLS: {why}")}));
    }

    async fn speak(self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let Self {
            answerer,
            watcher,
            peer,
            _permit: permit,
        } = self;
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(PATIENCE);
        builder
            .http2()
            .timer(TokioTimer::new())
            .keep_alive_interval(PATIENCE)
            .max_concurrent_streams(64);
        let service = service_fn(move |request| {
            let answerer = Arc::clone(&answerer);
            async move { Ok::<_, std::convert::Infallible>(answerer.answer(peer, request).await) }
        });
        let connection = builder
            .serve_connection(TokioIo::new(stream), service)
            .into_owned();
        // The client left, or broke the protocol: each of its requests has its own line in the log.
        drop(watcher.watch(connection).await);
        drop(permit);
    }
}

/// A listener on all addresses is reached by this machine's own.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::from([127, 0, 0, 1]),
        IpAddr::V6(ip) if ip.is_unspecified() => std::net::Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

fn tls(keys: &Path, options: &Options) -> Result<(rustls::ServerConfig, PathBuf)> {
    let (issuer, ca) = authority(keys)?;
    let mut names = vec![
        "localhost".to_owned(),
        "127.0.0.1".to_owned(),
        "::1".to_owned(),
    ];
    names.push(reachable(options.listen).ip().to_string());
    names.extend(options.names.iter().cloned());
    names.sort();
    names.dedup();
    let mut parameters = CertificateParams::new(names.clone()).with_context(|| {
        format!("making a certificate for {names:?}: a name is a host's or an address")
    })?;
    parameters
        .distinguished_name
        .push(DnType::CommonName, "offshoot-fleet serve");
    parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    parameters.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate().context("making a key")?;
    let certificate = parameters
        .signed_by(&key, &issuer)
        .context("making a certificate")?;
    let key = PrivateKeyDer::try_from(key.serialize_der())
        .map_err(|error| anyhow::anyhow!("making a key: {error}"))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| {
            builder
                .with_no_client_auth()
                .with_single_cert(vec![CertificateDer::from(certificate)], key)
        })
        .context("setting up TLS")?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok((config, ca))
}

/// The authority that devices trust: made at the first start. The key is written before the certificate, which is made of it again if
/// a cut came between.
fn authority(keys: &Path) -> Result<(Issuer<'static, KeyPair>, PathBuf)> {
    let (key_path, path) = (keys.join("serve-ca-key.pem"), keys.join("serve-ca.pem"));
    let key = if key_path.exists() {
        let pem = fs::read_to_string(&key_path)
            .with_context(|| format!("reading {}", key_path.display()))?;
        KeyPair::from_pem(&pem).with_context(|| format!("reading {}", key_path.display()))?
    } else {
        ensure!(
            !path.exists(),
            "{} is there and its key {} is not: put the key back, or remove the certificate and give devices the new one",
            path.display(),
            key_path.display()
        );
        let key = KeyPair::generate().context("making a key")?;
        write_secret(&key_path, key.serialize_pem().as_bytes())?;
        key
    };
    let mut parameters = CertificateParams::default();
    parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    parameters.distinguished_name = rcgen::DistinguishedName::new();
    parameters
        .distinguished_name
        .push(DnType::CommonName, "Offshoot bench CA");
    if !path.exists() {
        let certificate = parameters
            .self_signed(&key)
            .context("making a certificate")?;
        Writer::new(keys).write("serve-ca.pem", certificate.pem().as_bytes())?;
    }
    let path = fs::canonicalize(&path).with_context(|| format!("finding {}", path.display()))?;
    Ok((Issuer::new(parameters, key), path))
}
