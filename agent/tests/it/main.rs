//! Component tests: the agent's parts against real counterparts on this machine.

// clippy.toml permits it in tests, but does not see that helpers are part of them.
#![allow(clippy::unwrap_used, clippy::expect_used)]
// Nothing in a test binary is reachable from outside; `pub` says what a module offers the others.
#![allow(unreachable_pub)]

mod fetch;
mod server;
