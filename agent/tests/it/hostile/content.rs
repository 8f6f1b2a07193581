//! Hostile content: deltas, and objects behind an index.

use super::*;

/// A download that goes wrong. `http/1.1`: a delta in a superblock and a part, `/0`. `h2`: objects, behind an index.
struct Download {
    name: &'static str,
    twist: Twist,
    fault: &'static str,
}

fn download(name: &'static str, twist: Twist, fault: &'static str) -> Download {
    Download { name, twist, fault }
}

/// Digits of digests, which no compression makes small.
fn noise(length: usize) -> String {
    let digits = |n: usize| offshoot::commit::Sha256::of(&n.to_le_bytes()).to_string();
    (0..length / 64).map(digits).collect()
}

fn downloaded(protocol: &str, downloads: Vec<Download>) {
    let mut ledger = Ledger::default();
    let mut factory = Machine::speaking(protocol);
    let commit = factory.bench.release("two", &noise(1_000_000));
    let (deltas, objects) = match protocol {
        "h2" => (Vec::new(), Some(factory.objects(commit))),
        _ => (vec![factory.delta(Some(factory.factory), commit)], None),
    };
    let content = factory.repository.files.iter();
    let content =
        content.filter(|(path, _)| path.starts_with("deltas/") || path.starts_with("objects/"));
    let signed = content.map(|(_, bytes)| bytes.len() as u64).sum();
    for Download { name, twist, fault } in downloads {
        let mut attacked = Attacked::new(factory.copy_speaking(protocol));
        attacked.begin(twist);
        (attacked.machine).release("two", commit, deltas.clone(), objects.clone());
        assert_eq!(attacked.daemon.status(&["check"]).0, Some(0), "{name}");
        let failure = attacked.first_failure();
        ledger.refused(
            name,
            (failure.step.as_str(), failure.fault.as_str()) == ("fetch", fault),
            &format!("{failure:?}"),
        );
        ledger.grown(name, attacked.assert_bounded(name, signed));
        attacked.assert_recovers(name);
    }
    ledger.close();
}

