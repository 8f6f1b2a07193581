//! Canonical JSON: the one byte form of a value, which is what a signature covers, and a parser that admits only values that have one.
//!
//! The form is OLPC's: no white space, object keys sorted by their bytes, strings raw except for `\"` and `\\`, integers only.
//! Does not normalise Unicode: two spellings of one glyph are two strings.

use std::cell::RefCell;
use std::fmt;

use serde::de::{DeserializeSeed, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::Refusal;

/// How deep arrays and objects may nest.
pub const MAX_DEPTH: usize = 32;

/// The canonical form of `value`; a number that is not an integer has none.
pub fn to_bytes(value: &Value) -> Result<Vec<u8>, Refusal> {
    let mut bytes = Vec::new();
    write(value, &mut bytes)?;
    Ok(bytes)
}

/// Reads one JSON value, and refuses all that two readers could understand differently: an object key given twice,
/// numbers that are not 64-bit integers, anything but white space after the value.
pub fn parse(bytes: &[u8]) -> Result<Value, Refusal> {
    let text = std::str::from_utf8(bytes).map_err(|error| Refusal::NotUtf8 {
        at: error.valid_up_to(),
    })?;
    let refusal = RefCell::new(None);
    let mut reader = serde_json::Deserializer::from_str(text);
    let value = Strict {
        depth: 0,
        refusal: &refusal,
    }
    .deserialize(&mut reader)
    .map_err(|error| {
        refusal.take().unwrap_or(Refusal::NotJson {
            line: error.line(),
            column: error.column(),
        })
    })?;
    reader.end().map_err(|_| Refusal::TrailingBytes)?;
    Ok(value)
}

fn write(value: &Value, bytes: &mut Vec<u8>) -> Result<(), Refusal> {
    match value {
        Value::Null => bytes.extend_from_slice(b"null"),
        Value::Bool(true) => bytes.extend_from_slice(b"true"),
        Value::Bool(false) => bytes.extend_from_slice(b"false"),
        Value::Number(number) if number.is_i64() || number.is_u64() => {
            bytes.extend_from_slice(number.to_string().as_bytes());
        }
        Value::Number(number) => {
            return Err(Refusal::NotAnInteger {
                number: number.to_string(),
            });
        }
        Value::String(text) => write_string(text, bytes),
        Value::Array(values) => {
            bytes.push(b'[');
            for (index, value) in values.iter().enumerate() {
                if index > 0 {
                    bytes.push(b',');
                }
                write(value, bytes)?;
            }
            bytes.push(b']');
        }
        Value::Object(members) => {
            // Sorted here: serde_json's own order depends on which of its features some other crate switched on.
            let mut members: Vec<_> = members.iter().collect();
            members.sort_unstable_by(|(left, _), (right, _)| left.as_bytes().cmp(right.as_bytes()));
            bytes.push(b'{');
            for (index, (key, value)) in members.into_iter().enumerate() {
                if index > 0 {
                    bytes.push(b',');
                }
                write_string(key, bytes);
                bytes.push(b':');
                write(value, bytes)?;
            }
            bytes.push(b'}');
        }
    }
    Ok(())
}

fn write_string(text: &str, bytes: &mut Vec<u8>) {
    bytes.push(b'"');
    for &byte in text.as_bytes() {
        if matches!(byte, b'"' | b'\\') {
            bytes.push(b'\\');
        }
        bytes.push(byte);
    }
    bytes.push(b'"');
}

/// Builds a [`Value`] as serde_json would, but leaves in `refusal` which rule ended it.
#[derive(Clone, Copy)]
struct Strict<'a> {
    depth: usize,
    refusal: &'a RefCell<Option<Refusal>>,
}

impl Strict<'_> {
    fn refuse<E: serde::de::Error>(&self, refusal: Refusal) -> E {
        let error = E::custom(&refusal);
        self.refusal.replace(Some(refusal));
        error
    }

    fn deeper<E: serde::de::Error>(&self) -> Result<Self, E> {
        if self.depth == MAX_DEPTH {
            return Err(self.refuse(Refusal::TooDeep { limit: MAX_DEPTH }));
        }
        Ok(Self {
            depth: self.depth + 1,
            ..*self
        })
    }
}

