//! The main job on a whole device in a directory: see [`crate::machine`].

use std::fs;
use std::time::Duration;

use bootloader_glue::protocol::{Environment, Fallback, Mark};
use jiff::Timestamp as Time;
use offshoot::commit::{Commit, Sha256};
use offshoot::daemon::{self, Command, Ends};
use offshoot::decide::{Consent, Download, Step, Verdict, Why, decide};
use offshoot::device::Device;
use offshoot::fetch::{Server, ServerConfig, Source};
use offshoot::poll::Poller;
use offshoot::record::{FailedWays, Hold, Phase, Reason, Rejection};
use offshoot::status::{NextIs, PollFailureKind, Status};
use offshoot::trust::schema::File;
use offshoot::trust::store::Store;
use tokio::sync::{mpsc, oneshot, watch};

use crate::bench::noise;
use crate::fixture::HARDWARE;
use crate::machine::{Booted, Machine};
use crate::server::Then;

/// Longer than anything here takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The daemon of a machine, until it is dropped as a power cut drops it, or stopped.
pub struct Daemon {
    commands: mpsc::Sender<Command>,
    status: watch::Receiver<Option<Status>>,
    stop: oneshot::Sender<()>,
    task: tokio::task::JoinHandle<anyhow::Result<()>>,
}

impl Daemon {
    pub fn start(machine: &Machine) -> Self {
        let (commands, receiver) = mpsc::channel(4);
        let (sender, status) = watch::channel(None);
        let (stop, stopped) = oneshot::channel();
        let ends = Ends {
            commands: receiver,
            status: sender,
        };
        let task = tokio::spawn(daemon::run(machine.config(), ends, async {
            let _ = stopped.await;
        }));
        Self {
            commands,
            status,
            stop,
            task,
        }
    }

    pub async fn wait(&mut self, wanted: impl Fn(&Status) -> bool) -> Status {
        let found = self
            .status
            .wait_for(|status| status.as_ref().is_some_and(&wanted));
        let found = match tokio::time::timeout(PATIENCE, found).await {
            Ok(Ok(status)) => Ok(status.clone().unwrap()),
            Ok(Err(_)) => Err("it ended"),
            Err(_) => Err("waited in vain"),
        };
        match found {
            Ok(status) => status,
            Err(_) if self.task.is_finished() => panic!("{:?}", (&mut self.task).await),
            Err(why) => panic!("{why}: {:#?}", self.status.borrow()),
        }
    }

    pub async fn waits(&mut self, why: Why) -> Status {
        self.wait(|status| status.why == Some(why) && status.last_poll.is_some())
            .await
    }

    async fn command<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> T {
        let (sender, receiver) = oneshot::channel();
        self.commands.send(command(sender)).await.unwrap();
        tokio::time::timeout(PATIENCE, receiver)
            .await
            .unwrap()
            .unwrap()
    }

    async fn stop(self) {
        self.stop.send(()).unwrap();
        self.task.await.unwrap().unwrap();
    }

    /// Until the machine is asked to reboot; it then loses power.
    pub async fn until_reboot(mut self, machine: &Machine) -> Booted {
        self.wait(|status| status.step == "rebooting").await;
        assert!(machine.rebooted());
        self.cut();
        machine.power_on()
    }

    pub fn cut(self) {
        self.task.abort();
    }
}

async fn update(daemon: &Daemon, over_limits: bool) -> Result<Status, Status> {
    daemon
        .command(|reply| Command::Update {
            over_limits,
            from: None,
            reply,
        })
        .await
}

fn rejected(machine: &Machine, commit: Commit) -> Option<Reason> {
    machine
        .record()
        .rejections
        .get(&commit)
        .map(|rejection: &Rejection| rejection.reason.clone())
}

fn is_settled(machine: &Machine) -> bool {
    matches!(machine.environment(), Environment::Valid { damaged: false, counter } if !counter.upgrade_available)
}

#[tokio::test]
async fn a_good_release_is_confirmed_after_exactly_one_boot() {
    let mut machine = Machine::new();
    let server = machine.server().await;
    let target = machine.publish("two");
    let booted = Daemon::start(&machine).until_reboot(&machine).await;
    let first = Booted {
        commit: target,
        mark: Mark::Trial { tries: 1 },
    };
    assert_eq!(booted, first);
    assert!(machine.armed());

    let mut daemon = Daemon::start(&machine);
    daemon.waits(Why::AwaitingConfirmation).await;
    assert_eq!(
        machine.record().phase,
        Phase::Trial {
            from: machine.factory,
            target,
            attempts: 1
        }
    );
    machine.confirm();
    let status = daemon.waits(Why::UpToDate).await;
    assert_eq!(status.booted.commit, target);
    assert_eq!(status.booted.version.as_deref(), Some("two"));
    assert_eq!(machine.record().phase, Phase::Idle);
    assert_eq!(machine.deployments(), [target, machine.factory]);
    assert!(is_settled(&machine));

    // From here on a poll is one conditional request.
    let before = server.requests().len();
    let at = status.last_poll;
    daemon
        .wait(|status| status.last_poll != at && status.why == Some(Why::UpToDate))
        .await;
    let polls = &server.requests()[before..];
    assert!(!polls.is_empty());
    for poll in polls {
        assert_eq!(poll.path, "/base/metadata/timestamp.json");
        assert!(poll.header("if-none-match").is_some());
        assert_eq!(poll.sent, 0);
    }
    daemon.stop().await;
}

