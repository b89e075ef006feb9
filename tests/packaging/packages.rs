//! The Debian package on a clean Debian 12, and `make install` beside the package.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::support::debian::{Debian, bin, make, package};
use crate::support::host;
use crate::support::mount::{Run, run, temporary, wait_for};
use crate::support::store::random;

const MEMORY: usize = 8 << 20;
const MNT: &str = "/srv/templates";
/// Compares the template's bytes with the imported file.
const SAME: &str = "cmp /root/guest.ram /srv/templates/templates/web/1/memory";

/// Installs the package in a clean root directory, which has a memory image in `/root/guest.ram`.
fn installed(debian: &Debian) -> Run {
    fs::copy(package(), debian.path("/tmp/stencil.deb")).unwrap();
    fs::write(debian.path("/root/guest.ram"), random(3, MEMORY)).unwrap();
    fs::create_dir_all(debian.path(MNT)).unwrap();
    debian.sh("dpkg -i /tmp/stencil.deb")
}

fn wait_unmounted(debian: &Debian) {
    wait_for("both processes of the mount to end", || {
        (debian.out("stencil status") == "no mounts\n").then_some(())
    });
}

#[test]
fn installs_runs_upgrades_and_purges_on_a_clean_debian_12() {
    let _host = host::shared();
    let debian = Debian::new();
    fs::write(debian.path("/root/guest.ram"), "").unwrap();
    fs::create_dir_all(debian.path("/etc/systemd/system/multi-user.target.wants")).unwrap();
    fs::create_dir_all(debian.path(MNT)).unwrap();
    fs::write(debian.path("/tmp/stencil.deb"), "").unwrap();
    let before = debian.files();
    let install = installed(&debian).ok();
    assert!(!install.err.contains("warning"), "{}", install.err);
    assert_eq!(debian.out("dpkg --audit; dpkg --verify stencil"), "");

    assert_linked_libraries_are_declared(&debian);
    let doctor = debian.json("doctor");
    let checks = doctor["checks"].as_array().unwrap();
    assert!(checks.len() > 10 && checks.iter().all(|c| c["verdict"] != "missing"), "{doctor:#}");
    // QEMU is not installed, and the following commands do not need it.
    for name in ["qemu", "qemu-img"] {
        let check = checks.iter().find(|c| c["name"] == name).unwrap_or_else(|| panic!("{doctor:#}"));
        assert!(check["verdict"] == "note" && check["remedy"].is_string(), "{check:#}");
    }
    debian.out("stencil import /root/guest.ram web:1");
    assert!(debian.out("stencil ls").contains("web"));
    debian.out("stencil verify && stencil export web:1/memory /tmp/out && cmp /tmp/out /root/guest.ram && rm /tmp/out");

    // Mount with the example fstab of the package.
    debian.out("cp /etc/fstab /tmp/fstab && cat /usr/share/doc/stencil/examples/fstab >>/etc/fstab");
    debian.out("mount -a");
    debian.out(SAME);
    debian.out("mount -a");
    let mounts = debian.out("findmnt -n -o SOURCE,TARGET,FSTYPE -t fuse.stencil");
    assert_eq!(mounts.split_whitespace().collect::<Vec<_>>(), ["/var/lib/stencil", MNT, "fuse.stencil"]);
    debian.out("umount /srv/templates");
    wait_unmounted(&debian);
    debian.out("mv /tmp/fstab /etc/fstab");

    // The package cannot be removed while clones run.
    debian.out("mount -t fuse.stencil -o _netdev,nofail,x-systemd.automount /var/lib/stencil /srv/templates");
    debian.out("stencil clone web:1 -n 3 --simulate read=50%,write=5%");
    let clones = || debian.json("density")["totals"]["clones"].as_u64();
    assert_eq!(clones(), Some(3));
    for verb in ["--remove", "--purge"] {
        let refused = debian.sh(&format!("dpkg {verb} stencil")).exits(1);
        assert!(refused.err.contains("  mounted: /srv/templates\n"), "{}", refused.err);
        assert!(refused.err.contains("stencil umount MNT"), "{}", refused.err);
    }
    assert_eq!(debian.out("dpkg-query -W -f '${db:Status-Status}' stencil"), "installed");
    assert!(debian.sh("umount /srv/templates").code != 0, "umount must fail while clones map the template");

    // After an upgrade, mounts keep running the old programs until `stencil restart`.
    let served_by = |program: &str| {
        let mount = debian.json("status")["mounts"][0].clone();
        let pids = [&mount["supervisor_pid"], &mount["server_pid"]].map(|pid| pid.as_u64().unwrap());
        pids.map(|pid| debian.sh(&format!("cmp -s /proc/{pid}/exe {program}")).code == 0)
    };
    debian.out("cp /usr/bin/stencil-mountd /tmp/old");
    assert_eq!(served_by("/tmp/old"), [true; 2]);
    let upgraded = upgrade(&debian).ok();
    assert!(upgraded.out.contains("stencil restart --all"), "{}", upgraded.out);
    assert_eq!(debian.out("dpkg-query -W -f '${Version}' stencil"), "99");
    debian.out(SAME);
    assert_eq!((served_by("/tmp/old"), served_by("/usr/bin/stencil-mountd")), ([true; 2], [false; 2]));
    debian.out("stencil restart --all");
    debian.out(SAME);
    assert_eq!((served_by("/tmp/old"), served_by("/usr/bin/stencil-mountd")), ([false; 2], [true; 2]));
    assert_eq!(clones(), Some(3));
    debian.out("rm /tmp/old");
    // A detached mount that clones still map keeps the package too.
    debian.out("stencil umount -l /srv/templates");
    let refused = debian.sh("dpkg --remove stencil").exits(1);
    assert!(refused.err.contains("  served:  /srv/templates serves /var/lib/stencil"), "{}", refused.err);
    assert_unknown_status_keeps_the_package(&debian);
    debian.out("stencil stop --all");
    wait_unmounted(&debian);

    // The store survives a removal, and also a purge as long as it has templates.
    let unit = debian.path("/etc/systemd/system/multi-user.target.wants/stencil@srv-templates.service");
    symlink("/lib/systemd/system/stencil@.service", &unit).unwrap();
    debian.out("dpkg --remove stencil");
    assert!(debian.path("/var/lib/stencil/format").is_file() && !debian.path("/run/stencil").exists());
    let kept = debian.sh("dpkg --purge stencil").ok();
    assert!(kept.err.contains("/var/lib/stencil is kept because it holds templates"), "{}", kept.err);
    assert!(fs::symlink_metadata(&unit).is_err(), "no enabled service without its unit may be left");
    debian.out("dpkg -i /tmp/stencil.deb && stencil verify && stencil rm web:1");
    // The purge must succeed although the program is missing.
    debian.out("rm /usr/bin/stencil");
    let purged = debian.sh("dpkg --purge stencil").ok();
    assert!(!purged.err.contains("kept") && !purged.err.contains("not empty"), "{}", purged.err);

    fs::write(debian.path("/root/guest.ram"), "").unwrap();
    fs::write(debian.path("/tmp/stencil.deb"), "").unwrap();
    let after = debian.files();
    let left: Vec<_> = after.iter().filter(|(path, what)| before.get(*path) != Some(what)).collect();
    let lost: Vec<_> = before.keys().filter(|path| !after.contains_key(*path)).collect();
    assert!(left.is_empty() && lost.is_empty(), "left behind: {left:?}; lost: {lost:?}");
}

