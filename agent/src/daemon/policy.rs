//! What may be done now: the configuration's windows, limits and rules for metered links, and an operator's word over them.
//!
//! The facts that come of it are [`Download`] and [`Consent`]; when time alone changes them is the daemon's `turn`.

use std::process::Stdio;
use std::time::Duration;

use jiff::tz::TimeZone;

use super::{Allowed, Daemon, Due};
use crate::config::{self, Config, Metered, WhenMetered};
use crate::decide::{Consent, Download, Step, Why, decide};
use crate::device::Plan;
use crate::record::Phase;
use crate::schedule::{self, State};
use crate::status;
use crate::usage::next_month;

impl Daemon {
    /// Observes the device and decides. `None`: it cannot be observed, so nothing is done to it.
    pub(super) async fn look(&mut self) -> Option<Step> {
        let now = self.now().to_zoned(TimeZone::system());
        let metered = self.is_metered().await;
        let Config {
            network, install, ..
        } = &self.config;
        let (fetching, installing) = (
            schedule::state(&network.windows, &now),
            schedule::state(&install.windows, &now),
        );
        let month = self.usage.this_month(&now);
        let word = |commit| self.allowed.filter(|allowed| allowed.commit == commit);
        let download = |commit, plan: &Plan| {
            let goes_beyond = |limit: u64, bytes: u64| limit > 0 && bytes > limit;
            let too_much = goes_beyond(network.update_limit, plan.total)
                || goes_beyond(network.month_limit, month.saturating_add(plan.missing));
            match word(commit) {
                Some(Allowed {
                    over_limits: true, ..
                }) => Download::Allowed,
                _ if too_much => Download::OverLimit,
                _ if metered => Download::Metered,
                Some(_) => Download::Allowed,
                None if matches!(fetching, State::Closed(_)) => Download::AwaitsWindow,
                None => Download::Allowed,
            }
        };
        let consent = |commit| match (word(commit), install.reboot) {
            (Some(_), _) => Consent::Given,
            (None, config::Reboot::Manual) => Consent::AwaitsOperator,
            (None, config::Reboot::Now) if matches!(installing, State::Closed(_)) => {
                Consent::AwaitsWindow
            }
            (None, config::Reboot::Now) => Consent::Given,
        };
        let observed = self
            .device
            .observe(self.offer.as_ref(), download, consent)
            .await;
        let step = match observed {
            Ok(observed) => {
                self.observed = observed;
                if (self.failure.as_ref()).is_some_and(|failed| failed.step.is_none()) {
                    self.failure = None;
                }
                decide(self.device.record(), &self.observed.facts)
            }
            Err(error) => {
                self.turn = None;
                self.failed(None, 0, "device", &format!("{error:#}"));
                return None;
            }
        };
        let turn = match (&step, fetching, installing) {
            (Step::Wait(Why::AwaitingDownloadWindow), State::Closed(at), _)
            | (Step::Wait(Why::AwaitingInstallWindow), _, State::Closed(at)) => {
                at.map(|at| (status::NextIs::Window, at))
            }
            (Step::Wait(Why::OverLimit), ..) if self.config.network.month_limit > 0 => {
                next_month(&now).map(|at| (status::NextIs::Month, at))
            }
            (Step::Fetch { target, .. }, State::Open(at), _)
                if self.allowed.is_none_or(|allowed| allowed.commit != *target) =>
            {
                at.map(|at| (status::NextIs::Window, at))
            }
            _ => None,
        };
        let here = now.timestamp();
        self.turn = turn.map(|(what, at)| {
            let left = Duration::try_from(at.duration_since(here)).unwrap_or_default();
            (what, Due::after(left, here))
        });
        Some(step)
    }

    /// Asked only when it matters.
    async fn is_metered(&self) -> bool {
        let network = &self.config.network;
        let matters = network.when_metered == WhenMetered::Wait
            && matches!(self.device.record().phase, Phase::Staging { .. });
        match network.metered {
            _ if !matters => false,
            Metered::Yes => true,
            Metered::No => false,
            Metered::Ask => network_manager_says_metered().await,
        }
    }
}

/// NetworkManager's word, if there is one. Asked through busctl, which is where systemd is; what is not understood is not metered.
async fn network_manager_says_metered() -> bool {
    let service = "org.freedesktop.NetworkManager";
    let asked = tokio::process::Command::new("busctl")
        .args(["--system", "--json=short", "get-property", service])
        .args(["/org/freedesktop/NetworkManager", service, "Metered"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .output();
    let Ok(Ok(output)) = tokio::time::timeout(Duration::from_secs(5), asked).await else {
        return false;
    };
    // NMMetered: 1 is yes, 3 is a guess that it is.
    serde_json::from_slice::<serde_json::Value>(&output.stdout)
        .is_ok_and(|answer| matches!(answer["data"].as_u64(), Some(1 | 3)))
}
