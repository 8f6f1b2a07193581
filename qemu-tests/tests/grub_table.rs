//! The real GRUB, alone in QEMU, agrees with the protocol's model over the whole decision table: what it decides, what it tells the
//! kernel, and what it leaves in the environment. One VM runs every case; a second one, all again on a drive it cannot write.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that fails here says where"
)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use bootloader_glue::Bootloader;
use bootloader_glue::config::{COUNTER_CFG, GRUB_MODULES};
use bootloader_glue::grub::{SIZE, encode};
use bootloader_glue::protocol::{Boot, Counter, Environment, boot};

/// What stands beside the newest valid copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Beside {
    Older,
    BadCheck,
    BadHeader,
    Truncated,
    Empty,
    Missing,
}

impl Beside {
    const ALL: [Self; 6] = [
        Self::Older,
        Self::BadCheck,
        Self::BadHeader,
        Self::Truncated,
        Self::Empty,
        Self::Missing,
    ];

    fn bytes(self, older: Vec<u8>) -> Option<Vec<u8>> {
        let mut bytes = older;
        match self {
            Self::Older => {}
            Self::BadCheck => {
                let at = bytes.iter().rposition(|byte| *byte == b'\n').unwrap() - 9;
                bytes[at] = if bytes[at] == b'1' { b'0' } else { b'1' };
            }
            Self::BadHeader => bytes[2] = b'X',
            Self::Truncated => bytes.truncate(100),
            Self::Empty => bytes.clear(),
            Self::Missing => return None,
        }
        Some(bytes)
    }

    /// GRUB writes into a block whose header and free space it can find; nothing else is a place for it to save.
    fn takes_a_save(self) -> bool {
        match self {
            Self::Older | Self::BadCheck => true,
            Self::BadHeader | Self::Truncated | Self::Empty | Self::Missing => false,
        }
    }
}

struct Case {
    copies: [Option<Vec<u8>>; 2],
    entries: usize,
    can_save: bool,
    newer: Option<usize>,
}

/// Every armed × count × limit × rollback × entries × which copy is newer × what stands beside it; then all that is corrupt or absent.
fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut seq = 0;
    for (armed, rollback) in [(false, false), (false, true), (true, false), (true, true)] {
        for (bootcount, bootlimit) in (0..4)
            .flat_map(|count| (1..4).map(move |limit| (count, limit)))
            .chain([(8, 9), (9, 9)])
        {
            let counter = Counter {
                upgrade_available: armed,
                bootcount,
                bootlimit,
                rollback,
            };
            for (entries, newer, beside) in [1, 2]
                .into_iter()
                .flat_map(|e| [0, 1].map(|n| (e, n)))
                .flat_map(|(e, n)| Beside::ALL.map(|b| (e, n, b)))
            {
                seq = (seq + 1) % 3;
                let older = Counter {
                    upgrade_available: !armed,
                    bootcount: 7,
                    bootlimit: 9,
                    rollback: !rollback,
                };
                let mut copies = [None, None];
                copies[newer] = Some(encode(&counter, seq));
                copies[1 - newer] = beside.bytes(encode(&older, (seq + 2) % 3));
                cases.push(Case {
                    copies,
                    entries,
                    can_save: beside.takes_a_save(),
                    newer: Some(newer),
                });
            }
        }
    }
    let any = || {
        encode(
            &Counter {
                upgrade_available: true,
                bootcount: 0,
                bootlimit: 3,
                rollback: false,
            },
            0,
        )
    };
    let bad = Beside::ALL
        .into_iter()
        .filter(|beside| *beside != Beside::Older);
    for (first, second) in bad
        .clone()
        .flat_map(|first| bad.clone().map(move |second| (first, second)))
    {
        for entries in [1, 2] {
            let copies = [first.bytes(any()), second.bytes(any())];
            cases.push(Case {
                copies,
                entries,
                can_save: false,
                newer: None,
            });
        }
    }
    cases
}

#[test]
fn the_real_grub_agrees_with_the_model_over_the_whole_table() {
    let cases = cases();
    assert_eq!(cases.len(), 4 * 14 * 2 * 2 * 6 + 25 * 2);
    let bench = Bench::new(&cases);
    for writable in [true, false] {
        let decisions = bench.run(writable);
        assert_eq!(
            decisions.len(),
            cases.len(),
            "GRUB did not get through all cases"
        );
        let after = bench.read_back();
        for (n, case) in cases.iter().enumerate() {
            let before = environment(&bench.tree.path().join(name(n)));
            let saves = writable && case.can_save;
            let Boot { entry, mark, saved } = boot(&before, case.entries, saves);
            assert_eq!(
                decisions[&n],
                format!("{entry} {mark}"),
                "case {n}, writable {writable}: {before:?}"
            );
            let left = after.path().join(name(n));
            match (saved, before) {
                (Some(saved), _) => {
                    assert_eq!(
                        environment(&left),
                        Environment::Valid {
                            counter: saved,
                            damaged: false
                        },
                        "case {n}"
                    );
                    let newer = case.newer.unwrap();
                    assert_eq!(
                        copy(&left, newer),
                        case.copies[newer],
                        "case {n}: the copy that was read is written over"
                    );
                    assert_eq!(copy(&left, 1 - newer).map(|bytes| bytes.len()), Some(SIZE));
                }
                (None, _) => {
                    let unchanged = [copy(&left, 0), copy(&left, 1)];
                    assert_eq!(
                        unchanged, case.copies,
                        "case {n}: written without need: {before:?}"
                    );
                }
            }
        }
    }
}