#[tokio::test]
async fn a_pinned_deployment_stays_where_another_makes_room() {
    let mut machine = Machine::new();
    let _server = machine.server().await;
    let mut kept = vec![machine.factory];
    for (version, pin) in [("two", true), ("three", false), ("four", false)] {
        if pin {
            (machine.bench).ostree(&["admin", "--sysroot=sysroot", "pin", "0"]);
        }
        let target = machine.publish(version);
        let booted = Daemon::start(&machine).until_reboot(&machine).await;
        assert_eq!(booted.commit, target);
        machine.confirm();
        let mut daemon = Daemon::start(&machine);
        daemon.waits(Why::UpToDate).await;
        daemon.stop().await;
        kept.insert(0, target);
    }
    // The second release made room for the fourth; the first is pinned.
    assert_eq!(machine.deployments(), [kept[0], kept[1], machine.factory]);
}

#[tokio::test]
async fn nothing_is_fetched_for_a_bootloader_that_does_not_count() {
    let mut machine = Machine::new();
    let server = machine.server().await;
    machine.publish("two");
    let config = machine.path("sysroot/boot/loader/grub.cfg");
    std::fs::write(&config, "menuentry 'an image without the script' {}\n").unwrap();
    let mut daemon = Daemon::start(&machine);
    let status = daemon.waits(Why::Unprotected).await;
    assert!(!status.protected);
    assert_eq!(asked(&server, "deltas"), Vec::<String>::new());
    assert_eq!(machine.record().phase, Phase::Idle);
    daemon.stop().await;
}

#[tokio::test]
async fn a_release_that_never_confirms_falls_back_after_three_tries_and_is_not_tried_again() {
    let mut machine = Machine::new();
    let server = machine.server().await;
    let target = machine.publish("two");
    let mut booted = Daemon::start(&machine).until_reboot(&machine).await;
    for tries in 1..=3 {
        let trial = Booted {
            commit: target,
            mark: Mark::Trial { tries },
        };
        assert_eq!(booted, trial);
        booted = machine.power_on();
    }
    let fallback = Booted {
        commit: machine.factory,
        mark: Mark::Fallback(Fallback::Exhausted),
    };
    assert_eq!(booted, fallback);

    let mut daemon = Daemon::start(&machine);
    let status = daemon.waits(Why::Rejected).await;
    assert_eq!(status.rejections[0].commit, target);
    assert_eq!(rejected(&machine, target), Some(Reason::Unconfirmed));
    assert_eq!(machine.deployments(), [machine.factory]);
    assert!(is_settled(&machine));
    // Another poll, and another start, change nothing.
    daemon.command(Command::Check).await;
    daemon.stop().await;
    assert_eq!(
        machine.power_on(),
        Booted {
            commit: machine.factory,
            mark: Mark::Normal
        }
    );
    let mut daemon = Daemon::start(&machine);
    daemon.waits(Why::Rejected).await;
    let deltas = |path: &str| path.starts_with("/base/deltas/");
    let fetched = server.requests();
    assert_eq!(
        fetched
            .iter()
            .filter(|request| deltas(&request.path))
            .count(),
        2
    );

    // Until the channel moves on.
    let better = machine.publish("three");
    let booted = daemon.until_reboot(&machine).await;
    assert_eq!(booted.commit, better);
}

#[tokio::test]
async fn an_unhealthy_release_is_rejected_for_the_checks_that_failed() {
    let mut machine = Machine::new();
    let _server = machine.server().await;
    let target = machine.publish("two");
    Daemon::start(&machine).until_reboot(&machine).await;
    // What `offshoot health` does on a trial whose required check fails.
    let verdict = Verdict {
        commit: target,
        checks: vec!["app".to_owned()],
    };
    fs::write(
        machine.path("state/verdict.json"),
        serde_json::to_vec(&verdict).unwrap(),
    )
    .unwrap();
    machine.config().bootloader().exhaust().unwrap();
    assert_eq!(machine.power_on().commit, machine.factory);
    let mut daemon = Daemon::start(&machine);
    daemon.waits(Why::Rejected).await;
    let reason = Reason::Unhealthy {
        checks: vec!["app".to_owned()],
    };
    assert_eq!(rejected(&machine, target), Some(reason));

    // An operator allows it again: the old verdict must not be held against the new trial.
    let allowed = daemon
        .command(|reply| Command::Retry(target, reply))
        .await
        .unwrap();
    assert!(allowed.is_some());
    let booted = daemon.until_reboot(&machine).await;
    assert_eq!(booted.commit, target);
    assert!(!machine.path("state/verdict.json").exists());
    let again = Daemon::start(&machine);
    let unknown = again
        .command(|reply| Command::Retry(target, reply))
        .await
        .unwrap();
    assert_eq!(unknown, None);
}

