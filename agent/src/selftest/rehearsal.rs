//! The rehearsal of a fallback, over reboots.
//!
//! | stage on disk | then | on the next boot is expected |
//! |---|---|---|
//! | `counting` | the counter is armed, reboot | `offshoot.trial=1`, and one boot counted where the system reads it |
//! | `falling-back` | the counter is exhausted, reboot | `offshoot.fallback=exhausted` |
//! | `watchdog` | the counter is settled; the watchdog is opened and not fed | a boot that nobody asked for |
//!
//! The stage is on disk before what it names is done. A power cut in between leaves an environment that was not changed, which the bootloader
//! does not change back: the stage is then begun again, a few times, since an environment that does not keep what is written looks the same.
//! Only of the watchdog nothing can be read afterwards on every board, so a power cut in that minute passes for it. While `rehearsal.json` is
//! there nothing is confirmed, given up for its health, or installed. `offshoot-selftest.service` goes on after each reboot.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use bootloader_glue::protocol::{Environment, Fallback, Mark};
use serde::{Deserialize, Serialize};

use super::{Answer, Question, Report, Watchdog, Whereabouts, is_rehearsing, look, read, remove};
use crate::config::Config;
use crate::decide::{Consent, Download};
use crate::device::Device;
use crate::health;
use crate::record::{self, Phase};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rehearsal {
    stage: Stage,
    /// How often it was begun.
    begun: u8,
    /// The kernel's id of the boot on which the stage began.
    boot: String,
    with_watchdog: bool,
    /// What the environment had before.
    bootlimit: u8,
    answers: Vec<Answer>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Stage {
    Counting,
    FallingBack,
    Watchdog,
}

/// What a boot in the middle of a rehearsal looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    mark: Mark,
    environment: Environment,
    begun: u8,
    /// It is another boot than the one on which the stage began.
    rebooted: bool,
}

/// More power cuts than this, each in the same instant, are none.
const BEGINNINGS: u8 = 3;

/// What to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Next {
    /// The stage did not begin yet: do what it names.
    Begin,
    /// Go on with this stage, having learnt this.
    Enter(Stage, Vec<Answer>),
    /// Nothing is left to be tried with the counter: it is settled, and the watchdog comes last.
    Settled(Vec<Answer>),
    End(Vec<Answer>),
}

/// How a call ended.
#[derive(Debug)]
pub enum Ending {
    Finished(Report),
    /// The caller reboots the device, and the rehearsal goes on after it.
    Reboot,
}

/// Looks, and if all is well begins a rehearsal.
pub async fn rehearse(config: &Config, with_watchdog: bool) -> Result<Ending> {
    ensure!(
        !is_rehearsing(&config.paths.state),
        "a rehearsal is going on: it goes on after the next reboot, `offshoot selftest --abandon` ends it"
    );
    let (device, _) = Device::open(config)?;
    ensure!(
        device.record().phase == Phase::Idle,
        "an update is going on: wait until it has ended"
    );
    let deployments = device
        .observe(None, |_, _| Download::Allowed, |_| Consent::AwaitsOperator)
        .await?
        .deployments;
    ensure!(
        deployments.deployments.len() == 1,
        "there are {} deployments: a rehearsal falls back, and would boot another release. Rehearse on the factory's image, or remove the others (ostree admin undeploy)",
        deployments.deployments.len()
    );
    let mut report = look(config).await?;
    if !with_watchdog {
        report
            .answers
            .retain(|answer| answer.question != Question::Watchdog);
        report = Report::new(report.answers, false);
    }
    let Environment::Valid { counter, .. } = config.bootloader().read()? else {
        return finish(config, report);
    };
    if !report.passed {
        return finish(config, report);
    }
    let rehearsal = Rehearsal {
        stage: Stage::Counting,
        begun: 1,
        boot: boot_id(config)?,
        with_watchdog,
        bootlimit: counter.bootlimit,
        answers: report.answers,
    };
    rehearsal.save(config)?;
    config.bootloader().arm(config.bootloader.tries)?;
    Ok(Ending::Reboot)
}

