//! The real U-Boot, alone in QEMU, agrees with the protocol's model: which copy it reads, what it decides, what it tells the kernel, and
//! what it leaves in the environment.
//!
//! - [`decides`] runs the deciding part of the boot script over the whole table in one machine, on a store it can write and on one it
//!   cannot.
//! - [`boots`] starts a machine for each case, with the script as it is shipped, down to a kernel that says what it was told.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that fails here says where"
)]

mod boots;
mod decides;

use bootloader_glue::protocol::Counter;
use bootloader_glue::uboot::image::{Flags, Variables};
use bootloader_glue::uboot::{self, Copies, Count};
use qemu_tests::uboot::{LAYOUT, Uboot};

type Bytes = [Option<Vec<u8>>; 2];

/// What stands beside the newest valid copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Beside {
    Older,
    BadCrc,
    BadData,
    Truncated,
    Empty,
    Missing,
}

impl Beside {
    const ALL: [Self; 6] = [
        Self::Older,
        Self::BadCrc,
        Self::BadData,
        Self::Truncated,
        Self::Empty,
        Self::Missing,
    ];

    fn bytes(self, mut bytes: Vec<u8>) -> Option<Vec<u8>> {
        match self {
            Self::Older => {}
            Self::BadCrc => bytes[1] ^= 4,
            Self::BadData => bytes[LAYOUT.size / 2] ^= 1,
            Self::Truncated => bytes.truncate(100),
            Self::Empty => bytes.clear(),
            Self::Missing => return None,
        }
        Some(bytes)
    }
}

fn counter(armed: bool, bootcount: u8, bootlimit: u8, rollback: bool) -> Counter {
    Counter {
        upgrade_available: armed,
        bootcount,
        bootlimit,
        rollback,
    }
}

/// Every armed × rollback × count × limit.
fn counters() -> Vec<Counter> {
    let mut counters = Vec::new();
    for (armed, rollback) in [(false, false), (false, true), (true, false), (true, true)] {
        let numbers = (0..4).flat_map(|count| (1..4).map(move |limit| (count, limit)));
        for (count, limit) in numbers.chain([(8, 9), (9, 9)]) {
            counters.push(counter(armed, count, limit, rollback));
        }
    }
    counters
}

/// An environment with the variables that U-Boot has compiled in and one that it has not.
struct Base(Variables);

impl Base {
    fn of(uboot: &Uboot) -> Self {
        let text = uboot.defaults().unwrap();
        let mut variables = Variables::from_text(&text);
        variables.set("board_note", "kept");
        Self(variables)
    }

    fn with(&self, counter: Counter, count: Count) -> Variables {
        let mut variables = uboot::fresh(self.0.clone(), counter.bootlimit, count);
        let digit = |flag| if flag { "1" } else { "0" };
        variables.set("upgrade_available", digit(counter.upgrade_available));
        variables.set("bootcount", &counter.bootcount.to_string());
        variables.set("rollback", digit(counter.rollback));
        variables
    }

    fn copy(&self, counter: Counter, count: Count, flag: u8) -> Vec<u8> {
        LAYOUT.encode(&self.with(counter, count), flag).unwrap()
    }
}

fn copies(bytes: &Bytes) -> Copies {
    Copies::new(LAYOUT, Flags::Incremental, bytes)
}
