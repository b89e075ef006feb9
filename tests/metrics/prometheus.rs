//! Debian's Prometheus scrapes the exporter; promtool loads the alert rules; the dashboard uses metrics that exist.

use std::collections::BTreeSet;
use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::clones::accounting::world;
use crate::metrics::exporter::documented;
use crate::support::exporter::{Exporter, ask, program, promtool};
use crate::support::host;
use crate::support::mount::{temporary, wait_for};

fn monitoring(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reference/monitoring").join(name)
}

/// A running Prometheus with its own database.
struct Prometheus {
    child: Child,
    address: String,
    dir: tempfile::TempDir,
}

impl Prometheus {
    fn start(target: &str) -> Prometheus {
        let dir = temporary("prometheus-");
        let configuration = format!(
            "global:\n  scrape_interval: 1s\n  evaluation_interval: 1s\nrule_files:\n  - {}\nscrape_configs:\n  \
             - job_name: stencil\n    static_configs:\n      - targets: ['{target}']\n",
            monitoring("alerts.yml").display()
        );
        fs::write(dir.path().join("prometheus.yml"), configuration).unwrap();
        // Another process may take the port before Prometheus does; then Prometheus exits and the scenario fails.
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap().to_string();
        drop(free);
        let child = Command::new(program("prometheus"))
            .arg(format!("--config.file={}", dir.path().join("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", dir.path().join("data").display()))
            .arg(format!("--web.listen-address={address}"))
            .stdout(fs::File::create(dir.path().join("out")).unwrap())
            .stderr(fs::File::create(dir.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        Prometheus { child, address, dir }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    /// Calls the HTTP API. Returns `None` while Prometheus starts.
    fn get(&self, path: &str) -> Option<Value> {
        let stream = TcpStream::connect(&self.address).ok()?;
        let reply = ask(stream, &format!("GET {path} HTTP/1.0\r\n\r\n"));
        let reply: Value = serde_json::from_str(&reply.body).ok()?;
        (reply["status"] == "success").then(|| reply["data"].clone())
    }

    /// Returns the values of an expression.
    fn query(&self, expression: &str) -> Option<Vec<f64>> {
        let encoded: String = expression.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let data = self.get(&format!("/api/v1/query?query={encoded}"))?;
        let number = |value: &Value| value["value"][1].as_str().unwrap().parse().unwrap();
        Some(data["result"].as_array().unwrap().iter().map(number).collect())
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let _ = self.child.wait();
        if std::thread::panicking() {
            println!("{}", self.log());
        }
    }
}

/// The panels of the dashboard without rows.
fn panels(dashboard: &Value) -> Vec<&Value> {
    dashboard["panels"].as_array().unwrap().iter().filter(|panel| panel["type"] != "row").collect()
}

fn dashboard() -> Value {
    serde_json::from_str(&fs::read_to_string(monitoring("dashboard.json")).unwrap()).unwrap()
}

/// The expressions of the dashboard, with values for its variables.
fn expressions(dashboard: &Value) -> Vec<(String, String)> {
    let targets = |panel: &Value| panel["targets"].as_array().unwrap().clone();
    let all = panels(dashboard).into_iter().flat_map(|panel| {
        let title = panel["title"].as_str().unwrap().to_owned();
        targets(panel)
            .into_iter()
            .map(move |target| (title.clone(), target["expr"].as_str().unwrap().to_owned()))
    });
    let replaced = |text: String| {
        text.replace("$instance", ".*").replace("$mount", ".*").replace("$__rate_interval", "30s")
    };
    all.map(|(title, text)| (title, replaced(text))).collect()
}

#[test]
fn prometheus_scrapes_the_exporter_and_every_panel_of_the_dashboard_has_values() {
    let _host = host::shared();
    let (world, digest) = world("decode", 4 << 20);
    world.stencil(&["clone", "web:1", "-n", "3", "--simulate", "read=200p,write=30p"]).ok();
    let exporter = Exporter::start(&world, &["--max-age", "0", "--per-clone", "2"]);
    let prometheus = Prometheus::start(&exporter.address);
    let value = |expression: &str| wait_for(expression, || prometheus.query(expression)?.first().copied());
    wait_for("a scrape", || (prometheus.query("up{job=\"stencil\"}")? == [1.0]).then_some(()));
    assert!(value("scrape_samples_scraped{job=\"stencil\"}") > 50.0);
    wait_for("a scrape within a second", || {
        (prometheus.query("scrape_duration_seconds{job=\"stencil\"}")?.first()? < &1.0).then_some(())
    });
    wait_for("figures", || (prometheus.query("stencil_clones")? == [3.0]).then_some(()));
    // Only OpenMetrics has units.
    let unit = || prometheus.get("/api/v1/targets/metadata?metric=stencil_memory_bytes");
    wait_for("metadata", || (unit()?[0]["unit"] == "bytes").then_some(()));
    let targets = prometheus.get("/api/v1/targets").unwrap();
    let target = &targets["activeTargets"][0];
    assert_eq!((&target["health"], &target["lastError"]), (&"up".into(), &"".into()), "{target:#}");
    assert!(!prometheus.log().contains("level=error"), "{}", prometheus.log());
    assert!(!prometheus.log().contains("Error on ingesting"), "{}", prometheus.log());

    let dashboard = dashboard();
    for (title, expression) in expressions(&dashboard) {
        // A quantile is a number only if requests were answered in the interval.
        let read = || drop(fs::read(world.file(&digest, "manifest.json")));
        wait_for(&format!("{title}: {expression}"), || {
            read();
            prometheus.query(&expression)?.first().map(drop)
        });
    }
    let rules = prometheus.get("/api/v1/rules").unwrap();
    let rules = rules["groups"][0]["rules"].as_array().unwrap().clone();
    assert!(rules.len() > 8 && rules.iter().all(|rule| rule["lastError"].is_null()), "{rules:#?}");
    for alert in ["StencilMountDown", "StencilServerDown", "StencilExporterAbsent", "StencilDamage"] {
        let state = wait_for("an evaluation", || {
            let data = prometheus.get("/api/v1/rules")?;
            let rules = data["groups"][0]["rules"].as_array()?.clone();
            let rule = rules.into_iter().find(|rule| rule["name"] == alert)?;
            (rule["health"] == "ok").then(|| rule["state"].clone())
        });
        // Before the first scrape the exporter was absent.
        assert!(state == "inactive" || alert == "StencilExporterAbsent", "{alert}: {state}");
    }
    world.kill_server();
    wait_for("the restart", || (prometheus.query("stencil_server_restarts_total")? == [1.0]).then_some(()));
}

#[test]
fn the_alert_rules_pass_their_tests() {
    let dir = temporary("alerts-");
    let rules = dir.path().join("alerts.yml");
    fs::copy(monitoring("alerts.yml"), &rules).unwrap();
    let tests = dir.path().join("alerts.test.yml");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/metrics/alerts.test.yml");
    fs::copy(source, &tests).unwrap();
    let text = promtool(&["check", "rules", rules.to_str().unwrap()], "");
    assert!(text.contains("SUCCESS"), "{text}");
    promtool(&["test", "rules", tests.to_str().unwrap()], "");
    // Each alert has a test that it fires.
    let (rules, tests) = (fs::read_to_string(&rules).unwrap(), fs::read_to_string(&tests).unwrap());
    let names = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: "));
    for name in names {
        let fires = format!("alertname: {name}\n        exp_alerts:\n          - exp_labels:");
        assert!(tests.contains(&fires), "no test that {name} fires");
    }
    assert_metrics_exist(&rules);
}

/// Panics unless each word that begins as a metric of Stencil is a metric, or a part of a histogram.
#[track_caller]
fn assert_metrics_exist(text: &str) {
    let documented: BTreeSet<String> = documented().into_iter().collect();
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    for word in words.filter(|word| word.starts_with("stencil_")) {
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| word.strip_suffix(suffix));
        let exists = documented.contains(word) || family.is_some_and(|family| documented.contains(family));
        assert!(exists, "{word} is not a metric of the exporter");
    }
}

#[test]
fn the_dashboard_has_what_grafana_imports() {
    let dashboard = dashboard();
    assert!(dashboard["id"].is_null() && dashboard["uid"] == "stencil" && dashboard["title"] == "Stencil");
    assert!(dashboard["schemaVersion"].as_u64().unwrap() >= 36 && dashboard["version"].is_u64());
    assert!(dashboard["time"]["from"].is_string() && dashboard["time"]["to"] == "now");
    let variables = dashboard["templating"]["list"].as_array().unwrap();
    let names: Vec<&str> = variables.iter().map(|variable| variable["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["datasource", "instance", "mount"]);
    assert_eq!((&variables[0]["type"], &variables[0]["query"]), (&"datasource".into(), &"prometheus".into()));
    for variable in &variables[1..] {
        assert!(
            variable["type"] == "query" && variable["query"]["query"] == variable["definition"],
            "{variable}"
        );
        assert_metrics_exist(variable["definition"].as_str().unwrap());
    }
    let mut ids = BTreeSet::new();
    let mut taken = BTreeSet::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "two panels have the id {}", panel["id"]);
        let place = |field: &str| panel["gridPos"][field].as_u64().unwrap();
        assert!(place("x") + place("w") <= 24, "{panel}");
        for x in place("x")..place("x") + place("w") {
            for y in place("y")..place("y") + place("h") {
                assert!(taken.insert((x, y)), "{} overlaps another panel", panel["title"]);
            }
        }
        assert!(panel["title"].as_str().is_some_and(|title| !title.is_empty()));
    }
    for panel in panels(&dashboard) {
        assert!(["stat", "timeseries"].contains(&panel["type"].as_str().unwrap()), "{panel}");
        assert!(panel["fieldConfig"]["defaults"]["unit"].is_string() && panel["description"].is_string());
        let targets = panel["targets"].as_array().unwrap();
        let references: BTreeSet<&str> =
            targets.iter().map(|target| target["refId"].as_str().unwrap()).collect();
        assert!(!targets.is_empty() && references.len() == targets.len(), "{panel}");
        for part in targets.iter().chain([panel]) {
            assert_eq!(part["datasource"]["uid"], "${datasource}", "{panel}");
        }
    }
    let expressions = expressions(&dashboard);
    let rules: String = expressions
        .iter()
        .enumerate()
        .map(|(number, (title, expression))| {
            assert!(!expression.contains('$'), "{title}: unknown variable in {expression}");
            assert_metrics_exist(expression);
            format!("      - record: panel:{number}\n        expr: '{expression}'\n")
        })
        .collect();
    let dir = temporary("dashboard-");
    let path = dir.path().join("rules.yml");
    fs::write(&path, format!("groups:\n  - name: dashboard\n    rules:\n{rules}")).unwrap();
    promtool(&["check", "rules", path.to_str().unwrap()], "");
}
