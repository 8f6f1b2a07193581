//! Which way leads to a release, by the sizes that were signed.
//!
//! | way | what |
//! |---|---|
//! | from here | a delta, or a chain of deltas, from something that is here |
//! | objects | those that are missing; the index of all must be here to know which |
//! | from nothing | a delta, or a chain, from nothing |
//!
//! The fewest bytes that are not here yet; of the ways that have failed none, which is remembered in the record. An index costs bytes itself: it
//! is fetched when nothing leads from here, or only a chain that is much larger ([`asks_for_index`]). Pure: what is here is asked of the caller.

use std::collections::BTreeMap;

use crate::commit::Commit;
use crate::trust::schema::{Delta, Manifest};

/// Deltas to apply one after the other; at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain<'a> {
    pub hops: Vec<&'a Delta>,
    /// Bytes of all of them, and those that are not here.
    pub total: u64,
    pub missing: u64,
}

/// A chain is compared with the objects where their index is at most this part of it.
const INDEX_SHARE: u64 = 8;

/// Whether an index of `length` bytes is worth fetching beside the best chain from here. A single delta holds what its objects would be, or less.
pub fn asks_for_index(length: u64, from_here: Option<&Chain<'_>>) -> bool {
    from_here.is_none_or(|chain| chain.hops.len() > 1 && chain.missing / INDEX_SHARE >= length)
}

/// What a delta leads to.
pub fn goal(manifest: &Manifest, delta: &Delta) -> Commit {
    delta.to.unwrap_or(manifest.commit)
}

/// The cheapest chain from a commit that is here, and the cheapest from nothing. `missing` says how much of each delta is not here.
pub fn chains<'a>(
    manifest: &'a Manifest,
    has: impl Fn(Commit) -> bool,
    missing: &[u64],
) -> [Option<Chain<'a>>; 2] {
    let from_here = |delta: &Delta| delta.from.is_some_and(&has);
    let from_nothing = |delta: &Delta| delta.from.is_none();
    [
        cheapest(manifest, from_here, missing),
        cheapest(manifest, from_nothing, missing),
    ]
}

/// By relaxing every delta as often as there are deltas: a manifest has few. Sizes that do not fit 64 bits are no way.
fn cheapest<'a>(
    manifest: &'a Manifest,
    starts: impl Fn(&Delta) -> bool,
    missing: &[u64],
) -> Option<Chain<'a>> {
    let mut best: BTreeMap<Commit, Chain<'a>> = BTreeMap::new();
    for _ in &manifest.deltas {
        for (delta, missing) in manifest.deltas.iter().zip(missing) {
            let before = match delta.from {
                _ if starts(delta) => Chain {
                    hops: Vec::new(),
                    total: 0,
                    missing: 0,
                },
                Some(from) => match best.get(&from) {
                    Some(chain) => chain.clone(),
                    None => continue,
                },
                None => continue,
            };
            let (Some(download), true) =
                (delta.download(), before.hops.len() < manifest.deltas.len())
            else {
                continue;
            };
            let (Some(total), Some(missing)) = (
                before.total.checked_add(download),
                before.missing.checked_add(*missing),
            ) else {
                continue;
            };
            let to = goal(manifest, delta);
            // Of two that cost the same the shorter one; a loop never costs less.
            let cost = (missing, before.hops.len() + 1);
            let is_better = best
                .get(&to)
                .is_none_or(|held| cost < (held.missing, held.hops.len()));
            if is_better {
                let mut hops = before.hops;
                hops.push(delta);
                best.insert(
                    to,
                    Chain {
                        hops,
                        total,
                        missing,
                    },
                );
            }
        }
    }
    best.remove(&manifest.commit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commit::Sha256;
    use crate::trust::schema::{FORMAT, File};

    fn commit(n: u8) -> Commit {
        Commit(Sha256::of(&[n]))
    }

    fn delta(from: Option<u8>, to: u8, size: u64) -> Delta {
        Delta {
            from: from.map(commit),
            to: (to != 9).then(|| commit(to)),
            usize: 0,
            superblock: File {
                path: "a".parse().unwrap(),
                length: size,
                sha256: Sha256::of(b""),
            },
            parts: vec![],
        }
    }

    fn manifest(deltas: Vec<Delta>) -> Manifest {
        Manifest {
            format: FORMAT,
            commit: commit(9),
            version: "9".parse().unwrap(),
            hardware: "x".parse().unwrap(),
            deltas,
            objects: None,
        }
    }

    /// The sizes of the hops from what is here, and of those from nothing.
    fn ways(manifest: &Manifest, here: &[u8]) -> [Vec<u64>; 2] {
        let has = |commit| here.iter().any(|n| self::commit(*n) == commit);
        let missing = manifest.deltas.iter();
        let missing: Vec<_> = missing.map(|delta| delta.superblock.length).collect();
        chains(manifest, has, &missing).map(|chain| {
            let hops = chain.map(|chain| chain.hops).unwrap_or_default();
            hops.iter().map(|hop| hop.superblock.length).collect()
        })
    }

    #[test]
    fn the_cheapest_chain_is_found_and_one_delta_is_a_chain() {
        let manifest = manifest(vec![
            delta(Some(8), 9, 10),
            delta(Some(7), 8, 20),
            delta(Some(7), 9, 35),
            delta(Some(6), 7, 5),
            delta(Some(6), 9, 30),
            delta(None, 9, 500),
        ]);
        for (here, from_here) in [
            (&[8][..], vec![10]),
            (&[7], vec![20, 10]),
            // One delta for 30 is less than three for 35.
            (&[6], vec![30]),
            (&[6, 8], vec![10]),
            (&[5], vec![]),
            (&[], vec![]),
        ] {
            assert_eq!(ways(&manifest, here), [from_here, vec![500]]);
        }
    }

    #[test]
    fn an_index_is_asked_for_without_a_way_from_here_or_beside_a_chain_of_eight_times_its_size() {
        let manifest = manifest(vec![delta(Some(7), 8, 400), delta(Some(8), 9, 400)]);
        let has = |n| move |commit| commit == self::commit(n);
        let [chain, _] = chains(&manifest, has(7), &[400, 400]);
        let [single, _] = chains(&manifest, has(8), &[400, 400]);
        for (length, from_here, asks) in [
            (1 << 40, &None, true),
            (100, &chain, true),
            (101, &chain, false),
            (1, &single, false),
        ] {
            assert_eq!(asks_for_index(length, from_here.as_ref()), asks, "{length}");
        }
    }

    #[test]
    fn what_is_here_already_costs_nothing_and_loops_lead_nowhere() {
        let manifest = manifest(vec![
            delta(Some(7), 9, 50),
            delta(Some(7), 8, 40),
            delta(Some(8), 9, 40),
            delta(Some(8), 7, 1),
        ]);
        assert_eq!(ways(&manifest, &[7]), [vec![50], vec![]]);
        // Most of the longer way was fetched before.
        let has = |commit| commit == self::commit(7);
        let [Some(chain), None] = chains(&manifest, has, &[50, 3, 3, 1]) else {
            panic!("one way")
        };
        assert_eq!((chain.hops.len(), chain.total, chain.missing), (2, 80, 6));
        assert_eq!(goal(&manifest, chain.hops[0]), commit(8));
        let huge = self::manifest(vec![delta(Some(7), 8, u64::MAX), delta(Some(8), 9, 1)]);
        assert_eq!(ways(&huge, &[7]), [Vec::<u64>::new(), vec![]]);
    }
}
