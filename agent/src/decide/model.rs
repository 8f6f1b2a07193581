//! A small device and bootloader, and every way through them: [`decide`] is run on it with power cuts before, after and
//! between the parts of every step, under every health history, and the promises are asserted in every state reached.
//!
//! The search visits each reachable state once, so it is exhaustive and ends. The bootloader is the protocol's own model,
//! the one that the real GRUB and the real U-Boot are checked against; a script counts, or U-Boot itself, which counts on where the
//! script writes nothing.

use std::collections::{HashMap, HashSet, VecDeque};

use bootloader_glue::protocol::{Counter, Environment, Mark};
use bootloader_glue::uboot::{self, Count};

use super::*;
use crate::commit::Sha256;
use crate::record::{FailedWays, Rejection};

const LIMIT: u8 = 3;

/// What the release under test does when it is booted. `Any` lets each boot choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Boots {
    Confirmed,
    /// Health says no: the verdict is written, the counter exhausted, the device rebooted.
    Unhealthy,
    /// A panic, a hang, a deadline: it reboots with nothing said.
    Dies,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    record: Record,
    deployed: Vec<Commit>,
    environment: Environment,
    verdict: Option<Verdict>,
    progress: Progress,
    /// `None` while the power is off.
    running: Option<Running>,
    /// Ever confirmed by health: what must never be lost, and what may be the default unarmed.
    proved: Vec<Commit>,
    offer: Option<Commit>,
    cuts: u8,
    /// What the deployer does with the next apply or deploy.
    install_fails: bool,
    saves: bool,
    counts: Count,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Running {
    booted: Commit,
    mark: Mark,
    /// The health gate and the confirmation have been through on this boot.
    settled: bool,
}

fn commit(n: u8) -> Commit {
    Commit(Sha256::of(&[n]))
}

fn disarmed() -> Environment {
    let counter = Counter {
        upgrade_available: false,
        bootcount: 0,
        bootlimit: LIMIT,
        rollback: false,
    };
    Environment::Valid {
        counter,
        damaged: false,
    }
}

fn start(cuts: u8) -> World {
    let (old, from, target) = (commit(0), commit(1), commit(2));
    World {
        record: Record::default(),
        deployed: vec![from, old],
        environment: disarmed(),
        verdict: None,
        progress: Progress::Missing,
        running: Some(Running {
            booted: from,
            mark: Mark::Normal,
            settled: true,
        }),
        proved: vec![from, old],
        offer: Some(target),
        cuts,
        install_fails: false,
        saves: true,
        counts: Count::Script,
    }
}

impl World {
    fn counter(&mut self) -> Option<&mut Counter> {
        match &mut self.environment {
            Environment::Valid { counter, .. } => Some(counter),
            Environment::Absent | Environment::Corrupt => None,
        }
    }

    fn armed(&self) -> bool {
        matches!(&self.environment, Environment::Valid { counter, .. } if counter.upgrade_available)
    }

    fn facts(&self, running: Running) -> Facts {
        let target = match self.record.phase {
            Phase::Idle => None,
            Phase::Staging { target, .. } | Phase::Trial { target, .. } => Some(target),
        };
        Facts {
            booted: running.booted,
            deployed: self.deployed.clone(),
            spare: self
                .deployed
                .iter()
                .any(|commit| *commit != running.booted && Some(*commit) != target),
            mark: running.mark,
            environment: self.environment,
            verdict: self.verdict.clone(),
            offer: self.offer,
            progress: if self.deployed.contains(&commit(2)) {
                Progress::Stored
            } else {
                self.progress
            },
            download: Download::Allowed,
            consent: Consent::Given,
            protected: true,
            rehearsing: false,
        }
    }

    /// The bootloader's turn, cut or not between its write and the kernel's start.
    fn boot(&self) -> Vec<World> {
        let mut next = self.clone();
        let entries = next.deployed.len();
        let boot = uboot::boot(&next.environment, entries, next.saves, next.counts);
        if let (Some(saved), Some(counter)) = (boot.saved, next.counter()) {
            *counter = saved;
        }
        let mut worlds = Vec::new();
        if next.cuts > 0 {
            let mut cut = next.clone();
            cut.cuts -= 1;
            worlds.push(cut);
        }
        let booted = next.deployed[boot.entry];
        next.running = Some(Running {
            booted,
            mark: boot.mark,
            settled: false,
        });
        worlds.push(next);
        worlds
    }

