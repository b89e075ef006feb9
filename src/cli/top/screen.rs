//! Draws the state of the screen.

use std::collections::VecDeque;

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::{Color, Modifier, Style};
use ratatui::widgets::{Sparkline, Widget};

use super::app::{App, Mode};
use super::figures::Figures;
use super::keys::HELP;
use super::rows::Row;
use super::strip;
use super::text::rate;
use crate::clones::accounting::CloneMemory;
use crate::clones::counted;
use crate::sanitize::{sanitize, utc};
use crate::units::Bytes;

/// Lines besides the rows of templates and clones: title, three totals, two headings, the selected clone, and the keys.
const OTHER_LINES: u16 = 8;

/// Width of the name and the value of a total.
const TOTAL_WIDTH: u16 = 30;

/// From this width on, a row has more columns.
const WIDE: u16 = 120;

/// Colours of the screen. `NO_COLOR` removes them; letters then name the states of pages.
#[derive(Debug, Clone, Copy)]
pub struct Palette {
    pub has_colours: bool,
}

impl Palette {
    /// Follows <https://no-color.org>: a value that is not empty removes the colours.
    pub fn of_environment() -> Palette {
        Palette { has_colours: std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()) }
    }

    fn style(self, colour: Color) -> Style {
        if self.has_colours { Style::new().fg(colour) } else { Style::new() }
    }
}

const HEADING: Style = Style::new().add_modifier(Modifier::BOLD);
const SELECTED: Style = Style::new().add_modifier(Modifier::REVERSED);

/// Returns the number of rows for templates on a screen of this height.
fn template_rows(height: u16, templates: usize) -> u16 {
    u16::try_from(templates).unwrap_or(u16::MAX).min((height / 8).max(1))
}

/// Returns the number of rows for clones on a screen of this height.
pub fn clone_rows(height: u16, app: &App) -> usize {
    let templates = app.figures.as_ref().map_or(0, |figures| figures.templates.len());
    height.saturating_sub(OTHER_LINES + template_rows(height, templates)).into()
}

/// Draws everything.
pub fn draw(buffer: &mut Buffer, app: &App, palette: Palette) {
    let mut page = Page { buffer, palette, y: 0 };
    if app.mode == Mode::Help {
        return page.help();
    }
    page.title(app);
    match &app.figures {
        None => page.line(&[("measuring the clones", Style::new())]),
        Some(figures) => {
            page.totals(app, figures);
            page.templates(figures);
            page.clones(app);
        }
    }
    page.footer(app);
}

/// The screen, and the line that is drawn next.
struct Page<'a> {
    buffer: &'a mut Buffer,
    palette: Palette,
    y: u16,
}

/// A cell of a table: its text, its width, and true if the text is aligned to the right.
type Column<'a> = (&'a str, u16, bool);

