//! Pages of the documentation whose commands are run: their blocks, and the comparison of shown and real output.
//!
//! In a block marked `console` a line that begins with `$ ` is a command, with further lines that begin with `> `; what
//! follows is its output. Words after a comma in the info string:
//!
//! | word | meaning |
//! |---|---|
//! | `varies=CLASS+CLASS` | words of these classes may differ |
//! | `record` | the block is part of the recorded session |
//! | `not-run=REASON` | the block is not run |
//!
//! | class | words |
//! |---|---|
//! | `digest` | 12 or 64 hexadecimal digits |
//! | `id` | 8 hexadecimal digits: a clone; `-` and a number after them: a simulated clone |
//! | `pid` | a number after an id, a comma after a pid, or one of the words in `BEFORE_PID`; numbers joined by `-` |
//! | `number` | any integer |
//! | `ratio` | a number with decimals |
//! | `size` | a number and a unit of bytes |
//! | `time` | a number and a unit of time, a rate (a size and `/s`), a moment in RFC 3339 |
//! | `address` | a UUID, a MAC address, an IP address with a port |
//!
//! A block of another language with `file=PATH` is saved under that path, as the reader would do. In output, `[..]`
//! stands for any text in a line, and a line `[...]` for any number of lines. Runs of blanks count as one blank.

/// A fenced block.
pub struct Block {
    /// Number of the fence's line, from 0.
    pub line: usize,
    pub language: String,
    options: Vec<String>,
    pub lines: Vec<String>,
}

/// A command of a block and its output as shown.
pub struct Step {
    /// Number of the line, from 0.
    pub line: usize,
    pub command: String,
    /// Number of lines of the command.
    pub length: usize,
    pub shown: Vec<String>,
}

impl Block {
    /// The value of `NAME=VALUE` in the info string.
    pub fn option(&self, name: &str) -> Option<&str> {
        self.options.iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    }

    /// True if the info string has the word.
    pub fn has(&self, word: &str) -> bool {
        self.options.iter().any(|option| option == word)
    }

    /// The classes of words that vary.
    pub fn varies(&self) -> Vec<&str> {
        self.option("varies").map(|list| list.split('+').collect()).unwrap_or_default()
    }

    /// The commands.
    pub fn steps(&self) -> Vec<Step> {
        let mut steps: Vec<Step> = Vec::new();
        for (line, text) in (self.line + 1..).zip(&self.lines) {
            if let Some(command) = text.strip_prefix("$ ") {
                steps.push(Step { line, command: command.to_owned(), length: 1, shown: Vec::new() });
                continue;
            }
            let step =
                steps.last_mut().unwrap_or_else(|| panic!("line {}: output without a command", line + 1));
            match text.strip_prefix("> ").or_else(|| (text == ">").then_some("")) {
                Some(more) if step.shown.is_empty() => {
                    step.command += "\n";
                    step.command += more;
                    step.length += 1;
                }
                _ => step.shown.push(text.clone()),
            }
        }
        steps
    }
}

/// The fenced blocks of a page.
pub fn blocks(text: &str) -> Vec<Block> {
    let mut blocks = Vec::new();
    let mut open: Option<Block> = None;
    for (line, text) in text.lines().enumerate() {
        match (text.strip_prefix("```"), &mut open) {
            (Some(info), None) => {
                let mut words = info.split(',').map(str::to_owned);
                let language = words.next().unwrap();
                open = Some(Block { line, language, options: words.collect(), lines: Vec::new() });
            }
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (None, Some(block)) => block.lines.push(text.to_owned()),
            (None, None) => {}
        }
    }
    assert!(open.is_none(), "a block has no end");
    blocks
}

