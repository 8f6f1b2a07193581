//! `fw_env.config`: where the copies of the environment are, in the format of U-Boot's and libubootenv's tools.
//!
//! | field | read as |
//! |---|---|
//! | device | path of a block device, an MTD character device, or a file |
//! | offset | `0x` hexadecimal, `0` octal, else decimal; negative counts from the end of a block device |
//! | size | hexadecimal, with or without `0x`, as the tools read it |
//! | sector size | the same; MTD: by default the erase size that the kernel tells |
//! | sectors | the same; NAND: how many may be used, so that bad ones are passed over |
//! | no lock | 1: leave the flash's write protection alone |
//!
//! One line is a single environment, two are a redundant one. `#` begins a comment. The tools pass over lines they cannot read; here such
//! a line is an error that names it, because half of an environment is another environment.

use std::path::PathBuf;

/// One copy of the environment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub device: PathBuf,
    pub offset: i64,
    pub size: u64,
    pub sector: Option<u64>,
    pub sectors: Option<u64>,
    pub no_lock: bool,
}

/// What is wrong with the file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigProblem {
    #[error(
        "line {line}: {field} is missing: a line is DEVICE OFFSET SIZE [SECTOR-SIZE [SECTORS [NO-LOCK]]]"
    )]
    Missing { line: usize, field: &'static str },
    #[error("line {line}: {field} {text:?} is not a number")]
    NotANumber {
        line: usize,
        field: &'static str,
        text: String,
    },
    #[error("line {line}: size {size:#x} cannot hold an environment: it is 16 bytes to 16 MiB")]
    Size { line: usize, size: u64 },
    #[error("line {line}: {text:?} is not understood: a line has at most six fields")]
    Surplus { line: usize, text: String },
    #[error(
        "line {line}: {device:?} is a UBI volume: only files, block devices and MTD devices can be written"
    )]
    Ubi { line: usize, device: String },
    #[error("line {line} is a third copy: an environment has one or two")]
    Third { line: usize },
    #[error("it names no copy of the environment: write one line for each, DEVICE OFFSET SIZE")]
    Empty,
    #[error("the copies have sizes {first:#x} and {second:#x}: they must be equal")]
    Unequal { first: u64, second: u64 },
    #[error("both copies lie in the same bytes of {device}")]
    Overlap { device: String },
}

/// The copies, one or two.
pub fn parse(text: &str) -> Result<Vec<Place>, ConfigProblem> {
    let mut places = Vec::new();
    for (n, text) in text.lines().enumerate() {
        let line = n + 1;
        let text = text.split('#').next().unwrap_or_default();
        let fields: Vec<&str> = text.split_ascii_whitespace().collect();
        if fields.is_empty() {
            continue;
        }
        if places.len() == 2 {
            return Err(ConfigProblem::Third { line });
        }
        places.push(place(line, &fields)?);
    }
    match places.as_slice() {
        [] => Err(ConfigProblem::Empty),
        [first, second] if first.size != second.size => Err(ConfigProblem::Unequal {
            first: first.size,
            second: second.size,
        }),
        [first, second]
            if first.device == second.device
                && first.offset.abs_diff(second.offset) < first.size =>
        {
            Err(ConfigProblem::Overlap {
                device: first.device.display().to_string(),
            })
        }
        _ => Ok(places),
    }
}

fn place(line: usize, fields: &[&str]) -> Result<Place, ConfigProblem> {
    let field = |at: usize, field| {
        fields
            .get(at)
            .copied()
            .ok_or(ConfigProblem::Missing { line, field })
    };
    let wrong = |field, text: &str| ConfigProblem::NotANumber {
        line,
        field,
        text: text.to_owned(),
    };
    let hexadecimal = |at: usize, field| match fields.get(at) {
        None => Ok(None),
        Some(text) => u64::from_str_radix(text.trim_start_matches("0x"), 16)
            .map(Some)
            .map_err(|_| wrong(field, text)),
    };
    let device = field(0, "the device")?;
    let offset = field(1, "the offset")?;
    field(2, "the size")?;
    if device.starts_with("/dev/ubi") || device.contains(':') {
        return Err(ConfigProblem::Ubi {
            line,
            device: device.to_owned(),
        });
    }
    let size = hexadecimal(2, "size")?.unwrap_or_default();
    if !(16..=16 << 20).contains(&size) {
        return Err(ConfigProblem::Size { line, size });
    }
    if let Some(text) = fields.get(6) {
        return Err(ConfigProblem::Surplus {
            line,
            text: (*text).to_owned(),
        });
    }
    let nonzero = |number: Option<u64>| number.filter(|number| *number > 0);
    Ok(Place {
        device: device.into(),
        offset: integer(offset).ok_or_else(|| wrong("offset", offset))?,
        size,
        sector: nonzero(hexadecimal(3, "sector size")?),
        sectors: nonzero(hexadecimal(4, "sectors")?),
        no_lock: fields.get(5).is_some_and(|text| *text != "0"),
    })
}

