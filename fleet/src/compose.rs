//! From a root file system to an OSTree commit in an archive repository.
//!
//! | in the tree | in the commit |
//! |---|---|
//! | `/etc` | `/usr/etc` |
//! | `/boot/vmlinuz-V`, `/boot/initrd.img-V` or `/boot/initramfs-V.img` | `/usr/lib/modules/V/vmlinuz`, `initramfs.img`, unless they are there |
//! | `/boot`, `/var`, `/proc`, `/sys`, `/dev`, `/run`, `/tmp` | empty directories |
//! | `/home`, `/root`, `/srv`, `/opt`, `/mnt`, `/media`, `/usr/local` | links, with a tmpfiles.d file that makes what they name; what is a link already stays |
//! | the rest | itself: owner, mode, extended attributes, content |
//!
//! A tree that has `/usr/etc` and no `/etc` is laid out already: of the links above only `/ostree` is made, and directories in their place stay.
//!
//! The repository's transaction makes it all or nothing: a cut before its end leaves the branch where it was.

mod source;
mod tar;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use offshoot::commit::Commit;
use ostree::gio::{self, Cancellable};
use ostree::glib::{self, prelude::*};
use ostree::{MutableTree, Repo, RepoFile, RepoMode};
use serde::Serialize;

use source::{Directory, Node, Storage};

const NONE: Option<&Cancellable> = None;

/// Made empty, whatever they hold.
const EMPTY: [&str; 8] = ["boot", "dev", "proc", "run", "sys", "sysroot", "tmp", "var"];

/// Links into what a device keeps, and what makes their targets.
const LINKS: [(&str, &str, &str); 7] = [
    ("home", "var/home", "d /var/home 0755 root root -\n"),
    ("media", "run/media", "d /run/media 0755 root root -\n"),
    ("mnt", "var/mnt", "d /var/mnt 0755 root root -\n"),
    ("opt", "var/opt", "d /var/opt 0755 root root -\n"),
    ("ostree", "sysroot/ostree", ""),
    ("root", "var/roothome", "d /var/roothome 0700 root root -\n"),
    ("srv", "var/srv", "d /var/srv 0755 root root -\n"),
];

/// The same, in /usr.
const LOCAL: (&str, &str, &str) = (
    "local",
    "../var/usrlocal",
    "d /var/usrlocal 0755 root root -\n",
);

const TMPFILES: &str = "# What the root directory's links name.\n";

/// What became of a tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Composed {
    pub commit: Commit,
    pub kernel: String,
    pub packages: usize,
    pub files: usize,
    /// Entries directly below /var that are not in the commit.
    pub left_out: usize,
    /// Directories that had content and are links now.
    pub replaced: Vec<String>,
}

pub(crate) fn compose(
    tree: &Path,
    repo_path: &Path,
    branch: &str,
    release: &str,
    timestamp: u64,
) -> Result<Composed> {
    let repo = open(repo_path)?;
    // Aborted when it is dropped.
    let transaction = repo
        .auto_transaction(NONE)
        .context("beginning a transaction")?;
    let storage = Storage::new(&repo, repo_path.join("tmp"));
    let source = source::read(&storage, tree)?;
    let packages = packages(source.packages.as_deref().unwrap_or_default());
    let (root, kernel, replaced) =
        lay_out(&storage, source.root).with_context(|| format!("laying out {}", tree.display()))?;
    let mtree = MutableTree::new();
    let files = fill(&mtree, &root)?;
    let root = repo.write_mtree(&mtree, NONE).context("writing the tree")?;
    let Ok(root) = root.downcast::<RepoFile>() else {
        bail!("the tree that was written is not one of the repository")
    };
    let metadata = glib::VariantDict::new(None);
    metadata.insert("version", release);
    metadata.insert("ostree.bootable", true);
    metadata.insert("ostree.linux", kernel.as_str());
    metadata.insert("ostree.ref-binding", vec![branch]);
    metadata.insert("offshoot.packages", &packages);
    let metadata = metadata.end();
    let checksum = repo
        .write_commit_with_time(
            None,
            Some(release),
            None,
            Some(&metadata),
            &root,
            timestamp,
            NONE,
        )
        .context("writing the commit")?;
    repo.transaction_set_ref(None, branch, Some(&checksum));
    transaction
        .commit(NONE)
        .context("committing the transaction")?;
    let commit = checksum.parse()?;
    Ok(Composed {
        commit,
        kernel,
        packages: packages.len(),
        files,
        left_out: source.left_out,
        replaced,
    })
}

