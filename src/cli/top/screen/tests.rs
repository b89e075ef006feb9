use super::*;
use crate::cli::top::keys::Key;
use crate::cli::top::rows::SortKey;
use crate::cli::top::rows::tests::figures;
use crate::error::Error;
use ratatui::Terminal;
use ratatui::backend::TestBackend;

const PLAIN: Palette = Palette { has_colours: false };

fn app(height: u16) -> App {
    let mut app = App::new(SortKey::Copied);
    app.sampled(Ok(figures()));
    app.sampled(Ok(figures()));
    app.set_height(clone_rows(height, &app));
    app
}

fn frame(app: &App, width: u16, height: u16, palette: Palette) -> Buffer {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw(frame.buffer_mut(), app, palette)).unwrap();
    terminal.backend().buffer().clone()
}

fn lines(buffer: &Buffer) -> Vec<String> {
    let rows = buffer.content.chunks(buffer.area.width.into());
    let text = |row: &[ratatui::buffer::Cell]| row.iter().map(|cell| cell.symbol()).collect::<String>();
    rows.map(|row| text(row).trim_end().to_owned()).collect()
}

/// The page with a picture of the screen.
const PAGE: &str = include_str!("../../../../docs/how-to/monitoring.md");

#[test]
fn a_frame_of_80_columns_is_the_picture_of_the_page() {
    let found = lines(&frame(&app(24), 80, 24, PLAIN)).join("\n");
    assert!(PAGE.contains(&format!("```text\n{found}\n```\n")), "the picture of the page is now\n{found}\n");
}

#[test]
fn a_wide_frame_has_more_columns_and_a_longer_strip() {
    let found = lines(&frame(&app(60), 200, 60, PLAIN));
    let heading = found.iter().find(|line| line.starts_with("CLONE ")).unwrap();
    for column in ["COPIED", "PAGES/S", "CLEAN", "TABLES", "OVERHEAD", "NAME", "MEMORY"] {
        assert!(heading.contains(column), "{heading}");
    }
    let row = found.iter().find(|line| line.starts_with("c12 ")).unwrap();
    assert_eq!(row.chars().count(), 200, "the strip ends at the edge: {row}");
    assert!(row.contains("200 KiB") && row.contains("300 KiB") && row.contains("web:1"), "{row}");
    let (copied, all) = (row.matches(['c', 'C']).count() - 1, 200 - heading.find("MEMORY").unwrap());
    // 6000 of 16384 pages are copied.
    assert!((all * 6000 / 16384).abs_diff(copied) <= 1, "{copied} of {all}: {row}");
}

#[test]
fn colours_name_the_states_of_pages() {
    let buffer = frame(&app(24), 80, 24, Palette { has_colours: true });
    let colours = |buffer: &Buffer, symbol: &str| -> Vec<Color> {
        let cells = buffer.content.iter().filter(|cell| cell.symbol() == symbol);
        let mut colours: Vec<Color> = cells.map(|cell| cell.fg).collect();
        colours.dedup();
        colours
    };
    assert!(colours(&buffer, "█").contains(&Color::Yellow));
    let plain = frame(&app(24), 80, 24, PLAIN);
    assert!(plain.content.iter().all(|cell| cell.fg == Color::Reset && cell.bg == Color::Reset));
    assert!(plain.content.iter().all(|cell| !"░▒▓".contains(cell.symbol())));
}

#[test]
fn the_smallest_screens_do_not_panic() {
    for (width, height) in [(0, 0), (1, 1), (20, 3), (40, 9), (80, 8), (300, 100)] {
        let mut app = app(height);
        frame(&app, width, height, PLAIN);
        app.key(Key::Char('?'));
        frame(&app, width, height, PLAIN);
    }
    frame(&App::new(SortKey::Pid), 80, 24, PLAIN);
}

#[test]
fn the_help_fits_the_smallest_terminal_and_names_every_sort() {
    let mut app = app(24);
    app.key(Key::Char('?'));
    for (width, height) in [(80, 24), (200, 60)] {
        let found = lines(&frame(&app, width, height, PLAIN));
        let text = found.join("\n");
        assert!(text.contains("Ctrl-C") && text.contains("copied, and in swap"), "{text}");
        assert!(text.contains("of the pages of the cell"), "{text}");
        assert!(found.iter().all(|line| line.chars().count() <= usize::from(width)), "{text}");
    }
}

#[test]
fn problems_filters_and_old_figures_are_named() {
    let text = |app: &App| lines(&frame(app, 80, 24, PLAIN)).join("\n");
    let mut app = app(24);
    app.sampled(Err(Error::try_again("a supervisor does not answer")));
    assert!(text(&app).contains("\na supervisor does not answer\n"), "{}", text(&app));
    let mut old = figures();
    (old.templates_age_seconds, old.problem) = (Some(12.3), Some("a server does not answer".into()));
    app.sampled(Ok(old));
    assert!(text(&app).contains("\nfigures of templates are 12 s old: a server does not answer\n"));
    app.key(Key::Char('/'));
    app.key(Key::Char('w'));
    assert!(text(&app).contains("\nfilter: w_") && text(&app).contains("3 of 6 clones"), "{}", text(&app));
    app.key(Key::Enter);
    assert!(text(&app).contains("sorted by copied  filter: w"));
    // Control characters of a name do not reach the terminal.
    let mut hostile = figures();
    hostile.clones[2].row.id = "\u{1b}[31mred".into();
    app.key(Key::Char('/'));
    app.key(Key::Escape);
    app.sampled(Ok(hostile));
    assert!(text(&app).contains(r"\u001b[31mre"), "{}", text(&app));
}
