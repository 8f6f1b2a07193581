//! Static deltas: made by libostree, and described for the release manifest.
//!
//! `deltas/<from>-<to>/superblock`, `0`, `1`, … as libostree writes them, without fallback objects: the offline apply refuses those.
//! libostree writes the time into the superblock, so a delta that was made twice is two deltas. One that is published is never
//! made again: a manifest may already name it by digest.
//!
//! A release's manifest also names deltas that led to former releases, as far as they are part of a way to this one, so that a device
//! that is far behind goes from delta to delta. They are published already: nothing is made for that.
//!
//! **Across a power cut.** The superblock comes last, so a directory that has one has every part. One that has none is not a delta yet,
//! nothing names it, and it is made again.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, IsTerminal as _, Write as _};
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use offshoot::commit::{Commit, Sha256};
use offshoot::route::goal;
use offshoot::trust::schema::{self, Manifest};
use ostree::gio::Cancellable;
use ostree::glib::prelude::*;
use ostree::glib::{Bytes, Variant, VariantDict, VariantTy};
use ostree::{Repo, StaticDeltaGenerateOpt};

use crate::writer::{Writer, digest_of};

/// Metadata, time, from, to, commit, dependencies, parts (version, checksum, size, unpacked size, objects), fallbacks.
const SUPERBLOCK: &str = "(a{sv}tayay(a{sv}aya(say)sstayay)aya(uayttay)a(yaytt))";

/// The directory of a delta, below `public/`.
pub(crate) fn directory(from: Option<Commit>, to: Commit) -> String {
    match from {
        Some(from) => format!("deltas/{from}-{to}"),
        None => format!("deltas/empty-{to}"),
    }
}

/// The delta as it is published; it is made first if it is not.
pub(crate) fn publish(
    repo: &Repo,
    public: &Path,
    writer: &Writer,
    scratch: &Path,
    (from, to): (Option<Commit>, Commit),
    label: &str,
) -> Result<schema::Delta> {
    let directory = directory(from, to);
    let published = public.join(&directory);
    if !published.join("superblock").exists() {
        let made = scratch.join("delta");
        fs::create_dir(&made).with_context(|| format!("making {}", made.display()))?;
        with_progress(label, || generate(repo, from, to, &made))?;
        // Before any of it is published: that it is what it should be.
        let parts = describe(&made, &directory, from, to)?.parts.len();
        for part in 0..parts {
            writer.copy(&made.join(part.to_string()), &format!("{directory}/{part}"))?;
        }
        writer.copy(&made.join("superblock"), &format!("{directory}/superblock"))?;
        fs::remove_dir_all(&made).with_context(|| format!("removing {}", made.display()))?;
    }
    describe(&published, &directory, from, to).with_context(|| {
        format!(
            "{} is damaged: put it back from a backup, or remove it if no manifest names it, and publish again",
            published.display()
        )
    })
}

/// The files of a delta, superblock last.
pub(crate) fn files(delta: &schema::Delta) -> impl Iterator<Item = &schema::File> {
    delta.parts.iter().chain([&delta.superblock])
}

