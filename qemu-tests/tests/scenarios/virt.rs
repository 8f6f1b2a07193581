//! The same stories on an arm64 board under U-Boot, counted by the script and by U-Boot.

use bootloader_glue::protocol::Environment;
use bootloader_glue::uboot::Count;
use offshoot::events;
use offshoot::record::{Phase, Reason};
use qemu_tests::bench::{Bench, Web};
use qemu_tests::board::Board;
use qemu_tests::release::{Fault, Release};
use qemu_tests::vm::{Options, PATIENCE};

use super::faults::rejects;

fn virt(count: Count) -> Options {
    Options {
        board: Board::Virt(count),
        ..Options::default()
    }
}

#[test]
fn a_good_release_is_confirmed_under_a_uboot_that_counts() {
    confirms(Count::Bootcount);
}

#[test]
fn a_kernel_that_panics_falls_back_under_a_script_that_counts() {
    panics(Count::Script);
}

fn panics(count: Count) {
    let bench = rejects(virt(count), Fault::KernelPanics, 3, Reason::Unconfirmed);
    assert_eq!(bench.vm.resets(), 4);
}

/// The bench that a device has confirmed 1.1.0 on.
fn confirms(count: Count) -> Bench {
    let mut bench = Bench::start(Web::Fleet, virt(count)).unwrap();
    let target = bench.publish(&Release::good("1.1.0")).unwrap();
    bench.configure("").unwrap();
    let Bench { vm, first, .. } = &mut bench;
    // That it reboots is the last thing it says, and on a busy machine the journal's way out ends before.
    for event in [events::ARMED, events::DEPLOYED] {
        vm.wait_for_event(event, PATIENCE).unwrap();
    }
    vm.wait_for_serial("offshoot: trial 1 of 3, booting entry 0", PATIENCE)
        .unwrap();
    // The status says so a moment after the journal.
    for event in [
        events::HEALTHY,
        events::CONFIRMING,
        events::CONFIRMED,
        events::WAITING,
    ] {
        vm.wait_for_event(event, PATIENCE).unwrap();
    }
    assert_eq!(vm.resets(), 1);
    assert_eq!(vm.booted_commit().unwrap(), target);
    assert!(matches!(
        vm.environment().unwrap(),
        Environment::Valid { counter, damaged: false } if !counter.upgrade_available && !counter.rollback
    ));
    let status = vm.status().unwrap();
    assert_eq!((status.phase, status.protected), (Phase::Idle, true));
    let deployed: Vec<_> = status.deployments.iter().map(|one| one.commit).collect();
    assert_eq!(deployed, [target, *first]);
    // The administrator's tool sees the same environment.
    let printed = vm.ask(["fw_printenv", "-n", "offshoot_count"]).unwrap();
    assert_eq!(printed, count.name());
    bench
}

/// `make test-all`.
#[cfg(feature = "all")]
mod all {
    use offshoot::decide::Why;
    use offshoot::status::Boot;
    use qemu_tests::cache::Cache;
    use qemu_tests::image;
    use qemu_tests::vm::{STARTUP_FINISHED, Vm};

    use super::super::power::is_cut;
    use super::*;

    #[test]
    fn a_good_release_is_confirmed_under_a_script_that_counts() {
        confirms(Count::Script);
    }

    #[test]
    fn a_kernel_that_panics_falls_back_under_a_uboot_that_counts() {
        panics(Count::Bootcount);
    }

    #[test]
    fn a_required_health_check_that_fails_falls_back_at_once_and_says_which() {
        for count in [Count::Script, Count::Bootcount] {
            let checks = vec!["50-bench".to_owned()];
            let reason = Reason::Unhealthy { checks };
            let bench = rejects(virt(count), Fault::HealthCheckFails, 3, reason);
            assert_eq!(bench.vm.resets(), 2);
        }
    }

    #[test]
    fn an_agent_that_does_not_start_is_not_kept() {
        for count in [Count::Script, Count::Bootcount] {
            let checks = vec!["10-offshoot".to_owned()];
            let reason = Reason::Unhealthy { checks };
            let bench = rejects(virt(count), Fault::DaemonDoesNotStart, 3, reason);
            assert_eq!(bench.vm.resets(), 2);
        }
    }

    #[test]
    fn a_root_file_system_that_does_not_mount_falls_back() {
        for count in [Count::Script, Count::Bootcount] {
            let fault = Fault::RootDoesNotMount;
            let bench = rejects(virt(count), fault, 2, Reason::Unconfirmed);
            assert_eq!(bench.vm.resets(), 3);
        }
    }