#[tokio::test]
async fn a_download_that_breaks_off_is_continued_and_no_byte_is_fetched_twice() {
    let mut machine = Machine::new();
    let server = machine.server().await;
    machine.publish_with("two", |_| {});
    machine.dropping_after(300);
    let booted = Daemon::start(&machine).until_reboot(&machine).await;
    assert!(matches!(booted.mark, Mark::Trial { tries: 1 }));
    let requests = server.requests();
    let of = |name: &str| {
        let requests = requests.iter().filter(|request| {
            request.path.starts_with("/base/deltas/") && request.path.ends_with(name)
        });
        requests.map(|request| request.sent).sum::<u64>()
    };
    let files = machine.repository.files.iter();
    for (path, bytes) in files.filter(|(path, _)| path.starts_with("deltas/")) {
        let name = path.rsplit('/').next().unwrap();
        assert_eq!(of(&format!("/{name}")), bytes.len() as u64, "{path}");
    }
}

#[tokio::test]
async fn what_is_swapped_or_cut_is_never_applied() {
    let mut machine = Machine::new();
    let _server = machine.server().await;
    let target = machine.publish("two");
    machine.twisted(|request, mut answer| {
        if request.path.ends_with("/0") {
            answer.body[10] ^= 1;
        }
        answer
    });
    let mut daemon = Daemon::start(&machine);
    let status = daemon
        .wait(|status| {
            status
                .failure
                .as_ref()
                .is_some_and(|failure| failure.times >= 2)
        })
        .await;
    assert_eq!(status.failure.unwrap().step, "fetch");
    machine.twisted(|request, answer| {
        if request.path.ends_with("/0") {
            let half = answer.body.len() / 2;
            answer.cut_at(half).then(Then::Close)
        } else {
            answer
        }
    });
    daemon
        .wait(|status| {
            status
                .failure
                .as_ref()
                .is_some_and(|failure| failure.times >= 3)
        })
        .await;
    // Nothing outside of the spool; the release is not to blame.
    assert_eq!(machine.deployments(), [machine.factory]);
    assert!(!machine.armed());
    assert_eq!(rejected(&machine, target), None);
    machine.twisted(|_, answer| answer);
    assert_eq!(daemon.until_reboot(&machine).await.commit, target);
}

#[tokio::test]
async fn a_delta_to_another_commit_is_given_up_with_nothing_written_outside_the_spool() {
    let mut machine = Machine::new();
    let _server = machine.server().await;
    let honest = machine.publish("two");
    let files = machine.repository.files.clone();
    let objects = fs::read_dir(machine.path("sysroot/ostree/repo/objects"))
        .unwrap()
        .count();
    // Signed by the right key: the delta of another release under this one's name.
    let target = machine.publish_with("three", |deltas| {
        let offshoot::trust::schema::Delta {
            superblock, parts, ..
        } = &mut deltas[0];
        for file in std::iter::once(superblock).chain(parts) {
            let name = file.path.as_str().rsplit('/').next().unwrap().to_owned();
            let (path, bytes) = files
                .iter()
                .find(|(path, _)| {
                    path.starts_with("deltas/") && path.ends_with(&format!("/{name}"))
                })
                .unwrap();
            *file = File {
                path: path.parse().unwrap(),
                length: bytes.len() as u64,
                sha256: Sha256::of(bytes),
            };
        }
    });
    assert_ne!(honest, target);
    let mut daemon = Daemon::start(&machine);
    let status = daemon
        .wait(|status| {
            status
                .failure
                .as_ref()
                .is_some_and(|failure| failure.step == "apply")
        })
        .await;
    // Before libostree sees it.
    assert_eq!(status.failure.unwrap().fault, "delta-mismatch");
    assert_eq!(
        status.phase,
        Phase::Staging {
            from: machine.factory,
            target,
            attempts: 1,
            failed: FailedWays {
                from_here: true,
                ..FailedWays::default()
            },
        }
    );
    daemon.waits(Why::Rejected).await;
    assert_eq!(rejected(&machine, target), Some(Reason::NotInstalled));
    let now = fs::read_dir(machine.path("sysroot/ostree/repo/objects"))
        .unwrap()
        .count();
    assert_eq!(now, objects);
    assert_eq!(
        fs::read_dir(machine.path("state/spool")).unwrap().count(),
        0
    );
}