    /// Userspace's turn before the daemon matters: health and confirmation on a boot that is on trial.
    fn health(&self, running: Running, boots: Boots) -> Vec<World> {
        let mut worlds = Vec::new();
        let mut next = self.clone();
        let on_trial = matches!(running.mark, Mark::Trial { .. });
        // What was proved before boots well again; the daemon looks on before and after, so both orders are states.
        let boots = if self.proved.contains(&running.booted) || !on_trial {
            Boots::Confirmed
        } else {
            boots
        };
        match boots {
            Boots::Confirmed => {
                if on_trial {
                    if let Some(counter) = next.counter() {
                        *counter = Counter {
                            upgrade_available: false,
                            bootcount: 0,
                            ..*counter
                        };
                    }
                    if !next.proved.contains(&running.booted) {
                        next.proved.push(running.booted);
                    }
                }
                next.running = Some(Running {
                    settled: true,
                    ..running
                });
                worlds.push(next);
            }
            Boots::Unhealthy => {
                next.verdict = Some(Verdict {
                    commit: running.booted,
                    checks: vec!["app".to_owned()],
                });
                let mut between = next.clone();
                if between.cuts > 0 {
                    between.cuts -= 1;
                    between.running = None;
                    worlds.push(between);
                }
                if let Some(counter) = next.counter() {
                    counter.bootcount = counter.bootlimit;
                }
                next.running = None;
                worlds.push(next);
            }
            Boots::Dies => {
                next.running = None;
                worlds.push(next);
            }
        }
        worlds
    }

    /// The step's writes, one world after each: a power cut can come after any of them.
    fn perform(&self, running: Running, step: &Step) -> Vec<World> {
        let mut after = Vec::new();
        let mut world = self.clone();
        let mut write = |world: &World| after.push(world.clone());
        match step {
            Step::Wait(_) => {}
            Step::Stage { from, target } => {
                world.record.phase = Phase::Staging {
                    from: *from,
                    target: *target,
                    attempts: 0,
                    failed: FailedWays::default(),
                };
                write(&world);
            }
            Step::Abandon => {
                world.record.phase = Phase::Idle;
                write(&world);
            }
            Step::Fetch { .. } => {
                world.progress = Progress::Spooled;
                write(&world);
            }
            Step::Apply { from, target } => {
                if let Phase::Staging { attempts, .. } = world.record.phase {
                    world.record.phase = Phase::Staging {
                        from: *from,
                        target: *target,
                        attempts: attempts + 1,
                        failed: FailedWays::default(),
                    };
                }
                write(&world);
                if !world.install_fails {
                    world.progress = Progress::Stored;
                    write(&world);
                }
            }
            Step::Prune { target } => {
                world
                    .deployed
                    .retain(|commit| *commit == running.booted || commit == target);
                write(&world);
            }
            Step::BeginTrial { from, target } => {
                world.verdict = None;
                write(&world);
                world.record.phase = Phase::Trial {
                    from: *from,
                    target: *target,
                    attempts: 0,
                };
                write(&world);
            }
            Step::Arm => {
                let counter = Counter {
                    upgrade_available: true,
                    bootcount: 0,
                    bootlimit: LIMIT,
                    rollback: false,
                };
                world.environment = Environment::Valid {
                    counter,
                    damaged: false,
                };
                write(&world);
            }
            Step::Deploy { target } => {
                if let Phase::Trial {
                    from,
                    target,
                    attempts,
                } = world.record.phase
                {
                    world.record.phase = Phase::Trial {
                        from,
                        target,
                        attempts: attempts + 1,
                    };
                }
                write(&world);
                if !world.install_fails {
                    world.deployed = vec![*target, running.booted];
                    write(&world);
                }
            }
            Step::Reboot => {
                world.running = None;
                write(&world);
            }
            Step::Confirmed { .. } => {
                world.record.phase = Phase::Idle;
                world.progress = Progress::Missing;
                write(&world);
            }
            Step::Reject { target, reason } => {
                world.record.phase = Phase::Idle;
                world.record.reject(
                    *target,
                    Rejection {
                        reason: reason.clone(),
                        at: 0,
                    },
                );
                write(&world);
            }
            Step::Undeploy { commit } => {
                world
                    .deployed
                    .retain(|deployed| deployed != commit || *deployed == running.booted);
                write(&world);
            }
            Step::Settle => {
                world.environment = disarmed();
                write(&world);
            }
        }
        after
    }

