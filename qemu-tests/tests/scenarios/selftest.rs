//! A unit tested where it is made: one that is sound, and ones that would not survive a bad release, each told by the question that fails.

use bootloader_glue::protocol::{Counter, Environment};
use bootloader_glue::uboot::Count;
use offshoot::selftest::{Question, Report};
use qemu_tests::bench::{Bench, Web};
use qemu_tests::board::Board;
use qemu_tests::uboot::script_image;
use qemu_tests::vm::{Options, PATIENCE, STARTUP_FINISHED, Vm};

/// A place beyond the last partition where nothing is.
const WRONG_OFFSETS: &str = "/dev/vda -0x80000 1000\n/dev/vda -0x7f000 1000\n";

#[test]
fn a_unit_rehearses_its_fallback_and_its_watchdog_and_is_left_as_it_was() {
    let mut bench = start(Options::default());
    rehearses(&mut bench);
    assert_eq!(bench.vm.watchdog_resets(), 1);
}

#[test]
fn a_unit_without_a_watchdog_a_counting_script_or_an_environment_is_told_so() {
    let mut bench = start(Options {
        watchdog: false,
        ..Options::default()
    });
    let vm = &mut bench.vm;
    assert_eq!(failed(vm, &[]), [Question::Watchdog]);
    // What is seen to be wrong is not rehearsed.
    assert_eq!(failed(vm, &["--rehearse"]), [Question::Watchdog]);
    assert_eq!(failed(vm, &["--result"]), [Question::Watchdog]);
    edit_grub_cfg(vm, "1d");
    assert_eq!(failed(vm, &[]), [Question::BootCounter, Question::Watchdog]);
    configure(vm, "environment = \"/efi/EFI\"");
    assert_eq!(
        failed(vm, &[]),
        [
            Question::BootEnvironment,
            Question::BootCounter,
            Question::Watchdog
        ]
    );
    assert_eq!(vm.resets(), 0);
}

#[test]
fn a_unit_with_a_wrong_offset_or_a_script_that_does_not_count_is_told_so() {
    let mut bench = start(virt(Count::Script));
    let vm = &mut bench.vm;
    assert_eq!(failed(vm, &[]), []);
    vm.write_file("/etc/wrong.config", WRONG_OFFSETS.as_bytes())
        .unwrap();
    configure(vm, "config = \"/etc/wrong.config\"");
    assert_eq!(failed(vm, &[]), [Question::BootEnvironment]);
    configure(vm, "");
    install_script(vm, "echo nobody counts here\n");
    assert_eq!(failed(vm, &[]), [Question::BootCounter]);
}

fn virt(count: Count) -> Options {
    Options {
        board: Board::Virt(count),
        ..Options::default()
    }
}

/// A unit that is up.
fn start(options: Options) -> Bench {
    let mut bench = Bench::start(Web::Fleet, options).unwrap();
    bench.vm.wait_for_event(STARTUP_FINISHED, PATIENCE).unwrap();
    bench
}

/// What is not as it should be; the words are for whoever reads the test's output.
fn failed(vm: &mut Vm, arguments: &[&str]) -> Vec<Question> {
    let report = told(vm, arguments).expect("a test that has ended");
    let answers = report.answers.into_iter();
    let failed: Vec<_> = answers.filter(|answer| !answer.passed).collect();
    for answer in &failed {
        eprintln!("{}: {}", answer.question.name(), answer.found);
    }
    failed.into_iter().map(|answer| answer.question).collect()
}

/// The report, if there is one.
fn told(vm: &mut Vm, arguments: &[&str]) -> Option<Report> {
    let output = vm
        .run([&["offshoot", "selftest", "--json"], arguments].concat())
        .unwrap();
    if output.status == 1 {
        return None;
    }
    let report: Report = serde_json::from_str(&output.stdout).unwrap();
    assert_eq!(output.status, if report.passed { 0 } else { 8 });
    Some(report)
}

/// Begins a rehearsal, which resets the unit so many times, and waits for its end.
fn rehearse(vm: &mut Vm, arguments: &[&str], resets: usize) -> Vec<Question> {
    vm.ask(["rm", "-f", "/var/lib/offshoot/selftest.json"])
        .unwrap();
    vm.start(&[&["offshoot", "selftest", "--rehearse"], arguments].concat())
        .unwrap();
    for _ in 0..resets {
        vm.wait_for_reset(PATIENCE).unwrap();
    }
    // The last boot is up when the test has come to its end; those before it may be told late.
    while told(vm, &["--result"]).is_none() {
        vm.wait_for_event(STARTUP_FINISHED, PATIENCE).unwrap();
    }
    let report = told(vm, &["--result"]).unwrap();
    assert!(report.rehearsed, "{report:?}");
    failed(vm, &["--result"])
}

/// A sound unit.
fn rehearses(bench: &mut Bench) {
    let Bench { vm, first, .. } = bench;
    let before = vm.environment().unwrap();
    assert_eq!(rehearse(vm, &[], 3), []);
    assert_eq!(vm.booted_commit().unwrap(), *first);
    assert_eq!(vm.environment().unwrap(), before);
    assert_eq!(
        before,
        Environment::Valid {
            counter: Counter {
                upgrade_available: false,
                bootcount: 0,
                bootlimit: 3,
                rollback: false,
            },
            damaged: false,
        }
    );
}