fn open(path: &Path) -> Result<Repo> {
    let repo = Repo::new(&gio::File::for_path(path));
    if path.join("config").exists() {
        repo.open(NONE)
            .with_context(|| format!("opening {}", path.display()))?;
        let mode = repo.mode();
        ensure!(
            mode == RepoMode::Archive,
            "{} is a {mode:?} repository: a server's is in archive mode (ostree init --mode=archive)",
            path.display()
        );
    } else {
        fs::create_dir_all(path).with_context(|| format!("creating {}", path.display()))?;
        repo.create(RepoMode::Archive, NONE)
            .with_context(|| format!("creating {}", path.display()))?;
    }
    Ok(repo)
}

/// Everything where OSTree wants it; the kernel's version, and the directories that had content and are links now.
fn lay_out(storage: &Storage, mut root: Directory) -> Result<(Directory, String, Vec<String>)> {
    let plain = storage.plain_directory()?;
    let empty = || Directory {
        meta: plain.clone(),
        entries: BTreeMap::new(),
    };
    let mut etc = root.entries.remove("etc");
    let mut usr = match root.entries.remove("usr") {
        Some(Node::Directory(usr)) => usr,
        Some(_) | None => bail!("it has no directory usr, so it is not a root file system"),
    };
    let laid_out = etc.is_none() && usr.entries.contains_key("etc");
    let boot = root.entries.get("boot").cloned();
    let kernel = Kernel::find(&usr, boot.as_ref())?;

    root.entries.remove("lost+found");
    for name in EMPTY {
        let meta = match root.entries.remove(name) {
            // /tmp may be a link to /sysroot/tmp.
            Some(link @ Node::Link { .. }) if laid_out => {
                root.entries.insert(name.to_owned(), link);
                continue;
            }
            Some(Node::Directory(directory)) => directory.meta,
            Some(_) | None => plain.clone(),
        };
        let entries = BTreeMap::new();
        let directory = Node::Directory(Directory { meta, entries });
        root.entries.insert(name.to_owned(), directory);
    }
    let (mut replaced, mut tmpfiles) = (Vec::new(), String::new());
    let mut link = |directory: &mut Directory,
                    prefix: &str,
                    (name, target, make): (&str, &str, &str)|
     -> Result<()> {
        match directory.entries.get(name) {
            Some(Node::Link { .. }) => return Ok(()),
            Some(Node::Directory(_)) | None if laid_out && name != "ostree" => return Ok(()),
            Some(Node::Directory(held)) if !held.entries.is_empty() => {
                replaced.push(format!("{prefix}{name}"))
            }
            Some(_) | None => {}
        }
        tmpfiles += make;
        directory
            .entries
            .insert(name.to_owned(), storage.link(target)?);
        Ok(())
    };
    for one in LINKS {
        link(&mut root, "", one)?;
    }
    link(&mut usr, "usr/", LOCAL)?;
    if let Some(etc) = etc.take() {
        ensure!(
            usr.entries.insert("etc".to_owned(), etc).is_none(),
            "it has both etc and usr/etc: usr/etc is where etc goes"
        );
    }
    let lib = usr.directory("lib", empty)?;
    let modules = lib.directory("modules", empty)?;
    let modules = modules.directory(&kernel.version, empty)?;
    modules.entries.insert("vmlinuz".to_owned(), kernel.vmlinuz);
    modules
        .entries
        .insert("initramfs.img".to_owned(), kernel.initramfs);
    if !tmpfiles.is_empty() {
        let file = storage.plain_file(format!("{TMPFILES}{tmpfiles}").as_bytes())?;
        let directory = lib.directory("tmpfiles.d", empty)?;
        directory
            .entries
            .insert("offshoot-ostree.conf".to_owned(), file);
    }
    root.entries.insert("usr".to_owned(), Node::Directory(usr));
    Ok((root, kernel.version, replaced))
}