#[test]
fn a_hostile_delta_is_refused_by_name_and_stays_in_the_spool() {
    downloaded(
        "http/1.1",
        vec![
            download("endless part", always("/0", endless()), "too-long"),
            download(
                "endless superblock",
                always("/superblock", endless()),
                "too-long",
            ),
            download(
                "a terabyte is stated",
                always(
                    "/0",
                    Answer::new(200, "")
                        .unmeasured()
                        .header("content-length", 1u64 << 40)
                        .then(Then::Hold),
                ),
                "wrong-length",
            ),
            download(
                "endless head",
                always(
                    "/0",
                    Answer::raw("HTTP/1.1 200 OK\r\n", "x: y\r\n".repeat(1000)).then(Then::Repeat),
                ),
                "malformed",
            ),
            download(
                "silence",
                always("/0", Answer::raw("", "").then(Then::Hold)),
                "stalled",
            ),
            download(
                "half of it, then silence",
                on("/0", |_, honest| honest.cut_at(50_000).then(Then::Hold)),
                "stalled",
            ),
            download(
                "slow head",
                always("/0", Answer::raw("HTTP/1.1 200 ", "").then(DRIP)),
                "stalled",
            ),
            download(
                "slow body",
                on("/0", |_, honest| honest.cut_at(50_000).then(DRIP)),
                "too-slow",
            ),
            download("short part", on("/0", shorter), "wrong-length"),
            download("long part", on("/0", longer), "wrong-length"),
            download(
                "short part, not stated",
                on("/0", |request, honest| {
                    shorter(request, honest).unmeasured().then(Then::Close)
                }),
                "wrong-length",
            ),
            download(
                "long part, not stated",
                on("/0", |request, honest| {
                    longer(request, honest).unmeasured().then(Then::Close)
                }),
                "too-long",
            ),
            download(
                "part breaks off",
                on("/0", |_, honest| honest.cut_at(50_000).then(Then::Cut)),
                "interrupted",
            ),
            download("gzip", always("/0", encoded()), "encoded"),
            download(
                "redirect to itself",
                on("/0", |request, _| redirect(&request.path)),
                "redirected",
            ),
            download(
                "redirects in a circle",
                on("/0", |request, _| {
                    redirect(if request.path.starts_with("/base/there") {
                        "/base/back/0"
                    } else {
                        "/base/there/0"
                    })
                }),
                "redirected",
            ),
            download(
                "redirect to another protocol",
                always("/0", redirect("http://localhost:80/0")),
                "redirected",
            ),
            download(
                "redirect to a file",
                always("/0", redirect("file:///etc/shadow")),
                "redirected",
            ),
            download("spoiled part", on("/0", spoiled), "wrong-digest"),
            download(
                "spoiled superblock",
                on("/superblock", spoiled),
                "wrong-digest",
            ),
            download(
                "part without its superblock",
                always("/superblock", Answer::new(404, "")),
                "status",
            ),
            download(
                "superblock without its part",
                always("/0", Answer::new(404, "")),
                "status",
            ),
            download(
                "another range",
                on("/0", |request, honest| match request.header("range") {
                    None => honest.cut_at(200_000).then(Then::Cut),
                    Some(_) => Answer::new(206, "x".repeat(100_000))
                        .header("content-range", "bytes 0-99999/600000"),
                }),
                "malformed",
            ),
            download(
                "a range of another file",
                on("/0", |request, honest| match request.header("range") {
                    None => honest.cut_at(200_000).then(Then::Cut),
                    Some(_) => {
                        let range =
                            format!("bytes 200000-{}/9999999", 200_000 + honest.body.len() - 1);
                        Answer::new(206, honest.body).header("content-range", range)
                    }
                }),
                "wrong-length",
            ),
            download(
                "a range that nobody asked for",
                on("/0", |_, honest| Answer {
                    status: 206,
                    ..honest
                }),
                "status",
            ),
            download(
                "no range is ever right",
                on("/0", |request, honest| match request.header("range") {
                    None => honest.cut_at(200_000).then(Then::Cut),
                    Some(_) => Answer::new(416, ""),
                }),
                "interrupted",
            ),
            download(
                "the rest is spoiled",
                on("/0", |request, honest| match request.header("range") {
                    None => honest.cut_at(200_000).then(Then::Cut),
                    Some(_) => spoiled(request, honest),
                }),
                "wrong-digest",
            ),
        ],
    );
}

#[test]
fn hostile_objects_are_refused_by_name_and_stay_in_the_spool() {
    let index = |harm: fn(&Request, Answer) -> Answer| -> Twist {
        Box::new(move |request, honest| {
            if request.path.contains("/objects/index-") {
                harm(request, honest)
            } else {
                honest
            }
        })
    };
    downloaded(
        "h2",
        vec![
            download("endless index", index(|_, _| endless()), "too-long"),
            download("spoiled index", index(spoiled), "wrong-digest"),
            download("short index", index(shorter), "wrong-length"),
            download("no index", index(|_, _| Answer::new(404, "")), "status"),
            download("endless objects", always(".filez", endless()), "too-long"),
            download("spoiled objects", on(".filez", spoiled), "wrong-digest"),
            download(
                "spoiled directories",
                on(".dirtree", spoiled),
                "wrong-digest",
            ),
            download("short objects", on(".filez", shorter), "wrong-length"),
            download("long objects", on(".filez", longer), "wrong-length"),
            download("gzip", always(".filez", encoded()), "encoded"),
            download(
                "no objects",
                always(".filez", Answer::new(404, "")),
                "status",
            ),
            download(
                "redirects",
                on(".filez", |request, _| redirect(&request.path)),
                "redirected",
            ),
            download(
                "long header",
                on(".filez", |_, honest| honest.header("x", "y".repeat(40_000))),
                "interrupted",
            ),
        ],
    );
}