    /// Every world that can follow this one.
    fn next(&self, boots: &[Boots]) -> Vec<World> {
        let mut worlds = Vec::new();
        let Some(running) = self.running else {
            return self.boot();
        };
        if !running.settled {
            for choice in boots {
                worlds.extend(self.health(running, *choice));
            }
        }
        if self.cuts > 0 {
            worlds.push(World {
                running: None,
                cuts: self.cuts - 1,
                ..self.clone()
            });
        }
        let step = decide(&self.record, &self.facts(running));
        let after = self.perform(running, &step);
        if let Some((last, between)) = after.split_last() {
            for world in between.iter().filter(|world| world.cuts > 0) {
                worlds.push(World {
                    running: None,
                    cuts: world.cuts - 1,
                    ..world.clone()
                });
            }
            worlds.push(last.clone());
        }
        worlds
    }

    /// The promises that hold at every moment.
    fn assert_promises(&self) {
        let default = self.deployed[0];
        let guarded = self.armed() || self.environment == Environment::Corrupt;
        assert!(
            self.proved.contains(&default) || guarded,
            "an unproven default is unarmed: {self:#?}"
        );
        assert!(
            self.deployed
                .iter()
                .any(|commit| self.proved.contains(commit)),
            "nothing proved is left: {self:#?}"
        );
        if let Phase::Staging { target, .. } | Phase::Trial { target, .. } = self.record.phase {
            assert!(
                !self.record.rejections.contains_key(&target),
                "a rejected commit is tried again: {self:#?}"
            );
        }
    }

    fn at_rest(&self, boots: &[Boots]) -> Option<(Commit, Why)> {
        let running = self.running?;
        match decide(&self.record, &self.facts(running)) {
            Step::Wait(why) if running.settled || boots.is_empty() => Some((running.booted, why)),
            _ => None,
        }
    }
}

/// All worlds reachable from `first`, each checked; then, that every one of them can still come to rest, and that there is
/// no cycle to be caught in.
fn explore(first: World, boots: &[Boots]) -> Vec<(World, Commit, Why)> {
    let mut index = HashMap::from([(first.clone(), 0usize)]);
    let mut worlds = vec![first];
    let mut edges: Vec<Vec<usize>> = Vec::new();
    let mut queue = VecDeque::from([0]);
    let mut rests = Vec::new();
    while let Some(at) = queue.pop_front() {
        let world = worlds[at].clone();
        world.assert_promises();
        if let Some((booted, why)) = world.at_rest(boots) {
            rests.push((world.clone(), booted, why));
        }
        let mut out = Vec::new();
        for next in world.next(boots) {
            let to = *index.entry(next.clone()).or_insert_with(|| {
                worlds.push(next);
                queue.push_back(worlds.len() - 1);
                worlds.len() - 1
            });
            out.push(to);
        }
        edges.resize(edges.len().max(at + 1), Vec::new());
        edges[at] = out;
        assert!(worlds.len() < 2_000_000, "the model does not end");
    }
    assert_acyclic(&worlds, &edges);
    rests
}

/// Nothing goes round: tries run out, attempts run out, and what is decided is not undone. (Kahn's algorithm.)
fn assert_acyclic(worlds: &[World], edges: &[Vec<usize>]) {
    let mut incoming = vec![0usize; worlds.len()];
    edges.iter().flatten().for_each(|to| incoming[*to] += 1);
    let mut ready: Vec<usize> = (0..worlds.len()).filter(|at| incoming[*at] == 0).collect();
    let mut removed = 0;
    while let Some(at) = ready.pop() {
        removed += 1;
        for to in &edges[at] {
            incoming[*to] -= 1;
            if incoming[*to] == 0 {
                ready.push(*to);
            }
        }
    }
    if removed != worlds.len() {
        let stuck = incoming.iter().position(|incoming| *incoming > 0).unwrap();
        panic!("a cycle through or after {:#?}", worlds[stuck]);
    }
}

