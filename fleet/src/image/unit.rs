//! What a unit has in its /etc that the commit does not have, and what a commit must be for an image of it to be a good device.
//!
//! The configuration is loaded at the end as the device will load it: what the agent would refuse there is refused here.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use offshoot::config::{BootloaderKind, Config, CountBy};
use offshoot::trust::schema::{HardwareId, RoleName, Version};
use offshoot::trust::verify;

use super::boot;
use super::commit::{Entry, Tree};
use super::layout::{Bootloader, Content, Count, Layout, Partition};
use crate::directory::Fleet;
use crate::publication::Publication;

const CONFIG: &str = "etc/offshoot/config.toml";
const IDENTITY: &str = "etc/offshoot/identity";
const MACHINE_ID: &str = "etc/machine-id";
const FW_ENV: &str = "etc/fw_env.config";
const ROOT: &str = "usr/lib/offshoot/root.json";

/// Its programs grow a partition and a file system, and Debian has the first in a package of its own.
const GROWING: [&str; 3] = [
    "usr/bin/systemd-repart",
    "usr/lib/systemd/systemd-growfs",
    "usr/lib/systemd/system/systemd-growfs@.service",
];

/// What is said of a unit, or of all units of an image.
#[derive(Clone, Debug)]
pub(crate) struct Unit {
    pub channel: RoleName,
    pub hardware: HardwareId,
    /// The rest of its configuration.
    pub config: Option<PathBuf>,
    pub machine_id: Option<String>,
    /// A file for /etc/offshoot/identity.
    pub identity: Option<PathBuf>,
}

/// The device's trusted root is one that this fleet's devices can start from. Its version.
pub(super) fn check_root(tree: &Tree, fleet: &Fleet, publication: &Publication) -> Result<Version> {
    let newest = fleet.root();
    let remedy = format!(
        "compose the commit again with {} as /{ROOT}",
        newest.display()
    );
    let bytes = tree.content(ROOT)?;
    let bytes = bytes.with_context(|| {
        format!(
            "commit {} has no /{ROOT}, so the device would trust nobody: {remedy}",
            tree.commit
        )
    })?;
    let stranger = || {
        format!(
            "/{ROOT} of commit {} is not a root of the fleet in {}: {remedy}",
            tree.commit,
            fleet.directory.display()
        )
    };
    let mut root = verify::trusted_root(&bytes).with_context(stranger)?;
    let version = root.version;
    let read = |version| {
        let path = fleet.metadata(&format!("{version}.root.json"));
        fs::read(&path).with_context(|| format!("reading {}", path.display()))
    };
    ensure!(
        version <= publication.root.version && read(version)? == bytes,
        stranger()
    );
    while root.version < publication.root.version {
        let next = root
            .version
            .next()
            .context("there is no later version of a root")?;
        root = verify::accept_root(&root, &read(next)?).with_context(stranger)?;
    }
    Ok(version)
}

/// A commit with an identity would give it to every unit.
pub(super) fn check_machine_id(tree: &Tree) -> Result<()> {
    let id = tree
        .content(&format!("usr/{MACHINE_ID}"))?
        .unwrap_or_default();
    let id = String::from_utf8_lossy(&id).trim().to_owned();
    ensure!(
        id.is_empty() || id == "uninitialized",
        "/{MACHINE_ID} of commit {} is {id}: every unit would have it. Compose the tree with an empty one (`: > {MACHINE_ID}`)",
        tree.commit
    );
    Ok(())
}

/// Keys in a commit are everybody's.
pub(super) fn warnings(tree: &Tree) -> Vec<String> {
    let mut warnings = Vec::new();
    if let Some(Entry::Directory(ssh)) = tree.find("usr/etc/ssh") {
        let keys = ssh
            .entries
            .keys()
            .filter(|name| name.starts_with("ssh_host_") && name.ends_with("_key"));
        let keys: Vec<_> = keys.map(|name| format!("/etc/ssh/{name}")).collect();
        if !keys.is_empty() {
            warnings.push(format!(
                "{} in commit {} will be the same on every unit: remove them from the tree, and let each unit make its own",
                keys.join(", "),
                tree.commit
            ));
        }
    }
    warnings
}

