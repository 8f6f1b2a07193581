//! What libostree runs to write `grub.cfg`: `ostree-grub-generator -o <boot>/loader.N/grub.cfg`. The entries are beside it.
//!
//! libostree swaps `loader` to `loader.N` after this ends, so a power cut leaves the former configuration. A failure fails the deployment.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use bootloader_glue::config::{grub_cfg, read_entries};

const USAGE: &str = "\
usage: ostree-grub-generator -o PATH

Writes GRUB's configuration, with Offshoot's boot counter in it, from the boot loader entries
in the directory `entries` beside PATH. libostree runs it (OSTREE_GRUB2_EXEC).

OFFSHOOT_GRUB_BOOT_PREFIX  where the entries' paths begin on GRUB's boot partition; by default
                           nothing, or /boot when /boot is on the root file system";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments
        .iter()
        .map(String::as_str)
        .collect::<Vec<_>>()
        .as_slice()
    {
        ["-o", path] => match generate(Path::new(path)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("ostree-grub-generator: {error}");
                ExitCode::FAILURE
            }
        },
        ["-h" | "--help"] => {
            println!("{USAGE}");
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn generate(path: &Path) -> Result<(), String> {
    let loader = path.parent().unwrap_or(Path::new("."));
    let entries = read_entries(&loader.join("entries")).map_err(|error| error.to_string())?;
    let text = grub_cfg(&entries, &prefix(loader));
    let write = || -> std::io::Result<()> {
        let mut file = File::create(path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    write().map_err(|error| format!("writing {}: {error}", path.display()))
}

/// The entries' paths are relative to the boot file system. GRUB needs `/boot` before them when that is the root file system.
fn prefix(loader: &Path) -> String {
    if let Ok(prefix) = std::env::var("OFFSHOOT_GRUB_BOOT_PREFIX") {
        return prefix;
    }
    let boot: PathBuf = loader.join("..");
    let device = |path: &Path| fs::metadata(path).map(|meta| meta.dev());
    match (device(&boot), device(&boot.join("../ostree/repo"))) {
        (Ok(boot), Ok(repo)) if boot == repo => "/boot".to_owned(),
        _ => String::new(),
    }
}
