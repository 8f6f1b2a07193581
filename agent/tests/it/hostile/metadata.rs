//! Hostile metadata.

use std::collections::BTreeMap;

use super::*;

/// A poll, of a server with a new release, that goes wrong.
struct Poll {
    name: &'static str,
    /// Published before the harm begins, beside the release.
    prepare: fn(&mut Machine),
    twist: fn(&Machine) -> Twist,
    kind: PollFailureKind,
    fault: &'static str,
}

fn poll(
    name: &'static str,
    twist: fn(&Machine) -> Twist,
    kind: PollFailureKind,
    fault: &'static str,
) -> Poll {
    Poll {
        name,
        prepare: |_| {},
        twist,
        kind,
        fault,
    }
}

const TIMESTAMP: &str = "/timestamp.json";

/// The snapshot says no more of the others than their versions, as TUF allows.
fn unannounced(machine: &mut Machine) {
    let repository = &mut machine.repository;
    for file in repository.snapshot.meta.values_mut() {
        (file.length, file.hashes) = (None, None);
    }
    let bytes = sign(&repository.snapshot, &[SNAPSHOT_KEY]);
    let announced = fixture::announce(repository.snapshot.version, &bytes);
    let path = format!("metadata/{}.snapshot.json", announced.version);
    repository.files.insert(path, bytes);
    repository.timestamp.meta = BTreeMap::from([("snapshot.json".to_owned(), announced)]);
    repository.publish_timestamp();
    machine.upload();
}

fn polled(polls: Vec<Poll>) {
    let factory = Machine::new();
    let mut ledger = Ledger::default();
    for Poll {
        name,
        prepare,
        twist,
        kind,
        fault,
    } in polls
    {
        let mut attacked = Attacked::new(factory.copy());
        attacked.machine.publish("two");
        prepare(&mut attacked.machine);
        let twist = twist(&attacked.machine);
        attacked.begin(twist);
        let (code, status) = attacked.daemon.status(&["check"]);
        assert_eq!(code, Some(7), "{name}: {status:?}");
        let failure = status.last_poll.unwrap().error.unwrap();
        ledger.refused(
            name,
            (failure.kind, failure.fault.as_str()) == (kind, fault),
            &format!("{failure:?}"),
        );
        ledger.grown(name, attacked.assert_bounded(name, 0));
        attacked.assert_recovers(name);
    }
    ledger.close();
}

#[test]
fn endless_metadata_is_cut_off() {
    polled(vec![
        // Endless.
        poll(
            "endless timestamp",
            |_| always(TIMESTAMP, endless()),
            Fetch,
            "too-long",
        ),
        poll(
            "endless root",
            |_| always("2.root.json", endless()),
            Fetch,
            "too-long",
        ),
        poll(
            "endless snapshot",
            |_| always("snapshot.json", endless()),
            Fetch,
            "too-long",
        ),
        poll(
            "endless targets",
            |_| always(".targets.json", endless()),
            Fetch,
            "too-long",
        ),
        poll(
            "endless channel",
            |_| always(".stable.json", endless()),
            Fetch,
            "too-long",
        ),
        poll(
            "endless manifest",
            |_| always(".manifest.json", endless()),
            Fetch,
            "too-long",
        ),
        poll(
            "a terabyte is stated",
            |_| {
                let answer = Answer::new(200, "")
                    .unmeasured()
                    .header("content-length", 1u64 << 40);
                always(TIMESTAMP, answer.then(Then::Hold))
            },
            Fetch,
            "too-long",
        ),
        poll(
            "endless head",
            |_| {
                let head = Answer::raw("HTTP/1.1 200 OK\r\n", "x: y\r\n".repeat(1000));
                always(TIMESTAMP, head.then(Then::Repeat))
            },
            Fetch,
            "malformed",
        ),
        poll(
            "endless header",
            |_| {
                always(
                    TIMESTAMP,
                    Answer::raw("HTTP/1.1 200 OK\r\nx: ", "y".repeat(CHUNK)).then(Then::Repeat),
                )
            },
            Fetch,
            "malformed",
        ),
        poll(
            "endless chunk extension",
            |_| {
                let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1;";
                always(
                    TIMESTAMP,
                    Answer::raw(head, "y".repeat(CHUNK)).then(Then::Repeat),
                )
            },
            Fetch,
            "interrupted",
        ),
        poll(
            "endless early hints",
            |_| {
                let hint = "HTTP/1.1 103 Early Hints\r\n\r\n";
                always(TIMESTAMP, Answer::raw(hint, hint).then(Then::Repeat))
            },
            Fetch,
            "flooded",
        ),
    ]);
}

