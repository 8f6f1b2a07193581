//! The U-Boot environment: one copy or two, where `fw_env.config` says, shared with U-Boot itself and with `fw_setenv`.
//!
//! | variable | meaning |
//! |---|---|
//! | `upgrade_available`, `bootcount`, `bootlimit`, `rollback` | the [`Counter`] |
//! | `offshoot_count` | the mark: `script` or `bootcount`, who counts ([`Count`]). U-Boot's compiled-in defaults do not have it |
//! | `offshoot_lost` | the boot script has saved the compiled-in defaults, because it found no mark |
//!
//! A U-Boot that finds no valid copy goes on with its compiled-in variables and looks as if nothing were on trial. The mark tells: where it
//! is missing, or a value is out of range, the environment counts as corrupt, for the script and for us alike.
//!
//! Every write, U-Boot's too, replaces the older copy of a redundant environment with all variables in it; they keep their bytes and
//! their order. A power cut leaves the former environment (the write did not happen, or left an invalid copy beside the one that was
//! read) or the new one, however many cuts follow each other. A single environment has no such copy: a cut write leaves none, U-Boot goes on with its defaults, the
//! script finds no mark and boots entry 1, and the variables that only this device had are gone. No trial is armed on one unless the
//! configuration accepts that.
//!
//! Where no copy is valid nothing is written here: only U-Boot knows its compiled-in variables (`bootcmd` among them), and an
//! environment without them would take them away. The boot script saves them, without the mark; [`settle`](crate::Bootloader::settle) adds it.

pub mod image;
mod mtd;
pub mod places;
mod store;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use image::{Endian, Flags, Layout, Variables};
pub use places::ConfigProblem;
use store::Store;

use crate::protocol::{self, Boot, Counter, Environment, Fallback, Mark};
use crate::{Error, Verb};

/// The boot script. What comes before [`BOOT`] decides and saves, the rest boots.
pub const BOOT_CMD: &str = include_str!("uboot/boot.cmd");

/// The line of the script between the two.
pub const BOOT: &str = "# --- boot ---\n";

/// What is compiled into U-Boot.
pub const DEFAULTS: &str = include_str!("uboot/offshoot.env");

/// The first line of a script that counts. The number changes when the meaning of the environment does.
pub const MARKER: &str = "# offshoot boot protocol 1";

/// How the boot script tells the kernel, on every boot, that it ran and who counts.
const COUNTS: &str = "offshoot.counts=";

const COUNT: &str = "offshoot_count";
const LOST: &str = "offshoot_lost";

/// Who counts the boots of a trial.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Count {
    /// The boot script. Any U-Boot that has `saveenv` and the hush shell.
    Script,
    /// U-Boot, before the script runs: `CONFIG_BOOTCOUNT_LIMIT` with `CONFIG_BOOTCOUNT_ENV`.
    Bootcount,
}

/// A device with U-Boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uboot {
    /// `fw_env.config`.
    pub config: PathBuf,
    /// The lock that `fw_printenv` and `fw_setenv` take.
    pub lock: PathBuf,
    pub count: Count,
    /// Arm although there is only one copy.
    pub accept_single: bool,
    /// `/boot`, where `boot.scr` is.
    pub boot: PathBuf,
    pub kernel_command_line: PathBuf,
}

/// Why the counter is not known to be honoured.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotCounting {
    #[error(
        "{} is not offshoot's boot script ({MARKER:?} is not its first line): make it from boot.cmd with `mkimage -T script -A arm64 -d boot.cmd boot.scr`",
        path.display()
    )]
    Script { path: PathBuf },
    #[error(
        "this boot did not come through offshoot's boot script: the kernel command line has no {COUNTS}. If boot.scr was just put there, reboot; \
         otherwise let U-Boot's bootcmd run it (offshoot.env shows how)"
    )]
    NotBooted,
    #[error(
        "U-Boot did not count this boot, so count = \"bootcount\" counts nothing: build U-Boot with CONFIG_BOOTCOUNT_LIMIT and \
         CONFIG_BOOTCOUNT_ENV, or set [bootloader] count = \"script\""
    )]
    NotCounted,
    #[error(
        "U-Boot would stop at its prompt when the tries of a trial are used up, because altbootcmd is {found:?}: \
         fw_setenv altbootcmd 'run bootcmd'"
    )]
    Altbootcmd { found: String },
}

impl Count {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Script => "script",
            Self::Bootcount => "bootcount",
        }
    }
}

/// The bootloader's decision: [`protocol::boot`], and what U-Boot saves besides when it counts.
///
/// U-Boot's counter (`bootcount_inc`) runs before the script on every boot while `upgrade_available` is set, so it also grows where
/// the protocol writes nothing. It does not look whether it could save; the script saves once more and looks.
pub fn boot(environment: &Environment, entries: usize, saves: bool, count: Count) -> Boot {
    let mut boot = protocol::boot(environment, entries, saves);
    if let (Environment::Valid { counter, .. }, Count::Bootcount, true) =
        (environment, count, saves)
        && counter.upgrade_available
    {
        boot.saved = Some(Counter {
            bootcount: (counter.bootcount + 1).min(9),
            rollback: boot.mark == Mark::Fallback(Fallback::Exhausted),
            ..*counter
        });
    }
    boot
}

