//! Boot loader entries to `grub.cfg`.
//!
//! libostree writes the entries (`loader.N/entries/*.conf`, the Boot Loader Specification's type 1) and runs `ostree-grub-generator -o
//! loader.N/grub.cfg` before it swaps `loader` to `loader.N`: entries and script change together or not at all. The generated file
//! holds the whole counting script, so nothing else on the device has to match it.
//!
//! Entries are data, not trusted text: every word of theirs reaches GRUB in single quotes.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

/// The first line of every configuration that counts. The number changes when the meaning of the environment does.
pub const MARKER: &str = "# offshoot boot protocol 1";

/// The decision, as GRUB script: it defines the function `offshoot_decide`, which reads `$offshoot_env` (a directory) and `$offshoot_entries`.
pub const COUNTER_CFG: &str = include_str!("grub/counter.cfg");

/// `grub.cfg` for the EFI system partition, in the directory that GRUB's image has as its prefix.
pub const ESP_CFG: &str = include_str!("grub/esp.cfg");

const BOOT_CFG: &str = include_str!("grub/boot.cfg");

/// What GRUB's image needs to run all of this.
pub const GRUB_MODULES: &[&str] = &[
    "part_gpt",
    "fat",
    "ext2",
    "normal",
    "configfile",
    "search",
    "search_label",
    "echo",
    "test",
    "true",
    "regexp",
    "loadenv",
    "linux",
    "reboot",
    "halt",
    "sleep",
    "minicmd",
    "serial",
    "terminal",
];

/// A boot loader entry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    pub title: String,
    /// The greatest is booted by default.
    pub version: i64,
    pub linux: String,
    pub initrd: Option<String>,
    pub devicetree: Option<String>,
    pub options: String,
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("reading {path}: {error}")]
    Read { path: String, error: std::io::Error },
    #[error("{path} has no {key:?} line: libostree writes one in every entry")]
    Lacks { path: String, key: &'static str },
    #[error("{path}: version {value:?} is not a number")]
    Version { path: String, value: String },
    #[error("{path} has no boot entry (*.conf): a configuration without one would boot nothing")]
    Empty { path: String },
}

/// The entries of a `loader.N/entries` directory, the default first.
pub fn read_entries(directory: &Path) -> Result<Vec<Entry>, ConfigError> {
    let read = |path: &Path, error| ConfigError::Read {
        path: path.display().to_string(),
        error,
    };
    let mut entries = Vec::new();
    for found in fs::read_dir(directory).map_err(|error| read(directory, error))? {
        let path = found.map_err(|error| read(directory, error))?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "conf")
        {
            let text = fs::read_to_string(&path).map_err(|error| read(&path, error))?;
            entries.push(Entry::parse(&text, &path.display().to_string())?);
        }
    }
    if entries.is_empty() {
        return Err(ConfigError::Empty {
            path: directory.display().to_string(),
        });
    }
    entries.sort_by_key(|entry| std::cmp::Reverse(entry.version));
    Ok(entries)
}

impl Entry {
    /// Reads one entry; `path` is for errors.
    pub fn parse(text: &str, path: &str) -> Result<Self, ConfigError> {
        let mut entry = Self::default();
        let mut version = None;
        for line in text.lines().map(str::trim) {
            let (key, value) = line.split_once([' ', '\t']).unwrap_or((line, ""));
            let value = value.trim();
            match key {
                "title" => entry.title = value.to_owned(),
                "version" => version = Some(value),
                "linux" => entry.linux = value.to_owned(),
                "initrd" => entry.initrd = Some(value.to_owned()),
                "devicetree" => entry.devicetree = Some(value.to_owned()),
                "options" => entry.options = value.to_owned(),
                _ => {}
            }
        }
        let path = || path.to_owned();
        if entry.linux.is_empty() {
            return Err(ConfigError::Lacks {
                path: path(),
                key: "linux",
            });
        }
        let version = version.ok_or_else(|| ConfigError::Lacks {
            path: path(),
            key: "version",
        })?;
        let wrong = |_| ConfigError::Version {
            path: path(),
            value: version.to_owned(),
        };
        entry.version = version.parse().map_err(wrong)?;
        Ok(entry)
    }
}

