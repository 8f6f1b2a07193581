//! A root file system, from a directory or a tar, into objects of the repository and a tree of their checksums.
//!
//! Reads a tar once, from its beginning to its end, and unpacks nothing: owners, modes and extended attributes are what its headers say,
//! whoever runs this. What a commit never has (what is in /var, /run, …) is not stored; what only the layout drops may be, and is for
//! `ostree prune`. No file is held in memory as a whole but small ones.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Seek as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use super::EMPTY;
use super::tar::{Entry, EntryType, Reader};
use anyhow::{Context as _, Result, bail, ensure};
use ostree::gio::{self, Cancellable};
use ostree::glib::{self, prelude::*};
use ostree::{ObjectType, Repo};

const NONE: Option<&Cancellable> = None;

/// Larger files are streamed.
const SMALL: u64 = 1 << 20;

/// Where dpkg's database may be, the usual place first: a tree whose /var is empty keeps it below /usr.
const DATABASES: [&str; 3] = [
    "var/lib/dpkg/status",
    "usr/share/dpkg/database/status",
    "usr/lib/dpkg/status",
];

/// A database larger than this is none.
const DATABASE_LIMIT: u64 = 64 << 20;

/// In /boot only these may be taken from there.
const KERNELS: [&str; 3] = ["vmlinuz-", "initrd.img-", "initramfs-"];

#[derive(Clone, Debug)]
pub(super) struct Directory {
    /// The checksum of owner, mode and extended attributes.
    pub meta: String,
    pub entries: BTreeMap<String, Node>,
}

/// What is stored, by its checksum.
#[derive(Clone, Debug)]
pub(super) enum Node {
    Directory(Directory),
    File(String),
    Link { checksum: String },
}

#[derive(Debug)]
pub(super) struct Source {
    pub root: Directory,
    /// dpkg's database.
    pub packages: Option<String>,
    /// Entries directly below /var.
    pub left_out: usize,
}

/// What a file has beside its name and content.
struct Attributes {
    uid: u32,
    gid: u32,
    /// With the type.
    mode: u32,
    xattrs: glib::Variant,
}

/// A directory, a tar, or `-` for a tar on standard input.
pub(super) fn read(storage: &Storage, tree: &Path) -> Result<Source> {
    if tree == Path::new("-") {
        return Tar::new(storage)?.read(io::stdin().lock(), "standard input");
    }
    if tree.is_dir() {
        return from_directory(storage, tree);
    }
    let mut file = File::open(tree).with_context(|| format!("reading {}", tree.display()))?;
    let mut magic = [0; 6];
    let length = file
        .read(&mut magic)
        .with_context(|| format!("reading {}", tree.display()))?;
    let program = match &magic[..length] {
        [0x1f, 0x8b, ..] => Some("gzip"),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => Some("xz"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Some("zstd"),
        _ => None,
    };
    let tree = tree.display().to_string();
    if let Some(program) = program {
        bail!(
            "{tree} is compressed: pipe it, `{program} -dc {tree} | offshoot-fleet compose --tree - …`"
        );
    }
    file.rewind().with_context(|| format!("reading {tree}"))?;
    Tar::new(storage)?.read(io::BufReader::with_capacity(1 << 16, file), &tree)
}

/// Writes objects into the repository's transaction.
pub(super) struct Storage<'a> {
    repo: &'a Repo,
    /// For files without a name.
    scratch: PathBuf,
}

impl<'a> Storage<'a> {
    pub(super) fn new(repo: &'a Repo, scratch: PathBuf) -> Self {
        Self { repo, scratch }
    }

    /// root's, and readable.
    pub(super) fn plain_directory(&self) -> Result<String> {
        self.directory(&plain(0o040_755))
    }

    pub(super) fn plain_file(&self, content: &[u8]) -> Result<Node> {
        self.small(&plain(0o100_644), content)
    }

    pub(super) fn link(&self, target: &str) -> Result<Node> {
        self.symlink(&plain(0o120_777), target)
    }

    fn directory(&self, attributes: &Attributes) -> Result<String> {
        let info = attributes.info();
        let object = ostree::create_directory_metadata(&info, Some(&attributes.xattrs));
        let checksum = self
            .repo
            .write_metadata(ObjectType::DirMeta, None, &object, NONE)?;
        Ok(checksum.to_hex())
    }

