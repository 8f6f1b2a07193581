//! Everything that comes out of a machine, in the order in which it arrives.
//!
//! Owns the threads that read a machine's four sockets and the transcript of what they read. Each kind of wait keeps its
//! own place in the transcript: a line is returned by one wait, and a wait never looks back behind the last one of its kind.

use std::collections::{HashSet, VecDeque};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Map, Value};

/// What is said by a machine.
#[derive(Clone, Debug)]
pub enum Line {
    /// A line on the serial console, without its escape sequences.
    Serial(String),
    /// An entry of the journal.
    Journal(Event),
}

/// An entry of the guest's journal, with all its fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event(pub Map<String, Value>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Serial,
    Journal,
    Qmp,
    Agent,
}

/// What a reading thread has read.
#[derive(Debug)]
pub(super) enum Report {
    Serial(String),
    Journal(Event),
    Message(Source, Value),
    /// The socket was closed: QEMU has gone.
    Closed,
}

pub(super) struct Watch {
    reports: Receiver<Report>,
    sender: Sender<Report>,
    start: Instant,
    /// What nobody has asked for by [`Self::next_line`] yet.
    lines: VecDeque<Line>,
    /// How many sockets are open.
    open: usize,
    serial: Vec<(Duration, String)>,
    serial_place: usize,
    events: Vec<(Duration, Event)>,
    events_place: usize,
    /// The journal is told from its beginning after each boot.
    cursors: HashSet<String>,
    qmp_events: Vec<(Duration, Value)>,
    qmp_place: usize,
    qmp_answers: VecDeque<Value>,
    agent_answers: VecDeque<Value>,
    agent_is_there: bool,
    synchronisations: u32,
}

impl Event {
    pub fn message_id(&self) -> Option<&str> {
        self.field("MESSAGE_ID")
    }

    /// A field's text; none if the field is missing or binary.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.0.get(name)?.as_str()
    }
}

impl Watch {
    pub(super) fn new() -> Self {
        let (sender, reports) = mpsc::channel();
        Self {
            reports,
            sender,
            start: Instant::now(),
            lines: VecDeque::new(),
            open: 0,
            serial: Vec::new(),
            serial_place: 0,
            events: Vec::new(),
            events_place: 0,
            cursors: HashSet::new(),
            qmp_events: Vec::new(),
            qmp_place: 0,
            qmp_answers: VecDeque::new(),
            agent_answers: VecDeque::new(),
            agent_is_there: false,
            synchronisations: 0,
        }
    }

    pub(super) fn power_on(&mut self) {
        self.agent_is_there = false;
        self.qmp_answers.clear();
        self.agent_answers.clear();
    }

    /// Reads `stream` to its end in a thread of its own.
    pub(super) fn read(&mut self, source: Source, stream: UnixStream) {
        self.open += 1;
        let sender = self.sender.clone();
        std::thread::spawn(move || {
            let mut lines = BufReader::new(stream);
            let mut bytes = Vec::new();
            // An error is an end too: QEMU was killed. Sending fails when nobody waits any more.
            while lines.read_until(b'\n', &mut bytes).is_ok_and(|n| n > 0) {
                let report = match source {
                    Source::Serial => Some(Report::Serial(plain(&bytes))),
                    // A line that a cut tore is not an entry; it comes again, whole, after the next boot.
                    Source::Journal => serde_json::from_slice(&bytes)
                        .ok()
                        .map(|fields| Report::Journal(Event(fields))),
                    Source::Qmp | Source::Agent => {
                        // The guest agent marks a synchronisation with a byte that is no JSON.
                        bytes.retain(|byte| *byte != 0xff);
                        serde_json::from_slice(&bytes)
                            .ok()
                            .map(|message| Report::Message(source, message))
                    }
                };
                bytes.clear();
                if report.is_some_and(|report| sender.send(report).is_err()) {
                    return;
                }
            }
            let _ = sender.send(Report::Closed);
        });
    }

