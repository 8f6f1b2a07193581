//! The operator's directory, from nothing to the first publication; and a channel more.
//!
//! **Across a power cut.** `fleet.toml` comes last, so a directory that has one is whole. What a cut leaves before it has never been
//! published: it is removed by hand, because it holds keys, and `init` starts over.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp as Time;
use offshoot::trust::schema::{
    Delegation, Delegations, HardwareId, RoleKeys, RoleName, Root, SPEC_VERSION, Targets, Version,
};
use ostree::gio::{self, Cancellable};
use ostree::{Repo, RepoMode};
use serde::Serialize;

use crate::directory::{Fleet, Lifetimes, SETTINGS, Settings, chain, deltas, objects};
use crate::keys::passphrase::Passphrases;
use crate::keys::{self, Kept, Signer};
use crate::prepared::Goal;
use crate::publication::{Draft, Publication};
use crate::writer::{Writer, make_directory};

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Summary {
    pub fleet: PathBuf,
    pub channels: Vec<RoleName>,
    pub hardware: Vec<HardwareId>,
    /// For images: /usr/lib/offshoot/root.json.
    pub root: PathBuf,
    pub root_threshold: u64,
}

/// How the keys are made.
#[derive(Clone, Debug)]
pub(crate) struct NewKeys {
    /// How many root keys, and how many of them sign a root.
    pub root: (u32, u32),
    /// Those of root, targets and channels are encrypted. Timestamp and snapshot are signed by a timer, which has no passphrase.
    pub encrypt: bool,
    pub passphrases: Passphrases,
}

pub(crate) fn init(
    directory: &Path,
    channels: &[RoleName],
    hardware: &[HardwareId],
    new_keys: NewKeys,
    now: Time,
) -> Result<Summary> {
    let NewKeys {
        root: (root_keys, root_threshold),
        encrypt,
        passphrases,
    } = new_keys;
    ensure!(
        (1..=root_keys).contains(&root_threshold),
        "--root-threshold {root_threshold} with --root-keys {root_keys}: the threshold is 1 to the number of keys"
    );
    make_directory(directory).with_context(|| format!("making {}", directory.display()))?;
    for name in [SETTINGS, "keys", "repo", "public", "root.json"] {
        let path = directory.join(name);
        ensure!(
            !path.exists(),
            "{} exists, and nothing is overwritten: choose another directory with --fleet{}",
            path.display(),
            if directory.join(SETTINGS).exists() {
                ""
            } else {
                ", or remove keys, repo, public and root.json if an init before this one was interrupted"
            }
        );
    }
    let mut once = BTreeSet::new();
    let mut channels = channels.to_vec();
    channels.retain(|channel| once.insert(channel.clone()));
    let fleet = Fleet {
        directory: directory.to_owned(),
        settings: Settings {
            hardware: hardware.to_vec(),
            deltas: deltas(),
            chain: chain(),
            full: false,
            objects: objects(),
            lifetimes: Lifetimes::default(),
        },
        passphrases,
    };
    let _lock = fleet.lock()?;
    let keys_directory = directory.join("keys");
    fs::create_dir(&keys_directory)
        .and_then(|()| fs::set_permissions(&keys_directory, Permissions::from_mode(0o700)))
        .with_context(|| format!("making {}", keys_directory.display()))?;
    let keys = fleet.keys();
    let kept = if encrypt { Kept::Encrypted } else { Kept::File };
    let mut root = Root {
        spec_version: SPEC_VERSION.to_owned(),
        version: Version::FIRST,
        expires: now,
        consistent_snapshot: true,
        keys: BTreeMap::new(),
        roles: BTreeMap::new(),
    };
    let signers = (1..=root_keys)
        .map(|number| keys.generate(&format!("root-{number}"), kept))
        .collect::<Result<Vec<_>>>()?;
    assign(&mut root, "root", &signers, root_threshold.into());
    for (role, kept) in [
        ("timestamp", Kept::File),
        ("snapshot", Kept::File),
        ("targets", kept),
    ] {
        assign(&mut root, role, &[keys.generate(role, kept)?], 1);
    }
    let mut targets = Targets {
        spec_version: SPEC_VERSION.to_owned(),
        version: Version::FIRST,
        expires: now,
        targets: BTreeMap::new(),
        delegations: None,
    };
    for channel in &channels {
        delegate(
            &mut targets,
            channel,
            &keys.generate(&keys::of_channel(channel), kept)?,
        );
    }
    let repo = Repo::new(&gio::File::for_path(fleet.repo()));
    repo.create(RepoMode::Archive, None::<&Cancellable>)
        .with_context(|| format!("making {}", fleet.repo().display()))?;
    let draft = Draft::first(root, targets, &channels);
    let signed = draft.sign(&keys, &fleet.settings.lifetimes, now, now)?;
    signed.write(&Writer::new(&fleet.public()), &fleet)?;
    // What makes all of it an operator's directory.
    Writer::new(directory).write(SETTINGS, Settings::to_toml(hardware).as_bytes())?;
    let absolute = |path: PathBuf| {
        fs::canonicalize(&path).with_context(|| format!("finding {}", path.display()))
    };
    Ok(Summary {
        fleet: absolute(directory.to_owned())?,
        channels,
        hardware: hardware.to_vec(),
        root: absolute(fleet.root())?,
        root_threshold: root_threshold.into(),
    })
}

/// A channel more, empty. The key is written before it is published: a cut leaves one that nothing names, and that the next try uses.
pub(crate) fn add_channel(
    fleet: &Fleet,
    name: &RoleName,
    goal: Goal,
    now: Time,
) -> Result<Vec<PathBuf>> {
    let _lock = fleet.lock()?;
    let former = Publication::read(fleet)?;
    ensure!(
        !former.channels.contains_key(name),
        "there is a channel {name} already"
    );
    let mut draft = former.draft();
    draft.change("targets");
    goal.check(fleet, &draft, None)?;
    let keys = fleet.keys();
    let stem = keys::of_channel(name);
    let signer = match keys.only(&stem)? {
        Some(signer) => signer,
        None => keys.generate(&stem, keys.kept_like("targets")?)?,
    };
    delegate(&mut draft.targets, name, &signer);
    draft.add_channel(name.clone());
    let done = goal.reach(fleet, draft, &Writer::new(&fleet.public()), now, now)?;
    Ok(done.into_files())
}

fn assign(root: &mut Root, role: &str, signers: &[Signer], threshold: u64) {
    for signer in signers {
        root.keys.insert(signer.keyid.clone(), signer.key.clone());
    }
    let keyids = signers.iter().map(|signer| signer.keyid.clone()).collect();
    root.roles
        .insert(role.to_owned(), RoleKeys { keyids, threshold });
}

fn delegate(targets: &mut Targets, channel: &RoleName, signer: &Signer) {
    let delegations = targets.delegations.get_or_insert_with(|| Delegations {
        keys: BTreeMap::new(),
        roles: Vec::new(),
    });
    delegations
        .keys
        .insert(signer.keyid.clone(), signer.key.clone());
    delegations.roles.push(Delegation {
        name: channel.to_string(),
        signers: RoleKeys {
            keyids: vec![signer.keyid.clone()],
            threshold: 1,
        },
        terminating: true,
        paths: vec![format!("{channel}/*/*")],
        path_hash_prefixes: Vec::new(),
    });
}