    fn symlink(&self, attributes: &Attributes, target: &str) -> Result<Node> {
        let Attributes {
            uid, gid, xattrs, ..
        } = attributes;
        let checksum = self
            .repo
            .write_symlink(None, *uid, *gid, Some(xattrs), target, NONE)?;
        Ok(Node::Link {
            checksum: checksum.into(),
        })
    }

    fn small(&self, attributes: &Attributes, content: &[u8]) -> Result<Node> {
        let Attributes {
            uid,
            gid,
            mode,
            xattrs,
        } = attributes;
        let xattrs = Some(xattrs);
        let checksum = self
            .repo
            .write_regfile_inline(None, *uid, *gid, *mode, xattrs, content, NONE)?;
        Ok(Node::File(checksum.into()))
    }

    /// A file of any size, from where `file` is.
    fn large(&self, attributes: &Attributes, length: u64, file: File) -> Result<Node> {
        let info = attributes.info();
        info.set_file_type(gio::FileType::Regular);
        info.set_size(i64::try_from(length)?);
        let content = gio::ReadInputStream::new(file);
        let (object, length) =
            ostree::raw_file_to_content_stream(&content, &info, Some(&attributes.xattrs), NONE)?;
        let checksum = self.repo.write_content(None, &object, length, NONE)?;
        Ok(Node::File(checksum.to_hex()))
    }
}

impl Attributes {
    fn info(&self) -> gio::FileInfo {
        let info = gio::FileInfo::new();
        info.set_attribute_uint32("unix::uid", self.uid);
        info.set_attribute_uint32("unix::gid", self.gid);
        info.set_attribute_uint32("unix::mode", self.mode);
        info
    }
}

fn plain(mode: u32) -> Attributes {
    Attributes {
        uid: 0,
        gid: 0,
        mode,
        xattrs: variant(Vec::new()),
    }
}

/// Extended attributes as OSTree stores them: `a(ayay)`, names with their final NUL, sorted.
fn variant(mut xattrs: Vec<(Vec<u8>, Vec<u8>)>) -> glib::Variant {
    xattrs.sort();
    xattrs.to_variant()
}

impl Directory {
    /// The directory of this name in it, made if it is not there.
    pub(super) fn directory(&mut self, name: &str, empty: impl Fn() -> Self) -> Result<&mut Self> {
        let entry = self.entries.entry(name.to_owned());
        match entry.or_insert_with(|| Node::Directory(empty())) {
            Node::Directory(directory) => Ok(directory),
            Node::File(_) | Node::Link { .. } => {
                bail!("{name} is not a directory, and should be one")
            }
        }
    }
}

/// Whether what is below a directory of the root is stored.
fn is_stored(segments: &[&str]) -> bool {
    match segments {
        ["boot", name] => KERNELS.iter().any(|kernel| name.starts_with(kernel)),
        [top, _, ..] => !EMPTY.contains(top),
        _ => true,
    }
}

fn from_directory(storage: &Storage, path: &Path) -> Result<Source> {
    let mut packages = None;
    for database in DATABASES {
        let path = path.join(database);
        match fs::read_to_string(&path) {
            Ok(text) => {
                packages = Some(text);
                break;
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) => {}
            Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
        }
    }
    let var = path.join("var");
    let left_out = if var.is_dir() {
        entries(&var)?.len()
    } else {
        0
    };
    let walk = Walk {
        storage,
        root: path,
    };
    Ok(Source {
        root: walk.directory(path, &[])?,
        packages,
        left_out,
    })
}

struct Walk<'a> {
    storage: &'a Storage<'a>,
    root: &'a Path,
}

