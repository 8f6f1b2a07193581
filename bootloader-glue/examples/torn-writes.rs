//! Cuts the power at random moments of environment writes, ours and `fw_setenv`'s, and prints what was read afterwards.
//!
//! `cargo run --release -p bootloader-glue --example torn-writes [CUTS [SEED]]`, 10000 cuts a row by default. Needs libubootenv-tool.
//!
//! - `file`: the real writers on real files. What a writer changed is cut: whole sectors of the write that was under way have reached
//!   the medium in any order, one of them in part; the writes before it are whole, those after it have not begun.
//! - `NOR`, `NAND`: our writes on a model of flash. An erase that is cut leaves any bits of the sector set, a program stops at any byte.
//!   There is no such row for `fw_setenv`: it takes a kernel's MTD device.
//!
//! The next write begins with what the cut left. An environment that is lost is made afresh and counted. The exit code is 1 when a writer
//! of ours lost a redundant environment, or left one that is neither the former nor the new.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use bootloader_glue::Bootloader;
use bootloader_glue::protocol::{Counter, Environment};
use bootloader_glue::uboot::image::{Endian, Flags, Layout, Variables};
use bootloader_glue::uboot::{Copies, Count, Uboot, counter, fresh};

type Error = Box<dyn std::error::Error>;
type Bytes = Vec<Option<Vec<u8>>>;

const SIZE: usize = 0x2000;
const SECTOR: usize = 512;

/// A board's own variables: about as many as boards have.
fn variables() -> Variables {
    let mut variables =
        Variables::from_text("altbootcmd=run bootcmd\nbootcmd=run offshoot_start\n");
    for n in 0..61 {
        variables.set(
            &format!("scan_dev_for_{n}"),
            "if test -e ${devtype} ${devnum}; then run x; fi",
        );
    }
    variables
}

