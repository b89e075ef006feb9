//! Owners by name, from every source of nsswitch.conf(5).

use std::fs;

use crate::support::mount::{STENCIL, TestMount, run, without_others};

/// A source of names, as those for LDAP: one user and one group, whose entry needs a large buffer.
const SOURCE: &str = r#"
#include <errno.h>
#include <grp.h>
#include <nss.h>
#include <pwd.h>
#include <string.h>

enum nss_status _nss_scenario_getpwnam_r(const char *name, struct passwd *found, char *buffer, size_t length, int *error) {
    if (strcmp(name, "directory-user")) return NSS_STATUS_NOTFOUND;
    if (length < 1 << 16) { *error = ERANGE; return NSS_STATUS_TRYAGAIN; }
    *buffer = 0;
    *found = (struct passwd){buffer, buffer, 4711, 4712, buffer, buffer, buffer};
    return NSS_STATUS_SUCCESS;
}

enum nss_status _nss_scenario_getgrnam_r(const char *name, struct group *found, char *buffer, size_t length, int *error) {
    if (strcmp(name, "directory-group")) return NSS_STATUS_NOTFOUND;
    if (length < 1 << 16) { *error = ERANGE; return NSS_STATUS_TRYAGAIN; }
    memset(buffer, 0, 64);
    *found = (struct group){buffer, buffer, 4713, (char **)(buffer + 16 - (size_t)buffer % 16)};
    return NSS_STATUS_SUCCESS;
}
"#;

#[test]
fn owners_are_looked_up_in_every_source_of_names() {
    let world = TestMount::unmounted();
    world.import_bytes(&[7; 4096], "web:1");
    let [source, library, table] =
        ["names.c", "libnss_scenario.so.2", "nsswitch.conf"].map(|name| world.dir().join(name));
    fs::write(&source, SOURCE).unwrap();
    let [source, library] = [source, library].map(|path| path.to_str().unwrap().to_owned());
    run("cc", &["-shared", "-fPIC", "-Wall", "-Werror", "-o", &library, &source]);
    fs::write(&table, "passwd: files scenario\ngroup: files scenario\n").unwrap();
    let script = format!(
        "{} && mount --bind {} /etc/nsswitch.conf && exec \"$@\"",
        without_others(world.dir()),
        table.display()
    );
    let chown = |owner: &str| {
        let mut command = world.command_in("unshare");
        command.args(["--mount", "sh", "-c", &script, "sh", STENCIL, "chown", owner, "web:1"]);
        let output = command.env("LD_LIBRARY_PATH", world.dir()).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let owner = || {
        let inspected = world.json(&["inspect", "web:1"]);
        (inspected["uid"].as_u64().unwrap(), inspected["gid"].as_u64().unwrap())
    };
    assert_eq!(chown("directory-user:directory-group"), (Some(0), String::new()));
    assert_eq!(owner(), (4711, 4713));
    assert_eq!(chown("root:root").0, Some(0));
    assert_eq!(owner(), (0, 0));
    for (unknown, message) in
        [("no-such-user", "unknown user 'no-such-user'"), (":no-such", "unknown group 'no-such'")]
    {
        let (code, err) = chown(unknown);
        assert!(code == Some(2) && err.contains(message) && err.contains("getent"), "{code:?}: {err}");
    }
    assert_eq!(owner(), (0, 0));
}
