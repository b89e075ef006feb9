//! `stencil report`: its figures, its page in a browser, and text of others in it.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::recording::samples;
use crate::clones::accounting::{MIB, number, world};
use crate::support::actor::Actor;
use crate::support::browser::{chromium, look};
use crate::support::host;
use crate::support::mount::TestMount;

/// Widths of a phone and a desktop screen, in pixels.
const WIDTHS: [u32; 2] = [360, 1440];

/// Makes Chromium prefer dark colours.
const DARK: &str = "--blink-settings=preferredColorScheme=0";

/// Records clones that copy more and more pages.
fn recorded() -> (TestMount, Vec<Actor>) {
    let (world, digest) = world("decode", 16 * MIB);
    world.stencil(&["clone", "web:1", "-n", "4", "--simulate", "read=50p,write=20p"]).ok();
    let memory = world.file(&digest, "memory");
    let mut actors = Vec::new();
    for round in 0..6 {
        if round < 3 {
            let mut actor = Actor::start();
            actor.tell(&format!("map 0 {} 0 {} rw", memory.display(), 16 * MIB));
            actors.push(actor);
        }
        for (number, actor) in (1..).zip(&mut actors) {
            actor.write_pages(0, (0..10 * number).map(|page| page * 16 + round));
        }
        world.stencil(&["record", "web.rec", "--interval", "0.1", "--count", "2"]).ok();
    }
    world.stencil(&["working-set", "record", &actors[0].pid().to_string()]).ok();
    world.stencil(&["record", "web.rec", "--count", "1", "--why"]).ok();
    (world, actors)
}

fn numbers(values: &Value, field: &str) -> Vec<f64> {
    values.as_array().unwrap().iter().map(|value| value[field].as_f64().unwrap()).collect()
}

/// Asserts that two lists of numbers are equal, but for a difference that is at most `step`.
#[track_caller]
fn assert_near(found: impl IntoIterator<Item = f64>, expected: impl IntoIterator<Item = f64>, step: f64) {
    let (found, expected): (Vec<f64>, Vec<f64>) =
        (found.into_iter().collect(), expected.into_iter().collect());
    assert_eq!(found.len(), expected.len(), "{found:?} for {expected:?}");
    for (found, expected) in found.iter().zip(&expected) {
        assert!((found - expected).abs() <= step, "{found} for {expected}");
    }
}

fn coordinate(points: &Value, index: usize) -> Vec<f64> {
    points.as_array().unwrap().iter().map(|point| point[index].as_f64().unwrap()).collect()
}

