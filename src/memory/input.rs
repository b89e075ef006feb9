//! Typed values from either form of an object: option string or JSON. Each form has its own error texts for values of
//! the wrong type, which are QEMU's.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::error::{Error, Result};

use super::grammar::{self, Pair};

/// The parameters of one object. Each accessor removes its parameter; the remaining parameters are unknown.
#[derive(Debug)]
pub enum Input {
    /// `type,key=value,…`: all values of a key in order; the last value takes effect.
    Words(Vec<Pair>),
    /// `{"qom-type":…}`
    Json(BTreeMap<String, Value>),
}

fn wrong_type(name: &str, expected: &str) -> Error {
    Error::usage(format!("Invalid parameter type for '{name}', expected: {expected}"))
}

impl Input {
    /// Removes all values of a key from an option string and returns them in order.
    fn take_words(words: &mut Vec<Pair>, name: &str) -> Vec<String> {
        let (taken, remaining) = words.drain(..).partition(|pair| pair.key == name);
        *words = remaining;
        let taken: Vec<Pair> = taken;
        taken.into_iter().map(|pair| pair.value).collect()
    }

    /// Removes a string parameter and returns its value.
    ///
    /// # Errors
    /// Returns QEMU's error for a value of another type.
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

    /// Removes a boolean parameter.
    ///
    /// # Errors
    /// Returns QEMU's error for a value of another type.
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

    /// Removes a size parameter and returns it in bytes.
    ///
    /// # Errors
    /// Returns QEMU's error for a value of another type.
    pub fn size(&mut self, name: &str) -> Result<Option<u64>> {
        match self {
            Input::Words(words) => {
                Self::take_words(words, name).pop().map(|text| grammar::size(name, &text)).transpose()
            }
            Input::Json(fields) => fields.remove(name).map(|value| json_number(name, &value)).transpose(),
        }
    }

    /// Removes a 32-bit unsigned parameter.
    ///
    /// # Errors
    /// Returns QEMU's error for a value of another type or out of range.
    pub fn number(&mut self, name: &str) -> Result<Option<u32>> {
        let wide = match self {
            Input::Words(words) => {
                Self::take_words(words, name).pop().map(|text| grammar::number(name, &text)).transpose()
            }
            Input::Json(fields) => fields.remove(name).map(|value| json_number(name, &value)).transpose(),
        }?;
        wide.map(|wide| u32::try_from(wide).map_err(|_| grammar::expects(name, "uint32_t"))).transpose()
    }

    /// Removes a list of 16-bit unsigned numbers: a repeated key with numbers and ranges, or a JSON array.
    ///
    /// # Errors
    /// Returns QEMU's error for a value of another type or out of range.
    pub fn numbers(&mut self, name: &str) -> Result<Vec<u16>> {
        // QEMU has no name for a list member here and prints "null".
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

    /// Removes a parameter with a fixed set of values.
    ///
    /// # Errors
    /// Returns QEMU's error for any other value.
    pub fn choice<T: Copy>(&mut self, name: &str, choices: &[(&str, T)]) -> Result<Option<T>> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        match choices.iter().find(|(word, _)| *word == text) {
            Some((_, choice)) => Ok(Some(*choice)),
            None => Err(Error::usage(format!("Parameter '{name}' does not accept value '{text}'"))),
        }
    }

    /// Checks that no parameters remain.
    ///
    /// # Errors
    /// Returns QEMU's error for an unknown parameter.
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

/// Converts a JSON integer. Negative numbers wrap around at 2^64, as in QEMU.
fn json_number(name: &str, value: &Value) -> Result<u64> {
    value
        .as_u64()
        .or_else(|| value.as_i64().map(|negative| negative.cast_unsigned()))
        .ok_or_else(|| grammar::expects(name, "uint64"))
}

/// Returns QEMU's error for a missing parameter.
pub fn missing(name: &str) -> Error {
    Error::usage(format!("Parameter '{name}' is missing"))
}
