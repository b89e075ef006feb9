//! Pictures as SVG, drawn by plotters.
//!
//! The drawing area is large and has whole coordinates: a point can be read back to a part in a thousand. Colours are
//! variables of the page's style sheet, so that a picture follows the light or dark scheme.

use plotters::prelude::*;

use crate::error::{Error, Result};
use crate::units::{Bytes, approximate};

const WIDTH: u32 = 4000;
const HEIGHT: u32 = 2300;
/// Height of a picture without a vertical axis.
const STRIP_HEIGHT: u32 = 620;
const FONT_SIZE: u32 = 125;
const STROKE: u32 = 16;
const DOT_RADIUS: i32 = 32;

/// Colours that stand for variables of the style sheet: `--ink`, `--grid`, and `--s1`, `--s2`, … for series.
const INK: RGBColor = RGBColor(1, 1, 1);
const GRID: RGBColor = RGBColor(1, 1, 2);

/// Number of colours of series.
pub const COLORS: u8 = 8;

fn series(color: u8) -> RGBColor {
    RGBColor(1, 2, color)
}

/// Returns the variable of the style sheet for a series, counted from 0.
pub fn variable(color: u8) -> String {
    format!("var(--s{})", color % COLORS + 1)
}

/// An axis from 0 on, in a unit that suits its largest value.
#[derive(Debug, Clone)]
pub struct Axis {
    name: String,
    /// Largest value, in the base unit.
    max: f64,
    /// Base units in one unit of the labels.
    unit: f64,
}

impl Axis {
    /// Creates an axis of sizes.
    pub fn bytes(name: &str, max: Bytes) -> Axis {
        let units = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];
        let fits = units.into_iter().find(|(_, size)| max.get() >= *size);
        let (unit, size) = fits.unwrap_or(("B", 1));
        Axis { name: format!("{name}, {unit}"), max: approximate(max.get().max(1)), unit: approximate(size) }
    }

    /// Creates an axis of times, in seconds.
    pub fn seconds(name: &str, max: f64) -> Axis {
        let units =
            [("days", 86400.0 * 3.0, 86400.0), ("hours", 3600.0 * 3.0, 3600.0), ("minutes", 180.0, 60.0)];
        let fits = units.into_iter().find(|(_, from, _)| max >= *from);
        let (unit, _, size) = fits.unwrap_or(("seconds", 0.0, 1.0));
        Axis { name: format!("{name}, {unit}"), max: if max > 0.0 { max } else { 1.0 }, unit: size }
    }

    /// Creates an axis of numbers.
    pub fn count(name: &str, max: u64) -> Axis {
        Axis { name: name.to_owned(), max: approximate(max.max(1)), unit: 1.0 }
    }

    fn range(&self, space: f64) -> std::ops::Range<f64> {
        0.0..self.max * space / self.unit
    }
}

/// A part of a picture, in base units of the axes.
#[derive(Debug, Clone)]
pub enum Layer {
    /// A filled polygon.
    Area(u8, Vec<(f64, f64)>),
    /// A line with a dot at each point.
    Line(u8, Vec<(f64, f64)>),
    /// Rectangles from the first to the second value of x, and from the third to the fourth of y.
    Bars(u8, Vec<[f64; 4]>),
}

/// A picture, and how to read values back out of its coordinates.
#[derive(Debug)]
pub struct Plot {
    /// The `svg` element.
    pub svg: String,
    /// Left, right, top and bottom edge of the plotting area, in coordinates of the picture.
    pub edges: [i32; 4],
    /// Values at the right and the top edge, in base units. The values at the left and bottom edge are 0.
    pub x_max: f64,
    pub y_max: f64,
}

/// Draws a picture. `label` describes it to readers who do not see it.
///
/// # Errors
/// Returns an error if plotters cannot draw.
pub fn plot(label: &str, x: &Axis, y: &Axis, layers: &[Layer]) -> Result<Plot> {
    draw(label, (x, 1.0), Some(y), layers)
}

/// Draws a picture with a horizontal axis only. Values of y are from 0 to 1.
///
/// # Errors
/// Same as [`plot`].
pub fn strip(label: &str, x: &Axis, layers: &[Layer]) -> Result<Plot> {
    draw(label, (x, 1.0), None, layers)
}

