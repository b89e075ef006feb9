//! JSON as QEMU's command line parses it: strings in single or double quotes, no duplicate keys, and QEMU's error
//! texts.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::error::{Error, Result};

/// Maximum nesting depth of objects and arrays.
const MAX_DEPTH: usize = 1024;

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Mark(char),
    Text(String),
    Number(Value),
    Word(String),
}

fn bad(what: impl std::fmt::Display) -> Error {
    Error::usage(format!("JSON parse error, {what}"))
}

/// Parses one JSON object.
///
/// # Errors
/// Returns [`Code::Usage`](crate::error::Code::Usage) with QEMU's text for invalid JSON.
pub fn object(text: &str) -> Result<BTreeMap<String, Value>> {
    let mut reader = Reader { rest: text };
    let value = reader.value()?;
    if !reader.rest.trim_start().is_empty() {
        return Err(Error::usage("Expecting at most one JSON value"));
    }
    match value {
        Value::Object(fields) => Ok(fields.into_iter().collect()),
        _ => Err(Error::usage("Invalid parameter type for 'null', expected: object")),
    }
}

struct Reader<'a> {
    rest: &'a str,
}

/// An object or array whose end is not read yet.
enum Open {
    /// The members so far, and the key whose value comes next.
    Object(serde_json::Map<String, Value>, Option<String>),
    Array(Vec<Value>),
}

/// A container after one more key or value.
enum Added {
    Complete(Value),
    Open(Open),
}

/// Returns the value of a token that is neither an object nor an array.
fn scalar(token: Token) -> Result<Value> {
    match token {
        Token::Text(text) => Ok(Value::String(text)),
        Token::Number(number) => Ok(number),
        Token::Word(word) => match word.as_str() {
            "true" => Ok(Value::Bool(true)),
            "false" => Ok(Value::Bool(false)),
            "null" => Ok(Value::Null),
            other => Err(bad(format_args!("invalid keyword '{other}'"))),
        },
        Token::Mark(_) => Err(bad("expecting value")),
    }
}

impl Reader<'_> {
    /// Returns the next token, or `None` at the end.
    fn next(&mut self) -> Result<Option<Token>> {
        self.rest = self.rest.trim_start_matches([' ', '\t', '\r', '\n']);
        let Some(first) = self.rest.chars().next() else { return Ok(None) };
        let token = match first {
            '{' | '}' | '[' | ']' | ',' | ':' => {
                self.rest = &self.rest[1..];
                Token::Mark(first)
            }
            '"' | '\'' => self.string(first)?,
            '-' | '0'..='9' => self.number()?,
            'a'..='z' => {
                let end = self.rest.find(|c: char| !c.is_ascii_lowercase()).unwrap_or(self.rest.len());
                let (word, rest) = self.rest.split_at(end);
                self.rest = rest;
                Token::Word(word.to_owned())
            }
            other => return Err(bad(format_args!("stray '{other}'"))),
        };
        Ok(Some(token))
    }

    fn need(&mut self) -> Result<Token> {
        self.next()?.ok_or_else(|| bad("premature EOI"))
    }

    /// Parses a value. Open containers are kept in a list, not on the stack, so that a thread with a small stack can
    /// parse the deepest value.
    fn value(&mut self) -> Result<Value> {
        let mut open: Vec<Open> = Vec::new();
        let mut token = self.need()?;
        loop {
            let mut value = match token {
                Token::Mark(mark @ ('{' | '[')) => {
                    if open.len() == MAX_DEPTH {
                        return Err(Error::usage("JSON nesting depth limit exceeded"));
                    }
                    token = self.need()?;
                    match (mark, &token) {
                        ('{', Token::Mark('}')) => Value::Object(serde_json::Map::new()),
                        ('[', Token::Mark(']')) => Value::Array(Vec::new()),
                        _ => {
                            open.push(match mark {
                                '{' => Open::Object(serde_json::Map::new(), None),
                                _ => Open::Array(Vec::new()),
                            });
                            continue;
                        }
                    }
                }
                other => scalar(other)?,
            };
            loop {
                let Some(container) = open.pop() else { return Ok(value) };
                match self.add(container, value)? {
                    Added::Complete(complete) => value = complete,
                    Added::Open(container) => {
                        open.push(container);
                        break;
                    }
                }
            }
            token = self.need()?;
        }
    }

    /// Adds a key or value to a container and reads the separator after it.
    fn add(&mut self, container: Open, value: Value) -> Result<Added> {
        match container {
            Open::Object(fields, None) => {
                let Value::String(key) = value else { return Err(bad("key is not a string in object")) };
                if self.need()? != Token::Mark(':') {
                    return Err(bad("missing : in object pair"));
                }
                Ok(Added::Open(Open::Object(fields, Some(key))))
            }
            Open::Object(mut fields, Some(key)) => {
                if fields.insert(key, value).is_some() {
                    return Err(bad("duplicate key"));
                }
                match self.need()? {
                    Token::Mark('}') => Ok(Added::Complete(Value::Object(fields))),
                    Token::Mark(',') => Ok(Added::Open(Open::Object(fields, None))),
                    _ => Err(bad("expected separator in dict")),
                }
            }
            Open::Array(mut members) => {
                members.push(value);
                match self.need()? {
                    Token::Mark(']') => Ok(Added::Complete(Value::Array(members))),
                    Token::Mark(',') => Ok(Added::Open(Open::Array(members))),
                    _ => Err(bad("expected separator in list")),
                }
            }
        }
    }

    /// Parses a number. An integer that fits into neither `i64` nor `u64` becomes a floating-point number.
    fn number(&mut self) -> Result<Token> {
        let inside = |c: char| !matches!(c, '0'..='9' | '+' | '-' | '.' | 'e' | 'E');
        let end = self.rest.find(inside).unwrap_or(self.rest.len());
        let (text, rest) = self.rest.split_at(end);
        // serde_json parses the number, because the JSON grammar is stricter than the parsers of Rust's standard
        // library.
        let value: Value = serde_json::from_str(text).map_err(|_| bad(format_args!("stray '{text}'")))?;
        self.rest = rest;
        Ok(Token::Number(value))
    }

    fn string(&mut self, quote: char) -> Result<Token> {
        let mut text = String::new();
        let mut chars = self.rest[1..].char_indices();
        while let Some((at, c)) = chars.next() {
            match c {
                c if c == quote => {
                    self.rest = &self.rest[1 + at + 1..];
                    return Ok(Token::Text(text));
                }
                '\\' => {
                    let escape = chars.next().map(|(_, c)| c);
                    text.push(match escape {
                        Some(c @ ('"' | '\'' | '\\' | '/')) => c,
                        Some('b') => '\x08',
                        Some('f') => '\x0c',
                        Some('n') => '\n',
                        Some('r') => '\r',
                        Some('t') => '\t',
                        Some('u') => unicode(&mut chars)?,
                        Some(_) => return Err(bad("invalid escape sequence in string")),
                        None => break,
                    });
                }
                c if c < ' ' => return Err(bad("invalid character in string")),
                c => text.push(c),
            }
        }
        Err(bad(format_args!("stray '{}'", self.rest)))
    }
}