/// Violations of the rules for a page: every command is in a block that is run, or that gives the reason why it is not
/// run.
pub fn violations(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for block in blocks(text) {
        let at = block.line + 1;
        let known = |word: &String| {
            ["varies=", "not-run=", "file="]
                .iter()
                .any(|name| word.starts_with(name) && word.len() > name.len())
                || word == "record"
        };
        if !block.options.iter().all(known) {
            found.push(format!("line {at}: unknown word in the info string: {:?}", block.options));
        }
        let unknown: Vec<&str> =
            block.varies().into_iter().filter(|class| !CLASSES.contains(class)).collect();
        if !unknown.is_empty() {
            found.push(format!("line {at}: unknown classes: {unknown:?}"));
        }
        match block.language.as_str() {
            "console" if block.lines.first().is_none_or(|line| !line.starts_with("$ ")) => {
                found.push(format!("line {at}: the block does not begin with a command"));
            }
            "console" => {}
            "sh" | "bash" | "shell" if block.option("file").is_none() => {
                found.push(format!(
                    "line {at}: commands belong in a block marked 'console', a script has 'file='"
                ));
            }
            _ if block.lines.iter().any(|line| line.trim_start().starts_with("$ ")) => {
                found.push(format!("line {at}: a command in a block that is not marked 'console'"));
            }
            _ => {}
        }
    }
    let mut fenced = false;
    for (line, text) in (1..).zip(text.lines()) {
        fenced ^= text.starts_with("```");
        let indented = text.strip_prefix("    ").is_some_and(|rest| rest.trim_start().starts_with("$ "));
        if !fenced && (text.starts_with("$ ") || indented) {
            found.push(format!("line {line}: a command outside of a block"));
        }
        if text.trim_start() != text && text.trim_start().starts_with("```") {
            found.push(format!("line {line}: an indented fence"));
        }
    }
    found
}

/// Classes of words that may vary.
const CLASSES: [&str; 8] = ["digest", "id", "pid", "number", "ratio", "size", "time", "address"];

/// Words before the number of a process.
const BEFORE_PID: [&str; 5] = ["supervisor", "server", "process", "it", "pid"];

const TIMES: [&str; 12] =
    ["ms", "s", "min", "h", "second", "seconds", "minute", "minutes", "hour", "hours", "day", "days"];

const SIZES: [&str; 6] = ["B", "bytes", "KiB", "MiB", "GiB", "TiB"];

fn is_hex(word: &str) -> bool {
    !word.is_empty() && word.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

fn is_number(word: &str) -> bool {
    word.starts_with(|c: char| c.is_ascii_digit())
        && word.chars().all(|c| c.is_ascii_digit() || c == '.' || c == '-')
}

/// How many of the first words belong to the class, 0 if the first one does not. `before` is the text before them.
fn belongs(class: &str, words: &[&str], before: &str) -> usize {
    let word = words[0];
    let next = |at: usize| words.get(at).copied().unwrap_or("");
    let unit = |units: &[&str]| is_number(word) && next(1).trim().is_empty() && units.contains(&next(2));
    let attached = |units: &[&str]| units.iter().any(|u| word.strip_suffix(u).is_some_and(is_number));
    let groups = |sign: char| word.split(sign).map(str::len).collect::<Vec<_>>();
    let hex = |sign: char| word.split(sign).all(is_hex);
    let integer = word.bytes().all(|b| b.is_ascii_digit());
    let one = |yes: bool| usize::from(yes);
    match class {
        "digest" => one(is_hex(word) && matches!(word.len(), 12 | 64)),
        "id" => one({
            let (id, index) = word.split_once('-').unwrap_or((word, "0"));
            is_hex(id) && id.len() == 8 && index.parse::<u32>().is_ok()
        }),
        "pid" if integer => {
            let last = before.trim_end_matches([' ', ':']).rsplit(' ').next().unwrap_or("");
            one(last == "<id>" || last.ends_with("<pid>,") || BEFORE_PID.contains(&last))
        }
        "pid" => one(is_number(word) && word.contains('-') && !word.contains('.')),
        "number" => one(integer),
        "ratio" => one(is_number(word) && word.contains('.') && !unit(&SIZES)),
        "size" if unit(&SIZES) => 3,
        "time" if unit(&SIZES) && (next(3), next(4)) == ("/", "s") => 5,
        "time" if unit(&TIMES) => 3,
        "time" if attached(&["ms", "s", "m", "h", "d"]) => 1,
        "time" => one(word.len() >= 19 && word.as_bytes()[10] == b'T' && is_number(&word[..10])),
        "address" if hex('-') && groups('-') == [8, 4, 4, 4, 12] => 1,
        "address" if hex(':') && groups(':') == [2; 6] => 1,
        "address" => one(word
            .rsplit_once(':')
            .is_some_and(|(host, port)| is_number(host) && host.contains('.') && is_number(port))),
        _ => 0,
    }
}

/// The words and signs of a line; runs of blanks are one word.
fn words(line: &str) -> Vec<&str> {
    let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | ':' | '-');
    let mut words: Vec<&str> = Vec::new();
    let mut rest = line.trim();
    while let Some(first) = rest.chars().next() {
        let run = |belongs: &dyn Fn(char) -> bool| rest.find(|c| !belongs(c)).unwrap_or(rest.len());
        let length = match first {
            ' ' => run(&|c| c == ' '),
            c if inner(c) => run(&inner),
            c => c.len_utf8(),
        };
        // A sign at the end belongs to the sentence.
        let core = rest[..length].trim_end_matches(['.', ':', '-']);
        let length = if core.is_empty() { length } else { core.len() };
        words.push(&rest[..length]);
        rest = &rest[length..];
    }
    words
}

