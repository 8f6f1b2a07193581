//! The configuration: `/usr/lib/offshoot/config.toml` from the image, overridden key by key by `/etc/offshoot/config.toml`.
//!
//! Both are hostile until parsed: an unknown key, a wrong type or an impossible value is an error that names the file and the key.
//! Paths may be moved below another root for tests; nothing else in the agent spells an absolute path.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use bootloader_glue::Bootloader;
use bootloader_glue::uboot::{Count, Uboot};
use serde::Deserialize;

use crate::schedule::Window;

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub server: Server,
    pub device: Device,
    #[serde(default)]
    pub poll: Poll,
    #[serde(default)]
    pub network: Network,
    #[serde(default)]
    pub install: Install,
    #[serde(default)]
    pub bootloader: BootloaderConfig,
    #[serde(default)]
    pub health: Health,
    #[serde(default)]
    pub paths: Paths,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Server {
    /// Where `metadata/`, `targets/` and `deltas/` are: `https://host[:port]/[prefix/]`, or `file:///directory` for a share that is mounted.
    pub url: String,
    /// More places with the same content, asked in this order when one before does not answer.
    #[serde(default)]
    pub mirrors: Vec<String>,
    /// PEM certificates to trust instead of the system's.
    pub ca: Option<PathBuf>,
    /// What shows the server who this device is.
    pub identity: Option<Identity>,
    /// Allow http://. For a bench; the metadata is signed either way, who asks for what is not secret then.
    #[serde(default)]
    pub insecure_http: bool,
    /// Seconds without a byte after which a transfer counts as stalled.
    #[serde(default = "stall")]
    pub stall: u64,
    /// Bytes per second below which a transfer is given up; 0 is never.
    #[serde(default = "low_speed")]
    pub low_speed: u64,
    /// Bytes per second above which the device does not read; 0 is no cap.
    #[serde(default)]
    pub max_rate: u64,
    /// `http://[user:password@]host:port`. Without it `https_proxy` and `no_proxy` of the environment count.
    pub proxy: Option<String>,
    /// Hosts, domains and networks that are reached without the proxy, as curl reads it.
    #[serde(default)]
    pub no_proxy: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// The certificate and those that lead to its authority, in PEM.
    pub certificate: PathBuf,
    /// Its private key, in PEM.
    pub key: Option<PathBuf>,
    /// Instead of the key, a command that signs with it, wherever it is: [`crate::fetch`] says how it is asked.
    #[serde(default)]
    pub signer: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// The hardware id that releases are signed for.
    pub hardware: String,
    pub channel: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Poll {
    /// Seconds between polls, before jitter.
    pub interval: u64,
}

/// What a download may cost. Sizes are bytes of bodies, as they are signed; 0 is no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Network {
    /// When releases may be fetched; empty: at any time.
    pub windows: Vec<Window>,
    /// What to do while the link is metered.
    pub when_metered: WhenMetered,
    pub metered: Metered,
    /// The most that one release may take.
    pub update_limit: u64,
    /// The most that all requests of a calendar month may take, before a release is fetched that would go beyond it.
    pub month_limit: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WhenMetered {
    #[default]
    Download,
    /// Fetch no release. Polls go on: an idle one is a few hundred bytes.
    Wait,
}

/// Whether the link is metered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Metered {
    /// NetworkManager knows; without it, it is not.
    #[default]
    Ask,
    Yes,
    No,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Install {
    pub reboot: Reboot,
    /// When the device may be taken down; empty: at any time.
    pub windows: Vec<Window>,
    /// How the device is rebooted.
    pub reboot_command: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reboot {
    /// As soon as a release is ready.
    Now,
    /// When an operator says `offshoot update`.
    Manual,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BootloaderConfig {
    pub kind: BootloaderKind,
    /// GRUB: the directory of the boot environment.
    pub environment: PathBuf,
    /// U-Boot: who counts the boots of a trial.
    pub count: CountBy,
    /// U-Boot: the file that says where its environment is.
    pub config: PathBuf,
    /// U-Boot: arm a trial although the environment has one copy, which a power cut during a write destroys.
    pub accept_single: bool,
    /// How many boots a release gets to prove itself.
    pub tries: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BootloaderKind {
    Grub,
    Uboot,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CountBy {
    /// The boot script.
    Script,
    /// U-Boot: CONFIG_BOOTCOUNT_LIMIT and CONFIG_BOOTCOUNT_ENV.
    Bootcount,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Health {
    /// Seconds that one check may take.
    pub check_timeout: u64,
    /// Seconds that all checks together may take.
    pub timeout: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Paths {
    pub state: PathBuf,
    pub run: PathBuf,
    pub root_metadata: PathBuf,
    pub deployer: PathBuf,
    /// What writes GRUB's configuration when libostree deploys.
    pub bootloader_generator: PathBuf,
    pub boot: PathBuf,
    /// The running system's root directory.
    pub root: PathBuf,
    /// Where libostree finds its deployments; it takes `/` for the running system.
    pub sysroot: PathBuf,
    pub kernel_command_line: PathBuf,
    /// The kernel's id of this boot.
    pub boot_id: PathBuf,
    /// The watchdog that resets a unit that hangs, in sysfs.
    pub watchdog_class: PathBuf,
    /// The lock that fw_printenv and fw_setenv take.
    pub uboot_lock: PathBuf,
    pub health: Vec<PathBuf>,
}

impl Default for Poll {
    fn default() -> Self {
        Self { interval: 3600 }
    }
}

impl Default for Install {
    fn default() -> Self {
        Self {
            reboot: Reboot::Now,
            windows: Vec::new(),
            reboot_command: vec!["systemctl".to_owned(), "reboot".to_owned()],
        }
    }
}

impl Default for BootloaderConfig {
    fn default() -> Self {
        Self {
            kind: BootloaderKind::Grub,
            environment: "/efi/offshoot".into(),
            count: CountBy::Script,
            config: "/etc/fw_env.config".into(),
            accept_single: false,
            tries: 3,
        }
    }
}

impl Default for Health {
    fn default() -> Self {
        Self {
            check_timeout: 30,
            timeout: 120,
        }
    }
}

impl Default for Paths {
    fn default() -> Self {
        Self {
            state: "/var/lib/offshoot".into(),
            run: "/run/offshoot".into(),
            root_metadata: "/usr/lib/offshoot/root.json".into(),
            deployer: "/usr/libexec/offshoot-deployer".into(),
            bootloader_generator: "/usr/lib/ostree/ostree-grub-generator".into(),
            boot: "/boot".into(),
            root: "/".into(),
            sysroot: "/".into(),
            kernel_command_line: "/proc/cmdline".into(),
            boot_id: "/proc/sys/kernel/random/boot_id".into(),
            watchdog_class: "/sys/class/watchdog/watchdog0".into(),
            uboot_lock: "/var/lock/fw_printenv.lock".into(),
            health: vec![
                "/usr/lib/offshoot/health".into(),
                "/etc/offshoot/health".into(),
            ],
        }
    }
}

fn stall() -> u64 {
    30
}

fn low_speed() -> u64 {
    32
}

impl Config {
    /// The image's configuration and the operator's over it, below `root`.
    pub fn load(root: &Path) -> Result<Self> {
        let files = [
            root.join("usr/lib/offshoot/config.toml"),
            root.join("etc/offshoot/config.toml"),
        ];
        let mut texts = Vec::new();
        for path in &files {
            match fs::read_to_string(path) {
                Ok(text) => texts.push((path.display().to_string(), text)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    return Err(error).with_context(|| format!("reading {}", path.display()));
                }
            }
        }
        let [image, operator] = files.map(|path| path.display().to_string());
        if texts.is_empty() {
            bail!(
                "there is no configuration: write {operator} (or ship {image}) with [server] url and [device] hardware, channel"
            );
        }
        Self::parse(&texts)
    }

    /// Texts, each with the name of its file; a later one overrides the one before, key by key.
    pub fn parse(texts: &[(String, String)]) -> Result<Self> {
        let mut merged = toml::Table::new();
        for (file, text) in texts {
            let table = text
                .parse::<toml::Table>()
                .with_context(|| format!("reading {file}"))?;
            overlay(&mut merged, table);
        }
        let files: Vec<_> = texts.iter().map(|(file, _)| file.as_str()).collect();
        let config: Self = merged
            .try_into()
            .with_context(|| format!("reading {}", files.join(" and ")))?;
        config
            .check()
            .with_context(|| format!("in {}", files.join(" or ")))?;
        Ok(config)
    }

    pub fn bootloader(&self) -> Bootloader {
        match self.bootloader.kind {
            BootloaderKind::Grub => Bootloader::Grub {
                environment: self.bootloader.environment.clone(),
                boot: self.paths.boot.clone(),
            },
            BootloaderKind::Uboot => Bootloader::Uboot(Uboot {
                config: self.bootloader.config.clone(),
                lock: self.paths.uboot_lock.clone(),
                count: match self.bootloader.count {
                    CountBy::Script => Count::Script,
                    CountBy::Bootcount => Count::Bootcount,
                },
                accept_single: self.bootloader.accept_single,
                boot: self.paths.boot.clone(),
                kernel_command_line: self.paths.kernel_command_line.clone(),
            }),
        }
    }

    pub fn poll_interval(&self) -> Duration {
        Duration::from_secs(self.poll.interval)
    }

    fn check(&self) -> Result<()> {
        let ranges = [
            (
                "poll.interval",
                self.poll.interval,
                1,
                7 * 24 * 3600,
                "seconds",
            ),
            ("server.stall", self.server.stall, 1, 3600, "seconds"),
            (
                "bootloader.tries",
                self.bootloader.tries.into(),
                1,
                9,
                "boots",
            ),
            (
                "health.check_timeout",
                self.health.check_timeout,
                1,
                3600,
                "seconds",
            ),
            ("health.timeout", self.health.timeout, 1, 3600, "seconds"),
        ];
        for (key, value, least, most, unit) in ranges {
            if !(least..=most).contains(&value) {
                bail!("{key} = {value} is out of range: {least} to {most} {unit}");
            }
        }
        if self.install.reboot_command.is_empty() {
            bail!("install.reboot_command is empty: name the program that reboots the device");
        }
        Ok(())
    }
}

fn overlay(under: &mut toml::Table, over: toml::Table) {
    for (key, value) in over {
        match (under.get_mut(&key), value) {
            (Some(toml::Value::Table(under)), toml::Value::Table(over)) => overlay(under, over),
            (_, value) => {
                under.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(image: &str, operator: &str) -> Result<Config> {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in [("usr/lib/offshoot", image), ("etc/offshoot", operator)] {
            fs::create_dir_all(root.path().join(path)).unwrap();
            fs::write(root.path().join(path).join("config.toml"), text).unwrap();
        }
        Config::load(root.path())
    }

    const IMAGE: &str = "[server]\nurl = 'https://a/'\n[device]\nhardware = 'x'\nchannel = 'stable'\n[poll]\ninterval = 60\n";

    #[test]
    fn the_operator_overrides_the_image_key_by_key() {
        let config = load(IMAGE, "[device]\nchannel = 'beta'\n").unwrap();
        assert_eq!(
            (
                config.device.hardware.as_str(),
                config.device.channel.as_str()
            ),
            ("x", "beta")
        );
        assert_eq!((config.poll.interval, config.bootloader.tries), (60, 3));
    }

    #[test]
    fn a_uboot_is_configured_by_its_kind_who_counts_and_where_the_environment_is() {
        let operator = "[bootloader]\nkind = 'uboot'\ncount = 'bootcount'\nconfig = '/usr/lib/fw_env.config'\n";
        let Bootloader::Uboot(uboot) = load(IMAGE, operator).unwrap().bootloader() else {
            panic!("not U-Boot");
        };
        assert_eq!(
            (uboot.count, uboot.accept_single),
            (Count::Bootcount, false)
        );
        assert_eq!(uboot.config, Path::new("/usr/lib/fw_env.config"));
        assert_eq!(uboot.boot, Path::new("/boot"));
    }

    #[test]
    fn an_unknown_key_a_wrong_type_and_an_impossible_value_are_errors_that_name_the_key() {
        for (operator, key) in [
            ("[device]\nchanel = 'beta'\n", "chanel"),
            ("[poll]\ninterval = 'soon'\n", "interval"),
            ("[poll]\ninterval = 0\n", "poll.interval = 0"),
            ("[bootloader]\ntries = 10\n", "bootloader.tries = 10"),
            ("[install]\nreboot_command = []\n", "install.reboot_command"),
        ] {
            let error = format!("{:#}", load(IMAGE, operator).unwrap_err());
            assert!(
                error.contains(key) && error.contains("etc/offshoot/config.toml"),
                "{error}"
            );
        }
    }
}