/// Installs a package with a higher version, whose daemon has different bytes.
fn upgrade(debian: &Debian) -> Run {
    debian.out(
        "cd /tmp && dpkg-deb -R stencil.deb later && printf x >>later/usr/bin/stencil-mountd && \
         sed -i 's/^Version: .*/Version: 99/' later/DEBIAN/control && \
         (cd later && md5sum $(find usr -type f) >DEBIAN/md5sums) && \
         dpkg-deb -Znone --root-owner-group -b later later.deb",
    );
    let upgraded = debian.sh("dpkg -i /tmp/later.deb");
    debian.out("rm -r /tmp/later /tmp/later.deb");
    upgraded
}

/// Asserts that the package cannot be removed if `stencil status` fails. Needs a detached mount that is still served.
fn assert_unknown_status_keeps_the_package(debian: &Debian) {
    let records = "/run/stencil/mounts";
    let assert_refused = |change: &str, back: &str, message: &str| {
        debian.out(change);
        let refused = debian.sh("dpkg --remove stencil").exits(1);
        debian.out(back);
        assert!(refused.err.contains(message), "{}", refused.err);
    };
    let away = format!("mv {records} /run/records && touch {records}");
    let back = format!("rm {records} && mv /run/records {records}");
    assert_refused(&away, &back, "cannot determine whether a template store is mounted");
    assert_refused(&away, &back, "cannot use the runtime directory");
    let away = format!("cd {records}/* && mv mount.json kept && echo '{{' >mount.json");
    let back = format!("cd {records}/* && mv kept mount.json");
    assert_refused(&away, &back, "  served:  cannot read the record of a mount");
    // For a user who cannot read the records, `status` fails with an error.
    let user = debian.sh("setpriv --reuid=123 --regid=123 --clear-groups stencil status").exits(1);
    assert!(
        user.err.contains("Permission denied") && user.err.contains("run the command as root"),
        "{}",
        user.err
    );
    assert!(debian.out("stencil status").contains("/srv/templates serves /var/lib/stencil"));
    let elsewhere = debian.sh("STENCIL_RUNTIME_DIR=/tmp/none dpkg --remove stencil").exits(1);
    assert!(elsewhere.err.contains("  served:  /srv/templates"), "{}", elsewhere.err);
}