/// The rest of the unit's configuration.
fn configure(vm: &mut Vm, bootloader: &str) {
    let text = format!("[bootloader]\n{bootloader}\n");
    vm.write_file("/etc/offshoot/config.toml", text.as_bytes())
        .unwrap();
}

fn edit_grub_cfg(vm: &mut Vm, expression: &str) {
    vm.ask(["mount", "-o", "remount,rw", "/boot"]).unwrap();
    vm.ask(["sed", "-i", expression, "/boot/loader/grub.cfg"])
        .unwrap();
    vm.ask(["mount", "-o", "remount,ro", "/boot"]).unwrap();
}

fn install_script(vm: &mut Vm, text: &str) {
    vm.ask(["mount", "-o", "remount,rw", "/boot"]).unwrap();
    vm.write_file("/boot/boot.scr", &script_image(text).unwrap())
        .unwrap();
    vm.ask(["mount", "-o", "remount,ro", "/boot"]).unwrap();
}

/// `make test-all`.
#[cfg(feature = "all")]
mod all {
    use bootloader_glue::uboot::BOOT_CMD;

    use super::*;

    #[test]
    fn a_unit_with_uboot_rehearses_its_fallback_and_its_watchdog_and_is_left_as_it_was() {
        for count in [Count::Script, Count::Bootcount] {
            rehearses(&mut start(virt(count)));
        }
    }

    #[test]
    fn a_rehearsal_finds_what_cannot_be_seen() {
        let mut bench = start(Options::default());
        let vm = &mut bench.vm;
        // Whole, and not what GRUB reads.
        vm.ask(["cp", "-r", "/efi/offshoot", "/efi/elsewhere"])
            .unwrap();
        configure(vm, "environment = \"/efi/elsewhere\"");
        assert_eq!(failed(vm, &[]), []);
        assert_eq!(
            rehearse(vm, &["--no-watchdog"], 1),
            [Question::EnvironmentShared]
        );
        // As it was before.
        assert_eq!(failed(vm, &[]), []);

        configure(vm, "");
        edit_grub_cfg(vm, "s/\"$upgrade_available\" = 1/1 = 0/");
        assert_eq!(failed(vm, &[]), []);
        assert_eq!(
            rehearse(vm, &["--no-watchdog"], 1),
            [Question::EnvironmentShared]
        );

        // It counts now, and does not mind the limit.
        edit_grub_cfg(
            vm,
            "s/1 = 0/1 = 1/;s/\"$bootcount\" -lt \"$bootlimit\"/1 = 1/",
        );
        vm.disconnect_watchdog().unwrap();
        assert_eq!(failed(vm, &[]), []);
        assert_eq!(
            rehearse(vm, &[], 2),
            [Question::CounterFallsBack, Question::WatchdogFires]
        );
        assert_eq!(failed(vm, &[]), []);
        assert_eq!(vm.resets(), 4);
    }

    #[test]
    fn a_rehearsal_finds_what_cannot_be_seen_with_uboot() {
        for count in [Count::Script, Count::Bootcount] {
            let mut bench = start(virt(count));
            let vm = &mut bench.vm;
            // An environment is there, too, as a former layout had it, and U-Boot reads the one in its files.
            vm.write_file("/etc/wrong.config", WRONG_OFFSETS.as_bytes())
                .unwrap();
            let copy = "cat /uboot/uboot.env /uboot/uboot-redund.env | dd of=/dev/vda bs=4096 conv=notrunc,fsync \
                        seek=$((($(blockdev --getsize64 /dev/vda) - 0x80000) / 4096))";
            vm.ask(["/bin/sh", "-c", copy]).unwrap();
            configure(vm, "config = \"/etc/wrong.config\"");
            assert_eq!(failed(vm, &[]), []);
            let unshared = [Question::EnvironmentShared];
            assert_eq!(rehearse(vm, &["--no-watchdog"], 1), unshared);
            assert_eq!(failed(vm, &[]), []);

            configure(vm, "");
            let ignores = BOOT_CMD.replace("offshoot_armed=yes; fi", "offshoot_armed=no; fi");
            assert_ne!(ignores, BOOT_CMD);
            install_script(vm, &ignores);
            assert_eq!(failed(vm, &[]), []);
            assert_eq!(rehearse(vm, &["--no-watchdog"], 1), unshared);

            let endless = BOOT_CMD.replace("offshoot_spent=1", "true");
            assert_ne!(endless, BOOT_CMD);
            install_script(vm, &endless);
            assert_eq!(failed(vm, &[]), []);
            assert_eq!(
                rehearse(vm, &["--no-watchdog"], 2),
                [Question::CounterFallsBack]
            );
            assert_eq!(failed(vm, &[]), []);
            assert_eq!(vm.resets(), 4);
        }
    }
}
