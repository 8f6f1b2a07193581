//! Commands in the guest, through the QEMU guest agent.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::watch::{self, Source};
use super::{PATIENCE, Vm};

/// What a command in the guest did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// The exit code; 128 and the signal's number if a signal ended it.
    pub status: i64,
    pub stdout: String,
    pub stderr: String,
}

impl Vm {
    /// Waits until the guest agent answers: the guest's user space is up, though not yet everything in it.
    pub fn wait_for_agent(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            self.watch.wait("the guest agent", left, |watch| {
                watch.agent_is_there().then_some(())
            })?;
            if self.synchronise()? {
                return Ok(());
            }
        }
    }

    /// Runs a command in the guest to its end. Its exit status is the caller's business.
    pub fn run<A: AsRef<str>>(&mut self, argv: impl AsRef<[A]>) -> Result<Output> {
        self.run_with_input(argv, b"")
    }

    /// Runs a command that must succeed; what it printed, without white space around it.
    pub fn ask<A: AsRef<str>>(&mut self, argv: impl AsRef<[A]>) -> Result<String> {
        let argv: Vec<&str> = argv.as_ref().iter().map(AsRef::as_ref).collect();
        let output = self.run(&argv)?;
        anyhow::ensure!(output.status == 0, "in the guest, {argv:?}: {output:?}");
        Ok(output.stdout.trim().to_owned())
    }

    /// Starts a command and does not wait for it: it may end the system that the agent runs in.
    pub fn start(&mut self, argv: &[&str]) -> Result<()> {
        self.begin(argv, b"").map(drop)
    }

    /// Writes a file in the guest.
    pub fn write_file(&mut self, path: &str, content: &[u8]) -> Result<()> {
        let argv = ["/bin/sh", "-c", "cat > \"$0\"", path];
        let output = self.run_with_input(argv, content)?;
        anyhow::ensure!(
            output.status == 0,
            "in the guest, writing {path}: {output:?}"
        );
        Ok(())
    }

    /// The bytes of a file in the guest, if there is one.
    pub fn read_file(&mut self, path: &str) -> Result<Option<Vec<u8>>> {
        let output = self.run(["base64", "--wrap=0", path])?;
        match output.status {
            0 => from_base64(output.stdout.trim()).map(Some),
            _ => Ok(None),
        }
    }

    fn run_with_input<A: AsRef<str>>(
        &mut self,
        argv: impl AsRef<[A]>,
        input: &[u8],
    ) -> Result<Output> {
        let argv: Vec<&str> = argv.as_ref().iter().map(AsRef::as_ref).collect();
        let started = self.begin(&argv, input)?;
        let deadline = Instant::now() + PATIENCE;
        let mut pause = Duration::from_millis(10);
        loop {
            let status = self.agent("guest-exec-status", json!({"pid": started["pid"]}))?;
            if status["exited"] == true {
                let text = |field: &str| -> Result<String> {
                    let encoded = status[field].as_str().unwrap_or_default();
                    Ok(String::from_utf8_lossy(&from_base64(encoded)?).into_owned())
                };
                return Ok(Output {
                    status: match (status["exitcode"].as_i64(), status["signal"].as_i64()) {
                        (Some(code), _) => code,
                        (None, Some(signal)) => 128 + signal,
                        (None, None) => bail!("in the guest, {argv:?}: {status}"),
                    },
                    stdout: text("out-data")?,
                    stderr: text("err-data")?,
                });
            }
            anyhow::ensure!(
                Instant::now() < deadline,
                "in the guest, {argv:?} runs for more than {PATIENCE:?}\n{}",
                self.watch.tail(40)
            );
            // The agent can only be asked; meanwhile, what else arrives is taken in.
            let next = Instant::now() + pause;
            while self.watch.take_in(next)? {}
            pause = (2 * pause).min(Duration::from_millis(320));
        }
    }

    fn begin(&mut self, argv: &[&str], input: &[u8]) -> Result<Value> {
        let (program, arguments) = argv.split_first().context("an empty command")?;
        self.wait_for_agent()?;
        self.agent(
            "guest-exec",
            json!({
                "path": program,
                "arg": arguments,
                "input-data": base64(input),
                "capture-output": true,
                "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8"],
            }),
        )
    }

    /// Whether the agent answers in good time. What it still had to say to somebody before is dropped.
    fn synchronise(&mut self) -> Result<bool> {
        let id = self.watch.next_id();
        // The byte that is no JSON makes the agent forget half a command that a reset cut.
        let running = self.running.as_mut().context("the machine is off")?;
        watch::write_bytes(&mut running.agent, &[0xff])?;
        let message = json!({"execute": "guest-sync-delimited", "arguments": {"id": id}});
        watch::write_line(&mut running.agent, &message)?;
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            while let Some(answer) = self.watch.answer(Source::Agent) {
                if answer == Ok(json!(id)) {
                    return Ok(true);
                }
            }
            if !self.watch.agent_is_there() || !self.watch.take_in(deadline)? {
                return Ok(false);
            }
        }
    }

    fn agent(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let running = self.running.as_mut().context("the machine is off")?;
        let message = json!({"execute": command, "arguments": arguments});
        watch::write_line(&mut running.agent, &message)?;
        let what = format!("the guest agent's answer to {command}");
        let answer = self.watch.wait(&what, PATIENCE, |watch| {
            match (watch.answer(Source::Agent), watch.agent_is_there()) {
                (Some(answer), _) => Some(Some(answer)),
                (None, false) => Some(None),
                (None, true) => None,
            }
        })?;
        match answer {
            Some(Ok(value)) => Ok(value),
            Some(Err(error)) => bail!("the guest agent's {command}: {error}"),
            None => bail!(
                "the guest agent went away during {command}: the guest reboots\n{}",
                self.watch.tail(40)
            ),
        }
    }
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

fn base64(bytes: &[u8]) -> String {
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let mut bits = 0;
        for place in 0..3 {
            bits = bits << 8 | u32::from(group.get(place).copied().unwrap_or(0));
        }
        for place in 0..4 {
            match place <= group.len() {
                true => text.push(char::from(
                    ALPHABET[(bits >> (18 - 6 * place)) as usize & 63],
                )),
                false => text.push('='),
            }
        }
    }
    text
}

fn from_base64(text: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let (mut bits, mut count) = (0_u32, 0);
    for digit in text.bytes().filter(|digit| *digit != b'=') {
        let value = ALPHABET
            .iter()
            .position(|known| *known == digit)
            .with_context(|| format!("{digit:#x} is no base64 digit"))?;
        bits = bits << 6 | value as u32;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_rfc_4648() {
        for (plain, encoded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(plain.as_bytes()), encoded);
            assert_eq!(from_base64(encoded).unwrap(), plain.as_bytes());
        }
        assert!(from_base64("Zm9v\n").is_err());
    }
}