/// Asserts that all linked libraries exist, and that the package of each is declared as a dependency.
fn assert_linked_libraries_are_declared(debian: &Debian) {
    let depends = debian.out("dpkg-query -W -f '${Depends}' stencil");
    let declared: BTreeSet<&str> = depends.split(", ").map(|word| word.split(' ').next().unwrap()).collect();
    let linked = debian.out("ldd /usr/bin/stencil /usr/bin/stencil-mountd");
    assert!(!linked.contains("not found"), "{linked}");
    let libraries: BTreeSet<&str> =
        linked.split_whitespace().filter(|word| word.starts_with('/') && !word.ends_with(':')).collect();
    assert!(libraries.len() >= 2, "{linked}");
    for library in libraries {
        // With merged /usr, dpkg may have recorded the library below /lib or below /usr/lib: search by file name.
        let name = Path::new(library).file_name().unwrap().to_str().unwrap();
        let owner = debian.out(&format!("dpkg -S '*/{name}'"));
        let owner = owner.split(':').next().unwrap();
        assert!(declared.contains(owner), "{library} belongs to {owner}, which is not in: {depends}");
    }
}

#[test]
fn mount_8_forwards_messages_and_exit_codes_of_the_helper() {
    let _host = host::shared();
    let debian = Debian::new();
    installed(&debian).ok();
    debian.out("stencil import /root/guest.ram web:1");
    let call = |options: &str| debian.sh(&format!("mount -t fuse.stencil {options} /var/lib/stencil {MNT}"));
    let mounted = || !debian.sh("findmnt -n -t fuse.stencil").out.is_empty();

    for (options, code, message) in [
        ("-o frobnicate", 1, "unknown mount option 'frobnicate'"),
        ("-o serve=fast", 1, "invalid serve mode 'fast'"),
        ("-f -o frobnicate", 1, "unknown mount option 'frobnicate'"),
    ] {
        let refused = call(options).exits(code);
        assert!(
            refused.err.contains(&format!("mount.fuse.stencil: error: {message}")),
            "{options}: {}",
            refused.err
        );
        assert!(!mounted(), "{options}");
    }
    let missing = debian.sh(&format!("mount -t fuse.stencil /var/lib/none {MNT}")).exits(32);
    assert!(missing.err.contains("no template store"), "{}", missing.err);
    call("-f").ok();
    assert!(!mounted(), "-f must mount nothing");

    let verbose = call("-v -n -s -o ro,frobnicate,serve=decode,user_xattr,x-initrd.mount,comment=a").ok();
    assert!(verbose.out.contains("/var/lib/stencil is mounted on /srv/templates"), "{}", verbose.out);
    assert!(verbose.err.contains("frobnicate"), "the ignored option must be named: {}", verbose.err);
    debian.out(SAME);
    assert_eq!(debian.json("status")["mounts"][0]["serve"], "decode");
    let again = debian.sh(&format!("mount -o remount,ro {MNT}"));
    assert!(again.code != 0 && again.err.contains("'remount' is refused"), "{}", again.err);
    let twice = call("");
    assert!(twice.code == 32, "{} {}", twice.code, twice.err);
    debian.out(&format!("umount {MNT}"));
    wait_unmounted(&debian);
}

#[test]
fn readme_first_mount_works_with_the_installed_package() {
    let _host = host::shared();
    let debian = Debian::new();
    installed(&debian).ok();
    let readme = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    let section =
        readme.split("## First mount in sixty seconds\n").nth(1).unwrap().split("\n## ").next().unwrap();
    let commands: Vec<&str> = section.lines().filter_map(|line| line.strip_prefix("$ ")).collect();
    assert!(commands.len() >= 6, "{section}");
    let done = debian.sh(&format!("cd /root && set -ex\n{}", commands.join("\n"))).ok();
    assert!(
        done.out.contains("8 clones of 1 template take") && done.out.contains("8 clones stopped"),
        "{}",
        done.out
    );
    wait_unmounted(&debian);
}