impl Unit {
    /// What can be told without a commit.
    pub(super) fn check(&self) -> Result<()> {
        let is_hexadecimal = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if let Some(id) = &self.machine_id {
            ensure!(
                id.len() == 32
                    && id.bytes().all(is_hexadecimal)
                    && id.bytes().any(|byte| byte != b'0'),
                "--machine-id {id:?}: it is 32 lowercase hexadecimal digits, as `systemd-id128 new` prints them"
            );
        }
        Ok(())
    }

    /// Writes the unit's /etc into a deployment, and returns the configuration that the device has with it.
    pub(super) fn install(
        &self,
        deployment: &Path,
        tree: &Tree,
        layout: &Layout,
    ) -> Result<Config> {
        let etc = Etc(deployment);
        if let Some(id) = &self.machine_id {
            etc.write(MACHINE_ID, format!("{id}\n").as_bytes(), 0o444)?;
        }
        if let Some(path) = &self.identity {
            let identity = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
            etc.write(IDENTITY, &identity, 0o600)?;
        }
        etc.write(CONFIG, self.configuration(deployment)?.as_bytes(), 0o644)?;
        for partition in &layout.partitions {
            if let Some(mount) = &partition.grow {
                grow(&etc, tree, partition, mount)?;
            }
        }
        let config =
            Config::load(deployment).context("the device would refuse its configuration")?;
        self.check_bootloader(&etc, &config, layout)?;
        Ok(config)
    }

    /// The operator's, or the commit's, with what was said of this unit.
    fn configuration(&self, deployment: &Path) -> Result<String> {
        let path = match &self.config {
            Some(path) => path.clone(),
            None => deployment.join(CONFIG),
        };
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if self.config.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
                String::new()
            }
            Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
        };
        let mut table: toml::Table = text
            .parse()
            .with_context(|| format!("reading {}", path.display()))?;
        let device = table
            .entry("device")
            .or_insert_with(|| toml::Table::new().into());
        let device = device
            .as_table_mut()
            .with_context(|| format!("reading {}: device is not a table", path.display()))?;
        device.insert("channel".to_owned(), self.channel.as_str().into());
        device.insert("hardware".to_owned(), self.hardware.as_str().into());
        toml::to_string(&table).context("writing the device's configuration")
    }

    /// The agent would look for the environment where the layout puts it.
    fn check_bootloader(&self, etc: &Etc, config: &Config, layout: &Layout) -> Result<()> {
        let found = &config.bootloader;
        let (kind, word) = match layout.bootloader {
            Bootloader::Grub => (BootloaderKind::Grub, "grub"),
            Bootloader::Uboot => (BootloaderKind::Uboot, "uboot"),
        };
        ensure!(
            found.kind == kind,
            "the device's configuration says [bootloader] kind = {:?}, and the layout's is \"{word}\": correct /usr/lib/offshoot/config.toml of \
             the tree, or give the rest of the unit's configuration with --config",
            format!("{:?}", found.kind).to_lowercase()
        );
        let Some(uboot) = &layout.uboot else {
            let esp = &layout.partitions[layout.one(Content::Esp)?];
            if let Some(mount) = &esp.mount {
                let expected = Path::new(mount).join("offshoot");
                ensure!(
                    found.environment == expected,
                    "the device's configuration says [bootloader] environment = {:?}, and the layout mounts partition {} at {mount}: one of them is wrong",
                    found.environment.display().to_string(),
                    esp.name
                );
            }
            return Ok(());
        };
        let same = matches!(
            (found.count, uboot.count),
            (CountBy::Script, Count::Script) | (CountBy::Bootcount, Count::Bootcount)
        );
        ensure!(
            same,
            "the device's configuration says that the boots of a trial are counted by {:?}, and the layout's uboot.count by {:?}: one of them is wrong",
            found.count,
            uboot.count
        );
        let wanted = boot::fw_env_config(layout, uboot)?;
        let inner = found.config.strip_prefix("/").unwrap_or(&found.config);
        let path = etc.0.join(inner);
        match fs::read_to_string(&path) {
            Ok(text) => boot::same_places(&wanted, &text, &found.config.display().to_string()),
            Err(error)
                if error.kind() == std::io::ErrorKind::NotFound && inner == Path::new(FW_ENV) =>
            {
                etc.write(FW_ENV, wanted.as_bytes(), 0o644)
            }
            Err(error) => Err(error)
                .with_context(|| format!("reading {} of the commit", found.config.display())),
        }
    }
}

