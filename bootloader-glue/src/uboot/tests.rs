use std::process::{Command, Output};

use proptest::prelude::*;

use super::*;
use crate::{Bootloader, Confirmed};

const SIZE: usize = 0x400;
const FW_LOCK: &str = "/var/lock/fw_printenv.lock";

/// What a U-Boot has compiled in, and what a board keeps in its environment besides.
const OTHERS: &str = "bootcmd=run offshoot_start\nethaddr=00:11:22:33:44:55\naltbootcmd=run bootcmd\nboard=a \\\\ b\n";

struct Device {
    temp: tempfile::TempDir,
    uboot: Uboot,
}

impl Device {
    /// `places` is `fw_env.config`, with `@` for the directory.
    fn new(places: &str) -> Self {
        let temp = tempfile::tempdir().unwrap();
        let at = |name: &str| temp.path().join(name);
        let text = places.replace('@', temp.path().to_str().unwrap());
        fs::write(at("fw_env.config"), text).unwrap();
        fs::write(at("cmdline"), "ostree=/x offshoot.counts=script quiet\n").unwrap();
        fs::create_dir(at("boot")).unwrap();
        let uboot = Uboot {
            config: at("fw_env.config"),
            lock: at("lock"),
            count: Count::Script,
            accept_single: false,
            boot: at("boot"),
            kernel_command_line: at("cmdline"),
        };
        Self { temp, uboot }
    }

    fn redundant() -> Self {
        let device = Self::new("@/a 0 400\n@/b 0 400\n");
        device.fill(&[("a", 7), ("b", 6)]);
        device
    }

