//! The sysroot of a device, in a directory of an ordinary user.
//!
//! libostree itself deploys: its layout, its boot entries, its checks. It does so in a repository of the mode `bare-user-only`, where a file's
//! owner, mode and extended attributes are not kept, so that no privilege is needed. On disk that differs from the mode `bare` of
//! a device in those attributes alone, which [`super::inodes`] sets from the commit, and in a line of `config`, which is set at the end.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use bootloader_glue::config::{grub_cfg, read_entries};
use ostree::gio::{self, Cancellable};
use ostree::{Repo, RepoMode, Sysroot, SysrootSimpleWriteDeploymentFlags};

use super::commit::{Entry, Tree};
use super::layout::{Bootloader, Layout};

const NONE: Option<&Cancellable> = None;

/// Where a deployment says that it is to be mounted through composefs.
const PREPARE_ROOT: [&str; 2] = [
    "usr/etc/ostree/prepare-root.conf",
    "usr/lib/ostree/prepare-root.conf",
];

/// libostree marks with it that it has labelled /var, which only root can.
const LABELLED: &str = ".ostree-selabeled";

/// A sysroot with one deployment.
pub(super) struct Staged {
    pub path: PathBuf,
    /// Below `path`.
    pub deployment: String,
    pub stateroot: String,
}

impl Staged {
    /// Deploys `tree` in `path`, a directory that does not exist.
    pub(super) fn deploy(
        path: &Path,
        tree: &Tree,
        layout: &Layout,
        arguments: &[&str],
    ) -> Result<Self> {
        refuse_composefs(tree)?;
        let objects = path.join("ostree/repo/objects");
        for directory in ["ostree/repo", "ostree/deploy", "boot"] {
            fs::create_dir_all(path.join(directory))
                .with_context(|| format!("making {}", path.join(directory).display()))?;
        }
        let repo = Repo::new(&gio::File::for_path(path.join("ostree/repo")));
        repo.create(RepoMode::BareUserOnly, NONE)
            .context("making the device's repository")?;
        tree.copy_objects(&objects)?;

        let name = match layout.bootloader {
            // The default's configuration is written below, by this program's own generator.
            Bootloader::Grub => "none",
            Bootloader::Uboot => {
                // libostree writes over what it finds.
                fs::create_dir_all(path.join("boot/loader.0"))?;
                fs::write(path.join("boot/loader.0/uEnv.txt"), "")?;
                symlink("loader.0", path.join("boot/loader"))?;
                "uboot"
            }
        };
        let configure = |mode: &str, bootloader: &str| -> Result<()> {
            let config = repo.copy_config();
            config.set_string("core", "mode", mode);
            config.set_string("sysroot", "bootloader", bootloader);
            repo.write_config(&config)
                .context("configuring the device's repository")
        };
        configure("bare-user-only", name)?;

        let sysroot = Sysroot::new(Some(&gio::File::for_path(path)));
        sysroot.load(NONE).context("loading the sysroot")?;
        let os = Some(layout.stateroot.as_str());
        sysroot
            .init_osname(&layout.stateroot, NONE)
            .context("making the stateroot")?;
        let mark = path.join(format!("ostree/deploy/{}/var/{LABELLED}", layout.stateroot));
        fs::write(&mark, "").with_context(|| format!("writing {}", mark.display()))?;
        let commit = tree.commit.to_string();
        let origin = sysroot.origin_new_from_refspec(&commit);
        let deployment = sysroot
            .deploy_tree(os, &commit, Some(&origin), None, arguments, NONE)
            .with_context(|| format!("deploying commit {commit}"))?;
        sysroot
            .simple_write_deployment(
                os,
                &deployment,
                None,
                SysrootSimpleWriteDeploymentFlags::NO_CLEAN,
                NONE,
            )
            .context("writing the boot entries")?;
        sysroot.cleanup(NONE).context("clearing up the sysroot")?;
        // Run as root, libostree has made it immutable, and it is not finished here.
        sysroot
            .deployment_set_mutable(&deployment, true, NONE)
            .context("making the deployment writable")?;
        let deployment = sysroot.deployment_dirpath(&deployment).to_string();
        let name = match layout.bootloader {
            Bootloader::Grub => {
                write_grub_cfg(path)?;
                "grub2"
            }
            Bootloader::Uboot => "uboot",
        };
        configure("bare", name)?;
        Ok(Self {
            path: path.to_owned(),
            deployment,
            stateroot: layout.stateroot.clone(),
        })
    }

    pub(super) fn deployment(&self) -> PathBuf {
        self.path.join(&self.deployment)
    }
}

/// As `ostree-grub-generator` does on the device when libostree runs it.
fn write_grub_cfg(path: &Path) -> Result<()> {
    let boot = path.join("boot");
    let loader = boot.join("loader");
    let entries =
        read_entries(&loader.join("entries")).context("reading libostree's boot entries")?;
    // Paths in the entries are of /boot, which is a file system of its own.
    fs::write(loader.join("grub.cfg"), grub_cfg(&entries, ""))?;
    fs::create_dir_all(boot.join("grub2"))?;
    symlink("../loader/grub.cfg", boot.join("grub2/grub.cfg"))?;
    Ok(())
}

/// The composefs image of a deployment holds owners and attributes; made here it would hold this user's.
fn refuse_composefs(tree: &Tree) -> Result<()> {
    for path in PREPARE_ROOT {
        let Some(Entry::File(_)) = tree.find(path) else {
            continue;
        };
        let content = tree.content(path)?.unwrap_or_default();
        let content = String::from_utf8_lossy(&content).into_owned();
        let config = ostree::glib::KeyFile::new();
        config
            .load_from_data(&content, ostree::glib::KeyFileFlags::NONE)
            .with_context(|| format!("reading {path} of the commit"))?;
        let enabled = match config.has_key("composefs", "enabled") {
            Ok(true) => config.string("composefs", "enabled")?.to_string(),
            Ok(false) | Err(_) => continue,
        };
        ensure!(
            ["0", "no", "false", "maybe"].contains(&enabled.as_str()),
            "{path} of the commit: [composefs] enabled = {enabled}, and an image cannot be made with a composefs deployment yet: \
             set it to maybe, and the device uses composefs from its first update on"
        );
    }
    Ok(())
}
