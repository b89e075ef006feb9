//! QEMU property strings, `first,key=value,…`, and their JSON form.

use serde_json::Value;

/// The properties of one `-object`, `-device`, `-machine` or `-chardev`, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Props {
    list: Vec<(String, String)>,
}

impl Props {
    /// Parses one argument; `implied` is the key of a first word without a key (`qom-type`, `driver`, `type`).
    ///
    /// Nested JSON objects become dotted keys, as in QEMU. Returns `None` for invalid JSON, or JSON with lists of
    /// anything but strings.
    pub fn parse(text: &str, implied: &str) -> Option<Props> {
        if text.trim_start().starts_with('{') {
            let Value::Object(object) = serde_json::from_str(text).ok()? else { return None };
            let mut list = vec![];
            flatten("", object, &mut list)?;
            return Some(Props { list });
        }
        let mut list = vec![];
        for (number, word) in split(text).into_iter().enumerate() {
            let pair = match word.split_once('=') {
                Some((key, value)) => (key.to_owned(), value.to_owned()),
                None if number == 0 => (implied.to_owned(), word),
                // `share` alone means `share=on`; QEMU has removed the negated form `noshare`.
                None => (word, "on".to_owned()),
            };
            list.push(pair);
        }
        Some(Props { list })
    }

    /// Returns the value of a key; the last value wins, as in QEMU.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.list.iter().rev().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }

    /// Sets a key at its first position, or appends it. Removes further values of the key.
    pub fn set(&mut self, key: &str, value: &str) {
        let place = self.list.iter().position(|(k, _)| k == key);
        self.list.retain({
            let mut seen = false;
            move |(k, _)| k != key || !std::mem::replace(&mut seen, true)
        });
        match place.and_then(|i| self.list.get_mut(i)) {
            Some((_, old)) => value.clone_into(old),
            None => self.list.push((key.to_owned(), value.to_owned())),
        }
    }

    /// Returns keys and values in order; a key may occur more than once.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.list.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// Returns the values of a key that may occur more than once, mutably.
    pub fn all_mut<'a>(&'a mut self, key: &'a str) -> impl Iterator<Item = &'a mut String> {
        self.list.iter_mut().filter(move |(k, _)| k == key).map(|(_, value)| value)
    }

    /// Returns true if a value has braces, so that it could be taken for a placeholder.
    pub fn has_braces(&self) -> bool {
        self.list.iter().any(|(_, value)| value.contains(['{', '}']))
    }

    /// Removes a key.
    pub fn remove(&mut self, key: &str) {
        self.list.retain(|(k, _)| k != key);
    }

    /// Returns the properties in the plain form. Placeholders stay as they are; their values are escaped when filled
    /// in.
    pub fn render(&self, implied: &str) -> String {
        // The plain form can express every property of the JSON form.
        let mut words = vec![];
        for (number, (key, value)) in self.list.iter().enumerate() {
            let value = value.replace(',', ",,");
            if number == 0 && key == implied && !value.contains('=') {
                words.push(value);
            } else {
                words.push(format!("{key}={value}"));
            }
        }
        words.join(",")
    }

    /// Moves the implied key to the front, as the plain form requires.
    pub fn lead_with(&mut self, implied: &str) {
        if let Some(place) = self.list.iter().position(|(k, _)| k == implied) {
            let first = self.list.remove(place);
            self.list.insert(0, first);
        }
    }
}

/// Splits at single commas; `,,` is a literal comma.
fn split(text: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let more = match c {
            ',' if chars.peek() == Some(&',') => {
                chars.next();
                ','
            }
            ',' => {
                words.push(String::new());
                continue;
            }
            c => c,
        };
        if let Some(word) = words.last_mut() {
            word.push(more);
        }
    }
    words
}

/// Appends the pairs of a JSON object; returns `None` for lists that do not consist of QEMU's string objects (`[{"str":
/// …}]`).
fn flatten(
    prefix: &str,
    object: serde_json::Map<String, Value>,
    list: &mut Vec<(String, String)>,
) -> Option<()> {
    for (key, value) in object {
        let key = format!("{prefix}{key}");
        match value {
            Value::Object(inner) => flatten(&format!("{key}."), inner, list)?,
            Value::Array(items) => {
                for item in items {
                    let text = item.get("str").and_then(Value::as_str)?;
                    list.push((key.clone(), text.to_owned()));
                }
            }
            // `"backing": null` is a block node without a backing file.
            Value::Null => {}
            value => list.push((key, plain(value)?)),
        }
    }
    Some(())
}

fn plain(value: Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text),
        Value::Bool(on) => Some(if on { "on" } else { "off" }.to_owned()),
        Value::Number(number) => Some(number.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

/// Returns true for QEMU's spellings of a true boolean.
pub(super) fn is_on(value: Option<&str>) -> bool {
    matches!(value, Some("on" | "yes" | "true" | "y"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_inside_values_survive() {
        let mut props = Props::parse("memory-backend-file,id=ram0,mem-path=/a,,b,share", "qom-type").unwrap();
        assert_eq!(props.get("qom-type"), Some("memory-backend-file"));
        assert_eq!(props.get("mem-path"), Some("/a,b"));
        assert_eq!(props.get("share"), Some("on"));
        assert_eq!(props.render("qom-type"), "memory-backend-file,id=ram0,mem-path=/a,,b,share=on");
        props.set("mem-path", "{memory}");
        props.remove("share");
        props.set("rom", "off");
        assert_eq!(props.render("qom-type"), "memory-backend-file,id=ram0,mem-path={memory},rom=off");
    }

    #[test]
    fn json_form_equals_the_plain_form() {
        let text = r#"{"id":"ram0","qom-type":"memory-backend-file","size":4096,"share":true}"#;
        let mut props = Props::parse(text, "qom-type").unwrap();
        props.lead_with("qom-type");
        assert_eq!(props.get("size"), Some("4096"));
        assert!(props.render("qom-type").starts_with("memory-backend-file,"));
        assert!(Props::parse(r#"{"a":[1]}"#, "driver").is_none());
        let deep =
            Props::parse(r#"{"driver":"raw","file":{"driver":"file","filename":"/d"}}"#, "driver").unwrap();
        assert_eq!(deep.get("file.filename"), Some("/d"));
        let forwards = r#"{"type":"user","hostfwd":[{"str":"tcp::1-:2"},{"str":"udp::3-:4"}]}"#;
        let forwards = Props::parse(forwards, "type").unwrap();
        assert_eq!(forwards.render("type"), "user,hostfwd=tcp::1-:2,hostfwd=udp::3-:4");
    }
}
