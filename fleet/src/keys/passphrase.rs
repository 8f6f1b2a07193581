//! What opens a key: from a file, from the environment, or from whoever sits there.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::rc::Rc;

use anyhow::{Context as _, Result, ensure};
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};
use zeroize::Zeroizing;

pub(crate) const VARIABLE: &str = "OFFSHOOT_FLEET_PASSPHRASE";

pub(crate) type Secret = Zeroizing<String>;

/// Where passphrases and PINs come from.
#[derive(Clone, Default)]
pub(crate) struct Passphrases {
    source: Source,
    /// Passphrases that were typed, so that what is the same for many keys is asked for once.
    typed: Rc<RefCell<Vec<Secret>>>,
}

#[derive(Clone, Default)]
enum Source {
    #[default]
    Terminal,
    File(PathBuf),
    Given(Secret),
}

impl Passphrases {
    /// The file before the environment before the terminal.
    pub(crate) fn from(file: Option<PathBuf>) -> Self {
        let source = match (file, std::env::var(VARIABLE)) {
            (Some(file), _) => Source::File(file),
            (None, Ok(text)) => Source::Given(Zeroizing::new(text)),
            (None, Err(_)) => Source::Terminal,
        };
        Self {
            source,
            typed: Rc::default(),
        }
    }

    /// Whether one can be had.
    pub(crate) fn are_at_hand(&self) -> bool {
        match self.source {
            Source::File(_) | Source::Given(_) => true,
            Source::Terminal => terminal().is_ok(),
        }
    }

    /// What `attempt` makes of the passphrase of `what`.
    pub(crate) fn open<T>(&self, what: &str, attempt: impl Fn(&str) -> Result<T>) -> Result<T> {
        if let Some(given) = self.given()? {
            return attempt(&given);
        }
        let mut typed = self.typed.borrow_mut();
        if let Some(opened) = typed.iter().find_map(|secret| attempt(secret).ok()) {
            return Ok(opened);
        }
        let secret = prompt(&format!("passphrase of {what}: "))?;
        let opened = attempt(&secret)?;
        typed.push(secret);
        Ok(opened)
    }

    /// One for keys that are made now; typed twice.
    pub(crate) fn of_new(&self, what: &str) -> Result<Secret> {
        let secret = match (self.given()?, self.typed.borrow().last()) {
            (Some(given), _) => given,
            (None, Some(typed)) => typed.clone(),
            (None, None) => {
                let first = prompt(&format!("new passphrase of {what}: "))?;
                let second = prompt("the same again: ")?;
                ensure!(
                    first == second,
                    "they are not the same: nothing was made, try again"
                );
                first
            }
        };
        ensure!(
            !secret.is_empty(),
            "the passphrase of {what} is empty: give one"
        );
        self.typed.borrow_mut().push(secret.clone());
        Ok(secret)
    }

    /// The PIN of a token, asked for once: a passphrase that was typed is not tried.
    pub(crate) fn pin(&self, what: &str) -> Result<Secret> {
        match self.given()? {
            Some(given) => Ok(given),
            None => prompt(&format!("PIN of {what}: ")),
        }
    }

    fn given(&self) -> Result<Option<Secret>> {
        match &self.source {
            Source::Terminal => Ok(None),
            Source::Given(secret) => Ok(Some(secret.clone())),
            Source::File(path) => {
                let text = fs::read_to_string(path).map(Zeroizing::new);
                let text = text.with_context(|| format!("reading {}", path.display()))?;
                Ok(Some(line_of(&text)))
            }
        }
    }
}

fn line_of(text: &str) -> Secret {
    Zeroizing::new(text.trim_end_matches(['\r', '\n']).to_owned())
}

impl std::fmt::Debug for Passphrases {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Passphrases")
    }
}

fn terminal() -> std::io::Result<File> {
    File::options().read(true).write(true).open("/dev/tty")
}

/// Typed on the terminal, unseen.
fn prompt(text: &str) -> Result<Secret> {
    let mut tty = terminal().with_context(|| {
        format!(
            "{text}there is no terminal to ask on: give it with --passphrase-file or {VARIABLE}"
        )
    })?;
    let before = tcgetattr(&tty).context("asking the terminal")?;
    let mut silent = before.clone();
    silent.local_modes.remove(LocalModes::ECHO);
    tcsetattr(&tty, OptionalActions::Drain, &silent).context("silencing the terminal")?;
    let mut line = Zeroizing::new(String::new());
    let typed = write!(tty, "{text}").and_then(|()| BufReader::new(&tty).read_line(&mut line));
    tcsetattr(&tty, OptionalActions::Drain, &before).context("giving the terminal back")?;
    typed
        .and_then(|_| writeln!(tty))
        .context("asking on the terminal")?;
    Ok(line_of(&line))
}