#[tokio::test]
async fn nothing_is_fetched_that_there_is_no_room_for() {
    let huge = 1 << 60;
    let mut published = Machine::speaking("h2");
    let target = published.bench.release("two", "changed");
    let delta = published.delta(Some(published.factory), target);
    let mut long = delta.clone();
    long.parts[0].length = huge;
    let mut large = delta;
    large.usize = huge;
    let mut objects = published.objects(target);
    objects.index.length = huge;
    for (delta, objects, fault) in [
        // In the spool, in the repository, in memory.
        (Some(long), None, "no-space"),
        (Some(large), None, "no-space"),
        (None, Some(objects), "device"),
    ] {
        let mut machine = published.copy_speaking("h2");
        let server = machine.server().await;
        machine.release("two", target, delta.into_iter().collect(), objects);
        let mut daemon = Daemon::start(&machine);
        let status = daemon.wait(|status| status.failure.is_some()).await;
        let failure = status.failure.unwrap();
        assert_eq!((&*failure.step, &*failure.fault), ("fetch", fault));
        assert_eq!(
            status.phase,
            Phase::Staging {
                from: machine.factory,
                target,
                attempts: 0,
                failed: FailedWays::default(),
            }
        );
        assert_eq!(asked(&server, "deltas"), Vec::<String>::new());
        assert_eq!(asked(&server, "objects"), Vec::<String>::new());
        daemon.stop().await;
    }
}

#[tokio::test]
async fn a_poll_that_fails_is_named_and_tried_again() {
    let mut machine = Machine::new();
    let _server = machine.server().await;
    let mut daemon = Daemon::start(&machine);
    daemon.waits(Why::NothingOffered).await;
    machine.twisted(|_, _| crate::server::Answer::new(503, ""));
    let target = machine.publish("two");
    let failed = |kind| {
        move |status: &Status| {
            let error = status
                .last_poll
                .as_ref()
                .and_then(|poll| poll.error.as_ref());
            error.is_some_and(|error| error.kind == kind)
        }
    };
    daemon.wait(failed(PollFailureKind::Fetch)).await;
    // Signed by nobody.
    machine.twisted(|request, mut answer| {
        if request.path.ends_with("timestamp.json") && answer.status == 200 {
            let text = String::from_utf8(answer.body).unwrap();
            answer.body = text.replace("2100-", "2101-").into();
        }
        answer
    });
    let status = daemon.wait(failed(PollFailureKind::Refused)).await;
    assert_eq!(status.offer, None);
    // As long as it is there: its tag does not make it "not modified".
    let refused = status.last_poll;
    let status = daemon.wait(|status| status.last_poll != refused).await;
    assert!(failed(PollFailureKind::Refused)(&status));
    // A poll that ends half way: what was seen of it does not make the next one "not modified".
    machine.twisted(|request, answer| {
        if request.path.ends_with("snapshot.json") {
            return crate::server::Answer::new(503, "");
        }
        answer
    });
    daemon.wait(failed(PollFailureKind::Fetch)).await;
    machine.twisted(|_, answer| answer);
    assert_eq!(daemon.until_reboot(&machine).await.commit, target);
}

#[tokio::test]
async fn a_server_says_when_it_is_asked_again() {
    let machine = Machine::new();
    let _server = machine.server().await;
    machine.twisted(|_, _| crate::server::Answer::new(503, "").header("retry-after", 7200));
    let mut daemon = Daemon::start(&machine);
    let status = daemon
        .wait(|status| {
            let poll = status.last_poll.as_ref();
            poll.is_some_and(|poll| poll.error.is_some())
        })
        .await;
    let next = status.next.unwrap();
    assert_eq!(next.what, NextIs::Poll);
    let asked: Time = status.last_poll.unwrap().at.parse().unwrap();
    let again: Time = next.at.parse().unwrap();
    assert!(
        again.duration_since(asked).as_secs() >= 7200,
        "{asked} {again}"
    );
    daemon.stop().await;
}

#[tokio::test]
async fn an_operators_word_is_for_one_release() {
    let mut machine = Machine::new();
    let _server = machine.server().await;
    let config = machine.path("etc/offshoot/config.toml");
    let text = fs::read_to_string(&config).unwrap();
    let manual = text.replace("[install]\n", "[install]\nreboot = 'manual'\n");
    fs::write(&config, manual).unwrap();
    machine.publish("two");
    machine.twisted(|request, answer| {
        if request.path.contains("/deltas/") {
            return crate::server::Answer::new(503, "");
        }
        answer
    });
    let mut daemon = Daemon::start(&machine);
    update(&daemon, false).await.unwrap();
    daemon.wait(|status| status.failure.is_some()).await;
    // Before it was fetched there is another.
    let target = machine.publish("three");
    let status = daemon
        .wait(|status| matches!(status.phase, Phase::Staging { target: of, .. } if of == target))
        .await;
    assert_eq!(status.offer.unwrap().commit, target);
    machine.twisted(|_, answer| answer);
    daemon.waits(Why::AwaitingConsent).await;
    assert_eq!(machine.deployments(), [machine.factory]);
    update(&daemon, false).await.unwrap();
    assert_eq!(daemon.until_reboot(&machine).await.commit, target);
}

