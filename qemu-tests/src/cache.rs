//! What takes long to build and can be kept: the base OS, commits, disk images.
//!
//! Owns `$OFFSHOOT_CACHE` (by default `~/.cache/offshoot`). An entry is a directory named by what it is and by a digest of
//! everything it was built from. It is built beside its place, written out to the disk and then renamed, so that an
//! entry that can be seen is whole, whatever cut the power in between.
//! Entries are read-only by convention; nothing checks that.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context as _, Result};
use offshoot::commit::Sha256;

use crate::run;

/// How many entries of one name are kept when another one is built.
const KEPT: usize = 3;

pub struct Cache {
    root: PathBuf,
}

/// Collects everything that an entry is built from.
#[derive(Default)]
pub struct Ingredients(Vec<u8>);

impl Cache {
    /// The cache of this user.
    pub fn open() -> Result<Self> {
        let root = match std::env::var_os("OFFSHOOT_CACHE") {
            Some(root) => PathBuf::from(root),
            None => std::env::home_dir()
                .context("no home directory to cache in: set OFFSHOOT_CACHE")?
                .join(".cache/offshoot"),
        };
        fs::create_dir_all(&root).with_context(|| format!("creating {}", root.display()))?;
        Ok(Self { root })
    }

    /// The entry `name` made from `ingredients`; `make` fills its directory if there is none yet.
    pub fn entry(
        &self,
        name: &str,
        ingredients: Ingredients,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let key = Sha256::of(&ingredients.0).to_string();
        let entry = self.root.join(format!("{name}-{}", &key[..16]));
        // Two test processes that want the same entry build it once.
        let lock = File::create(self.root.join(format!("{name}.lock")))?;
        lock.lock()
            .with_context(|| format!("locking the cache for {name}"))?;
        if entry.is_dir() {
            // The age of its name is the time of its last use.
            File::open(&entry)?.set_modified(SystemTime::now())?;
            return Ok(entry);
        }
        let unfinished = tempfile::Builder::new()
            .prefix(&format!(".{name}-"))
            .tempdir_in(&self.root)?;
        // A temporary directory is private; in this one other users (apt's sandbox) read.
        fs::set_permissions(unfinished.path(), fs::Permissions::from_mode(0o755))?;
        make(unfinished.path())?;
        run!("sync", "--file-system", unfinished.path())?;
        fs::rename(unfinished.keep(), &entry)
            .with_context(|| format!("keeping {}", entry.display()))?;
        self.forget_all_but_the_latest(name)?;
        Ok(entry)
    }

    /// A temporary directory in the cache's file system, so that it can share the files of entries.
    pub fn scratch(&self) -> Result<tempfile::TempDir> {
        let directory = tempfile::Builder::new()
            .prefix(".scratch-")
            .tempdir_in(&self.root)?;
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
        Ok(directory)
    }

    fn forget_all_but_the_latest(&self, name: &str) -> Result<()> {
        let prefix = format!("{name}-");
        let mut entries = Vec::new();
        for entry in fs::read_dir(&self.root)? {
            let entry = entry?;
            if entry
                .file_name()
                .to_string_lossy()
                .strip_prefix(&prefix)
                .is_some_and(|key| key.len() == 16)
            {
                entries.push((entry.metadata()?.modified()?, entry.path()));
            }
        }
        entries.sort();
        entries.reverse();
        for (_, path) in entries.iter().skip(KEPT) {
            fs::remove_dir_all(path).with_context(|| format!("removing {}", path.display()))?;
        }
        Ok(())
    }
}

impl Ingredients {
    pub fn text(mut self, text: &str) -> Self {
        self.0
            .extend_from_slice(Sha256::of(text.as_bytes()).as_bytes());
        self
    }

    /// A file, or everything in a directory: names, kinds, execute bits, contents.
    pub fn path(mut self, path: &Path) -> Result<Self> {
        self.collect(path)
            .with_context(|| format!("reading {}", path.display()))?;
        Ok(self)
    }

    fn collect(&mut self, path: &Path) -> Result<()> {
        let metadata = fs::symlink_metadata(path)?;
        let name = path.file_name().unwrap_or_default();
        self.0.extend_from_slice(name.as_encoded_bytes());
        if metadata.is_symlink() {
            self.0.extend_from_slice(b"\0symlink\0");
            self.0
                .extend_from_slice(fs::read_link(path)?.as_os_str().as_encoded_bytes());
        } else if metadata.is_dir() {
            let mut children = fs::read_dir(path)?
                .map(|child| Ok(child?.path()))
                .collect::<Result<Vec<_>>>()?;
            children.sort();
            self.0.extend_from_slice(b"\0directory\0");
            for child in children {
                self.collect(&child)?;
            }
        } else {
            let executable = metadata.permissions().mode() & 0o111 != 0;
            self.0
                .extend_from_slice(if executable { b"\0x" } else { b"\0-" });
            self.0
                .extend_from_slice(Sha256::of(&fs::read(path)?).as_bytes());
        }
        self.0.push(0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache() -> (tempfile::TempDir, Cache) {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache {
            root: root.path().to_owned(),
        };
        (root, cache)
    }

    #[test]
    fn an_entry_is_made_once_and_again_when_an_ingredient_changes() {
        let (_root, cache) = cache();
        let entry = |text: &str| {
            let mut made = false;
            let path = cache.entry("thing", Ingredients::default().text(text), |directory| {
                made = true;
                Ok(fs::write(directory.join("content"), text)?)
            });
            (fs::read(path.unwrap().join("content")).unwrap(), made)
        };
        assert_eq!(entry("a"), (b"a".to_vec(), true));
        assert_eq!(entry("a"), (b"a".to_vec(), false));
        assert_eq!(entry("b"), (b"b".to_vec(), true));
        assert_eq!(entry("a"), (b"a".to_vec(), false));
    }

    #[test]
    fn an_entry_that_failed_half_way_is_never_seen() {
        let (root, cache) = cache();
        let half = cache.entry("thing", Ingredients::default(), |directory| {
            fs::write(directory.join("content"), "half")?;
            anyhow::bail!("cut")
        });
        assert!(half.is_err());
        let left: Vec<_> = fs::read_dir(root.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(left, ["thing.lock"]);
    }

    #[test]
    fn names_links_and_execute_bits_are_ingredients() {
        let root = tempfile::tempdir().unwrap();
        let tree = root.path().join("tree");
        let digest = || Ingredients::default().path(&tree).unwrap().0;
        fs::create_dir(&tree).unwrap();
        let mut seen = vec![digest()];
        let mut differs = |what: &str| {
            let now = digest();
            assert!(!seen.contains(&now), "{what} made no difference");
            seen.push(now);
        };
        fs::write(tree.join("a"), "1").unwrap();
        differs("a file");
        fs::write(tree.join("a"), "2").unwrap();
        differs("its content");
        fs::rename(tree.join("a"), tree.join("b")).unwrap();
        differs("its name");
        fs::set_permissions(tree.join("b"), fs::Permissions::from_mode(0o755)).unwrap();
        differs("its execute bit");
        std::os::unix::fs::symlink("b", tree.join("c")).unwrap();
        differs("a link");
    }

    #[test]
    fn only_the_latest_entries_are_kept() {
        let (root, cache) = cache();
        for text in ["a", "b", "c", "d", "e"] {
            cache
                .entry("thing", Ingredients::default().text(text), |_| Ok(()))
                .unwrap();
        }
        let entries = fs::read_dir(root.path()).unwrap().count();
        assert_eq!(entries, KEPT + 1, "with the lock file");
    }
}