/// The deltas beside `direct` that are on a way to `commit`, to `most` former releases, the newest first. `former` are the manifests of the
/// releases before, the newest first.
pub(crate) fn chain(
    public: &Path,
    commit: Commit,
    direct: &[schema::Delta],
    former: &[Manifest],
    most: usize,
    warnings: &mut Vec<String>,
) -> Vec<schema::Delta> {
    let mut known: BTreeSet<_> = direct.iter().map(|delta| (delta.from, commit)).collect();
    let mut candidates = Vec::new();
    for manifest in former {
        for delta in &manifest.deltas {
            let to = goal(manifest, delta);
            if delta.from != Some(commit) && known.insert((delta.from, to)) {
                let to = (to != commit).then_some(to);
                candidates.push(schema::Delta {
                    to,
                    ..delta.clone()
                });
            }
        }
    }
    candidates.retain(|delta| {
        let damaged = files(delta).find(|file| {
            let found = fs::metadata(public.join(file.path.as_str()));
            !found.is_ok_and(|found| found.len() == file.length)
        });
        if let Some(schema::File { path, length, .. }) = damaged {
            warnings.push(format!(
                "the release names no delta whose {} is not there with its {length} bytes: put it back from a backup, then publish",
                public.join(path.as_str()).display()
            ));
        }
        damaged.is_none()
    });
    // From where the release can be reached, until nothing is added.
    let mut leads: BTreeSet<Commit> = direct.iter().filter_map(|delta| delta.from).collect();
    let is_way = |leads: &BTreeSet<Commit>, delta: &schema::Delta| {
        delta.to.is_none_or(|to| leads.contains(&to))
    };
    let mut size = None;
    while size != Some(leads.len()) {
        size = Some(leads.len());
        let ways = candidates.iter().filter(|delta| is_way(&leads, delta));
        let from: Vec<_> = ways.filter_map(|delta| delta.from).collect();
        leads.extend(from);
    }
    let mut goals = Vec::new();
    candidates.retain(|delta| {
        let Some(to) = delta.to else { return true };
        if is_way(&leads, delta) && goals.len() < most && !goals.contains(&to) {
            goals.push(to);
        }
        goals.contains(&to)
    });
    candidates
}

fn generate(repo: &Repo, from: Option<Commit>, to: Commit, into: &Path) -> Result<()> {
    let filename = into.join("superblock");
    let filename = filename
        .to_str()
        .context("the directory's path is not UTF-8")?;
    let parameters = VariantDict::new(None);
    // No object is fetched beside the delta, however large.
    parameters.insert("min-fallback-size", 0u32);
    parameters.insert_value("filename", &bytestring(filename));
    repo.static_delta_generate(
        StaticDeltaGenerateOpt::Major,
        from.map(|from| from.to_string()).as_deref(),
        &to.to_string(),
        None,
        Some(&parameters.end()),
        None::<&Cancellable>,
    )
    .context("generating a delta")
}

/// A C string as libostree wants one: bytes and a NUL.
fn bytestring(text: &str) -> Variant {
    [text.as_bytes(), b"\0"].concat().to_variant()
}

/// Reads a delta, and checks its parts against its superblock.
fn describe(
    files: &Path,
    published: &str,
    from: Option<Commit>,
    to: Commit,
) -> Result<schema::Delta> {
    let path = files.join("superblock");
    let bytes = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    let file = |name: &str, length, sha256| -> Result<schema::File> {
        Ok(schema::File {
            path: format!("{published}/{name}").parse()?,
            length,
            sha256,
        })
    };
    let superblock = file("superblock", bytes.len() as u64, Sha256::of(&bytes))?;
    let kind = VariantTy::new(SUPERBLOCK).context("the type of a superblock")?;
    let delta = Variant::from_bytes_with_type(&Bytes::from_owned(bytes), kind);
    let digest = |index| delta.child_value(index).data().to_vec();
    let want: &[u8] = match &from {
        Some(from) => from.0.as_bytes(),
        None => &[],
    };
    ensure!(
        digest(2) == want && digest(3) == to.0.as_bytes(),
        "{} is of other commits",
        path.display()
    );
    let fallbacks = delta.child_value(7).n_children();
    ensure!(
        fallbacks == 0,
        "{} has {fallbacks} fallback objects",
        path.display()
    );
    let (mut parts, mut usize) = (Vec::new(), 0u64);
    for (index, part) in delta.child_value(6).iter().enumerate() {
        let path = files.join(index.to_string());
        let (length, sha256) = digest_of(&path)?;
        let number = |child| {
            let number = part.child_value(child).get::<u64>();
            number.with_context(|| format!("part {index} has no size"))
        };
        ensure!(
            part.child_value(1).data() == sha256.as_bytes() && number(2)? == length,
            "{} is not the part that its superblock names",
            path.display()
        );
        usize = usize
            .checked_add(number(3)?)
            .context("the parts' sizes do not fit 64 bits")?;
        parts.push(file(&index.to_string(), length, sha256)?);
    }
    if parts.is_empty() {
        bail!("{} has no parts", path.display());
    }
    Ok(schema::Delta {
        from,
        to: None,
        usize,
        superblock,
        parts,
    })
}