#[test]
fn install_and_uninstall_leave_other_installations_alone() {
    let _host = host::shared();
    let debian = Debian::new();
    installed(&debian).ok();
    let dest = format!("DESTDIR={}", debian.path("/").display());
    let call = |verb: &str, prefix: &str| make(&[verb, &bin(), &dest, &format!("PREFIX={prefix}")]);
    let before = debian.files();
    for prefix in ["/usr", "/usr/local"] {
        let refused = call("install-files", prefix).exits(2);
        assert!(refused.err.contains("is of a Debian package: remove it first"), "{}", refused.err);
    }
    call("uninstall", "/usr").exits(2).says("apt remove stencil");
    // Another prefix is allowed: an installation from before this check may be there. Such an installation does not
    // exist here, so nothing changes.
    call("uninstall", "/usr/local").ok();
    assert_eq!(debian.files(), before);
    assert_eq!(debian.out("dpkg --verify stencil"), "");

    debian.out("dpkg --purge stencil");
    call("install-files", "/usr/local").ok();
    let refused = call("install-files", "/opt/x").exits(2);
    assert!(refused.err.contains("/usr/local/bin/stencil: make uninstall there first"), "{}", refused.err);
    call("uninstall", "/opt/x").ok();
    call("install-files", "/usr/local").ok();
    assert!(debian.out("mount.fuse.stencil --help").contains("mount.fuse.stencil"));
    call("uninstall", "/usr/local").ok();
    assert!(fs::symlink_metadata(debian.path("/usr/sbin/mount.fuse.stencil")).is_err());
}

#[test]
fn man_pages_and_completions_are_installed_and_valid() {
    let _host = host::shared();
    let debian = Debian::new();
    let before = debian.files();
    installed(&debian).ok();
    let help = debian.out("stencil --help");
    let commands: Vec<&str> = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.strip_prefix("  ")?.split(' ').next())
        .filter(|word| !word.is_empty() && *word != "help")
        .collect();
    assert!(commands.len() >= 20, "{commands:?}");
    let installed_pages = files_below(&debian.path("/usr/share/man"));
    let expected = commands.iter().map(|command| format!("man1/stencil-{command}.1"));
    let others = [
        "man1/stencil.1",
        "man1/stencil-recipe-edit.1",
        "man1/stencil-store-destroy.1",
        "man1/stencil-store-unseal.1",
        "man1/stencil-working-set-ls.1",
        "man1/stencil-working-set-record.1",
        "man1/stencil-working-set-rm.1",
        "man8/mount.fuse.stencil.8",
        "man8/stencil-mountd.8",
    ];
    let expected: BTreeSet<String> = expected.chain(others.map(Into::into)).collect();
    let pages: BTreeSet<String> =
        installed_pages.into_iter().filter(|page| page.contains("stencil")).collect();
    assert_eq!(pages, expected);
    for page in pages {
        let path = debian.path(&format!("/usr/share/man/{page}.gz"));
        let read = Command::new("sh")
            .args(["-c", "gzip -dc \"$0\" | groff -k -man -Tutf8 -P-cbou -ww"])
            .arg(&path)
            .output()
            .unwrap();
        let (text, warnings) = (String::from_utf8_lossy(&read.stdout), String::from_utf8_lossy(&read.stderr));
        assert!(text.contains("SYNOPSIS"), "{page}: {text}{warnings}");
        assert_eq!(warnings, "", "{page}");
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        let expected: &[&str] = match page.as_str() {
            "man1/stencil.1" => &[
                "EXIT STATUS",
                "ENVIRONMENT",
                "FILES",
                "SEE ALSO",
                "75     temporary failure; the same command may succeed later",
            ],
            "man8/stencil-mountd.8" => &["ENVIRONMENT", "FILES", "SEE ALSO"],
            "man8/mount.fuse.stencil.8" => &[
                "EXIT STATUS",
                "/var/lib/stencil /srv/templates fuse.stencil cache-size=20G,nofail 0 0",
                "SEE ALSO",
            ],
            _ => &["EXIT STATUS", "SEE ALSO"],
        };
        for line in expected {
            assert!(lines.contains(line), "{page} has no line '{line}': {text}");
        }
        assert!(!lines.contains(&"EXTRA"), "{page}: {text}");
        if ["man1/stencil-rm.1", "man1/stencil-save.1"].contains(&page.as_str()) {
            assert!(text.contains("<T>..."), "{page}: {text}");
        }
    }

    let completed = debian.out(
        "bash -c '. /usr/share/bash-completion/completions/stencil; COMP_WORDS=(stencil mou) COMP_CWORD=1; \
         $(complete -p stencil | grep -o \"_stencil\") stencil mou stencil; echo ${COMPREPLY[@]}'",
    );
    assert_eq!(completed.trim(), "mount");
    let file = |path: &str| debian.path(path).to_str().unwrap().to_owned();
    run("zsh", &["-fn", &file("/usr/share/zsh/site-functions/_stencil")]);
    let fish = fs::read_to_string(file("/usr/share/fish/vendor_completions.d/stencil.fish")).unwrap();
    let suggestions =
        run("fish", &["--no-config", "-c", &format!("{fish}\ncomplete --do-complete 'stencil mou'")]);
    assert!(suggestions.starts_with("mount\t"), "{suggestions}");

    // The list of the package has every file that the installation added.
    let named: BTreeSet<String> =
        debian.out("dpkg -L stencil").lines().map(|path| path.trim_start_matches('/').to_owned()).collect();
    let added: Vec<String> = debian
        .files()
        .into_keys()
        .filter(|path| !before.contains_key(path) && !path.starts_with("var/lib/dpkg/info/stencil."))
        .filter(|path| !["root/guest.ram", "srv/templates", "tmp/stencil.deb"].contains(&path.as_str()))
        .collect();
    assert!(added.len() > 40 && added.iter().all(|path| named.contains(path)), "{added:?}");
}

