//! Scenarios on real machines: each boots the OS under the real bootloader, lets a device follow a fleet, breaks something, and asks
//! what is left. Each is a story told in order.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that fails here says where"
)]

mod faults;
mod good;
#[cfg(feature = "all")]
mod links;
mod power;
mod selftest;
mod virt;
