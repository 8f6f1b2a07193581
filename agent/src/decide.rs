//! The heart: from what is recorded and what is observed to the one next step.
//!
//! [`decide`] is pure and total: no clock, no I/O, no logging. Every state that a power cut can leave behind has a row,
//! so recovering from one is not a special path but the only path. The loop around it is
//! `observe → decide → perform → record`; a step that failed changes nothing that is observed and is simply decided
//! again, except where its tries are counted in the record first ([`Step::Apply`], [`Step::Deploy`]).
//!
//! The orders that the promises rest on:
//! - the record says `Trial` → the counter is armed → the default moves: an unproven default is never unarmed;
//! - on success the bootloader commits first and the record follows;
//! - on failure the record commits first, then the bad deployment goes, and only then is the counter disarmed, so that no
//!   counter state can choose it.

use bootloader_glue::protocol::{Environment, Fallback, Mark};
use serde::{Deserialize, Serialize};

use crate::commit::Commit;
use crate::record::{Phase, Reason, Record};

/// How often a release is applied, and how often deployed, before it is given up.
pub const ATTEMPTS: u8 = 3;

/// What the device looks like now.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Facts {
    /// The commit of the running deployment.
    pub booted: Commit,
    /// The commits of all deployments in boot order: the first is the bootloader's default.
    pub deployed: Vec<Commit>,
    /// There are deployments that are neither booted, pinned, nor the target of what is recorded.
    pub spare: bool,
    /// What the bootloader told this boot.
    pub mark: Mark,
    /// The boot environment now.
    pub environment: Environment,
    /// The health checks' word on the last trial that failed.
    pub verdict: Option<Verdict>,
    /// The newest verified release for this device.
    pub offer: Option<Commit>,
    /// How much of the recorded target is on disk.
    pub progress: Progress,
    /// Whether the target may be fetched now, if it is not there.
    pub download: Download,
    /// Whether the installation may take the device down now.
    pub consent: Consent,
    /// The bootloader is known to honour the counter.
    pub protected: bool,
    /// The fallback is being rehearsed (`offshoot selftest`): the counter is the rehearsal's.
    pub rehearsing: bool,
}

/// What the health checks said of a trial that failed.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Verdict {
    pub commit: Commit,
    /// The required checks that failed.
    pub checks: Vec<String>,
}

/// How much of a target is on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Progress {
    Missing,
    /// Every file of its delta is in the spool, checked.
    Spooled,
    /// Its commit is complete in the repository.
    Stored,
}

/// Whether the target may be fetched now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Download {
    Allowed,
    /// The release has nothing that leads to it from what is here.
    NoRoute,
    /// It is larger than the configuration allows for one release, or for what is left of the month.
    OverLimit,
    /// The link is metered.
    Metered,
    AwaitsWindow,
}

/// Whether the device may be taken down now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Consent {
    Given,
    AwaitsOperator,
    AwaitsWindow,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// Nothing to do until a fact changes.
    Wait(Why),
    /// Record `Staging`.
    Stage {
        from: Commit,
        target: Commit,
    },
    /// Record `Idle`: what was begun is no longer wanted.
    Abandon,
    /// Bring the target's delta into the spool.
    Fetch {
        from: Commit,
        target: Commit,
    },
    /// Count the attempt in the record, then store the spooled delta in the repository.
    Apply {
        from: Commit,
        target: Commit,
    },
    /// Remove the deployments that stand between the running one and a trial.
    Prune {
        target: Commit,
    },
    /// Record `Trial`.
    BeginTrial {
        from: Commit,
        target: Commit,
    },
    /// Arm the boot counter and read it back.
    Arm,
    /// Count the attempt in the record, then deploy: the default moves.
    Deploy {
        target: Commit,
    },
    Reboot,
    /// Record that the trial ended well.
    Confirmed {
        target: Commit,
    },
    /// Record that the commit is not tried again.
    Reject {
        target: Commit,
        reason: Reason,
    },
    /// Remove every deployment of the commit but the booted one.
    Undeploy {
        commit: Commit,
    },
    /// Disarm the counter; makes a damaged environment whole.
    Settle,
}

