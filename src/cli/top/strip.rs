//! The memory of a clone as a strip: one cell for each share of the template's pages, in their order.

use std::ops::Range;

use ratatui::style::Color;

use crate::clones::accounting::sampler::{Layout, PageState};
use crate::units::to_usize;

/// The pages of one cell.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cell {
    pub untouched: u64,
    pub clean: u64,
    pub copied: u64,
    pub swapped: u64,
}

impl Cell {
    fn pages(&self) -> u64 {
        self.untouched + self.clean + self.copied + self.swapped
    }

    fn add(&mut self, state: PageState, pages: u64) {
        self.untouched -= pages;
        match state {
            PageState::Clean => self.clean += pages,
            PageState::Copied => self.copied += pages,
            PageState::Swapped => self.swapped += pages,
        }
    }

    /// Returns the state that the cell shows, and how many of its pages have the state. Pages of the clone go before
    /// pages of the template, however few they are.
    fn state(&self) -> Option<(PageState, u64)> {
        match (self.copied, self.swapped, self.clean) {
            (0, 0, 0) => None,
            (0, 0, clean) => Some((PageState::Clean, clean)),
            (copied, swapped, _) if copied >= swapped => Some((PageState::Copied, copied)),
            (_, swapped, _) => Some((PageState::Swapped, swapped)),
        }
    }

    /// Returns the character and the colour. The character tells the share of the pages that have the state; without
    /// colours, a letter names the state, and a capital stands for at least half of the pages.
    pub fn symbol(&self, has_colours: bool) -> (char, Color) {
        let Some((state, pages)) = self.state() else { return ('.', Color::DarkGray) };
        let (letter, colour) = match state {
            PageState::Clean => ('m', Color::Green),
            PageState::Copied => ('c', Color::Yellow),
            PageState::Swapped => ('s', Color::Red),
        };
        let quarter = to_usize((pages * 4 - 1) / self.pages());
        match has_colours {
            true => (['░', '▒', '▓', '█'][quarter.min(3)], colour),
            false if quarter >= 2 || pages * 2 == self.pages() => (letter.to_ascii_uppercase(), Color::Reset),
            false => (letter, Color::Reset),
        }
    }
}

/// Divides the pages among `width` cells. Each page is in one cell; a cell has at least one page.
pub fn cells(layout: &Layout, width: u16) -> Vec<Cell> {
    let count = u64::from(width).min(layout.pages);
    if count == 0 {
        return Vec::new();
    }
    // Without overflow: a template has less than 2^48 pages.
    let first = |cell: u64| cell * layout.pages / count;
    let mut cells: Vec<Cell> =
        (0..count).map(|cell| Cell { untouched: first(cell + 1) - first(cell), ..Cell::default() }).collect();
    for (Range { start, end }, state) in &layout.ranges {
        let mut cell = start * count / layout.pages;
        let mut page = *start;
        while page < *end {
            while first(cell + 1) <= page {
                cell += 1;
            }
            let until = first(cell + 1).min(*end);
            cells[to_usize(cell)].add(*state, until - page);
            page = until;
        }
    }
    cells
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Ranges of random lengths with gaps between them.
    fn layout() -> impl Strategy<Value = Layout> {
        let state = prop_oneof![Just(PageState::Clean), Just(PageState::Copied), Just(PageState::Swapped)];
        let part = (0u64..3000, 1u64..2000, state);
        (proptest::collection::vec(part, 0..60), 0u64..5000).prop_map(|(parts, rest)| {
            let mut layout = Layout::default();
            for (gap, pages, state) in parts {
                let start = layout.pages + gap;
                layout.ranges.push((start..start + pages, state));
                layout.pages = start + pages;
            }
            layout.pages += rest;
            layout
        })
    }

    proptest! {
        #[test]
        fn the_cells_add_up_to_the_mapped_pages(layout in layout(), width in 0u16..300) {
            let cells = cells(&layout, width);
            prop_assert_eq!(cells.len() as u64, u64::from(width).min(layout.pages));
            prop_assert!(cells.iter().all(|cell| cell.pages() > 0));
            if width > 0 {
                let of = |wanted: PageState| -> u64 {
                    let ranges = layout.ranges.iter().filter(|(_, state)| *state == wanted);
                    ranges.map(|(range, _)| range.end - range.start).sum()
                };
                let sum = |part: fn(&Cell) -> u64| cells.iter().map(part).sum::<u64>();
                prop_assert_eq!(sum(Cell::pages), layout.pages);
                prop_assert_eq!(sum(|cell| cell.clean), of(PageState::Clean));
                prop_assert_eq!(sum(|cell| cell.copied), of(PageState::Copied));
                prop_assert_eq!(sum(|cell| cell.swapped), of(PageState::Swapped));
            }
        }
    }

    #[test]
    fn cells_are_in_the_order_of_the_pages() {
        let ranges =
            vec![(0..10, PageState::Copied), (35..50, PageState::Clean), (99..100, PageState::Swapped)];
        let strip = cells(&Layout { pages: 100, ranges }, 10);
        let text = |has_colours| strip.iter().map(|cell| cell.symbol(has_colours).0).collect::<String>();
        assert_eq!(text(false), "C..MM....s");
        assert_eq!(text(true), "█..▒█....░");
        assert_eq!(strip[0].symbol(true).1, Color::Yellow);
        assert!(cells(&Layout::default(), 10).is_empty());
    }

    #[test]
    fn a_single_copied_page_shows() {
        let ranges = vec![(0..999, PageState::Clean), (999..1000, PageState::Copied)];
        let strip = cells(&Layout { pages: 1000, ranges }, 1);
        assert_eq!((strip[0].symbol(false).0, strip[0].symbol(true)), ('c', ('░', Color::Yellow)));
    }
}
