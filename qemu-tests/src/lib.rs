//! The test bed: builds a real OS, boots it under the real bootloader in QEMU, and breaks it. Read the modules in this order:
//!
//! - [`board`]: what differs between the boards.
//! - [`os`]: the base OS, a Debian described by the files in `qemu-tests/os/`.
//! - [`release`]: one release of it, good or bad in a chosen way.
//! - [`fleet`]: the operator who publishes releases; [`server`]: what serves them.
//! - [`image`]: the disk of a device, as the factory delivers it.
//! - [`uboot`]: a real U-Boot, built, and run alone.
//! - [`vm`]: a machine with that disk: watched, asked, reset, and cut off from its power.
//! - [`mod@bench`]: all of these together.
//! - [`demo`]: the main job, told live; [`footprint`]: the memory that the daemon takes; [`routes`]: what each way to a release costs.
//! - [`cache`]: what is kept between runs; [`host`]: the build host's tools.

pub mod bench;
pub mod board;
pub mod cache;
pub mod demo;
pub mod fleet;
pub mod footprint;
pub mod host;
pub mod image;
pub mod os;
pub mod release;
pub mod routes;
pub mod server;
pub mod uboot;
pub mod vm;
