//! TUF 1.0 metadata to a verified release, without I/O. Read the modules in this order:
//!
//! - [`canonical`]: the one byte form of a JSON value, which is what a signature covers, and a strict parser.
//! - [`schema`]: the documents, for the device to read and for the operator's tool to write.
//! - [`Refusal`]: one variant per rule that can be broken.

pub mod canonical;
mod refusal;
pub mod schema;

pub use refusal::Refusal;