    /// By the kernel's own watchdog: this board has no other that Debian's kernel knows.
    #[test]
    fn a_hang_is_ended_by_the_watchdog() {
        for count in [Count::Script, Count::Bootcount] {
            let fault = Fault::PidOneFreezes;
            let bench = rejects(virt(count), fault, 1, Reason::Unconfirmed);
            assert_eq!(bench.vm.resets(), 2);
        }
    }

    #[test]
    fn a_start_that_never_finishes_or_has_no_agent_is_ended_by_the_deadline() {
        for count in [Count::Script, Count::Bootcount] {
            for fault in [Fault::StartNeverFinishes, Fault::NoPrograms] {
                let bench = rejects(virt(count), fault, 1, Reason::Unconfirmed);
                assert_eq!(bench.vm.resets(), 2);
            }
        }
    }

    #[test]
    fn a_power_cut_at_any_moment_of_an_update_leaves_the_former_release_or_the_new_one() {
        for count in [Count::Script, Count::Bootcount] {
            is_cut(virt(count));
        }
    }

    /// Between the partition table and the first partition nothing else is on this disk. libubootenv 0.3.2 cannot write at an offset from the end of a
    /// disk of more than 2 GiB, and says so with exit code 0.
    #[test]
    fn an_environment_on_a_block_device_is_shared_with_the_administrators_tool() {
        let options = virt(Count::Script);
        let image = image::factory(&Cache::open().unwrap(), options.board).unwrap();
        let mut vm = Vm::boot_with(&image.disk, options).unwrap();
        vm.wait_for_event(STARTUP_FINISHED, PATIENCE).unwrap();
        vm.ask(["systemctl", "stop", "offshoot.service"]).unwrap();
        vm.ask(["mkdir", "-p", "/etc/offshoot"]).unwrap();
        let places = "/etc/block.config";
        for (path, content) in [
            (places, "/dev/vda 0x80000 1000\n/dev/vda 0x81000 1000\n"),
            (
                "/etc/defaults",
                "bootlimit=3\nrollback=0\noffshoot_count=script\nbootcount=2\n",
            ),
            (
                "/etc/offshoot/config.toml",
                "[bootloader]\nconfig = \"/etc/block.config\"\n",
            ),
        ] {
            vm.write_file(path, content.as_bytes()).unwrap();
        }
        let defaults = ["-f", "/etc/defaults", "upgrade_available", "1"];
        vm.ask([&["fw_setenv", "-c", places], &defaults[..]].concat())
            .unwrap();
        vm.ask(["offshoot", "confirm"]).unwrap();
        let printed = vm.ask(["fw_printenv", "-c", places]).unwrap();
        let expected =
            "bootcount=0\nbootlimit=3\noffshoot_count=script\nrollback=0\nupgrade_available=0";
        assert_eq!(printed, expected);
    }

    #[test]
    fn an_environment_that_is_lost_costs_one_boot_of_the_former_release_and_nothing_else() {
        for count in [Count::Script, Count::Bootcount] {
            let mut bench = confirms(count);
            let Bench { vm, first, .. } = &mut bench;
            let lose = "for copy in /uboot/*.env; do dd if=/dev/zero of=$copy bs=512 count=1 conv=notrunc,fsync; done";
            vm.ask(["/bin/sh", "-c", lose]).unwrap();
            vm.cut_power().unwrap();
            vm.power_on().unwrap();
            vm.wait_for_serial("offshoot: fallback (corrupt)", PATIENCE)
                .unwrap();
            vm.wait_for_event(events::SETTLED, PATIENCE).unwrap();
            vm.wait_for_event(events::WAITING, PATIENCE).unwrap();
            assert_eq!(vm.booted_commit().unwrap(), *first);
            let status = vm.status().unwrap();
            assert_eq!(status.boot, Boot::Corrupt);
            assert_eq!((status.rejections, status.phase), (vec![], Phase::Idle));
            assert_eq!(status.why, Some(Why::AnotherDefault));
            assert!(matches!(
                vm.environment().unwrap(),
                Environment::Valid { counter, damaged: false } if !counter.upgrade_available
            ));
            // What U-Boot has compiled in is there again.
            let printed = vm.ask(["fw_printenv", "-n", "bootcmd"]).unwrap();
            assert_eq!(printed, "run offshoot_start");
            vm.cut_power().unwrap();
            vm.power_on().unwrap();
            vm.wait_for_serial("offshoot: booting entry 0", PATIENCE)
                .unwrap();
            vm.wait_for_agent().unwrap();
            assert_ne!(vm.booted_commit().unwrap(), *first);
        }
    }
}