/// Relative paths of all files below a directory, without the suffix `.gz`.
fn files_below(dir: &Path) -> BTreeSet<String> {
    run("find", &[dir.to_str().unwrap(), "!", "-type", "d", "-printf", "%P\\n"])
        .lines()
        .map(|path| path.trim_end_matches(".gz").to_owned())
        .collect()
}

/// Symbols in the programs would triple the package; without symbols anywhere, a user's backtrace names nothing.
#[test]
fn programs_are_stripped_and_the_symbols_name_the_frames_of_a_backtrace() {
    let _host = host::shared();
    let dir = temporary("symbols-");
    let (unpacked, symbols) = (dir.path().join("deb"), dir.path().join("dbgsym"));
    let name = package().file_name().unwrap().to_str().unwrap().replacen("stencil_", "stencil-dbgsym_", 1);
    let with_symbols = package().with_file_name(name);
    run("dpkg-deb", &["-x", package().to_str().unwrap(), unpacked.to_str().unwrap()]);
    run("dpkg-deb", &["-x", with_symbols.to_str().unwrap(), symbols.to_str().unwrap()]);
    let depends = run("dpkg-deb", &["-f", with_symbols.to_str().unwrap(), "Depends"]);
    let version = run("dpkg-deb", &["-f", package().to_str().unwrap(), "Version"]);
    assert_eq!(depends.trim(), format!("stencil (= {})", version.trim()));
    for program in ["stencil", "stencil-mountd"] {
        let program = unpacked.join("usr/bin").join(program);
        let sections = run("readelf", &["-SW", program.to_str().unwrap()]);
        assert!(sections.contains(".note.gnu.build-id"), "{sections}");
        // A loaded section, .debug_gdb_scripts, stays.
        for stripped in [" .debug_info", " .debug_line", " .symtab"] {
            assert!(!sections.contains(stripped), "{stripped}: {sections}");
        }
    }

    // An import that waits for its input.
    let mut import = Command::new(unpacked.join("usr/bin/stencil"))
        .args(["--store", dir.path().join("store").to_str().unwrap(), "import", "-", "web:1"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let pid = import.id().to_string();
    wait_for("the import to create the store", || dir.path().join("store/format").is_file().then_some(()));
    // eu-stack exits with 1 if a frame has no name.
    let frames = |debug: &Path| {
        let path = debug.join("usr/lib/debug").display().to_string();
        let stack =
            Command::new("eu-stack").args(["-s", "-p", &pid, "--debuginfo-path", &path]).output().unwrap();
        String::from_utf8_lossy(&stack.stdout).into_owned()
    };
    let (nameless, named) = (frames(&unpacked), frames(&symbols));
    drop(import.stdin.take());
    import.wait().unwrap();
    assert!(nameless.lines().count() > 5 && !nameless.contains("stencil"), "{nameless}");
    for name in ["stencilfs", "import"] {
        assert!(named.contains(name), "{named}");
    }
    // Test builds may have names alone.
    assert!(cfg!(debug_assertions) || named.contains("src/cli/mod.rs:"), "{named}");
}

#[test]
fn make_install_matches_the_package_and_uninstall_removes_it() {
    let _host = host::shared();
    let dir = temporary("install-");
    let (unpacked, staged) = (dir.path().join("deb"), dir.path().join("staged"));
    run("dpkg-deb", &["-x", package().to_str().unwrap(), unpacked.to_str().unwrap()]);
    let (bin, dest) = (bin(), format!("DESTDIR={}", staged.display()));
    let args =
        |verb: &'static str| [verb, &bin, &dest, "PREFIX=/usr", "SBINDIR=/usr/sbin"].map(str::to_owned);
    // Install as a root user without cargo, and without the crates that the builder has downloaded.
    let environment = ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/nonexistent", "CARGO_HOME=/nonexistent"];
    let call = |args: [String; 5]| {
        let mut all: Vec<&str> = args.iter().map(String::as_str).collect();
        all.extend(environment);
        make(&all)
    };
    let make = |args: [String; 5]| call(args).ok();

    let empty = format!("bin={}", dir.path().display());
    let refused = call(args("install-files").map(|word| if word == bin { empty.clone() } else { word }));
    assert!(refused.exits(2).err.contains("stencil is missing: run make build first"));
    assert!(!staged.exists(), "no partial installation may be left");
    let installed = make(args("install-files"));
    assert!(!installed.out.contains("systemctl link"), "{}", installed.out);
    let modes =
        run("find", &[staged.to_str().unwrap(), "-type", "f", "!", "-perm", "0644", "!", "-perm", "0755"]);
    assert_eq!(modes, "");
    let doc = |name: &str| format!("usr/share/doc/stencil/{name}");
    let mut packed = files_below(&unpacked);
    assert!(packed.remove(&doc("changelog.Debian")) && packed.remove(&doc("changelog")));
    packed.extend(["CHANGELOG.md", "LICENSE-APACHE", "LICENSE-MIT"].map(doc));
    assert_eq!(files_below(&staged), packed);
    for tree in [&unpacked, &staged] {
        let crates = tree.join(doc("crates.gz"));
        let crates = run("gzip", &["-dc", crates.to_str().unwrap()]);
        assert!(crates.contains("\nblake3 v") && crates.contains("\n\n=== blake3-"), "{crates:.500}");
        assert!(crates.contains("Permission is hereby granted") && crates.contains("TERMS AND CONDITIONS"));
    }
    make(args("install-symbols"));
    assert_eq!(files_below(&staged).iter().filter(|file| file.ends_with(".debug")).count(), 2);
    make(args("uninstall"));
    assert_eq!(files_below(&staged), BTreeSet::new());

    let elsewhere = args("install-files").map(|word| word.replace("PREFIX=/usr", "PREFIX=/opt/x"));
    make(elsewhere);
    // Another prefix without a DESTDIR: systemd and the shells do not search there, so make prints further steps.
    let prefix = dir.path().join("own");
    let args = |verb: &str| {
        let place = |name: &str, at: &str| format!("{name}={}", prefix.join(at).display());
        [verb.to_owned(), bin.clone(), "DESTDIR=".into(), place("PREFIX", "x"), place("SBINDIR", "sbin")]
    };
    let unit = prefix.join("x/lib/systemd/system/stencil@.service");
    let printed = make(args("install-files")).out;
    assert!(printed.contains(&format!("systemctl link {}\n", unit.display())) && unit.is_file(), "{printed}");
    make(args("uninstall"));
    assert_eq!(files_below(&prefix), BTreeSet::new());

    let helper = fs::canonicalize(staged.join("usr/sbin/mount.fuse.stencil")).unwrap();
    assert_eq!(helper, fs::canonicalize(staged.join("opt/x/bin/stencil")).unwrap());
    let unit = fs::read_to_string(staged.join("opt/x/lib/systemd/system/stencil@.service")).unwrap();
    assert!(unit.contains("\nExecStart=/opt/x/bin/stencil mount") && !unit.contains("/usr/local"), "{unit}");
    run(helper.to_str().unwrap(), &["--version"]);
}
