//! To a directory: a web server's, a mounted share.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

use super::{FOLDERS, Plan, Summary, TIMESTAMP, damaged};
use crate::verify;
use crate::writer::{Writer, make_directory};

pub(super) fn push(plan: &Plan, to: &Path, delete: bool) -> Result<Summary> {
    make_directory(to).with_context(|| format!("making {}", to.display()))?;
    push_with(plan, to, delete, &Writer::new(to))
}

fn push_with(plan: &Plan, to: &Path, delete: bool, writer: &Writer) -> Result<Summary> {
    writer.clear_parts()?;
    let mut summary = Summary {
        files: plan.count(),
        ..Summary::default()
    };
    for (path, want) in &plan.content {
        if verify::fault(to, path, want)?.is_none() {
            continue;
        }
        let from = plan.public.join(path);
        if writer.put(&from, path)? != *want {
            return Err(damaged(&from));
        }
        summary.sent += 1;
        summary.bytes += want.length;
    }
    if summary.sent > 0 {
        writer.settle()?;
    }
    let timestamp = (TIMESTAMP, plan.timestamp.as_slice());
    let metadata = plan.metadata.iter();
    let metadata = metadata.map(|(path, bytes)| (path.as_str(), bytes.as_slice()));
    for (path, bytes) in metadata.chain([timestamp]) {
        let place = to.join(path);
        let same = place.exists()
            && fs::read(&place).with_context(|| format!("reading {}", place.display()))? == bytes;
        if !same {
            writer.write(path, bytes)?;
            summary.sent += 1;
            summary.bytes += bytes.len() as u64;
        }
    }
    if delete {
        let names = plan.names();
        for folder in FOLDERS {
            let removed = writer.sweep(&to.join(folder), |path| names.contains(path))?;
            summary.removed += removed.files;
        }
    }
    Ok(summary)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{Bench, copy, files, now, request, seen};
    use crate::prune::prune;
    use crate::publish::publish;
    use crate::rotate::rotate;

    #[test]
    fn a_device_sees_the_former_publication_or_the_new_one_after_a_cut_at_any_write() {
        let bench = Bench::new();
        let www = bench.path("www");
        push(&Plan::of(&bench.fleet()).unwrap(), &www, false).unwrap();
        seen(&mut bench.device("held"), &www, now(9)).unwrap();
        publish(&bench.fleet(), &request("1.1.0"), now(2)).unwrap();
        let plan = Plan::of(&bench.fleet()).unwrap();
        for steps in 0.. {
            let to = bench.path(&format!("www-{steps}"));
            copy(&www, &to);
            let done = push_with(&plan, &to, false, &Writer::cut_after(&to, steps)).is_ok();
            copy(&bench.path("held"), &bench.path(&format!("held-{steps}")));
            let names = [format!("held-{steps}"), format!("fresh-{steps}")];
            let mut versions = names
                .each_ref()
                .map(|name| seen(&mut bench.device(name), &to, now(9)).unwrap());
            assert_eq!(versions[0], versions[1], "after {steps} steps");
            if !done {
                push(&plan, &to, false).unwrap();
            }
            versions = names.map(|name| seen(&mut bench.device(&name), &to, now(9)).unwrap());
            assert_eq!(versions, ["1.1.0", "1.1.0"]);
            assert_eq!(
                push(&plan, &to, false).unwrap(),
                Summary {
                    files: plan.count(),
                    ..Summary::default()
                }
            );
            if done {
                break;
            }
        }
    }

    #[test]
    fn what_is_other_is_sent_again_and_what_nothing_names_goes_when_it_is_asked() {
        let bench = Bench::new();
        let fleet = bench.fleet();
        publish(&fleet, &request("1.1.0"), now(2)).unwrap();
        rotate(&fleet, &crate::bench::replacing("timestamp", None), now(3)).unwrap();
        let www = bench.path("www");
        push(&Plan::of(&fleet).unwrap(), &www, false).unwrap();
        // One byte of one file, of a web server's own beside it.
        let object = files(&www.join("objects")).pop_last().unwrap();
        let mut bytes = fs::read(&object).unwrap();
        bytes[0] ^= 1;
        fs::write(&object, &bytes).unwrap();
        fs::write(www.join("index.html"), "own").unwrap();
        let summary = push(&Plan::of(&fleet).unwrap(), &www, false).unwrap();
        assert_eq!((summary.sent, summary.bytes), (1, bytes.len() as u64));

        prune(&fleet, 1, crate::prepared::Goal::Publish, now(4)).unwrap();
        let plan = Plan::of(&fleet).unwrap();
        let kept = push(&plan, &www, false).unwrap();
        assert!(kept.sent > 0 && kept.removed == 0);
        let swept = push(&plan, &www, true).unwrap();
        assert!(swept.sent == 0 && swept.removed > 0);
        let below = |base: &Path| -> Vec<_> {
            let all = files(base).into_iter();
            all.map(|path| path.strip_prefix(base).unwrap().to_owned())
                .filter(|path| path.as_os_str() != "index.html")
                .collect()
        };
        assert_eq!(below(&www), below(&fleet.public()));
        assert!(www.join("index.html").exists());
        assert_eq!(
            seen(&mut bench.device("new"), &www, now(5)).unwrap(),
            "1.1.0"
        );
    }

    #[test]
    fn what_is_damaged_is_not_spread() {
        let bench = Bench::new();
        let fleet = bench.fleet();
        let part = files(&fleet.public().join("deltas")).pop_first().unwrap();
        let bytes = fs::read(&part).unwrap();
        let mut other = bytes.clone();
        other[0] ^= 1;
        for bad in [&bytes[1..], &other] {
            fs::write(&part, bad).unwrap();
            let www = bench.path("www");
            let pushed = Plan::of(&fleet).and_then(|plan| push(&plan, &www, false));
            pushed.unwrap_err();
            assert!(!www.join(TIMESTAMP).exists());
        }
    }
}
