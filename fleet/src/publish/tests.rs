//! What a device sees of a publication that is cut off after any write.

use std::fs;
use std::process::Command;

use super::*;
use crate::bench::{Bench, copy, files, now, request, seen};
use crate::device::checked;

#[test]
fn a_device_sees_the_former_release_or_the_new_one_after_a_cut_at_any_write() {
    let bench = Bench::new();
    seen(
        &mut bench.device("held"),
        &bench.path("fleet/public"),
        now(9),
    )
    .unwrap();
    let mut history = Vec::new();
    loop {
        let steps = history.len();
        let fleet = bench.copy("fleet", &format!("cut-{steps}"));
        let public = fleet.public();
        let writer = Writer::cut_after(&public, steps);
        let published = publish_with(&fleet, &request("1.1.0"), now(2), &writer).is_ok();
        copy(&bench.path("held"), &bench.path(&format!("held-{steps}")));
        let mut devices = [
            bench.device(&format!("held-{steps}")),
            bench.device(&format!("fresh-{steps}")),
        ];
        let [held, fresh] = devices
            .each_mut()
            .map(|device| seen(device, &public, now(9)).unwrap());
        assert_eq!(held, fresh, "after {steps} steps");
        history.push(held);

        // What an interrupted publication of something else has left.
        fs::write(public.join("metadata/.9.stable.json.part"), "half").unwrap();
        if published {
            break;
        }
        let again = publish(&fleet, &request("1.1.0"), now(3)).unwrap();
        assert_eq!(
            (again.serial, again.deltas.len()),
            (2, 3),
            "after {steps} steps"
        );
        assert_eq!(
            devices
                .each_mut()
                .map(|device| seen(device, &public, now(9)).unwrap()),
            ["1.1.0", "1.1.0"]
        );
        let parts = Command::new("find")
            .arg(&public)
            .args(["-name", "*.part"])
            .output()
            .unwrap();
        assert_eq!(parts.stdout, b"");
    }
    // Two deltas of two files, the index of objects, commit object, manifest, channel, snapshot, timestamp: four steps each; each new
    // object and the sync after them. The last rename publishes.
    let objects = |name: &str| files(&bench.path(name).join("public/objects")).len();
    let new = objects(&format!("cut-{}", history.len() - 1)) - objects("fleet") - 1;
    let steps = 10 * 4 + new + 1;
    assert_eq!(history.len(), steps + 1);
    let former = history
        .iter()
        .take_while(|version| *version == "1.0.0")
        .count();
    assert_eq!(former, steps - 1);
    assert!(history[former..].iter().all(|version| version == "1.1.0"));
}

#[test]
fn a_device_that_polls_while_it_is_published_sees_one_release_or_the_other() {
    let bench = Bench::new();
    seen(
        &mut bench.device("held"),
        &bench.path("fleet/public"),
        now(9),
    )
    .unwrap();
    let fleet = bench.copy("fleet", "after");
    publish(&fleet, &request("1.1.0"), now(2)).unwrap();
    for start in ["held", "none"] {
        for switch in 0..8 {
            let name = format!("{start}-{switch}");
            if start == "held" {
                copy(&bench.path("held"), &bench.path(&name));
            }
            let public = |request| {
                let side = if request < switch { "fleet" } else { "after" };
                bench.path(side).join("public")
            };
            let outcome = bench.device(&name).poll_moving(public, now(9)).unwrap();
            let want = if switch == 0 { "1.1.0" } else { "1.0.0" };
            assert_eq!(
                checked(&fleet.public(), &outcome.found.unwrap()),
                want,
                "{name}"
            );
        }
    }
}

#[test]
fn two_publishers_do_not_meet() {
    let bench = Bench::new();
    let fleet = bench.copy("fleet", "copy");
    let lock = fleet.lock().unwrap();
    let error = publish(&fleet, &request("1.1.0"), now(2)).unwrap_err();
    assert!(error.is::<crate::directory::Busy>(), "{error:#}");
    drop(lock);
    publish(&fleet, &request("1.1.0"), now(2)).unwrap();
}

#[test]
fn a_clock_behind_the_last_publication_signs_nothing() {
    let bench = Bench::new();
    let fleet = bench.copy("fleet", "copy");
    let before = fs::read(fleet.metadata("timestamp.json")).unwrap();
    publish(&fleet, &request("1.1.0"), now(0)).unwrap_err();
    assert_eq!(fs::read(fleet.metadata("timestamp.json")).unwrap(), before);
}

#[test]
fn a_manifest_has_as_much_of_the_chain_as_devices_read() {
    let bench = Bench::new();
    let fleet = bench.fleet();
    let published = publish(&fleet, &request("1.1.0"), now(2)).unwrap();
    let release = releases(
        &"stable".parse().unwrap(),
        Publication::read(&fleet)
            .unwrap()
            .channel(&"stable".parse().unwrap())
            .unwrap(),
    )
    .unwrap()
    .pop()
    .unwrap();
    let channel = "stable".parse().unwrap();
    let mut manifest = content::manifest(&fleet.public(), &channel, &release).unwrap();
    assert_eq!(manifest.deltas.len(), published.deltas.len());
    let one = Delta {
        to: Some(release.commit),
        ..manifest.deltas[0].clone()
    };
    let least = manifest.deltas.len();
    let mut warnings = Vec::new();
    let bytes = fill(&mut manifest, vec![one.clone(); 5000], &mut warnings).unwrap();
    let room = MANIFEST_LIMIT - bytes.len() as u64;
    let size = serde_json::to_vec(&one).unwrap().len() as u64;
    assert!(room < size + 1, "{room}");
    assert_eq!(warnings.len(), 1);
    assert!(manifest.deltas.len() > least);
    // What has no room even so is not published.
    let mut manifest = Manifest {
        deltas: vec![one; 5000],
        ..manifest
    };
    fill(&mut manifest, Vec::new(), &mut Vec::new()).unwrap_err();
}
