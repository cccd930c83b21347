//! A page to draw on, in pixels with fractions, that becomes both an SVG and a PNG file, or a drawing within an HTML page. What is drawn is
//! decided in `plot`.
//!
//! plotters does the drawing, through its backends alone: its charts would decide on ticks and legends by themselves. Its bitmap is drawn
//! larger and averaged down, since thick lines and letters are not smoothed otherwise; its SVG is drawn larger too, as it knows whole numbers only.

use std::ffi::OsString;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use plotters::backend::{BitMapBackend, DrawingBackend, SVGBackend};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{Color, FontDesc, FontFamily, FontStyle, RGBColor, ShapeStyle, TextStyle, register_font};

/// Width and height of a picture in pixels.
const SIZE: (u32, u32) = (1200, 700);
/// Bitmap pixels for one pixel of the page, each way.
const RASTER_SCALE: u32 = 3;
const SVG_SCALE: u32 = 8;

static FONT: &[u8] = include_bytes!("fonts/OpenSans-Regular-subset.ttf");
/// The font's line height over its em: what the bitmap calls a size is the former, everybody else's is the latter.
const LINE_HEIGHT: f64 = 1.362;
/// plotters' own factor between its size and an SVG font size, and the distance from the top of a text to its base line there.
const SVG_FONT: f64 = 1.24;
const SVG_BASELINE: f64 = 0.76;

/// What something is drawn for, which decides its colour. Curves have those of Okabe and Ito, which people with any colour vision can tell apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Ink {
    /// Text that is to be read first.
    Text,
    Label,
    Axis,
    Grid,
    /// Observed values.
    Truth,
    Curve(usize),
    /// The noise behind a curve: the same hue, pale.
    Faint(usize),
    /// A measurement from -1 (blue) by 0 (white) to 1 (red).
    Level(f64),
}

const CURVES: [RGBColor; 7] = [
    RGBColor(0x00, 0x72, 0xB2),
    RGBColor(0xD5, 0x5E, 0x00),
    RGBColor(0x00, 0x9E, 0x73),
    RGBColor(0xCC, 0x79, 0xA7),
    RGBColor(0xE6, 0x9F, 0x00),
    RGBColor(0x56, 0xB4, 0xE9),
    RGBColor(0x00, 0x00, 0x00),
];

impl Ink {
    /// On white paper.
    fn color(self) -> RGBColor {
        match self {
            Self::Text => RGBColor(0x22, 0x22, 0x22),
            Self::Label => RGBColor(0x59, 0x59, 0x59),
            Self::Axis => RGBColor(0x8C, 0x8C, 0x8C),
            Self::Grid => RGBColor(0xE8, 0xE8, 0xE8),
            Self::Truth => RGBColor(0xA8, 0xA8, 0xA8),
            Self::Curve(i) => CURVES[i % CURVES.len()],
            Self::Level(level) => {
                let RGBColor(r, g, b) = if level < 0.0 { RGBColor(0x21, 0x66, 0xAC) } else { RGBColor(0xB2, 0x18, 0x2B) };
                let share = if level.is_finite() { level.abs().min(1.0) } else { 0.0 };
                let mix = |channel: u8| (share * f64::from(channel) + (1.0 - share) * 255.0) as u8;
                RGBColor(mix(r), mix(g), mix(b))
            }
            // Mixed with white: unlike transparency it does not darken where a line crosses itself.
            Self::Faint(i) => {
                let mix = |channel: u8| (0.28 * f64::from(channel) + 0.72 * 255.0) as u8;
                let RGBColor(r, g, b) = CURVES[i % CURVES.len()];
                RGBColor(mix(r), mix(g), mix(b))
            }
        }
    }

