//! From a staged sysroot to the inodes of the device's file systems.
//!
//! | in the sysroot | owner, mode, extended attributes |
//! |---|---|
//! | an object of the repository, and the deployment's files, which are links to them | the commit's |
//! | a directory of the deployment | the commit's |
//! | `/etc` of the deployment | as of `/usr/etc`, with the label that the commit's SELinux policy has for it, if there is one |
//! | what this unit has in `/etc` besides | root's, with the mode it was given, and the policy's label |
//! | a kernel or initramfs in `/boot` | owner and mode of its object, and the policy's label |
//! | the rest | root's, with the mode that libostree gave it, and the policy's label |
//!
//! The deployment's top directory is immutable, as libostree makes it where it may.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, Metadata};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use ostree::SePolicy;
use ostree::gio::{self, Cancellable};

use super::commit::{Attributes, Directory, Entry, Tree};
use super::sysroot::Staged;

const NONE: Option<&Cancellable> = None;

const SELINUX: &[u8] = b"security.selinux";

/// libostree made it of this user's attributes; see [`super::sysroot`].
const COMPOSEFS: &str = ".ostree.cfs";

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Inode {
    pub kind: Kind,
    pub attributes: Attributes,
    /// Last changed at the beginning of 1970, as everything that comes from a commit.
    pub epoch: bool,
    pub immutable: bool,
    /// Relative to the file system's root; more than one for a file with hard links.
    pub paths: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Directory,
    File { source: PathBuf, length: u64 },
    Link(String),
}

/// The file systems that hold the sysroot. In each, a directory comes before what is in it, and names are in order.
pub(super) struct Inodes {
    pub root: Vec<Inode>,
    pub boot: Vec<Inode>,
}

impl Inodes {
    /// Makes every directory of the staged sysroot readable on the way.
    pub(super) fn of(staged: &Staged, tree: &Tree) -> Result<Self> {
        let policy = SePolicy::new(&gio::File::for_path(staged.deployment()), NONE)
            .context("reading the SELinux policy of the commit")?;
        let identities = identities(&staged.path.join("ostree/repo/objects"), tree)?;
        let objects = identities.iter();
        let rules = Rules {
            staged,
            tree,
            objects: objects
                .map(|(checksum, identity)| (*identity, checksum.clone()))
                .collect(),
            identities,
            policy: policy.name().map(|_| policy),
        };
        let mut root = Walk::new(&rules);
        root.directory("", "")?;
        let mut boot = Walk::new(&rules);
        boot.directory("boot", "")?;
        Ok(Self {
            root: root.inodes,
            boot: boot.inodes,
        })
    }
}

fn identities(objects: &Path, tree: &Tree) -> Result<HashMap<String, (u64, u64)>> {
    let mut found = HashMap::new();
    for checksum in tree.files.keys() {
        let (first, rest) = checksum.split_at(2);
        let path = objects.join(first).join(format!("{rest}.file"));
        let meta =
            fs::symlink_metadata(&path).with_context(|| format!("reading {}", path.display()))?;
        found.insert(checksum.clone(), (meta.dev(), meta.ino()));
    }
    Ok(found)
}

struct Rules<'a> {
    staged: &'a Staged,
    tree: &'a Tree,
    /// The device and inode of each object, and which object that is.
    identities: HashMap<String, (u64, u64)>,
    objects: HashMap<(u64, u64), String>,
    policy: Option<SePolicy>,
}

impl Rules<'_> {
    /// Of what is at `path` in the sysroot.
    fn attributes(&self, path: &str, meta: &Metadata) -> Result<Attributes> {
        let plain = Attributes {
            mode: meta.permissions().mode() & 0o1777,
            ..Attributes::default()
        };
        let object = self.objects.get(&(meta.dev(), meta.ino()));
        let object = object.and_then(|checksum| self.tree.files.get(checksum));
        if let Some(path) = path.strip_prefix("boot/") {
            let mut attributes = object.map_or(plain, |object| Attributes {
                xattrs: BTreeMap::new(),
                ..object.clone()
            });
            self.label(&mut attributes, &format!("/boot/{path}"), meta)?;
            return Ok(attributes);
        }
        if path.starts_with("ostree/repo/objects/")
            && let Some(object) = object
        {
            return Ok(object.clone());
        }
        let stateroot = format!("ostree/deploy/{}/", self.staged.stateroot);
        let inner = path.strip_prefix(&self.staged.deployment);
        if inner == Some("") {
            return Ok(self.tree.root.attributes.clone());
        }
        if let Some(inner) = inner.and_then(|inner| inner.strip_prefix('/')) {
            let is_etc = inner == "etc" || inner.starts_with("etc/");
            let origin = match is_etc {
                true => self.tree.find(&format!("usr/{inner}")),
                false => self.tree.find(inner),
            };
            let mut attributes = match origin {
                Some(Entry::Directory(Directory { attributes, .. })) if meta.is_dir() => {
                    attributes.clone()
                }
                Some(Entry::File(checksum)) if !meta.is_dir() => {
                    self.tree.files.get(checksum).cloned().unwrap_or(plain)
                }
                Some(_) | None => plain,
            };
            if is_etc || origin.is_none() {
                self.label(&mut attributes, &format!("/{inner}"), meta)?;
            }
            return Ok(attributes);
        }
        let mut attributes = plain;
        let path = match path.strip_prefix(&stateroot) {
            Some(inner) if inner == "var" || inner.starts_with("var/") => format!("/{inner}"),
            // As libostree has it.
            Some(inner) if inner.ends_with(".origin") => {
                "/etc/ostree/remotes.d/dummy.conf".to_owned()
            }
            Some(_) | None if path.is_empty() => "/sysroot".to_owned(),
            Some(_) | None => format!("/sysroot/{path}"),
        };
        self.label(&mut attributes, &path, meta)?;
        Ok(attributes)
    }

    /// What makes two paths one inode. libostree copies links out of a repository of this mode, and links them out of a device's.
    fn identity(&self, path: &str, meta: &Metadata) -> (u64, u64) {
        let inner = path.strip_prefix(&self.staged.deployment);
        let inner = inner.and_then(|inner| inner.strip_prefix('/'));
        let entry = inner
            .filter(|_| meta.is_symlink())
            .and_then(|inner| self.tree.find(inner));
        if let Some(Entry::File(checksum)) = entry
            && let Some(identity) = self.identities.get(checksum)
        {
            return *identity;
        }
        (meta.dev(), meta.ino())
    }

    fn label(&self, attributes: &mut Attributes, path: &str, meta: &Metadata) -> Result<()> {
        let Some(policy) = &self.policy else {
            return Ok(());
        };
        let mode = meta.mode() & 0o170_000 | attributes.mode;
        let label = policy
            .label(path, mode, NONE)
            .with_context(|| format!("asking the commit's SELinux policy about {path}"))?;
        if let Some(label) = label {
            let label = [label.as_bytes(), b"\0"].concat();
            attributes.xattrs.insert(SELINUX.to_vec(), label);
        }
        Ok(())
    }
}

