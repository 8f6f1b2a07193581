//! The whole script, as it is shipped, from power-on to the kernel; and the U-Boot that counts by itself, which does so only then.

use std::fmt::Write as _;
use std::fs;

use bootloader_glue::protocol::{Counter, Environment, Fallback, Mark};
use bootloader_glue::uboot::{self, BOOT_CMD, Count};
use qemu_tests::cache::Cache;
use qemu_tests::uboot::{COPIES, Disk, LAYOUT, Uboot, payload, script_image};

use super::{Base, Beside, Bytes, copies, counter, counters};

/// A boot partition as libostree leaves it, and a machine started on it for each case.
struct Bench {
    uboot: Uboot,
    count: Count,
    base: Base,
    disk: Disk,
    _temp: tempfile::TempDir,
}

/// What is wrong with the boot partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lacks {
    Nothing,
    /// Entry 1 is not there: a fresh device.
    Entry1,
    Kernel,
    Ramdisk,
    /// An entry's kernel arguments cannot be passed on (they have a single quote).
    Arguments,
    Everything,
}

const ARGUMENTS: &str =
    r#"root=LABEL=root rw ostree=/ostree/boot.1/d/c/N dyndbg="file a.c +p; $x & | {y}""#;

impl Bench {
    fn new(count: Count, lacks: Lacks, also: &str) -> Self {
        let uboot = Uboot::build(&Cache::open().unwrap(), count).unwrap();
        let base = Base::of(&uboot);
        let temp = tempfile::tempdir().unwrap();
        let tree = temp.path().join("tree");
        let write = |path: &str, bytes: &[u8]| {
            let path = tree.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        };
        write("boot.scr", &script_image(BOOT_CMD).unwrap());
        let mut lines = String::new();
        for (entry, number) in [("0", ""), ("1", "2")] {
            let [kernel, ramdisk] =
                ["vmlinuz", "initramfs"].map(|name| format!("ostree/d-{entry}/{name}"));
            if lacks != Lacks::Kernel || entry == "1" {
                write(&kernel, &payload(entry).unwrap());
            }
            if lacks != Lacks::Ramdisk || entry == "1" {
                write(&ramdisk, b"initramfs");
            }
            let quote = if lacks == Lacks::Arguments && entry == "0" {
                " it's"
            } else {
                ""
            };
            let arguments = ARGUMENTS.replace('N', entry);
            if lacks != Lacks::Entry1 || entry == "0" {
                let _ = write!(
                    lines,
                    "kernel_image{number}=/boot/{kernel}\nramdisk_image{number}=/boot/{ramdisk}\nbootargs{number}={arguments}{also}{quote}\n"
                );
            }
        }
        if lacks != Lacks::Everything {
            write("loader.1/uEnv.txt", lines.as_bytes());
        }
        std::os::unix::fs::symlink("loader.1", tree.join("loader")).unwrap();
        std::os::unix::fs::symlink(".", tree.join("boot")).unwrap();
        let disk = Disk::with_ext4(temp.path().join("disk"), &tree, 32).unwrap();
        Self {
            uboot,
            count,
            base,
            disk,
            _temp: temp,
        }
    }

    fn set(&self, bytes: &Bytes) {
        for (name, bytes) in COPIES.into_iter().zip(bytes) {
            self.disk.set_copy(name, bytes.as_deref()).unwrap();
        }
    }

    /// A healthy environment that says this.
    fn say(&self, counter: Counter) {
        let older = Counter {
            upgrade_available: !counter.upgrade_available,
            ..counter
        };
        self.set(&[
            Some(self.base.copy(counter, self.count, 5)),
            Some(self.base.copy(older, self.count, 4)),
        ]);
    }

    fn left(&self) -> Bytes {
        COPIES.map(|name| self.disk.copy(name).unwrap())
    }