    /// The variable that holds the colour in a style sheet, which has others in the dark.
    fn variable(self) -> String {
        match self {
            Self::Text => "--text".into(),
            Self::Label => "--label".into(),
            Self::Axis => "--axis".into(),
            Self::Grid => "--grid".into(),
            Self::Truth => "--truth".into(),
            Self::Curve(i) => format!("--curve{}", i % CURVES.len()),
            Self::Faint(i) => format!("--faint{}", i % CURVES.len()),
            // The same on any ground, since it is a measurement.
            Self::Level(_) => "--level".into(),
        }
    }
}

/// The page's measures in pixels.
#[derive(Clone, Copy)]
pub(super) struct Sheet {
    pub width: f64,
    pub height: f64,
    /// Room left free at each side.
    pub margin: f64,
}

/// Which point of a text stands at its x.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

/// What can be drawn. Coordinates count from the upper left corner.
pub(super) trait Canvas {
    fn sheet(&self) -> Sheet;
    /// Joins `points` by a line of that width.
    fn line(&mut self, points: &[(f64, f64)], ink: Ink, width: f64) -> anyhow::Result<()>;
    /// A filled rectangle between two corners.
    fn rect(&mut self, from: (f64, f64), to: (f64, f64), ink: Ink) -> anyhow::Result<()>;
    /// A filled disc.
    fn disc(&mut self, center: (f64, f64), radius: f64, ink: Ink) -> anyhow::Result<()>;
    /// One line of text with its base line at `at.1`; `size` is the font's em.
    fn text(&mut self, text: &str, at: (f64, f64), size: f64, ink: Ink, anchor: Anchor) -> anyhow::Result<()>;
    /// The width of a text in pixels.
    fn text_width(&self, text: &str, size: f64) -> anyhow::Result<f64>;
}

struct Page<B> {
    backend: B,
    scale: f64,
    is_raster: bool,
}

impl<B: DrawingBackend> Page<B> {
    fn at(&self, (x, y): (f64, f64)) -> (i32, i32) {
        ((x * self.scale).round() as i32, (y * self.scale).round() as i32)
    }
}

/// The pixels of a line with round ends, whose centres lie within `radius` of it: rows of (y, first x, last x).
fn stroke(a: (i32, i32), b: (i32, i32), radius: f64) -> Vec<(i32, i32, i32)> {
    let point = |(x, y): (i32, i32)| (f64::from(x), f64::from(y));
    let (a, b) = (point(a), point(b));
    let (dx, dy) = (b.0 - a.0, b.1 - a.1);
    let length = dx.hypot(dy).max(f64::MIN_POSITIVE);
    let (nx, ny) = (-dy / length * radius, dx / length * radius);
    let corners = [(a.0 + nx, a.1 + ny), (b.0 + nx, b.1 + ny), (b.0 - nx, b.1 - ny), (a.0 - nx, a.1 - ny)];
    let (top, bottom) = (a.1.min(b.1) - radius, a.1.max(b.1) + radius);
    let mut rows = Vec::with_capacity((bottom - top) as usize + 1);
    for y in top.ceil() as i32..=bottom.floor() as i32 {
        let row = f64::from(y);
        // The shape is convex, so a row of it is all between the outermost crossings of its two discs and its rectangle.
        let (mut from, mut to) = (f64::INFINITY, f64::NEG_INFINITY);
        let mut reach = |x: f64| (from, to) = (f64::min(from, x), f64::max(to, x));
        for end in [a, b] {
            let half_square = radius * radius - (row - end.1).powi(2);
            if half_square >= 0.0 {
                reach(end.0 - half_square.sqrt());
                reach(end.0 + half_square.sqrt());
            }
        }
        for (p, q) in corners.into_iter().zip(corners.into_iter().cycle().skip(1)) {
            if (p.1 - row) * (q.1 - row) <= 0.0 && p.1 != q.1 {
                reach(p.0 + (row - p.1) / (q.1 - p.1) * (q.0 - p.0));
            }
        }
        if from.ceil() <= to.floor() {
            rows.push((y, from.ceil() as i32, to.floor() as i32));
        }
    }
    rows
}