fn draw(label: &str, (x, space): (&Axis, f64), y: Option<&Axis>, layers: &[Layer]) -> Result<Plot> {
    let failed = |e: &dyn std::fmt::Display| Error::failed(format!("cannot draw '{label}': {e}"));
    let (x_range, y_range) = (x.range(space), y.map_or(0.0..1.0, |y| y.range(1.05)));
    let (x_unit, y_unit) = (x.unit, y.map_or(1.0, |y| y.unit));
    let (x_max, y_max) = (x_range.end * x_unit, y_range.end * y_unit);
    let mut text = String::new();
    let edges;
    {
        let size = (WIDTH, if y.is_some() { HEIGHT } else { STRIP_HEIGHT });
        let root = SVGBackend::with_string(&mut text, size).into_drawing_area();
        let mut builder = ChartBuilder::on(&root);
        builder.margin(60).margin_right(180).set_label_area_size(LabelAreaPosition::Bottom, 380);
        if y.is_some() {
            builder.set_label_area_size(LabelAreaPosition::Left, 640);
        }
        let mut chart = builder.build_cartesian_2d(x_range, y_range).map_err(|e| failed(&e))?;
        let font = ("sans-serif", FONT_SIZE).into_font().color(&INK);
        let format = |value: &f64| tick(*value);
        let mut mesh = chart.configure_mesh();
        mesh.disable_x_mesh()
            .max_light_lines(0)
            .bold_line_style(GRID.stroke_width(STROKE / 2))
            .axis_style(INK.stroke_width(STROKE / 2))
            .label_style(font.clone())
            .axis_desc_style(font)
            .x_labels(6)
            .y_labels(5)
            .x_desc(x.name.clone())
            .set_tick_mark_size(LabelAreaPosition::Left, 50)
            .set_tick_mark_size(LabelAreaPosition::Bottom, 50);
        match y {
            Some(y) => mesh.y_desc(y.name.clone()),
            None => mesh.disable_y_mesh().disable_y_axis(),
        };
        mesh.x_label_formatter(&format).y_label_formatter(&format);
        mesh.draw().map_err(|e| failed(&e))?;
        for layer in layers {
            let scaled = |points: &[(f64, f64)]| -> Vec<(f64, f64)> {
                points.iter().map(|(x, y)| (x / x_unit, y / y_unit)).collect()
            };
            let drawn = match layer {
                Layer::Area(color, points) => {
                    let style = series(*color).filled();
                    chart.draw_series([Polygon::new(scaled(points), style)]).map(|_| ())
                }
                Layer::Line(color, points) => {
                    let (points, style) = (scaled(points), series(*color).stroke_width(STROKE));
                    chart.draw_series([PathElement::new(points.clone(), style)]).map(|_| ()).and_then(|()| {
                        let dots = points.into_iter();
                        let dots = dots.map(|point| Circle::new(point, DOT_RADIUS, series(*color).filled()));
                        chart.draw_series(dots).map(|_| ())
                    })
                }
                Layer::Bars(color, bars) => {
                    let bars = bars.iter().map(|[from, to, low, high]| {
                        let corners = [(from / x_unit, low / y_unit), (to / x_unit, high / y_unit)];
                        Rectangle::new(corners, series(*color).filled())
                    });
                    chart.draw_series(bars).map(|_| ())
                }
            };
            drawn.map_err(|e| failed(&e))?;
        }
        let (columns, rows) = chart.plotting_area().get_pixel_range();
        edges = [columns.start, columns.end, rows.start, rows.end];
        root.present().map_err(|e| failed(&e))?;
    }
    Ok(Plot { svg: styled(&text, label), edges, x_max, y_max })
}

/// Formats the value at a tick without superfluous digits.
fn tick(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Makes the text of an `svg` element whose colours are variables and whose size is that of its place in the page.
fn styled(text: &str, label: &str) -> String {
    let mut svg = text.replace("\"#010101\"", "\"var(--ink)\"").replace("\"#010102\"", "\"var(--grid)\"");
    for color in 0..COLORS {
        svg = svg.replace(&format!("\"#0102{color:02X}\""), &format!("\"{}\"", variable(color)));
    }
    let start = svg.find("viewBox").unwrap_or(0);
    format!("<svg role=\"img\" aria-label=\"{label}\" {}", &svg[start..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_have_the_unit_of_their_largest_value() {
        let bytes = |n| Axis::bytes("size", Bytes::new(n)).name;
        assert_eq!(
            [0, 1023, 1024, 5 << 20, 1 << 40].map(bytes),
            ["size, B", "size, B", "size, KiB", "size, MiB", "size, GiB"]
        );
        let seconds = |n| Axis::seconds("age", n).name;
        assert_eq!(
            [0.0, 179.0, 180.0, 86400.0, 1e6].map(seconds),
            ["age, seconds", "age, seconds", "age, minutes", "age, hours", "age, days"]
        );
        assert_eq!([0.0, 0.5, 20.0, 1.25].map(tick), ["0", "0.5", "20", "1.25"]);
    }

    #[test]
    fn a_value_can_be_read_back_from_its_coordinates() {
        let (x, y) = (Axis::seconds("age", 100.0), Axis::bytes("copied", Bytes::new(10 << 20)));
        let points = vec![(0.0, 0.0), (25.0, f64::from(1 << 20)), (100.0, f64::from(10 << 20))];
        let plot = plot("copied memory", &x, &y, &[Layer::Line(0, points.clone())]).unwrap();
        let [left, right, top, bottom] = plot.edges.map(f64::from);
        let circles: Vec<&str> = plot.svg.lines().filter(|line| line.contains("<circle")).collect();
        assert_eq!(circles.len(), points.len(), "{}", plot.svg);
        for (circle, (x, y)) in circles.into_iter().zip(points) {
            let attribute = |name: &str| -> f64 {
                let rest = circle.split(&format!(" {name}=\"")).nth(1).unwrap();
                rest.split('"').next().unwrap().parse().unwrap()
            };
            assert!(circle.contains("var(--s1)"), "{circle}");
            let found_x = (attribute("cx") - left) / (right - left) * plot.x_max;
            let found_y = (bottom - attribute("cy")) / (bottom - top) * plot.y_max;
            assert!((found_x - x).abs() <= plot.x_max / 1000.0, "{found_x} for {x}");
            assert!((found_y - y).abs() <= plot.y_max / 1000.0, "{found_y} for {y}");
        }
        assert!(!plot.svg.contains("\"#"), "a colour is no variable: {}", plot.svg);
    }
}