/// Asserts that the pictures and tables of one recording have the values of its figures.
#[track_caller]
fn assert_shows(found: &Value, prefix: &str, figures: &Value) {
    let plot = |id: &str| {
        let plot = &found["plots"][format!("{prefix}{id}")];
        assert!(
            plot.is_object(),
            "no picture {prefix}{id}: {:?}",
            found["plots"].as_object().unwrap().keys()
        );
        (plot, plot["x_step"].as_f64().unwrap() * 2.0, plot["y_step"].as_f64().unwrap() * 2.0)
    };
    let column = |id: &str, column: usize| -> Vec<f64> {
        let rows = found["tables"][format!("{prefix}{id}")].as_array().unwrap();
        rows.iter().map(|row| row[column].as_f64().unwrap_or_else(|| panic!("{row}"))).collect()
    };
    let history = &figures["history"];
    let (further, x, y) = plot("further");
    let dots = &further["dots var(--s1)"];
    assert_near(coordinate(dots, 0), numbers(history, "seconds"), x);
    assert_near(coordinate(dots, 1), numbers(history, "bytes_per_further_clone"), y);
    assert_eq!(column("further-history", 2), numbers(history, "bytes_per_further_clone"));
    assert_eq!(column("further-parts", 1)[4], figures["further_clone"]["bytes"].as_f64().unwrap());

    let (all, x, y) = plot("all");
    let mut below = vec![0.0; history.as_array().unwrap().len()];
    let parts = [
        "template_bytes",
        "store_cache_bytes",
        "private_bytes",
        "page_table_bytes",
        "overhead_bytes",
        "disk_bytes",
    ];
    for (index, part) in parts.into_iter().enumerate() {
        let sizes = numbers(history, part);
        assert_eq!(column("history", 3 + index), sizes, "{part}");
        assert_eq!(column("parts", 1)[index], figures["totals"][part].as_f64().unwrap(), "{part}");
        let outline = &all[format!("areas var(--s{})", index + 1)][0];
        let above: Vec<f64> = below.iter().zip(&sizes).map(|(below, size)| below + size).collect();
        let expected = above.iter().chain(below.iter().rev()).copied();
        assert_near(coordinate(outline, 1), expected, y);
        let seconds = numbers(history, "seconds");
        assert_near(coordinate(outline, 0), seconds.iter().chain(seconds.iter().rev()).copied(), x);
        below = above;
    }
    assert_eq!(below, numbers(history, "host_bytes"));

    let template = &figures["templates"][0];
    let (growth, x, y) = plot("template-0-growth");
    for (index, quantile) in ["p10_bytes", "p50_bytes", "p90_bytes"].into_iter().enumerate() {
        let dots = &growth[format!("dots var(--s{})", index + 1)];
        assert_near(coordinate(dots, 1), numbers(&template["growth"], quantile), y);
        let ages = numbers(&template["growth"], "to_ms").into_iter().map(|ms| ms / 1000.0);
        assert_near(coordinate(dots, 0), ages, x);
        assert_eq!(column("template-0-growth-table", 3 + index), numbers(&template["growth"], quantile));
    }
    let places = &template["places"][0];
    for (id, field, color) in [("places", "dirty_pages", 1), ("working-set", "working_set_pages", 2)] {
        let (plot, x, y) = plot(&format!("template-0-file-0-{id}"));
        let bucket = places["bucket_pages"].as_f64().unwrap() * 4096.0;
        let pages = places[field].as_array().unwrap().iter().map(|pages| pages.as_f64().unwrap());
        let used: Vec<(f64, f64)> =
            (0..).map(|n| f64::from(n) * bucket).zip(pages).filter(|(_, n)| *n > 0.0).collect();
        assert!(used.len() > 5, "{places}");
        let bars = &plot[format!("bars var(--s{color})")];
        assert_near(coordinate(bars, 0), used.iter().map(|(start, _)| *start), x);
        assert_near(coordinate(bars, 1), used.iter().map(|(start, _)| start + bucket), x);
        assert_near(coordinate(bars, 3), used.iter().map(|(_, pages)| *pages), y);
    }
    let (host, x, _) = plot("host");
    let mut from = 0.0;
    for (index, size) in numbers(&figures["host"], "bytes").into_iter().enumerate() {
        let bar = &host[format!("bars var(--s{})", index + 1)][0];
        assert_near([bar[0].as_f64().unwrap(), bar[1].as_f64().unwrap()], [from, from + size], x);
        assert_eq!(column("host-table", 1)[index], size);
        from += size;
    }
    let reasons = &figures["reasons"]["reasons"];
    assert_eq!(column("reasons", 2), numbers(reasons, "bytes"));
}

/// Asserts that a page has no error, nothing that leaves the screen, and nothing that covers another thing.
#[track_caller]
fn assert_readable(found: &Value, console: &[String], width: u32) {
    assert_eq!(console, [""; 0], "console at {width}");
    assert_eq!(found["inner_width"], width);
    assert!(
        number(found, "scroll_width") <= width.into(),
        "the page is wider than the window: {}",
        found["scroll_width"]
    );
    for kind in ["overlaps", "text_overlaps", "cut_texts", "narrow_cells"] {
        assert_eq!(found[kind], json!([]), "{kind} at {width}");
    }
}