fn style_of(size: f64, color: RGBColor, anchor: Anchor) -> TextStyle<'static> {
    let h_pos = match anchor {
        Anchor::Start => HPos::Left,
        Anchor::Middle => HPos::Center,
        Anchor::End => HPos::Right,
    };
    TextStyle {
        font: FontDesc::new(FontFamily::SansSerif, size, FontStyle::Normal),
        color: color.to_backend_color(),
        pos: Pos::new(h_pos, VPos::Top),
    }
}

impl<B: DrawingBackend> Canvas for Page<B> {
    fn sheet(&self) -> Sheet {
        Sheet { width: f64::from(SIZE.0), height: f64::from(SIZE.1), margin: 40.0 }
    }

    fn line(&mut self, points: &[(f64, f64)], ink: Ink, width: f64) -> anyhow::Result<()> {
        let color = ink.color();
        let mut path: Vec<(i32, i32)> = points.iter().map(|&point| self.at(point)).collect();
        path.dedup();
        if path.len() < 2 {
            return Ok(());
        }
        let width = ((width * self.scale).round() as u32).max(1);
        let style = ShapeStyle { color: color.to_rgba(), filled: true, stroke_width: width };
        if !self.is_raster {
            return self.backend.draw_path(path, &style).map_err(|error| anyhow!("{error}"));
        }
        // plotters' own thick lines differ in width by their slope and grow spikes at sharp turns.
        let radius = f64::from(width) / 2.0;
        for pair in path.windows(2) {
            for (y, from, to) in stroke(pair[0], pair[1], radius) {
                self.backend.draw_line((from, y), (to, y), &color).map_err(|error| anyhow!("{error}"))?;
            }
        }
        Ok(())
    }

    fn rect(&mut self, from: (f64, f64), to: (f64, f64), ink: Ink) -> anyhow::Result<()> {
        let style = ShapeStyle::from(&ink.color()).filled();
        self.backend.draw_rect(self.at(from), self.at(to), &style, true).map_err(|error| anyhow!("{error}"))
    }

    fn disc(&mut self, center: (f64, f64), radius: f64, ink: Ink) -> anyhow::Result<()> {
        let color = ink.color();
        if self.is_raster {
            let (x, y) = self.at(center);
            for (y, from, to) in stroke((x, y), (x, y), radius * self.scale) {
                self.backend.draw_line((from, y), (to, y), &color).map_err(|error| anyhow!("{error}"))?;
            }
            return Ok(());
        }
        let radius = ((radius * self.scale).round() as u32).max(1);
        let center = self.at(center);
        self.backend.draw_circle(center, radius, &ShapeStyle::from(&color).filled(), true).map_err(|error| anyhow!("{error}"))
    }

    fn text(&mut self, text: &str, at: (f64, f64), size: f64, ink: Ink, anchor: Anchor) -> anyhow::Result<()> {
        // Both backends are given the top of the text, and each has its own idea of how far the base line is from it.
        let (size, rise) =
            if self.is_raster { (size * LINE_HEIGHT, LINE_HEIGHT / 2.0 * size) } else { (size * SVG_FONT, SVG_BASELINE * size) };
        let style = style_of(size * self.scale, ink.color(), anchor);
        let at = self.at((at.0, at.1 - rise));
        self.backend.draw_text(&printable(text), &style, at).map_err(|error| anyhow!("{error}"))
    }

    fn text_width(&self, text: &str, size: f64) -> anyhow::Result<f64> {
        width_of(text, size)
    }
}

/// Control characters are not allowed in SVG and have no glyph.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// The width of a text in the built-in font, pixels.
fn width_of(text: &str, size: f64) -> anyhow::Result<f64> {
    // Measured large, since the answer is in whole pixels.
    let font = FontDesc::new(FontFamily::SansSerif, size * LINE_HEIGHT * 16.0, FontStyle::Normal);
    let (width, _) = font.box_size(text).map_err(|error| anyhow!("{error}"))?;
    Ok(f64::from(width) / 16.0)
}

