//! From a root file system to an OSTree commit in an archive repository.
//!
//! | in the tree | in the commit |
//! |---|---|
//! | `/etc` | `/usr/etc` |
//! | `/boot/vmlinuz-V`, `/boot/initrd.img-V` or `/boot/initramfs-V.img` | `/usr/lib/modules/V/vmlinuz`, `initramfs.img`, unless they are there |
//! | `/boot`, `/var`, `/proc`, `/sys`, `/dev`, `/run`, `/tmp` | empty directories |
//! | `/home`, `/root`, `/srv`, `/opt`, `/mnt`, `/media`, `/usr/local` | links, with a tmpfiles.d file that makes what they name |
//! | the rest | itself: owner, mode, extended attributes, content |
//!
//! The repository's transaction makes it all or nothing: a cut before its end leaves the branch where it was.

use std::collections::BTreeSet;
use std::fs::{self, Metadata};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use offshoot::commit::Commit;
use ostree::gio::{self, Cancellable};
use ostree::glib::{self, prelude::*};
use ostree::{MutableTree, ObjectType, Repo, RepoFile, RepoMode};
use serde::Serialize;

const NONE: Option<&Cancellable> = None;

/// Made empty, whatever they hold.
const EMPTY: [&str; 8] = ["boot", "dev", "proc", "run", "sys", "sysroot", "tmp", "var"];

/// Links into what a device keeps.
const LINKS: [(&str, &str); 7] = [
    ("home", "var/home"),
    ("media", "run/media"),
    ("mnt", "var/mnt"),
    ("opt", "var/opt"),
    ("ostree", "sysroot/ostree"),
    ("root", "var/roothome"),
    ("srv", "var/srv"),
];

const TMPFILES: &str = "\
# What the root directory's links name.
d /var/home 0755 root root -
d /var/mnt 0755 root root -
d /var/opt 0755 root root -
d /var/roothome 0700 root root -
d /var/srv 0755 root root -
d /var/usrlocal 0755 root root -
d /run/media 0755 root root -
";

/// What became of a tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Composed {
    pub commit: Commit,
    pub kernel: String,
    pub packages: usize,
    pub files: usize,
    /// Entries directly below /var that are not in the commit.
    pub left_out: usize,
}