    /// Calls `look` after each report until it finds what it looks for.
    pub(super) fn wait<T>(
        &mut self,
        what: &str,
        timeout: Duration,
        mut look: impl FnMut(&mut Self) -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(found) = look(self) {
                return Ok(found);
            }
            if self.open == 0 {
                bail!("waiting for {what}: QEMU has gone\n{}", self.tail(40));
            }
            if !self.take_in(deadline)? {
                bail!("waited {timeout:?} for {what}\n{}", self.tail(40));
            }
        }
    }

    /// Takes in what arrives until `deadline`, at most one report; whether there was one.
    pub(super) fn take_in(&mut self, deadline: Instant) -> Result<bool> {
        let left = deadline.saturating_duration_since(Instant::now());
        let report = match self.reports.recv_timeout(left) {
            Ok(report) => report,
            Err(RecvTimeoutError::Timeout) => return Ok(false),
            Err(RecvTimeoutError::Disconnected) => bail!("the watch keeps a sender itself"),
        };
        let at = self.start.elapsed();
        match report {
            Report::Serial(line) => {
                self.lines.push_back(Line::Serial(line.clone()));
                self.serial.push((at, line));
            }
            Report::Journal(event) => {
                let is_new = event
                    .field("__CURSOR")
                    .is_none_or(|cursor| self.cursors.insert(cursor.to_owned()));
                if is_new {
                    self.lines.push_back(Line::Journal(event.clone()));
                    self.events.push((at, event));
                }
            }
            Report::Message(Source::Agent, answer) => self.agent_answers.push_back(answer),
            Report::Message(_, message) => {
                if message["event"] == "VSERPORT_CHANGE" && message["data"]["id"] == "agent" {
                    self.agent_is_there = message["data"]["open"] == true;
                }
                if message["event"] == "RESET" {
                    self.agent_is_there = false;
                }
                match message.get("event") {
                    Some(_) => self.qmp_events.push((at, message)),
                    // The greeting answers nothing.
                    None if message.get("QMP").is_some() => {}
                    None => self.qmp_answers.push_back(message),
                }
            }
            Report::Closed => self.open -= 1,
        }
        Ok(true)
    }

    /// Takes in everything until QEMU has closed its sockets.
    pub(super) fn drain(&mut self, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        while self.open > 0 {
            anyhow::ensure!(
                self.take_in(deadline)?,
                "waited {timeout:?} for QEMU to end\n{}",
                self.tail(40)
            );
        }
        Ok(())
    }

    /// The next line or entry, in the order of arrival; none if `deadline` comes first.
    pub(super) fn next_line(&mut self, deadline: Instant) -> Result<Option<Line>> {
        while self.lines.is_empty() {
            if self.open == 0 {
                bail!("QEMU has gone\n{}", self.tail(40));
            }
            if !self.take_in(deadline)? {
                return Ok(None);
            }
        }
        Ok(self.lines.pop_front())
    }

    pub(super) fn next_event(&mut self, wanted: impl Fn(&Event) -> bool) -> Option<Event> {
        while let Some((_, event)) = self.events.get(self.events_place) {
            self.events_place += 1;
            if wanted(event) {
                return Some(event.clone());
            }
        }
        None
    }

    pub(super) fn next_serial(&mut self, text: &str) -> Option<String> {
        while let Some((_, line)) = self.serial.get(self.serial_place) {
            self.serial_place += 1;
            if line.contains(text) {
                return Some(line.clone());
            }
        }
        None
    }

    pub(super) fn next_qmp(&mut self, name: &str) -> Option<Value> {
        while let Some((_, event)) = self.qmp_events.get(self.qmp_place) {
            self.qmp_place += 1;
            if event["event"] == name {
                return Some(event["data"].clone());
            }
        }
        None
    }

    pub(super) fn count_qmp(&self, name: &str) -> usize {
        let named = |(_, event): &&(Duration, Value)| event["event"] == name;
        self.qmp_events.iter().filter(named).count()
    }

    pub(super) fn events(&self, message_id: &str) -> Vec<Event> {
        let with_id = |event: &&Event| event.message_id() == Some(message_id);
        let events = self.events.iter().map(|(_, event)| event);
        events.filter(with_id).cloned().collect()
    }

    /// The next answer from QMP or the guest agent: what it returned, or its error.
    pub(super) fn answer(&mut self, source: Source) -> Option<Result<Value, Value>> {
        let mut answer = match source {
            Source::Agent => self.agent_answers.pop_front()?,
            Source::Qmp | Source::Serial | Source::Journal => self.qmp_answers.pop_front()?,
        };
        Some(match answer.get_mut("return") {
            Some(value) => Ok(value.take()),
            None => Err(answer["error"]["desc"].take()),
        })
    }

    pub(super) fn agent_is_there(&self) -> bool {
        self.agent_is_there
    }

    /// A number that no answer carries yet.
    pub(super) fn next_id(&mut self) -> u32 {
        self.synchronisations += 1;
        self.synchronisations
    }

    /// The last `count` lines of each kind.
    pub(super) fn tail(&self, count: usize) -> String {
        let mut text = String::new();
        let mut section = |title: &str, lines: Vec<(Duration, String)>| {
            text += &format!("-- {title}\n");
            for (at, line) in &lines[lines.len().saturating_sub(count)..] {
                text += &format!("{:8.2}  {line}\n", at.as_secs_f64());
            }
        };
        section("serial console", self.serial.clone());
        let described = |event: &Event| {
            let id = event.message_id().unwrap_or("-");
            let message = event.field("MESSAGE").unwrap_or_default();
            format!("{id}  {message}")
        };
        let events = self.events.iter();
        section(
            "journal",
            events.map(|(at, e)| (*at, described(e))).collect(),
        );
        let qmp = self.qmp_events.iter();
        section(
            "machine",
            qmp.map(|(at, e)| (*at, e["event"].to_string() + &e["data"].to_string()))
                .collect(),
        );
        text
    }
}

pub(super) fn write_line(stream: &mut UnixStream, message: &Value) -> Result<()> {
    let mut line = message.to_string();
    line.push('\n');
    write_bytes(stream, line.as_bytes())
}

pub(super) fn write_bytes(stream: &mut UnixStream, bytes: &[u8]) -> Result<()> {
    stream
        .write_all(bytes)
        .context("writing to QEMU: it has gone")
}

/// A line of a terminal's output without its line end, escape sequences and other control characters.
fn plain(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut plain = String::new();
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        match character {
            '\x1b' => {
                // A control sequence ends with a letter or `@` to `~`; any other sequence here is two characters.
                if characters.next() == Some('[') {
                    characters.find(|c| ('@'..='~').contains(c));
                }
            }
            c if c.is_control() && c != '\t' => {}
            c => plain.push(c),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_serial_line_is_freed_from_escape_sequences() {
        for (raw, expected) in [
            (
                &b"[\x1b[0;32m  OK  \x1b[0m] Started.\r\n"[..],
                "[  OK  ] Started.",
            ),
            (
                b"\x1b[2J\x1b[01;01Hoffshoot: trial 1\n",
                "offshoot: trial 1",
            ),
            (b"\x1bcplain\r", "plain"),
            (b"\xff", "\u{fffd}"),
            (b"\x1b[", ""),
        ] {
            assert_eq!(plain(raw), expected);
        }
    }
}
