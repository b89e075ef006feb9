//! Pieces of HTML. Each foreign text goes through [`escape`].

use std::borrow::Cow;

use super::plot::{Plot, variable};
use crate::clones::recording::Time;
use crate::sanitize::sanitize;
use crate::units::Bytes;

/// Escapes a text for the content of an element and for an attribute in quotation marks. Control characters and direction
/// marks become visible.
pub fn escape(text: &str) -> String {
    let text: Cow<'_, str> = sanitize(text);
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
    }
    escaped
}

/// One cell of a table.
#[derive(Debug, Clone)]
pub enum Cell {
    /// A foreign text.
    Text(String),
    /// A time, in one line.
    Time(Time),
    /// A number and how it is shown. The number is the attribute `data-value`.
    Number(u64, String),
    /// A figure that is not known.
    Unknown,
}

impl Cell {
    /// Creates a cell with a size.
    pub fn bytes(bytes: Bytes) -> Cell {
        Cell::Number(bytes.get(), bytes.to_string())
    }

    /// Creates a cell with a number.
    pub fn count(number: u64) -> Cell {
        Cell::Number(number, number.to_string())
    }

    fn html(&self) -> String {
        match self {
            Cell::Text(text) => format!("<td>{}</td>", escape(text)),
            Cell::Time(time) => format!("<td class=\"time\">{time}</td>"),
            Cell::Number(number, text) => {
                format!("<td class=\"number\" data-value=\"{number}\">{}</td>", escape(text))
            }
            Cell::Unknown => "<td class=\"number\">unknown</td>".to_owned(),
        }
    }
}

/// The heading of a column, with the colour of its series in the picture.
#[derive(Debug, Clone, Copy)]
pub struct Heading(pub &'static str, pub Option<u8>);

/// Returns a square in the colour of a series.
fn swatch(color: Option<u8>) -> String {
    color.map_or_else(String::new, |color| format!("<i style=\"background:{}\"></i> ", variable(color)))
}

/// Returns a table that scrolls in its own area if it is large. `id` names the table for a program that reads it.
pub fn table(id: &str, headings: &[Heading], rows: impl IntoIterator<Item = Vec<Cell>>) -> String {
    let rows: Vec<Vec<Cell>> = rows.into_iter().collect();
    let is_number = |column: usize| rows.iter().any(|row| matches!(row.get(column), Some(Cell::Number(..))));
    let heading = |(column, Heading(name, color)): (usize, &Heading)| {
        let class = if is_number(column) { " class=\"number\"" } else { "" };
        format!("<th scope=\"col\"{class}>{}{}</th>", swatch(*color), escape(name))
    };
    let head: String = headings.iter().enumerate().map(heading).collect();
    let row = |row: &Vec<Cell>| format!("<tr>{}</tr>\n", row.iter().map(Cell::html).collect::<String>());
    let body: String = rows.iter().map(row).collect();
    format!(
        "<div class=\"scroll\" tabindex=\"0\"><table id=\"{id}\"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n"
    )
}

/// Returns a table of names and figures, each with the colour of its part of the picture.
pub fn list(id: &str, rows: impl IntoIterator<Item = (String, Cell, Option<u8>)>) -> String {
    let row = |(name, cell, color): (String, Cell, Option<u8>)| {
        format!("<tr><th scope=\"row\">{}{}</th>{}</tr>\n", swatch(color), escape(&name), cell.html())
    };
    let body: String = rows.into_iter().map(row).collect();
    format!("<div class=\"scroll\" tabindex=\"0\"><table id=\"{id}\"><tbody>\n{body}</tbody></table></div>\n")
}

/// Returns a picture beside tables.
pub fn beside(id: &str, plot: &Plot, tables: &str) -> String {
    let Plot { svg, edges: [left, right, top, bottom], x_max, y_max } = plot;
    format!(
        "<div class=\"beside\"><figure id=\"{id}\" data-left=\"{left}\" data-right=\"{right}\" data-top=\"{top}\" \
         data-bottom=\"{bottom}\" data-x-max=\"{x_max}\" data-y-max=\"{y_max}\">{svg}</figure>\n<div>{tables}</div></div>\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_text_cannot_leave_its_place() {
        assert_eq!(escape("<script>&\"'\u{202e}"), "&lt;script&gt;&amp;&quot;&#39;\\u202e");
        let cells = [Cell::Text("</td><b>".into()), Cell::bytes(Bytes::new(1536)), Cell::Unknown];
        let html = table("t", &[Heading("a", None), Heading("b", Some(0))], [cells.to_vec()]);
        assert!(html.contains("<td>&lt;/td&gt;&lt;b&gt;</td>"), "{html}");
        assert!(html.contains("data-value=\"1536\">1.50 KiB</td>"), "{html}");
        assert!(html.contains("<th scope=\"col\">a</th><th scope=\"col\" class=\"number\"><i"), "{html}");
    }
}
