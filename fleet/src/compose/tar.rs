//! A tar as a stream of entries: ustar, PAX and GNU's long names.
//!
//! The `tar` crate reads the fields of a header. What is around them is read here, because its reader splits PAX records at line ends,
//! which the values of extended attributes may contain, and takes a tar that is cut off between two entries for a whole one.

use std::io::{self, Read};

use anyhow::{Context as _, Result, bail, ensure};
pub(super) use tar::EntryType;
use tar::Header;

const BLOCK: usize = 512;

/// Names and extended attributes of one entry.
const EXTENSION_LIMIT: u64 = 4 << 20;

pub(super) struct Reader<R> {
    inner: R,
    /// What is left of the entry's content, and of its last block.
    content: u64,
    padding: u64,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub path: Vec<u8>,
    pub link: Vec<u8>,
    pub kind: EntryType,
    pub uid: u64,
    pub gid: u64,
    /// Permissions only.
    pub mode: u32,
    pub length: u64,
    /// PAX records that are about none of these.
    pub extensions: Vec<(Vec<u8>, Vec<u8>)>,
}

impl<R: Read> Reader<R> {
    pub(super) fn new(inner: R) -> Self {
        Self {
            inner,
            content: 0,
            padding: 0,
        }
    }

    /// The next entry, past the content of the one before. `None` at the tar's end.
    pub(super) fn next(&mut self) -> Result<Option<Entry>> {
        let (mut path, mut link, mut extensions) = (None, None, Vec::new());
        loop {
            let Some(header) = self.header()? else {
                ensure!(
                    path.is_none() && link.is_none() && extensions.is_empty(),
                    "it ends in the middle of an entry"
                );
                // Whoever writes into a pipe is let finish.
                io::copy(&mut self.inner, &mut io::sink())?;
                return Ok(None);
            };
            let kind = header.entry_type();
            match kind {
                EntryType::GNULongName => path = Some(self.long_name()?),
                EntryType::GNULongLink => link = Some(self.long_name()?),
                EntryType::XHeader => extensions = records(&self.extension()?)?,
                EntryType::XGlobalHeader => drop(self.extension()?),
                _ => {
                    let mut entry = Entry {
                        path: path.unwrap_or_else(|| header.path_bytes().into_owned()),
                        link: link.unwrap_or_else(|| {
                            header.link_name_bytes().unwrap_or_default().into_owned()
                        }),
                        kind,
                        uid: header.uid()?,
                        gid: header.gid()?,
                        mode: header.mode()? & 0o7777,
                        length: self.content,
                        extensions: Vec::new(),
                    };
                    for (key, value) in extensions {
                        match &key[..] {
                            b"path" => entry.path = value,
                            b"linkpath" => entry.link = value,
                            b"uid" => entry.uid = number(&value)?,
                            b"gid" => entry.gid = number(&value)?,
                            b"size" => {
                                entry.length = number(&value)?;
                                self.expect(entry.length)?;
                            }
                            _ => entry.extensions.push((key, value)),
                        }
                    }
                    if kind == EntryType::Link {
                        // A length there is that of the file it names.
                        entry.length = 0;
                        self.expect(0)?;
                    }
                    return Ok(Some(entry));
                }
            }
        }
    }

    /// The header after what is left of the entry, if it is not the end. What it announces is what is left then.
    fn header(&mut self) -> Result<Option<Header>> {
        let left = self.content.saturating_add(self.padding);
        let skipped = io::copy(&mut self.inner.by_ref().take(left), &mut io::sink())?;
        ensure!(
            skipped == left,
            "it ends in the middle of a file, it is cut off"
        );
        (self.content, self.padding) = (0, 0);
        let mut header = Header::new_old();
        match self.inner.read_exact(header.as_mut_bytes()) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                bail!("it has no end, it is cut off")
            }
            Err(error) => return Err(error.into()),
        }
        let bytes = header.as_bytes();
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let sum = |range: std::ops::Range<usize>| {
            bytes[range]
                .iter()
                .map(|byte| u32::from(*byte))
                .sum::<u32>()
        };
        let sum = sum(0..148) + 8 * u32::from(b' ') + sum(156..BLOCK);
        ensure!(
            header.cksum().is_ok_and(|want| want == sum),
            "it is not a tar, or is damaged"
        );
        self.expect(header.entry_size()?)?;
        Ok(Some(header))
    }

    fn expect(&mut self, length: u64) -> Result<()> {
        let blocks = length.checked_next_multiple_of(BLOCK as u64);
        let padding = blocks.context("a length is out of range, it is damaged")? - length;
        (self.content, self.padding) = (length, padding);
        Ok(())
    }

    fn extension(&mut self) -> Result<Vec<u8>> {
        let length = self.content;
        ensure!(
            length <= EXTENSION_LIMIT,
            "an extended header has {length} bytes, more than {EXTENSION_LIMIT}"
        );
        let mut bytes = Vec::new();
        self.read_to_end(&mut bytes)?;
        ensure!(
            bytes.len() as u64 == length,
            "it ends in the middle of a header, it is cut off"
        );
        Ok(bytes)
    }

    fn long_name(&mut self) -> Result<Vec<u8>> {
        let mut name = self.extension()?;
        name.truncate(
            name.iter()
                .position(|byte| *byte == 0)
                .unwrap_or(name.len()),
        );
        Ok(name)
    }
}