/// Decodes four hexadecimal digits, or two escapes (a surrogate pair) for a character beyond 16 bits.
fn unicode(chars: &mut std::str::CharIndices<'_>) -> Result<char> {
    let wrong = || bad("invalid hex escape sequence in string");
    let mut four = || -> Option<u32> {
        let mut value = 0;
        for _ in 0..4 {
            value = value << 4 | chars.next()?.1.to_digit(16)?;
        }
        Some(value)
    };
    let first = four().ok_or_else(wrong)?;
    if !(0xd800..0xdc00).contains(&first) {
        return char::from_u32(first).ok_or_else(wrong);
    }
    let pair = (chars.next().map(|(_, c)| c), chars.next().map(|(_, c)| c));
    if pair != (Some('\\'), Some('u')) {
        return Err(wrong());
    }
    let mut second = 0;
    for _ in 0..4 {
        let digit = chars.next().and_then(|(_, c)| c.to_digit(16)).ok_or_else(wrong)?;
        second = second << 4 | digit;
    }
    if !(0xdc00..0xe000).contains(&second) {
        return Err(wrong());
    }
    char::from_u32(0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00)).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_objects() {
        let fields =
            object(r#" {"a" : 1, 'b':"x\u00e4\n\ud83d\ude00", "c":[true,null,[]], "d":{}, "e":-1.5e3} "#);
        let fields = fields.unwrap();
        assert_eq!(fields["a"], 1);
        assert_eq!(fields["b"], "xä\n😀");
        assert_eq!(fields["c"], serde_json::json!([true, null, []]));
        assert_eq!(fields["d"], serde_json::json!({}));
        assert_eq!(fields["e"], -1500.0);
        assert!(object("{}").unwrap().is_empty());
        assert_eq!(object(r#"{"n":18446744073709551615}"#).unwrap()["n"], u64::MAX);
        assert!(object(r#"{"n":18446744073709551616}"#).unwrap()["n"].is_f64());
    }

    #[test]
    fn errors_have_qemus_text() {
        for (text, words) in [
            (r#"{"a":1,"a":2}"#, "JSON parse error, duplicate key"),
            ("{bla}", "JSON parse error, invalid keyword 'bla'"),
            (r#"{"a":1,"#, "JSON parse error, premature EOI"),
            (r#"{"a":1,,}"#, "JSON parse error, expecting value"),
            (r#"{"a":1,}"#, "JSON parse error, expecting value"),
            (r#"{"a" 1}"#, "JSON parse error, missing : in object pair"),
            (r#"{"a":1 "b":2}"#, "JSON parse error, expected separator in dict"),
            (r#"{"a":[1 2]}"#, "JSON parse error, expected separator in list"),
            ("{\"a", "JSON parse error, stray '\"a'"),
            (r#"{"a":01}"#, "JSON parse error, stray '01'"),
            ("{1:1}", "JSON parse error, key is not a string in object"),
            (r#"{"a":1} x"#, "Expecting at most one JSON value"),
        ] {
            assert_eq!(object(text).unwrap_err().message(), words, "{text}");
        }
        for text in [
            "{",
            "[",
            "[1]",
            "{\"a",
            r#"{"a":"\x"}"#,
            r#"{"a":"\ud800"}"#,
            "{\"a\":01}",
            "{\"a\":\u{1}}",
            "{§}",
        ] {
            assert!(object(text).is_err(), "{text}");
        }
        let nested = |depth: usize| object(&format!(r#"{{"a":{}{}}}"#, "[".repeat(depth), "]".repeat(depth)));
        assert!(nested(MAX_DEPTH - 1).is_ok());
        assert_eq!(nested(MAX_DEPTH).unwrap_err().message(), "JSON nesting depth limit exceeded");
    }
}
