//! Metrics: the exporter, Prometheus, the dashboard and the alert rules; logs as JSON.

pub mod exporter;
pub mod json_log;
pub mod prometheus;