#[test]
fn pictures_tables_and_json_have_the_same_numbers() {
    let _host = host::shared();
    let (world, actors) = recorded();
    let page = world.dir().join("web.html");
    let said = world.stencil(&["report", "web.rec"]).ok().out;
    assert_eq!(said, "wrote web.html\n");
    let mut figures = world.json(&["report", "web.rec"]);
    let last = samples(&world.dir().join("web.rec")).pop().unwrap();
    assert_eq!(figures["totals"], json!(last.totals));
    assert_eq!(number(&figures["further_clone"], "clones"), 4 + actors.len() as u64);
    assert_eq!(figures["further_clone"]["bytes"], json!(last.totals.bytes_per_further_clone));
    assert_eq!(figures["templates"][0]["places"], json!(last.templates[0].places));
    assert_eq!(figures["reasons"]["reasons"], json!(last.reasons));
    assert!(figures["page"].is_null());
    for field in ["schema", "page"] {
        figures.as_object_mut().unwrap().remove(field).unwrap();
    }
    let text = fs::read_to_string(&page).unwrap();
    for foreign in ["href=", "src=", "url(", "@import", "https:", "<link", "<iframe", "xlink"] {
        assert!(!text.contains(foreign), "{foreign}");
    }
    // Not from the browser: JavaScript writes 0.0 as 0.
    let json = text.split("id=\"figures\">").nth(1).unwrap().split("</script>").next().unwrap();
    assert_eq!(serde_json::from_str::<Value>(json).unwrap(), figures);
    for width in WIDTHS {
        // As the reader sees it, without a script.
        let (_, console) = chromium(&page, width, 4000, &["--dump-dom"]);
        assert_eq!(console, [""; 0]);
        let (found, console) = look(&page, width, &[]);
        assert_readable(&found, &console, width);
        assert_shows(&found, "", &figures);
        assert_eq!((&found["dark"], &found["background"]), (&json!(false), &json!("rgb(255, 255, 255)")));
    }
    let (found, console) = look(&page, 1440, &[DARK]);
    assert_readable(&found, &console, 1440);
    assert_shows(&found, "", &figures);
    assert_eq!((&found["dark"], &found["background"]), (&json!(true), &json!("rgb(20, 23, 26)")));
    assert_eq!(found["unreadable"], json!([]));
    let pdf = world.dir().join("web.pdf");
    chromium(&page, 1440, 4000, &[&format!("--print-to-pdf={}", pdf.display())]);
    assert!(fs::read(&pdf).unwrap().starts_with(b"%PDF"));
}

#[test]
fn a_comparison_shows_both_recordings() {
    let _host = host::shared();
    let (world, actors) = recorded();
    drop(actors);
    world.stencil(&["stop", "--all"]).ok();
    world.stencil(&["clone", "web:1", "-n", "2", "--simulate", "read=50p,write=70p"]).ok();
    world.stencil(&["record", "after.rec", "--count", "1"]).ok();
    world.stencil(&["report", "--compare", "web.rec", "after.rec", "--output", "both.html"]).ok();
    let both = world.json(&["report", "after.rec", "--compare", "web.rec"]);
    for (side, file) in [("before", "web.rec"), ("after", "after.rec")] {
        let mut alone = world.json(&["report", file]);
        for field in ["schema", "page"] {
            alone.as_object_mut().unwrap().remove(field).unwrap();
        }
        assert_eq!(both[side], alone, "{side}");
    }
    let changes = both["changes"].as_array().unwrap();
    let change = |name: &str| changes.iter().find(|change| change["figure"] == name).unwrap();
    assert_eq!((&change("clones")["before"], &change("clones")["after"]), (&json!(7), &json!(2)));
    for width in WIDTHS {
        let (found, console) = look(&world.dir().join("both.html"), width, &[]);
        assert_readable(&found, &console, width);
        assert_shows(&found, "before-", &both["before"]);
        let rows = found["tables"]["changes"].as_array().unwrap();
        for (row, change) in rows.iter().zip(changes) {
            assert_eq!((&row[0], &row[1], &row[2]), (&change["figure"], &change["before"], &change["after"]));
        }
    }
}

