//! What is in a tree: on the host, or in an ext4 file system that nobody mounts.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;

#[derive(Clone, PartialEq, Eq)]
pub(super) struct Node {
    /// With the type.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Of a file or a link.
    pub content: Vec<u8>,
    /// Changed last at the beginning of 1970.
    pub epoch: bool,
    /// The first path of the same inode.
    pub first: String,
}

impl fmt::Debug for Node {
    /// To be read.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let short = |bytes: &[u8]| {
            format!(
                "{} bytes: {:?}",
                bytes.len(),
                String::from_utf8_lossy(&bytes[..bytes.len().min(80)])
            )
        };
        write!(
            f,
            "{:o} {}:{} epoch {}, of {}, {}",
            self.mode,
            self.uid,
            self.gid,
            self.epoch,
            self.first,
            short(&self.content)
        )?;
        for (name, value) in &self.xattrs {
            write!(f, ", {}={}", String::from_utf8_lossy(name), short(value))?;
        }
        Ok(())
    }
}

/// By path, without a leading slash.
pub(super) type Dump = BTreeMap<String, Node>;

/// Of a directory of the host.
pub(super) fn of_directory(root: &Path) -> Dump {
    let (mut dump, mut seen) = (Dump::new(), BTreeMap::new());
    walk(root, "", &mut dump, &mut seen);
    dump
}

fn walk(root: &Path, path: &str, dump: &mut Dump, seen: &mut BTreeMap<(u64, u64), String>) {
    let real = root.join(path);
    let meta = fs::symlink_metadata(&real).unwrap();
    let content = if meta.is_file() {
        fs::read(&real).unwrap()
    } else if meta.is_symlink() {
        fs::read_link(&real)
            .unwrap()
            .as_os_str()
            .as_bytes()
            .to_vec()
    } else {
        Vec::new()
    };
    let xattrs = xattr::list(&real).unwrap();
    let xattrs = xattrs.map(|name| {
        let value = xattr::get(&real, &name).unwrap().unwrap();
        (name.as_bytes().to_vec(), value)
    });
    let first = seen
        .entry((meta.dev(), meta.ino()))
        .or_insert_with(|| path.to_owned());
    let node = Node {
        mode: meta.mode(),
        uid: meta.uid(),
        gid: meta.gid(),
        xattrs: xattrs.collect(),
        content,
        epoch: meta.mtime() == 0,
        first: first.clone(),
    };
    dump.insert(path.to_owned(), node);
    if !meta.is_dir() {
        return;
    }
    let mut names: Vec<_> = fs::read_dir(&real)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    for name in names {
        walk(root, &inner(path, name.to_str().unwrap()), dump, seen);
    }
}

fn inner(path: &str, name: &str) -> String {
    match path {
        "" => name.to_owned(),
        _ => format!("{path}/{name}"),
    }
}

/// A partition of an image, copied to a file of its own.
pub(super) fn cut_out(image: &Path, place: Range<u64>, to: &Path) {
    use std::io::{Read as _, Seek as _, SeekFrom};
    let mut from = fs::File::open(image).unwrap();
    from.seek(SeekFrom::Start(place.start)).unwrap();
    let mut to = fs::File::create(to).unwrap();
    std::io::copy(&mut from.take(place.end - place.start), &mut to).unwrap();
}

