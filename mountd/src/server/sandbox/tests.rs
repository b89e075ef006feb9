use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::*;

/// Runs `work` in a thread that is confined to a store with the file `inside`; `outside` is next to the store.
fn in_sandbox<T: Send>(work: impl FnOnce(&Path, &Path) -> T + Send) -> T {
    let dir = tempfile::tempdir().unwrap();
    let (store, outside) = (dir.path().join("store"), dir.path().join("outside"));
    fs::create_dir(&store).unwrap();
    fs::write(store.join("inside"), "readable").unwrap();
    fs::write(&outside, "secret").unwrap();
    fs::set_permissions(&outside, PermissionsExt::from_mode(0o644)).unwrap();
    std::thread::scope(|scope| {
        let confined = scope.spawn(|| {
            let lacks = confine(&store).unwrap();
            // Without root, the server can neither empty the bounding set nor run as the store's owner.
            let by_user = |lack: &String| lack.contains("bounding set") || lack.contains("store's owner");
            assert!(lacks.iter().all(by_user), "{lacks:?}");
            work(&store.join("inside"), &outside)
        });
        confined.join().unwrap()
    })
}

#[test]
fn only_the_store_can_be_read_and_nothing_can_be_written() {
    let (read, secret, written, created) = in_sandbox(|inside, outside| {
        let write = fs::File::options().write(true).open(inside).map(drop);
        (fs::read(inside), fs::read(outside), write, fs::write(inside.with_file_name("new"), "x"))
    });
    assert_eq!(read.unwrap(), b"readable");
    for refused in [secret.map(drop), written, created] {
        let errno = refused.unwrap_err().raw_os_error().unwrap();
        assert!([libc::EACCES, libc::EPERM].contains(&errno), "{errno}");
    }
}

#[test]
fn forbidden_system_calls_fail_with_eperm() {
    let (socket, process) = in_sandbox(|_, _| {
        let socket =
            rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, None);
        let process = std::process::Command::new("true").spawn().map(drop);
        (socket.map(drop), process)
    });
    assert_eq!(socket.unwrap_err(), rustix::io::Errno::PERM);
    assert_eq!(process.unwrap_err().raw_os_error(), Some(libc::EPERM));
}

#[test]
fn a_process_with_several_threads_does_not_enter() {
    let error = std::thread::spawn(|| enter(Path::new("/")).unwrap_err()).join().unwrap();
    assert!(error.to_string().contains("expected 1"), "{error}");
}

#[test]
fn the_variable_selects_what_a_forbidden_call_does() {
    let of = |word: Option<&str>| refused(word.map(std::ffi::OsStr::new));
    assert_eq!(of(None).unwrap(), Refused::Eperm);
    assert_eq!(of(Some("kill")).unwrap(), Refused::Kill);
    assert!(of(Some("log")).unwrap_err().to_string().contains("expected kill or eperm"));
}
