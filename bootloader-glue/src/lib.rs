//! The boot-counter protocol over a bootloader's environment, and what the bootloader runs.
//!
//! - [`protocol`]: the table, pure.
//! - [`grub`]: the GRUB environment block, two copies of it, and the write that a power cut cannot tear.
//! - [`config`]: boot loader entries to `grub.cfg`, with the counting script in it.
//! - [`uboot`]: the U-Boot environment, shared with U-Boot and libubootenv's tools, and the script that U-Boot runs.
//!
//! [`Bootloader`] is the interface: each verb is at most one environment write, read back. A verb whose state is already there
//! writes nothing.

pub mod config;
pub mod grub;
pub mod protocol;
pub mod uboot;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use protocol::{Counter, Environment};

/// The bootloader of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bootloader {
    /// `environment` is the directory of `env.0` and `env.1`, on the EFI system partition; `boot` is `/boot`.
    Grub {
        environment: PathBuf,
        boot: PathBuf,
    },
    Uboot(uboot::Uboot),
}

/// What [`Bootloader::confirm`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Confirmed {
    /// The trial is kept.
    Confirmed,
    /// Nothing was on trial.
    NotArmed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    Arm,
    Confirm,
    Exhaust,
    Settle,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("{doing} {}: {error}", path.display())]
    Io {
        doing: &'static str,
        path: PathBuf,
        kind: io::ErrorKind,
        error: String,
    },
    #[error("{verb:?}: {} does not read back as it was written: replace the storage device", path.display())]
    NotReadBack { verb: Verb, path: PathBuf },
    #[error("{verb:?}: no copy of the boot environment ({}) is valid: settle makes it afresh", place.display())]
    Corrupt { verb: Verb, place: PathBuf },
    #[error("the bootloader has given this trial up (rollback=1): it cannot be confirmed")]
    GivenUp,
    #[error("a trial gets 1 to 9 tries, not {0}")]
    Bootlimit(u8),
    #[error(
        "{} was not written by ostree-grub-generator ({:?} is not its first line), so nothing counts the boots of a trial: \
         deploy once with OSTREE_GRUB2_EXEC=/usr/lib/ostree/ostree-grub-generator",
        path.display(), config::MARKER
    )]
    NotOurs { path: PathBuf },
    #[error("{}: {problem}", path.display())]
    FwEnvConfig {
        path: PathBuf,
        problem: uboot::ConfigProblem,
    },
    #[error(
        "{} and {} are different kinds of storage, whose copies cannot be told apart by age: put both on the same kind",
        first.display(), second.display()
    )]
    UnlikeCopies { first: PathBuf, second: PathBuf },
    #[error(
        "{} names one copy of the environment: a power cut while it is written loses every variable of it. Build U-Boot with \
         CONFIG_SYS_REDUNDAND_ENVIRONMENT and name both copies, or accept that with [bootloader] accept_single = true",
        config.display()
    )]
    SingleCopy { config: PathBuf },
    #[error(
        "{verb:?}: no copy of the environment that {} names is valid, and only U-Boot knows the variables it has compiled in: \
         reboot, and the boot script saves them (or write them with `fw_setenv -f u-boot-initial-env`). If it stays so, the \
         offsets there are not U-Boot's, or U-Boot cannot write",
        config.display()
    )]
    NoVariables { verb: Verb, config: PathBuf },
    #[error("{verb:?}: the environment that {} names is too small: {too_big}", config.display())]
    TooBig {
        verb: Verb,
        config: PathBuf,
        too_big: uboot::image::TooBig,
    },
    #[error(transparent)]
    NotCounting(#[from] uboot::NotCounting),
}

impl Error {
    fn io(doing: &'static str, path: &Path, error: &io::Error) -> Self {
        Self::Io {
            doing,
            path: path.to_owned(),
            kind: error.kind(),
            error: error.to_string(),
        }
    }
}

impl Bootloader {
    pub fn read(&self) -> Result<Environment, Error> {
        Ok(self.held()?.environment())
    }

    /// Begins a trial of `bootlimit` boots. Both copies are valid afterwards, so that the bootloader can count.
    pub fn arm(&self, bootlimit: u8) -> Result<(), Error> {
        if !(1..=9).contains(&bootlimit) {
            return Err(Error::Bootlimit(bootlimit));
        }
        let armed = Counter {
            upgrade_available: true,
            bootcount: 0,
            bootlimit,
            rollback: false,
        };
        self.change(Verb::Arm, |_| Ok(Some(armed)))
    }

