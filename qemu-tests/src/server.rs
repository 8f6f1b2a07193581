//! A web server that devices ask: `offshoot-fleet serve`, or nginx as Debian ships it.
//!
//! Owns one process on a port of 127.0.0.1, which machines see as 10.0.2.2, and its log. Both go when the [`Server`] is dropped.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde::Deserialize;
use tempfile::TempDir;

use crate::host;

/// How a machine in QEMU's user network reaches the host's loopback.
const HOST: &str = "10.0.2.2";

pub struct Server {
    /// As a device spells it.
    pub url: String,
    /// The certificate authority, PEM.
    pub ca: String,
    process: Child,
    directory: TempDir,
}

/// One request in the log.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Request {
    /// The protocol's version: `HTTP/2.0`.
    pub http: String,
    pub path: String,
    pub status: u16,
    /// Of the answer's body.
    pub bytes: u64,
    /// The `Range` that was asked for, if the log tells.
    #[serde(default)]
    pub range: String,
}

impl Server {
    /// The operator's own: `offshoot-fleet serve`.
    pub fn of_fleet(fleet: &Path) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let mut process = spawn(
            Command::new(host::program("offshoot-fleet")?)
                .args(["--json", "serve", "--listen=127.0.0.1:0"])
                .arg(format!("--name={HOST}"))
                .arg("--log")
                .arg(directory.path().join("access"))
                .arg("--fleet")
                .arg(fleet)
                .stdout(Stdio::piped()),
        )?;
        let mut line = String::new();
        let stdout = process.stdout.take().context("its output is piped")?;
        BufReader::new(stdout).read_line(&mut line)?;
        #[derive(Deserialize)]
        struct Ready {
            listen: String,
            ca: String,
        }
        let ready: Ready = serde_json::from_str(&line)
            .with_context(|| format!("reading what offshoot-fleet serve says: {line:?}"))?;
        let port = ready.listen.rsplit(':').next().unwrap_or_default();
        Ok(Self {
            url: format!("https://{HOST}:{port}/"),
            ca: fs::read_to_string(&ready.ca).with_context(|| format!("reading {}", ready.ca))?,
            process,
            directory,
        })
    }

    /// Somebody else's: nginx, with TLS and HTTP/2, serving the directory `public`.
    pub fn nginx(public: &Path) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let ca = certificates(directory.path())?;
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        let (here, public) = (directory.path().display(), public.display());
        let configuration = directory.path().join("nginx.conf");
        fs::write(
            &configuration,
            format!(
                "daemon off; user root; worker_processes 1; pid {here}/pid; error_log {here}/error;\n\
                 events {{}}\n\
                 http {{\n\
                   log_format requests escape=json '{{\"http\":\"$server_protocol\",\"path\":\"$uri\",\"status\":$status,\"bytes\":$body_bytes_sent,\"range\":\"$http_range\"}}';\n\
                   access_log {here}/access requests;\n\
                   client_body_temp_path {here}/1; proxy_temp_path {here}/2; fastcgi_temp_path {here}/3;\n\
                   uwsgi_temp_path {here}/4; scgi_temp_path {here}/5;\n\
                   server {{\n\
                     listen 127.0.0.1:{port} ssl http2;\n\
                     ssl_certificate {here}/server.pem; ssl_certificate_key {here}/key.pem;\n\
                     root {public};\n\
                   }}\n\
                 }}\n"
            ),
        )?;
        // nginx takes over a listening socket by its number, as when one binary replaces another: it can be asked at once.
        let inherited = rustix::io::dup(&listener)?;
        rustix::io::fcntl_setfd(&inherited, rustix::io::FdFlags::empty())?;
        let process = spawn(
            Command::new("nginx")
                .arg("-e")
                .arg(directory.path().join("error"))
                .arg("-p")
                .arg(directory.path())
                .arg("-c")
                .arg(&configuration)
                .env("NGINX", format!("{};", inherited.as_raw_fd())),
        )?;
        Ok(Self {
            url: format!("https://{HOST}:{port}/"),
            ca,
            process,
            directory,
        })
    }

    /// Every request that was answered so far.
    pub fn requests(&self) -> Result<Vec<Request>> {
        let path = self.directory.path().join("access");
        if !path.exists() {
            return Ok(Vec::new());
        }
        let log = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        let mut requests = Vec::new();
        for line in BufReader::new(log).lines() {
            let line = line?;
            // An entry without a request tells of a connection that failed.
            if line.contains("\"status\"") {
                requests.push(
                    serde_json::from_str(&line).with_context(|| format!("reading {line:?}"))?,
                );
            }
        }
        Ok(requests)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Nothing is left to be done about a process that cannot be ended. SIGTERM first: nginx has children.
        if let Some(id) = i32::try_from(self.process.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw)
        {
            let _ = rustix::process::kill_process(id, rustix::process::Signal::TERM);
        }
        let _ = self.process.wait();
    }
}

/// Starts a server that goes with the thread that started it, even when that is killed.
fn spawn(command: &mut Command) -> Result<Child> {
    let mut guarded = Command::new("setpriv");
    guarded
        .arg("--pdeathsig=TERM")
        .arg(command.get_program())
        .args(command.get_args())
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    for (name, value) in command.get_envs() {
        if let Some(value) = value {
            guarded.env(name, value);
        }
    }
    guarded
        .spawn()
        .with_context(|| format!("starting {command:?}: `make setup` installs what is needed"))
}

/// An authority, which is returned, and the server's certificate and key in `directory`.
fn certificates(directory: &Path) -> Result<String> {
    let authority_key = KeyPair::generate()?;
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let ca = authority.self_signed(&authority_key)?.pem();
    let key = KeyPair::generate()?;
    let server = CertificateParams::new([HOST.to_owned(), "localhost".to_owned()])?
        .signed_by(&key, &Issuer::new(authority, authority_key))?;
    fs::write(directory.join("server.pem"), server.pem())?;
    fs::write(directory.join("key.pem"), key.serialize_pem())?;
    Ok(ca)
}