/// What a device may look like at the end: booted, phase, deployments, environment, and the rejection of the target.
fn assert_rest(world: &World, booted: Commit, why: Why) {
    let (from, target) = (commit(1), commit(2));
    assert_eq!(
        world.record.phase,
        Phase::Idle,
        "at rest in the middle: {world:#?}"
    );
    assert_eq!(world.deployed[0], booted, "another default: {world:#?}");
    assert!(!world.armed(), "armed at rest: {world:#?}");
    if world.record.rejections.contains_key(&target) {
        assert_eq!((booted, why), (from, Why::Rejected), "{world:#?}");
        assert_eq!(
            world.deployed,
            [from],
            "the bad deployment is left: {world:#?}"
        );
        assert!(
            !world.proved.contains(&target),
            "a proved release is rejected: {world:#?}"
        );
    } else {
        assert_eq!((booted, why), (target, Why::UpToDate), "{world:#?}");
    }
}

#[test]
fn any_two_power_cuts_and_any_health_still_converge() {
    for counts in [Count::Script, Count::Bootcount] {
        converges(World { counts, ..start(2) });
    }
}

fn converges(first: World) {
    let all = [Boots::Confirmed, Boots::Unhealthy, Boots::Dies];
    let rests = explore(first, &all);
    rests
        .iter()
        .for_each(|(world, booted, why)| assert_rest(world, *booted, *why));
    let ends: HashSet<_> = rests
        .iter()
        .map(|(world, ..)| world.record.rejections.get(&commit(2)))
        .collect();
    let rejected = |reason| Rejection { reason, at: 0 };
    let (unhealthy, unconfirmed) = (
        rejected(Reason::Unhealthy {
            checks: vec!["app".to_owned()],
        }),
        rejected(Reason::Unconfirmed),
    );
    assert_eq!(ends, [None, Some(&unhealthy), Some(&unconfirmed)].into());
}

#[test]
fn a_good_release_is_confirmed_whatever_two_power_cuts_do() {
    for counts in [Count::Script, Count::Bootcount] {
        let rests = explore(World { counts, ..start(2) }, &[Boots::Confirmed]);
        rests.iter().for_each(|(world, booted, why)| {
            assert_rest(world, *booted, *why);
            assert_eq!(*booted, commit(2));
        });
        assert!(!rests.is_empty());
    }
}

#[test]
fn an_unhealthy_release_is_rejected_for_its_health_whatever_one_power_cut_does() {
    for (world, booted, why) in explore(start(1), &[Boots::Unhealthy]) {
        assert_rest(&world, booted, why);
        let reason = Reason::Unhealthy {
            checks: vec!["app".to_owned()],
        };
        assert_eq!(
            world.record.rejections.get(&commit(2)),
            Some(&Rejection { reason, at: 0 })
        );
    }
}

#[test]
fn a_release_that_cannot_be_installed_is_given_up_and_the_device_left_as_it_was() {
    let mut world = start(2);
    world.install_fails = true;
    for (world, booted, why) in explore(world, &[Boots::Confirmed]) {
        assert_eq!(
            (booted, why, world.record.phase),
            (commit(1), Why::Rejected, Phase::Idle)
        );
        assert_eq!(
            world.record.rejections[&commit(2)].reason,
            Reason::NotInstalled
        );
        assert_eq!(world.deployed[0], commit(1));
        assert!(!world.armed());
    }
}

#[test]
fn a_release_that_is_stored_and_cannot_be_deployed_is_given_up_with_the_counter_disarmed() {
    let mut world = start(2);
    world.install_fails = true;
    world.progress = Progress::Stored;
    for (world, booted, why) in explore(world, &[Boots::Confirmed]) {
        assert_eq!(
            (booted, why, world.record.phase),
            (commit(1), Why::Rejected, Phase::Idle)
        );
        assert_eq!(
            world.record.rejections[&commit(2)].reason,
            Reason::NotInstalled
        );
        assert_eq!((world.deployed[0], world.armed()), (commit(1), false));
    }
}

