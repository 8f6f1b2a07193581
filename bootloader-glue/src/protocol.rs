//! The boot-counter protocol, pure: what the environment says, what the bootloader does with it, what the kernel is told.
//!
//! | environment | the bootloader | kernel arguments |
//! |---|---|---|
//! | absent (never initialised) | boots entry 0, writes nothing | |
//! | `upgrade_available=0` | boots entry 0, writes nothing | |
//! | armed, `rollback=0`, `bootcount < bootlimit` | `bootcount` + 1, saves, boots entry 0 | `offshoot.trial=N` and [`TRIAL_ARGUMENTS`] |
//! | … but the save fails | boots entry 1 | `offshoot.fallback=unsaved` |
//! | armed, `rollback=0`, exhausted | `rollback=1`, saves if it can, boots entry 1 | `offshoot.fallback=exhausted` |
//! | armed, `rollback=1` | boots entry 1, writes nothing | `offshoot.fallback=exhausted` |
//! | corrupt (no valid copy) | boots entry 1, writes nothing | `offshoot.fallback=corrupt` |
//!
//! Where entry 1 does not exist, entry 0 is booted with the same arguments. A corrupt environment boots entry 1 because that
//! one is known good in every state in which a trial may be pending: it was confirmed when it was the default.
//! [`boot`] is this table; the bootloaders' scripts are checked against it.

use std::fmt;

/// What a trial boot is told besides its mark: a panic, and an initramfs that finds no root, end in a reboot that counts.
pub const TRIAL_ARGUMENTS: &str = "panic=10 rd.shell=0 rd.emergency=reboot";

/// The variables of the boot environment, in the names integrators know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Counter {
    /// A trial is armed.
    pub upgrade_available: bool,
    /// Boots of this trial so far, 0 to 9.
    pub bootcount: u8,
    /// Boots that a trial gets, 1 to 9.
    pub bootlimit: u8,
    /// The bootloader gave the trial up.
    pub rollback: bool,
}

/// What can be read of the boot environment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Environment {
    /// Never initialised.
    Absent,
    /// It exists and no copy of it is valid.
    Corrupt,
    /// `damaged`: a copy beside the one that was read is invalid or missing.
    Valid { counter: Counter, damaged: bool },
}

/// Why the bootloader did not boot the default.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fallback {
    /// The tries were used up.
    Exhausted,
    /// The count could not be saved.
    Unsaved,
    /// The environment is unreadable.
    Corrupt,
    /// The default's kernel could not be loaded.
    Unloadable,
}

/// What the bootloader tells the kernel, and so userspace, about its choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mark {
    Normal,
    Trial { tries: u8 },
    Fallback(Fallback),
}

/// What the bootloader does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Boot {
    /// The entry it boots: 0 is the default, 1 the one before.
    pub entry: usize,
    pub mark: Mark,
    /// What it saved, if it saved.
    pub saved: Option<Counter>,
}

/// The kernel command line does not carry one mark of ours.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotAMark {
    #[error("the kernel command line has {argument:?}: expected offshoot.trial=1 to 9")]
    Tries { argument: String },
    #[error(
        "the kernel command line has {argument:?}: expected offshoot.fallback=exhausted, unsaved, corrupt or unloadable"
    )]
    Reason { argument: String },
    #[error(
        "the kernel command line has both {first:?} and {second:?}: the bootloader passes one of them"
    )]
    Two { first: String, second: String },
}

/// The bootloader's decision, with `entries` boot entries and an environment that it can write or not.
pub fn boot(environment: &Environment, entries: usize, saves: bool) -> Boot {
    let fallback = |why, saved| Boot {
        entry: usize::from(entries > 1),
        mark: Mark::Fallback(why),
        saved,
    };
    let normal = Boot {
        entry: 0,
        mark: Mark::Normal,
        saved: None,
    };
    let counter = match *environment {
        Environment::Absent => return normal,
        Environment::Corrupt => return fallback(Fallback::Corrupt, None),
        Environment::Valid { counter, .. } => counter,
    };
    if !counter.upgrade_available {
        normal
    } else if counter.rollback {
        fallback(Fallback::Exhausted, None)
    } else if counter.bootcount >= counter.bootlimit {
        fallback(
            Fallback::Exhausted,
            saves.then_some(Counter {
                rollback: true,
                ..counter
            }),
        )
    } else if !saves {
        fallback(Fallback::Unsaved, None)
    } else {
        let counted = Counter {
            bootcount: counter.bootcount + 1,
            ..counter
        };
        Boot {
            entry: 0,
            mark: Mark::Trial {
                tries: counted.bootcount,
            },
            saved: Some(counted),
        }
    }
}