#[test]
fn a_report_replaces_no_file_and_needs_a_sample() {
    let _host = host::shared();
    let (world, _) = world("decode", MIB);
    let file = world.dir().join("web.rec");
    world.stencil(&["report", "web.rec"]).exits(4).says("no such recording");
    world.stencil(&["record", "web.rec", "--count", "1"]).ok();
    let text = fs::read_to_string(&file).unwrap();
    world.stencil(&["report", "web.rec"]).ok();
    world.stencil(&["report", "web.rec"]).exits(1).says("--force");
    world.stencil(&["report", "web.rec", "--force"]).ok();
    world
        .stencil(&["report", "web.rec", "--output", "web.rec", "--force"])
        .exits(2)
        .says("replace the recording");
    assert_eq!(fs::read_to_string(&file).unwrap(), text);
    // No clones, and no reasons.
    let page = fs::read_to_string(world.dir().join("web.html")).unwrap();
    assert!(page.contains("No sample has clones") && page.contains("Not recorded"), "{page}");
    let header = text.lines().next().unwrap();
    fs::write(&file, format!("{header}\n{{\"time\":")).unwrap();
    world.stencil(&["report", "web.rec", "--force"]).exits(2).says("no sample");
}

/// A recording may come from another host.
#[test]
fn text_of_others_stays_text() {
    let _host = host::shared();
    let (world, _actors) = recorded();
    let attack = "</title></script><script>document.title='run'; console.error('run')</script><b id=\"'x";
    let text = fs::read_to_string(world.dir().join("web.rec")).unwrap();
    let mut lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let sample = lines.last_mut().unwrap();
    sample["templates"][0]["tags"] = json!([attack]);
    sample["templates"][0]["serving"] = attack.into();
    sample["templates"][0]["places"][0]["file"] = attack.into();
    sample["stores"] = json!([attack]);
    sample["reasons"][0]["code"] = attack.into();
    sample["reasons"][0]["remedy"] = format!("{attack}\u{202e}").into();
    let name = "<i onclick='x'>&\".rec";
    let hostile: Vec<String> = lines.iter().map(Value::to_string).collect();
    fs::write(world.dir().join(name), hostile.join("\n") + "\n").unwrap();
    world.stencil(&["report", name, "--output", "page.html"]).ok();
    let page = world.dir().join("page.html");
    let (found, console) = look(&page, 1440, &[]);
    assert_readable(&found, &console, 1440);
    // The figures, and the script of this test.
    assert_eq!(found["scripts"], 2);
    let titles: Vec<&str> =
        found["titles"].as_array().unwrap().iter().map(|title| title.as_str().unwrap()).collect();
    assert_eq!(titles[0], format!("Memory of clones: {name}"));
    assert!(titles.iter().filter(|title| title.contains(attack)).count() >= 2, "{titles:?}");
    let remedy = found["tables"]["reasons"][0][3].as_str().unwrap();
    assert_eq!(remedy, format!("{attack}\\u202e"));
    assert_eq!(found["figures"]["reasons"]["reasons"][0]["remedy"], format!("{attack}\u{202e}"));
}

/// The tests of this file would not see an error of a page if Chromium did not report it.
#[test]
fn the_browser_reports_errors_and_bad_layout() {
    let _host = host::shared();
    let dir = crate::support::mount::temporary("page-");
    let page = |name: &str, body: &str| -> std::path::PathBuf {
        let path = dir.path().join(name);
        let policy = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">";
        let text = format!(
            "<html><head>{policy}</head><body>{body}<script type=\"application/json\" id=\"figures\">{{}}</script></body></html>"
        );
        fs::write(&path, text).unwrap();
        path
    };
    let script = page("script.html", "<script>alert(1)</script>");
    let (_, console) = chromium(&script, 360, 600, &["--dump-dom"]);
    assert_eq!(console.len(), 1, "the policy does not forbid a script: {console:?}");
    let wide = page("wide.html", "<p style='width:500px'>a</p><h1 style='position:absolute;top:0'>b</h1>");
    let (found, _) = look(Path::new(&wide), 360, &[]);
    assert!(number(&found, "scroll_width") > 500, "{found:#}");
    assert_eq!(found["overlaps"].as_array().unwrap().len(), 1, "{found:#}");
}
