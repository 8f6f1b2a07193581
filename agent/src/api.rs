//! The daemon's API: HTTP/1.1 on the unix socket `offshoot.sock` in the run directory. Bodies are JSON.
//!
//! | request | body | does | answers |
//! |---|---|---|---|
//! | `GET /v1/status` | | | 200 [`Status`] |
//! | `GET /v1/status?after=N` | | waits, at most half a minute, for a revision above N | 200 [`Status`] |
//! | `POST /v1/check` | | asks the server now | 200 [`Status`] |
//! | `POST /v1/update` | `{"over_limits": false, "from": null}` or nothing | asks the server now, and installs what it offers | 200 [`Status`]; 409 [`Status`] when there is nothing to install, `why` says why |
//! | `PUT /v1/channel` | `{"channel": "beta"}` | follows that channel | 200 [`Status`] |
//! | `DELETE /v1/channel` | | follows the configured channel | 200 [`Status`] |
//! | `PUT /v1/hold` | `{"reason": "…"}` | installs nothing | 200 [`Status`] |
//! | `DELETE /v1/hold` | | ends the hold | 200 [`Status`] |
//! | `DELETE /v1/rejections/COMMIT` | | allows a rejected release again | 200 [`Status`]; 404 if it is not rejected |
//!
//! Everybody on the device may look; only root may change, which the kernel says (`SO_PEERCRED`), not the request. Errors are
//! `{"error": {"kind": "…", "message": "…"}}`. Also the client that `offshoot`'s own verbs use.

use std::convert::Infallible;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Deserialize, Serialize};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

use crate::commit::Commit;
use crate::daemon::Command;
use crate::record::Hold;
use crate::status::Status;
use crate::trust::schema::RoleName;

/// A request's body is a few words.
const BODY_LIMIT: usize = 4096;

/// Connections at a time: each costs memory, and anybody on the device may open one.
const CONNECTIONS: usize = 16;

/// How long a request for a later revision is kept waiting.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    pub error: Why,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Why {
    pub kind: Kind,
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    NotPermitted,
    NoSuchThing,
    BadRequest,
    Failed,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ChannelBody {
    channel: String,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct UpdateBody {
    over_limits: bool,
    from: Option<PathBuf>,
}

/// The socket, listening. What was there before is replaced: it belongs to a daemon that is no more.
pub fn listen(run: &Path) -> Result<UnixListener> {
    fs::create_dir_all(run).with_context(|| format!("creating {}", run.display()))?;
    let path = socket(run);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("removing {}", path.display()));
        }
        Ok(()) | Err(_) => {}
    }
    let listener =
        UnixListener::bind(&path).with_context(|| format!("listening on {}", path.display()))?;
    // Everybody may look. Who may do what is decided for each request.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666))
        .with_context(|| format!("opening {} to everybody", path.display()))?;
    Ok(listener)
}

pub fn socket(run: &Path) -> PathBuf {
    run.join("offshoot.sock")
}

/// Serves until it is dropped.
pub async fn serve(
    listener: UnixListener,
    commands: mpsc::Sender<Command>,
    status: watch::Receiver<Option<Status>>,
) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "accepting a connection");
                // Out of file descriptors, most likely: somebody else must give one up first.
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        let (commands, status) = (commands.clone(), status.clone());
        tokio::spawn(async move {
            let _place = place;
            let is_root = match stream.peer_cred() {
                Ok(peer) => peer.uid() == 0 || peer.uid() == rustix::process::geteuid().as_raw(),
                Err(_) => false,
            };
            let service = service_fn(|request| {
                let (commands, status) = (commands.clone(), status.clone());
                async move { Ok::<_, Infallible>(answer(request, is_root, commands, status).await) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(Duration::from_secs(10))
                .max_buf_size(16 << 10)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection to the API ended");
            }
        });
    }
}

async fn answer(
    request: Request<Incoming>,
    is_root: bool,
    commands: mpsc::Sender<Command>,
    status: watch::Receiver<Option<Status>>,
) -> Response<Full<Bytes>> {
    let result = match handle(request, is_root, commands, status).await {
        Ok((code, status)) => json(code, &status),
        Err(why) => {
            let code = match why.kind {
                Kind::NotPermitted => StatusCode::FORBIDDEN,
                Kind::NoSuchThing => StatusCode::NOT_FOUND,
                Kind::BadRequest => StatusCode::BAD_REQUEST,
                Kind::Failed => StatusCode::INTERNAL_SERVER_ERROR,
            };
            json(code, &Refused { error: why })
        }
    };
    result.unwrap_or_else(|error| {
        tracing::error!(%error, "answering a request");
        let mut response = Response::new(Full::default());
        *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
        response
    })
}