/// Goes on with the rehearsal that is going on, if there is one.
pub fn resume(config: &Config) -> Result<Option<Ending>> {
    let Some(mut rehearsal) = read::<Rehearsal>(&config.paths.state.join("rehearsal.json"))? else {
        return Ok(None);
    };
    let whereabouts = Whereabouts::of(config);
    loop {
        let seen = Seen {
            mark: health::mark(&config.paths.kernel_command_line)?,
            environment: config.bootloader().read()?,
            begun: rehearsal.begun,
            rebooted: rehearsal.boot != boot_id(config)?,
        };
        match judge(rehearsal.stage, &seen, &whereabouts) {
            Next::Begin => {
                rehearsal.begun = rehearsal.begun.saturating_add(1);
                rehearsal.save(config)?;
                return match rehearsal.stage {
                    Stage::Counting => {
                        config.bootloader().arm(config.bootloader.tries)?;
                        Ok(Some(Ending::Reboot))
                    }
                    Stage::FallingBack => {
                        config.bootloader().exhaust()?;
                        Ok(Some(Ending::Reboot))
                    }
                    Stage::Watchdog => {
                        let answer =
                            Answer::of(Question::WatchdogFires, Watchdog::find(config)?.starve());
                        rehearsal.answers.push(answer);
                        rehearsal.end(config).map(Some)
                    }
                };
            }
            Next::Enter(stage, answers) => {
                rehearsal.answers.extend(answers);
                rehearsal.enter(stage, config)?;
            }
            Next::Settled(answers) => {
                rehearsal.answers.extend(answers);
                rehearsal.settle(config)?;
                if !rehearsal.with_watchdog {
                    return rehearsal.end(config).map(Some);
                }
                rehearsal.enter(Stage::Watchdog, config)?;
            }
            Next::End(answers) => {
                rehearsal.answers.extend(answers);
                return rehearsal.end(config).map(Some);
            }
        }
    }
}

/// Ends a rehearsal where it is; the counter is settled.
pub fn abandon(config: &Config) -> Result<bool> {
    let Some(rehearsal) = read::<Rehearsal>(&config.paths.state.join("rehearsal.json"))? else {
        return Ok(false);
    };
    rehearsal.settle(config)?;
    remove(&config.paths.state.join("rehearsal.json"))?;
    Ok(true)
}

