//! What the head of an answer says, read strictly and believed only to refuse.

use std::time::Duration;

use http::Response;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};

use super::Fault;

/// Why an answer with this status is not the file.
pub(super) fn refusal<B>(answer: &Response<B>) -> Fault {
    let code = answer.status().as_u16();
    match code {
        300..=303 | 305..=399 => Fault::Redirected {
            to: text(answer, header::LOCATION),
        },
        _ => Fault::Status {
            code,
            retry_after: retry_after(answer.headers()),
        },
    }
}

/// Refuses an answer whose bytes are not those of the file.
pub(super) fn plain<B>(answer: &Response<B>) -> Result<(), Fault> {
    let encoded = answer
        .headers()
        .get_all(header::CONTENT_ENCODING)
        .iter()
        .any(|encoding| encoding != "identity");
    if encoded {
        Err(Fault::Encoded {
            encoding: text(answer, header::CONTENT_ENCODING),
        })
    } else {
        Ok(())
    }
}

/// A header as something to show: bounded, and empty if it is not there.
pub(super) fn text<B>(answer: &Response<B>, name: HeaderName) -> String {
    text_of(answer, name, 200)
}

pub(super) fn text_of<B>(answer: &Response<B>, name: HeaderName, limit: usize) -> String {
    let value = answer
        .headers()
        .get(name)
        .map_or(&b""[..], HeaderValue::as_bytes);
    String::from_utf8_lossy(&value[..value.len().min(limit)]).into_owned()
}

pub(super) fn stated_length(headers: &HeaderMap) -> Option<u64> {
    headers
        .get(header::CONTENT_LENGTH)?
        .to_str()
        .ok()?
        .parse()
        .ok()
}

pub(super) fn range(from: u64) -> Result<HeaderValue, Fault> {
    HeaderValue::try_from(format!("bytes={from}-")).map_err(|error| Fault::Malformed {
        what: error.to_string(),
    })
}

/// `bytes first-last/total`, where the total may be unknown.
pub(super) fn content_range(headers: &HeaderMap) -> Option<(u64, u64, Option<u64>)> {
    let (range, total) = headers
        .get(header::CONTENT_RANGE)?
        .to_str()
        .ok()?
        .strip_prefix("bytes ")?
        .split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let total = if total == "*" {
        None
    } else {
        Some(total.parse().ok()?)
    };
    Some((first.parse().ok()?, last.parse().ok()?, total))
}

/// `Retry-After`, in seconds or as a date. A date is measured from the answer's own `Date`, because the device's clock may
/// be anywhere.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(header::RETRY_AFTER)?.to_str().ok()?;
    if value.bytes().all(|digit| digit.is_ascii_digit()) {
        return value.parse().ok().map(Duration::from_secs);
    }
    let second = |text| {
        Some(
            jiff::fmt::rfc2822::parse(text)
                .ok()?
                .timestamp()
                .as_second(),
        )
    };
    let wait = second(value)? - second(headers.get(header::DATE)?.to_str().ok()?)?;
    Some(Duration::from_secs(wait.try_into().unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date_measured_by_the_servers_own_clock() {
        let date = "Wed, 21 Oct 2015 07:28:00 GMT";
        for (value, now, want) in [
            ("120", None, Some(120)),
            ("0", None, Some(0)),
            ("Wed, 21 Oct 2015 07:29:30 GMT", Some(date), Some(90)),
            ("Wed, 21 Oct 2015 07:27:00 GMT", Some(date), Some(0)),
            ("Wed, 21 Oct 2015 07:29:30 GMT", None, None),
            ("99999999999999999999", None, None),
            ("-1", Some(date), None),
            ("soon", Some(date), None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static(value));
            headers.extend(now.map(|now| (header::DATE, HeaderValue::from_static(now))));
            assert_eq!(
                retry_after(&headers),
                want.map(Duration::from_secs),
                "{value}"
            );
        }
    }

    #[test]
    fn content_range_is_read_exactly() {
        for (value, want) in [
            ("bytes 5-9/10", Some((5, 9, Some(10)))),
            ("bytes 5-9/*", Some((5, 9, None))),
            ("bytes */10", None),
            ("bytes 5-/10", None),
            ("5-9/10", None),
            ("bytes 5-9/10, 11-12/10", None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_RANGE, HeaderValue::from_static(value));
            assert_eq!(content_range(&headers), want, "{value}");
        }
    }
}
