//! The verbs over libostree.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use offshoot::commit::Commit;
use offshoot::deployment::{Deployment, Deployments, Done, Failure, FailureKind, Missing, Stored};
use offshoot::objects::{self, Kind, Object};
use ostree::gio::Cancellable;
use ostree::gio::prelude::*;
use ostree::{RepoCommitState, RepoPruneFlags, SysrootWriteDeploymentsOpts, gio, glib};

/// Keeps what is applied and not deployed yet from being pruned.
const STAGED: &str = "offshoot/staged";

/// Room beside what a release unpacks to: metadata, and what the running system writes meanwhile.
const MARGIN: u64 = 32 << 20;

/// Directories and links of a deployment, and what the running system makes meanwhile.
const INODE_MARGIN: u64 = 2000;

const NONE: Option<&Cancellable> = None;

pub(crate) struct Sysroot {
    path: PathBuf,
    ostree: ostree::Sysroot,
    repo: ostree::Repo,
}

/// The sysroot under its lock: what may write.
pub(crate) struct Locked {
    sysroot: Sysroot,
}

fn failure(kind: FailureKind, message: impl Into<String>) -> Failure {
    Failure {
        kind,
        message: message.into(),
    }
}

/// libostree's error, sorted by its code: never by its words.
fn ostree(doing: &str, error: &glib::Error) -> Failure {
    let kind = if error.matches(gio::IOErrorEnum::NoSpace) {
        FailureKind::NoSpace
    } else {
        FailureKind::Ostree
    };
    failure(kind, format!("{doing}: {}", error.message()))
}

fn loading(path: &Path, error: &glib::Error) -> Failure {
    ostree(&format!("loading the sysroot {}", path.display()), error)
}

fn read_index(path: &Path) -> Result<Vec<Object>, Failure> {
    let corrupt = |error: String| {
        failure(
            FailureKind::CorruptDelta,
            format!("{}: {error}", path.display()),
        )
    };
    let bytes = std::fs::read(path).map_err(|error| corrupt(error.to_string()))?;
    objects::parse(&bytes).map_err(|error| corrupt(error.to_string()))
}

fn kind_of(object: &Object) -> ostree::ObjectType {
    match object.kind {
        Kind::Commit => ostree::ObjectType::Commit,
        Kind::File => ostree::ObjectType::File,
        Kind::DirMeta => ostree::ObjectType::DirMeta,
        Kind::DirTree => ostree::ObjectType::DirTree,
    }
}

/// One object into the transaction. libostree computes its checksum once more, and takes nothing else under that name.
fn store_object(repo: &ostree::Repo, object: &Object, file: &Path) -> Result<(), Failure> {
    let corrupt = |error: &dyn std::fmt::Display| {
        failure(
            FailureKind::CorruptDelta,
            format!("{}: {error}", file.display()),
        )
    };
    let checksum = object.checksum.to_string();
    let say = |error: glib::Error| match ostree("storing an object", &error) {
        Failure {
            kind: FailureKind::Ostree,
            ..
        } => corrupt(&error.message()),
        failure => failure,
    };
    if object.kind != Kind::File {
        let bytes = std::fs::read(file).map_err(|error| corrupt(&error))?;
        let kind = match object.kind {
            Kind::Commit => ostree::COMMIT_GVARIANT_STRING,
            Kind::DirMeta => ostree::DIRMETA_GVARIANT_STRING,
            Kind::DirTree | Kind::File => ostree::TREE_GVARIANT_STRING,
        };
        let kind = glib::VariantTy::new(kind).map_err(|error| corrupt(&error))?;
        let variant = glib::Variant::from_bytes_with_type(&glib::Bytes::from_owned(bytes), kind);
        repo.write_metadata(kind_of(object), Some(&checksum), &variant, NONE)
            .map_err(say)?;
        return Ok(());
    }
    let (input, info, xattrs) =
        ostree::content_file_parse(true, &gio::File::for_path(file), false, NONE).map_err(say)?;
    let (stream, length) =
        ostree::raw_file_to_content_stream(&input, &info, Some(&xattrs), NONE).map_err(say)?;
    repo.write_content(Some(&checksum), &stream, length, NONE)
        .map_err(say)?;
    Ok(())
}

impl Sysroot {
    /// To look: no lock is taken.
    pub(crate) fn look(path: &Path, generator: &Path) -> Result<Self, Failure> {
        Self::load(Self::open(path)?, path, generator)
    }