    /// The kernels that were started, and what each was told besides the arguments of its entry.
    fn boots(&self, writable: bool, extra: &[&str]) -> Vec<String> {
        let output = self.uboot.run(&self.disk, writable, extra).unwrap();
        let told = |line: &str| {
            let booted = line.split_once("booted ")?.1.trim_end_matches(['\r', '.']);
            let (entry, arguments) = booted.split_once(' ').unwrap();
            let own = ARGUMENTS.replace('N', entry);
            let rest = arguments.strip_prefix(&own);
            Some(format!(
                "{entry}{}",
                rest.unwrap_or_else(|| panic!("{arguments}"))
            ))
        };
        output.lines().filter_map(told).collect()
    }
}

/// What the model says is booted and told.
fn expected(environment: &Environment, entries: usize, writable: bool, count: Count) -> String {
    let boot = uboot::boot(environment, entries, writable, count);
    told(boot.entry, boot.mark, count)
}

fn told(entry: usize, mark: Mark, count: Count) -> String {
    format!("{entry} {mark} offshoot.counts={}", count.name())
}

#[test]
fn a_uboot_that_counts_by_itself_agrees_with_the_model() {
    let bench = Bench::new(Count::Bootcount, Lacks::Nothing, "");
    let armed = |counter: &Counter| counter.upgrade_available;
    let cases = counters().into_iter().map(|counter| (counter, true));
    let unwritable = counters().into_iter().filter(armed).step_by(3);
    let cases = cases.chain(unwritable.map(|counter| (counter, false)));
    for (n, (value, writable)) in cases.enumerate() {
        let older = counter(!value.upgrade_available, 7, 9, !value.rollback);
        let beside = Beside::ALL[n % Beside::ALL.len()];
        let (newer, flag) = (n / 6 % 2, 250u8.wrapping_add(n as u8));
        let mut before = [None, None];
        before[newer] = Some(bench.base.copy(value, bench.count, flag));
        before[1 - newer] = beside.bytes(bench.base.copy(older, bench.count, flag.wrapping_sub(1)));
        bench.set(&before);
        let environment = copies(&before).environment();
        let case = format!("{environment:?}, writable {writable}, beside {beside:?}");
        let expected = expected(&environment, 2, writable, bench.count);
        assert_eq!(bench.boots(writable, &[]), [expected], "{case}");
        let left = bench.left();
        match uboot::boot(&environment, 2, writable, bench.count).saved {
            Some(saved) => {
                let valid = Environment::Valid {
                    counter: saved,
                    damaged: false,
                };
                assert_eq!(copies(&left).environment(), valid, "{case}");
            }
            None => assert_eq!(left, before, "{case}"),
        }
    }
}

#[test]
fn a_uboot_that_was_to_count_and_does_not_never_boots_the_trial() {
    let mut bench = Bench::new(Count::Script, Lacks::Nothing, "");
    bench.count = Count::Bootcount;
    bench.say(counter(true, 0, 3, false));
    let unsaved = Mark::Fallback(Fallback::Unsaved);
    assert_eq!(bench.boots(true, &[]), [told(1, unsaved, Count::Script)]);
    // What it does on an ordinary boot is how userspace knows before it arms.
    bench.say(counter(false, 0, 3, false));
    assert_eq!(
        bench.boots(true, &[]),
        [told(0, Mark::Normal, Count::Script)]
    );
}

/// Each state that the script boots in a way of its own.
fn states() -> Vec<Option<Counter>> {
    vec![
        Some(counter(false, 0, 3, false)),
        Some(counter(true, 0, 3, false)),
        Some(counter(true, 3, 3, false)),
        Some(counter(true, 3, 3, true)),
        None,
    ]
}