/// A drawing within an HTML page, whose style sheet has the colours.
struct Markup {
    sheet: Sheet,
    text: String,
}

/// The shortest decimal of a tenth of a pixel.
fn tenths(x: f64) -> String {
    let text = format!("{x:.1}");
    text.strip_suffix(".0").map(str::to_owned).unwrap_or(text)
}

/// A text as HTML and SVG hold it, also within quotes.
pub(super) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c => out.push(c),
        }
    }
    out
}

impl Canvas for Markup {
    fn sheet(&self) -> Sheet {
        self.sheet
    }

    fn line(&mut self, points: &[(f64, f64)], ink: Ink, width: f64) -> anyhow::Result<()> {
        let mut places: Vec<String> = points.iter().map(|&(x, y)| format!("{},{}", tenths(x), tenths(y))).collect();
        places.dedup();
        if places.len() > 1 {
            let (color, width, places) = (ink.variable(), tenths(width), places.join(" "));
            writeln!(self.text, "<polyline style=\"stroke:var({color});stroke-width:{width}\" points=\"{places}\"/>")?;
        }
        Ok(())
    }

    fn rect(&mut self, from: (f64, f64), to: (f64, f64), ink: Ink) -> anyhow::Result<()> {
        let (x, y, width, height) = (tenths(from.0), tenths(from.1), tenths(to.0 - from.0), tenths(to.1 - from.1));
        let RGBColor(r, g, b) = ink.color();
        let fill = if matches!(ink, Ink::Level(_)) { format!("rgb({r},{g},{b})") } else { format!("var({})", ink.variable()) };
        Ok(writeln!(self.text, "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" style=\"fill:{fill}\"/>")?)
    }

    fn disc(&mut self, (x, y): (f64, f64), radius: f64, ink: Ink) -> anyhow::Result<()> {
        let (x, y, radius, color) = (tenths(x), tenths(y), tenths(radius), ink.variable());
        Ok(writeln!(self.text, "<circle cx=\"{x}\" cy=\"{y}\" r=\"{radius}\" style=\"fill:var({color})\"/>")?)
    }

    fn text(&mut self, text: &str, (x, y): (f64, f64), size: f64, ink: Ink, anchor: Anchor) -> anyhow::Result<()> {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let (x, y, size, color, text) = (tenths(x), tenths(y), tenths(size), ink.variable(), escaped(&printable(text)));
        Ok(writeln!(
            self.text,
            "<text x=\"{x}\" y=\"{y}\" font-size=\"{size}\" text-anchor=\"{anchor}\" style=\"fill:var({color})\">{text}</text>"
        )?)
    }

    fn text_width(&self, text: &str, size: f64) -> anyhow::Result<f64> {
        // The reader's font may be a little wider than ours.
        Ok(1.06 * width_of(text, size)?)
    }
}

/// Draws a page of that size as an `<svg>` element for an HTML page, whose style sheet gives the colours as variables (`--curve0`).
pub(super) fn markup(width: u32, height: u32, label: &str, draw: &dyn Fn(&mut dyn Canvas) -> anyhow::Result<()>) -> anyhow::Result<String> {
    register()?;
    let sheet = Sheet { width: f64::from(width), height: f64::from(height), margin: 6.0 };
    let mut page = Markup { sheet, text: String::new() };
    draw(&mut page)?;
    let (label, body) = (escaped(label), page.text);
    Ok(format!("<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{label}\">\n{body}</svg>"))
}

/// The font that texts are measured and bitmaps are lettered with.
fn register() -> anyhow::Result<()> {
    register_font(FontFamily::SansSerif.as_str(), FontStyle::Normal, FONT).map_err(|_| anyhow!("the built-in font is damaged"))
}