#[tokio::test]
async fn an_operators_words_are_obeyed_and_remembered() {
    let mut machine = Machine::new();
    let _server = machine.server().await;
    let config = machine.path("etc/offshoot/config.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(
        &config,
        text.replace("[install]\n", "[install]\nreboot = 'manual'\n"),
    )
    .unwrap();
    let mut daemon = Daemon::start(&machine);
    daemon.waits(Why::NothingOffered).await;
    let refused = update(&daemon, false).await;
    assert_eq!(refused.unwrap_err().why, Some(Why::NothingOffered));

    let hold = Hold {
        reason: "a demonstration".to_owned(),
    };
    let held = daemon
        .command(|reply| Command::Hold(Some(hold.clone()), reply))
        .await
        .unwrap();
    assert_eq!(held.hold, Some(hold));
    let target = machine.publish("two");
    let status = daemon.command(Command::Check).await;
    assert_eq!(status.why, Some(Why::Held));
    daemon.stop().await;
    let mut daemon = Daemon::start(&machine);
    daemon.waits(Why::Held).await;
    daemon
        .command(|reply| Command::Hold(None, reply))
        .await
        .unwrap();

    // Everything but the reboot happens without a word.
    daemon.waits(Why::AwaitingConsent).await;
    assert_eq!(machine.deployments(), [machine.factory]);
    assert!(!machine.armed());
    let status = update(&daemon, false).await.unwrap();
    assert_eq!(status.why, None);
    assert_eq!(daemon.until_reboot(&machine).await.commit, target);
    machine.confirm();

    let mut daemon = Daemon::start(&machine);
    daemon.waits(Why::UpToDate).await;
    let beta = daemon
        .command(|reply| Command::Channel(Some("beta".parse().unwrap()), reply))
        .await
        .unwrap();
    assert_eq!(
        (beta.channel.as_str(), beta.why, beta.offer),
        ("beta", Some(Why::NothingOffered), None)
    );
    daemon.stop().await;
    let mut daemon = Daemon::start(&machine);
    assert_eq!(daemon.waits(Why::NothingOffered).await.channel, "beta");
    let back = daemon
        .command(|reply| Command::Channel(None, reply))
        .await
        .unwrap();
    assert_eq!(
        (back.channel.as_str(), back.why),
        ("stable", Some(Why::UpToDate))
    );
}