/// The variables of a fresh, disarmed environment on top of U-Boot's own, for whoever makes an image.
pub fn fresh(mut variables: Variables, bootlimit: u8, count: Count) -> Variables {
    let counter = Counter {
        upgrade_available: false,
        bootcount: 0,
        bootlimit,
        rollback: false,
    };
    put(&mut variables, counter, count);
    variables
}

/// What the variables say; `None` where the mark is missing or a value is out of range.
pub fn counter(variables: &Variables) -> Option<(Counter, Count)> {
    let digit = |name, least, most| match variables.value(name)?.as_slice() {
        [digit @ b'0'..=b'9'] if (least..=most).contains(&(digit - b'0')) => Some(digit - b'0'),
        _ => None,
    };
    let count = [Count::Script, Count::Bootcount]
        .into_iter()
        .find(|count| variables.value(COUNT).as_deref() == Some(count.name().as_bytes()))?;
    let bootcount = match count {
        Count::Script => digit("bootcount", 0, 9)?,
        // U-Boot counts on after the limit; nine is past every limit.
        Count::Bootcount => {
            let value = String::from_utf8(variables.value("bootcount")?).ok()?;
            value.parse::<u32>().ok()?.min(9) as u8
        }
    };
    let counter = Counter {
        upgrade_available: digit("upgrade_available", 0, 1)? == 1,
        bootcount,
        bootlimit: digit("bootlimit", 1, 9)?,
        rollback: digit("rollback", 0, 1)? == 1,
    };
    Some((counter, count))
}

fn put(variables: &mut Variables, counter: Counter, count: Count) {
    variables.drop_nameless();
    variables.remove(LOST);
    variables.set(
        "upgrade_available",
        if counter.upgrade_available { "1" } else { "0" },
    );
    variables.set("bootcount", &counter.bootcount.to_string());
    variables.set("bootlimit", &counter.bootlimit.to_string());
    variables.set("rollback", if counter.rollback { "1" } else { "0" });
    variables.set(COUNT, count.name());
}

/// The copies of an environment as they were read: pure, so that what a cut leaves can be tried without a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copies {
    layout: Layout,
    flags: Flags,
    /// The variables and the flag of each valid copy.
    valid: Vec<Option<(Variables, u8)>>,
}

/// The one write that makes variables what is read from now on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// The copy to write over.
    pub copy: usize,
    /// It is damaged, perhaps by a write that was cut. What both writes have in common could complete the first one if this one is cut
    /// too, so the head of the copy, with the CRC, is zeroed before.
    pub wipe: bool,
    pub bytes: Vec<u8>,
    /// The copy whose flag is cleared afterwards. Only with [`Flags::Boolean`].
    pub obsolete: Option<usize>,
}

impl Copies {
    /// `bytes` has one element for each copy there should be; `None` where it cannot be read.
    pub fn new(layout: Layout, flags: Flags, bytes: &[Option<Vec<u8>>]) -> Self {
        let decode = |bytes: &Option<Vec<u8>>| layout.decode(bytes.as_deref()?);
        Self {
            layout,
            flags,
            valid: bytes.iter().map(decode).collect(),
        }
    }

    /// The copy that U-Boot reads.
    pub fn newer(&self) -> Option<usize> {
        match self.valid.as_slice() {
            [Some((_, first)), Some((_, second))] => Some(self.flags.newer([*first, *second])),
            valid => valid.iter().position(Option::is_some),
        }
    }

    pub fn variables(&self) -> Option<&Variables> {
        let newer = self.newer()?;
        self.valid[newer].as_ref().map(|(variables, _)| variables)
    }

    pub fn environment(&self) -> Environment {
        match self.variables().and_then(counter) {
            Some((counter, _)) => Environment::Valid {
                counter,
                damaged: self.valid.iter().any(Option::is_none),
            },
            None => Environment::Corrupt,
        }
    }

    /// How to make `variables` the environment. Never over the copy that was read, where there are two.
    pub fn write(&self, variables: &Variables) -> Result<Write, image::TooBig> {
        let newer = self.newer();
        let flag = newer
            .and_then(|newer| self.valid[newer].as_ref())
            .map_or(0, |(_, flag)| *flag);
        let copy = match newer {
            Some(newer) if self.layout.redundant => 1 - newer,
            _ => 0,
        };
        let bytes = self.layout.encode(variables, self.flags.next(flag))?;
        let obsolete = newer.filter(|_| self.layout.redundant && self.flags == Flags::Boolean);
        Ok(Write {
            copy,
            wipe: self.valid[copy].is_none(),
            bytes,
            obsolete,
        })
    }
}

/// The environment of a device, held under lock from [`Held::lock`] to the drop.
pub(crate) struct Held {
    uboot: Uboot,
    _lock: File,
    stores: Vec<Store>,
    copies: Copies,
}