/// How many files there are.
fn fill(mtree: &MutableTree, directory: &Directory) -> Result<usize> {
    mtree.set_metadata_checksum(&directory.meta);
    let mut files = 0;
    for (name, node) in &directory.entries {
        match node {
            Node::Directory(directory) => files += fill(&mtree.ensure_dir(name)?, directory)?,
            Node::File(checksum) | Node::Link { checksum } => {
                mtree.replace_file(name, checksum)?;
                files += 1;
            }
        }
    }
    Ok(files)
}

/// The one kernel of a tree.
struct Kernel {
    version: String,
    vmlinuz: Node,
    initramfs: Node,
}

impl Kernel {
    fn find(usr: &Directory, boot: Option<&Node>) -> Result<Self> {
        let inner = |node: Option<&Node>, name: &str| match node {
            Some(Node::Directory(directory)) => directory.entries.get(name).cloned(),
            Some(Node::File(_) | Node::Link { .. }) | None => None,
        };
        let modules = inner(usr.entries.get("lib"), "modules");
        let Some(Node::Directory(modules)) = modules else {
            bail!("it has no kernel: usr/lib/modules is not there");
        };
        let file = |node: Option<Node>| node.filter(|node| matches!(node, Node::File(_)));
        let mut found = Vec::new();
        for (version, own) in &modules.entries {
            let from = |name: &str, in_boot: &[String]| {
                let from_boot = in_boot.iter().find_map(|name| file(inner(boot, name)));
                file(inner(Some(own), name)).or(from_boot)
            };
            let Some(vmlinuz) = from("vmlinuz", &[format!("vmlinuz-{version}")]) else {
                continue;
            };
            let in_boot = [
                format!("initrd.img-{version}"),
                format!("initramfs-{version}.img"),
            ];
            let initramfs = from("initramfs.img", &in_boot).with_context(|| {
                format!(
                    "kernel {version} has no initramfs: neither usr/lib/modules/{version}/initramfs.img nor boot/{} nor boot/{} is there",
                    in_boot[0], in_boot[1]
                )
            })?;
            found.push(Self {
                version: version.clone(),
                vmlinuz,
                initramfs,
            });
        }
        let names = |all: &[Self]| -> Vec<String> {
            all.iter().map(|kernel| kernel.version.clone()).collect()
        };
        ensure!(
            found.len() < 2,
            "it has more than one kernel, {:?}: remove all but the one to boot",
            names(&found)
        );
        found.pop().with_context(|| {
            format!(
                "it has no kernel: neither usr/lib/modules/VERSION/vmlinuz nor boot/vmlinuz-VERSION is there for {:?}",
                modules.entries.keys()
            )
        })
    }
}

/// Name, version and architecture of what dpkg says is installed.
fn packages(status: &str) -> Vec<(String, String, String)> {
    let mut packages = Vec::new();
    for paragraph in status.split("\n\n") {
        let field = |name: &str| {
            paragraph
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
        };
        if field("Status").is_some_and(|status| status.ends_with(" installed"))
            && let (Some(name), Some(version), Some(architecture)) =
                (field("Package"), field("Version"), field("Architecture"))
        {
            packages.push((name.to_owned(), version.to_owned(), architecture.to_owned()));
        }
    }
    packages.sort();
    packages
}
