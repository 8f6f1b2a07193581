//! A commit as a repository has it: every path with its owner, mode and extended attributes, and the content of each file once.
//!
//! What is read is checked against its digests, from the commit's checksum down. Nothing is written to the repository.

use std::collections::BTreeMap;
use std::fs::{self, File, FileTimes};
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use anyhow::{Context as _, Result, bail, ensure};
use offshoot::commit::Commit;
use ostree::gio::{self, Cancellable, prelude::*};
use ostree::glib::{self, VariantDict};
use ostree::{ObjectType, Repo};

const NONE: Option<&Cancellable> = None;

/// What an inode has beside its content.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Attributes {
    pub uid: u32,
    pub gid: u32,
    /// Without the type.
    pub mode: u32,
    /// By name, without the NUL that OSTree stores.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

#[derive(Clone, Debug)]
pub(super) enum Entry {
    Directory(Directory),
    /// A regular file or a symbolic link: the checksum of its object.
    File(String),
}

#[derive(Clone, Debug, Default)]
pub(super) struct Directory {
    pub attributes: Attributes,
    pub entries: BTreeMap<String, Entry>,
}

/// A commit, and how to get at what is in it.
pub(super) struct Tree {
    pub commit: Commit,
    pub version: Option<String>,
    /// When it was made, in seconds since 1970.
    pub timestamp: u64,
    pub root: Directory,
    /// The attributes of each file, by its checksum.
    pub files: BTreeMap<String, Attributes>,
    /// Commit, directories and their attributes.
    metadata: BTreeMap<String, (&'static str, glib::Variant)>,
    repo: Repo,
}

impl Tree {
    pub(super) fn read(repo_path: &Path, rev: &str) -> Result<Self> {
        let repo = Repo::new(&gio::File::for_path(repo_path));
        repo.open(NONE)
            .with_context(|| format!("opening {}", repo_path.display()))?;
        let checksum = repo.resolve_rev(rev, true)?.with_context(|| {
            format!(
                "{rev} is neither a branch of {} nor a commit in it",
                repo_path.display()
            )
        })?;
        let mut reader = Reader {
            repo: &repo,
            files: BTreeMap::new(),
            metadata: BTreeMap::new(),
        };
        let commit = reader.metadata(ObjectType::Commit, &checksum)?;
        let root = reader.directory(&digest(&commit, 6)?, &digest(&commit, 7)?)?;
        let Reader {
            files, metadata, ..
        } = reader;
        let dictionary = VariantDict::new(Some(&commit.child_value(0)));
        Ok(Self {
            commit: checksum.parse()?,
            version: dictionary.lookup::<String>("version").unwrap_or(None),
            timestamp: ostree::commit_get_timestamp(&commit),
            root,
            files,
            metadata,
            repo,
        })
    }

    /// What is at a path below the root, if anything is.
    pub(super) fn find(&self, path: &str) -> Option<&Entry> {
        let mut at = &self.root;
        let mut segments = path.split('/').peekable();
        while let Some(segment) = segments.next() {
            let entry = at.entries.get(segment)?;
            match (entry, segments.peek()) {
                (found, None) => return Some(found),
                (Entry::Directory(directory), Some(_)) => at = directory,
                (Entry::File(_), Some(_)) => return None,
            }
        }
        None
    }

    /// The content of a regular file.
    pub(super) fn content(&self, path: &str) -> Result<Option<Vec<u8>>> {
        let Some(Entry::File(checksum)) = self.find(path) else {
            return Ok(None);
        };
        let (Some(stream), _, _) = self.repo.load_file(checksum, NONE)? else {
            return Ok(None);
        };
        let mut content = Vec::new();
        io::copy(&mut stream.into_read(), &mut content)
            .with_context(|| format!("reading {path} of commit {}", self.commit))?;
        Ok(Some(content))
    }

    /// Puts every object where a repository in `objects` keeps it: files as they are, whoever owns them.
    pub(super) fn copy_objects(&self, objects: &Path) -> Result<()> {
        for (checksum, (suffix, variant)) in &self.metadata {
            let path = loose(objects, checksum, suffix)?;
            fs::write(&path, variant.data())
                .with_context(|| format!("writing {}", path.display()))?;
        }
        if let Some(detached) = self
            .repo
            .read_commit_detached_metadata(&self.commit.to_string(), NONE)?
        {
            let path = loose(objects, &self.commit.to_string(), "commitmeta")?;
            fs::write(&path, detached.data())
                .with_context(|| format!("writing {}", path.display()))?;
        }
        for checksum in self.files.keys() {
            let path = loose(objects, checksum, "file")?;
            self.copy_file(checksum, &path)
                .with_context(|| format!("writing {}", path.display()))?;
        }
        Ok(())
    }