    /// To write, under the sysroot's lock.
    pub(crate) fn lock(path: &Path, generator: &Path) -> Result<Locked, Failure> {
        let sysroot = Self::open(path)?;
        // Before loading: taking the lock is what makes a read-only /sysroot and /boot writable, and what was opened before stays read-only.
        match sysroot.try_lock() {
            Ok(true) => {}
            Ok(false) => {
                return Err(failure(
                    FailureKind::Busy,
                    "another program holds the sysroot's lock: try again when it is done",
                ));
            }
            Err(error) => return Err(ostree("locking the sysroot", &error)),
        }
        let sysroot = Self::load(sysroot, path, generator)?;
        Ok(Locked { sysroot })
    }

    fn open(path: &Path) -> Result<ostree::Sysroot, Failure> {
        let sysroot = ostree::Sysroot::new(Some(&gio::File::for_path(path)));
        let opened = if path == Path::new("/") && rustix::process::geteuid().is_root() {
            // /sysroot and /boot may be mounted read-only; libostree makes them writable for this process only.
            sysroot.initialize_with_mount_namespace(NONE)
        } else {
            sysroot.initialize()
        };
        opened.map_err(|error| loading(path, &error))?;
        Ok(sysroot)
    }

    fn load(sysroot: ostree::Sysroot, path: &Path, generator: &Path) -> Result<Self, Failure> {
        sysroot.load(NONE).map_err(|error| loading(path, &error))?;
        let repo = sysroot.repo();
        let bootloader = repo
            .config()
            .string("sysroot", "bootloader")
            .map(|name| name.to_string());
        if bootloader.is_ok_and(|name| name == "grub2") {
            #[allow(unsafe_code)]
            // SAFETY: no other thread exists yet that could read the environment.
            unsafe {
                std::env::set_var("OSTREE_GRUB2_EXEC", generator);
            }
        }
        Ok(Self {
            path: path.to_owned(),
            ostree: sysroot,
            repo,
        })
    }

    pub(crate) fn status(&self) -> Result<Deployments, Failure> {
        let booted = self.ostree.booted_deployment();
        let deployments = self.ostree.deployments();
        let describe = |deployment: &ostree::Deployment| {
            let checksum = deployment.csum();
            let commit = checksum
                .parse()
                .map_err(|error| failure(FailureKind::Ostree, format!("{error}")))?;
            let (object, _) = self
                .repo
                .load_commit(&checksum)
                .map_err(|error| ostree("reading a commit", &error))?;
            let metadata = glib::VariantDict::new(Some(&object.child_value(0)));
            let version = metadata.lookup::<String>("version").unwrap_or(None);
            let os = deployment.osname().to_string();
            Ok(Deployment {
                commit,
                version,
                timestamp: ostree::commit_get_timestamp(&object),
                os,
                pinned: deployment.is_pinned(),
                staged: deployment.is_staged(),
            })
        };
        Ok(Deployments {
            booted: booted.and_then(|booted| {
                deployments
                    .iter()
                    .position(|deployment| deployment.equal(&booted))
            }),
            deployments: deployments
                .iter()
                .map(describe)
                .collect::<Result<_, Failure>>()?,
            repo_free: self.free("ostree/repo")?,
            boot_free: self.free("boot")?,
        })
    }

    pub(crate) fn stored(&self, commits: &[Commit]) -> Result<Stored, Failure> {
        let mut complete = Vec::new();
        let held = self.held()?;
        for commit in commits {
            if held.contains(&commit.to_string()) && self.is_complete(*commit)? {
                complete.push(*commit);
            }
        }
        Ok(Stored { complete })
    }

    /// The commits of all refs. A ref is what keeps the objects of a commit: without one the next deployment clears them away.
    fn held(&self) -> Result<HashSet<String>, Failure> {
        let refs = self.repo.list_refs(None, NONE);
        let refs = refs.map_err(|error| ostree("reading refs", &error))?;
        Ok(refs.into_values().collect())
    }

    fn is_complete(&self, commit: Commit) -> Result<bool, Failure> {
        match self.verify_complete(commit, false) {
            Ok(()) => Ok(true),
            Err(Failure {
                kind: FailureKind::IncompleteCommit,
                ..
            }) => Ok(false),
            Err(failure) => Err(failure),
        }
    }

    pub(crate) fn missing(&self, index: &Path) -> Result<Missing, Failure> {
        let objects = read_index(index)?;
        let missing = objects.iter().map(|object| self.is_missing(object));
        Ok(Missing::new(&missing.collect::<Result<Vec<_>, _>>()?))
    }

    fn is_missing(&self, object: &Object) -> Result<bool, Failure> {
        self.repo
            .has_object(kind_of(object), &object.checksum.to_string(), NONE)
            .map(|has| !has)
            .map_err(|error| ostree("reading the repository", &error))
    }