/// Draws a page twice and writes `STEM.svg` and `STEM.png`, each under a temporary name first.
pub(super) fn write(stem: &Path, draw: &dyn Fn(&mut dyn Canvas) -> anyhow::Result<()>) -> anyhow::Result<()> {
    register()?;
    let name = stem.file_name().with_context(|| format!("{} names no file to draw", stem.display()))?;
    // Dots in the stem are part of the name, so the extension is added, never replaced.
    let sibling = |before: &str, after: &str| -> PathBuf {
        let mut file: OsString = before.into();
        file.push(name);
        file.push(after);
        stem.with_file_name(file)
    };
    let replace = |temporary: &Path, path: &Path, written: anyhow::Result<()>| {
        let done = written.and_then(|()| Ok(fs::rename(temporary, path)?));
        if done.is_err() {
            // Nobody needs half a picture.
            let _ = fs::remove_file(temporary);
        }
        done.with_context(|| format!("cannot write {}", path.display()))
    };

    let svg = svg(draw)?;
    let temporary = sibling(".", ".tmp.svg");
    replace(&temporary, &sibling("", ".svg"), fs::write(&temporary, svg).map_err(Into::into))?;

    let bitmap = bitmap(draw)?;
    // The encoder goes by the extension.
    let temporary = sibling(".", ".tmp.png");
    let mut file = BitMapBackend::new(&temporary, SIZE);
    let written = file.blit_bitmap((0, 0), SIZE, &bitmap).and_then(|()| file.present()).map_err(|error| anyhow!("{error}"));
    // Dropping tries once more to write where that has failed, so it comes before the clean-up.
    drop(file);
    replace(&temporary, &sibling("", ".png"), written)
}

fn svg(draw: &dyn Fn(&mut dyn Canvas) -> anyhow::Result<()>) -> anyhow::Result<String> {
    let (width, height) = (SIZE.0 * SVG_SCALE, SIZE.1 * SVG_SCALE);
    let mut text = String::new();
    {
        let mut page = Page { backend: SVGBackend::with_string(&mut text, (width, height)), scale: f64::from(SVG_SCALE), is_raster: false };
        draw(&mut page)?;
        page.backend.present().map_err(|error| anyhow!("{error}"))?;
    }
    // The drawing stays large in its own units and is shown at the size of the page; round joints, since a noisy curve has sharp turns.
    let body = text.find('>').map_or("", |end| &text[end + 1..]);
    Ok(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{}\" viewBox=\"0 0 {width} {height}\" stroke-linejoin=\"round\" \
         stroke-linecap=\"butt\">\n<rect width=\"{width}\" height=\"{height}\" fill=\"#FFFFFF\"/>{body}",
        SIZE.0, SIZE.1
    ))
}

/// RGB bytes, `[SIZE.1, SIZE.0, 3]`.
fn bitmap(draw: &dyn Fn(&mut dyn Canvas) -> anyhow::Result<()>) -> anyhow::Result<Vec<u8>> {
    let scale = RASTER_SCALE as usize;
    let (width, height) = (SIZE.0 as usize, SIZE.1 as usize);
    let mut large = vec![255_u8; width * scale * height * scale * 3];
    {
        let backend = BitMapBackend::with_buffer(&mut large, (SIZE.0 * RASTER_SCALE, SIZE.1 * RASTER_SCALE));
        let mut page = Page { backend, scale: f64::from(RASTER_SCALE), is_raster: true };
        draw(&mut page)?;
    }
    let mut small = Vec::with_capacity(width * height * 3);
    for y in 0..height {
        for x in 0..width {
            for channel in 0..3 {
                let sum: usize = (0..scale * scale)
                    .map(|i| {
                        let (row, column) = (y * scale + i / scale, x * scale + i % scale);
                        usize::from(large[(row * width * scale + column) * 3 + channel])
                    })
                    .sum();
                small.push((sum / (scale * scale)) as u8);
            }
        }
    }
    Ok(small)
}