/// The content of the entry.
impl<R: Read> Read for Reader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.by_ref().take(self.content).read(buffer)?;
        self.content -= read as u64;
        Ok(read)
    }
}

/// `LENGTH KEY=VALUE\n`, where the length is that of all of it.
fn records(mut bytes: &[u8]) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut records = Vec::new();
    while !bytes.is_empty() {
        let record = || -> Option<(&[u8], &[u8], &[u8])> {
            let space = bytes.iter().position(|byte| *byte == b' ')?;
            let length: usize = std::str::from_utf8(&bytes[..space]).ok()?.parse().ok()?;
            let (record, rest) = bytes.split_at_checked(length)?;
            let record = record.get(space + 1..)?.strip_suffix(b"\n")?;
            let equals = record.iter().position(|byte| *byte == b'=')?;
            Some((&record[..equals], &record[equals + 1..], rest))
        };
        let (key, value, rest) = record().context("a record of an extended header is malformed")?;
        records.push((key.to_owned(), value.to_owned()));
        bytes = rest;
    }
    Ok(records)
}

fn number(text: &[u8]) -> Result<u64> {
    let number = std::str::from_utf8(text)
        .ok()
        .and_then(|text| text.parse().ok());
    number.context("a number of an extended header is malformed")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_as_long_as_it_says() {
        let record =
            |key: &str, value: &str| (key.as_bytes().to_owned(), value.as_bytes().to_owned());
        for (bytes, want) in [
            ("", vec![]),
            ("8 k=123\n", vec![record("k", "123")]),
            ("17 k=\n12 path=x\n\n", vec![record("k", "\n12 path=x\n")]),
            ("6 k=\n\n5 a=\n", vec![record("k", "\n"), record("a", "")]),
            ("9 k=a=b=\n", vec![record("k", "a=b=")]),
        ] {
            assert_eq!(records(bytes.as_bytes()).unwrap(), want, "{bytes:?}");
        }
        for bad in [
            "8 k=12\n",
            "9 k=123\n",
            "k=1\n",
            "-1 k=\n",
            "4 k\n",
            "0 k=1\n",
            "2 k=1\n",
            " k=1\n",
        ] {
            records(bad.as_bytes()).unwrap_err();
        }
    }

    #[test]
    fn no_bytes_make_the_reader_panic_or_run_for_ever() {
        let mut tar = tar::Builder::new(Vec::new());
        tar.append_pax_extensions([("SCHILY.xattr.user.a", &b"\n"[..])])
            .unwrap();
        let mut header = Header::new_ustar();
        header.set_size(3);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        tar.append_data(&mut header, "usr/file", &b"abc"[..])
            .unwrap();
        let whole = tar.into_inner().unwrap();
        let mut renamed = whole.clone();
        renamed[0] ^= 1;
        Reader::new(&renamed[..]).next().unwrap_err();
        for at in 0..whole.len() {
            for byte in [0, 0xff, b'9'] {
                let mut spoilt = whole.clone();
                spoilt[at] = byte;
                let mut reader = Reader::new(&spoilt[..]);
                while let Ok(Some(_)) = reader.next() {}
            }
            let mut reader = Reader::new(&whole[..at]);
            let end = loop {
                match reader.next() {
                    Ok(Some(_)) => {}
                    end => break end,
                }
            };
            // Two blocks of zeros are its end; one is enough.
            assert_eq!(end.is_err(), at < whole.len() - BLOCK, "cut at {at}");
        }
    }
}