    /// Before the first byte: that what is to come fits, in numbers.
    pub(crate) fn preflight(&self, unpacked: u64, objects: u64) -> Result<Done, Failure> {
        let path = self.path.join("ostree/repo");
        let (free, all) = self.inodes("ostree/repo")?;
        let needed = objects.saturating_add(INODE_MARGIN);
        // File systems that make them as they need them say that there are none.
        if all > 0 && free < needed {
            return Err(failure(
                FailureKind::NoSpace,
                format!(
                    "{}: {needed} inodes are needed, {free} are free",
                    path.display()
                ),
            ));
        }
        let repo_free = self.free("ostree/repo")?;
        let needed = unpacked.saturating_add(MARGIN);
        if repo_free < needed {
            return Err(failure(
                FailureKind::NoSpace,
                format!(
                    "{}: {needed} bytes are needed, {repo_free} are free",
                    path.display()
                ),
            ));
        }
        let mut kernels = 0;
        if let Some(deployment) = self.merge_deployment() {
            let directory = self.ostree.deployment_dirpath(&deployment);
            let modules = self.path.join(directory.as_str()).join("usr/lib/modules");
            for kernel in std::fs::read_dir(&modules).into_iter().flatten().flatten() {
                for file in ["vmlinuz", "initramfs.img"] {
                    kernels +=
                        std::fs::metadata(kernel.path().join(file)).map_or(0, |meta| meta.len());
                }
            }
        }
        let boot_free = self.free("boot")?;
        // A kernel that grows a little must not be what makes the deployment fail half-way.
        let needed = kernels + kernels / 4;
        if boot_free < needed {
            let path = self.path.join("boot");
            return Err(failure(
                FailureKind::NoSpace,
                format!(
                    "{}: a kernel needs {needed} bytes, {boot_free} are free",
                    path.display()
                ),
            ));
        }
        Ok(Done { changed: false })
    }

