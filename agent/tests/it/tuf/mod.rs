//! The device's TUF client against python-tuf, the specification's reference implementation: repositories that python-tuf made and
//! serves, read by the same program that the official conformance suite drives (`examples/tuf-conformance.rs`).
//!
//! Tests are named after the clause of the specification's client workflow that they are of; docs/tuf.md lists them.

// Its `main` is for the command line.
#[allow(dead_code)]
#[path = "../../../examples/tuf-conformance.rs"]
mod client;
mod documents;
mod peer;
mod process;
mod search;
mod signatures;

use std::collections::BTreeSet;

/// The tables of docs/tuf.md name functions and tests that are there, and every test that is named after a clause.
#[test]
fn docs_tuf_is_true() {
    let base = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut functions, mut tests) = (BTreeSet::new(), BTreeSet::new());
    for folder in ["src/trust", "tests/it/tuf"] {
        sources(&base.join(folder), &mut |text| {
            for (_, rest) in text
                .match_indices("fn ")
                .map(|(at, fn_)| (at, &text[at + fn_.len()..]))
            {
                let name: String = rest
                    .chars()
                    .take_while(|c| c.is_alphanumeric() || *c == '_')
                    .collect();
                if name.starts_with("clause_") {
                    &mut tests
                } else {
                    &mut functions
                }
                .insert(name);
            }
        });
    }
    let page = std::fs::read_to_string(base.join("../docs/tuf.md")).unwrap();
    let mut named = BTreeSet::new();
    for row in page.lines().filter(|line| line.starts_with("| ")) {
        let cells: Vec<_> = row.split('|').collect();
        assert_eq!(cells.len(), 6, "{row}");
        for (cell, known) in [(cells[3], &functions), (cells[4], &tests)] {
            for name in cell.split('`').skip(1).step_by(2) {
                assert!(known.contains(name), "docs/tuf.md names {name}");
                named.insert(name.to_owned());
            }
        }
    }
    let unnamed: Vec<_> = tests.difference(&named).collect();
    assert_eq!(unnamed, [] as [&String; 0], "in no table of docs/tuf.md");
}

fn sources(folder: &std::path::Path, found: &mut dyn FnMut(&str)) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found(&std::fs::read_to_string(&path).unwrap());
        }
    }
}
