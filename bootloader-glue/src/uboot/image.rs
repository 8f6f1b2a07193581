//! The bytes of a U-Boot environment, pure.
//!
//! | bytes of a copy | meaning |
//! |---|---|
//! | 0–3 | CRC-32 (zlib's) of the data, in the byte order of the board |
//! | 4 | only of a redundant environment: the flag |
//! | then | data: `name=value`, each ended by a zero byte; an empty one ends the list; to the end of the copy |
//!
//! The flag says which of two valid copies is newer ([`Flags`]). It is not covered by the CRC: a flag that flips can only
//! choose between the two. What the list means is U-Boot's to say (`himport_r`): leading blanks are not part of a name, an entry that
//! begins with `#` is none, a backslash takes the next byte as it is, the last of two entries for one name counts, an entry
//! without a value is none, and one without a name makes U-Boot refuse the environment.

/// The byte order of the CRC. U-Boot, libubootenv and this crate use the processor's; an image for another board may need the other one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endian {
    Little,
    Big,
}

impl Endian {
    pub const NATIVE: Self = if cfg!(target_endian = "big") {
        Self::Big
    } else {
        Self::Little
    };
}

/// How the flag tells the newer copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flags {
    /// A number that grows by one with each write, and wraps: files, block devices, NAND.
    Incremental,
    /// 1 is active, 0 obsolete: NOR flash, where the older copy's flag can be cleared without an erase.
    Boolean,
}

/// How the copies of one environment are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Bytes of a copy.
    pub size: usize,
    /// Two copies with a flag each, or one without.
    pub redundant: bool,
    pub endian: Endian,
}

/// The variables do not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the variables take {needed} bytes, the environment has room for {room}")]
pub struct TooBig {
    pub needed: usize,
    pub room: usize,
}

/// The list of variables. Entries that nobody changes keep their bytes and their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Variables(Vec<Vec<u8>>);

impl Layout {
    /// Where the flag is.
    pub const FLAG_AT: usize = 4;

    const fn data_at(&self) -> usize {
        if self.redundant { 5 } else { 4 }
    }

    /// A whole copy; what is behind the list is zero. `flag` is ignored where there is only one copy.
    pub fn encode(&self, variables: &Variables, flag: u8) -> Result<Vec<u8>, TooBig> {
        let mut data = Vec::with_capacity(self.size);
        for entry in &variables.0 {
            data.extend_from_slice(entry);
            data.push(0);
        }
        data.push(0);
        let room = self.size.saturating_sub(self.data_at());
        if data.len() > room {
            return Err(TooBig {
                needed: data.len(),
                room,
            });
        }
        data.resize(room, 0);
        let crc = crc32(&data);
        let mut bytes = match self.endian {
            Endian::Little => crc.to_le_bytes(),
            Endian::Big => crc.to_be_bytes(),
        }
        .to_vec();
        if self.redundant {
            bytes.push(flag);
        }
        bytes.append(&mut data);
        Ok(bytes)
    }

    /// The variables and the flag of a copy whose CRC is right.
    pub fn decode(&self, bytes: &[u8]) -> Option<(Variables, u8)> {
        if bytes.len() != self.size {
            return None;
        }
        let (crc, rest) = bytes.split_first_chunk::<4>()?;
        let crc = match self.endian {
            Endian::Little => u32::from_le_bytes(*crc),
            Endian::Big => u32::from_be_bytes(*crc),
        };
        let (flag, data) = match self.redundant {
            true => rest.split_first().map(|(flag, data)| (*flag, data))?,
            false => (0, rest),
        };
        if crc32(data) != crc {
            return None;
        }
        let entries = data.split(|byte| *byte == 0);
        let list = entries
            .take_while(|entry| !entry.is_empty())
            .map(<[u8]>::to_vec);
        Some((Variables(list.collect()), flag))
    }
}

impl Flags {
    /// Which of two valid copies is newer: 0 or 1. As U-Boot reads them, and where U-Boot's drivers differ, as libubootenv does.
    pub fn newer(self, flags: [u8; 2]) -> usize {
        usize::from(match (self, flags) {
            (Self::Incremental, [255, 0]) => true,
            (Self::Incremental, [0, 255]) => false,
            // An erased flag that nobody wrote: more recent than one that was cleared.
            (Self::Boolean, [_, 255]) => true,
            (Self::Boolean, [255, _]) => false,
            (_, [first, second]) => second > first,
        })
    }