/// Rows that no cut leads to in the model, because something outside has to have meddled.
#[test]
fn rows_for_what_only_others_can_leave_behind() {
    let (from, target) = (commit(1), commit(2));
    let mut world = start(0);
    let counter = |bootcount| Counter {
        upgrade_available: true,
        bootcount,
        bootlimit: LIMIT,
        rollback: false,
    };
    let armed = |bootcount| Environment::Valid {
        counter: counter(bootcount),
        damaged: false,
    };
    let facts = |world: &World| world.facts(world.running.unwrap());

    world.record.phase = Phase::Staging {
        from,
        target,
        attempts: 0,
        failed: FailedWays::default(),
    };
    world.environment = armed(0);
    assert_eq!(decide(&world.record, &facts(&world)), Step::Settle);
    world.deployed = vec![target, from];
    assert_eq!(
        decide(&world.record, &facts(&world)),
        Step::Undeploy { commit: target }
    );

    // On the bootloader's word alone, the record follows: an armed trial is never recorded as confirmed.
    world.record.phase = Phase::Trial {
        from,
        target,
        attempts: 1,
    };
    world.running = Some(Running {
        booted: target,
        mark: Mark::Trial { tries: 1 },
        settled: true,
    });
    world.environment = armed(1);
    assert_eq!(
        decide(&world.record, &facts(&world)),
        Step::Wait(Why::AwaitingConfirmation)
    );
    world.environment = disarmed();
    assert_eq!(
        decide(&world.record, &facts(&world)),
        Step::Confirmed { target }
    );

    // What the counter says during a rehearsal is not about any release.
    world = start(0);
    for (mark, environment) in [
        (Mark::Normal, armed(0)),
        (Mark::Trial { tries: 1 }, armed(1)),
        (Mark::Fallback(Fallback::Exhausted), armed(3)),
    ] {
        world.environment = environment;
        let facts = Facts {
            mark,
            rehearsing: true,
            ..facts(&world)
        };
        let step = decide(&world.record, &facts);
        assert_eq!(step, Step::Wait(Why::Rehearsing));
    }

    // An operator's own deployment is not taken away, and a hold holds.
    world = start(0);
    world.deployed = vec![commit(7), from];
    assert_eq!(
        decide(&world.record, &facts(&world)),
        Step::Wait(Why::AnotherDefault)
    );
    world = start(0);
    world.record.hold = Some(crate::record::Hold {
        reason: "demo".to_owned(),
    });
    assert_eq!(decide(&world.record, &facts(&world)), Step::Wait(Why::Held));
    world.record.phase = Phase::Staging {
        from,
        target,
        attempts: 0,
        failed: FailedWays::default(),
    };
    assert_eq!(decide(&world.record, &facts(&world)), Step::Abandon);

    // A newer release, or none, instead of the one that is being fetched.
    world.record.hold = None;
    for offer in [Some(commit(7)), None] {
        let facts = Facts {
            offer,
            ..facts(&world)
        };
        assert_eq!(decide(&world.record, &facts), Step::Abandon);
    }

    // The default cannot be loaded, and nothing is on trial: it would be the first that every boot tries.
    world = start(0);
    world.deployed = vec![commit(7), from];
    let unloadable = Facts {
        mark: Mark::Fallback(Fallback::Unloadable),
        ..facts(&world)
    };
    assert_eq!(
        decide(&world.record, &unloadable),
        Step::Reject {
            target: commit(7),
            reason: Reason::Unloadable,
        }
    );

    // Somebody boots a third deployment in the middle of a trial.
    world.record.phase = Phase::Trial {
        from,
        target,
        attempts: 1,
    };
    world.running = Some(Running {
        booted: commit(7),
        mark: Mark::Normal,
        settled: true,
    });
    for (deployed, environment, step) in [
        (
            vec![target, commit(7), from],
            armed(0),
            Step::Undeploy { commit: target },
        ),
        (
            vec![target, commit(7), from],
            disarmed(),
            Step::Undeploy { commit: target },
        ),
        (vec![commit(7), from], armed(0), Step::Settle),
        (vec![commit(7), from], disarmed(), Step::Abandon),
    ] {
        world.deployed = deployed;
        world.environment = environment;
        assert_eq!(decide(&world.record, &facts(&world)), step);
    }
}

#[test]
fn a_bootloader_that_cannot_save_its_counter_never_boots_the_target() {
    let mut world = start(1);
    world.saves = false;
    let mut ends = HashSet::new();
    for (world, booted, why) in explore(world, &[Boots::Confirmed]) {
        assert_eq!(
            (booted, world.deployed[0], world.armed()),
            (commit(1), commit(1), false)
        );
        ends.insert((
            why,
            world
                .record
                .rejections
                .get(&commit(2))
                .map(|rejection| rejection.reason.clone()),
        ));
    }
    // A cut before the default moved shows the fault without anybody having tried the release.
    assert_eq!(
        ends,
        [
            (Why::Rejected, Some(Reason::CounterNotSaved)),
            (Why::Unprotected, None)
        ]
        .into()
    );
}