#[tokio::test]
async fn an_update_comes_from_a_directory_as_from_a_server() {
    let mut machine = Machine::new();
    let server = machine.server().await;
    let daemon = Daemon::start(&machine);
    daemon.command(Command::Check).await;
    let target = machine.publish("two");
    machine.twisted(|_, _| crate::server::Answer::new(503, ""));
    let from = |name: &str| {
        let from = Some(machine.path(name));
        daemon.command(|reply| Command::Update {
            over_limits: false,
            from,
            reply,
        })
    };
    let nothing = from("nowhere").await.unwrap_err();
    let error = nothing.last_poll.unwrap().error.unwrap();
    assert_eq!(error.kind, PollFailureKind::Refused);
    for (path, bytes) in &machine.repository.files {
        let path = machine.path("stick").join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    assert_eq!(from("stick").await.unwrap().why, None);
    let before = server.requests().len();
    assert_eq!(daemon.until_reboot(&machine).await.commit, target);
    let deltas = server.requests().split_off(before);
    assert!(
        !deltas
            .iter()
            .any(|request| request.path.contains("/deltas/"))
    );
}

/// The paths that were asked for below one folder.
fn asked(server: &crate::server::Server, folder: &str) -> Vec<String> {
    let requests = server.requests().into_iter();
    let paths = requests.filter_map(|request| {
        let path = request.path.strip_prefix("/base/")?;
        path.starts_with(folder).then(|| path.to_owned())
    });
    paths.collect()
}

#[tokio::test]
async fn a_device_that_is_far_behind_goes_from_delta_to_delta() {
    let mut machine = Machine::new();
    let server = machine.server().await;
    let versions = ["two", "three", "four", "five", "six"];
    let commits = versions.map(|version| machine.bench.release(version, version));
    let mut from = machine.factory;
    let mut deltas = Vec::new();
    for commit in commits {
        let mut delta = machine.delta(Some(from), commit);
        delta.to = Some(commit);
        deltas.push(delta);
        from = commit;
    }
    let target = commits[4];
    deltas[4].to = None;
    machine.release("six", target, deltas, None);
    let booted = Daemon::start(&machine).until_reboot(&machine).await;
    assert_eq!(booted.commit, target);
    let superblocks = asked(&server, "deltas/");
    let superblocks: Vec<_> = superblocks
        .iter()
        .filter(|path| path.ends_with("superblock"))
        .collect();
    assert_eq!(superblocks.len(), 5);
    assert_eq!(machine.deployments(), [target, machine.factory]);
}

/// A large file that is another one in each release, and one that repeats itself further apart than an object's compression reaches.
#[tokio::test]
async fn a_chain_of_deltas_is_taken_where_it_is_fewer_bytes_than_the_missing_objects() {
    for repeats in [false, true] {
        let mut machine = Machine::speaking("h2");
        let server = machine.server().await;
        let (mut from, mut deltas) = (machine.factory, Vec::new());
        for (release, version) in (0..).zip(["two", "three", "four"]) {
            let text = if repeats {
                noise(0..1000).repeat(4) + version
            } else {
                noise(release * 1000..(release + 1) * 1000)
            };
            let commit = machine.bench.release(version, &text);
            let mut delta = machine.delta(Some(from), commit);
            delta.to = Some(commit);
            deltas.push(delta);
            from = commit;
        }
        let target = from;
        deltas[2].to = None;
        let objects = machine.objects(target);
        machine.release("four", target, deltas, Some(objects));
        let booted = Daemon::start(&machine).until_reboot(&machine).await;
        assert_eq!(booted.commit, target);
        let (deltas, objects) = (asked(&server, "deltas/"), asked(&server, "objects/"));
        let superblocks = deltas.iter().filter(|path| path.ends_with("superblock"));
        if repeats {
            // The index, once, to know.
            assert_eq!((superblocks.count(), objects.len()), (3, 1), "{objects:?}");
        } else {
            assert_eq!(deltas, [""; 0]);
            assert!(objects.len() > 1);
        }
    }
}

#[tokio::test]
async fn without_a_delta_only_the_missing_objects_are_fetched() {
    for protocol in ["h2", "http/1.1"] {
        let mut machine = Machine::speaking(protocol);
        let server = machine.server().await;
        let target = machine.bench.release("two", "changed");
        let objects = machine.objects(target);
        let full = machine.delta(None, target);
        // The delta from nothing is larger than the index; the objects are fewer bytes still.
        machine.release("two", target, vec![full], Some(objects));
        let booted = Daemon::start(&machine).until_reboot(&machine).await;
        assert_eq!(booted.commit, target);
        let fetched = asked(&server, "objects/");
        let all = machine.repository.files.keys();
        let all = all.filter(|path| path.starts_with("objects/")).count();
        assert!(fetched.len() > 1 && fetched.len() < all, "{fetched:?}");
        assert_eq!(asked(&server, "deltas/"), [""; 0]);
        let mut once = fetched.clone();
        once.sort();
        once.dedup();
        assert_eq!(once.len(), fetched.len());
    }
}

#[tokio::test]
async fn a_way_that_fails_is_given_up_for_the_next_one_and_that_is_remembered() {
    let mut machine = Machine::speaking("h2");
    let server = machine.server().await;
    let target = machine.bench.release("two", "changed");
    let objects = machine.objects(target);
    let delta = machine.delta(Some(machine.factory), target);
    machine.release("two", target, vec![delta], Some(objects));
    machine.twisted(|request, mut answer| {
        if request.path.ends_with("/0") {
            answer.body[5] ^= 1;
        }
        answer
    });
    let mut daemon = Daemon::start(&machine);
    daemon
        .wait(|status| matches!(status.phase, Phase::Staging { failed, .. } if failed.from_here))
        .await;
    // It is remembered across a power cut, and the delta is left alone.
    daemon.cut();
    machine.power_on();
    let before = asked(&server, "deltas/").len();
    let booted = Daemon::start(&machine).until_reboot(&machine).await;
    assert_eq!(booted.commit, target);
    assert_eq!(asked(&server, "deltas/").len(), before);
    assert!(!asked(&server, "objects/").is_empty());
}

#[tokio::test]
async fn an_object_that_is_not_what_was_signed_never_reaches_the_repository() {
    let mut machine = Machine::speaking("h2");
    let _server = machine.server().await;
    let target = machine.bench.release("two", "changed");
    let objects = machine.objects(target);
    machine.release("two", target, vec![], Some(objects));
    machine.twisted(|request, mut answer| {
        if request.path.ends_with(".filez") {
            answer.body[5] ^= 1;
        }
        answer
    });
    let count = |machine: &Machine| {
        let objects = machine.path("sysroot/ostree/repo/objects");
        fs::read_dir(objects).unwrap().count()
    };
    let before = count(&machine);
    let mut daemon = Daemon::start(&machine);
    let status = daemon
        .wait(|status| {
            status
                .failure
                .as_ref()
                .is_some_and(|failure| failure.times >= 2)
        })
        .await;
    assert_eq!(status.failure.unwrap().step, "fetch");
    assert_eq!(count(&machine), before);
    machine.twisted(|_, answer| answer);
    assert_eq!(daemon.until_reboot(&machine).await.commit, target);
}

/// What the configuration says besides, for a machine whose server runs.
fn configure(machine: &Machine, section: &str) {
    let config = machine.path("etc/offshoot/config.toml");
    let text = fs::read_to_string(&config).unwrap();
    let former = text.split("[network]").next().unwrap();
    fs::write(&config, format!("{former}{section}")).unwrap();
}

/// A window of an hour that opens in six.
fn later() -> String {
    let hour = |ahead: i64| {
        let time = Time::now() + jiff::SignedDuration::from_hours(ahead);
        let local = time.to_zoned(jiff::tz::TimeZone::system());
        local.strftime("%H:00").to_string()
    };
    format!("{}-{}", hour(6), hour(7))
}

#[tokio::test]
async fn a_download_waits_for_what_the_configuration_says_and_an_operator_may_say_otherwise() {
    let mut machine = Machine::new();
    let server = machine.server().await;
    let target = machine.publish("two");
    let deltas = || {
        let requests = server.requests().into_iter();
        requests
            .filter(|request| request.path.starts_with("/base/deltas/"))
            .count()
    };
    for (section, why, next, word) in [
        ("update_limit = 100", Why::OverLimit, NextIs::Poll, false),
        ("month_limit = 100", Why::OverLimit, NextIs::Month, false),
        (
            "metered = 'yes'\nwhen_metered = 'wait'",
            Why::Metered,
            NextIs::Poll,
            false,
        ),
        (
            &format!("windows = ['{}']", later()),
            Why::AwaitingDownloadWindow,
            NextIs::Window,
            true,
        ),
    ] {
        configure(&machine, &format!("[network]\n{section}\n"));
        let mut daemon = Daemon::start(&machine);
        let status = daemon.waits(why).await;
        assert_eq!(status.next.unwrap().what, next, "{section}");
        let plan = status.plan.unwrap();
        assert_eq!(
            (plan.from, plan.missing),
            (Some(machine.factory), plan.total)
        );
        // A window does not bind an operator who is there; what costs money does.
        if !word {
            let refused = update(&daemon, false).await.unwrap_err();
            assert_eq!(refused.why, Some(why));
        }
        daemon.stop().await;
        assert_eq!(deltas(), 0, "{section}");
    }
    configure(&machine, "[network]\nmonth_limit = 100\n");
    let daemon = Daemon::start(&machine);
    assert_eq!(update(&daemon, true).await.unwrap().why, None);
    assert_eq!(daemon.until_reboot(&machine).await.commit, target);
    let counted = fs::read_to_string(machine.path("state/usage.json")).unwrap();
    let counted: serde_json::Value = serde_json::from_str(&counted).unwrap();
    let files = machine.repository.files.iter();
    let size: usize = files
        .filter(|(path, _)| path.starts_with("deltas/"))
        .map(|(_, bytes)| bytes.len())
        .sum();
    assert!(counted["bytes"].as_u64().unwrap() >= size as u64);
}

#[tokio::test]
async fn a_trial_waits_for_its_window_with_everything_here() {
    let mut machine = Machine::new();
    let _server = machine.server().await;
    let target = machine.publish("two");
    let config = machine.path("etc/offshoot/config.toml");
    let text = fs::read_to_string(&config).unwrap();
    let windows = format!("[install]\nwindows = ['{}']\n", later());
    fs::write(&config, text.replace("[install]\n", &windows)).unwrap();
    let mut daemon = Daemon::start(&machine);
    let status = daemon.waits(Why::AwaitingInstallWindow).await;
    assert_eq!(status.next.unwrap().what, NextIs::Window);
    assert_eq!(status.plan, None);
    assert_eq!(machine.deployments(), [machine.factory]);
    update(&daemon, false).await.unwrap();
    assert_eq!(daemon.until_reboot(&machine).await.commit, target);
}

/// One step after the other on a machine, without the daemon's timing: what a power cut between any two leaves is reached by stopping.
struct Steps<'a> {
    machine: &'a Machine,
    device: Device,
    trust: Store,
    source: Source,
    poller: Poller,
}

