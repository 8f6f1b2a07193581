use std::process::Command;

use proptest::prelude::*;

use super::*;
use crate::grub::{SIZE, decode, encode, fresh};
use crate::protocol::Mark;

struct Device {
    _temp: tempfile::TempDir,
    environment: PathBuf,
    boot: PathBuf,
    bootloader: Bootloader,
}

fn device() -> Device {
    let temp = tempfile::tempdir().unwrap();
    let environment = temp.path().join("env");
    fs::create_dir(&environment).unwrap();
    let boot = temp.path().join("boot");
    let bootloader = Bootloader::Grub {
        environment: environment.clone(),
        boot: boot.clone(),
    };
    Device {
        _temp: temp,
        environment,
        boot,
        bootloader,
    }
}

impl Device {
    fn copy(&self, n: usize) -> PathBuf {
        self.environment.join(format!("env.{n}"))
    }

    fn counter(&self) -> Counter {
        match self.bootloader.read().unwrap() {
            Environment::Valid {
                counter,
                damaged: false,
            } => counter,
            other => panic!("{other:?}"),
        }
    }

    /// What the bootloader's script does to the files.
    fn boots(&self) -> Mark {
        let environment = self.bootloader.read().unwrap();
        let boot = protocol::boot(&environment, 2, true);
        if let Some(saved) = boot.saved {
            grub::Held::lock(&self.environment)
                .unwrap()
                .write(saved, Verb::Arm)
                .unwrap();
        }
        boot.mark
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

fn any_counter() -> impl Strategy<Value = Counter> {
    (any::<bool>(), 0..=9u8, 1..=9u8, any::<bool>()).prop_map(|(a, c, l, r)| counter(a, c, l, r))
}

#[test]
fn a_trial_counts_to_its_limit_and_is_given_up_and_settled() {
    let device = device();
    assert_eq!(device.bootloader.read(), Ok(Environment::Absent));
    device.bootloader.arm(3).unwrap();
    assert_eq!(device.counter(), counter(true, 0, 3, false));
    let marks: Vec<Mark> = (0..5).map(|_| device.boots()).collect();
    let fallback = Mark::Fallback(protocol::Fallback::Exhausted);
    let trial = |tries| Mark::Trial { tries };
    assert_eq!(marks, [trial(1), trial(2), trial(3), fallback, fallback]);
    assert_eq!(device.counter(), counter(true, 3, 3, true));
    assert_eq!(device.bootloader.confirm(), Err(Error::GivenUp));
    device.bootloader.settle().unwrap();
    assert_eq!(device.counter(), counter(false, 0, 3, false));
    assert_eq!(device.boots(), Mark::Normal);
}

#[test]
fn confirm_and_exhaust_change_only_what_is_on_trial() {
    let device = device();
    device.bootloader.arm(2).unwrap();
    device.boots();
    assert_eq!(device.bootloader.confirm(), Ok(Confirmed::Confirmed));
    assert_eq!(device.counter(), counter(false, 0, 2, false));
    assert_eq!(device.bootloader.confirm(), Ok(Confirmed::NotArmed));
    device.bootloader.exhaust().unwrap();
    assert_eq!(device.counter(), counter(false, 0, 2, false));
    device.bootloader.arm(2).unwrap();
    device.bootloader.exhaust().unwrap();
    assert_eq!(device.counter(), counter(true, 2, 2, false));
    assert_eq!(
        device.boots(),
        Mark::Fallback(protocol::Fallback::Exhausted)
    );
    assert_eq!(device.bootloader.arm(0), Err(Error::Bootlimit(0)));
    assert_eq!(device.bootloader.arm(10), Err(Error::Bootlimit(10)));
}

#[test]
fn a_verb_is_one_write_of_the_older_copy_and_none_when_nothing_changes() {
    let device = device();
    for (n, block) in fresh(3).into_iter().enumerate() {
        fs::write(device.copy(n), block).unwrap();
    }
    let read = |n| fs::read(device.copy(n)).unwrap();
    assert_eq!(decode(&read(0)).unwrap().1, 1, "env.0 is the newer one");
    device.bootloader.settle().unwrap();
    assert_eq!([read(0), read(1)], fresh(3));
    device.bootloader.arm(3).unwrap();
    assert_eq!(read(0), fresh(3)[0]);
    assert_eq!(read(1), encode(&counter(true, 0, 3, false), 2));
    device.bootloader.exhaust().unwrap();
    assert_eq!(read(0), encode(&counter(true, 3, 3, false), 0));
    assert_eq!(read(1), encode(&counter(true, 0, 3, false), 2));
}

#[test]
fn arming_makes_a_damaged_copy_whole_and_refuses_when_both_are() {
    let device = device();
    device.bootloader.arm(3).unwrap();
    for n in [0, 1] {
        for junk in [&b"junk"[..], b"", &[0; SIZE], &[0; 3 * SIZE]] {
            fs::write(device.copy(n), junk).unwrap();
            assert!(matches!(
                device.bootloader.read(),
                Ok(Environment::Valid { damaged: true, .. })
            ));
            device.bootloader.arm(3).unwrap();
            assert_eq!(device.counter(), counter(true, 0, 3, false));
        }
        fs::remove_file(device.copy(n)).unwrap();
        device.bootloader.settle().unwrap();
        assert_eq!(device.counter(), counter(false, 0, 3, false));
    }
    for n in [0, 1] {
        fs::write(device.copy(n), b"junk").unwrap();
    }
    assert_eq!(device.bootloader.read(), Ok(Environment::Corrupt));
    let refused = |verb| Error::Corrupt {
        verb,
        place: device.environment.clone(),
    };
    assert_eq!(device.bootloader.arm(3), Err(refused(Verb::Arm)));
    assert_eq!(device.bootloader.confirm(), Err(refused(Verb::Confirm)));
    assert_eq!(device.bootloader.exhaust(), Err(refused(Verb::Exhaust)));
    device.bootloader.settle().unwrap();
    assert_eq!(device.counter(), counter(false, 0, 3, false));
}

#[test]
fn a_configuration_that_does_not_count_is_refused() {
    let device = device();
    let path = device.boot.join("loader/grub.cfg");
    assert!(matches!(
        device.bootloader.probe(),
        Err(Error::Io {
            kind: io::ErrorKind::NotFound,
            ..
        })
    ));
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, "set timeout=5\n").unwrap();
    assert_eq!(
        device.bootloader.probe(),
        Err(Error::NotOurs { path: path.clone() })
    );
    fs::write(&path, config::grub_cfg(&[], "")).unwrap();
    assert_eq!(device.bootloader.probe(), Ok(()));
}

#[test]
fn grub_editenv_reads_what_we_write_and_we_read_what_it_writes() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("env");
    fs::write(&path, encode(&counter(true, 2, 3, false), 1)).unwrap();
    let editenv = |arguments: &[&str]| {
        let output = Command::new("grub-editenv")
            .arg(&path)
            .args(arguments)
            .output()
            .unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(
        editenv(&["list"]),
        "upgrade_available=1\nbootcount=2\nbootlimit=3\nrollback=0\noffshoot_seq=1\noffshoot_check=1:2:3:0:1\n"
    );
    editenv(&[
        "set",
        "bootcount=3",
        "offshoot_seq=2",
        "offshoot_check=1:3:3:0:2",
    ]);
    assert_eq!(
        fs::read(&path).unwrap(),
        encode(&counter(true, 3, 3, false), 2)
    );
    editenv(&["set", "bootcount=4"]);
    assert_eq!(decode(&fs::read(&path).unwrap()), None);
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(counter in any_counter(), seq in 0..3u8) {
        prop_assert_eq!(decode(&encode(&counter, seq)), Some((counter, seq)));
        prop_assert_eq!(encode(&counter, seq).len(), SIZE);
    }

    #[test]
    fn torn_write_yields_the_former_environment_or_the_new_one(
        former in any_counter(), new in any_counter(), writes in 1..6usize, cut in 0..=SIZE,
        flip in proptest::option::of((0..SIZE, 0..8u8)),
    ) {
        let device = device();
        for block in 0..writes {
            let value = if block + 1 == writes { former } else { new };
            grub::Held::lock(&device.environment).unwrap().write(value, Verb::Arm).unwrap();
        }
        let before: Vec<_> = (0..2).map(|n| fs::read(device.copy(n))).collect();
        grub::Held::lock(&device.environment).unwrap().write(new, Verb::Arm).unwrap();
        for (n, before) in before.into_iter().enumerate() {
            let after = fs::read(device.copy(n));
            if let (Ok(before), Ok(after)) = (before, after) && before != after {
                let mut torn = [&after[..cut], &before[cut..]].concat();
                if let Some((at, bit)) = flip {
                    torn[at] ^= 1 << bit;
                }
                fs::write(device.copy(n), torn).unwrap();
            }
        }
        match device.bootloader.read().unwrap() {
            Environment::Valid { counter, .. } => prop_assert!(counter == former || counter == new),
            other => prop_assert!(false, "{:?}", other),
        }
    }

    #[test]
    fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let signed = [b"# GRUB Environment Block\n".as_slice(), &bytes].concat();
        prop_assert_eq!(decode(&bytes), None);
        let _ = decode(&signed);
    }
}
