//! The journal's message ids: what tests, dashboards and operators wait for. Nobody reads the words.
//!
//! Each is the `MESSAGE_ID` of one kind of entry, constant for ever; `journalctl MESSAGE_ID=…` finds them.

/// The daemon runs. `COMMIT`, `VERSION`: the running deployment.
pub const STARTED: &str = "29392cf7c3e52eb25917f3441e95d4bc";
/// The server answered and its metadata verified. `OFFER`: the newest release's commit, if there is one.
pub const POLLED: &str = "f2fcf43f26577a74c95791e729518e61";
/// A poll failed; `FAULT` names the reason, the message tells it, `RETRY_SECONDS` says when it is tried again.
pub const POLL_FAILED: &str = "90245b23defc77551480734743feffe9";
/// An update was begun: `COMMIT` is to follow `FROM`.
pub const STAGED: &str = "0830cbf572412dfb30d9d1a0a94525ff";
/// Every file of the release is in the spool, checked.
pub const FETCHED: &str = "42ddf163dd164f131581b0aebfa596a6";
/// The release's commit is complete in the repository.
pub const APPLIED: &str = "c6f6646b19b62bd1a03ada9e3f07a4fd";
/// The boot counter is armed and was read back.
pub const ARMED: &str = "badb29290602aa07bc7a710f40b863f7";
/// The release is deployed beside the running system and is the bootloader's default.
pub const DEPLOYED: &str = "0c8e7eb2fc18b82a17b3fc35aaef0b04";
/// The device is asked to reboot into `COMMIT`.
pub const REBOOTING: &str = "566b64abc7909f93339b939d36082c26";
/// The trial of `COMMIT` ended well; it is recorded.
pub const CONFIRMED: &str = "fe1fdce1133193cc3d813ea7639dfac5";
/// `COMMIT` is not tried again; `REASON` is the reason's kind.
pub const REJECTED: &str = "ff00780489bac960ef2d5f8ecef5f1dd";
/// Every deployment of `COMMIT` but the running one is removed.
pub const UNDEPLOYED: &str = "7be2e5905641c82d146d3b8f635ea818";
/// The boot counter is disarmed, the environment whole.
pub const SETTLED: &str = "0c1b3f88b0ee35cafc0aae252782585d";
/// What was begun is no longer wanted.
pub const ABANDONED: &str = "df6169893981ef70e8d542fdac01732a";
/// Nothing is to be done until a fact changes; `WHY` is why.
pub const WAITING: &str = "fc63f0f2b89298f188fec1be3d118644";
/// A step failed and changed nothing; `STEP` names it, `FAULT` the reason, `RETRY_SECONDS` says when it is tried again.
pub const STEP_FAILED: &str = "e4303435070b4ed9f300de00c6d54d59";
/// Every required health check of this boot passed.
pub const HEALTHY: &str = "0b6426c1bdf9e6ce49bbb2e5413e392e";
/// A required health check failed; `CHECKS` names them.
pub const UNHEALTHY: &str = "674306310b89b49457a122c404a70af0";
/// The trial was confirmed in the boot environment.
pub const CONFIRMING: &str = "b5e9aaae4859cddeef2e80b5428cc9e2";
/// Something on disk was corrupt and has been set aside: `FILE`.
pub const DAMAGED: &str = "2ede6f7ce3c93249738d96e2fa0e2de7";
