//! Writes the manual pages of `offshoot`, one for each verb, and completions for bash, fish and zsh into a directory: what a package installs.
//!
//! `cargo run -p offshoot --example docs -- DIRECTORY`

use std::path::PathBuf;

use clap_complete::Shell;

fn main() -> std::io::Result<()> {
    let Some(directory) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: docs DIRECTORY");
        std::process::exit(2);
    };
    std::fs::create_dir_all(&directory)?;
    clap_mangen::generate_to(offshoot::cli::command(), &directory)?;
    for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
        clap_complete::generate_to(shell, &mut offshoot::cli::command(), "offshoot", &directory)?;
    }
    Ok(())
}