/// Why the device is not doing anything: the one answer to "why am I not updating?".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Why {
    /// The running deployment is on trial and not confirmed yet.
    AwaitingConfirmation,
    /// The server has no release for this channel and hardware, or none is verified yet.
    NothingOffered,
    /// The newest release is the running one.
    UpToDate,
    /// The newest release was tried or refused before.
    Rejected,
    /// An operator holds this device.
    Held,
    /// Another deployment than the running one is the default; somebody means to boot it.
    AnotherDefault,
    /// The bootloader is not known to honour the counter.
    Unprotected,
    /// The fallback is being rehearsed.
    Rehearsing,
    /// The newest release has no delta from what is deployed, and none from nothing.
    NoRoute,
    /// The newest release is larger than the configuration allows to be fetched.
    OverLimit,
    /// The link is metered, and the configuration says to wait for another one.
    Metered,
    /// Releases are fetched at other times.
    AwaitingDownloadWindow,
    /// The release is ready; the device is taken down at other times.
    AwaitingInstallWindow,
    /// The release is ready; nobody has allowed taking the device down yet.
    AwaitingConsent,
}

/// The next step. One screen a phase; the first row that matches is taken.
pub fn decide(record: &Record, facts: &Facts) -> Step {
    match record.phase {
        // It begins only here, and ends by itself.
        Phase::Idle if facts.rehearsing => Step::Wait(Why::Rehearsing),
        Phase::Idle => idle(record, facts),
        Phase::Staging {
            from,
            target,
            attempts,
            failed: _,
        } => staging(record, facts, from, target, attempts),
        Phase::Trial {
            from,
            target,
            attempts,
        } => trial(facts, from, target, attempts),
    }
}

fn idle(record: &Record, facts: &Facts) -> Step {
    let default = facts.default();
    // A rejection that was recorded and not carried out yet.
    if let Some(commit) = facts
        .others()
        .find(|commit| record.rejections.contains_key(commit))
    {
        return Step::Undeploy { commit };
    }
    if facts.armed() {
        // The record was lost during a trial: what the bootloader says is enough to go on with.
        return match facts.chosen() {
            Mark::Trial { .. } => Step::Wait(Why::AwaitingConfirmation),
            Mark::Fallback(why) if default != facts.booted => Step::Reject {
                target: default,
                reason: facts.reason(default, why),
            },
            Mark::Normal if default != facts.booted => Step::Undeploy { commit: default },
            Mark::Normal | Mark::Fallback(_) => Step::Settle,
        };
    }
    // The bootloader could not load the default and nothing is on trial: it must not be what every boot begins with.
    if facts.mark == Mark::Fallback(Fallback::Unloadable) && default != facts.booted {
        return Step::Reject {
            target: default,
            reason: Reason::Unloadable,
        };
    }
    if facts.damaged() {
        return Step::Settle;
    }
    let Some(offer) = facts.offer else {
        return Step::Wait(Why::NothingOffered);
    };
    if offer == facts.booted {
        return Step::Wait(Why::UpToDate);
    }
    if record.rejections.contains_key(&offer) {
        return Step::Wait(Why::Rejected);
    }
    if record.hold.is_some() {
        return Step::Wait(Why::Held);
    }
    if default != facts.booted {
        return Step::Wait(Why::AnotherDefault);
    }
    if !facts.countable() {
        return Step::Wait(Why::Unprotected);
    }
    Step::Stage {
        from: facts.booted,
        target: offer,
    }
}

fn staging(record: &Record, facts: &Facts, from: Commit, target: Commit, attempts: u8) -> Step {
    if matches!(facts.chosen(), Mark::Trial { .. }) {
        return Step::Wait(Why::AwaitingConfirmation);
    }
    // A deploy was begun and did not end well: first the deployment goes, then the counter.
    if facts.booted != target && facts.deployed.contains(&target) {
        return Step::Undeploy { commit: target };
    }
    if facts.armed() || facts.damaged() {
        return Step::Settle;
    }
    let wanted = facts.booted == from
        && facts.offer == Some(target)
        && facts.default() == from
        && facts.countable()
        && record.hold.is_none()
        && !record.rejections.contains_key(&target);
    if !wanted {
        return Step::Abandon;
    }
    match facts.progress {
        Progress::Missing => match facts.download {
            Download::Allowed => Step::Fetch { from, target },
            Download::NoRoute => Step::Wait(Why::NoRoute),
            Download::OverLimit => Step::Wait(Why::OverLimit),
            Download::Metered => Step::Wait(Why::Metered),
            Download::AwaitsWindow => Step::Wait(Why::AwaitingDownloadWindow),
        },
        Progress::Spooled if attempts >= ATTEMPTS => Step::Reject {
            target,
            reason: Reason::NotInstalled,
        },
        Progress::Spooled => Step::Apply { from, target },
        Progress::Stored => match facts.consent {
            Consent::AwaitsOperator => Step::Wait(Why::AwaitingConsent),
            Consent::AwaitsWindow => Step::Wait(Why::AwaitingInstallWindow),
            Consent::Given if facts.spare => Step::Prune { target },
            Consent::Given => Step::BeginTrial { from, target },
        },
    }
}