    fn free(&self, below: &str) -> Result<u64, Failure> {
        let stat = self.statvfs(below)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// Those that are free, and all.
    fn inodes(&self, below: &str) -> Result<(u64, u64), Failure> {
        let stat = self.statvfs(below)?;
        Ok((stat.f_favail, stat.f_files))
    }

    /// libostree syncs a ref that it writes, not the directory that names it.
    fn sync(&self) -> Result<(), Failure> {
        let path = self.path.join("ostree/repo");
        let synced = std::fs::File::open(&path).and_then(|repo| Ok(rustix::fs::syncfs(repo)?));
        synced.map_err(|error| {
            let kind = match error.kind() {
                std::io::ErrorKind::StorageFull => FailureKind::NoSpace,
                _ => FailureKind::Ostree,
            };
            failure(kind, format!("syncing {}: {error}", path.display()))
        })
    }

    fn statvfs(&self, below: &str) -> Result<rustix::fs::StatVfs, Failure> {
        let path = self.path.join(below);
        rustix::fs::statvfs(&path).map_err(|error| {
            failure(
                FailureKind::Unsuited,
                format!("reading {}: {error}", path.display()),
            )
        })
    }

    /// What a new deployment takes its kernel arguments and /etc from: the running one, or outside of one the default.
    fn merge_deployment(&self) -> Option<ostree::Deployment> {
        self.ostree
            .booted_deployment()
            .or_else(|| self.ostree.deployments().into_iter().next())
    }

    /// The commit and every object below it are there; with `check`, the kernel and the initramfs are also read and digested.
    fn verify_complete(&self, commit: Commit, check: bool) -> Result<(), Failure> {
        let incomplete = |message: String| failure(FailureKind::IncompleteCommit, message);
        let checksum = commit.to_string();
        let has = self
            .repo
            .has_object(ostree::ObjectType::Commit, &checksum, NONE)
            .map_err(|error| ostree("reading the repository", &error))?;
        if !has {
            return Err(incomplete(format!(
                "commit {commit} is not in the repository"
            )));
        }
        let (_, state) = self
            .repo
            .load_commit(&checksum)
            .map_err(|error| ostree("reading the commit", &error))?;
        if state.contains(RepoCommitState::PARTIAL) {
            return Err(incomplete(format!(
                "commit {commit} is only partly in the repository"
            )));
        }
        let objects = self
            .repo
            .traverse_commit(&checksum, 0, NONE)
            .map_err(|error| incomplete(format!("walking commit {commit}: {}", error.message())))?;
        for object in objects {
            let (kind, name) = (object.object_type(), object.checksum());
            let has = self
                .repo
                .has_object(kind, name, NONE)
                .map_err(|error| ostree("reading the repository", &error))?;
            if !has {
                return Err(incomplete(format!(
                    "object {name} of commit {commit} is missing"
                )));
            }
        }
        if check {
            self.check_kernel(&checksum)?;
        }
        Ok(())
    }

    /// Two deployments with one kernel share its file: a corrupt object would break them both.
    fn check_kernel(&self, checksum: &str) -> Result<(), Failure> {
        let (root, _) = self
            .repo
            .read_commit(checksum, NONE)
            .map_err(|error| ostree("reading the commit", &error))?;
        let modules = root.resolve_relative_path("usr/lib/modules");
        let kernels = modules
            .enumerate_children(
                "standard::name",
                gio::FileQueryInfoFlags::NOFOLLOW_SYMLINKS,
                NONE,
            )
            .map_err(|error| {
                failure(
                    FailureKind::Unsuited,
                    format!("usr/lib/modules: {}", error.message()),
                )
            })?;
        for kernel in kernels.flatten() {
            for file in ["vmlinuz", "initramfs.img"] {
                let file = modules.child(kernel.name()).child(file);
                let Ok(file) = file.downcast::<ostree::RepoFile>() else {
                    continue;
                };
                if !file.query_exists(NONE) {
                    continue;
                }
                let object = file.checksum();
                self.repo
                    .fsck_object(ostree::ObjectType::File, &object, NONE)
                    .map_err(|error| {
                        failure(
                            FailureKind::IncompleteCommit,
                            format!("object {object}: {}", error.message()),
                        )
                    })?;
            }
        }
        Ok(())
    }
}

impl Locked {
    /// Cut anywhere: objects are whole or absent, and the commit counts as stored only when all are there and held.
    pub(crate) fn apply(&self, spool: &Path, commit: Commit) -> Result<Done, Failure> {
        let repo = &self.sysroot.repo;
        self.store(commit, || {
            let delta = gio::File::for_path(spool);
            repo.static_delta_execute_offline(&delta, false, NONE)
                .map_err(|error| match ostree("applying the delta", &error) {
                    Failure {
                        kind: FailureKind::Ostree,
                        message,
                    } => failure(FailureKind::CorruptDelta, message),
                    failure => failure,
                })?;
            let present = repo.has_object(ostree::ObjectType::Commit, &commit.to_string(), NONE);
            if present.map_err(|error| ostree("reading the repository", &error))? {
                return Ok(());
            }
            let message = format!("{} does not produce commit {commit}", spool.display());
            Err(failure(FailureKind::CorruptDelta, message))
        })
    }

    /// Cut anywhere: as [`Self::apply`].
    pub(crate) fn import(
        &self,
        index: &Path,
        spool: &Path,
        commit: Commit,
    ) -> Result<Done, Failure> {
        self.store(commit, || {
            read_index(index)?
                .iter()
                .filter(|object| !matches!(self.sysroot.is_missing(object), Ok(false)))
                .try_for_each(|object| {
                    store_object(&self.sysroot.repo, object, &spool.join(object.to_string()))
                })
        })
    }

    /// The objects of a commit in one transaction, unless they are all there; and then a ref that keeps them.
    fn store(
        &self,
        commit: Commit,
        objects: impl FnOnce() -> Result<(), Failure>,
    ) -> Result<Done, Failure> {
        let repo = &self.sysroot.repo;
        let checksum = commit.to_string();
        let complete = self.sysroot.is_complete(commit)?;
        if complete && self.sysroot.held()?.contains(&checksum) {
            return Ok(Done { changed: false });
        }
        if !complete {
            repo.prepare_transaction(NONE)
                .map_err(|error| ostree("beginning a transaction", &error))?;
            if let Err(failure) = objects() {
                repo.abort_transaction(NONE)
                    .map_err(|error| ostree("aborting the transaction", &error))?;
                return Err(failure);
            }
            repo.commit_transaction(NONE)
                .map_err(|error| ostree("committing the transaction", &error))?;
            self.sysroot.verify_complete(commit, false)?;
        }
        repo.set_ref_immediate(None, STAGED, Some(&checksum), NONE)
            .map_err(|error| ostree("writing a ref", &error))?;
        self.sysroot.sync()?;
        Ok(Done { changed: true })
    }