impl Walk<'_> {
    fn directory(&self, path: &Path, segments: &[&str]) -> Result<Directory> {
        let storing = || format!("storing {}", path.display());
        let meta = self
            .storage
            .directory(&attributes(path)?)
            .with_context(storing)?;
        let mut held = BTreeMap::new();
        for path in entries(path)? {
            let name = name(&path)?;
            let segments = [segments, &[name]].concat();
            if is_stored(&segments) {
                held.insert(name.to_owned(), self.entry(&path, &segments)?);
            }
        }
        Ok(Directory {
            meta,
            entries: held,
        })
    }

    fn entry(&self, path: &Path, segments: &[&str]) -> Result<Node> {
        let kind = metadata(path)?.file_type();
        if kind.is_dir() {
            return Ok(Node::Directory(self.directory(path, segments)?));
        }
        let storing = || format!("storing {}", path.display());
        if kind.is_symlink() {
            let target = fs::read_link(path).with_context(storing)?;
            let target = utf8(target.as_os_str().as_bytes())?;
            return self
                .storage
                .symlink(&attributes(path)?, target)
                .with_context(storing);
        }
        if !kind.is_file() {
            let what = if kind.is_socket() {
                "a socket"
            } else {
                "a device or pipe"
            };
            let path = path.strip_prefix(self.root).unwrap_or(path);
            bail!(
                "{} is {what}: an OSTree commit cannot hold it, make it at boot",
                path.display()
            );
        }
        let attributes = attributes(path)?;
        let store = || -> Result<Node> {
            let mut file = File::open(path)?;
            let length = file.metadata()?.len();
            if length > SMALL {
                return self.storage.large(&attributes, length, file);
            }
            let mut content = Vec::new();
            file.read_to_end(&mut content)?;
            self.storage.small(&attributes, &content)
        };
        store().with_context(storing)
    }
}

fn attributes(path: &Path) -> Result<Attributes> {
    let meta = metadata(path)?;
    let read = || -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let mut all = Vec::new();
        for name in xattr::list(path)? {
            if let Some(value) = xattr::get(path, &name)? {
                all.push(([name.as_bytes(), b"\0"].concat(), value));
            }
        }
        Ok(all)
    };
    let xattrs =
        read().with_context(|| format!("reading extended attributes of {}", path.display()))?;
    Ok(Attributes {
        uid: meta.uid(),
        gid: meta.gid(),
        mode: meta.mode(),
        xattrs: variant(xattrs),
    })
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let read = || -> io::Result<Vec<PathBuf>> {
        fs::read_dir(directory)?
            .map(|entry| Ok(entry?.path()))
            .collect()
    };
    read().with_context(|| format!("reading {}", directory.display()))
}

fn metadata(path: &Path) -> Result<Metadata> {
    fs::symlink_metadata(path).with_context(|| format!("reading {}", path.display()))
}

fn name(path: &Path) -> Result<&str> {
    utf8(path.file_name().unwrap_or_default().as_bytes())
}

fn utf8(name: &[u8]) -> Result<&str> {
    std::str::from_utf8(name).with_context(|| {
        format!(
            "{:?} is not UTF-8, which an OSTree commit needs",
            String::from_utf8_lossy(name)
        )
    })
}

struct Tar<'a> {
    storage: &'a Storage<'a>,
    plain: String,
    root: Directory,
    packages: BTreeMap<usize, String>,
    left_out: BTreeSet<String>,
}

impl<'a> Tar<'a> {
    fn new(storage: &'a Storage<'a>) -> Result<Self> {
        let plain = storage.plain_directory()?;
        Ok(Self {
            storage,
            root: Directory {
                meta: plain.clone(),
                entries: BTreeMap::new(),
            },
            plain,
            packages: BTreeMap::new(),
            left_out: BTreeSet::new(),
        })
    }

    fn read(mut self, tar: impl Read, label: &str) -> Result<Source> {
        let mut reader = Reader::new(tar);
        while let Some(entry) = reader
            .next()
            .with_context(|| format!("reading the tar {label}"))?
        {
            self.entry(&entry, &mut reader).with_context(|| {
                format!("{label}: storing {}", String::from_utf8_lossy(&entry.path))
            })?;
        }
        ensure!(!self.root.entries.is_empty(), "{label} is an empty tar");
        Ok(Source {
            root: self.root,
            packages: self.packages.into_values().next(),
            left_out: self.left_out.len(),
        })
    }