fn main() -> Result<ExitCode, Error> {
    let mut arguments = std::env::args().skip(1);
    let cuts: u32 = arguments.next().map_or(Ok(10_000), |text| text.parse())?;
    let seed: u64 = arguments.next().map_or(Ok(1), |text| text.parse())?;
    println!("{cuts} cuts a row, seed {seed}\n");
    println!("| writer | store | copies | former | new | neither | unreadable |");
    println!("|---|---|---|---|---|---|---|");
    let mut well = true;
    for copies in [2, 1] {
        for (name, writer) in [
            ("offshoot", Writer::Ours),
            ("fw_setenv", Writer::FwSetenv { calls: 1 }),
            (
                "fw_setenv, a call for each variable",
                Writer::FwSetenv { calls: 4 },
            ),
        ] {
            let tally = on_files(writer, copies, cuts, &mut Random(seed))?;
            println!("| {name} | file | {copies} | {tally} |");
            well &= copies == 1 || writer != Writer::Ours || tally.is_well();
        }
    }
    for (name, flags) in [("NOR", Flags::Boolean), ("NAND", Flags::Incremental)] {
        let tally = on_flash(flags, cuts, &mut Random(seed))?;
        println!("| offshoot | {name} | 2 | {tally} |");
        well &= tally.is_well();
    }
    Ok(if well {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Writer {
    Ours,
    FwSetenv { calls: usize },
}

#[derive(Default)]
struct Tally {
    former: u32,
    new: u32,
    neither: u32,
    unreadable: u32,
}

impl Tally {
    fn count(&mut self, former: &Variables, new: &Variables, left: Option<&Variables>) {
        match left {
            None => self.unreadable += 1,
            Some(left) if meaning(left) == meaning(new) => self.new += 1,
            Some(left) if meaning(left) == meaning(former) => self.former += 1,
            Some(_) => self.neither += 1,
        }
    }

    fn is_well(&self) -> bool {
        self.neither + self.unreadable == 0
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            former,
            new,
            neither,
            unreadable,
        } = self;
        write!(f, "{former} | {new} | {neither} | {unreadable}")
    }
}

/// The variables, whatever their order: `fw_setenv` sorts them.
fn meaning(variables: &Variables) -> BTreeSet<&[u8]> {
    variables.entries().collect()
}

fn layout(copies: usize) -> Layout {
    Layout {
        size: SIZE,
        redundant: copies == 2,
        endian: Endian::NATIVE,
    }
}

fn made_afresh(copies: usize, flags: Flags) -> Result<Bytes, Error> {
    let variables = fresh(variables(), 3, Count::Script);
    let flag = |copy| match flags {
        Flags::Incremental => 1 - copy as u8,
        Flags::Boolean => u8::from(copy == 0),
    };
    let copy = |copy| Ok(Some(layout(copies).encode(&variables, flag(copy))?));
    (0..copies).map(copy).collect()
}

/// A device's environment in files, and its bootloader.
struct Device {
    directory: tempfile::TempDir,
    copies: usize,
    bootloader: Bootloader,
}

impl Device {
    fn new(copies: usize) -> Result<Self, Error> {
        let directory = tempfile::tempdir()?;
        let at = |name: &str| directory.path().join(name);
        let line = |copy| format!("{} 0x0 {SIZE:#x}\n", at(&format!("env.{copy}")).display());
        fs::write(
            at("fw_env.config"),
            (0..copies).map(line).collect::<String>(),
        )?;
        let bootloader = Bootloader::Uboot(Uboot {
            config: at("fw_env.config"),
            lock: at("lock"),
            count: Count::Script,
            accept_single: true,
            boot: PathBuf::new(),
            kernel_command_line: PathBuf::new(),
        });
        Ok(Self {
            directory,
            copies,
            bootloader,
        })
    }

    fn path(&self, copy: usize) -> PathBuf {
        self.directory.path().join(format!("env.{copy}"))
    }

    fn set(&self, bytes: &Bytes) -> Result<(), Error> {
        for (copy, bytes) in bytes.iter().enumerate() {
            fs::write(self.path(copy), bytes.as_deref().unwrap_or_default())?;
        }
        Ok(())
    }

    fn bytes(&self) -> Result<Bytes, Error> {
        (0..self.copies)
            .map(|copy| Ok(Some(fs::read(self.path(copy))?)))
            .collect()
    }

    /// Makes the environment say `to`.
    fn change(&self, writer: Writer, to: Counter) -> Result<(), Error> {
        let Counter {
            upgrade_available,
            bootcount,
            bootlimit,
            rollback,
        } = to;
        let number = |flag: bool| u8::from(flag).to_string();
        match writer {
            // The verbs that lead there: each is one change.
            Writer::Ours if !upgrade_available => self.bootloader.settle()?,
            Writer::Ours if bootcount == 0 => self.bootloader.arm(bootlimit)?,
            Writer::Ours => self.bootloader.exhaust()?,
            Writer::FwSetenv { calls } => {
                let pairs = [
                    ["upgrade_available".to_owned(), number(upgrade_available)],
                    ["bootcount".to_owned(), bootcount.to_string()],
                    ["bootlimit".to_owned(), bootlimit.to_string()],
                    ["rollback".to_owned(), number(rollback)],
                ];
                for pairs in pairs.chunks(4 / calls) {
                    fw_setenv(
                        &self.directory.path().join("fw_env.config"),
                        pairs.as_flattened(),
                    )?;
                }
            }
        }
        Ok(())
    }
}

fn fw_setenv(config: &Path, arguments: &[String]) -> Result<(), Error> {
    let output = Command::new("fw_setenv")
        .arg("-c")
        .arg(config)
        .args(arguments)
        .output()?;
    if !output.status.success() {
        return Err(format!("fw_setenv {arguments:?}: {output:?}").into());
    }
    Ok(())
}

/// A change of the counter that the next verb may be asked for.
fn another(from: &Counter, random: &mut Random) -> Counter {
    let settled = Counter {
        upgrade_available: false,
        bootcount: 0,
        rollback: false,
        ..*from
    };
    let armed = Counter {
        upgrade_available: true,
        bootlimit: 1 + random.below(9) as u8,
        ..settled
    };
    let exhausted = Counter {
        bootcount: from.bootlimit,
        ..*from
    };
    if !from.upgrade_available {
        armed
    } else if random.below(2) == 0 && exhausted != *from {
        exhausted
    } else {
        settled
    }
}

fn on_files(writer: Writer, copies: usize, cuts: u32, random: &mut Random) -> Result<Tally, Error> {
    let device = Device::new(copies)?;
    let mut tally = Tally::default();
    let mut before = made_afresh(copies, Flags::Incremental)?;
    for _ in 0..cuts {
        let read = |bytes: &Bytes| {
            Copies::new(layout(copies), Flags::Incremental, bytes)
                .variables()
                .cloned()
        };
        let former = read(&before).ok_or("the environment to begin with is unreadable")?;
        let (from, _) = counter(&former).ok_or("the environment to begin with has no counter")?;
        let to = another(&from, random);
        device.set(&before)?;
        // Every state of the files between two writes.
        let mut states = vec![before.clone()];
        match writer {
            Writer::Ours => {
                device.change(writer, to)?;
                states.extend(steps(&before, &device.bytes()?));
            }
            Writer::FwSetenv { calls: 1 } => {
                device.change(writer, to)?;
                states.push(device.bytes()?);
            }
            Writer::FwSetenv { .. } => {
                let fields = [
                    Counter {
                        upgrade_available: to.upgrade_available,
                        ..from
                    },
                    Counter {
                        upgrade_available: to.upgrade_available,
                        bootcount: to.bootcount,
                        ..from
                    },
                    Counter {
                        rollback: from.rollback,
                        ..to
                    },
                    to,
                ];
                for field in fields {
                    device.change(Writer::FwSetenv { calls: 1 }, field)?;
                    states.push(device.bytes()?);
                }
                states.dedup();
            }
        }
        let new =
            read(states.last().ok_or("no state")?).ok_or("the new environment is unreadable")?;
        let at = random.below(states.len() - 1);
        let left = states[at]
            .iter()
            .zip(&states[at + 1])
            .map(|(before, after)| match (before, after) {
                (Some(before), Some(after)) if before != after => {
                    Some(torn_sectors(before, after, random))
                }
                (before, _) => before.clone(),
            })
            .collect();
        tally.count(&former, &new, read(&left).as_ref());
        before = if environment(&read(&left)) {
            left
        } else {
            made_afresh(copies, Flags::Incremental)?
        };
    }
    Ok(tally)
}

fn environment(variables: &Option<Variables>) -> bool {
    variables
        .as_ref()
        .is_some_and(|variables| counter(variables).is_some())
}

/// The states between the writes of a verb of ours: a damaged copy is made whole first, with the lower flag, and its head is zeroed
/// before that.
fn steps(before: &Bytes, after: &Bytes) -> Vec<Bytes> {
    let mut changed: Vec<usize> = (0..before.len())
        .filter(|copy| before[*copy] != after[*copy])
        .collect();
    if let [Some(first), Some(second)] = after.as_slice() {
        let ahead = first[Layout::FLAG_AT].wrapping_sub(second[Layout::FLAG_AT]);
        if changed.len() == 2 && ahead < 128 {
            changed.reverse();
        }
    }
    let layout = layout(before.len());
    let mut states = Vec::new();
    let mut state = before.clone();
    for copy in changed {
        if let Some(bytes) = &mut state[copy]
            && layout.decode(bytes).is_none()
        {
            bytes[..SECTOR].fill(0);
            states.push(state.clone());
        }
        state[copy].clone_from(&after[copy]);
        states.push(state.clone());
    }
    states
}

fn torn_sectors(before: &[u8], after: &[u8], random: &mut Random) -> Vec<u8> {
    let mut left = before.to_vec();
    // Often nearly nothing or nearly everything: the places where an order matters.
    let odds = [1, 8, 15][random.below(3)];
    for at in (0..after.len()).step_by(SECTOR) {
        if random.below(16) < odds {
            let end = (at + SECTOR).min(after.len());
            let end = if random.below(8) == 0 {
                at + random.below(end - at)
            } else {
                end
            };
            left[at..end].copy_from_slice(&after[at..end]);
        }
    }
    left
}

fn on_flash(flags: Flags, cuts: u32, random: &mut Random) -> Result<Tally, Error> {
    let mut tally = Tally::default();
    let mut bytes = made_afresh(2, flags)?;
    for _ in 0..cuts {
        let copies = Copies::new(layout(2), flags, &bytes);
        let former = copies
            .variables()
            .ok_or("the environment to begin with is unreadable")?
            .clone();
        let (from, _) = counter(&former).ok_or("the environment to begin with has no counter")?;
        let mut new = fresh(former.clone(), 3, Count::Script);
        let to = another(&from, random);
        new.set(
            "upgrade_available",
            if to.upgrade_available { "1" } else { "0" },
        );
        new.set("bootcount", &to.bootcount.to_string());
        new.set("bootlimit", &to.bootlimit.to_string());
        let write = copies.write(&new)?;
        let target = bytes[write.copy].get_or_insert_default();
        match random.below(3) {
            0 => target
                .iter_mut()
                .for_each(|byte| *byte |= random.below(256) as u8),
            1 => {
                let cut = random.below(SIZE);
                target.fill(0xff);
                target[..cut].copy_from_slice(&write.bytes[..cut]);
                target[cut] = write.bytes[cut] | random.below(256) as u8;
            }
            _ => {
                target.copy_from_slice(&write.bytes);
                if let Some(obsolete) = write.obsolete.filter(|_| random.below(2) == 0) {
                    bytes[obsolete].get_or_insert_default()[Layout::FLAG_AT] = 0;
                }
            }
        }
        let copies = Copies::new(layout(2), flags, &bytes);
        tally.count(&former, &new, copies.variables());
        if matches!(copies.environment(), Environment::Corrupt) {
            bytes = made_afresh(2, flags)?;
        }
    }
    Ok(tally)
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % end as u64) as usize
    }
}
