//! Offshoot, the update agent. Read the modules in this order:
//!
//! - [`commit`]: what a release *is*: the checksum of an OSTree commit object.
//! - [`decide`]: the whole state machine, one pure function from what is recorded and observed to the next step.
//! - [`record`]: the little that cannot be observed, in two checksummed copies.
//! - [`trust`]: TUF metadata to a [`trust::Verified`] release, without I/O.
//! - [`delta`]: the OSTree static-delta superblock, parsed just far enough to know what it would produce.
//! - [`fetch`]: bytes from the server to the spool, resumed and checked against signed digests.
//! - [`device`]: observe the device and perform one step on it, with the deployer and the bootloader.
//! - [`health`]: the checks that a trial boot must pass, and the confirmation after them.
//! - [`daemon`]: the loop around all of it; [`api`]: its unix socket; [`cli`]: the words an operator types.

pub mod commit;
pub mod decide;
pub mod delta;
pub mod deployment;
pub mod record;
pub mod trust;

#[cfg(feature = "daemon")]
pub mod config;
#[cfg(feature = "daemon")]
pub mod fetch;
#[cfg(feature = "daemon")]
pub mod health;