    /// Keeps the trial.
    pub fn confirm(&self) -> Result<Confirmed, Error> {
        let mut confirmed = Confirmed::NotArmed;
        self.change(Verb::Confirm, |counter| match counter {
            Counter {
                upgrade_available: false,
                ..
            } => Ok(None),
            Counter { rollback: true, .. } => Err(Error::GivenUp),
            _ => {
                confirmed = Confirmed::Confirmed;
                Ok(Some(Counter {
                    upgrade_available: false,
                    bootcount: 0,
                    ..counter
                }))
            }
        })?;
        Ok(confirmed)
    }

    /// Uses up the tries of the trial, if there is one.
    pub fn exhaust(&self) -> Result<(), Error> {
        self.change(Verb::Exhaust, |counter| {
            Ok(counter.upgrade_available.then_some(Counter {
                bootcount: counter.bootlimit,
                ..counter
            }))
        })
    }

    /// Ends whatever is armed; makes a damaged or corrupt environment whole.
    pub fn settle(&self) -> Result<(), Error> {
        self.change(Verb::Settle, |counter| {
            Ok(Some(Counter {
                upgrade_available: false,
                bootcount: 0,
                rollback: false,
                ..counter
            }))
        })
    }

    /// Whether the bootloader that is installed will honour the counter.
    pub fn probe(&self) -> Result<(), Error> {
        let (environment, boot) = match self {
            Self::Grub { environment, boot } => (environment, boot),
            Self::Uboot(uboot) => return uboot::Held::lock(uboot)?.probe(),
        };
        grub::Held::lock(environment)?;
        let path = boot.join("loader/grub.cfg");
        let config =
            fs::read_to_string(&path).map_err(|error| Error::io("reading", &path, &error))?;
        match config.lines().next() {
            Some(config::MARKER) => Ok(()),
            _ => Err(Error::NotOurs { path }),
        }
    }

    fn held(&self) -> Result<Held, Error> {
        match self {
            Self::Grub { environment, .. } => grub::Held::lock(environment).map(Held::Grub),
            Self::Uboot(uboot) => uboot::Held::lock(uboot).map(Held::Uboot),
        }
    }

    /// Where the environment is, for errors.
    fn place(&self) -> &Path {
        match self {
            Self::Grub { environment, .. } => environment,
            Self::Uboot(uboot) => &uboot.config,
        }
    }

    /// `to` says what the counter becomes, or `None` to leave it. A copy that is damaged is made whole besides.
    fn change(
        &self,
        verb: Verb,
        to: impl FnOnce(Counter) -> Result<Option<Counter>, Error>,
    ) -> Result<(), Error> {
        let mut held = self.held()?;
        let unset = Counter {
            upgrade_available: false,
            bootcount: 0,
            bootlimit: 3,
            rollback: false,
        };
        let (counter, exists) = match (held.environment(), verb) {
            (Environment::Valid { counter, .. }, _) => (counter, true),
            (Environment::Absent, _) | (Environment::Corrupt, Verb::Settle) => (unset, false),
            (Environment::Corrupt, Verb::Arm | Verb::Confirm | Verb::Exhaust) => {
                return Err(Error::Corrupt {
                    verb,
                    place: self.place().to_owned(),
                });
            }
        };
        let Some(next) = to(counter)? else {
            return Ok(());
        };
        if !exists || next != counter {
            // Healed before, not after: what is written last is what counts, and GRUB needs a good copy to write over.
            if exists
                && held.environment()
                    == (Environment::Valid {
                        counter,
                        damaged: true,
                    })
            {
                held.write(counter, verb)?;
            }
            held.write(next, verb)?;
        }
        if matches!(held.environment(), Environment::Valid { damaged: true, .. }) {
            held.write(next, verb)?;
        }
        Ok(())
    }
}

/// The environment of a device, under lock until dropped.
enum Held {
    Grub(grub::Held),
    Uboot(uboot::Held),
}

impl Held {
    fn environment(&self) -> Environment {
        match self {
            Self::Grub(held) => held.environment(),
            Self::Uboot(held) => held.environment(),
        }
    }

    fn write(&mut self, counter: Counter, verb: Verb) -> Result<(), Error> {
        match self {
            Self::Grub(held) => held.write(counter, verb),
            Self::Uboot(held) => held.write(counter, verb),
        }
    }
}

#[cfg(test)]
mod tests;