    /// Cut before the entries swap: the former default, and a directory that the next run clears. After: the new default.
    pub(crate) fn deploy(&self, commit: Commit) -> Result<Done, Failure> {
        let Sysroot {
            ostree: sysroot, ..
        } = &self.sysroot;
        let checksum = commit.to_string();
        let deployments = sysroot.deployments();
        if deployments
            .first()
            .is_some_and(|first| first.csum() == checksum)
        {
            return Ok(Done { changed: false });
        }
        self.sysroot.verify_complete(commit, true)?;
        sysroot
            .cleanup(NONE)
            .map_err(|error| ostree("clearing up", &error))?;
        let Some(merge) = self.sysroot.merge_deployment() else {
            return Err(failure(
                FailureKind::Unsuited,
                "there is no deployment to take kernel arguments and /etc from",
            ));
        };
        let os = merge.osname();
        let kernel_arguments = merge
            .bootconfig()
            .and_then(|config| config.get("options"))
            .unwrap_or_default();
        let kernel_arguments: Vec<&str> = kernel_arguments
            .split_ascii_whitespace()
            .filter(|argument| !argument.starts_with("ostree="))
            .collect();
        // What an operator said of the running deployment, that it is pinned, is not said of the new one. Its own file keeps it.
        let origin = merge.origin();
        if let Some(origin) = &origin {
            ostree::Deployment::origin_remove_transient_state(origin);
        }
        let new = sysroot
            .deploy_tree(
                Some(&os),
                &checksum,
                origin.as_ref(),
                Some(&merge),
                &kernel_arguments,
                NONE,
            )
            .map_err(|error| ostree("deploying", &error))?;
        let kept = deployments
            .into_iter()
            .filter(|deployment| deployment.equal(&merge) || deployment.is_pinned());
        self.write(std::iter::once(new).chain(kept).collect())
    }

    pub(crate) fn undeploy(&self, commit: Commit) -> Result<Done, Failure> {
        let checksum = commit.to_string();
        let booted = self.sysroot.ostree.booted_deployment();
        let deployments = self.sysroot.ostree.deployments();
        let before = deployments.len();
        let is_booted = |deployment: &ostree::Deployment| {
            booted
                .as_ref()
                .is_some_and(|booted| booted.equal(deployment))
        };
        // A pinned one goes too: what was rejected must not be what a counter can choose.
        let kept: Vec<_> = deployments
            .into_iter()
            .filter(|deployment| deployment.csum() != checksum || is_booted(deployment))
            .collect();
        if kept.is_empty() {
            return Err(failure(
                FailureKind::Booted,
                format!("{commit} is the only deployment: it stays"),
            ));
        }
        if kept.len() == before {
            return Ok(Done { changed: false });
        }
        self.write(kept)
    }

    pub(crate) fn prune(&self, keep: &[Commit]) -> Result<Done, Failure> {
        let Sysroot {
            ostree: sysroot,
            repo,
            ..
        } = &self.sysroot;
        let keep: Vec<String> = keep.iter().map(Commit::to_string).collect();
        let merge = self.sysroot.merge_deployment();
        let deployments = sysroot.deployments();
        let before = deployments.len();
        let is_merge = |deployment: &ostree::Deployment| {
            merge.as_ref().is_some_and(|merge| merge.equal(deployment))
        };
        let kept: Vec<_> = deployments
            .into_iter()
            .filter(|one| {
                is_merge(one)
                    || one.is_pinned()
                    || keep.iter().any(|commit| one.csum() == commit.as_str())
            })
            .collect();
        let mut changed = kept.len() != before;
        if changed {
            self.write(kept)?;
        }
        let staged = repo
            .resolve_rev(STAGED, true)
            .map_err(|error| ostree("reading refs", &error))?;
        if let Some(staged) = staged
            && !keep.iter().any(|commit| staged == commit.as_str())
        {
            repo.set_ref_immediate(None, STAGED, None, NONE)
                .map_err(|error| ostree("removing a ref", &error))?;
            changed = true;
        }
        sysroot
            .cleanup(NONE)
            .map_err(|error| ostree("clearing up", &error))?;
        repo.prune(RepoPruneFlags::REFS_ONLY, 0, NONE)
            .map_err(|error| ostree("pruning the repository", &error))?;
        Ok(Done { changed })
    }

    /// The entries swap here; afterwards libostree removes what they no longer name.
    fn write(&self, deployments: Vec<ostree::Deployment>) -> Result<Done, Failure> {
        let options = SysrootWriteDeploymentsOpts { do_postclean: true };
        self.sysroot
            .ostree
            .write_deployments_with_options(&deployments, &options, NONE)
            .map_err(|error| ostree("writing the boot entries", &error))?;
        Ok(Done { changed: true })
    }
}
