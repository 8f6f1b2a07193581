//! Targets roles: who may sign for what, and the search for the role that signs for one target (5.6.7).
//!
//! Does no I/O: it says which role is next, and is told what that role says.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;

use super::{CurrentRoot, Verified, role};
use crate::commit::Sha256;
use crate::trust::Refusal;
use crate::trust::schema::{Delegations, Key, RoleKeys, TargetFile, Targets};

/// Roles that one search visits at most (5.6.7.1), the top-level targets among them.
pub const MAX_ROLES: usize = 32;
/// A role's name is part of a file's name.
const MAX_NAME: usize = 64;

/// What a role above says of a targets role, before anybody has seen its metadata. Of the top-level role it is the root that says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delegated {
    pub(super) name: String,
    pub(super) signers: RoleKeys,
    pub(super) keys: BTreeMap<String, Key>,
    scope: Scope,
    terminating: bool,
}

/// A targets role whose metadata was accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Role {
    pub(super) name: String,
    pub(super) scope: Scope,
    pub(super) targets: Verified<Targets>,
}

/// What a role may sign for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    All,
    Paths(Vec<String>),
    /// Of the hexadecimal sha256 of the path.
    HashPrefixes(Vec<String>),
}

/// A file that a role signs for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    pub path: String,
    pub file: TargetFile,
}

/// Pre-order and depth-first, each role once.
#[derive(Debug)]
pub struct Search {
    wanted: String,
    /// The next one is the last.
    ahead: Vec<Delegated>,
    visited: BTreeSet<String>,
}

impl Delegated {
    pub(in crate::trust) fn top(root: &CurrentRoot) -> Result<Self, Refusal> {
        let name = "targets";
        Ok(Self {
            name: name.to_owned(),
            signers: role(root, name)?.clone(),
            keys: root.keys.clone(),
            scope: Scope::All,
            terminating: false,
        })
    }

    /// In the order in which they are trusted.
    pub(in crate::trust) fn by(targets: &Verified<Targets>) -> impl Iterator<Item = Self> + '_ {
        let delegations = targets.delegations.iter();
        delegations.flat_map(|Delegations { keys, roles }| {
            roles.iter().map(move |delegation| Self {
                name: delegation.name.clone(),
                signers: delegation.signers.clone(),
                keys: delegation
                    .signers
                    .keyids
                    .iter()
                    .filter_map(|keyid| Some((keyid.clone(), keys.get(keyid)?.clone())))
                    .collect(),
                scope: if delegation.path_hash_prefixes.is_empty() {
                    Scope::Paths(delegation.paths.clone())
                } else {
                    Scope::HashPrefixes(delegation.path_hash_prefixes.clone())
                },
                terminating: delegation.terminating,
            })
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn role(&self, targets: Verified<Targets>) -> Role {
        Role {
            name: self.name.clone(),
            scope: self.scope.clone(),
            targets,
        }
    }

    /// Whether the role above trusts it with this path.
    pub fn may_sign(&self, path: &str) -> bool {
        self.scope.contains(path)
    }
}

impl Role {
    pub fn name(&self) -> &str {
        &self.name
    }

    /// 5.6.7.1: what this role says of the file, if it may.
    pub fn target(&self, path: &str) -> Option<Verified<Target>> {
        let file = self.targets.targets.get(path)?;
        self.scope.contains(path).then(|| {
            Verified(Target {
                path: path.to_owned(),
                file: file.clone(),
            })
        })
    }
}

impl Deref for Role {
    type Target = Verified<Targets>;

    fn deref(&self) -> &Verified<Targets> {
        &self.targets
    }
}

impl Search {
    /// Begins at the top-level targets; `wanted` is what a refusal calls it.
    pub fn new(root: &CurrentRoot, wanted: impl Into<String>) -> Result<Self, Refusal> {
        Ok(Self {
            wanted: wanted.into(),
            ahead: vec![Delegated::top(root)?],
            visited: BTreeSet::new(),
        })
    }

    /// The role to visit next; none that was visited before (5.6.7.1).
    pub fn next_role(&mut self) -> Result<Option<Delegated>, Refusal> {
        while let Some(next) = self.ahead.pop() {
            if !self.visited.insert(next.name.clone()) {
                continue;
            }
            if self.visited.len() > MAX_ROLES {
                return Err(Refusal::TooManyRoles {
                    wanted: self.wanted.clone(),
                    limit: MAX_ROLES,
                });
            }
            return Ok(Some(next));
        }
        Ok(None)
    }

    /// 5.6.7.2: the delegations of this role that lead on are next, in their order; after a terminating one there is nothing else.
    pub fn descend(&mut self, role: &Role, leads: impl Fn(&Delegated) -> bool) {
        let mut below = Vec::new();
        for delegated in Delegated::by(role).filter(leads) {
            let terminating = delegated.terminating;
            below.push(delegated);
            if terminating {
                self.ahead.clear();
                break;
            }
        }
        self.ahead.extend(below.into_iter().rev());
    }

    pub fn visited(&self) -> &BTreeSet<String> {
        &self.visited
    }
}

impl Scope {
    pub(super) fn contains(&self, path: &str) -> bool {
        match self {
            Self::All => true,
            Self::Paths(patterns) => patterns.iter().any(|pattern| matches(pattern, path)),
            Self::HashPrefixes(prefixes) => {
                let digest = Sha256::of(path.as_bytes()).to_string();
                prefixes.iter().any(|prefix| digest.starts_with(prefix))
            }
        }
    }
}

/// 4.5: each role is delegated to once, by one kind of scope, and by a name that is not taken.
pub(super) fn check_delegations(role: &str, targets: &Targets) -> Result<(), Refusal> {
    let mut names = BTreeSet::new();
    for delegation in targets
        .delegations
        .iter()
        .flat_map(|delegations| &delegations.roles)
    {
        let (role, name) = (role.to_owned(), delegation.name.clone());
        // One that was named as a top-level role would share its file.
        if matches!(
            name.as_str(),
            "" | "root" | "timestamp" | "snapshot" | "targets" | "mirrors"
        ) || name.len() > MAX_NAME
        {
            return Err(Refusal::BadRoleName { role, name });
        }
        if !delegation.paths.is_empty() && !delegation.path_hash_prefixes.is_empty() {
            return Err(Refusal::TwoScopes { role, name });
        }
        if !names.insert(&delegation.name) {
            return Err(Refusal::DuplicateDelegation { role, name });
        }
    }
    Ok(())
}

/// A path pattern of TUF: `*` is any run of characters but `/`, `?` is one of them.
pub(super) fn matches(pattern: &str, path: &str) -> bool {
    let (patterns, segments) = (pattern.split('/'), path.split('/'));
    patterns.clone().count() == segments.clone().count()
        && patterns
            .zip(segments)
            .all(|(pattern, segment)| matches_segment(pattern.as_bytes(), segment.as_bytes()))
}

/// Linear in memory and quadratic in time: on a mismatch only the last `*` is tried again.
fn matches_segment(pattern: &[u8], segment: &[u8]) -> bool {
    let (mut at, mut from, mut star) = (0, 0, None);
    while from < segment.len() {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at, from));
                at += 1;
            }
            Some(&byte) if byte == b'?' || byte == segment[from] => {
                at += 1;
                from += 1;
            }
            _ => {
                let Some((star_at, star_from)) = star else {
                    return false;
                };
                star = Some((star_at, star_from + 1));
                at = star_at + 1;
                from = star_from + 1;
            }
        }
    }
    pattern[at..].iter().all(|&byte| byte == b'*')
}