#[test]
fn slow_metadata_is_given_up() {
    polled(vec![
        // Slow.
        poll(
            "silence",
            |_| always(TIMESTAMP, Answer::raw("", "").then(Then::Hold)),
            Fetch,
            "stalled",
        ),
        poll(
            "slow head",
            |_| always(TIMESTAMP, Answer::raw("HTTP/1.1 200 ", "").then(DRIP)),
            Fetch,
            "stalled",
        ),
        poll(
            "head alone",
            |_| on(TIMESTAMP, |_, honest| honest.cut_at(0).then(Then::Hold)),
            Fetch,
            "stalled",
        ),
        poll(
            "slow body",
            |_| on(TIMESTAMP, |_, honest| honest.cut_at(0).then(DRIP)),
            Fetch,
            "too-slow",
        ),
    ]);
}

#[test]
fn metadata_of_a_wrong_length_or_that_bursts_is_refused() {
    polled(vec![
        // Wrong length.
        poll(
            "short snapshot",
            |_| on("snapshot.json", shorter),
            Refused,
            "wrong-length",
        ),
        poll(
            "long snapshot",
            |_| on("snapshot.json", longer),
            Fetch,
            "too-long",
        ),
        poll(
            "short channel",
            |_| on(".stable.json", shorter),
            Refused,
            "wrong-length",
        ),
        poll(
            "short manifest",
            |_| on(".manifest.json", shorter),
            Refused,
            "wrong-length",
        ),
        poll(
            "body breaks off",
            |_| {
                on("snapshot.json", |_, honest| {
                    honest.cut_at(100).then(Then::Cut)
                })
            },
            Fetch,
            "interrupted",
        ),
        poll(
            "nothing",
            |_| always(TIMESTAMP, Answer::new(200, "")),
            Refused,
            "not-json",
        ),
        // Bombs.
        poll("gzip", |_| always(TIMESTAMP, encoded()), Fetch, "encoded"),
        poll(
            "gzip that is not stated",
            |_| always(TIMESTAMP, Answer::new(200, &BOMB[..8000])),
            Refused,
            "not-utf8",
        ),
        poll(
            "gzip as transfer encoding",
            |_| {
                let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n";
                always(TIMESTAMP, Answer::raw(head, BOMB.clone()).then(Then::Close))
            },
            Refused,
            "not-utf8",
        ),
        poll(
            "nested root",
            |_| always("2.root.json", bomb("[", 60_000)),
            Refused,
            "too-deep",
        ),
        poll(
            "object of objects",
            |_| always("2.root.json", Answer::new(200, members(5000))),
            Refused,
            "malformed",
        ),
        poll(
            "root of noughts",
            |_| always("2.root.json", Answer::new(200, list("0", 30_000))),
            Refused,
            "malformed",
        ),
        poll(
            "timestamp of lists",
            |_| always(TIMESTAMP, Answer::new(200, list("[]", 5000))),
            Refused,
            "malformed",
        ),
        poll(
            "key twice",
            |_| {
                on(TIMESTAMP, |_, honest| {
                    let text = String::from_utf8(honest.body).unwrap();
                    Answer::new(200, text.replacen('{', "{\"signatures\":[],", 1))
                })
            },
            Refused,
            "duplicate-key",
        ),
        Poll {
            prepare: unannounced,
            ..poll(
                "channel of noughts, not announced",
                |_| always(".stable.json", Answer::new(200, list("0", 2_000_000))),
                Fetch,
                "too-long",
            )
        },
        Poll {
            prepare: unannounced,
            ..poll(
                "channel of objects, not announced",
                |_| always(".stable.json", Answer::new(200, members(300_000))),
                Fetch,
                "too-long",
            )
        },
        Poll {
            prepare: unannounced,
            ..poll(
                "small channel of noughts, not announced",
                |_| always(".stable.json", Answer::new(200, list("0", 130_000))),
                Refused,
                "malformed",
            )
        },
        Poll {
            prepare: unannounced,
            ..poll(
                "small channel of objects, not announced",
                |_| always(".stable.json", Answer::new(200, members(20_000))),
                Refused,
                "malformed",
            )
        },
        // Redirects.
        poll(
            "redirect to itself",
            |_| on(TIMESTAMP, |request, _| redirect(&request.path)),
            Fetch,
            "redirected",
        ),
    ]);
}

