//! The table of requests in flight of a running server, as its supervisor sees it.

use std::fs::{self, File};
use std::path::Path;

use stencilfs::control::{INFLIGHT_NAME, InFlightTable};

/// Maps the table of a server. It stays readable when the server is killed.
pub fn table_of(server: u32) -> InFlightTable {
    let fds = format!("/proc/{server}/fd");
    let wanted = format!("/memfd:{INFLIGHT_NAME} (deleted)");
    for entry in fs::read_dir(&fds).unwrap_or_else(|e| panic!("{fds}: {e}")) {
        let path = entry.unwrap().path();
        if fs::read_link(&path).is_ok_and(|target| target == Path::new(&wanted)) {
            return InFlightTable::map(File::open(&path).unwrap().into()).unwrap();
        }
    }
    panic!("server {server} has no table of requests in flight");
}
