//! The deciding part of the script, over the whole table.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use bootloader_glue::protocol::Environment;
use bootloader_glue::uboot::image::Variables;
use bootloader_glue::uboot::{self, BOOT, BOOT_CMD, Count};
use qemu_tests::cache::Cache;
use qemu_tests::uboot::{COPIES, Disk, LAYOUT, Uboot, script_image};

use super::{Base, Beside, Bytes, copies, counter, counters};

/// The whole table: every counter × which copy is newer × what stands beside it; all pairs of bad copies; what has a good CRC and is
/// corrupt all the same; every pair of flags that may be mistaken; random damage.
fn cases(base: &Base) -> Vec<Bytes> {
    let mut cases = Vec::new();
    let mut flag = 250u8;
    for value in counters() {
        for (newer, beside) in [0, 1]
            .into_iter()
            .flat_map(|newer| Beside::ALL.map(|beside| (newer, beside)))
        {
            flag = flag.wrapping_add(1);
            let older = counter(!value.upgrade_available, 7, 9, !value.rollback);
            let mut bytes = [None, None];
            bytes[newer] = Some(base.copy(value, Count::Script, flag));
            bytes[1 - newer] = beside.bytes(base.copy(older, Count::Script, flag.wrapping_sub(1)));
            cases.push(bytes);
        }
    }

    let armed = counter(true, 0, 3, false);
    let bad = || {
        let all = Beside::ALL.into_iter();
        all.filter(|beside| *beside != Beside::Older)
    };
    for (first, second) in bad().flat_map(|first| bad().map(move |second| (first, second))) {
        let copy = base.copy(armed, Count::Script, 0);
        cases.push([first.bytes(copy.clone()), second.bytes(copy)]);
    }

    for (name, value) in [
        ("offshoot_count", ""),
        ("offshoot_count", "nobody"),
        ("bootcount", ""),
        ("bootcount", "10"),
        ("bootcount", "-1"),
        ("bootlimit", ""),
        ("bootlimit", "0"),
        ("bootlimit", "10"),
        ("rollback", ""),
        ("rollback", "2"),
        ("upgrade_available", ""),
        ("upgrade_available", "yes"),
    ] {
        for lost in [false, true] {
            let mut variables = base.with(armed, Count::Script);
            variables.set(name, value);
            if lost {
                variables.set("offshoot_lost", "1");
            }
            let older = base.copy(armed, Count::Script, 6);
            cases.push([Some(LAYOUT.encode(&variables, 7).unwrap()), Some(older)]);
        }
    }

    let flags = [0, 1, 2, 127, 128, 253, 254, 255];
    for (first, second) in flags
        .into_iter()
        .flat_map(|first| flags.map(|second| (first, second)))
    {
        cases.push([
            Some(base.copy(counter(false, 1, 3, false), Count::Script, first)),
            Some(base.copy(counter(true, 1, 3, false), Count::Script, second)),
        ]);
    }

    let seed = 0x0ff5_4007;
    println!("random damage: seed {seed:#x}");
    let mut random = Random(seed);
    for _ in 0..200 {
        let all = counters();
        let mut any = |flag| {
            let value = all[random.below(all.len())];
            base.copy(value, Count::Script, flag)
        };
        let (old, former, new) = (any(41), any(42), any(43));
        let cut = random.below(LAYOUT.size + 1);
        let mut torn = [&new[..cut], &old[cut..]].concat();
        for _ in 0..random.below(3) {
            let at = random.below(torn.len());
            torn[at] ^= 1 << random.below(8);
        }
        cases.push([Some(torn), Some(former)]);
    }
    cases
}

struct Random(u32);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        for shift in [13, -17, 5] {
            self.0 ^= if shift > 0 {
                self.0 << shift
            } else {
                self.0 >> -shift
            };
        }
        self.0 as usize % end
    }
}

#[test]
fn the_real_uboot_decides_as_the_model_over_the_whole_table() {
    let uboot = Uboot::build(&Cache::open().unwrap(), Count::Script).unwrap();
    let base = Base::of(&uboot);
    let cases = cases(&base);
    assert_eq!(cases.len(), 4 * 14 * 2 * 6 + 25 + 24 + 64 + 200);
    let temp = tempfile::tempdir().unwrap();
    let tree = temp.path().join("tree");
    write_table(&cases, &tree);
    for writable in [true, false] {
        let disk = Disk::with_fat(temp.path().join("disk"), &tree, 64).unwrap();
        let decided = decisions(&uboot.run(&disk, writable, &[]).unwrap());
        assert_eq!(
            decided.len(),
            cases.len(),
            "U-Boot did not get through all cases"
        );
        let after = tempfile::tempdir().unwrap();
        disk.read_boot(after.path()).unwrap();
        let all = fs::read(after.path().join("left")).unwrap();
        for (n, before) in cases.iter().enumerate() {
            let Decided { left, arguments } = &decided[&n];
            let left = [0, 1].map(|copy| {
                let bytes = &all[slot(n, copy)..][..left[copy]];
                (!bytes.is_empty()).then(|| bytes.to_vec())
            });
            check(n, before, &left, arguments, writable);
        }
    }
}