pub(crate) fn compose(
    tree: &Path,
    repo: &Path,
    branch: &str,
    release: &str,
    timestamp: u64,
) -> Result<Composed> {
    let repo = open(repo)?;
    let kernel = Kernel::find(tree)?;
    let packages = packages(tree)?;
    let left_out = fs::read_dir(tree.join("var")).map_or(0, Iterator::count);
    repo.prepare_transaction(NONE)
        .context("beginning a transaction")?;
    let mut composer = Composer {
        repo: &repo,
        root: tree,
        kernel: &kernel,
        files: 0,
    };
    let root = MutableTree::new();
    composer.root(&root)?;
    let files = composer.files;
    let root = repo.write_mtree(&root, NONE).context("writing the tree")?;
    let Ok(root) = root.downcast::<RepoFile>() else {
        bail!("the tree that was written is not one of the repository")
    };
    let metadata = glib::VariantDict::new(None);
    metadata.insert("version", release);
    metadata.insert("ostree.bootable", true);
    metadata.insert("ostree.linux", kernel.version.as_str());
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
    repo.commit_transaction(NONE)
        .context("committing the transaction")?;
    let commit = checksum.parse()?;
    Ok(Composed {
        commit,
        kernel: kernel.version,
        packages: packages.len(),
        files,
        left_out,
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

/// The one kernel of a tree.
struct Kernel {
    version: String,
    vmlinuz: PathBuf,
    initramfs: PathBuf,
}

impl Kernel {
    fn find(tree: &Path) -> Result<Self> {
        let modules = tree.join("usr/lib/modules");
        let mut versions = BTreeSet::new();
        for entry in
            fs::read_dir(&modules).with_context(|| format!("reading {}", modules.display()))?
        {
            let entry = entry.with_context(|| format!("reading {}", modules.display()))?;
            versions.insert(entry.file_name().to_string_lossy().into_owned());
        }
        let first = |paths: &[PathBuf]| paths.iter().find(|path| path.is_file()).cloned();
        let mut found = Vec::new();
        for version in &versions {
            let (own, boot) = (modules.join(version), tree.join("boot"));
            let vmlinuz = first(&[own.join("vmlinuz"), boot.join(format!("vmlinuz-{version}"))]);
            let initramfs = [
                own.join("initramfs.img"),
                boot.join(format!("initrd.img-{version}")),
                boot.join(format!("initramfs-{version}.img")),
            ];
            if let Some(vmlinuz) = vmlinuz {
                let Some(initramfs) = first(&initramfs) else {
                    bail!("kernel {version} has no initramfs: none of {initramfs:?} is there");
                };
                found.push(Self {
                    version: version.clone(),
                    vmlinuz,
                    initramfs,
                });
            }
        }
        match (found.pop(), found.is_empty()) {
            (Some(kernel), true) => Ok(kernel),
            (None, _) => bail!(
                "{} has no kernel: neither usr/lib/modules/VERSION/vmlinuz nor boot/vmlinuz-VERSION is there for {versions:?}",
                tree.display()
            ),
            (Some(last), false) => {
                let all: Vec<_> = found
                    .iter()
                    .chain([&last])
                    .map(|kernel| kernel.version.as_str())
                    .collect();
                bail!(
                    "{} has more than one kernel, {all:?}: remove all but the one to boot",
                    tree.display()
                )
            }
        }
    }
}

/// Name, version and architecture of what dpkg says is installed.
fn packages(tree: &Path) -> Result<Vec<(String, String, String)>> {
    let path = tree.join("var/lib/dpkg/status");
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let mut packages = Vec::new();
    for paragraph in text.split("\n\n") {
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
    Ok(packages)
}

struct Composer<'a> {
    repo: &'a Repo,
    root: &'a Path,
    kernel: &'a Kernel,
    files: usize,
}

impl Composer<'_> {
    fn root(&mut self, mtree: &MutableTree) -> Result<()> {
        self.dirmeta(mtree, self.root)?;
        for path in entries(self.root)? {
            let name = name(&path)?;
            let elsewhere = name == "etc"
                || name == "lost+found"
                || LINKS.iter().any(|(link, _)| *link == name);
            if EMPTY.contains(&name) {
                self.dirmeta(&mtree.ensure_dir(name)?, &path)?;
            } else if !elsewhere {
                self.entry(mtree, &path)?;
            }
        }
        for name in EMPTY {
            if !self.root.join(name).exists() {
                self.plain_dirmeta(&mtree.ensure_dir(name)?)?;
            }
        }
        for (link, target) in LINKS {
            self.link(mtree, link, target)?;
        }
        let usr = mtree.ensure_dir("usr")?;
        if self.root.join("etc").exists() {
            ensure!(
                !self.root.join("usr/etc").exists(),
                "{} has both etc and usr/etc: usr/etc is where etc goes",
                self.root.display()
            );
            self.directory(&usr.ensure_dir("etc")?, &self.root.join("etc"))?;
        }
        self.link(&usr, "local", "../var/usrlocal")?;
        let lib = usr.ensure_dir("lib")?;
        let modules = lib
            .ensure_dir("modules")?
            .ensure_dir(&self.kernel.version)?;
        self.file(&modules, "vmlinuz", &self.kernel.vmlinuz)?;
        self.file(&modules, "initramfs.img", &self.kernel.initramfs)?;
        let tmpfiles = lib.ensure_dir("tmpfiles.d")?;
        if !self.root.join("usr/lib/tmpfiles.d").exists() {
            self.plain_dirmeta(&tmpfiles)?;
        }
        let checksum = self.repo.write_regfile_inline(
            None,
            0,
            0,
            0o100_644,
            None,
            TMPFILES.as_bytes(),
            NONE,
        )?;
        tmpfiles.replace_file("offshoot-ostree.conf", &checksum)?;
        Ok(())
    }

    fn directory(&mut self, mtree: &MutableTree, path: &Path) -> Result<()> {
        self.dirmeta(mtree, path)?;
        for entry in entries(path)? {
            if entry != self.root.join("usr/local") {
                self.entry(mtree, &entry)?;
            }
        }
        Ok(())
    }

    fn entry(&mut self, mtree: &MutableTree, path: &Path) -> Result<()> {
        let name = name(path)?;
        let kind = metadata(path)?.file_type();
        if kind.is_dir() {
            self.directory(&mtree.ensure_dir(name)?, path)
        } else if kind.is_file() || kind.is_symlink() {
            self.file(mtree, name, path)
        } else {
            let what = if kind.is_socket() {
                "a socket"
            } else {
                "a device or pipe"
            };
            bail!(
                "{} is {what}: an OSTree commit cannot hold it, make it at boot",
                path.display()
            )
        }
    }

    fn file(&mut self, mtree: &MutableTree, name: &str, path: &Path) -> Result<()> {
        let meta = metadata(path)?;
        let xattrs = xattrs(path)?;
        let write = || -> Result<glib::GString> {
            if meta.file_type().is_symlink() {
                let target = fs::read_link(path)?;
                let target = target.to_str().context("its target is not UTF-8")?;
                Ok(self.repo.write_symlink(
                    None,
                    meta.uid(),
                    meta.gid(),
                    Some(&xattrs),
                    target,
                    NONE,
                )?)
            } else {
                let bytes = fs::read(path)?;
                let (uid, gid, mode) = (meta.uid(), meta.gid(), meta.mode());
                Ok(self.repo.write_regfile_inline(
                    None,
                    uid,
                    gid,
                    mode,
                    Some(&xattrs),
                    &bytes,
                    NONE,
                )?)
            }
        };
        let checksum = write().with_context(|| format!("storing {}", path.display()))?;
        mtree.replace_file(name, &checksum)?;
        self.files += 1;
        Ok(())
    }

    fn link(&self, mtree: &MutableTree, name: &str, target: &str) -> Result<()> {
        let checksum = self.repo.write_symlink(None, 0, 0, None, target, NONE)?;
        Ok(mtree.replace_file(name, &checksum)?)
    }

    fn dirmeta(&self, mtree: &MutableTree, path: &Path) -> Result<()> {
        let meta = metadata(path)?;
        self.write_dirmeta(
            mtree,
            (meta.uid(), meta.gid(), meta.mode()),
            Some(&xattrs(path)?),
        )
    }

    fn plain_dirmeta(&self, mtree: &MutableTree) -> Result<()> {
        self.write_dirmeta(mtree, (0, 0, 0o040_755), None)
    }

    fn write_dirmeta(
        &self,
        mtree: &MutableTree,
        (uid, gid, mode): (u32, u32, u32),
        xattrs: Option<&glib::Variant>,
    ) -> Result<()> {
        let info = gio::FileInfo::new();
        info.set_attribute_uint32("unix::uid", uid);
        info.set_attribute_uint32("unix::gid", gid);
        info.set_attribute_uint32("unix::mode", mode);
        let object = ostree::create_directory_metadata(&info, xattrs);
        let checksum = self
            .repo
            .write_metadata(ObjectType::DirMeta, None, &object, NONE)?;
        mtree.set_metadata_checksum(&checksum.to_hex());
        Ok(())
    }
}

/// Extended attributes as OSTree stores them: `a(ayay)`, names with their final NUL, sorted.
fn xattrs(path: &Path) -> Result<glib::Variant> {
    let read = || -> std::io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let mut all = Vec::new();
        for name in xattr::list(path)? {
            if let Some(value) = xattr::get(path, &name)? {
                all.push(([name.as_bytes(), b"\0"].concat(), value));
            }
        }
        all.sort();
        Ok(all)
    };
    Ok(read()
        .with_context(|| format!("reading extended attributes of {}", path.display()))?
        .to_variant())
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let read = || -> std::io::Result<Vec<PathBuf>> {
        fs::read_dir(directory)?
            .map(|entry| Ok(entry?.path()))
            .collect()
    };
    let mut paths = read().with_context(|| format!("reading {}", directory.display()))?;
    paths.sort();
    Ok(paths)
}

fn metadata(path: &Path) -> Result<Metadata> {
    fs::symlink_metadata(path).with_context(|| format!("reading {}", path.display()))
}

fn name(path: &Path) -> Result<&str> {
    let name = path.file_name().and_then(|name| name.to_str());
    name.with_context(|| {
        format!(
            "{} is not a UTF-8 name, which an OSTree commit needs",
            path.display()
        )
    })
}
