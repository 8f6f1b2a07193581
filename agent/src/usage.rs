//! How many bytes were fetched in this calendar month.
//!
//! Owns `usage.json` in the state directory: `{"month": "2026-11", "bytes": 123}`, replaced whole. It is written when a good amount has
//! come since, so a power cut forgets at most [`UNSAVED`] bytes. A month never goes back: on a device whose clock jumps back, what was
//! counted stays counted. A file that cannot be read is set aside, and the month counts from nought.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use jiff::Zoned;
use jiff::civil::Date;
use serde::{Deserialize, Serialize};

use crate::record;

/// The most that is counted in memory only.
pub const UNSAVED: u64 = 1 << 20;

#[derive(Debug)]
pub struct Usage {
    path: PathBuf,
    counted: Counted,
    saved: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Counted {
    month: String,
    bytes: u64,
}

impl Usage {
    /// Reads the count; and where the file is that had to be set aside.
    pub fn open(state: &Path) -> Result<(Self, Option<PathBuf>)> {
        let path = state.join("usage.json");
        let mut aside = None;
        let counted = match fs::read(&path) {
            Ok(bytes) => match serde_json::from_slice(&bytes) {
                Ok(counted) => counted,
                Err(_) => {
                    let to = path.with_extension("json.corrupt");
                    fs::rename(&path, &to)
                        .with_context(|| format!("setting {} aside", path.display()))?;
                    aside = Some(to);
                    Counted::default()
                }
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Counted::default(),
            Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
        };
        let saved = counted.bytes;
        let usage = Self {
            path,
            counted,
            saved,
        };
        Ok((usage, aside))
    }

    /// What was fetched in the month of `now`.
    pub fn this_month(&self, now: &Zoned) -> u64 {
        if month(now) > self.counted.month {
            0
        } else {
            self.counted.bytes
        }
    }

    /// Counts; writes when enough is unsaved, or when `save` asks.
    pub fn count(&mut self, bytes: u64, now: &Zoned, save: bool) -> Result<()> {
        let month = month(now);
        if month > self.counted.month {
            self.counted = Counted { month, bytes: 0 };
            self.saved = 0;
        }
        self.counted.bytes = self.counted.bytes.saturating_add(bytes);
        let unsaved = self.counted.bytes - self.saved;
        if unsaved >= UNSAVED || (save && unsaved > 0) {
            record::replace(&self.path, &serde_json::to_vec(&self.counted)?)?;
            self.saved = self.counted.bytes;
        }
        Ok(())
    }
}

/// `2026-11`: ordered as time is.
fn month(now: &Zoned) -> String {
    now.strftime("%Y-%m").to_string()
}

/// The first moment of the month after that of `now`.
pub fn next_month(now: &Zoned) -> Option<jiff::Timestamp> {
    let date = now.date();
    let (year, month) = match date.month() {
        12 => (date.year().checked_add(1)?, 1),
        month => (date.year(), month + 1),
    };
    let first = Date::new(year, month, 1)
        .ok()?
        .to_datetime(jiff::civil::Time::midnight());
    let zoned = now.time_zone().to_ambiguous_zoned(first);
    Some(zoned.compatible().ok()?.timestamp())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Zoned {
        format!("{text}T12:00:00+00:00[UTC]").parse().unwrap()
    }

    #[test]
    fn a_month_is_counted_across_restarts_and_never_goes_back() {
        let temp = tempfile::tempdir().unwrap();
        let open = || Usage::open(temp.path()).unwrap().0;
        let mut usage = open();
        usage.count(5, &at("2026-11-24"), false).unwrap();
        assert_eq!(usage.this_month(&at("2026-11-24")), 5);
        // Not worth a write yet: a power cut forgets it.
        assert_eq!(open().this_month(&at("2026-11-24")), 0);
        usage.count(UNSAVED, &at("2026-11-24"), false).unwrap();
        assert_eq!(open().this_month(&at("2026-11-24")), UNSAVED + 5);
        usage.count(1, &at("2026-11-24"), true).unwrap();
        let mut usage = open();
        assert_eq!(usage.this_month(&at("2026-11-30")), UNSAVED + 6);
        assert_eq!(usage.this_month(&at("1970-01-01")), UNSAVED + 6);
        assert_eq!(usage.this_month(&at("2026-12-01")), 0);
        usage.count(7, &at("2026-12-01"), true).unwrap();
        usage.count(1, &at("2026-10-01"), true).unwrap();
        assert_eq!(open().this_month(&at("2026-12-02")), 8);
    }

    #[test]
    fn a_corrupt_file_is_set_aside() {
        let temp = tempfile::tempdir().unwrap();
        fs::write(temp.path().join("usage.json"), "{").unwrap();
        let (usage, aside) = Usage::open(temp.path()).unwrap();
        assert_eq!(usage.this_month(&at("2026-11-24")), 0);
        assert_eq!(aside, Some(temp.path().join("usage.json.corrupt")));
        assert_eq!(Usage::open(temp.path()).unwrap().1, None);
    }

    #[test]
    fn the_next_month_begins_on_its_first_day() {
        let zone: Zoned = "2026-12-31T23:00:00+01:00[Etc/GMT-1]".parse().unwrap();
        let next = next_month(&zone).unwrap();
        assert_eq!(next.to_string(), "2026-12-31T23:00:00Z");
        let next = next_month(&at("2026-01-31")).unwrap();
        assert_eq!(next.to_string(), "2026-02-01T00:00:00Z");
    }
}
