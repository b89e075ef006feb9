//! The state of the screen: what a key or a sample changes.

use std::collections::VecDeque;
use std::time::Duration;

use super::figures::Figures;
use super::keys::Key;
use super::rows::{Row, SortKey};
use super::sampling::Shown;
use crate::error::Result;
use crate::sys::process::ProcessId;
use crate::units::whole;

/// Number of samples in a sparkline, more than the columns of a terminal.
const HISTORY: usize = 500;

/// What the keyboard controls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The list of clones.
    List,
    /// The text of the filter.
    Filter,
    /// The help covers the list.
    Help,
}

/// What follows from a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Continue,
    Quit,
}

/// Earlier values of the totals, for sparklines.
#[derive(Debug, Default)]
pub struct History {
    pub host_bytes: VecDeque<u64>,
    pub private_bytes: VecDeque<u64>,
    pub copied_pages_per_second: VecDeque<u64>,
}

impl History {
    fn add(&mut self, figures: &Figures) {
        let push = |values: &mut VecDeque<u64>, value: Option<u64>| {
            values.extend(value);
            if values.len() > HISTORY {
                values.pop_front();
            }
        };
        let totals = figures.totals.as_ref();
        push(&mut self.host_bytes, totals.map(|totals| totals.host_bytes.get()));
        push(&mut self.private_bytes, totals.map(|totals| totals.private_bytes.get()));
        push(&mut self.copied_pages_per_second, figures.copied_pages_per_second.map(whole));
    }
}

/// The state of the screen.
pub struct App {
    pub figures: Option<Figures>,
    /// All rows, sorted.
    rows: Vec<Row>,
    /// Indexes of the rows that match the filter.
    matching: Vec<usize>,
    pub sort: SortKey,
    pub filter: String,
    pub mode: Mode,
    /// Index of the selected row among the matching ones, and its process.
    selected: usize,
    process: Option<ProcessId>,
    /// Index of the first row on the screen among the matching ones.
    first: usize,
    /// Number of rows on the screen.
    height: usize,
    pub history: History,
    /// Why there is no recent sample.
    pub problem: Option<String>,
}

impl App {
    pub fn new(sort: SortKey) -> App {
        App {
            figures: None,
            rows: Vec::new(),
            matching: Vec::new(),
            sort,
            filter: String::new(),
            mode: Mode::List,
            selected: 0,
            process: None,
            first: 0,
            height: 0,
            history: History::default(),
            problem: None,
        }
    }

    /// Handles a key.
    pub fn key(&mut self, key: Key) -> Action {
        match (self.mode, key) {
            (_, Key::Interrupt) | (Mode::List, Key::Escape | Key::Char('q')) => return Action::Quit,
            (Mode::Help, _) => self.mode = Mode::List,
            (Mode::Filter, Key::Enter) => self.mode = Mode::List,
            (Mode::Filter, Key::Escape) => {
                self.mode = Mode::List;
                self.set_filter(String::new());
            }
            (Mode::Filter, Key::Backspace) => {
                let mut filter = self.filter.clone();
                filter.pop();
                self.set_filter(filter);
            }
            (Mode::Filter, Key::Char(char)) => self.set_filter(format!("{}{char}", self.filter)),
            (Mode::List, Key::Char(char)) => self.command(char),
            (_, Key::Up) => self.select(self.selected.saturating_sub(1)),
            (_, Key::Down) => self.select(self.selected + 1),
            (_, Key::PageUp) => self.select(self.selected.saturating_sub(self.height)),
            (_, Key::PageDown) => self.select(self.selected + self.height),
            (_, Key::Home) => self.select(0),
            (_, Key::End) => self.select(usize::MAX),
            (Mode::List, Key::Enter | Key::Backspace) => {}
        }
        Action::Continue
    }

    fn command(&mut self, char: char) {
        let sort = match char {
            '?' => return self.mode = Mode::Help,
            '/' => return self.mode = Mode::Filter,
            's' => self.sort.next(),
            'c' => SortKey::Copied,
            'r' => SortKey::Rate,
            'm' => SortKey::Clean,
            't' => SortKey::Tables,
            'o' => SortKey::Overhead,
            'n' => SortKey::Name,
            'p' => SortKey::Pid,
            _ => return,
        };
        self.sort = sort;
        self.arrange();
    }

