//! `offshoot-fleet image`, run by an ordinary user, and what is on the disk, read back without mounting it.

mod deployed;
mod disk;
mod dump;
mod unit;

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

use crate::bench;
use dump::Dump;

/// Nobody on this machine, who may do nothing special.
const USER: u32 = 12345;

const CONFIG: &str =
    "[server]\nurl = 'https://updates.invalid/'\n[device]\nhardware = 'x'\nchannel = 'x'\n";

const UBOOT_CONFIG: &str =
    "[server]\nurl = 'https://updates.invalid/'\n[bootloader]\nkind = 'uboot'\n";

const UBOOT_ENVIRONMENT: &str =
    "bootcmd=run offshoot_start\naltbootcmd=run bootcmd\nbaudrate=115200\n";

/// A fleet, a tree to compose, and a place for the user to write to.
struct Bench {
    fleet: bench::Bench,
}

impl Bench {
    fn new() -> Self {
        let bench = Self {
            fleet: bench::Bench::new(),
        };
        let tree = bench.tree();
        for (path, text) in [
            ("usr/lib/modules/6.12/vmlinuz", "kernel"),
            ("usr/lib/modules/6.12/initramfs.img", "initramfs"),
            (
                "usr/lib/os-release",
                "NAME=Bench\nPRETTY_NAME=\"Bench 1\"\n",
            ),
            ("usr/lib/offshoot/config.toml", CONFIG),
            ("usr/bin/tool", "tool"),
            ("etc/passwd", "root"),
            ("etc/machine-id", ""),
        ] {
            bench.write(path, text.as_bytes());
        }
        fs::copy(
            bench.fleet.path("fleet/root.json"),
            tree.join("usr/lib/offshoot/root.json"),
        )
        .unwrap();
        symlink("../usr/lib/os-release", tree.join("etc/os-release")).unwrap();
        symlink("usr/bin", tree.join("bin")).unwrap();
        let everybody = fs::Permissions::from_mode(0o755);
        fs::set_permissions(bench.fleet.path(""), everybody.clone()).unwrap();
        let program = bench.fleet.path("offshoot-fleet");
        fs::copy(env!("CARGO_BIN_EXE_offshoot-fleet"), &program).unwrap();
        fs::set_permissions(&program, everybody).unwrap();
        for directory in ["out", "other"] {
            let directory = bench.fleet.path(directory);
            fs::create_dir(&directory).unwrap();
            chown(&directory, Some(USER), Some(USER)).unwrap();
        }
        bench
    }

    fn tree(&self) -> PathBuf {
        self.fleet.path("tree")
    }

    fn write(&self, path: &str, content: &[u8]) {
        let path = self.tree().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    fn compose(&self) -> String {
        let arguments = [
            "compose",
            "--tree=tree",
            "--branch=os",
            "--release=1.0",
            "--timestamp=1700000000",
        ];
        let composed = self.fleet.run(&arguments);
        composed["commit"].as_str().unwrap().to_owned()
    }

    /// The layout of a board, without what is not in the tree, in a file that everybody may read.
    fn layout(&self, board: &str, change: impl Fn(String) -> String) -> String {
        let printed = self
            .fleet
            .output(&["image", "--print-layout", "--board", board]);
        assert!(printed.status.success(), "{printed:?}");
        let text = String::from_utf8(printed.stdout).unwrap();
        let plain = text.lines().filter(|line| !line.starts_with("grow"));
        let text = change(plain.map(|line| format!("{line}\n")).collect());
        let path = self.fleet.path("layout.toml");
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// The user makes an image of branch `os`.
    fn command(&self, output: &str, more: &[&str]) -> Command {
        let mut command = Command::new("setpriv");
        let user = USER.to_string();
        command
            .args([
                &format!("--reuid={user}"),
                &format!("--regid={user}"),
                "--clear-groups",
            ])
            .args(["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"])
            .arg(self.fleet.path("offshoot-fleet"))
            .args([
                "--json",
                "--fleet",
                "fleet",
                "image",
                "--commit=os",
                "--output",
                output,
            ])
            .args(more)
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .current_dir(self.fleet.path(""));
        for usual in ["--channel=stable", "--hardware=qemu-x86_64"] {
            let (key, _) = usual.split_once('=').unwrap();
            if !more.iter().any(|argument| argument.starts_with(key)) {
                command.arg(usual);
            }
        }
        command
    }

    fn image(&self, output: &str, more: &[&str]) -> Value {
        let output = self.command(output, more).output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Fails, and leaves nothing. What it says.
    fn refused(&self, more: &[&str]) -> String {
        let output = self.command("out/refused.img", more).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(output.stdout.is_empty(), "{output:?}");
        assert_eq!(fs::read_dir(self.fleet.path("out")).unwrap().count(), 0);
        String::from_utf8(output.stderr).unwrap()
    }

    /// A partition of an image, in a file.
    fn part(&self, made: &Value, name: &str) -> PathBuf {
        let image = self.fleet.path(made["image"].as_str().unwrap());
        let parts = made["partitions"].as_array().unwrap();
        let part = parts.iter().find(|part| part["name"] == name).unwrap();
        let number = |key: &str| part[key].as_u64().unwrap();
        let to = self.fleet.path(&format!("{name}.part"));
        dump::cut_out(
            &image,
            number("start")..number("start") + number("size"),
            &to,
        );
        to
    }

    fn ext4(&self, made: &Value, name: &str) -> Dump {
        let part = self.part(made, name);
        let scratch = self.fleet.path(&format!("{name}.dump"));
        if scratch.exists() {
            fs::remove_dir_all(&scratch).unwrap();
        }
        dump::of_ext4(&part, &scratch)
    }

    /// The path of the deployment in the root file system.
    fn deployment(&self, made: &Value) -> String {
        format!(
            "ostree/deploy/offshoot/deploy/{}.0",
            made["commit"].as_str().unwrap()
        )
    }

    fn run(&self, program: &str, arguments: &[&str]) -> String {
        let output = Command::new(program)
            .args(arguments)
            .current_dir(self.fleet.path(""))
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{program} {arguments:?}: {output:?}"
        );
        String::from_utf8(output.stdout).unwrap()
    }
}

/// Differences by path, so that a failure can be read.
fn assert_same(what: &str, found: &Dump, wanted: &Dump) {
    for (path, node) in wanted {
        assert_eq!(found.get(path), Some(node), "{what}: {path}");
    }
    for path in found.keys() {
        assert!(
            wanted.contains_key(path),
            "{what}: {path} should not be there"
        );
    }
}

fn uboot_bench() -> (Bench, String) {
    let bench = Bench::new();
    bench.write("usr/lib/offshoot/config.toml", UBOOT_CONFIG.as_bytes());
    let initial = bench.fleet.path("u-boot-initial-env");
    fs::write(&initial, UBOOT_ENVIRONMENT).unwrap();
    (bench, format!("--uboot-environment={}", initial.display()))
}