    fn copy_file(&self, checksum: &str, path: &Path) -> Result<()> {
        let (stream, info, _) = self.repo.load_file(checksum, NONE)?;
        let Some(stream) = stream else {
            let target = info
                .symlink_target()
                .context("the object is neither a file nor a link")?;
            return symlink(target, path).map_err(Into::into);
        };
        let mut file = File::create_new(path)?;
        io::copy(&mut stream.into_read(), &mut file)?;
        // libostree gives all files this time, so that they are equal wherever they are deployed.
        file.set_times(
            FileTimes::new()
                .set_accessed(UNIX_EPOCH)
                .set_modified(UNIX_EPOCH),
        )?;
        Ok(())
    }
}

/// Collects a commit's tree.
struct Reader<'a> {
    repo: &'a Repo,
    files: BTreeMap<String, Attributes>,
    metadata: BTreeMap<String, (&'static str, glib::Variant)>,
}

impl Reader<'_> {
    fn metadata(&mut self, kind: ObjectType, checksum: &str) -> Result<glib::Variant> {
        let suffix = match kind {
            ObjectType::Commit => "commit",
            ObjectType::DirTree => "dirtree",
            _ => "dirmeta",
        };
        if let Some((_, variant)) = self.metadata.get(checksum) {
            return Ok(variant.clone());
        }
        self.check(kind, checksum)?;
        let variant = self.repo.load_variant(kind, checksum)?;
        self.metadata
            .insert(checksum.to_owned(), (suffix, variant.clone()));
        Ok(variant)
    }

    fn check(&self, kind: ObjectType, checksum: &str) -> Result<()> {
        self.repo
            .fsck_object(kind, checksum, NONE)
            .with_context(|| {
                format!("object {checksum} is missing or damaged: compose or pull the commit again")
            })
    }

    fn directory(&mut self, tree: &str, meta: &str) -> Result<Directory> {
        let meta = self.metadata(ObjectType::DirMeta, meta)?;
        let tree = self.metadata(ObjectType::DirTree, tree)?;
        let number = |n| meta.child_value(n).get::<u32>().map(u32::from_be);
        let (Some(uid), Some(gid), Some(mode)) = (number(0), number(1), number(2)) else {
            bail!("an object of a directory's attributes is not one");
        };
        let attributes = Attributes {
            uid,
            gid,
            mode: mode & 0o7777,
            xattrs: xattrs(&meta.child_value(3))?,
        };
        let mut entries = BTreeMap::new();
        for file in tree.child_value(0).iter() {
            let checksum = digest(&file, 1)?;
            self.file(&checksum)?;
            entries.insert(name(&file)?, Entry::File(checksum));
        }
        for directory in tree.child_value(1).iter() {
            let inner = self.directory(&digest(&directory, 1)?, &digest(&directory, 2)?)?;
            entries.insert(name(&directory)?, Entry::Directory(inner));
        }
        Ok(Directory {
            attributes,
            entries,
        })
    }

    fn file(&mut self, checksum: &str) -> Result<()> {
        if self.files.contains_key(checksum) {
            return Ok(());
        }
        self.check(ObjectType::File, checksum)?;
        let (_, info, extended) = self.repo.load_file(checksum, NONE)?;
        let attributes = Attributes {
            uid: info.attribute_uint32("unix::uid"),
            gid: info.attribute_uint32("unix::gid"),
            mode: info.attribute_uint32("unix::mode") & 0o7777,
            xattrs: xattrs(&extended)?,
        };
        self.files.insert(checksum.to_owned(), attributes);
        Ok(())
    }
}

fn loose(objects: &Path, checksum: &str, suffix: &str) -> Result<PathBuf> {
    let (first, rest) = checksum.split_at(2);
    let directory = objects.join(first);
    fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
    Ok(directory.join(format!("{rest}.{suffix}")))
}

fn name(entry: &glib::Variant) -> Result<String> {
    let name = entry.child_value(0);
    let name = name.str().context("an entry of a directory has no name")?;
    // debugfs takes its orders line by line.
    ensure!(
        !name.is_empty() && !name.contains(['\n', '\r', '\0']) && name != "." && name != "..",
        "{name:?} is the name of a file: an image cannot be made with it, rename the file"
    );
    Ok(name.to_owned())
}

fn digest(variant: &glib::Variant, at: usize) -> Result<String> {
    let bytes = variant.child_value(at);
    let bytes = bytes.fixed_array::<u8>()?;
    let bytes: &[u8; 32] = bytes.try_into().context("a digest is not one")?;
    Ok(offshoot::commit::Sha256::from_bytes(*bytes).to_string())
}

/// `a(ayay)`: names end in NUL.
fn xattrs(variant: &glib::Variant) -> Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut all = BTreeMap::new();
    for pair in variant.iter() {
        let (name, value) = (pair.child_value(0), pair.child_value(1));
        let name = name.fixed_array::<u8>()?;
        let name = name.strip_suffix(b"\0").unwrap_or(name);
        all.insert(name.to_vec(), value.fixed_array::<u8>()?.to_vec());
    }
    Ok(all)
}