impl Page<'_> {
    fn width(&self) -> u16 {
        self.buffer.area.width
    }

    fn height(&self) -> u16 {
        self.buffer.area.height
    }

    /// Writes text at a column of the present line. Returns the column behind the text.
    fn write(&mut self, x: u16, text: &str, width: u16, style: Style) -> u16 {
        if self.y >= self.height() || x >= self.width() {
            return x;
        }
        self.buffer.set_stringn(x, self.y, sanitize(text), width.min(self.width() - x).into(), style).0
    }

    fn line(&mut self, parts: &[(&str, Style)]) {
        let mut x = 0;
        for (text, style) in parts {
            x = self.write(x, text, u16::MAX, *style);
        }
        self.y += 1;
    }

    /// Writes cells with one space between them. Returns the column behind them.
    fn cells(&mut self, cells: &[Column<'_>], style: Style) -> u16 {
        let mut x = 0;
        for (text, width, is_right) in cells {
            let length = u16::try_from(text.chars().count()).unwrap_or(u16::MAX);
            let space = if *is_right { width.saturating_sub(length) } else { 0 };
            self.write(x + space, text, *width - space, style);
            x += width + 1;
        }
        x
    }

    fn title(&mut self, app: &App) {
        let (all, matching) = app.counts();
        let mut text = counted(all as u64, "clone", "clones");
        if all != matching {
            text = format!("{matching} of {text}");
        }
        let blocked = app.blocked();
        let blocked = if blocked > 0 { format!(", {blocked} blocked") } else { String::new() };
        let time = app.figures.as_ref().map(|figures| {
            let every = figures.interval_seconds.map_or_else(String::new, |s| format!("  every {s:.1} s"));
            format!("  {}{every}", utc(figures.time))
        });
        let (red, time) = (self.palette.style(Color::Red), time.unwrap_or_default());
        self.line(&[
            ("stencil top  ", HEADING),
            (&text, Style::new()),
            (&blocked, red),
            (&time, Style::new()),
        ]);
    }

    fn totals(&mut self, app: &App, figures: &Figures) {
        let totals = figures.totals.as_ref();
        let size = |bytes: Option<Bytes>| bytes.map_or_else(|| "-".to_owned(), |bytes| bytes.to_string());
        let history = &app.history;
        self.total("host memory", &size(totals.map(|t| t.host_bytes)), &history.host_bytes);
        self.total("copied, in RAM", &size(totals.map(|t| t.private_bytes)), &history.private_bytes);
        let pages = rate(figures.copied_pages_per_second);
        self.total("copied pages/s", &pages, &history.copied_pages_per_second);
    }

    /// Writes a total and its sparkline, with the last value at the right.
    fn total(&mut self, name: &str, value: &str, history: &VecDeque<u64>) {
        self.cells(&[(name, 16, false), (value, TOTAL_WIDTH - 18, true)], Style::new());
        let area = Rect::new(TOTAL_WIDTH, self.y, self.width().saturating_sub(TOTAL_WIDTH), 1);
        let area = area.intersection(self.buffer.area);
        let values: Vec<u64> = history.iter().rev().take(area.width.into()).rev().copied().collect();
        let style = self.palette.style(Color::Cyan);
        Sparkline::default().data(&values).style(style).render(area, self.buffer);
        self.y += 1;
    }

    fn templates(&mut self, figures: &Figures) {
        let count = template_rows(self.height(), figures.templates.len());
        let heading = match figures.templates.len() - usize::from(count) {
            0 => "TAGS".to_owned(),
            hidden => format!("TAGS ({} not shown)", counted(hidden as u64, "template", "templates")),
        };
        let row = |cells: [&str; 5]| -> [(String, u16, bool); 5] {
            let [digest, serving, data, resident, clones] = cells.map(str::to_owned);
            [
                (digest, 12, false),
                (serving, 11, false),
                (data, 9, true),
                (resident, 9, true),
                (clones, 6, true),
            ]
        };
        let mut write = |cells: [&str; 5], tags: &str, style: Style| {
            let cells = row(cells);
            let cells: Vec<Column<'_>> =
                cells.iter().map(|(text, w, right)| (text.as_str(), *w, *right)).collect();
            let x = self.cells(&cells, style);
            self.write(x, tags, u16::MAX, style);
            self.y += 1;
        };
        write(["TEMPLATE", "SERVING", "DATA", "RESIDENT", "CLONES"], &heading, HEADING);
        let mut templates: Vec<_> = figures.templates.iter().collect();
        templates.sort_by_key(|template| (std::cmp::Reverse(template.clones), template.digest));
        for template in templates.into_iter().take(count.into()) {
            let (data, resident) = (template.data_bytes.to_string(), template.resident_bytes.to_string());
            let tags = template.tags.iter().cloned().collect::<Vec<_>>().join(", ");
            let (digest, clones) = (template.digest.short(), template.clones.to_string());
            write([&digest, &template.serving, &data, &resident, &clones], &tags, Style::new());
        }
    }

    fn clones(&mut self, app: &App) {
        let is_wide = self.width() >= WIDE;
        let columns = |cells: [&str; 8]| -> Vec<(String, u16, bool)> {
            let widths = [12, 8, 10, 9, 10, 10, 10, 20];
            let count = if is_wide { 8 } else { 5 };
            let columns = cells.into_iter().zip(widths).take(count).enumerate();
            columns.map(|(at, (text, width))| (text.to_owned(), width, !matches!(at, 0 | 7))).collect()
        };
        let heading = ["CLONE", "PID", "COPIED", "PAGES/S", "CLEAN", "TABLES", "OVERHEAD", "NAME"];
        let x = self.table_row(&columns(heading), HEADING);
        self.write(x, "MEMORY", u16::MAX, HEADING);
        self.y += 1;
        for (row, is_selected) in app.visible() {
            let size = |part: fn(&CloneMemory) -> Bytes| {
                row.memory.as_ref().map_or_else(|| "-".to_owned(), |memory| part(memory).to_string())
            };
            let pid = row.process.pid.to_string();
            let rate = if row.blocked { "blocked".to_owned() } else { rate(row.rate) };
            let cells = [
                &row.id,
                &pid,
                &size(|memory| memory.dirty_pages.bytes()),
                &rate,
                &size(|memory| memory.mapped_clean_bytes),
                &size(|memory| memory.page_table_bytes),
                &size(|memory| memory.overhead_bytes),
                &row.name,
            ];
            let style = if is_selected { SELECTED } else { Style::new() };
            let x = self.table_row(&columns(cells.map(String::as_str)), style);
            self.strip(x, row);
            self.y += 1;
        }
    }

    fn table_row(&mut self, columns: &[(String, u16, bool)], style: Style) -> u16 {
        let cells: Vec<Column<'_>> =
            columns.iter().map(|(text, w, right)| (text.as_str(), *w, *right)).collect();
        self.cells(&cells, style)
    }

    fn strip(&mut self, x: u16, row: &Row) {
        let Some(layout) = &row.layout else {
            let text = if row.memory.is_none() { "cannot be inspected" } else { "" };
            self.write(x, text, u16::MAX, self.palette.style(Color::Red));
            return;
        };
        for (cell, x) in strip::cells(layout, self.width().saturating_sub(x)).iter().zip(x..) {
            let (symbol, colour) = cell.symbol(self.palette.has_colours);
            self.write(x, symbol.encode_utf8(&mut [0; 4]), 1, self.palette.style(colour));
        }
    }

    /// Writes the last two lines: the selected clone or a problem, and the keys or the filter.
    fn footer(&mut self, app: &App) {
        self.y = self.height().saturating_sub(2);
        let age = app.figures.as_ref().and_then(|figures| figures.templates_age_seconds).unwrap_or_default();
        match (&app.problem, app.selected_row()) {
            (Some(problem), _) if age >= 1.0 => {
                let text = format!("figures of templates are {age:.0} s old: {problem}");
                self.line(&[(&text, self.palette.style(Color::Red))]);
            }
            (Some(problem), _) => self.line(&[(problem, self.palette.style(Color::Red))]),
            (None, Some(row)) => self.line(&[(&details(row), Style::new())]),
            (None, None) => self.y += 1,
        }
        match app.mode {
            Mode::Filter => {
                self.line(&[("filter: ", HEADING), (&app.filter, Style::new()), ("_", Style::new())])
            }
            _ => {
                let filter = match app.filter.as_str() {
                    "" => String::new(),
                    filter => format!("  filter: {filter}"),
                };
                let sort = format!("  sorted by {}{filter}", app.sort.name());
                self.line(&[("q quit  / filter  s sort  ? help", Style::new()), (&sort, Style::new())]);
            }
        }
    }

    fn help(&mut self) {
        self.line(&[("Keys of stencil top", HEADING)]);
        for (keys, meaning) in HELP {
            let (keys, rest) = (format!("  {keys}"), self.width() > 100);
            // On a narrow screen, a long list of keys has a line of its own.
            if keys.len() > 18 && !rest {
                self.line(&[(&keys, Style::new())]);
                self.cells(&[("", 18, false), (meaning, u16::MAX - 20, false)], Style::new());
            } else {
                let width = if rest { 36 } else { 18 };
                self.cells(&[(&keys, width, false), (meaning, u16::MAX - 40, false)], Style::new());
            }
            self.y += 1;
        }
        self.y += 1;
        self.line(&[("MEMORY: the pages of the template, in their order", HEADING)]);
        let legend = [
            ("not in the page tables", strip::Cell { untouched: 1, ..strip::Cell::default() }),
            ("clean: the page of the template", strip::Cell { clean: 1, ..strip::Cell::default() }),
            ("copied by a write", strip::Cell { copied: 1, ..strip::Cell::default() }),
            ("copied, and in swap", strip::Cell { swapped: 1, ..strip::Cell::default() }),
        ];
        for (meaning, cell) in legend {
            let (symbol, colour) = cell.symbol(self.palette.has_colours);
            let style = self.palette.style(colour);
            self.line(&[
                ("  ", Style::new()),
                (symbol.encode_utf8(&mut [0; 4]), style),
                ("  ", style),
                (meaning, Style::new()),
            ]);
        }
        let share = if self.palette.has_colours {
            "a lighter block: fewer"
        } else {
            "a small letter: less than half"
        };
        self.line(&[
            ("  ", Style::new()),
            (share, Style::new()),
            (" of the pages of the cell", Style::new()),
        ]);
    }
}

/// Describes a clone in one line.
fn details(row: &Row) -> String {
    let Some(memory) = &row.memory else {
        return format!("{} ({}): the process does not answer; run 'stencil doctor'", row.id, row.name);
    };
    let digest = row.digest.map_or_else(String::new, |digest| digest.short());
    format!(
        "{} {} {} {digest}: tables {}, overhead {}, swap {}",
        row.id, row.kind, row.name, memory.page_table_bytes, memory.overhead_bytes, memory.swap_bytes
    )
}

#[cfg(test)]
mod tests;
