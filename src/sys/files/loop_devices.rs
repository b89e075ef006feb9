//! Loop devices. The kernel has their backing files open; no process does.

use std::fs;

/// Returns the name of each loop device with a backing file, and the path of the file as the kernel prints it. The
/// function opens neither devices nor backing files, so an unresponsive file system cannot block it.
pub fn files() -> Vec<(String, String)> {
    let devices = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let file = |device: fs::DirEntry| {
        let path = fs::read_to_string(device.path().join("loop/backing_file")).ok()?;
        Some((device.file_name().to_string_lossy().into_owned(), path.trim_end().to_owned()))
    };
    devices.filter_map(file).collect()
}
