//! Windows of time, as an operator writes them: `"02:00-04:00"`, `"Mon-Fri 22:00-05:00"`, `"Sat,Sun 00:00-24:00"`.
//!
//! Local time, by the device's time zone. A window that ends before it begins, or when it begins, ends on the next day. On a night on which the clock changes
//! a window begins and ends when the clock on the wall says so: it may be an hour longer or shorter. Pure: the time is an argument.

use std::fmt;
use std::str::FromStr;

use jiff::civil::{Time, Weekday};
use jiff::{Timestamp, Zoned};
use serde::Deserialize;

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Window {
    /// Monday first: on which days it begins.
    days: [bool; 7],
    begin: u16,
    /// Minutes after midnight of the day on which it begins, so up to two days.
    end: u16,
}

/// The text is not a window.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a window of time: write \"02:00-04:00\", \"Mon-Fri 22:00-05:00\" or \"Sat,Sun 00:00-24:00\""
)]
pub struct NotAWindow(String);

const DAYS: [&str; 7] = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"];
const DAY: u16 = 24 * 60;

impl Window {
    /// When it is open around or after `now`: begin and end. `None` if the calendar ends first.
    fn next(&self, now: &Zoned) -> Option<(Timestamp, Timestamp)> {
        // A window may have begun yesterday, and the same weekday comes again within a week.
        (-1..=7)
            .filter_map(|offset| {
                let day = now
                    .date()
                    .checked_add(jiff::Span::new().days(offset))
                    .ok()?;
                if !self.days[usize::from(monday_first(day.weekday()))] {
                    return None;
                }
                let at = |minutes: u16| {
                    let day = day
                        .checked_add(jiff::Span::new().days(minutes / DAY))
                        .ok()?;
                    let minutes = minutes % DAY;
                    let time = Time::new((minutes / 60) as i8, (minutes % 60) as i8, 0, 0).ok()?;
                    let zoned = now.time_zone().to_ambiguous_zoned(day.to_datetime(time));
                    Some(zoned.compatible().ok()?.timestamp())
                };
                Some((at(self.begin)?, at(self.end)?))
            })
            .find(|(_, end)| *end > now.timestamp())
    }
}

/// What the windows say of a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Until then, or for ever.
    Open(Option<Timestamp>),
    /// Until then, or for as long as the calendar goes.
    Closed(Option<Timestamp>),
}

/// Whether one of the windows is open. No windows: always.
pub fn state(windows: &[Window], now: &Zoned) -> State {
    if windows.is_empty() {
        return State::Open(None);
    }
    let next = || windows.iter().filter_map(|window| window.next(now));
    let open = next().filter(|(begin, _)| *begin <= now.timestamp());
    match open.map(|(_, end)| end).max() {
        Some(end) => State::Open(Some(end)),
        None => State::Closed(next().map(|(begin, _)| begin).min()),
    }
}

fn monday_first(day: Weekday) -> u8 {
    day.to_monday_zero_offset().unsigned_abs()
}

impl FromStr for Window {
    type Err = NotAWindow;

    fn from_str(text: &str) -> Result<Self, NotAWindow> {
        let refuse = || NotAWindow(text.chars().take(80).collect());
        let (days, hours) = match text.trim().split_once(' ') {
            Some((days, hours)) => (parse_days(days).ok_or_else(refuse)?, hours.trim()),
            None => ([true; 7], text.trim()),
        };
        let (begin, end) = hours.split_once('-').ok_or_else(refuse)?;
        let begin = minutes(begin)
            .filter(|begin| *begin < DAY)
            .ok_or_else(refuse)?;
        let end = minutes(end).ok_or_else(refuse)?;
        Ok(Self {
            days,
            begin,
            end: if end > begin { end } else { end + DAY },
        })
    }
}

impl TryFrom<String> for Window {
    type Error = NotAWindow;

    fn try_from(text: String) -> Result<Self, NotAWindow> {
        text.parse()
    }
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let days: Vec<_> = (DAYS.iter().zip(self.days))
            .filter_map(|(day, on)| on.then_some(*day))
            .collect();
        let time = |minutes: u16| format!("{:02}:{:02}", minutes / 60, minutes % 60);
        let end = if self.end > DAY {
            self.end - DAY
        } else {
            self.end
        };
        if days.len() < 7 {
            write!(f, "{} ", days.join(","))?;
        }
        write!(f, "{}-{}", time(self.begin), time(end))
    }
}

/// `Mon`, `Mon-Fri`, `Fri-Mon`, `Sat,Sun`, and these joined by commas.
fn parse_days(text: &str) -> Option<[bool; 7]> {
    let day = |name: &str| DAYS.iter().position(|day| day.eq_ignore_ascii_case(name));
    let mut days = [false; 7];
    for part in text.split(',') {
        let (first, last) = match part.split_once('-') {
            Some((first, last)) => (day(first)?, day(last)?),
            None => (day(part)?, day(part)?),
        };
        for step in 0..=(last + 7 - first) % 7 {
            days[(first + step) % 7] = true;
        }
    }
    Some(days)
}