/// The configuration that boots `entries`, the default first. `prefix` is where their paths begin on GRUB's boot partition.
pub fn grub_cfg(entries: &[Entry], prefix: &str) -> String {
    let mut text =
        format!("{MARKER}\n# Written by ostree-grub-generator, and again with every deployment.\n");
    let _ = write!(
        text,
        "set offshoot_env=\"($esp)/offshoot\"\nset offshoot_entries={}\n\n{COUNTER_CFG}\noffshoot_decide\n\nfunction offshoot_boot {{\n",
        entries.len()
    );
    for (n, entry) in entries.iter().enumerate() {
        let file = |path: &str| quote(&format!("{prefix}{path}"));
        let options = entry
            .options
            .split_ascii_whitespace()
            .map(quote)
            .collect::<Vec<_>>()
            .join(" ");
        let _ = write!(
            text,
            "  if [ \"$1\" = {n} ]; then\n    echo {}\n",
            quote(&entry.title)
        );
        let _ = writeln!(
            text,
            "    if linux {} {options} $offshoot_arguments; then",
            file(&entry.linux)
        );
        let mut depth = 1;
        for (command, path) in [("initrd", &entry.initrd), ("devicetree", &entry.devicetree)] {
            if let Some(path) = path {
                let _ = writeln!(text, "    if {command} {}; then", file(path));
                depth += 1;
            }
        }
        let _ = writeln!(
            text,
            "      boot\n    {}\n  fi",
            "fi; ".repeat(depth).trim_end_matches("; ")
        );
    }
    let _ = write!(text, "  return 1\n}}\n\n{BOOT_CFG}");
    text
}

/// One word for GRUB's script, whatever is in it. GRUB has no escape inside single quotes.
fn quote(word: &str) -> String {
    let word: String = word
        .chars()
        .filter(|character| !character.is_control())
        .collect();
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONF: &str = "title Debian 13 (ostree:0)\nversion 2\noptions root=LABEL=root rw ostree=/ostree/boot.1/d/c/0\n\
                        linux /ostree/d-c/vmlinuz-6\ninitrd /ostree/d-c/initramfs-6.img\naboot x\n";

    #[test]
    fn the_greatest_version_is_the_default() {
        let temp = tempfile::tempdir().unwrap();
        for version in [9, 10, 2] {
            let text = CONF.replace("version 2", &format!("version {version}"));
            fs::write(temp.path().join(format!("ostree-{version}.conf")), text).unwrap();
        }
        fs::write(temp.path().join("notes.txt"), "not an entry").unwrap();
        let versions: Vec<_> = read_entries(temp.path())
            .unwrap()
            .iter()
            .map(|entry| entry.version)
            .collect();
        assert_eq!(versions, [10, 9, 2]);
    }

    #[test]
    fn an_entry_without_kernel_or_version_and_a_directory_without_entries_are_errors() {
        let lacks = |text: &str| match Entry::parse(text, "x.conf") {
            Err(ConfigError::Lacks { key, .. }) => key,
            other => panic!("{other:?}"),
        };
        assert_eq!(
            (lacks("version 1\n"), lacks("linux /v\n")),
            ("linux", "version")
        );
        assert!(matches!(
            Entry::parse("linux /v\nversion x\n", "x.conf"),
            Err(ConfigError::Version { .. })
        ));
        let temp = tempfile::tempdir().unwrap();
        assert!(matches!(
            read_entries(temp.path()),
            Err(ConfigError::Empty { .. })
        ));
    }

    #[test]
    fn every_word_of_an_entry_reaches_grub_as_data() {
        let mut entry = Entry::parse(CONF, "x.conf").unwrap();
        entry.title = "it's $prefix\u{7}; reboot".to_owned();
        let text = grub_cfg(&[entry], "/boot");
        assert_eq!(text.lines().next(), Some(MARKER));
        assert!(text.contains("echo 'it'\\''s $prefix; reboot'\n"));
        assert!(text.contains(
            "if linux '/boot/ostree/d-c/vmlinuz-6' 'root=LABEL=root' 'rw' 'ostree=/ostree/boot.1/d/c/0' $offshoot_arguments; then\n"
        ));
        assert!(text.contains(
            "if initrd '/boot/ostree/d-c/initramfs-6.img'; then\n      boot\n    fi; fi\n"
        ));
    }
}