#[test]
fn the_script_boots_what_it_decided_or_the_entry_there_is() {
    for (lacks, entries) in [(Lacks::Nothing, 2), (Lacks::Entry1, 1)] {
        let bench = Bench::new(Count::Script, lacks, "");
        for state in states() {
            for writable in [true, false] {
                match state {
                    Some(counter) => bench.say(counter),
                    None => bench.set(&[None, None]),
                }
                let environment = copies(&bench.left()).environment();
                let expected = expected(&environment, entries, writable, Count::Script);
                let case = format!("{lacks:?}, {environment:?}, writable {writable}");
                assert_eq!(bench.boots(writable, &[]), [expected], "{case}");
            }
        }
    }
}

#[test]
fn an_environment_that_was_lost_is_saved_by_uboot_and_stays_lost_until_it_is_settled() {
    for count in [Count::Script, Count::Bootcount] {
        let bench = Bench::new(count, Lacks::Nothing, "");
        bench.set(&[Some(vec![0xff; LAYOUT.size]), Some(vec![0; 7])]);
        let lost = told(1, Mark::Fallback(Fallback::Corrupt), count);
        assert_eq!(bench.boots(true, &[]), [lost.as_str()]);
        let saved = bench.left();
        assert_eq!(copies(&saved).environment(), Environment::Corrupt);
        assert_eq!(bench.boots(true, &[]), [lost.as_str()]);
        assert_eq!(bench.left(), saved, "it is saved once");
        let mut settled = bench.left();
        let variables = uboot::fresh(copies(&saved).variables().unwrap().clone(), 3, count);
        let write = copies(&saved).write(&variables).unwrap();
        settled[write.copy] = Some(write.bytes);
        bench.set(&settled);
        assert_eq!(bench.boots(true, &[]), [told(0, Mark::Normal, count)]);
    }
}

#[test]
fn a_kernel_that_dies_on_its_trial_is_given_up_after_its_tries() {
    for count in [Count::Script, Count::Bootcount] {
        let bench = Bench::new(count, Lacks::Nothing, " dies");
        bench.say(counter(true, 0, 3, false));
        let trial = |tries| format!(" dies{}", &told(0, Mark::Trial { tries }, count)[1..]);
        let trials = (1..=3).map(|tries| format!("0{}", trial(tries)));
        let given_up = told(1, Mark::Fallback(Fallback::Exhausted), count);
        let mut expected: Vec<String> = trials.collect();
        expected.push(format!("1 dies{}", &given_up[1..]));
        assert_eq!(bench.boots(true, &[]), expected);
        let after = copies(&bench.left()).environment();
        let counted = if count == Count::Script { 3 } else { 4 };
        let valid = Environment::Valid {
            counter: counter(true, counted, 3, true),
            damaged: false,
        };
        assert_eq!(after, valid);
    }
}

#[test]
fn what_cannot_be_loaded_gives_way_and_is_counted_when_it_is_on_trial() {
    for lacks in [Lacks::Kernel, Lacks::Ramdisk, Lacks::Arguments] {
        let bench = Bench::new(Count::Script, lacks, "");
        bench.say(counter(false, 0, 3, false));
        let unloadable = told(1, Mark::Fallback(Fallback::Unloadable), Count::Script);
        assert_eq!(bench.boots(true, &[]), [unloadable], "{lacks:?}");
        bench.say(counter(true, 0, 3, false));
        let given_up = told(1, Mark::Fallback(Fallback::Exhausted), Count::Script);
        assert_eq!(bench.boots(true, &[]), [given_up], "{lacks:?}");
        let valid = Environment::Valid {
            counter: counter(true, 3, 3, true),
            damaged: false,
        };
        assert_eq!(copies(&bench.left()).environment(), valid, "{lacks:?}");
    }
}

#[test]
fn with_nothing_to_load_the_machine_resets_instead_of_waiting_for_somebody() {
    let bench = Bench::new(Count::Script, Lacks::Everything, "");
    bench.say(counter(false, 0, 3, false));
    // Half a minute of the machine's time passes in seconds; without a reset this would end by a time limit, not well.
    let clock = ["-no-reboot", "-icount", "shift=10"];
    assert_eq!(bench.boots(true, &clock), Vec::<String>::new());
}
