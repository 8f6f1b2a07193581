//! `qemu-tests`: tells the main job live, measures the daemon's memory and the ways to a release, builds the test bed's disk image, and offers a shell on a machine that runs it.

use std::time::Duration;

use anyhow::{Result, bail};
use qemu_tests::board::Board;
use qemu_tests::cache::Cache;
use qemu_tests::vm::{Options, Vm};
use qemu_tests::{demo, footprint, image, routes};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let cache = Cache::open()?;
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["image"] => {
            let image = image::factory(&cache, Board::Pc)?;
            println!("{}", image.disk.display());
            Ok(())
        }
        ["shell"] => {
            let image = image::factory(&cache, Board::Pc)?;
            eprintln!("A root shell appears when the machine is up; ctrl-a x leaves it.");
            let options = Options {
                console: true,
                ..Options::default()
            };
            // A day is longer than anybody types.
            Vm::boot_with(&image.disk, options)?.wait_for_power_off(Duration::from_secs(86_400))
        }
        ["demo"] => demo::demo(),
        ["footprint"] => footprint::footprint(),
        ["routes"] => routes::routes(&cache),
        _ => bail!("usage: qemu-tests demo|footprint|image|routes|shell"),
    }
}