impl Held {
    /// Reads the copies, and keeps everybody else out until dropped: others of ours, and libubootenv's tools.
    pub(crate) fn lock(uboot: &Uboot) -> Result<Self, Error> {
        let text = fs::read_to_string(&uboot.config)
            .map_err(|error| Error::io("reading", &uboot.config, &error))?;
        let places = places::parse(&text).map_err(|problem| Error::FwEnvConfig {
            path: uboot.config.clone(),
            problem,
        })?;
        let lock = lock(&uboot.lock).map_err(|error| Error::io("locking", &uboot.lock, &error))?;
        let stores = places
            .iter()
            .map(Store::open)
            .collect::<Result<Vec<_>, _>>()?;
        let flags = stores[0].flags();
        if let Some(other) = stores.iter().find(|store| store.flags() != flags) {
            return Err(Error::UnlikeCopies {
                first: stores[0].path().to_owned(),
                second: other.path().to_owned(),
            });
        }
        let layout = Layout {
            size: places[0].size as usize,
            redundant: places.len() == 2,
            endian: Endian::NATIVE,
        };
        let bytes = stores
            .iter()
            .map(Store::read)
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            uboot: uboot.clone(),
            _lock: lock,
            stores,
            copies: Copies::new(layout, flags, &bytes),
        })
    }

    pub(crate) fn environment(&self) -> Environment {
        self.copies.environment()
    }

    /// Makes `counter` what is read from now on: one write of the older copy, read back.
    pub(crate) fn write(&mut self, counter: Counter, verb: Verb) -> Result<(), Error> {
        if verb == Verb::Arm {
            self.may_arm()?;
        }
        let Some(base) = self.copies.variables() else {
            return Err(Error::NoVariables {
                verb,
                config: self.uboot.config.clone(),
            });
        };
        let mut variables = base.clone();
        put(&mut variables, counter, self.uboot.count);
        let write = self
            .copies
            .write(&variables)
            .map_err(|too_big| Error::TooBig {
                verb,
                config: self.uboot.config.clone(),
                too_big,
            })?;
        let store = &self.stores[write.copy];
        if write.wipe {
            store.wipe()?;
        }
        store.write(&write.bytes)?;
        if store.read()?.as_ref() != Some(&write.bytes) {
            return Err(Error::NotReadBack {
                verb,
                path: store.path().to_owned(),
            });
        }
        if let Some(obsolete) = write.obsolete {
            self.stores[obsolete].clear(Layout::FLAG_AT)?;
        }
        let bytes = self
            .stores
            .iter()
            .map(Store::read)
            .collect::<Result<Vec<_>, _>>()?;
        self.copies = Copies::new(self.copies.layout, self.copies.flags, &bytes);
        Ok(())
    }

    fn may_arm(&self) -> Result<(), Error> {
        if self.copies.layout.redundant || self.uboot.accept_single {
            return Ok(());
        }
        Err(Error::SingleCopy {
            config: self.uboot.config.clone(),
        })
    }

    /// Whether this U-Boot, this script and this environment will honour the counter.
    pub(crate) fn probe(&self) -> Result<(), Error> {
        let Uboot {
            boot,
            kernel_command_line,
            count,
            ..
        } = &self.uboot;
        self.may_arm()?;
        let path = boot.join("boot.scr");
        let script = fs::read(&path).map_err(|error| Error::io("reading", &path, &error))?;
        let not = |why| Err(Error::NotCounting(why));
        if !is_ours(&script) {
            return not(NotCounting::Script { path });
        }
        let line = fs::read_to_string(kernel_command_line)
            .map_err(|error| Error::io("reading", kernel_command_line, &error))?;
        let counts = line
            .split_ascii_whitespace()
            .find_map(|argument| argument.strip_prefix(COUNTS));
        match (counts, count) {
            (None, _) => return not(NotCounting::NotBooted),
            (Some("bootcount"), Count::Bootcount) | (Some(_), Count::Script) => {}
            (Some(_), Count::Bootcount) => return not(NotCounting::NotCounted),
        }
        if *count == Count::Bootcount
            && let Some(variables) = self.copies.variables()
        {
            let found = variables.value("altbootcmd").unwrap_or_default();
            if found != b"run bootcmd" {
                let found = String::from_utf8_lossy(&found).into_owned();
                return not(NotCounting::Altbootcmd { found });
            }
        }
        Ok(())
    }
}

/// The file that the tools lock too. It is opened before it is made, because a sticky directory may forbid root to "make" one that is there.
fn lock(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true);
    let file = match options.open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            options.create(true).truncate(false).open(path)?
        }
        other => other?,
    };
    flock(&file, FlockOperation::LockExclusive)?;
    Ok(file)
}

/// A script image is a header of 64 bytes, the length of the script, a zero, and the script.
fn is_ours(image: &[u8]) -> bool {
    const MAGIC: [u8; 4] = [0x27, 0x05, 0x19, 0x56];
    image.starts_with(&MAGIC)
        && image
            .get(72..)
            .is_some_and(|script| script.starts_with(MARKER.as_bytes()))
}

#[cfg(test)]
mod tests;