fn trial(facts: &Facts, from: Commit, target: Commit, attempts: u8) -> Step {
    let deployed = facts.deployed.contains(&target);
    if facts.booted == target {
        return match facts.chosen() {
            // It runs only because nothing else was left to fall back to. It is not good, and it stays.
            Mark::Fallback(why) => Step::Reject {
                target,
                reason: facts.reason(target, why),
            },
            Mark::Trial { .. } => Step::Wait(Why::AwaitingConfirmation),
            Mark::Normal if facts.armed() => Step::Wait(Why::AwaitingConfirmation),
            // Lost while it ran: it cannot be confirmed, and the next boot is a fallback.
            Mark::Normal if facts.corrupt() => Step::Wait(Why::AwaitingConfirmation),
            Mark::Normal => Step::Confirmed { target },
        };
    }
    if facts.booted != from {
        // Somebody booted a third deployment. The trial is over; nothing that was not proved may stay the default.
        return match (deployed, facts.armed() || facts.damaged()) {
            (true, _) => Step::Undeploy { commit: target },
            (false, true) => Step::Settle,
            (false, false) => Step::Abandon,
        };
    }
    match facts.chosen() {
        Mark::Fallback(why) if deployed => {
            return Step::Reject {
                target,
                reason: facts.reason(target, why),
            };
        }
        // The counter was armed and ran out before the default ever moved: the running deployment used up the tries.
        Mark::Fallback(_) => return Step::Settle,
        Mark::Trial { .. } => return Step::Wait(Why::AwaitingConfirmation),
        Mark::Normal if !facts.countable() => {
            return if deployed {
                Step::Undeploy { commit: target }
            } else {
                Step::Abandon
            };
        }
        Mark::Normal => {}
    }
    if facts.corrupt() {
        // In this order: a fresh environment is a disarmed one, and would let the unproven default boot unarmed.
        return if deployed {
            Step::Undeploy { commit: target }
        } else {
            Step::Settle
        };
    }
    if deployed && facts.default() != target {
        return Step::Undeploy { commit: target };
    }
    if !deployed && attempts >= ATTEMPTS {
        return Step::Reject {
            target,
            reason: Reason::NotInstalled,
        };
    }
    match (facts.armed(), deployed) {
        (false, _) => Step::Arm,
        (true, false) => Step::Deploy { target },
        (true, true) => Step::Reboot,
    }
}

impl Facts {
    /// What the bootloader boots when nothing is on trial.
    pub fn default(&self) -> Commit {
        self.deployed.first().copied().unwrap_or(self.booted)
    }

    fn others(&self) -> impl Iterator<Item = Commit> + '_ {
        self.deployed
            .iter()
            .copied()
            .filter(|commit| *commit != self.booted)
    }

    fn armed(&self) -> bool {
        matches!(&self.environment, Environment::Valid { counter, .. } if counter.upgrade_available)
    }

    /// What the bootloader chose for the trial that is armed now. `Normal` when nothing is, or when it was armed after this
    /// boot began: an arming starts the count at nought, and the bootloader has not counted it yet.
    fn chosen(&self) -> Mark {
        let counted = match &self.environment {
            Environment::Valid { counter, .. } => {
                counter.upgrade_available && (counter.bootcount > 0 || counter.rollback)
            }
            Environment::Corrupt => true,
            Environment::Absent => false,
        };
        let unsaved = self.mark == Mark::Fallback(Fallback::Unsaved) && self.armed();
        if counted || unsaved {
            self.mark
        } else {
            Mark::Normal
        }
    }

    /// The bootloader honours the counter, as far as can be known: it did not fail to save it on this very boot.
    fn countable(&self) -> bool {
        self.protected && self.mark != Mark::Fallback(Fallback::Unsaved)
    }

    fn corrupt(&self) -> bool {
        matches!(self.environment, Environment::Corrupt)
    }

    /// Less than two good copies, where there should be two.
    fn damaged(&self) -> bool {
        matches!(
            self.environment,
            Environment::Corrupt | Environment::Valid { damaged: true, .. }
        )
    }

    fn reason(&self, target: Commit, why: Fallback) -> Reason {
        match (&self.verdict, why) {
            (Some(verdict), _) if verdict.commit == target => Reason::Unhealthy {
                checks: verdict.checks.clone(),
            },
            (_, Fallback::Exhausted) => Reason::Unconfirmed,
            (_, Fallback::Unsaved) => Reason::CounterNotSaved,
            (_, Fallback::Corrupt) => Reason::EnvironmentCorrupt,
            (_, Fallback::Unloadable) => Reason::Unloadable,
        }
    }
}

#[cfg(test)]
mod model;