/// Of the ext4 file system in `part`; `scratch` is a directory that does not exist.
pub(super) fn of_ext4(part: &Path, scratch: &Path) -> Dump {
    fs::create_dir(scratch).unwrap();
    // Contents and links first: this keeps neither attributes nor hard links.
    let out = scratch.join("out");
    fs::create_dir(&out).unwrap();
    debugfs(part, &[format!("rdump / \"{}\"", out.display())]);
    let (mut dump, mut seen) = (Dump::new(), BTreeMap::new());
    let mut inodes = BTreeMap::new();
    let mut level = vec![(String::new(), 2u32)];
    let mut directories = vec![(String::new(), 2u32, 0o040_755, 0, 0)];
    while !level.is_empty() {
        let orders: Vec<_> = level
            .iter()
            .map(|(_, inode)| format!("ls -p <{inode}>"))
            .collect();
        let answers = debugfs(part, &orders);
        let mut next = Vec::new();
        for ((path, _), answer) in level.iter().zip(answers) {
            for line in answer.lines().filter(|line| line.starts_with('/')) {
                let fields: Vec<_> = line.split('/').collect();
                let (inode, mode): (u32, _) = (
                    fields[1].parse().unwrap(),
                    u32::from_str_radix(fields[2], 8).unwrap(),
                );
                let (uid, gid): (u32, u32) =
                    (fields[3].parse().unwrap(), fields[4].parse().unwrap());
                let name = fields[5];
                if inode == 0 || name == ".." || (path.is_empty() && name == "lost+found") {
                    continue;
                }
                if name == "." {
                    if path.is_empty() {
                        directories[0].2 = mode;
                        (directories[0].3, directories[0].4) = (uid, gid);
                    }
                    continue;
                }
                let path = inner(path, name);
                if mode & 0o170_000 == 0o040_000 {
                    next.push((path.clone(), inode));
                }
                directories.push((path, inode, mode, uid, gid));
            }
        }
        level = next;
    }
    directories.sort();
    for (path, inode, mode, uid, gid) in directories {
        let real = out.join(&path);
        let content = match mode & 0o170_000 {
            0o100_000 => fs::read(real).unwrap(),
            0o120_000 => fs::read_link(real).unwrap().as_os_str().as_bytes().to_vec(),
            _ => Vec::new(),
        };
        let first = seen.entry(inode).or_insert_with(|| path.clone());
        let node = Node {
            mode,
            uid,
            gid,
            xattrs: BTreeMap::new(),
            content,
            epoch: false,
            first: first.clone(),
        };
        inodes
            .entry(inode)
            .or_insert_with(Vec::new)
            .push(path.clone());
        dump.insert(path, node);
    }
    let orders: Vec<_> = inodes
        .keys()
        .map(|inode| format!("stat <{inode}>"))
        .collect();
    let stats = debugfs(part, &orders);
    let mut orders = Vec::new();
    let mut wanted = Vec::new();
    for ((inode, paths), stat) in inodes.iter().zip(stats) {
        let links = stat
            .split("Links: ")
            .nth(1)
            .unwrap()
            .split_whitespace()
            .next()
            .unwrap();
        let node = dump.get(&paths[0]).unwrap();
        if node.mode & 0o170_000 != 0o040_000 {
            assert_eq!(links, paths.len().to_string(), "{paths:?}");
        }
        let epoch = stat
            .lines()
            .any(|line| line.trim_start().starts_with("mtime: 0x00000000:"));
        for path in paths {
            dump.get_mut(path).unwrap().epoch = epoch;
        }
        let names = stat
            .split("Extended attributes:\n")
            .nth(1)
            .unwrap_or_default()
            .lines();
        for name in names.take_while(|line| line.starts_with("  ")) {
            let name = name.trim_start().split(" (").next().unwrap().to_owned();
            let file = scratch.join(format!("value-{}", wanted.len()));
            orders.push(format!(
                "ea_get -f \"{}\" <{inode}> \"{name}\"",
                file.display()
            ));
            wanted.push((paths.clone(), name, file));
        }
    }
    debugfs(part, &orders);
    for (paths, name, file) in wanted {
        for path in paths {
            let mut value = fs::read(&file).unwrap();
            if name == "system.posix_acl_access" {
                // Entries of nobody in particular have no id on the disk; debugfs reads nought for it, the kernel all ones.
                for entry in value[4..].chunks_mut(8) {
                    if !matches!(entry[0], 2 | 8) {
                        entry[4..].fill(255);
                    }
                }
            }
            dump.get_mut(&path)
                .unwrap()
                .xattrs
                .insert(name.clone().into_bytes(), value);
        }
    }
    dump
}

/// The answer to each order.
pub(super) fn debugfs(part: &Path, orders: &[String]) -> Vec<String> {
    let script = part.with_extension("orders");
    let lines: String = orders.iter().map(|order| format!("{order}\n")).collect();
    fs::write(&script, lines).unwrap();
    let output = Command::new("debugfs")
        .arg("-f")
        .arg(&script)
        .arg(part)
        .env("LC_ALL", "C")
        .output()
        .unwrap();
    // It always says its own name there.
    let wrong = String::from_utf8_lossy(&output.stderr).lines().count() > 1;
    assert!(output.status.success() && !wrong, "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let mut answers: Vec<String> = Vec::new();
    for line in text.lines() {
        if line.starts_with("debugfs: ") {
            answers.push(String::new());
        } else {
            let answer = answers.last_mut().unwrap();
            answer.push_str(line);
            answer.push('\n');
        }
    }
    assert_eq!(answers.len(), orders.len());
    answers
}