async fn handle(
    request: Request<Incoming>,
    is_root: bool,
    commands: mpsc::Sender<Command>,
    status: watch::Receiver<Option<Status>>,
) -> Result<(StatusCode, Status), Why> {
    let (head, body) = request.into_parts();
    let path = head.uri.path();
    if head.method == Method::GET && path == "/v1/status" {
        return latest(head.uri.query(), status).await;
    }
    if !is_root {
        return Err(Why {
            kind: Kind::NotPermitted,
            message: "only root may change anything".to_owned(),
        });
    }
    let body = Limited::new(body, BODY_LIMIT)
        .collect()
        .await
        .map_err(|error| bad(format!("the body: {error}")))?
        .to_bytes();
    let done = |result: Result<Status>| match result {
        Ok(status) => Ok((StatusCode::OK, status)),
        Err(error) => Err(failed(format!("{error:#}"))),
    };
    match (head.method, path) {
        (Method::POST, "/v1/check") => {
            let status = ask(&commands, Command::Check).await?;
            Ok((StatusCode::OK, status))
        }
        (Method::POST, "/v1/update") => {
            let UpdateBody { over_limits, from } = if body.is_empty() {
                UpdateBody::default()
            } else {
                parse(&body)?
            };
            let command = |reply| Command::Update {
                over_limits,
                from,
                reply,
            };
            match ask(&commands, command).await? {
                Ok(status) => Ok((StatusCode::OK, status)),
                Err(status) => Ok((StatusCode::CONFLICT, status)),
            }
        }
        (Method::PUT, "/v1/channel") => {
            let ChannelBody { channel } = parse(&body)?;
            let channel: RoleName = channel.parse().map_err(|error| bad(format!("{error}")))?;
            done(ask(&commands, |reply| Command::Channel(Some(channel), reply)).await?)
        }
        (Method::DELETE, "/v1/channel") => {
            done(ask(&commands, |reply| Command::Channel(None, reply)).await?)
        }
        (Method::PUT, "/v1/hold") => {
            let hold: Hold = parse(&body)?;
            done(ask(&commands, |reply| Command::Hold(Some(hold), reply)).await?)
        }
        (Method::DELETE, "/v1/hold") => {
            done(ask(&commands, |reply| Command::Hold(None, reply)).await?)
        }
        (Method::DELETE, path) if path.starts_with("/v1/rejections/") => {
            let commit: Commit = path["/v1/rejections/".len()..]
                .parse()
                .map_err(|error| bad(format!("{error}")))?;
            match ask(&commands, |reply| Command::Retry(commit, reply)).await? {
                Ok(Some(status)) => Ok((StatusCode::OK, status)),
                Ok(None) => Err(Why {
                    kind: Kind::NoSuchThing,
                    message: format!("{commit} is not rejected"),
                }),
                Err(error) => Err(failed(format!("{error:#}"))),
            }
        }
        (method, path) => Err(Why {
            kind: Kind::NoSuchThing,
            message: format!("there is no {method} {path}"),
        }),
    }
}

async fn latest(
    query: Option<&str>,
    mut status: watch::Receiver<Option<Status>>,
) -> Result<(StatusCode, Status), Why> {
    let after = match query {
        None => 0,
        Some(query) => query
            .strip_prefix("after=")
            .and_then(|after| after.parse().ok())
            .ok_or_else(|| bad(format!("?{query} is not ?after=N")))?,
    };
    let later = status.wait_for(|status| {
        status
            .as_ref()
            .is_some_and(|status| status.revision > after)
    });
    if let Ok(Err(_)) = tokio::time::timeout(LONGEST_WAIT, later).await {
        return Err(failed("the daemon is stopping"));
    }
    match &*status.borrow() {
        Some(status) => Ok((StatusCode::OK, status.clone())),
        None => Err(failed("the daemon has not looked at the device yet")),
    }
}

async fn ask<T>(
    commands: &mpsc::Sender<Command>,
    command: impl FnOnce(oneshot::Sender<T>) -> Command,
) -> Result<T, Why> {
    let (sender, receiver) = oneshot::channel();
    let stopping = || failed("the daemon is stopping");
    commands
        .send(command(sender))
        .await
        .map_err(|_| stopping())?;
    receiver.await.map_err(|_| stopping())
}

fn parse<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, Why> {
    serde_json::from_slice(body).map_err(|error| bad(format!("the body: {error}")))
}

fn bad(message: impl Into<String>) -> Why {
    Why {
        kind: Kind::BadRequest,
        message: message.into(),
    }
}

fn failed(message: impl Into<String>) -> Why {
    Why {
        kind: Kind::Failed,
        message: message.into(),
    }
}

fn json(code: StatusCode, body: &impl Serialize) -> Result<Response<Full<Bytes>>> {
    Ok(Response::builder()
        .status(code)
        .header(http::header::CONTENT_TYPE, "application/json")
        .body(Full::new(serde_json::to_vec(body)?.into()))?)
}

/// What a request ended with.
#[derive(Debug)]
pub enum Answer {
    Status(Box<Status>),
    /// 409: nothing to do, and the status says why.
    Conflict(Box<Status>),
    Refused(Why),
}

/// The daemon does not listen.
#[derive(Debug, thiserror::Error)]
#[error("the daemon does not answer on {}: {error}; `systemctl status offshoot` says more", path.display())]
pub struct NotRunning {
    path: PathBuf,
    error: io::Error,
}

/// One request to the daemon, for the verbs of the command line.
pub async fn request(
    run: &Path,
    method: Method,
    path: &str,
    body: Option<&serde_json::Value>,
) -> Result<Answer> {
    let socket = socket(run);
    let stream = UnixStream::connect(&socket)
        .await
        .map_err(|error| NotRunning {
            path: socket.clone(),
            error,
        })?;
    let talk = || format!("talking to the daemon on {}", socket.display());
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .with_context(talk)?;
    let connection = tokio::spawn(connection);
    let body = body.map(|body| body.to_string()).unwrap_or_default();
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(http::header::HOST, "offshoot")
        .body(Full::new(Bytes::from(body)))?;
    let response = sender.send_request(request).await.with_context(talk)?;
    let code = response.status();
    let body = response
        .into_body()
        .collect()
        .await
        .with_context(talk)?
        .to_bytes();
    connection.abort();
    Ok(match code {
        StatusCode::OK => Answer::Status(serde_json::from_slice(&body).with_context(talk)?),
        StatusCode::CONFLICT => Answer::Conflict(serde_json::from_slice(&body).with_context(talk)?),
        _ => {
            let refused: Refused = serde_json::from_slice(&body).with_context(talk)?;
            Answer::Refused(refused.error)
        }
    })
}