/// A line with one blank for each run of blanks, and the name of its class for each word that may vary.
fn normal(line: &str, varies: &[&str]) -> String {
    let words = words(line);
    let mut text = String::new();
    let mut at = 0;
    while at < words.len() {
        let word = words[at];
        if word.starts_with(' ') {
            text.push(' ');
            at += 1;
            continue;
        }
        let classes = varies.iter().map(|class| (belongs(class, &words[at..], &text), class));
        match classes.max().filter(|(length, _)| *length > 0) {
            Some((length, class)) => {
                text += &format!("<{class}>");
                at += length;
                continue;
            }
            // A name with an id at its end.
            None => match word.rsplit_once('-') {
                Some((name, id)) if varies.contains(&"id") && belongs("id", &[id], "") > 0 => {
                    text += &format!("{name}-<id>");
                }
                _ => text += word,
            },
        }
        at += 1;
    }
    text
}

/// True if a shown line, which may have `[..]` in it, stands for the real one.
pub fn line_matches(shown: &str, real: &str, varies: &[&str]) -> bool {
    let (shown, real) = (normal(shown, varies), normal(real, varies));
    let mut parts = shown.split("[..]");
    let Some(mut rest) = real.strip_prefix(parts.next().unwrap()) else { return false };
    let Some(last) = shown.contains("[..]").then(|| shown.rsplit("[..]").next().unwrap()) else {
        return rest.is_empty();
    };
    let middle: Vec<&str> = parts.collect();
    for part in &middle[..middle.len() - 1] {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

/// True if shown lines stand for the real ones.
pub fn matches(shown: &[String], real: &[String], varies: &[&str]) -> bool {
    match (shown.split_first(), real.split_first()) {
        (None, None) => true,
        (Some((first, after)), _) if first == "[...]" => {
            (0..=real.len()).any(|skipped| matches(after, &real[skipped..], varies))
        }
        (Some((one, after)), Some((other, rest))) => {
            line_matches(one, other, varies) && matches(after, rest, varies)
        }
        _ => false,
    }
}

/// The real lines, except that a shown line with `[..]` replaces the real line that it matches.
pub fn updated(shown: &[String], real: &[String]) -> Vec<String> {
    let mut next = 0;
    real.iter()
        .map(|line| {
            match shown[next..].iter().position(|s| s.contains("[..]") && line_matches(s, line, &[])) {
                Some(at) => {
                    next += at + 1;
                    shown[next - 1].clone()
                }
                None => line.clone(),
            }
        })
        .collect()
}