    /// The flag of a copy that is to be newer than one with `flag`.
    pub const fn next(self, flag: u8) -> u8 {
        match self {
            Self::Incremental => flag.wrapping_add(1),
            Self::Boolean => 1,
        }
    }
}

impl Variables {
    /// From lines of `name=value`, as `mkenvimage` takes them; empty lines and lines that begin with `#` are none.
    pub fn from_text(text: &str) -> Self {
        let lines = text.lines().map(str::trim_end);
        let entries = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
        Self(entries.map(|line| line.as_bytes().to_vec()).collect())
    }

    /// The value as U-Boot has it; `None` also when U-Boot refuses the whole list.
    pub fn value(&self, name: &str) -> Option<Vec<u8>> {
        let mut found = None;
        for entry in &self.0 {
            match Entry::of(entry) {
                Entry::Nameless => return None,
                Entry::Variable(this, value) if this == name.as_bytes() => found = value,
                Entry::Variable(..) | Entry::Comment => {}
            }
        }
        found
    }

    /// Sets a variable where it stands, or at the end. `value` is plain: no backslash, no zero byte.
    pub fn set(&mut self, name: &str, value: &str) {
        let entry = format!("{name}={value}").into_bytes();
        match self.position(name) {
            Some(at) => self.0[at] = entry,
            None => self.0.push(entry),
        }
    }

    pub fn remove(&mut self, name: &str) {
        while let Some(at) = self.position(name) {
            self.0.remove(at);
        }
    }

    /// Drops what makes U-Boot refuse the whole list.
    pub fn drop_nameless(&mut self) {
        self.0
            .retain(|entry| !matches!(Entry::of(entry), Entry::Nameless));
    }

    pub fn entries(&self) -> impl Iterator<Item = &[u8]> {
        self.0.iter().map(Vec::as_slice)
    }

    /// Where the entry is that counts.
    fn position(&self, name: &str) -> Option<usize> {
        let is = |entry: &Vec<u8>| matches!(Entry::of(entry), Entry::Variable(this, _) if this == name.as_bytes());
        self.0.iter().rposition(is)
    }
}

/// An entry of the list, as U-Boot takes it.
enum Entry<'a> {
    Variable(&'a [u8], Option<Vec<u8>>),
    Comment,
    Nameless,
}

impl<'a> Entry<'a> {
    fn of(bytes: &'a [u8]) -> Self {
        let blanks = bytes
            .iter()
            .take_while(|byte| matches!(byte, b' ' | b'\t'))
            .count();
        let bytes = &bytes[blanks..];
        if bytes.first() == Some(&b'#') {
            return Self::Comment;
        }
        let Some(equals) = bytes.iter().position(|byte| *byte == b'=') else {
            return Self::Variable(bytes, None);
        };
        let (name, raw) = (&bytes[..equals], &bytes[equals + 1..]);
        if raw.is_empty() {
            return Self::Variable(name, None);
        }
        if name.is_empty() {
            return Self::Nameless;
        }
        let mut value = Vec::with_capacity(raw.len());
        let mut rest = raw.iter();
        while let Some(byte) = rest.next() {
            match (byte, rest.as_slice().first()) {
                (b'\\', Some(next)) => {
                    value.push(*next);
                    rest.next();
                }
                _ => value.push(*byte),
            }
        }
        Self::Variable(name, Some(value))
    }
}

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut n = 0;
    while n < 256 {
        let mut crc = n as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 {
                0xedb8_8320 ^ (crc >> 1)
            } else {
                crc >> 1
            };
            bit += 1;
        }
        table[n] = crc;
        n += 1;
    }
    table
}

/// CRC-32 as zlib and U-Boot compute it.
pub fn crc32(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = table();
    let step = |crc: u32, byte: &u8| TABLE[usize::from(crc as u8 ^ byte)] ^ (crc >> 8);
    !bytes.iter().fold(!0, step)
}
