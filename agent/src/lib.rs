//! Offshoot, the update agent. Read the modules in this order:
//!
//! - [`commit`]: what a release *is*: the checksum of an OSTree commit object.
//! - [`decide`]: the whole state machine, one pure function from what is recorded and observed to the next step.
//! - [`record`]: the little that cannot be observed, in two checksummed copies.
//! - [`trust`]: TUF metadata to a [`trust::Verified`] release, without I/O.
//! - [`fetch`]: bytes from the server to the spool, resumed and checked against signed digests.
//! - [`delta`]: that a static delta is the one that was signed for, before libostree reads it.
//! - [`objects`]: the index of a release's objects; [`route`]: which way leads to a release.
//! - [`deployment`]: what the deployer, the only program that links libostree, says to the others.
//! - [`health`]: the checks that a trial boot must pass, and the confirmation after them.
//! - [`schedule`]: windows of time; [`usage`]: what a month's requests have cost.
//! - [`selftest`]: whether this unit would survive a bad release, for the factory.
//! - [`events`]: the journal's message ids.
//! - [`config`]: the two files that configure all of it; [`cli`]: the words an operator types.

#[cfg(feature = "daemon")]
pub mod api;
#[cfg(feature = "daemon")]
pub mod cli;
pub mod commit;
#[cfg(feature = "config")]
pub mod config;
#[cfg(feature = "daemon")]
pub mod daemon;
pub mod decide;
pub mod delta;
pub mod deployment;
#[cfg(feature = "daemon")]
pub mod device;
pub mod events;
#[cfg(feature = "daemon")]
pub mod fetch;
#[cfg(feature = "daemon")]
pub mod health;
pub mod objects;
#[cfg(feature = "daemon")]
pub mod poll;
pub mod record;
pub mod route;
#[cfg(feature = "config")]
pub mod schedule;
#[cfg(feature = "daemon")]
pub mod selftest;
#[cfg(feature = "daemon")]
pub mod status;
pub mod trust;
#[cfg(feature = "daemon")]
pub mod usage;