fn name(case: usize) -> String {
    format!("d{}/c{case}", case / 40)
}

fn copy(directory: &Path, n: usize) -> Option<Vec<u8>> {
    fs::read(directory.join(format!("env.{n}"))).ok()
}

fn environment(directory: &Path) -> Environment {
    Bootloader::Grub {
        environment: directory.to_owned(),
        boot: PathBuf::new(),
    }
    .read()
    .unwrap()
}

/// A FAT disk with GRUB, the script under test, and a directory for each case.
struct Bench {
    tree: tempfile::TempDir,
    disk: tempfile::TempDir,
}

impl Bench {
    fn new(cases: &[Case]) -> Self {
        let bench = Self {
            tree: tempfile::tempdir().unwrap(),
            disk: tempfile::tempdir().unwrap(),
        };
        let tree = bench.tree.path();
        let mut script =
            "serial --unit=0 --speed=115200\nterminal_output serial\nsource (hd0)/counter.cfg\n"
                .to_owned();
        for (n, case) in cases.iter().enumerate() {
            let directory = tree.join(name(n));
            fs::create_dir_all(&directory).unwrap();
            for (copy, bytes) in case.copies.iter().enumerate() {
                if let Some(bytes) = bytes {
                    fs::write(directory.join(format!("env.{copy}")), bytes).unwrap();
                }
            }
            let _ = write!(
                script,
                "set offshoot_env=(hd0)/{}\nset offshoot_entries={}\noffshoot_decide\n\
                 echo \"decided {n} $offshoot_entry $offshoot_arguments.\"\n",
                name(n),
                case.entries
            );
        }
        script.push_str("reboot\n");
        fs::create_dir_all(tree.join("EFI/BOOT")).unwrap();
        fs::write(tree.join("EFI/BOOT/grub.cfg"), script).unwrap();
        fs::write(tree.join("counter.cfg"), COUNTER_CFG).unwrap();
        let image = tree.join("EFI/BOOT/BOOTX64.EFI");
        let mut grub = Command::new("grub-mkimage");
        run(grub
            .args(["-O", "x86_64-efi", "-p", "(hd0)/EFI/BOOT", "-o"])
            .arg(image)
            .args(GRUB_MODULES));
        bench
    }

    fn image(&self) -> PathBuf {
        self.disk.path().join("disk.img")
    }

    /// Boots GRUB on a fresh disk, and returns what it decided for each case it got to.
    fn run(&self, writable: bool) -> BTreeMap<usize, String> {
        let image = self.image();
        let file = fs::File::create(&image).unwrap();
        file.set_len(96 << 20).unwrap();
        run(Command::new("mkfs.vfat")
            .args(["-F", "32", "-n", "ESP"])
            .arg(&image));
        let mut top: Vec<_> = fs::read_dir(self.tree.path())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        top.sort();
        run(Command::new("mcopy")
            .args(["-s", "-i"])
            .arg(&image)
            .args(top)
            .arg("::"));
        let readonly = if writable { "off" } else { "on" };
        let output = Command::new("timeout")
            .args([
                "120",
                "qemu-system-x86_64",
                "-machine",
                "q35",
                "-accel",
                "tcg",
                "-m",
                "256",
            ])
            .args([
                "-display",
                "none",
                "-serial",
                "stdio",
                "-monitor",
                "none",
                "-net",
                "none",
                "-no-reboot",
            ])
            .args([
                "-drive",
                "if=pflash,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd",
                "-snapshot",
            ])
            .args([
                "-drive",
                &format!(
                    "if=none,id=d,format=raw,snapshot=off,readonly={readonly},file={}",
                    image.display()
                ),
            ])
            .args(["-device", "virtio-blk-pci,drive=d"])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let decided = text
            .lines()
            .filter_map(|line| line.split_once("decided ")?.1.split_once(' '));
        let parse = |(n, rest): (&str, &str)| {
            (
                n.parse().unwrap(),
                rest.trim_end_matches(['\r', '.']).to_owned(),
            )
        };
        decided.map(parse).collect()
    }

    fn read_back(&self) -> tempfile::TempDir {
        let after = tempfile::tempdir().unwrap();
        run(Command::new("mcopy")
            .args(["-s", "-n", "-i"])
            .arg(self.image())
            .arg("::*")
            .arg(after.path()));
        after
    }
}

fn run(command: &mut Command) {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {output:?}");
}
