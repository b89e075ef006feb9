//! Metrics: the exporter, Prometheus, the dashboard and the alert rules; `stencil top`; logs as JSON; recordings and
//! reports.

mod capacity;
pub mod exporter;
pub mod json_log;
pub mod prometheus;
pub mod recording;
pub mod report;
pub mod top;