impl Fallback {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Exhausted => "exhausted",
            Self::Unsaved => "unsaved",
            Self::Corrupt => "corrupt",
            Self::Unloadable => "unloadable",
        }
    }
}

impl Mark {
    /// Reads the mark off a kernel command line. No mark is [`Mark::Normal`]; a mangled one is an error, not a guess.
    pub fn from_kernel_command_line(line: &str) -> Result<Self, NotAMark> {
        let mut found: Option<(Self, &str)> = None;
        for argument in line.split_ascii_whitespace() {
            let (key, value) = argument.split_once('=').unwrap_or((argument, ""));
            let mark = match key {
                "offshoot.trial" => match value.as_bytes() {
                    [digit @ b'1'..=b'9'] => Self::Trial {
                        tries: digit - b'0',
                    },
                    _ => {
                        return Err(NotAMark::Tries {
                            argument: argument.to_owned(),
                        });
                    }
                },
                "offshoot.fallback" => {
                    let all = [
                        Fallback::Exhausted,
                        Fallback::Unsaved,
                        Fallback::Corrupt,
                        Fallback::Unloadable,
                    ];
                    match all.into_iter().find(|why| why.name() == value) {
                        Some(why) => Self::Fallback(why),
                        None => {
                            return Err(NotAMark::Reason {
                                argument: argument.to_owned(),
                            });
                        }
                    }
                }
                _ => continue,
            };
            if let Some((_, first)) = found {
                return Err(NotAMark::Two {
                    first: first.to_owned(),
                    second: argument.to_owned(),
                });
            }
            found = Some((mark, argument));
        }
        Ok(found.map_or(Self::Normal, |(mark, _)| mark))
    }
}

/// The kernel arguments of the mark; nothing for [`Mark::Normal`].
impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Normal => Ok(()),
            Self::Trial { tries } => write!(f, "offshoot.trial={tries} {TRIAL_ARGUMENTS}"),
            Self::Fallback(why) => write!(f, "offshoot.fallback={}", why.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_is_told_is_what_userspace_reads() {
        let reasons = [
            Fallback::Exhausted,
            Fallback::Unsaved,
            Fallback::Corrupt,
            Fallback::Unloadable,
        ];
        let marks = (1..=9)
            .map(|tries| Mark::Trial { tries })
            .chain(reasons.map(Mark::Fallback))
            .chain([Mark::Normal]);
        for mark in marks {
            let line = format!("BOOT_IMAGE=/vmlinuz root=LABEL=root {mark} quiet\n");
            assert_eq!(Mark::from_kernel_command_line(&line), Ok(mark));
        }
    }

    #[test]
    fn a_mangled_mark_is_an_error() {
        for argument in [
            "offshoot.trial",
            "offshoot.trial=0",
            "offshoot.trial=10",
            "offshoot.trial=x",
        ] {
            let error = NotAMark::Tries {
                argument: argument.to_owned(),
            };
            assert_eq!(Mark::from_kernel_command_line(argument), Err(error));
        }
        for argument in [
            "offshoot.fallback",
            "offshoot.fallback=",
            "offshoot.fallback=soon",
        ] {
            let error = NotAMark::Reason {
                argument: argument.to_owned(),
            };
            assert_eq!(Mark::from_kernel_command_line(argument), Err(error));
        }
        let two = NotAMark::Two {
            first: "offshoot.trial=1".to_owned(),
            second: "offshoot.fallback=corrupt".to_owned(),
        };
        assert_eq!(
            Mark::from_kernel_command_line("offshoot.trial=1 offshoot.fallback=corrupt"),
            Err(two)
        );
    }
}
