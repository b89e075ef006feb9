//! Reads the table of requests in flight of a running server, as its supervisor does.

use std::fs::{self, File};
use std::path::Path;

use stencilfs::control::{INFLIGHT_NAME, InFlightTable};

/// Maps the table of a server. The table stays readable after the server is killed.
pub fn table_of(server: u32) -> InFlightTable {
    find_table(server).unwrap_or_else(|| panic!("server {server} has no table of requests in flight"))
}

/// Maps the table of a server; `None` if the server has not created the table yet, or has exited.
pub fn find_table(server: u32) -> Option<InFlightTable> {
    let wanted = format!("/memfd:{INFLIGHT_NAME} (deleted)");
    let mut fds = fs::read_dir(format!("/proc/{server}/fd")).ok()?.flatten().map(|entry| entry.path());
    let path = fds.find(|path| fs::read_link(path).is_ok_and(|target| target == Path::new(&wanted)))?;
    InFlightTable::map(File::open(path).ok()?.into()).ok()
}