fn check(n: usize, before: &Bytes, left: &Bytes, decided: &str, writable: bool) {
    let case = format!("case {n}, writable {writable}");
    let environment = copies(before).environment();
    let boot = uboot::boot(&environment, 2, writable, Count::Script);
    assert_eq!(decided, boot.mark.to_string(), "{case}: {environment:?}");
    let after = copies(left);
    let variables = copies(before).variables().cloned();
    let lost = |variables: &Variables| variables.value("offshoot_lost").as_deref() == Some(b"1");
    match (boot.saved, &variables) {
        (Some(saved), Some(_)) => {
            let valid = Environment::Valid {
                counter: saved,
                damaged: false,
            };
            assert_eq!(after.environment(), valid, "{case}");
            let newer = copies(before).newer().unwrap();
            assert_eq!(
                left[newer], before[newer],
                "{case}: the copy that was read is written over"
            );
            let note = after.variables().unwrap().value("board_note");
            assert_eq!(note.unwrap(), b"kept", "{case}");
        }
        (None, variables)
            if writable
                && environment == Environment::Corrupt
                && !variables.as_ref().is_some_and(lost) =>
        {
            // What U-Boot has compiled in is there now, and still counts as corrupt.
            assert_eq!(after.environment(), Environment::Corrupt, "{case}");
            let saved = after.variables().unwrap();
            assert!(lost(saved), "{case}");
            assert_eq!(saved.value("altbootcmd").unwrap(), b"run bootcmd");
            assert_eq!(
                saved.value("board_note").is_some(),
                variables.is_some(),
                "{case}"
            );
        }
        _ => {
            let empty = |bytes: &Option<Vec<u8>>| bytes.clone().unwrap_or_default();
            assert_eq!(
                [empty(&left[0]), empty(&left[1])],
                [empty(&before[0]), empty(&before[1])],
                "{case}: written without need: {environment:?}"
            );
        }
    }
}

/// In the machine's memory: where the copies of all cases begin, and where what is left of them goes, a copy in each slot.
const BEFORE: usize = 0x5000_0000;
const LEFT: usize = 0x5800_0000;

fn slot(case: usize, copy: usize) -> usize {
    (case * 2 + copy) * LAYOUT.size
}

/// All copies in one file, and a `boot.scr` that goes through the cases: puts the copies in place, loads the environment as U-Boot does
/// when it starts, decides, and keeps what is left.
fn write_table(cases: &[Bytes], tree: &Path) {
    let (decide, _) = BOOT_CMD.split_once(BOOT).unwrap();
    let mut before = Vec::new();
    let mut all = format!(
        "load virtio 1:2 0x48000000 decide.scr\nload virtio 1:2 0x48100000 case.scr\nload virtio 1:2 {BEFORE:#x} before\n"
    );
    for (n, bytes) in cases.iter().enumerate() {
        let _ = write!(all, "bench_n={n};");
        for (at, bytes) in bytes.iter().enumerate() {
            let size = match bytes {
                Some(bytes) => format!("{:x}", bytes.len()),
                None => "none".to_owned(),
            };
            let (from, to) = (BEFORE + slot(n, at), LEFT + slot(n, at));
            let _ = write!(
                all,
                " bench_size{at}={size}; bench_from{at}={from:x}; bench_to{at}={to:x};"
            );
            before.extend(bytes.as_deref().unwrap_or_default());
            before.resize(slot(n, at + 1), 0);
        }
        all.push_str(" source 0x48100000\n");
    }
    let _ = write!(
        all,
        "fatwrite virtio 1:2 {LEFT:x} left {:x}\npoweroff\n",
        slot(cases.len(), 0)
    );
    let mut one = String::new();
    for (at, copy) in COPIES.into_iter().enumerate() {
        let _ = write!(
            one,
            "if test -e virtio 1:1 {copy}; then fatrm virtio 1:1 {copy}; fi\n\
             if test ${{bench_size{at}}} != none; then fatwrite virtio 1:1 ${{bench_from{at}}} {copy} ${{bench_size{at}}}; fi\n"
        );
    }
    one.push_str("env load\nsource 0x48000000\n");
    for (at, copy) in COPIES.into_iter().enumerate() {
        let _ = write!(
            one,
            "bench_left{at}=0\nif load virtio 1:1 ${{bench_to{at}}} {copy}; then bench_left{at}=${{filesize}}; fi\n"
        );
    }
    one.push_str(
        "echo \"decided ${bench_n} ${bench_left0} ${bench_left1} ${offshoot_arguments}.\"\n",
    );
    fs::create_dir_all(tree).unwrap();
    fs::write(tree.join("before"), before).unwrap();
    for (name, text) in [
        ("boot.scr", all.as_str()),
        ("case.scr", &one),
        ("decide.scr", decide),
    ] {
        fs::write(tree.join(name), script_image(text).unwrap()).unwrap();
    }
}

/// What U-Boot said of one case: how long the copies are that are left, and what it tells the kernel.
struct Decided {
    left: [usize; 2],
    arguments: String,
}

fn decisions(output: &str) -> BTreeMap<usize, Decided> {
    let decided = |line: &str| {
        let rest = line.split_once("decided ")?.1;
        let mut words = rest.splitn(4, ' ');
        let n = words.next()?.parse().ok()?;
        let mut size = || usize::from_str_radix(words.next()?, 16).ok();
        let left = [size()?, size()?];
        let arguments = words.next()?.trim_end_matches(['\r', '.']).to_owned();
        Some((n, Decided { left, arguments }))
    };
    output.lines().filter_map(decided).collect()
}
