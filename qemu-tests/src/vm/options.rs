//! What a machine is made of, as QEMU's arguments.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use crate::board::Board;

#[derive(Clone)]
pub struct Options {
    pub board: Board,
    pub processors: u32,
    pub memory_mib: u32,
    /// Of the PC; the arm64 board has none.
    pub watchdog: bool,
    /// A console on this process's terminal, with a root shell; `ctrl-a x` leaves it.
    pub console: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            board: Board::Pc,
            processors: 1,
            memory_mib: 768,
            watchdog: true,
            console: false,
        }
    }
}

impl Options {
    pub(super) fn arguments(&self, qemu: &mut Command, directory: &Path) {
        let file = |name: &str| directory.join(name).display().to_string();
        let mut add = |arguments: &[&str]| {
            qemu.args(arguments);
        };
        add(&["-name", "offshoot-bench", "-nodefaults", "-no-user-config"]);
        add(&["-display", "none"]);
        add(&["-smp", &self.processors.to_string()]);
        add(&["-m", &self.memory_mib.to_string()]);
        // How virtio devices are attached: to PCI, or without a bus.
        let bus = match self.board {
            Board::Pc => {
                add(&["-machine", "q35,sata=off,smbus=off"]);
                // The kernel would load its own hypervisor for `svm`.
                match kvm_is_usable() {
                    true => add(&["-accel", "kvm", "-cpu", "host"]),
                    false => add(&["-accel", "tcg,thread=multi", "-cpu", "max,svm=off"]),
                }
                let code = super::FIRMWARE_CODE;
                let variables = file("variables.fd");
                add(&[
                    "-drive",
                    &format!("if=pflash,format=raw,readonly=on,file={code}"),
                ]);
                add(&[
                    "-drive",
                    &format!("if=pflash,format=raw,cache=unsafe,file={variables}"),
                ]);
                if self.watchdog {
                    add(&["-device", "i6300esb", "-action", "watchdog=reset"]);
                }
                "pci"
            }
            Board::Virt(_) => {
                add(&["-machine", "virt", "-cpu", "cortex-a57"]);
                add(&["-accel", "tcg,thread=multi"]);
                add(&["-bios", &file("u-boot.bin")]);
                "device"
            }
        };
        let disk = file("disk.qcow2");
        add(&[
            "-drive",
            &format!("if=none,id=disk,format=qcow2,cache=unsafe,discard=unmap,file={disk}"),
        ]);
        add(&[
            "-device",
            &format!("virtio-blk-{bus},drive=disk,bootindex=0"),
        ]);
        add(&["-netdev", "user,id=net"]);
        // No option ROM: the firmware does not try the network.
        let rom = if self.board == Board::Pc {
            ",romfile="
        } else {
            ""
        };
        add(&["-device", &format!("virtio-net-{bus},netdev=net{rom}")]);
        for device in ["rng", "serial"] {
            add(&["-device", &format!("virtio-{device}-{bus}")]);
        }
        let serial = match self.board {
            Board::Pc => ["-device", "isa-serial,chardev=serial"],
            // Part of the board.
            Board::Virt(_) => ["-serial", "chardev:serial"],
        };
        let socket = file("serial");
        add(&["-chardev", &format!("socket,id=serial,path={socket}")]);
        add(&serial);
        for (name, device) in [
            (
                "agent",
                "virtserialport,chardev=agent,id=agent,name=org.qemu.guest_agent.0",
            ),
            (
                "journal",
                "virtserialport,chardev=journal,id=journal,name=journal",
            ),
        ] {
            let socket = file(name);
            add(&["-chardev", &format!("socket,id={name},path={socket}")]);
            add(&["-device", device]);
        }
        let socket = file("qmp");
        add(&["-chardev", &format!("socket,id=qmp,path={socket}")]);
        add(&["-mon", "chardev=qmp,mode=control"]);
        if self.console {
            add(&["-chardev", "stdio,id=console,mux=on,signal=off"]);
            add(&["-device", "virtconsole,chardev=console"]);
            add(&["-mon", "chardev=console,mode=readline"]);
        }
        // The machine starts when its sockets are read.
        add(&["-S"]);
    }
}

/// Some build machines have the device node but a processor that cannot use it.
fn kvm_is_usable() -> bool {
    let processor = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let able = processor
        .lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| line.split(' ').any(|flag| flag == "vmx" || flag == "svm"));
    able && File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok()
}
