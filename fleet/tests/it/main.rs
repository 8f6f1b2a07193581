//! The program as an operator runs it, and as a device sees what it did. Needs root, for owners and capabilities in a tree.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that fails here says where"
)]

mod bench;
mod bundle;
mod cli;
mod compose;
mod device;
mod image;
mod keys;
mod objects;
mod publish;
mod push;
mod python_tuf;
mod serve;
mod sign;
mod token;
