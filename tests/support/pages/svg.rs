//! A terminal session as an SVG image.

/// Width and height of a character, in pixels.
const CHARACTER: (f64, usize) = (8.4, 19);
const MARGIN: usize = 20;
const TITLE_BAR: usize = 36;
/// Longer lines are wrapped.
const COLUMNS: usize = 110;

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// The rows of a terminal that a line takes.
fn wrapped(line: &str) -> Vec<String> {
    let all: Vec<char> = line.chars().collect();
    let rows = all.chunks(COLUMNS).map(|row| row.iter().collect::<String>());
    if all.is_empty() { vec![String::new()] } else { rows.collect() }
}

/// Draws the lines; those that begin with `$ ` are commands.
pub fn terminal(title: &str, lines: &[String]) -> String {
    let lines: Vec<String> = lines.iter().flat_map(|line| wrapped(line)).collect();
    let columns = lines.iter().map(|line| line.chars().count()).max().unwrap_or(0);
    let width = (columns as f64 * CHARACTER.0).ceil() as usize + 2 * MARGIN;
    let height = TITLE_BAR + lines.len() * CHARACTER.1 + MARGIN;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{0}\">\n<title>{0}</title>\n\
         <style>text {{ font: 14px ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace; fill: #d5d8df; \
         white-space: pre }} .p {{ fill: #7fd18b }} .c {{ fill: #ffffff; font-weight: bold }}</style>\n\
         <rect width=\"100%\" height=\"100%\" rx=\"8\" fill=\"#1b1e26\"/>\n",
        escaped(title)
    );
    for (x, colour) in [(20, "#ff5f57"), (40, "#febc2e"), (60, "#28c840")] {
        svg += &format!("<circle cx=\"{x}\" cy=\"18\" r=\"6\" fill=\"{colour}\"/>\n");
    }
    let mut continued = false;
    for (row, line) in lines.iter().enumerate() {
        let y = TITLE_BAR + (row + 1) * CHARACTER.1 - 5;
        let start = format!("<text x=\"{MARGIN}\" y=\"{y}\" xml:space=\"preserve\"");
        let sign = if line.starts_with("$ ") {
            "$ "
        } else if continued && line.starts_with("> ") {
            "> "
        } else {
            ""
        };
        let text = escaped(&line[sign.len()..]);
        continued = !sign.is_empty();
        svg += &match (sign.is_empty(), text.is_empty()) {
            (true, true) => String::new(),
            (true, false) => format!("{start}>{text}</text>\n"),
            _ => format!(
                "{start}><tspan class=\"p\">{}</tspan><tspan class=\"c\">{text}</tspan></text>\n",
                escaped(sign)
            ),
        };
    }
    svg + "</svg>\n"
}
