//! Typed values out of either form of an object: option string or JSON. Each form has its own words
//! for a wrong type, and they are QEMU's.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::error::{Error, Result};

use super::grammar::{self, Pair};

/// The parameters of one object; each is taken out once, what remains is unknown.
#[derive(Debug)]
pub enum Input {
    /// `type,key=value,…`: every value of a key, in order; the last one counts.
    Words(Vec<Pair>),
    /// `{"qom-type":…}`
    Json(BTreeMap<String, Value>),
}

fn wrong_type(name: &str, expected: &str) -> Error {
    Error::usage(format!("Invalid parameter type for '{name}', expected: {expected}"))
}

impl Input {
    /// The values of a key in an option string, first to last.
    fn take_words(words: &mut Vec<Pair>, name: &str) -> Vec<String> {
        let (taken, kept) = words.drain(..).partition(|pair| pair.key == name);
        *words = kept;
        let taken: Vec<Pair> = taken;
        taken.into_iter().map(|pair| pair.value).collect()
    }

    /// A text.
    ///
    /// # Errors
    /// QEMU's words for a value of another type.
    pub fn text(&mut self, name: &str) -> Result<Option<String>> {
        match self {
            Input::Words(words) => Ok(Self::take_words(words, name).pop()),
            Input::Json(fields) => match fields.remove(name) {
                None => Ok(None),
                Some(Value::String(text)) => Ok(Some(text)),
                Some(_) => Err(wrong_type(name, "string")),
            },
        }
    }

    /// On or off.
    ///
    /// # Errors
    /// QEMU's words for a value of another type.
    pub fn switch(&mut self, name: &str) -> Result<Option<bool>> {
        match self {
            Input::Words(words) => match Self::take_words(words, name).pop().as_deref() {
                None => Ok(None),
                Some("on" | "yes" | "true" | "y") => Ok(Some(true)),
                Some("off" | "no" | "false" | "n") => Ok(Some(false)),
                Some(_) => Err(grammar::expects(name, "'on' or 'off'")),
            },
            Input::Json(fields) => match fields.remove(name) {
                None => Ok(None),
                Some(Value::Bool(value)) => Ok(Some(value)),
                Some(_) => Err(wrong_type(name, "boolean")),
            },
        }
    }

    /// A size in bytes.
    ///
    /// # Errors
    /// QEMU's words for a value of another type.
    pub fn size(&mut self, name: &str) -> Result<Option<u64>> {
        match self {
            Input::Words(words) => {
                Self::take_words(words, name).pop().map(|text| grammar::size(name, &text)).transpose()
            }
            Input::Json(fields) => fields.remove(name).map(|value| json_number(name, &value)).transpose(),
        }
    }

    /// A number of 32 bits.
    ///
    /// # Errors
    /// QEMU's words for a value of another type or size.
    pub fn number(&mut self, name: &str) -> Result<Option<u32>> {
        let wide = match self {
            Input::Words(words) => {
                Self::take_words(words, name).pop().map(|text| grammar::number(name, &text)).transpose()
            }
            Input::Json(fields) => fields.remove(name).map(|value| json_number(name, &value)).transpose(),
        }?;
        wide.map(|wide| u32::try_from(wide).map_err(|_| grammar::expects(name, "uint32_t"))).transpose()
    }

    /// A list of numbers of 16 bits: a repeated key with numbers and ranges, or an array.
    ///
    /// # Errors
    /// QEMU's words for a value of another type or size.
    pub fn numbers(&mut self, name: &str) -> Result<Vec<u16>> {
        // QEMU has no name for a list's member here, and says so.
        let narrow = |wide: u64| u16::try_from(wide).map_err(|_| grammar::expects("null", "uint16_t"));
        let mut numbers = Vec::new();
        match self {
            Input::Words(words) => {
                for text in Self::take_words(words, name) {
                    for wide in grammar::number_or_range(name, &text)? {
                        numbers.push(narrow(wide)?);
                    }
                }
            }
            Input::Json(fields) => match fields.remove(name) {
                None => {}
                Some(Value::Array(values)) => {
                    for (n, value) in values.iter().enumerate() {
                        numbers.push(narrow(json_number(&format!("{name}[{n}]"), value)?)?);
                    }
                }
                Some(_) => return Err(wrong_type(name, "array")),
            },
        }
        Ok(numbers)
    }

    /// One of the words of a list.
    ///
    /// # Errors
    /// QEMU's words for any other.
    pub fn choice<T: Copy>(&mut self, name: &str, choices: &[(&str, T)]) -> Result<Option<T>> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        match choices.iter().find(|(word, _)| *word == text) {
            Some((_, choice)) => Ok(Some(*choice)),
            None => Err(Error::usage(format!("Parameter '{name}' does not accept value '{text}'"))),
        }
    }

    /// Refuses what nobody has taken out.
    ///
    /// # Errors
    /// QEMU's words for an unknown parameter.
    pub fn end(&self) -> Result<()> {
        match self {
            Input::Words(words) => words
                .first()
                .map_or(Ok(()), |pair| Err(Error::usage(format!("Invalid parameter '{}'", pair.key)))),
            Input::Json(fields) => fields
                .keys()
                .next()
                .map_or(Ok(()), |key| Err(Error::usage(format!("Parameter '{key}' is unexpected")))),
        }
    }
}

/// A JSON integer; a negative one counts from 2^64 downwards, as QEMU has it.
fn json_number(name: &str, value: &Value) -> Result<u64> {
    value
        .as_u64()
        .or_else(|| value.as_i64().map(|negative| negative as u64))
        .ok_or_else(|| grammar::expects(name, "uint64"))
}

/// QEMU's words for a parameter that must be there and is not.
pub fn missing(name: &str) -> Error {
    Error::usage(format!("Parameter '{name}' is missing"))
}
