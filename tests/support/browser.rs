//! Pages in headless Chromium.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// The program of the Debian package chromium-headless-shell, which `make setup` installs.
const CHROMIUM: &str = "chromium-headless-shell";

/// Runs Chromium on a page. Returns its output and the lines that the page wrote to the console.
#[track_caller]
pub fn chromium(page: &Path, width: u32, height: u32, options: &[&str]) -> (String, Vec<String>) {
    let profile = super::mount::temporary("chromium-");
    let output = Command::new(CHROMIUM)
        .args(["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg(format!("--window-size={width},{height}"))
        .args(options)
        .arg(format!("file://{}", page.display()))
        .output()
        .unwrap_or_else(|e| panic!("{CHROMIUM}: {e}: run make setup"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let messages = text(&output.stderr);
    assert!(output.status.success(), "{CHROMIUM}: {messages}");
    let console = messages.lines().filter(|line| line.contains("CONSOLE")).map(str::to_owned).collect();
    (text(&output.stdout), console)
}

/// Loads a copy of the page in a window of this width, and runs `look.js` in it. Returns what the script found, and the
/// console. The copy allows scripts, which the page itself forbids.
#[track_caller]
pub fn look(page: &Path, width: u32, options: &[&str]) -> (Value, Vec<String>) {
    let text = fs::read_to_string(page).unwrap();
    let policy = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">";
    assert!(text.contains(policy), "{} has no policy against scripts", page.display());
    let script =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/look.js")).unwrap();
    let copy = page.with_extension(format!("{width}.html"));
    let text = text.replace(policy, "").replace("</body>", &format!("<script>\n{script}</script></body>"));
    fs::write(&copy, text).unwrap();
    let (dom, console) = chromium(&copy, width, 4000, &[&["--dump-dom"], options].concat());
    let findings = dom.split("id=\"findings\">").nth(1).and_then(|rest| rest.split("</script>").next());
    let findings = findings.unwrap_or_else(|| panic!("the script failed: {console:?}"));
    (serde_json::from_str(findings).unwrap(), console)
}