impl<'a> Steps<'a> {
    fn new(machine: &'a Machine) -> Self {
        let config = machine.config();
        let (device, _) = Device::open(&config).unwrap();
        let root = fs::read(&config.paths.root_metadata).unwrap();
        Self {
            machine,
            device,
            trust: Store::open(config.paths.state.join("tuf"), &root).unwrap(),
            source: Server::new(
                ServerConfig {
                    ca: config.server.ca.clone(),
                    ..ServerConfig::new(&config.server.url)
                },
                "offshoot/test",
            )
            .unwrap()
            .into(),
            poller: Poller::new("stable".parse().unwrap(), HARDWARE.parse().unwrap()),
        }
    }

    /// Does the next steps, at most `budget` of them; the last one decided.
    async fn run(&mut self, budget: &mut usize) -> Step {
        let now = Time::now();
        let outcome = self
            .poller
            .poll(&mut self.source, &mut self.trust, now, Time::UNIX_EPOCH)
            .await
            .unwrap();
        let offer = outcome.found;
        loop {
            let observed = self
                .device
                .observe(offer.as_ref(), |_, _| Download::Allowed, |_| Consent::Given)
                .await
                .unwrap();
            let step = decide(self.device.record(), &observed.facts);
            if *budget == 0 || matches!(step, Step::Wait(_)) {
                return step;
            }
            *budget -= 1;
            self.device
                .perform(&step, offer.as_ref(), &mut self.source, now, &mut |_, _| {})
                .await
                .unwrap();
            if step == Step::Reboot {
                assert!(self.machine.rebooted());
                return step;
            }
        }
    }
}