/// Says what takes long, and that it goes on: on a terminal every second, else every half minute.
pub(crate) fn with_progress<T>(label: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let (done, wait) = mpsc::channel::<()>();
    let terminal = io::stderr().is_terminal();
    let every = Duration::from_secs(if terminal { 1 } else { 30 });
    let start = Instant::now();
    eprintln!("{label} …");
    std::thread::scope(move |scope| {
        scope.spawn(move || {
            while wait.recv_timeout(every) == Err(mpsc::RecvTimeoutError::Timeout) {
                let seconds = start.elapsed().as_secs();
                let end = if terminal { '\r' } else { '\n' };
                eprint!("{label}: {seconds} s{end}");
                // Nobody to tell is no reason to stop.
                drop(io::stderr().flush());
            }
        });
        let result = work();
        drop(done);
        result
    })
}

#[cfg(test)]
mod tests {
    use offshoot::trust::schema::FORMAT;

    use super::*;

    fn commit(n: u8) -> Commit {
        Commit(Sha256::of(&[n]))
    }

    fn delta(from: Option<u8>, to: u8) -> schema::Delta {
        let from = from.map(commit);
        schema::Delta {
            from,
            to: (to != 9).then(|| commit(to)),
            usize: 0,
            superblock: schema::File {
                path: directory(from, commit(to)).parse().unwrap(),
                length: 3,
                sha256: Sha256::of(b""),
            },
            parts: Vec::new(),
        }
    }

    fn manifest(of: u8, deltas: &[(Option<u8>, u8)]) -> Manifest {
        let deltas = deltas.iter().map(|(from, to)| {
            let mut delta = delta(*from, *to);
            delta.to = delta.to.filter(|to| *to != commit(of));
            delta
        });
        Manifest {
            format: FORMAT,
            commit: commit(of),
            version: "1".parse().unwrap(),
            hardware: "x".parse().unwrap(),
            deltas: deltas.collect(),
            objects: None,
        }
    }

    #[test]
    fn a_chain_is_what_leads_to_the_release_newest_first() {
        let public = tempfile::tempdir().unwrap();
        fs::create_dir(public.path().join("deltas")).unwrap();
        let former = [
            manifest(8, &[(Some(7), 8), (None, 7), (Some(6), 7)]),
            // Named twice; and a release that was taken back, from which nothing leads on.
            manifest(7, &[(Some(6), 7), (None, 7), (Some(9), 7)]),
            manifest(3, &[(Some(7), 3)]),
            // The release itself, which is published again.
            manifest(9, &[(Some(8), 9), (Some(4), 9)]),
            manifest(6, &[(Some(5), 6)]),
        ];
        for delta in former.iter().flat_map(|manifest| &manifest.deltas) {
            fs::write(public.path().join(delta.superblock.path.as_str()), "abc").unwrap();
        }
        let direct = [delta(Some(8), 9)];
        let run = |most| {
            let mut warnings = Vec::new();
            let chain = chain(
                public.path(),
                commit(9),
                &direct,
                &former,
                most,
                &mut warnings,
            );
            (chain, warnings.len())
        };
        let all = [
            delta(Some(7), 8),
            delta(None, 7),
            delta(Some(6), 7),
            delta(Some(4), 9),
            delta(Some(5), 6),
        ];
        assert_eq!(run(10), (all.to_vec(), 0));
        assert_eq!(run(2), (all[..4].to_vec(), 0));
        assert_eq!(run(0), (vec![all[3].clone()], 0));
        // A file that is not what it was: neither it nor what only it leads on from.
        let path = public.path().join(all[2].superblock.path.as_str());
        fs::write(path, "ab").unwrap();
        assert_eq!(run(10), ([&all[..2], &all[3..4]].concat(), 1));
    }
}