struct Walk<'a> {
    rules: &'a Rules<'a>,
    inodes: Vec<Inode>,
    /// Where in `inodes` each file is.
    seen: HashMap<(u64, u64), usize>,
}

impl<'a> Walk<'a> {
    fn new(rules: &'a Rules<'a>) -> Self {
        Self {
            rules,
            inodes: Vec::new(),
            seen: HashMap::new(),
        }
    }

    /// The directory that is `staged` in the sysroot and `path` in the file system.
    fn directory(&mut self, staged: &str, path: &str) -> Result<()> {
        let real = self.rules.staged.path.join(staged);
        let reading = || format!("reading {}", real.display());
        let meta = fs::symlink_metadata(&real).with_context(reading)?;
        self.push(staged, path, &meta, Kind::Directory)?;
        // A boot file system is mounted on one; scratch files are libostree's.
        if path == "boot" || staged == "ostree/repo/tmp" {
            return Ok(());
        }
        fs::set_permissions(&real, fs::Permissions::from_mode(0o755)).with_context(reading)?;
        let mut names = Vec::new();
        for entry in fs::read_dir(&real).with_context(reading)? {
            let name = entry.with_context(reading)?.file_name();
            let name = name.into_string();
            names.push(name.map_err(|name| anyhow::anyhow!("{name:?} is not UTF-8"))?);
        }
        names.sort();
        for name in names {
            let inner = |directory: &str| match directory {
                "" => name.clone(),
                _ => format!("{directory}/{name}"),
            };
            let (staged, path) = (inner(staged), inner(path));
            let is_composefs = staged
                .strip_suffix(COMPOSEFS)
                .and_then(|above| above.strip_suffix('/'))
                == Some(self.rules.staged.deployment.as_str());
            if is_composefs || staged == "ostree/lock" {
                continue;
            }
            self.entry(&staged, &path)?;
        }
        Ok(())
    }

    fn entry(&mut self, staged: &str, path: &str) -> Result<()> {
        let real = self.rules.staged.path.join(staged);
        let reading = || format!("reading {}", real.display());
        let meta = fs::symlink_metadata(&real).with_context(reading)?;
        if meta.is_dir() {
            return self.directory(staged, path);
        }
        let identity = self.rules.identity(staged, &meta);
        if let Some(at) = self.seen.get(&identity) {
            self.inodes[*at].paths.push(path.to_owned());
            return Ok(());
        }
        let kind = if meta.is_symlink() {
            let target = fs::read_link(&real).with_context(reading)?;
            let target = target.to_str().with_context(reading)?;
            if target.contains(['\n', '\r']) {
                bail!(
                    "{path}: a link to {target:?} cannot be made, since it is more than one line"
                );
            }
            Kind::Link(target.to_owned())
        } else if meta.is_file() {
            Kind::File {
                source: real.clone(),
                length: meta.len(),
            }
        } else {
            bail!(
                "{} is neither a file, nor a directory, nor a link",
                real.display()
            );
        };
        self.seen.insert(identity, self.inodes.len());
        self.push(staged, path, &meta, kind)
    }

    fn push(&mut self, staged: &str, path: &str, meta: &Metadata, kind: Kind) -> Result<()> {
        self.inodes.push(Inode {
            kind,
            attributes: self.rules.attributes(staged, meta)?,
            epoch: meta.mtime() == 0,
            immutable: staged == self.rules.staged.deployment,
            paths: vec![path.to_owned()],
        });
        Ok(())
    }
}
