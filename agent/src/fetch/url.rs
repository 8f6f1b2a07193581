//! The configured base URL, and the paths below it.

use std::fmt;

use http::uri::Authority;
use rustls::pki_types::ServerName;

use super::Fault;

/// The configured URL cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadUrl {
    #[error("it is not a URL; write https://host/ or https://host:port/prefix/")]
    NotAUrl,
    #[error("it is not https; only a bench may set insecure_http = true and use http")]
    NotHttps,
    #[error("it contains a user name or password; remove them")]
    Credentials,
    #[error("it has a query or a fragment, which cannot be a place for files; remove them")]
    Query,
}

/// The base URL, taken apart.
pub(super) struct Base {
    pub(super) scheme: &'static str,
    pub(super) authority: Authority,
    /// Without the brackets of an IPv6 address.
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) name: ServerName<'static>,
    /// Begins and ends with a slash.
    pub(super) prefix: String,
}

impl Base {
    pub(super) fn parse(url: &str, insecure_http: bool) -> Result<Self, BadUrl> {
        let (scheme, rest) = url.split_once("://").ok_or(BadUrl::NotAUrl)?;
        let (scheme, port) = match scheme {
            "https" => ("https", 443),
            "http" if insecure_http => ("http", 80),
            "http" => return Err(BadUrl::NotHttps),
            _ => return Err(BadUrl::NotAUrl),
        };
        if rest.contains(['?', '#']) {
            return Err(BadUrl::Query);
        }
        let (authority, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if authority.contains('@') {
            return Err(BadUrl::Credentials);
        }
        let authority: Authority = authority.parse().map_err(|_| BadUrl::NotAUrl)?;
        let host = authority
            .host()
            .trim_start_matches('[')
            .trim_end_matches(']')
            .to_owned();
        let name = ServerName::try_from(host.clone()).map_err(|_| BadUrl::NotAUrl)?;
        let port = match (
            authority.port_u16(),
            authority.as_str().len() > authority.host().len(),
        ) {
            (Some(0), _) | (None, true) => return Err(BadUrl::NotAUrl),
            (Some(port), _) => port,
            (None, false) => port,
        };
        let prefix = prefix.trim_end_matches('/');
        let prefix = match (prefix, check_path(prefix)) {
            ("", _) => "/".to_owned(),
            (prefix, Ok(())) => format!("/{prefix}/"),
            (_, Err(_)) => return Err(BadUrl::NotAUrl),
        };
        Ok(Self {
            scheme,
            authority,
            host,
            port,
            name,
            prefix,
        })
    }
}

impl Base {
    /// Where a `Location` leads from here: the host, and the path and query there. `None` for what is not followed: another scheme, credentials,
    /// a place that is no URL.
    pub(super) fn follow(&self, location: &str, insecure_http: bool) -> Option<(Self, String)> {
        let location: http::Uri = location.parse().ok()?;
        let target = location.path_and_query()?.as_str().to_owned();
        if !target.starts_with('/') {
            return None;
        }
        let (scheme, authority) = match (location.scheme_str(), location.authority()) {
            (Some(scheme), Some(authority)) => (scheme, authority.as_str()),
            (None, None) => (self.scheme, self.authority.as_str()),
            _ => return None,
        };
        // From TLS never to what is not.
        let insecure = insecure_http && self.scheme == "http";
        let base = Self::parse(&format!("{scheme}://{authority}/"), insecure).ok()?;
        Some((base, target))
    }
}

impl fmt::Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}{}", self.scheme, self.authority, self.prefix)
    }
}

/// Paths come from configuration and signed metadata; still, none may climb, or mean something else in a URL. A byte that must be
/// escaped may be, in the one spelling `%XX`; one that need not be may not, so `%2e%2e` is no way up.
pub(super) fn check_path(path: &str) -> Result<(), Fault> {
    let segment = |segment: &str| {
        let mut parts = segment.split('%');
        !matches!(segment, "" | "." | "..")
            && parts.next().is_some_and(|part| part.bytes().all(is_plain))
            && parts.all(is_escape_and_plain)
    };
    if path.split('/').all(segment) {
        Ok(())
    } else {
        Err(Fault::BadPath {
            path: path.to_owned(),
        })
    }
}

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@".contains(&byte)
}

fn is_escape_and_plain(part: &str) -> bool {
    let Some((digits, rest)) = part.split_at_checked(2) else {
        return false;
    };
    let hex = |byte: u8| byte.is_ascii_digit() || (b'A'..=b'F').contains(&byte);
    let unreserved = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    digits.bytes().all(hex)
        && u8::from_str_radix(digits, 16).is_ok_and(|byte| !unreserved(byte) && byte != 0)
        && rest.bytes().all(is_plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_url_is_https_with_a_host_and_a_prefix() {
        let parts = |url| {
            Base::parse(url, false).map(|base| (base.host.clone(), base.port, base.to_string()))
        };
        let good = |host: &str, port, url: &str| Ok((host.to_owned(), port, url.to_owned()));
        for (url, want) in [
            (
                "https://a.example",
                good("a.example", 443, "https://a.example/"),
            ),
            (
                "https://a.example:8443/x/y",
                good("a.example", 8443, "https://a.example:8443/x/y/"),
            ),
            (
                "https://a.example/x/",
                good("a.example", 443, "https://a.example/x/"),
            ),
            ("https://[::1]:8/", good("::1", 8, "https://[::1]:8/")),
            (
                "https://192.0.2.1/",
                good("192.0.2.1", 443, "https://192.0.2.1/"),
            ),
            ("http://a.example/", Err(BadUrl::NotHttps)),
            ("ftp://a.example/", Err(BadUrl::NotAUrl)),
            ("a.example", Err(BadUrl::NotAUrl)),
            ("https:///x", Err(BadUrl::NotAUrl)),
            ("https://a.example:0/", Err(BadUrl::NotAUrl)),
            ("https://a.example:65536/", Err(BadUrl::NotAUrl)),
            ("https://a.example:/", Err(BadUrl::NotAUrl)),
            ("https://a_b c/", Err(BadUrl::NotAUrl)),
            ("https://a.example/x/../y", Err(BadUrl::NotAUrl)),
            ("https://user:secret@a.example/", Err(BadUrl::Credentials)),
            ("https://a.example/?token=1", Err(BadUrl::Query)),
            ("https://a.example#x", Err(BadUrl::Query)),
        ] {
            assert_eq!(parts(url), want, "{url}");
        }
        assert!(Base::parse("http://a.example", true).is_ok());
    }

    #[test]
    fn paths_stay_below_the_base() {
        for good in [
            "metadata/1.root.json",
            "targets/stable/x86/ab.1.4.0+1~rc.commit",
            "deltas/empty-ab/0",
            "metadata/1.a%2Fb.json",
            "metadata/1.%C3%BC%25%3F.json",
        ] {
            assert_eq!(check_path(good), Ok(()), "{good}");
        }
        for bad in [
            "", "/x", "x/", "a//b", "../x", "a/./b", "a?b", "a#b", "a b", "a%2e", "a%2E", "%2E%2E",
            "a%", "a%2", "a%2f", "a%00", "a%G0", "a%é", "a\\b", "ü", "a\r\nb",
        ] {
            assert_eq!(
                check_path(bad),
                Err(Fault::BadPath {
                    path: bad.to_owned()
                }),
                "{bad}"
            );
        }
    }
}
