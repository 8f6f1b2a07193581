//! The proxy between: which hosts go through it, and the tunnel to them.

use std::io;

use anyhow::Context as _;
use bytes::Bytes;
use http::{Request, header};
use http_body_util::Empty;
use hyper::client::conn::http1;
use hyper::upgrade::Upgraded;
use hyper_util::client::proxy::matcher::Matcher;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use super::connection::{Meter, connect};
use super::url::Base;
use super::{Fault, Phase};

pub(super) struct Proxy(Matcher);

/// How to reach a host.
pub(super) struct Hop {
    host: String,
    port: u16,
    authorization: Option<http::HeaderValue>,
}

impl Proxy {
    /// By the configuration, or without a word there by the environment.
    pub(super) fn new(url: Option<&str>, no_proxy: &str) -> anyhow::Result<Self> {
        let Some(url) = url else {
            return Ok(Self(Matcher::from_env()));
        };
        let matcher = Matcher::builder().all(url).no(no_proxy).build();
        // The builder drops what it cannot read, and everything would go around the proxy.
        let probe = "https://proxy.invalid/".parse()?;
        let through = matcher.intercept(&probe);
        let through = through.filter(|through| {
            through.uri().scheme_str() == Some("http") && through.uri().host().is_some()
        });
        through.with_context(|| {
            format!(
                "server.proxy is {url:?}: write http://host:port or http://user:password@host:port"
            )
        })?;
        Ok(Self(matcher))
    }

    pub(super) fn between(&self, base: &Base) -> Option<Hop> {
        let place = format!("{}://{}/", base.scheme, base.authority);
        let through = self.0.intercept(&place.parse().ok()?)?;
        Some(Hop {
            host: through.uri().host()?.to_owned(),
            port: through.uri().port_u16().unwrap_or(8080),
            authorization: through.basic_auth().cloned(),
        })
    }
}

impl Hop {
    /// A stream to `base` through the proxy.
    pub(super) async fn tunnel(
        &self,
        base: &Base,
        deadline: Instant,
    ) -> Result<TokioIo<Upgraded>, Fault> {
        let tcp = connect(&self.host, self.port, deadline).await?;
        let shake = self.ask(base, tcp);
        match timeout_at(deadline, shake).await {
            Ok(tunnel) => tunnel,
            Err(_) => Err(Fault::Unreachable {
                phase: Phase::Connect,
                kind: io::ErrorKind::TimedOut,
            }),
        }
    }

    async fn ask(&self, base: &Base, tcp: TcpStream) -> Result<TokioIo<Upgraded>, Fault> {
        let lost = |error: hyper::Error| Meter::default().broken(&error, 0);
        let (mut sender, connection) = http1::Builder::new()
            .max_headers(64)
            .max_buf_size(16 << 10)
            .handshake(TokioIo::new(tcp))
            .await
            .map_err(lost)?;
        // Ends with the tunnel, or with the sender.
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "the connection to the proxy ended");
            }
        });
        let place = format!("{}:{}", base.authority.host(), base.port);
        let mut request = Request::connect(&place).header(header::HOST, &place);
        if let Some(authorization) = &self.authorization {
            request = request.header(header::PROXY_AUTHORIZATION, authorization);
        }
        let request = request
            .body(Empty::<Bytes>::new())
            .map_err(|_| Fault::BadPath { path: place })?;
        let answer = sender.send_request(request).await.map_err(lost)?;
        if !answer.status().is_success() {
            return Err(Fault::Proxy {
                code: answer.status().as_u16(),
            });
        }
        let tunnel = hyper::upgrade::on(answer).await.map_err(lost)?;
        Ok(TokioIo::new(tunnel))
    }
}
