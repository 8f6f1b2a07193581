//! The device's TUF client against python-tuf, the specification's reference implementation: repositories that python-tuf made and
//! serves, read by the same program that the official conformance suite drives (`examples/tuf-conformance.rs`).
//!
//! Tests are named after the clause of the specification's client workflow that they are of; docs/tuf.md lists them.

// Its `main` is for the command line.
#[allow(dead_code)]
#[path = "../../../examples/tuf-conformance.rs"]
mod client;
mod documents;
mod peer;
mod process;
mod search;
mod signatures;
