//! TUF 1.0 metadata to a verified release. Read the modules in this order:
//!
//! - [`canonical`]: the one byte form of a JSON value, which is what a signature covers, and a strict parser.
//! - [`schema`]: the documents, for the device to read and for the operator's tool to write.
//! - [`verify`]: the client workflow, one function for each document, to a [`Verified`] release.
//! - [`store`]: what was verified, on disk; the only module here that touches a file.
//! - [`goal`]: what is looked for: a device's release, or any target.
//! - [`refresh`]: the order of requests, for a transport to carry out.
//! - [`Refusal`]: one variant per rule that can be broken.

pub mod canonical;
#[cfg(test)]
pub(crate) mod fixture;
pub mod goal;
pub mod refresh;
mod refusal;
pub mod schema;
pub mod store;
pub mod verify;

pub use refusal::Refusal;
pub use verify::{Entry, Release, Verified};