/// The whole rehearsal, as a table.
fn judge(stage: Stage, seen: &Seen, whereabouts: &Whereabouts) -> Next {
    let Whereabouts {
        place,
        same,
        counting,
    } = whereabouts;
    let counted = match &seen.environment {
        Environment::Valid { counter, .. } if counter.upgrade_available => Some(counter),
        Environment::Valid { .. } | Environment::Absent | Environment::Corrupt => None,
    };
    let shared = || {
        Answer::passed(
            Question::EnvironmentShared,
            "the bootloader counted where the system reads it",
        )
    };
    let falls_back = || {
        Answer::passed(
            Question::CounterFallsBack,
            "the counter was spent, and the bootloader fell back",
        )
    };
    match (stage, seen.rebooted, seen.mark) {
        (_, false, _) => Next::Begin,
        // The power was cut before the counter was armed, or before it was exhausted.
        (Stage::Counting, true, Mark::Normal) if counted.is_none() && seen.begun < BEGINNINGS => {
            Next::Begin
        }
        (Stage::FallingBack, true, Mark::Trial { .. })
            if counted.is_some_and(|counter| counter.bootcount < counter.bootlimit)
                && seen.begun < BEGINNINGS =>
        {
            Next::Begin
        }
        (Stage::Counting, true, Mark::Trial { tries }) => {
            match counted.map(|counter| counter.bootcount) {
                Some(count) if count == tries => Next::Enter(Stage::FallingBack, vec![shared()]),
                count => Next::End(vec![Answer::failed(
                    Question::EnvironmentShared,
                    format!(
                        "the bootloader says that this is boot {tries} of a trial, and the environment {place} says {}: \
                         they are not the same environment. Remedy: {same}",
                        count.map_or("that nothing is on trial".to_owned(), |count| count
                            .to_string())
                    ),
                )]),
            }
        }
        // The power was cut once too often: all tries were used, and that shows both.
        (Stage::Counting, true, Mark::Fallback(Fallback::Exhausted)) => {
            Next::Settled(vec![shared(), falls_back()])
        }
        (Stage::Counting, true, Mark::Fallback(why)) => Next::Settled(vec![Answer::failed(
            Question::EnvironmentShared,
            format!(
                "a trial was armed in the environment {place}, and the bootloader fell back ({}): it cannot read or write its environment. \
                 Remedy: {same}, and writable",
                why.name()
            ),
        )]),
        (Stage::Counting, true, Mark::Normal) => Next::Settled(vec![Answer::failed(
            Question::EnvironmentShared,
            match counted {
                Some(counter) => format!(
                    "a trial was armed in the environment {place}, and the bootloader booted as if there were none (bootcount is {} there): it \
                     reads another environment, or does not count. Remedy: {same}; {counting}",
                    counter.bootcount
                ),
                None => format!(
                    "a trial was armed in the environment {place} {} times, and each time that was gone after the reboot. Remedy: {same}, on storage \
                     that outlasts a reboot, and let no script of the bootloader save its defaults there",
                    seen.begun
                ),
            },
        )]),
        (Stage::FallingBack, true, Mark::Fallback(Fallback::Exhausted)) => {
            Next::Settled(vec![falls_back()])
        }
        (Stage::FallingBack, true, mark) => Next::Settled(vec![Answer::failed(
            Question::CounterFallsBack,
            format!(
                "the counter in the environment {place} was spent, and the bootloader did not fall back: {}, and would boot a bad release for ever. \
                 Remedy: {counting}",
                match mark {
                    Mark::Normal => "it booted as if nothing were armed".to_owned(),
                    Mark::Trial { tries } => {
                        let limit = counted.map_or(0, |counter| counter.bootlimit);
                        format!("it counted try {tries} of {limit}")
                    }
                    Mark::Fallback(why) =>
                        format!("it fell back for another reason ({})", why.name()),
                }
            ),
        )]),
        (Stage::Watchdog, true, _) => Next::End(vec![Answer::passed(
            Question::WatchdogFires,
            "nobody fed it, and it reset the unit",
        )]),
    }
}

impl Rehearsal {
    fn save(&self, config: &Config) -> Result<()> {
        record::replace(
            &config.paths.state.join("rehearsal.json"),
            &serde_json::to_vec(self)?,
        )
    }

    fn enter(&mut self, stage: Stage, config: &Config) -> Result<()> {
        self.stage = stage;
        self.begun = 0;
        self.boot = boot_id(config)?;
        self.save(config)
    }

    /// The environment as it was. The number of tries is the one value that a trial changes for good.
    fn settle(&self, config: &Config) -> Result<()> {
        let bootloader = config.bootloader();
        match bootloader.read()? {
            Environment::Valid { counter, .. } if counter.bootlimit != self.bootlimit => {
                bootloader.arm(self.bootlimit)?;
            }
            Environment::Valid { .. } | Environment::Absent | Environment::Corrupt => {}
        }
        Ok(bootloader.settle()?)
    }

    fn end(self, config: &Config) -> Result<Ending> {
        self.settle(config)?;
        finish(config, Report::new(self.answers, true))
    }
}

/// The report first: a cut between the two leaves a rehearsal whose end is reached again.
fn finish(config: &Config, report: Report) -> Result<Ending> {
    let state = &config.paths.state;
    record::replace(&state.join("selftest.json"), &serde_json::to_vec(&report)?)?;
    remove(&state.join("rehearsal.json"))?;
    Ok(Ending::Finished(report))
}