#[test]
fn metadata_that_was_swapped_mixed_or_half_published_is_refused() {
    polled(vec![
        // Swapped.
        poll(
            "spoiled timestamp",
            |_| {
                on(TIMESTAMP, |_, honest| {
                    let text = String::from_utf8(honest.body).unwrap();
                    Answer::new(200, text.replacen("\"version\":3", "\"version\":9", 2))
                })
            },
            Refused,
            "below-threshold",
        ),
        poll(
            "timestamp by another key",
            |machine| {
                always(
                    TIMESTAMP,
                    Answer::new(200, sign(&machine.repository.timestamp, &[SNAPSHOT_KEY])),
                )
            },
            Refused,
            "below-threshold",
        ),
        poll(
            "snapshot as timestamp",
            |machine| {
                always(
                    TIMESTAMP,
                    Answer::new(200, machine.repository.file("3.snapshot.json")),
                )
            },
            Refused,
            "below-threshold",
        ),
        poll(
            "another channel",
            |machine| {
                always(
                    "3.stable.json",
                    Answer::new(200, machine.repository.file("3.beta.json")),
                )
            },
            Refused,
            "wrong-length",
        ),
        poll(
            "spoiled snapshot",
            |_| on("snapshot.json", spoiled),
            Refused,
            "wrong-digest",
        ),
        poll(
            "spoiled targets",
            |_| on(".targets.json", spoiled),
            Refused,
            "wrong-digest",
        ),
        poll(
            "spoiled channel",
            |_| on(".stable.json", spoiled),
            Refused,
            "wrong-digest",
        ),
        poll(
            "spoiled manifest",
            |_| on(".manifest.json", spoiled),
            Refused,
            "wrong-digest",
        ),
        // Mixed versions.
        poll(
            "former snapshot",
            |machine| {
                always(
                    "3.snapshot.json",
                    Answer::new(200, machine.repository.file("2.snapshot.json")),
                )
            },
            Refused,
            "wrong-digest",
        ),
        poll(
            "former targets",
            |machine| {
                always(
                    "3.targets.json",
                    Answer::new(200, machine.repository.file("2.targets.json")),
                )
            },
            Refused,
            "wrong-digest",
        ),
        poll(
            "former timestamp",
            |machine| {
                let mut timestamp = machine.repository.timestamp.clone();
                timestamp.version = fixture::version(1);
                // The device has seen the second.
                always(
                    TIMESTAMP,
                    Answer::new(200, sign(&timestamp, &[TIMESTAMP_KEY])),
                )
            },
            Refused,
            "rolled-back",
        ),
        poll(
            "root after the next",
            |machine| next_root(machine, 3, &ROOT_KEYS),
            Refused,
            "root-not-sequential",
        ),
        poll(
            "root by one key",
            |machine| next_root(machine, 2, &ROOT_KEYS[..1]),
            Refused,
            "below-threshold",
        ),
        // Half-published.
        poll(
            "no timestamp",
            |_| always(TIMESTAMP, Answer::new(404, "")),
            Refused,
            "missing",
        ),
        poll(
            "no snapshot",
            |_| always("snapshot.json", Answer::new(404, "")),
            Refused,
            "missing",
        ),
        poll(
            "no targets",
            |_| always(".targets.json", Answer::new(404, "")),
            Refused,
            "missing",
        ),
        poll(
            "no channel",
            |_| always(".stable.json", Answer::new(404, "")),
            Refused,
            "missing",
        ),
        poll(
            "no manifest",
            |_| always(".manifest.json", Answer::new(404, "")),
            Refused,
            "missing",
        ),
        poll(
            "a page to log in",
            |_| {
                always(
                    TIMESTAMP,
                    Answer::new(200, "<html>Welcome to our hotel.</html>"),
                )
            },
            Refused,
            "not-json",
        ),
        poll(
            "out of order",
            |_| always(TIMESTAMP, Answer::new(503, "")),
            Fetch,
            "status",
        ),
    ]);
}
