//! The corpus of the fuzz targets, replayed: what a fuzzer once found, or begins from, is judged without one.

use std::fs;
use std::path::Path;

#[allow(dead_code)]
#[path = "../../../fuzz/lib.rs"]
mod targets;

type Target = fn(&[u8]);

#[test]
fn no_input_of_the_corpus_breaks_its_parser() {
    let targets: [(&str, Target); 6] = [
        ("metadata", targets::metadata),
        ("grub_env", targets::grub_env),
        ("uboot_env", targets::uboot_env),
        ("record", targets::record),
        ("config", targets::config),
        ("delta_superblock", targets::delta_superblock),
    ];
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    for (name, target) in targets {
        let inputs = fs::read_dir(corpus.join(name)).unwrap();
        let mut replayed = 0;
        for input in inputs {
            let bytes = fs::read(input.unwrap().path()).unwrap();
            // As it is, and cut off and spoiled at each place where that is cheap.
            target(&bytes);
            for at in (0..bytes.len()).step_by(1 + bytes.len() / 64) {
                target(&bytes[..at]);
                let mut spoiled = bytes.clone();
                spoiled[at] ^= 0x11;
                target(&spoiled);
            }
            replayed += 1;
        }
        assert!(replayed > 2, "{name}");
    }
    assert_eq!(fs::read_dir(corpus).unwrap().count(), targets.len());
}