/// `HH:MM`, up to `24:00`.
fn minutes(text: &str) -> Option<u16> {
    let (hours, minutes) = text.split_once(':')?;
    let number = |text: &str, most: u16| {
        let digits = text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit());
        let number: u16 = text.parse().ok()?;
        (digits && number <= most).then_some(number)
    };
    let total = number(hours, 24)? * 60 + number(minutes, 59)?;
    (total <= DAY).then_some(total)
}

#[cfg(test)]
mod tests {
    use jiff::tz::TimeZone;

    use super::*;

    fn windows(texts: &[&str]) -> Vec<Window> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    /// Berlin's rules, without needing its file.
    fn at(text: &str) -> Zoned {
        let zone = TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap();
        let time: jiff::civil::DateTime = text.parse().unwrap();
        zone.to_zoned(time).unwrap()
    }

    #[test]
    fn a_window_is_read_and_written_in_one_way_and_nothing_else_is_one() {
        for (text, written) in [
            ("02:00-04:00", "02:00-04:00"),
            ("Mon-Fri 22:00-05:00", "Mon,Tue,Wed,Thu,Fri 22:00-05:00"),
            ("Sat,Sun 00:00-24:00", "Sat,Sun 00:00-24:00"),
            ("fri-mon 12:00-12:00", "Mon,Fri,Sat,Sun 12:00-12:00"),
        ] {
            assert_eq!(
                text.parse::<Window>().map(|w| w.to_string()),
                Ok(written.to_owned())
            );
        }
        for bad in [
            "",
            "02:00",
            "2:00-4:00",
            "02:00-25:00",
            "24:00-02:00",
            "02:60-04:00",
            "Mo 02:00-04:00",
            "Mon- 02:00-04:00",
            "02:00-04:00 Mon",
            "-1:00-04:00",
            "+2:00-04:00",
        ] {
            assert_eq!(bad.parse::<Window>(), Err(NotAWindow(bad.to_owned())));
        }
    }

    #[test]
    fn a_window_is_open_from_its_first_minute_to_before_its_last() {
        let night = windows(&["Mon-Fri 22:00-05:00"]);
        // 2026-11-23 is a Monday.
        for (now, is_open) in [
            ("2026-11-23T21:59:59", false),
            ("2026-11-23T22:00:00", true),
            ("2026-11-24T04:59:59", true),
            ("2026-11-24T05:00:00", false),
            // Friday's goes on into Saturday, Sunday has none.
            ("2026-11-28T04:00:00", true),
            ("2026-11-28T23:00:00", false),
            ("2026-11-29T23:00:00", false),
            ("2026-11-30T04:00:00", false),
        ] {
            let state = state(&night, &at(now));
            assert_eq!(matches!(state, State::Open(_)), is_open, "{now}");
        }
        let on = |time: &str| Some(at(time).timestamp());
        assert_eq!(
            state(&night, &at("2026-11-28T06:00:00")),
            State::Closed(on("2026-11-30T22:00:00"))
        );
        assert_eq!(
            state(&night, &at("2026-11-23T23:00:00")),
            State::Open(on("2026-11-24T05:00:00"))
        );
        let two = windows(&["Sun 10:00-11:00", "Sat 09:00-10:00"]);
        assert_eq!(
            state(&two, &at("2026-11-28T10:30:00")),
            State::Closed(on("2026-11-29T10:00:00"))
        );
        assert_eq!(state(&[], &at("2026-11-28T10:30:00")), State::Open(None));
        // The same day a week later.
        assert_eq!(
            state(&two[..1], &at("2026-11-29T11:00:00")),
            State::Closed(on("2026-12-06T10:00:00"))
        );
    }

    #[test]
    fn on_the_night_of_a_change_the_wall_clock_counts() {
        let night = windows(&["01:00-04:00"]);
        // 2026-03-29: 02:00 to 03:00 does not exist.
        let (begin, end) = night[0].next(&at("2026-03-29T00:30:00")).unwrap();
        assert_eq!(end.as_second() - begin.as_second(), 2 * 3600);
        // 2026-10-25: it exists twice.
        let (begin, end) = night[0].next(&at("2026-10-25T00:30:00")).unwrap();
        assert_eq!(end.as_second() - begin.as_second(), 4 * 3600);
        // One that begins in the hour that does not exist begins after it.
        let gap = windows(&["02:30-03:30"]);
        let (begin, end) = gap[0].next(&at("2026-03-29T00:30:00")).unwrap();
        assert_eq!(begin, at("2026-03-29T03:30:00").timestamp());
        assert!(end >= begin);
    }
}