    fn set_filter(&mut self, filter: String) {
        self.filter = filter;
        self.arrange();
    }

    /// Takes a sample, or the reason why there is none: the last figures stay.
    pub fn sampled(&mut self, sample: Result<Figures>) {
        match sample {
            Ok(figures) => {
                self.history.add(&figures);
                self.problem.clone_from(&figures.problem);
                self.figures = Some(figures);
                self.arrange();
            }
            Err(error) => self.problem = Some(error.to_string()),
        }
    }

    /// Reports a sample that takes longer than 2 s.
    pub fn waits(&mut self, time: Option<Duration>) {
        if let Some(time) = time.filter(|time| *time >= Duration::from_secs(2)) {
            self.problem = Some(format!("the measurement takes {} s", time.as_secs()));
        }
    }

    /// Sets the number of rows on the screen.
    pub fn set_height(&mut self, height: usize) {
        self.height = height;
        self.select(self.selected);
    }

    /// Sorts and filters the rows. The selection stays at its process.
    fn arrange(&mut self) {
        let Some(figures) = &self.figures else { return };
        self.rows = Row::all(figures, self.sort);
        let filter = self.filter.to_lowercase();
        self.matching = (0..self.rows.len()).filter(|row| self.rows[*row].matches(&filter)).collect();
        let same = |row: &usize| Some(self.rows[*row].process) == self.process;
        let selected = self.matching.iter().position(same);
        self.select(selected.unwrap_or(self.selected));
    }

    fn select(&mut self, index: usize) {
        let count = self.matching.len();
        self.selected = index.min(count.saturating_sub(1));
        self.process = self.selected_row().map(|row| row.process);
        let last = self.selected.saturating_sub(self.height.saturating_sub(1));
        // As many rows as fit, with the selected one among them.
        let most = count.saturating_sub(self.height);
        self.first = self.first.clamp(last, self.selected.max(last)).min(most.max(last));
    }

    /// Returns the number of all rows and of those that match the filter.
    pub fn counts(&self) -> (usize, usize) {
        (self.rows.len(), self.matching.len())
    }

    /// Returns the number of blocked rows.
    pub fn blocked(&self) -> usize {
        self.rows.iter().filter(|row| row.blocked).count()
    }

    /// Returns the rows on the screen, each with whether it is selected.
    pub fn visible(&self) -> impl Iterator<Item = (&Row, bool)> {
        let rows = self.matching.iter().enumerate().skip(self.first).take(self.height);
        rows.map(|(index, row)| (&self.rows[*row], index == self.selected))
    }

    /// Returns the selected row.
    pub fn selected_row(&self) -> Option<&Row> {
        self.matching.get(self.selected).map(|row| &self.rows[*row])
    }