/// As C's `%lli` reads a number.
fn integer(text: &str) -> Option<i64> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text),
    };
    let number = match digits.strip_prefix("0x") {
        Some(digits) => i64::from_str_radix(digits, 16),
        None if digits.len() > 1 && digits.starts_with('0') => i64::from_str_radix(digits, 8),
        None => digits.parse(),
    };
    number
        .ok()
        .map(|number| if negative { -number } else { number })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_is_single_and_two_are_redundant() {
        let single = parse("# U-Boot\n\n/dev/mmcblk0  -0x4000 0x2000 # the end\n").unwrap();
        assert_eq!(single.len(), 1);
        assert_eq!((single[0].offset, single[0].size), (-0x4000, 0x2000));
        let two =
            parse("/dev/mtd1\t0x10 4000 10000 2 1\n  /dev/mtd2 010 0x4000 0x10000 0 0\n").unwrap();
        let place = |device: &str, offset, sectors, no_lock| Place {
            device: device.into(),
            offset,
            size: 0x4000,
            sector: Some(0x10000),
            sectors,
            no_lock,
        };
        assert_eq!(
            two,
            [
                place("/dev/mtd1", 16, Some(2), true),
                place("/dev/mtd2", 8, None, false)
            ]
        );
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        let problem = |text: &str| parse(text).unwrap_err();
        let missing = |line, field| ConfigProblem::Missing { line, field };
        let not = |line, field, text: &str| ConfigProblem::NotANumber {
            line,
            field,
            text: text.to_owned(),
        };
        assert_eq!(problem(""), ConfigProblem::Empty);
        assert_eq!(problem("# nothing\n"), ConfigProblem::Empty);
        assert_eq!(problem("\n/a\n"), missing(2, "the offset"));
        assert_eq!(problem("/a 0"), missing(1, "the size"));
        assert_eq!(problem("/a x 1000"), not(1, "offset", "x"));
        assert_eq!(problem("/a 0 0x2g00"), not(1, "size", "0x2g00"));
        assert_eq!(problem("/a 0 1000 z"), not(1, "sector size", "z"));
        for size in ["0", "8", "2000000"] {
            assert!(matches!(
                problem(&format!("/a 0 {size}")),
                ConfigProblem::Size { line: 1, .. }
            ));
        }
        assert_eq!(
            problem("/a 0 1000 0 0 0 7"),
            ConfigProblem::Surplus {
                line: 1,
                text: "7".to_owned()
            }
        );
        for device in ["/dev/ubi0_1", "/dev/ubi0:env", "/dev/mtd3:env"] {
            assert!(matches!(
                problem(&format!("{device} 0 1000")),
                ConfigProblem::Ubi { line: 1, .. }
            ));
        }
        assert_eq!(
            problem("/a 0 1000\n/b 0 1000\n/c 0 1000"),
            ConfigProblem::Third { line: 3 }
        );
        assert_eq!(
            problem("/a 0 1000\n/b 0 2000"),
            ConfigProblem::Unequal {
                first: 0x1000,
                second: 0x2000
            }
        );
        assert_eq!(
            problem("/a 0 1000\n/a 0x800 1000"),
            ConfigProblem::Overlap {
                device: "/a".to_owned()
            }
        );
        assert_eq!(
            problem("uboot:\n  size: 0x4000"),
            missing(1, "the offset"),
            "the newer, YAML format"
        );
    }
}