    /// Writes a fresh environment with each flag.
    fn fill(&self, copies: &[(&str, u8)]) {
        let variables = fresh(Variables::from_text(OTHERS), 3, Count::Script);
        for (name, flag) in copies {
            let bytes = layout(copies.len() == 2).encode(&variables, *flag).unwrap();
            fs::write(self.path(name), bytes).unwrap();
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    fn bootloader(&self) -> Bootloader {
        Bootloader::Uboot(self.uboot.clone())
    }

    fn counter(&self) -> Counter {
        match self.bootloader().read().unwrap() {
            Environment::Valid {
                counter,
                damaged: false,
            } => counter,
            other => panic!("{other:?}"),
        }
    }

    /// What the script does to the environment.
    fn boots(&self) -> Mark {
        let boot = boot(
            &self.bootloader().read().unwrap(),
            2,
            true,
            self.uboot.count,
        );
        if let Some(saved) = boot.saved {
            let mut held = Held::lock(&self.uboot).unwrap();
            held.write(saved, Verb::Settle).unwrap();
        }
        boot.mark
    }

    fn fw(&self, tool: &str, arguments: &[&str]) -> Output {
        let mut command = Command::new(tool);
        command.arg("-c").arg(&self.uboot.config).args(arguments);
        command.output().unwrap()
    }

    fn printenv(&self) -> String {
        let output = self.fw("fw_printenv", &[]);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }
}

fn layout(redundant: bool) -> Layout {
    Layout {
        size: SIZE,
        redundant,
        endian: Endian::NATIVE,
    }
}

fn counter_of(armed: bool, bootcount: u8, bootlimit: u8, rollback: bool) -> Counter {
    Counter {
        upgrade_available: armed,
        bootcount,
        bootlimit,
        rollback,
    }
}

fn any_counter() -> impl Strategy<Value = Counter> {
    (any::<bool>(), 0..=9u8, 1..=9u8, any::<bool>()).prop_map(|(a, c, l, r)| counter_of(a, c, l, r))
}

#[test]
fn a_trial_counts_to_its_limit_and_is_given_up_and_settled() {
    for count in [Count::Script, Count::Bootcount] {
        let mut device = Device::redundant();
        device.uboot.count = count;
        let bootloader = device.bootloader();
        bootloader.arm(3).unwrap();
        assert_eq!(device.counter(), counter_of(true, 0, 3, false));
        let marks: Vec<Mark> = (0..5).map(|_| device.boots()).collect();
        let fallback = Mark::Fallback(Fallback::Exhausted);
        let trial = |tries| Mark::Trial { tries };
        assert_eq!(marks, [trial(1), trial(2), trial(3), fallback, fallback]);
        // U-Boot counts the boots of a trial that was given up, too.
        let counted = if count == Count::Script { 3 } else { 5 };
        assert_eq!(device.counter(), counter_of(true, counted, 3, true));
        assert_eq!(bootloader.confirm(), Err(Error::GivenUp));
        bootloader.settle().unwrap();
        assert_eq!(device.counter(), counter_of(false, 0, 3, false));
        assert_eq!(device.boots(), Mark::Normal);

        bootloader.arm(2).unwrap();
        device.boots();
        assert_eq!(bootloader.confirm(), Ok(Confirmed::Confirmed));
        assert_eq!(bootloader.confirm(), Ok(Confirmed::NotArmed));
        bootloader.arm(2).unwrap();
        bootloader.exhaust().unwrap();
        assert_eq!(device.boots(), fallback);
    }
}

#[test]
fn a_verb_is_one_write_of_the_older_copy_and_none_when_nothing_changes() {
    let device = Device::redundant();
    let [a, b] = [device.bytes("a"), device.bytes("b")];
    device.bootloader().settle().unwrap();
    assert_eq!([device.bytes("a"), device.bytes("b")], [a.clone(), b]);
    device.bootloader().arm(3).unwrap();
    assert_eq!(device.bytes("a"), a);
    let b = device.bytes("b");
    assert_eq!(b[Layout::FLAG_AT], 8);
    device.bootloader().exhaust().unwrap();
    assert_eq!(device.bytes("a")[Layout::FLAG_AT], 9);
    assert_eq!(device.bytes("b"), b);
}

#[test]
fn variables_of_others_keep_their_bytes_and_their_order() {
    let device = Device::redundant();
    device.bootloader().arm(3).unwrap();
    device.bootloader().settle().unwrap();
    let (variables, _) = layout(true).decode(&device.bytes("a")).unwrap();
    let text: Vec<&str> = variables
        .entries()
        .map(|entry| std::str::from_utf8(entry).unwrap())
        .collect();
    let ours = [
        "upgrade_available=0",
        "bootcount=0",
        "bootlimit=3",
        "rollback=0",
        "offshoot_count=script",
    ];
    let expected: Vec<&str> = OTHERS.lines().chain(ours).collect();
    assert_eq!(text, expected);
    assert_eq!(variables.value("board").unwrap(), b"a \\ b");
}

#[test]
fn a_damaged_copy_is_made_whole_and_two_are_not_written_over() {
    let device = Device::redundant();
    let bootloader = device.bootloader();
    for name in ["a", "b"] {
        for junk in [vec![], vec![0xff; SIZE], vec![0; SIZE], vec![1; SIZE - 1]] {
            fs::write(device.path(name), junk).unwrap();
            assert!(matches!(
                bootloader.read(),
                Ok(Environment::Valid { damaged: true, .. })
            ));
            bootloader.arm(3).unwrap();
            assert_eq!(device.counter(), counter_of(true, 0, 3, false));
        }
        fs::remove_file(device.path(name)).unwrap();
        bootloader.settle().unwrap();
        assert_eq!(device.counter(), counter_of(false, 0, 3, false));
    }
    for name in ["a", "b"] {
        fs::write(device.path(name), [0xff; SIZE]).unwrap();
    }
    assert_eq!(bootloader.read(), Ok(Environment::Corrupt));
    let corrupt = |verb| {
        Err(Error::Corrupt {
            verb,
            place: device.uboot.config.clone(),
        })
    };
    assert_eq!(bootloader.arm(3), corrupt(Verb::Arm));
    assert_eq!(bootloader.exhaust(), corrupt(Verb::Exhaust));
    assert_eq!(bootloader.confirm().map(drop), corrupt(Verb::Confirm));
    let refused = Error::NoVariables {
        verb: Verb::Settle,
        config: device.uboot.config.clone(),
    };
    assert_eq!(bootloader.settle(), Err(refused));
    assert_eq!([device.bytes("a"), device.bytes("b")], [[0xff; SIZE]; 2]);
}

#[test]
fn an_environment_without_the_mark_or_out_of_range_is_corrupt_until_it_is_settled() {
    let valid = fresh(Variables::from_text(OTHERS), 3, Count::Bootcount);
    assert!(counter(&valid).is_some());
    let spoil: [&dyn Fn(&mut Variables); 11] = [
        &|variables| variables.remove("offshoot_count"),
        &|variables| variables.set("offshoot_count", "nobody"),
        &|variables| variables.remove("bootcount"),
        &|variables| variables.set("bootcount", "x"),
        &|variables| variables.set("bootcount", ""),
        &|variables| variables.set("bootlimit", "0"),
        &|variables| variables.set("bootlimit", "10"),
        &|variables| variables.set("rollback", "2"),
        &|variables| variables.set("upgrade_available", "yes"),
        &|variables| variables.set("", "x"),
        &|variables| {
            variables.set("offshoot_count", "script");
            variables.set("bootcount", "10");
        },
    ];
    for (n, spoil) in spoil.into_iter().enumerate() {
        let device = Device::redundant();
        let mut variables = valid.clone();
        variables.set("offshoot_lost", "1");
        spoil(&mut variables);
        let bytes = layout(true).encode(&variables, 9).unwrap();
        fs::write(device.path("a"), bytes).unwrap();
        assert_eq!(device.bootloader().read(), Ok(Environment::Corrupt), "{n}");
        assert_eq!(device.boots(), Mark::Fallback(Fallback::Corrupt), "{n}");
        assert!(device.bootloader().arm(3).is_err(), "{n}");
        device.bootloader().settle().unwrap();
        assert_eq!(device.counter(), counter_of(false, 0, 3, false), "{n}");
        let text = device.printenv();
        assert!(!text.contains("offshoot_lost") && text.contains("ethaddr=00:11:22:33:44:55"));
    }
    // U-Boot goes on counting; that is no damage.
    let mut variables = valid;
    variables.set("bootcount", "17");
    assert_eq!(
        counter(&variables),
        Some((counter_of(false, 9, 3, false), Count::Bootcount))
    );
}

#[test]
fn nothing_is_armed_on_a_single_copy_unless_that_is_accepted() {
    let mut device = Device::new("@/a 0x200 400\n");
    let variables = fresh(Variables::from_text(OTHERS), 3, Count::Script);
    let mut bytes = vec![0xaa; 0x200];
    bytes.extend(layout(false).encode(&variables, 0).unwrap());
    bytes.extend([0xbb; 0x200]);
    fs::write(device.path("a"), &bytes).unwrap();
    let refused = Error::SingleCopy {
        config: device.uboot.config.clone(),
    };
    assert_eq!(device.bootloader().arm(3), Err(refused.clone()));
    assert_eq!(device.bootloader().probe(), Err(refused));
    assert_eq!(device.bytes("a"), bytes);
    device.uboot.accept_single = true;
    device.bootloader().arm(3).unwrap();
    assert_eq!(device.counter(), counter_of(true, 0, 3, false));
    assert!(device.printenv().contains("upgrade_available=1\n"));
    device.bootloader().settle().unwrap();
    assert_eq!(device.bytes("a"), bytes);
}

#[test]
fn an_environment_that_is_too_small_is_refused_before_it_is_written() {
    let device = Device::redundant();
    let mut variables = Variables::from_text(OTHERS);
    variables.set("filler", &"x".repeat(SIZE - 120));
    let bytes = layout(true).encode(&variables, 8).unwrap();
    fs::write(device.path("b"), &bytes).unwrap();
    let a = device.bytes("a");
    assert!(matches!(
        device.bootloader().settle(),
        Err(Error::TooBig {
            too_big: image::TooBig { room: 0x3fb, .. },
            ..
        })
    ));
    assert_eq!([device.bytes("a"), device.bytes("b")], [a, bytes]);
}

#[test]
fn what_is_wrong_with_fw_env_config_is_said_with_its_path() {
    let device = Device::new("# nothing\n");
    assert_eq!(
        device.bootloader().read(),
        Err(Error::FwEnvConfig {
            path: device.uboot.config.clone(),
            problem: ConfigProblem::Empty
        })
    );
    let device = Device::new("@/boot 0 400\n@/b 0 400\n");
    assert!(matches!(
        device.bootloader().read(),
        Err(Error::Io { kind: io::ErrorKind::InvalidInput, path, .. }) if path == device.path("boot")
    ));
}

#[test]
fn a_counter_that_nobody_honours_is_refused() {
    let mut device = Device::redundant();
    let probe = |device: &Device| device.bootloader().probe();
    let not = |why| Err(Error::NotCounting(why));
    assert!(matches!(
        probe(&device),
        Err(Error::Io {
            kind: io::ErrorKind::NotFound,
            ..
        })
    ));
    let script = device.path("boot/boot.scr");
    fs::write(&script, "no script").unwrap();
    let path = script.clone();
    assert_eq!(probe(&device), not(NotCounting::Script { path }));
    let command = device.path("boot.cmd");
    fs::write(&command, BOOT_CMD).unwrap();
    let made = Command::new("mkimage")
        .args(["-T", "script", "-A", "arm64", "-d"])
        .args([&command, &script])
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    assert_eq!(probe(&device), Ok(()));
    device.uboot.count = Count::Bootcount;
    assert_eq!(probe(&device), not(NotCounting::NotCounted));
    let line = device.uboot.kernel_command_line.clone();
    fs::write(&line, "quiet offshoot.counts=bootcount").unwrap();
    assert_eq!(probe(&device), Ok(()));
    assert!(
        device
            .fw("fw_setenv", &["altbootcmd", "run recovery"])
            .status
            .success()
    );
    let found = "run recovery".to_owned();
    assert_eq!(probe(&device), not(NotCounting::Altbootcmd { found }));
    fs::write(&line, "quiet offshoot.trial=1").unwrap();
    assert_eq!(probe(&device), not(NotCounting::NotBooted));
}

#[test]
fn libubootenv_reads_what_we_write_and_we_read_what_it_writes() {
    for places in ["@/a 0 400\n@/b 0x0 0x400\n", "@/a 0 400\n@/a 0x400 400\n"] {
        let device = Device::new(places);
        device.fill(&[("a", 255), ("b", 0)]);
        if places.matches("@/a").count() == 2 {
            let both = [device.bytes("a"), device.bytes("b")].concat();
            fs::write(device.path("a"), both).unwrap();
        }
        for bootcount in 1..6 {
            let verb = device.bootloader().arm(3);
            assert_eq!(verb, Ok(()), "{places}");
            let text = device.printenv();
            for line in [
                "upgrade_available=1",
                "bootcount=0",
                "bootlimit=3",
                "offshoot_count=script",
                "ethaddr=00:11:22:33:44:55",
            ] {
                assert!(text.lines().any(|found| found == line), "{line}: {text}");
            }
            let number = bootcount.to_string();
            let output = device.fw("fw_setenv", &["bootcount", &number, "rollback", "1"]);
            assert!(output.status.success(), "{output:?}");
            assert_eq!(device.counter(), counter_of(true, bootcount, 3, true));
            device.bootloader().settle().unwrap();
        }
    }
}

#[test]
fn mkenvimage_makes_the_same_bytes() {
    let temp = tempfile::tempdir().unwrap();
    let [text, image] = ["text", "image"].map(|name| temp.path().join(name));
    fs::write(&text, OTHERS).unwrap();
    for (arguments, redundant, endian) in [
        (vec!["-r"], true, Endian::Little),
        (vec![], false, Endian::Little),
        (vec!["-r", "-b"], true, Endian::Big),
    ] {
        let output = Command::new("mkenvimage")
            .args(["-s", "0x400", "-p", "0"])
            .args(arguments)
            .arg("-o")
            .args([&image, &text])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let layout = Layout {
            size: SIZE,
            redundant,
            endian,
        };
        let bytes = fs::read(&image).unwrap();
        let variables = Variables::from_text(OTHERS);
        assert_eq!(layout.encode(&variables, 1).unwrap(), bytes);
        assert_eq!(layout.decode(&bytes).unwrap().0, variables);
    }
}

#[test]
fn the_tools_wait_while_we_hold_the_environment() {
    let mut device = Device::redundant();
    device.uboot.lock = FW_LOCK.into();
    let mut held = Held::lock(&device.uboot).unwrap();
    let tool = Command::new("fw_printenv")
        .arg("-c")
        .arg(&device.uboot.config)
        .arg("bootcount")
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // The kernel lists who waits for a lock behind an arrow.
    let waits = |pid: u32| {
        let locks = fs::read_to_string("/proc/locks").unwrap();
        locks.lines().any(|line| {
            line.contains("-> FLOCK")
                && line
                    .split_ascii_whitespace()
                    .any(|word| word == pid.to_string())
        })
    };
    while !waits(tool.id()) {
        std::thread::yield_now();
    }
    held.write(counter_of(true, 5, 9, false), Verb::Settle)
        .unwrap();
    drop(held);
    let output = tool.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "bootcount=5\n");
}

/// What is left of a write that was cut: the beginning is new, the rest is what stood there, or what an erase left of it.
fn torn(before: &[u8], after: &[u8], cut: usize, erased: bool) -> Vec<u8> {
    let rest = if erased {
        vec![0xff; before.len()]
    } else {
        before.to_vec()
    };
    [&after[..cut], &rest[cut..]].concat()
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(counter_in in any_counter(), flag in any::<u8>(), redundant: bool) {
        let variables = {
            let mut variables = Variables::from_text(OTHERS);
            put(&mut variables, counter_in, Count::Script);
            variables
        };
        let bytes = layout(redundant).encode(&variables, flag).unwrap();
        prop_assert_eq!(bytes.len(), SIZE);
        let (decoded, read) = layout(redundant).decode(&bytes).unwrap();
        prop_assert_eq!(counter(&decoded), Some((counter_in, Count::Script)));
        prop_assert_eq!(decoded, variables);
        prop_assert!(!redundant || read == flag);
    }

    #[test]
    fn torn_write_yields_the_former_environment_or_the_new_one(
        former in any_counter(), new in any_counter(), first: u8, boolean: bool, erased: bool, cleared: bool,
        cut in 0..=SIZE, flip in proptest::option::of((0..SIZE, 0..8u8)),
    ) {
        let flags = if boolean { Flags::Boolean } else { Flags::Incremental };
        let with = |counter| {
            let mut variables = Variables::from_text(OTHERS);
            put(&mut variables, counter, Count::Script);
            variables
        };
        let older = layout(true).encode(&with(new), if boolean { 0 } else { first }).unwrap();
        let newer = layout(true).encode(&with(former), flags.next(first)).unwrap();
        let mut copies = [Some(older), Some(newer)];
        let write = Copies::new(layout(true), flags, &copies).write(&with(new)).unwrap();
        prop_assert_eq!((write.copy, write.obsolete), (0, boolean.then_some(1)));
        let before = copies[0].take().unwrap();
        let mut left = torn(&before, &write.bytes, cut, erased);
        if let Some((at, bit)) = flip {
            left[at] ^= 1 << bit;
        }
        copies[0] = Some(left);
        if let (Some(obsolete), Some(bytes)) = (write.obsolete.filter(|_| cleared && cut == SIZE), &mut copies[1]) {
            prop_assert_eq!(obsolete, 1);
            bytes[Layout::FLAG_AT] = 0;
        }
        match Copies::new(layout(true), flags, &copies).environment() {
            Environment::Valid { counter, .. } => prop_assert!(counter == former || counter == new),
            other => prop_assert!(false, "{:?}", other),
        }
    }

    #[test]
    fn a_second_cut_does_not_complete_what_the_first_one_left(
        former in any_counter(), aborted in any_counter(), new in any_counter(), filler in 0..600usize,
        first: u8, second: u8, wiped: bool,
    ) {
        let with = |counter| {
            let mut variables = Variables::from_text(OTHERS);
            variables.set("filler", &"x".repeat(filler));
            put(&mut variables, counter, Count::Script);
            variables
        };
        let copies_of = |bytes: &[Option<Vec<u8>>]| Copies::new(layout(true), Flags::Incremental, bytes);
        // Which pieces of a write have reached the medium.
        let tear = |before: &[u8], after: &[u8], pieces: u8| {
            let piece = SIZE / 8;
            (0..8).flat_map(|n| {
                let from = if pieces & (1 << n) == 0 { before } else { after };
                from[n * piece..][..piece].to_vec()
            }).collect::<Vec<u8>>()
        };
        let mut other = Variables::from_text("filler=y\n");
        put(&mut other, aborted, Count::Script);
        let mut bytes = [Some(layout(true).encode(&other, 0).unwrap()), Some(layout(true).encode(&with(former), 1).unwrap())];
        let write = copies_of(&bytes).write(&with(aborted)).unwrap();
        bytes[0] = Some(tear(bytes[0].as_ref().unwrap(), &write.bytes, first));
        if copies_of(&bytes).newer() == Some(1) {
            let write = copies_of(&bytes).write(&with(new)).unwrap();
            let mut target = bytes[0].take().unwrap();
            if write.wipe {
                target[..store::SECTOR].fill(0);
            }
            if !write.wipe || wiped {
                target = tear(&target, &write.bytes, second);
            }
            bytes[0] = Some(target);
            match copies_of(&bytes).environment() {
                Environment::Valid { counter, .. } => prop_assert!(counter == former || counter == new),
                other => prop_assert!(false, "{:?}", other),
            }
        }
    }

    #[test]
    fn a_whole_write_is_what_is_read(former in any_counter(), new in any_counter(), flags: [u8; 2], boolean: bool, damaged in proptest::option::of(0..2usize)) {
        let scheme = if boolean { Flags::Boolean } else { Flags::Incremental };
        let variables = fresh(Variables::from_text(OTHERS), 3, Count::Script);
        let with = |counter| {
            let mut variables = variables.clone();
            put(&mut variables, counter, Count::Script);
            variables
        };
        // Flags that a writer can have left.
        let flags = if boolean { [flags[0] & 1, 1 - (flags[0] & 1)] } else { [flags[0], flags[0].wrapping_add(if flags[1] & 1 == 0 { 1 } else { 255 })] };
        let mut copies = flags.map(|flag| Some(layout(true).encode(&with(former), flag).unwrap()));
        if let Some(damaged) = damaged {
            copies[damaged] = None;
        }
        let write = Copies::new(layout(true), scheme, &copies).write(&with(new)).unwrap();
        copies[write.copy] = Some(write.bytes);
        if let Some(bytes) = write.obsolete.and_then(|obsolete| copies[obsolete].as_mut()) {
            bytes[Layout::FLAG_AT] = 0;
        }
        let read = Copies::new(layout(true), scheme, &copies).environment();
        prop_assert_eq!(read, Environment::Valid { counter: new, damaged: false });
    }

    #[test]
    fn any_list_is_read_without_a_panic_and_keeps_its_bytes(data in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut bytes = data.clone();
        bytes.resize(SIZE - 4, 0);
        let image = [crc32_of(&bytes).as_slice(), &bytes].concat();
        let (variables, _) = layout(false).decode(&image).unwrap();
        let _ = counter(&variables);
        let list = variables.entries().flat_map(|entry| [entry, b"\0"].concat()).collect::<Vec<u8>>();
        prop_assert!(bytes.starts_with(&list));
    }
}

fn crc32_of(bytes: &[u8]) -> [u8; 4] {
    image::crc32(bytes).to_ne_bytes()
}
