//! What the daemon tells: the status for the API, one line for the service manager, one entry in the journal for each step.

use jiff::Timestamp as Time;
use jiff::tz::TimeZone;
use sd_notify::NotifyState;

use super::{Daemon, Due, notify};
use crate::commit::Commit;
use crate::decide::Step;
use crate::device::Observed;
use crate::events;
use crate::record::{Reason, Rejection};
use crate::status::{self, Status};
use crate::trust::schema::time;

impl Daemon {
    /// Publishes the status, and tells the journal and the service manager when it means something new.
    pub(super) fn tell(&mut self, step: Option<&Step>) -> Status {
        let mut status = self.describe(step);
        let summary = status.summary();
        let mut is_news = false;
        self.status.send_if_modified(|former| {
            let revision = former.as_ref().map_or(0, |former| former.revision);
            status.revision = revision;
            if former.as_ref() == Some(&status) {
                return false;
            }
            is_news = former
                .as_ref()
                .is_none_or(|former| former.summary() != summary);
            status.revision = revision + 1;
            *former = Some(status.clone());
            true
        });
        if is_news {
            notify(&[NotifyState::Status(&summary)]);
        }
        if status.why != self.told {
            self.told = status.why;
            if let Some(why) = status.why {
                tracing::info!(MESSAGE_ID = events::WAITING, WHY = why.name(), "{why}");
            }
        }
        status
    }

    fn describe(&self, step: Option<&Step>) -> Status {
        let Observed {
            facts,
            deployments,
            unprotected,
            plan,
        } = &self.observed;
        let record = self.device.record();
        let next = |what, due: &Due| {
            let at = due.at.clone();
            Some(status::Next { what, at })
        };
        let failure = self
            .failure
            .as_ref()
            .filter(|failed| failed.step.as_ref() == step);
        let why = match step {
            Some(Step::Wait(why)) => Some(*why),
            Some(_) | None => None,
        };
        let next = match (failure, why) {
            (Some(failed), _) if failed.due.when < self.poll_due.when => {
                next(status::NextIs::Retry, &failed.due)
            }
            (None, Some(_)) if self.turn.is_some() => {
                (self.turn.as_ref()).and_then(|(what, due)| next(*what, due))
            }
            (Some(_), _) | (None, Some(_)) => next(status::NextIs::Poll, &self.poll_due),
            (None, None) => None,
        };
        let deployments: Vec<_> = deployments
            .deployments
            .iter()
            .map(|deployment| status::Deployed {
                commit: deployment.commit,
                version: deployment.version.clone(),
                booted: deployment.commit == facts.booted,
                pinned: deployment.pinned,
            })
            .collect();
        Status {
            revision: 0,
            agent: env!("CARGO_PKG_VERSION").to_owned(),
            booted: status::Release {
                commit: facts.booted,
                version: deployments
                    .iter()
                    .find(|deployed| deployed.booted)
                    .and_then(|deployed| deployed.version.clone()),
            },
            phase: record.phase,
            step: match step {
                Some(_) if self.rebooting => "rebooting",
                step => step.map_or("observe", status::name),
            }
            .to_owned(),
            why,
            next,
            channel: self.poller.channel.to_string(),
            hardware: self.poller.hardware.to_string(),
            offer: self.offer.as_ref().map(|offer| status::Release {
                commit: offer.entry.commit,
                version: Some(offer.entry.version.to_string()),
            }),
            plan: plan.map(|plan| status::Plan {
                way: plan.way,
                from: plan.from,
                total: plan.total,
                missing: plan.missing,
            }),
            progress: None,
            month: (self.usage).this_month(&self.now().to_zoned(TimeZone::system())),
            rejections: record.rejections.iter().map(rejected).collect(),
            hold: record.hold.clone(),
            protected: unprotected.is_none(),
            unprotected_because: unprotected.as_ref().map(ToString::to_string),
            boot: facts.mark.into(),
            environment: status::Variables::of(&facts.environment),
            boot_environment: (&facts.environment).into(),
            deployments,
            last_poll: self.last_poll.clone(),
            failure: failure.map(|failed| status::Failure {
                step: failed
                    .step
                    .as_ref()
                    .map_or("observe", status::name)
                    .to_owned(),
                fault: failed.fault.to_owned(),
                message: failed.message.clone(),
                times: failed.times,
            }),
        }
    }
}

fn rejected((commit, rejection): (&Commit, &Rejection)) -> status::Rejected {
    status::Rejected {
        commit: *commit,
        reason: rejection.reason.clone(),
        // What is no time at all was written by no device of ours.
        at: time::write(Time::from_second(rejection.at).unwrap_or(Time::UNIX_EPOCH)),
    }
}

/// One entry in the journal for each step that was done.
pub(super) fn report(step: &Step) {
    match step {
        Step::Wait(_) => {}
        Step::Stage { from, target } => {
            tracing::info!(MESSAGE_ID = events::STAGED, FROM = %from, COMMIT = %target, "updating to {}", status::short(*target));
        }
        Step::Abandon => {
            tracing::info!(
                MESSAGE_ID = events::ABANDONED,
                "the update is no longer wanted"
            );
        }
        Step::Fetch { target, .. } => {
            tracing::info!(MESSAGE_ID = events::FETCHED, COMMIT = %target, "fetched and checked");
        }
        Step::Apply { target, .. } => {
            tracing::info!(MESSAGE_ID = events::APPLIED, COMMIT = %target, "stored in the repository");
        }
        Step::Prune { .. } => tracing::info!("removed the deployments that are not needed"),
        Step::BeginTrial { target, .. } => {
            tracing::info!(COMMIT = %target, "the trial of {} begins", status::short(*target));
        }
        Step::Arm => tracing::info!(MESSAGE_ID = events::ARMED, "the boot counter is armed"),
        Step::Deploy { target } => {
            tracing::info!(MESSAGE_ID = events::DEPLOYED, COMMIT = %target, "deployed beside the running system");
        }
        Step::Reboot => tracing::info!(MESSAGE_ID = events::REBOOTING, "rebooting into the trial"),
        Step::Confirmed { target } => {
            tracing::info!(MESSAGE_ID = events::CONFIRMED, COMMIT = %target, "{} proved healthy and is kept", status::short(*target));
        }
        Step::Reject { target, reason } => {
            let checks = match reason {
                Reason::Unhealthy { checks } => checks.join(" "),
                _ => String::new(),
            };
            tracing::warn!(MESSAGE_ID = events::REJECTED, COMMIT = %target, REASON = status::kind(reason), CHECKS = checks,
                "{} is rejected: {reason}", status::short(*target));
        }
        Step::Undeploy { commit } => {
            tracing::info!(MESSAGE_ID = events::UNDEPLOYED, COMMIT = %commit, "removed {}", status::short(*commit));
        }
        Step::Settle => {
            tracing::info!(MESSAGE_ID = events::SETTLED, "the boot counter is disarmed")
        }
    }
}
