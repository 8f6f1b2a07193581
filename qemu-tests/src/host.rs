//! Running the build host's tools.
//!
//! Owns how a tool's failure is told: its argv, its exit status and the end of what it printed.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

/// Runs `command` to its end and returns what it wrote to its standard output.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("starting {command:?}: `make setup` installs what is needed"))?;
    let stdout = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!(
            "{command:?}: {}\n{}{}",
            output.status,
            last_lines(&stdout, 20),
            last_lines(&stderr, 40)
        );
    }
    Ok(stdout.into_owned())
}

/// `run(Command::new(argv[0]).args(argv[1..]))`, for the many calls that need nothing more.
#[macro_export]
macro_rules! run {
    ($program:expr $(, $argument:expr)* $(,)?) => {
        $crate::host::run(std::process::Command::new($program)$(.arg($argument))*)
    };
}

/// One of this workspace's own programs, built for release as a device has it.
pub fn program(name: &str) -> Result<PathBuf> {
    built("release", name, "make binaries")
}

/// The same for arm64.
pub fn cross_program(name: &str) -> Result<PathBuf> {
    built("aarch64-unknown-linux-gnu/release", name, "make arm64")
}

fn built(directory: &str, name: &str, by: &str) -> Result<PathBuf> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let target = match std::env::var_os("CARGO_TARGET_DIR") {
        Some(target) => workspace.join(target),
        None => workspace.join("target"),
    };
    let program = target.join(directory).join(name);
    program
        .canonicalize()
        .with_context(|| format!("finding {}: `{by}` builds it", program.display()))
}

/// Does `work` and tells how long it took.
pub fn timed<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    let result = work().with_context(|| what.to_owned())?;
    eprintln!("{:6.1} s  {what}", start.elapsed().as_secs_f64());
    Ok(result)
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..]
        .iter()
        .flat_map(|line| [line, "\n"])
        .collect()
}