/// Storage that rots: every file in the spool, once all of them are there.
#[tokio::test]
async fn what_rots_in_the_spool_is_fetched_again_and_never_applied() {
    for by_objects in [false, true] {
        let mut machine = Machine::speaking("h2");
        let server = machine.server().await;
        let target = machine.bench.release("two", "changed");
        let (delta, objects) = if by_objects {
            (None, Some(machine.objects(target)))
        } else {
            (Some(machine.delta(Some(machine.factory), target)), None)
        };
        machine.release("two", target, delta.into_iter().collect(), objects);
        let mut steps = Steps::new(&machine);
        let apply = Step::Apply {
            from: machine.factory,
            target,
        };
        let fetch = Step::Fetch {
            from: machine.factory,
            target,
        };
        let mut done = 0;
        while steps.run(&mut 1).await != apply {
            done += 1;
            assert!(done < 10);
        }
        let spool = machine.path("state/spool").join(target.to_string());
        let mut files = 0;
        for file in fs::read_dir(spool).unwrap() {
            let path = file.unwrap().path();
            if path.is_file() && !path.ends_with("index") {
                let mut bytes = fs::read(&path).unwrap();
                bytes[0] ^= 1;
                fs::write(&path, bytes).unwrap();
                files += 1;
            }
        }
        assert!(files >= 2, "{files}");
        let folder = if by_objects { "objects/" } else { "deltas/" };
        let before = asked(&server, folder).len();
        assert_eq!(steps.run(&mut 0).await, fetch);
        assert_eq!(steps.run(&mut 1).await, apply);
        assert_eq!(asked(&server, folder).len(), before + files);
        assert_eq!(steps.run(&mut 100).await, Step::Reboot);
        assert_eq!(machine.deployments()[0], target);
    }
}

/// The promise that no cut may break: what the next boot takes is proved, or counted.
fn assert_safe(machine: &Machine, proved: &[Commit]) {
    let deployments = machine.deployments();
    assert!(
        proved.contains(&deployments[0]) || machine.armed(),
        "{deployments:?} {:?}",
        machine.environment()
    );
    assert!(deployments.iter().any(|commit| proved.contains(commit)));
}

#[tokio::test]
async fn power_cut_after_any_number_of_steps_converges() {
    let mut published = Machine::new();
    let target = published.publish("two");
    for good in [true, false] {
        let mut cut_after = 0;
        loop {
            let machine = published.copy();
            let _server = machine.server().await;
            let mut proved = vec![machine.factory];
            let mut budget = cut_after;
            let mut boots = 0;
            let mut was_cut = false;
            let last = loop {
                let mut steps = Steps::new(&machine);
                let mut step = steps.run(&mut budget).await;
                assert_safe(&machine, &proved);
                if budget == 0 && !was_cut {
                    // The power goes here; afterwards nothing more does.
                    was_cut = true;
                    budget = usize::MAX;
                    step = Step::Reboot;
                }
                match step {
                    Step::Wait(Why::AwaitingConfirmation) if good => {
                        proved.push(target);
                        machine.confirm();
                    }
                    Step::Reboot | Step::Wait(Why::AwaitingConfirmation) => {
                        boots += 1;
                        assert!(boots < 12, "it does not converge");
                        machine.power_on();
                        assert_safe(&machine, &proved);
                    }
                    Step::Wait(why) => break why,
                    other => panic!("{other:?} was not done"),
                }
            };
            if good {
                assert_eq!(last, Why::UpToDate);
                assert_eq!(machine.deployments(), [target, machine.factory]);
            } else {
                assert_eq!(last, Why::Rejected);
                assert_eq!(machine.deployments(), [machine.factory]);
            }
            assert!(is_settled(&machine), "cut after {cut_after}");
            if !was_cut {
                // There are no more steps to cut between.
                assert!(cut_after > 8, "{cut_after}");
                break;
            }
            cut_after += 1;
        }
    }
}