/// systemd does it, on each boot: when there is nothing to do it takes no time. A power cut leaves a partition that has grown, and a file system
/// that grows on the next boot.
fn grow(etc: &Etc, tree: &Tree, partition: &Partition, mount: &str) -> Result<()> {
    let name = &partition.name;
    for path in GROWING {
        ensure!(
            matches!(tree.find(path), Some(Entry::File(_))),
            "partition {name} is to grow, and commit {} has no /{path}: install systemd-repart in the tree, or leave out `grow` in the layout",
            tree.commit
        );
    }
    let rule = format!(
        "# To the end of the disk.\n[Partition]\nType={}\n",
        partition.kind.name()
    );
    etc.write(
        &format!("etc/repart.d/50-{name}.conf"),
        rule.as_bytes(),
        0o644,
    )?;
    let unit = escape(mount.trim_matches('/'));
    let template = "/usr/lib/systemd/system/systemd-growfs@.service";
    etc.link(
        &format!("etc/systemd/system/local-fs.target.wants/systemd-growfs@{unit}.service"),
        template,
    )
}

/// As systemd-escape --path.
fn escape(path: &str) -> String {
    if path.is_empty() {
        return "-".to_owned();
    }
    let mut escaped = String::new();
    for (n, byte) in path.bytes().enumerate() {
        match byte {
            b'/' => escaped.push('-'),
            b'.' if n == 0 => escaped.push_str("\\x2e"),
            b'_' | b'.' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => escaped.push(char::from(byte)),
            _ => escaped += &format!("\\x{byte:02x}"),
        }
    }
    escaped
}

/// A deployment, for its /etc. What is there is a copy of /usr/etc, not a link to the repository's objects.
struct Etc<'a>(&'a Path);

impl Etc<'_> {
    fn write(&self, path: &str, content: &[u8], mode: u32) -> Result<()> {
        let path = self.ready(path)?;
        let write = || -> std::io::Result<()> {
            fs::write(&path, content)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(mode))
        };
        write().with_context(|| format!("writing {}", path.display()))
    }

    fn link(&self, path: &str, target: &str) -> Result<()> {
        let path = self.ready(path)?;
        symlink(target, &path).with_context(|| format!("writing {}", path.display()))
    }

    fn ready(&self, path: &str) -> Result<PathBuf> {
        let path = self.0.join(path);
        let above = path.parent().unwrap_or(self.0);
        fs::create_dir_all(above).with_context(|| format!("making {}", above.display()))?;
        match fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => bail!("replacing {}: {error}", path.display()),
        }
        Ok(path)
    }
}

#[cfg(test)]
mod tests {
    use super::escape;

    #[test]
    fn a_path_is_a_unit_s_name_as_systemd_escape_makes_it() {
        for (path, name) in [
            ("", "-"),
            ("var", "var"),
            ("var/lib", "var-lib"),
            ("a-b", "a\\x2db"),
            (".a", "\\x2ea"),
            ("a.b_c", "a.b_c"),
        ] {
            assert_eq!(escape(path), name);
        }
    }
}