    fn entry(&mut self, entry: &Entry, content: &mut impl Read) -> Result<()> {
        let segments = segments(&entry.path)?;
        if let ["var", name, ..] = &segments[..] {
            self.left_out.insert((*name).to_owned());
        }
        let path = segments.join("/");
        let database = DATABASES.iter().position(|database| *database == path);
        let database = database.filter(|_| entry.kind.is_file() && entry.length <= DATABASE_LIMIT);
        let stored = is_stored(&segments);
        let mut bytes = Vec::new();
        if database.is_some() || (stored && entry.length <= SMALL) {
            content.read_to_end(&mut bytes)?;
            ensure!(
                bytes.len() as u64 == entry.length,
                "the tar ends in the middle of it"
            );
        }
        if let Some(database) = database {
            let text = String::from_utf8(bytes.clone()).context("dpkg's database is not UTF-8")?;
            self.packages.insert(database, text);
        }
        if !stored {
            return Ok(());
        }
        let mut attributes = attributes_of(entry)?;
        let node = match entry.kind {
            EntryType::Directory => {
                attributes.mode |= 0o040_000;
                let meta = self.storage.directory(&attributes)?;
                self.directory(&segments)?.meta = meta;
                return Ok(());
            }
            EntryType::Symlink => self.storage.symlink(&attributes, utf8(&entry.link)?)?,
            EntryType::Link => self.find(&entry.link)?,
            EntryType::Regular | EntryType::Continuous => {
                attributes.mode |= 0o100_000;
                if bytes.len() as u64 == entry.length {
                    self.storage.small(&attributes, &bytes)?
                } else {
                    // libostree wants a stream that outlives the tar's: one that has no name, and is gone with its last reader.
                    let mut file = tempfile::tempfile_in(&self.storage.scratch)?;
                    ensure!(
                        io::copy(content, &mut file)? == entry.length,
                        "the tar ends in the middle of it"
                    );
                    file.rewind()?;
                    self.storage.large(&attributes, entry.length, file)?
                }
            }
            EntryType::Char | EntryType::Block | EntryType::Fifo => {
                bail!("it is a device or pipe: an OSTree commit cannot hold it, make it at boot")
            }
            EntryType::GNUSparse => bail!("{SPARSE}"),
            other => bail!(
                "it is of a kind ({other:?}) that is not known: make the tar with `tar --format=pax`"
            ),
        };
        let Some((name, above)) = segments.split_last() else {
            bail!("it is the root, and not a directory");
        };
        self.directory(above)?
            .entries
            .insert((*name).to_owned(), node);
        Ok(())
    }

    /// With all above it that the tar has not told of yet.
    fn directory(&mut self, segments: &[&str]) -> Result<&mut Directory> {
        let mut directory = &mut self.root;
        for segment in segments {
            directory = directory.directory(segment, || Directory {
                meta: self.plain.clone(),
                entries: BTreeMap::new(),
            })?;
        }
        Ok(directory)
    }

    /// The file that a hard link names, which came before it.
    fn find(&self, target: &[u8]) -> Result<Node> {
        let mut directory = &self.root;
        let segments = segments(target)?;
        let missing = || {
            format!(
                "it is a hard link to {}, which is not in the tar before it, or not in a commit",
                segments.join("/")
            )
        };
        let (name, above) = segments.split_last().with_context(missing)?;
        for segment in above {
            match directory.entries.get(*segment) {
                Some(Node::Directory(inner)) => directory = inner,
                Some(Node::File(_) | Node::Link { .. }) | None => bail!(missing()),
            }
        }
        match directory.entries.get(*name) {
            Some(node @ (Node::File(_) | Node::Link { .. })) => Ok(node.clone()),
            Some(Node::Directory(_)) | None => bail!(missing()),
        }
    }
}

const SPARSE: &str = "it is sparse, which is not read here: make the tar without --sparse";

/// Without `./`; a tar that climbs is not one of a root file system.
fn segments(path: &[u8]) -> Result<Vec<&str>> {
    let mut segments = Vec::new();
    for segment in utf8(path)?.split('/') {
        match segment {
            "" | "." => {}
            ".." => bail!("its path leaves the tree"),
            name => segments.push(name),
        }
    }
    Ok(segments)
}

fn attributes_of(entry: &Entry) -> Result<Attributes> {
    let mut xattrs = Vec::new();
    for (key, value) in &entry.extensions {
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            xattrs.push(([name, b"\0"].concat(), value.clone()));
        } else if key == b"RHT.security.selinux" {
            // As the kernel keeps it, with its NUL.
            let label = value.strip_suffix(b"\0").unwrap_or(value);
            xattrs.push((b"security.selinux\0".to_vec(), [label, b"\0"].concat()));
        } else if key.starts_with(b"GNU.sparse.") {
            bail!("{SPARSE}");
        } else if key.starts_with(b"SCHILY.acl.") {
            bail!(
                "it has an access control list as text, which is not read here: make the tar without --acls"
            );
        }
    }
    xattrs.sort();
    xattrs.dedup_by(|two, one| two.0 == one.0);
    Ok(Attributes {
        uid: u32::try_from(entry.uid)?,
        gid: u32::try_from(entry.gid)?,
        mode: entry.mode,
        xattrs: variant(xattrs),
    })
}