#[test]
fn a_lost_environment_at_any_moment_of_a_trial_leaves_a_proved_deployment() {
    let mut worlds = reachable(start(0), &[Boots::Confirmed, Boots::Dies]);
    let counted = World {
        counts: Count::Bootcount,
        ..start(0)
    };
    worlds.extend(reachable(counted, &[Boots::Confirmed, Boots::Dies]));
    worlds.retain(|world| matches!(world.record.phase, Phase::Trial { .. }));
    assert!(worlds.len() > 5);
    for (mut world, off) in worlds
        .into_iter()
        .flat_map(|world| [(world.clone(), true), (world, false)])
    {
        world.environment = Environment::Corrupt;
        if off {
            world.running = None;
        }
        for (world, booted, why) in explore(world, &[Boots::Confirmed, Boots::Dies]) {
            // A trial that runs when its environment is lost cannot be confirmed. Confirmation fails, and its unit reboots.
            let unconfirmed =
                world.environment == Environment::Corrupt && why == Why::AwaitingConfirmation;
            if unconfirmed {
                assert_eq!(booted, commit(2));
                continue;
            }
            assert_eq!(
                (world.record.phase, world.deployed[0], world.armed()),
                (Phase::Idle, booted, false)
            );
            assert!(world.proved.contains(&booted));
        }
    }
}

#[test]
fn a_lost_record_at_any_moment_leaves_a_proved_deployment() {
    let all = [Boots::Confirmed, Boots::Unhealthy, Boots::Dies];
    let worlds = [Count::Script, Count::Bootcount]
        .into_iter()
        .flat_map(|counts| reachable(World { counts, ..start(0) }, &all));
    for (mut world, off) in worlds
        .into_iter()
        .flat_map(|world| [(world.clone(), true), (world, false)])
    {
        world.record = Record::default();
        if off {
            world.running = None;
        }
        for (world, booted, _) in explore(world, &[Boots::Confirmed, Boots::Unhealthy, Boots::Dies])
        {
            assert_eq!(
                (world.record.phase, world.deployed[0], world.armed()),
                (Phase::Idle, booted, false)
            );
            assert!(world.proved.contains(&booted));
        }
    }
}

/// What is waited for before the first byte, and before the device goes down; nothing else stops an update.
#[test]
fn policy_holds_an_update_before_its_download_and_before_its_trial() {
    let (from, target) = (commit(1), commit(2));
    let mut world = start(0);
    world.record.phase = Phase::Staging {
        from,
        target,
        attempts: 0,
        failed: FailedWays::default(),
    };
    let with = |world: &World, download, consent| {
        let facts = Facts {
            download,
            consent,
            ..world.facts(world.running.unwrap())
        };
        decide(&world.record, &facts)
    };
    let given = Consent::Given;
    for (download, why) in [
        (Download::NoRoute, Why::NoRoute),
        (Download::OverLimit, Why::OverLimit),
        (Download::Metered, Why::Metered),
        (Download::AwaitsWindow, Why::AwaitingDownloadWindow),
    ] {
        world.progress = Progress::Missing;
        assert_eq!(with(&world, download, given), Step::Wait(why));
        // What is here already was paid for.
        world.progress = Progress::Spooled;
        assert_eq!(with(&world, download, given), Step::Apply { from, target });
        world.progress = Progress::Stored;
        world.deployed = vec![from];
        assert_eq!(
            with(&world, download, given),
            Step::BeginTrial { from, target }
        );
    }
    for (consent, why) in [
        (Consent::AwaitsOperator, Why::AwaitingConsent),
        (Consent::AwaitsWindow, Why::AwaitingInstallWindow),
    ] {
        world.progress = Progress::Missing;
        let step = with(&world, Download::Allowed, consent);
        assert_eq!(step, Step::Fetch { from, target });
        world.progress = Progress::Stored;
        let step = with(&world, Download::Allowed, consent);
        assert_eq!(step, Step::Wait(why));
    }
}

fn reachable(first: World, boots: &[Boots]) -> Vec<World> {
    let mut seen = HashSet::from([first.clone()]);
    let mut queue = VecDeque::from([first]);
    while let Some(world) = queue.pop_front() {
        for next in world.next(boots) {
            if seen.insert(next.clone()) {
                queue.push_back(next);
            }
        }
    }
    seen.into_iter().collect()
}