    /// Returns the clones on the screen.
    pub fn shown(&self) -> Shown {
        self.visible().map(|(row, _)| row.process).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::top::rows::tests::figures;
    use crate::error::Error;

    fn app(height: usize) -> App {
        let mut app = App::new(SortKey::Pid);
        app.set_height(height);
        app.sampled(Ok(figures()));
        app
    }

    fn ids(app: &App) -> Vec<&str> {
        app.visible().map(|(row, _)| row.id.as_str()).collect()
    }

    fn selected(app: &App) -> &str {
        &app.selected_row().unwrap().id
    }

    fn press(app: &mut App, keys: &[Key]) {
        for key in keys {
            assert_eq!(app.key(*key), Action::Continue, "{key:?}");
        }
    }

    fn write(app: &mut App, text: &str) {
        text.chars().for_each(|char| press(app, &[Key::Char(char)]));
    }

    #[test]
    fn three_keys_quit_and_letters_of_a_filter_do_not() {
        for key in [Key::Char('q'), Key::Escape, Key::Interrupt] {
            assert_eq!(app(5).key(key), Action::Quit);
        }
        let mut app = app(5);
        write(&mut app, "/q");
        assert_eq!((app.mode, app.filter.as_str()), (Mode::Filter, "q"));
        assert_eq!(app.key(Key::Interrupt), Action::Quit);
        press(&mut app, &[Key::Escape]);
        assert_eq!((app.mode, app.filter.as_str()), (Mode::List, ""));
        write(&mut app, "?q");
        assert_eq!(app.mode, Mode::List, "any key closes the help");
        assert_eq!(app.key(Key::Char('q')), Action::Quit);
    }

    #[test]
    fn a_filter_leaves_matching_rows_and_enter_keeps_it() {
        let mut app = app(5);
        write(&mut app, "/DATAx");
        assert_eq!(app.counts(), (6, 0));
        assert!(app.selected_row().is_none() && app.shown().is_empty());
        press(&mut app, &[Key::Backspace, Key::Enter]);
        assert_eq!((ids(&app), app.filter.as_str(), app.mode), (vec!["c13", "c11"], "DATA", Mode::List));
        app.sampled(Ok(figures()));
        assert_eq!(ids(&app), ["c13", "c11"]);
        write(&mut app, "/");
        press(&mut app, &[Key::Escape]);
        assert_eq!(app.counts(), (6, 6));
    }

    #[test]
    fn the_selection_follows_its_clone() {
        let mut app = app(3);
        assert_eq!(ids(&app), ["c13", "77", "c10"]);
        press(&mut app, &[Key::Down, Key::Down, Key::Down]);
        assert_eq!((selected(&app), ids(&app)), ("c11", vec!["77", "c10", "c11"]));
        write(&mut app, "r");
        assert_eq!((app.sort, selected(&app)), (SortKey::Rate, "c11"));
        let mut later = figures();
        later.clones.remove(0);
        app.sampled(Ok(later.clone()));
        assert_eq!(selected(&app), "c11");
        later.clones.remove(0);
        app.sampled(Ok(later));
        assert_eq!(selected(&app), "c14", "the row in its place");
        press(&mut app, &[Key::End]);
        assert_eq!(selected(&app), "c12");
        press(&mut app, &[Key::PageUp]);
        assert_eq!(selected(&app), "c13");
        press(&mut app, &[Key::PageDown, Key::PageDown, Key::Home, Key::Up]);
        assert_eq!(selected(&app), "c13");
    }

    #[test]
    fn as_many_rows_as_fit_are_shown() {
        let mut app = app(3);
        press(&mut app, &[Key::End]);
        assert_eq!(ids(&app), ["c11", "c12", "c14"]);
        app.set_height(5);
        assert_eq!(ids(&app), ["77", "c10", "c11", "c12", "c14"]);
        app.set_height(100);
        assert_eq!(ids(&app).len(), 6);
        app.set_height(0);
        assert!(ids(&app).is_empty());
        app.set_height(1);
        assert_eq!(ids(&app), ["c14"]);
    }

    #[test]
    fn keys_sort() {
        let mut app = app(5);
        let keys = [
            ('c', SortKey::Copied),
            ('r', SortKey::Rate),
            ('m', SortKey::Clean),
            ('t', SortKey::Tables),
            ('o', SortKey::Overhead),
            ('n', SortKey::Name),
            ('p', SortKey::Pid),
            ('s', SortKey::Copied),
            ('x', SortKey::Copied),
        ];
        for (key, sort) in keys {
            press(&mut app, &[Key::Char(key)]);
            assert_eq!(app.sort, sort, "{key}");
        }
    }

    #[test]
    fn a_failed_sample_leaves_the_last_figures() {
        let mut app = app(5);
        app.sampled(Err(Error::try_again("a supervisor does not answer")));
        assert_eq!(app.counts().0, 6);
        assert_eq!(app.problem.as_deref(), Some("a supervisor does not answer"));
        app.sampled(Ok(figures()));
        assert_eq!(app.problem, None);
        app.waits(Some(Duration::from_millis(1500)));
        assert_eq!(app.problem, None);
        app.waits(Some(Duration::from_millis(3500)));
        assert_eq!(app.problem.as_deref(), Some("the measurement takes 3 s"));
        assert_eq!(app.history.copied_pages_per_second, [247, 247]);
    }
}
