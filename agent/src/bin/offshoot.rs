//! The agent's command line. See [`offshoot::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    offshoot::cli::run(std::env::args_os())
}
