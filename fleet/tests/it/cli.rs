//! The words themselves: pages, completions, and what a shell sees.

use std::io::Write as _;
use std::process::{Command, Output, Stdio};

use crate::bench::Bench;

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_offshoot-fleet"))
        .args(arguments)
        .output()
        .unwrap()
}

#[test]
fn each_verb_has_a_page_and_a_completion() {
    let page = |arguments: &[&str]| {
        let output = run(arguments);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let main = page(&["man"]);
    let listed: Vec<_> = main
        .lines()
        .filter_map(|line| {
            line.strip_prefix("offshoot\\-fleet\\-")?
                .strip_suffix("(1)")
        })
        .collect();
    assert!(listed.contains(&"publish"), "{listed:?}");
    let completions = page(&["completions", "bash"]);
    for verb in listed {
        let page = page(&["man", verb]);
        assert!(
            page.contains(&format!(".TH offshoot-fleet-{verb} 1 ")),
            "{page}"
        );
        assert!(completions.contains(verb));
    }
    let mut bash = Command::new("bash")
        .arg("-n")
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    bash.stdin
        .take()
        .unwrap()
        .write_all(completions.as_bytes())
        .unwrap();
    assert!(bash.wait().unwrap().success());
    assert_eq!(run(&["man", "nothing"]).status.code(), Some(1));
}

#[test]
fn what_is_meant_for_people_is_said_without_json_too() {
    let bench = Bench::new();
    let commit = bench.compose("1.0.0", 9);
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_offshoot-fleet"));
        let output = command
            .arg("--fleet")
            .arg(bench.path("fleet"))
            .args(arguments)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let published = run(&Bench::publishing("stable", "1.0.0", &["--full"]));
    assert_eq!(published.lines().next(), Some(&*commit));
    assert!(run(&["status"]).contains(&commit));
    assert!(run(&["refresh", "--force"]).starts_with("timestamp 3 "));
}
