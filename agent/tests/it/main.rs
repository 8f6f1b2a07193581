//! Component tests of what runs on a device: real servers on loopback ports, real libostree on sysroots in temporary directories, real
//! boot environments. Needs root, as libostree's deployments do.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that fails here says where"
)]
// Nothing in a test binary is reachable from outside; `pub` says what a module offers the others.
#![allow(unreachable_pub)]

mod bench;
mod cli;
mod delta;
mod deployer;
mod fetch;
mod fuzz;
mod health;
mod hostile;
mod links;
mod machine;
mod network;
mod selftest;
mod server;
mod signer;
mod tuf;
mod update;

// The repository that the library's own tests sign. It speaks of the library's modules by these names.
#[path = "../../src/trust/fixture.rs"]
#[allow(dead_code)]
mod fixture;
use offshoot::commit;
#[allow(unused_imports)]
use offshoot::trust::{Refusal, goal, refresh, schema, store, verify};