impl<'de> DeserializeSeed<'de> for Strict<'_> {
    type Value = Value;

    fn deserialize<D: serde::Deserializer<'de>>(self, reader: D) -> Result<Value, D::Error> {
        reader.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        Err(self.refuse(Refusal::NotAnInteger {
            number: value.to_string(),
        }))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Value, A::Error> {
        let deeper = self.deeper()?;
        let mut values = Vec::new();
        while let Some(value) = elements.next_element_seed(deeper)? {
            values.push(value);
        }
        Ok(values.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let deeper = self.deeper()?;
        let mut members = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            if members.contains_key(&key) {
                return Err(self.refuse(Refusal::DuplicateKey { key }));
            }
            let value = entries.next_value_seed(deeper)?;
            if members.insert(key, value).is_some() {
                return Err(A::Error::custom(
                    "an object key appeared while its value was read",
                ));
            }
        }
        Ok(members.into())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn canonical(text: &str) -> Result<String, Refusal> {
        parse(text.as_bytes())
            .and_then(|value| to_bytes(&value))
            .map(|bytes| String::from_utf8(bytes).unwrap())
    }

    #[test]
    fn every_spelling_of_a_value_has_one_canonical_form() {
        for (text, want) in [
            (
                r#" { "b" : 1 , "a" : [ true , false , null ] } "#,
                r#"{"a":[true,false,null],"b":1}"#,
            ),
            (
                r#"{"\u00e9":1,"z":2,"Z":3,"":4}"#,
                "{\"\":4,\"Z\":3,\"z\":2,\"é\":1}",
            ),
            (
                r#""quote \" slash \\ solidus \/ line \n nul \u0000""#,
                "\"quote \\\" slash \\\\ solidus / line \n nul \0\"",
            ),
            ("18446744073709551615", "18446744073709551615"),
            ("-9223372036854775808", "-9223372036854775808"),
            (r#"{"a":{"d":[],"c":{}}}"#, r#"{"a":{"c":{},"d":[]}}"#),
        ] {
            assert_eq!(canonical(text), Ok(want.to_owned()), "{text}");
        }
    }

    #[test]
    fn what_two_readers_could_understand_differently_is_refused() {
        let deep = |levels: usize| "[".repeat(levels) + &"]".repeat(levels);
        assert_eq!(canonical(&deep(MAX_DEPTH)), Ok(deep(MAX_DEPTH)));
        for (text, want) in [
            (
                r#"{"a":1,"b":{"c":1,"c":1}}"#,
                Refusal::DuplicateKey { key: "c".into() },
            ),
            (
                r#"{"a":1,"\u0061":2}"#,
                Refusal::DuplicateKey { key: "a".into() },
            ),
            (
                "[1.5]",
                Refusal::NotAnInteger {
                    number: "1.5".into(),
                },
            ),
            (
                "1e2",
                Refusal::NotAnInteger {
                    number: "100".into(),
                },
            ),
            (
                "-0",
                Refusal::NotAnInteger {
                    number: "-0".into(),
                },
            ),
            (
                "18446744073709551616",
                Refusal::NotAnInteger {
                    number: "18446744073709552000".into(),
                },
            ),
            (&deep(MAX_DEPTH + 1), Refusal::TooDeep { limit: MAX_DEPTH }),
            (&"[".repeat(100_000), Refusal::TooDeep { limit: MAX_DEPTH }),
            ("{} {}", Refusal::TrailingBytes),
            ("{}\0", Refusal::TrailingBytes),
            ("{", Refusal::NotJson { line: 1, column: 1 }),
            ("", Refusal::NotJson { line: 1, column: 0 }),
            ("\u{feff}{}", Refusal::NotJson { line: 1, column: 1 }),
            ("[1,]", Refusal::NotJson { line: 1, column: 4 }),
            ("01", Refusal::NotJson { line: 1, column: 2 }),
            (r#""\ud800""#, Refusal::NotJson { line: 1, column: 8 }),
        ] {
            assert_eq!(canonical(text), Err(want), "{text:.40}");
        }
        assert_eq!(parse(b"\"a\xff\""), Err(Refusal::NotUtf8 { at: 2 }));
    }

    #[test]
    fn a_float_has_no_canonical_form() {
        assert_eq!(
            to_bytes(&serde_json::json!({"a": [1.5]})),
            Err(Refusal::NotAnInteger {
                number: "1.5".into()
            })
        );
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 64, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::hash_map(any::<String>(), inner, 0..6)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_written_as_json_and_parsed_is_the_same_value(value in any_value()) {
            prop_assert_eq!(parse(&serde_json::to_vec(&value).unwrap()), Ok(value));
        }

        #[test]
        fn no_bytes_make_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(value) = parse(&bytes) {
                prop_assert_eq!(serde_json::from_slice::<Value>(&bytes).unwrap(), value);
            }
        }
    }
}