fn boot_id(config: &Config) -> Result<String> {
    let path = &config.paths.boot_id;
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    Ok(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use bootloader_glue::protocol::Counter;

    use super::*;

    fn seen(mark: Mark, bootcount: Option<u8>) -> Seen {
        let counter = Counter {
            upgrade_available: bootcount.is_some(),
            bootcount: bootcount.unwrap_or(0),
            bootlimit: 3,
            rollback: false,
        };
        Seen {
            mark,
            environment: Environment::Valid {
                counter,
                damaged: false,
            },
            begun: 1,
            rebooted: true,
        }
    }

    fn whereabouts() -> Whereabouts {
        Whereabouts {
            place: "there".to_owned(),
            same: "look there".to_owned(),
            counting: "count",
        }
    }

    /// The questions that were answered, and how.
    fn answers(next: &Next) -> (&'static str, Vec<(Question, bool)>) {
        let (kind, answers) = match next {
            Next::Begin => return ("begin", vec![]),
            Next::Enter(_, answers) => ("enter", answers),
            Next::Settled(answers) => ("settled", answers),
            Next::End(answers) => ("end", answers),
        };
        let answers = answers.iter();
        (
            kind,
            answers
                .map(|answer| (answer.question, answer.passed))
                .collect(),
        )
    }

    #[test]
    fn every_boot_of_a_rehearsal_has_a_row() {
        use Question::{CounterFallsBack, EnvironmentShared, WatchdogFires};
        use Stage::{Counting, FallingBack, Watchdog};
        let trial = |tries| Mark::Trial { tries };
        let exhausted = Mark::Fallback(Fallback::Exhausted);
        for (stage, seen, kind, expected) in [
            (
                Counting,
                seen(trial(1), Some(1)),
                "enter",
                vec![(EnvironmentShared, true)],
            ),
            (
                Counting,
                seen(trial(2), Some(2)),
                "enter",
                vec![(EnvironmentShared, true)],
            ),
            // The bootloader counts in one place, the system reads another.
            (
                Counting,
                seen(trial(1), Some(0)),
                "end",
                vec![(EnvironmentShared, false)],
            ),
            (
                Counting,
                seen(trial(1), None),
                "end",
                vec![(EnvironmentShared, false)],
            ),
            (
                Counting,
                seen(Mark::Normal, Some(0)),
                "settled",
                vec![(EnvironmentShared, false)],
            ),
            (
                Counting,
                seen(Mark::Fallback(Fallback::Unsaved), Some(0)),
                "settled",
                vec![(EnvironmentShared, false)],
            ),
            (
                Counting,
                seen(exhausted, Some(3)),
                "settled",
                vec![(EnvironmentShared, true), (CounterFallsBack, true)],
            ),
            (
                FallingBack,
                seen(exhausted, Some(3)),
                "settled",
                vec![(CounterFallsBack, true)],
            ),
            (
                FallingBack,
                seen(trial(4), Some(4)),
                "settled",
                vec![(CounterFallsBack, false)],
            ),
            (
                FallingBack,
                seen(Mark::Normal, Some(3)),
                "settled",
                vec![(CounterFallsBack, false)],
            ),
            (
                FallingBack,
                seen(Mark::Fallback(Fallback::Corrupt), None),
                "settled",
                vec![(CounterFallsBack, false)],
            ),
            (
                Watchdog,
                seen(Mark::Normal, None),
                "end",
                vec![(WatchdogFires, true)],
            ),
        ] {
            assert_eq!(
                answers(&judge(stage, &seen, &whereabouts())),
                (kind, expected),
                "{stage:?} {seen:?}"
            );
            // On the boot on which it began nothing is known yet.
            let same = Seen {
                rebooted: false,
                ..seen
            };
            assert_eq!(judge(stage, &same, &whereabouts()), Next::Begin);
        }
    }

    #[test]
    fn a_stage_that_the_power_cut_short_is_begun_again() {
        let trial = Mark::Trial { tries: 2 };
        for (stage, seen) in [
            (Stage::Counting, seen(Mark::Normal, None)),
            (Stage::FallingBack, seen(trial, Some(2))),
        ] {
            assert_eq!(judge(stage, &seen, &whereabouts()), Next::Begin);
            // It was no power cut.
            let again = Seen {
                begun: BEGINNINGS,
                ..seen
            };
            let (kind, answers) = answers(&judge(stage, &again, &whereabouts()));
            assert_eq!((kind, answers[0].1), ("settled", false));
        }
    }
}
