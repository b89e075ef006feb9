//! The Debian package in a clean Debian 12, and `make install` beside it.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use crate::support::debian::{Debian, bin, make, package};
use crate::support::host;
use crate::support::mount::{Run, run, temporary, wait_for};
use crate::support::store::random;

const MEMORY: usize = 8 << 20;
const MNT: &str = "/srv/templates";
/// The template's bytes are what was imported.
const SAME: &str = "cmp /root/guest.ram /srv/templates/templates/web/1/memory";

/// The package installed in a clean root that holds a guest's memory in `/root/guest.ram`.
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
fn a_clean_debian_12_can_use_it_and_keeps_nothing_of_it() {
    let _host = host::shared();
    let debian = Debian::new();
    fs::write(debian.path("/root/guest.ram"), "").unwrap();
    fs::create_dir_all(debian.path("/etc/systemd/system/multi-user.target.wants")).unwrap();
    fs::create_dir_all(debian.path(MNT)).unwrap();
    fs::write(debian.path("/tmp/stencil.deb"), "").unwrap();
    let before = debian.files();
    let said = installed(&debian).ok();
    assert!(!said.err.contains("warning"), "{}", said.err);
    assert_eq!(debian.out("dpkg --audit; dpkg --verify stencil"), "");

    what_is_linked_is_declared(&debian);
    let doctor = debian.json("doctor");
    let checks = doctor["checks"].as_array().unwrap();
    assert!(checks.len() > 10 && checks.iter().all(|c| c["verdict"] != "missing"), "{doctor:#}");
    // No QEMU here, and none is needed for the rest.
    for name in ["qemu", "qemu-img"] {
        let check = checks.iter().find(|c| c["name"] == name).unwrap_or_else(|| panic!("{doctor:#}"));
        assert!(check["verdict"] == "note" && check["remedy"].is_string(), "{check:#}");
    }
    debian.out("stencil import /root/guest.ram web:1");
    assert!(debian.out("stencil ls").contains("web"));
    debian.out("stencil verify && stencil export web:1/memory /tmp/out && cmp /tmp/out /root/guest.ram && rm /tmp/out");

    // As the example of the package has it.
    debian.out("cp /etc/fstab /tmp/fstab && cat /usr/share/doc/stencil/examples/fstab >>/etc/fstab");
    debian.out("mount -a");
    debian.out(SAME);
    debian.out("mount -a");
    let places = debian.out("findmnt -n -o SOURCE,TARGET,FSTYPE -t fuse.stencil");
    assert_eq!(places.split_whitespace().collect::<Vec<_>>(), ["/var/lib/stencil", MNT, "fuse.stencil"]);
    debian.out("umount /srv/templates");
    wait_unmounted(&debian);
    debian.out("mv /tmp/fstab /etc/fstab");

    // A guest's life is worth more than a removal.
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
    assert!(debian.sh("umount /srv/templates").code != 0, "clones map it");

    // Mounts go on with the programs that they have, and can be moved to the new ones.
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
    // Out of the tree, and still somebody's memory.
    debian.out("stencil umount -l /srv/templates");
    let refused = debian.sh("dpkg --remove stencil").exits(1);
    assert!(refused.err.contains("  served:  /srv/templates serves /var/lib/stencil"), "{}", refused.err);
    a_status_that_cannot_tell_keeps_the_package(&debian);
    debian.out("stencil stop --all");
    wait_unmounted(&debian);

    // What people have made outlives a removal, and a purge too as long as it holds a template.
    let unit = debian.path("/etc/systemd/system/multi-user.target.wants/stencil@srv-templates.service");
    symlink("/lib/systemd/system/stencil@.service", &unit).unwrap();
    debian.out("dpkg --remove stencil");
    assert!(debian.path("/var/lib/stencil/format").is_file() && !debian.path("/run/stencil").exists());
    let kept = debian.sh("dpkg --purge stencil").ok();
    assert!(kept.err.contains("/var/lib/stencil is kept because it holds templates"), "{}", kept.err);
    assert!(fs::symlink_metadata(&unit).is_err(), "a service without its unit");
    debian.out("dpkg -i /tmp/stencil.deb && stencil verify && stencil rm web:1");
    // A program that is gone is no reason to keep the rest.
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

/// Installs a package of a later version, whose daemon is another file with other bytes.
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

/// With a mount that is served out of the tree.
fn a_status_that_cannot_tell_keeps_the_package(debian: &Debian) {
    let records = "/run/stencil/mounts";
    let refused = |change: &str, back: &str, words: &str| {
        debian.out(change);
        let refused = debian.sh("dpkg --remove stencil").exits(1);
        debian.out(back);
        assert!(refused.err.contains(words), "{}", refused.err);
    };
    let away = format!("mv {records} /run/records && touch {records}");
    let back = format!("rm {records} && mv /run/records {records}");
    refused(&away, &back, "cannot determine whether a template store is mounted");
    refused(&away, &back, "cannot use the runtime directory");
    let away = format!("cd {records}/* && mv mount.json kept && echo '{{' >mount.json");
    let back = format!("cd {records}/* && mv kept mount.json");
    refused(&away, &back, "  served:  cannot read the record of a mount");
    // A user who may not read the records learns nothing of them, and is told so.
    let user = debian.sh("setpriv --reuid=123 --regid=123 --clear-groups stencil status").exits(1);
    assert!(user.err.contains("Permission denied") && user.err.contains("run it as root"), "{}", user.err);
    assert!(debian.out("stencil status").contains("/srv/templates serves /var/lib/stencil"));
    let elsewhere = debian.sh("STENCIL_RUNTIME_DIR=/tmp/none dpkg --remove stencil").exits(1);
    assert!(elsewhere.err.contains("  served:  /srv/templates"), "{}", elsewhere.err);
}

/// What the programs are linked with is there, and each library's package is among the declared ones.
fn what_is_linked_is_declared(debian: &Debian) {
    let depends = debian.out("dpkg-query -W -f '${Depends}' stencil");
    let declared: BTreeSet<&str> = depends.split(", ").map(|word| word.split(' ').next().unwrap()).collect();
    let linked = debian.out("ldd /usr/bin/stencil /usr/bin/stencil-mountd");
    assert!(!linked.contains("not found"), "{linked}");
    let libraries: BTreeSet<&str> =
        linked.split_whitespace().filter(|word| word.starts_with('/') && !word.ends_with(':')).collect();
    assert!(libraries.len() >= 2, "{linked}");
    for library in libraries {
        // dpkg knows it by the one or the other name of a folder of a merged root.
        let name = Path::new(library).file_name().unwrap().to_str().unwrap();
        let owner = debian.out(&format!("dpkg -S '*/{name}'"));
        let owner = owner.split(':').next().unwrap();
        assert!(declared.contains(owner), "{library} is of {owner}, declared is {depends}");
    }
}

#[test]
fn mount_runs_the_helper_and_gives_its_words_and_codes_on() {
    let _host = host::shared();
    let debian = Debian::new();
    installed(&debian).ok();
    debian.out("stencil import /root/guest.ram web:1");
    let call = |options: &str| debian.sh(&format!("mount -t fuse.stencil {options} /var/lib/stencil {MNT}"));
    let mounted = || !debian.sh("findmnt -n -t fuse.stencil").out.is_empty();

    for (options, code, words) in [
        ("-o frobnicate", 1, "unknown mount option 'frobnicate'"),
        ("-o serve=fast", 1, "invalid serve mode 'fast'"),
        ("-f -o frobnicate", 1, "unknown mount option 'frobnicate'"),
    ] {
        let refused = call(options).exits(code);
        assert!(refused.err.contains(&format!("mount.fuse.stencil: {words}")), "{options}: {}", refused.err);
        assert!(!mounted(), "{options}");
    }
    let missing = debian.sh(&format!("mount -t fuse.stencil /var/lib/none {MNT}")).exits(32);
    assert!(missing.err.contains("no template store"), "{}", missing.err);
    call("-f").ok();
    assert!(!mounted(), "-f mounts nothing");

    let loud = call("-v -n -s -o ro,frobnicate,serve=decode,user_xattr,x-initrd.mount,comment=a").ok();
    assert!(loud.out.contains("/var/lib/stencil is mounted on /srv/templates"), "{}", loud.out);
    assert!(loud.err.contains("frobnicate"), "what is left aside is said: {}", loud.err);
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
fn the_ten_lines_of_the_readme_run_as_they_stand() {
    let _host = host::shared();
    let debian = Debian::new();
    installed(&debian).ok();
    fs::write(debian.path("/root/guest.state"), random(4, 1 << 16)).unwrap();
    let readme = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    let lines = readme.split("## Ten lines\n\n```sh\n").nth(1).unwrap().split("```").next().unwrap();
    assert!(lines.lines().count() >= 6, "{lines}");
    let done = debian.sh(&format!("cd /root && set -ex\n{lines}")).ok();
    assert!(done.out.contains("100 clones take") && done.out.contains("100 stopped"), "{}", done.out);
    wait_unmounted(&debian);
}

#[test]
fn what_another_installation_has_stays_its_own() {
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
    // One that was made before this was looked at.
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
fn pages_and_completions_are_there_and_are_understood() {
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
    let made = files_below(&debian.path("/usr/share/man"));
    let expected = commands.iter().map(|command| format!("man1/stencil-{command}.1"));
    let others = [
        "man1/stencil.1",
        "man1/stencil-recipe-edit.1",
        "man8/mount.fuse.stencil.8",
        "man8/stencil-mountd.8",
    ];
    let expected: BTreeSet<String> = expected.chain(others.map(Into::into)).collect();
    let pages: BTreeSet<String> = made.into_iter().filter(|page| page.contains("stencil")).collect();
    assert_eq!(pages, expected);
    for page in pages {
        let path = debian.path(&format!("/usr/share/man/{page}.gz"));
        let read = Command::new("sh")
            .args(["-c", "gzip -dc \"$0\" | groff -k -man -Tutf8 -P-cbou -ww"])
            .arg(&path)
            .output()
            .unwrap();
        let (text, faults) = (String::from_utf8_lossy(&read.stdout), String::from_utf8_lossy(&read.stderr));
        assert!(text.contains("SYNOPSIS"), "{page}: {text}{faults}");
        assert_eq!(faults, "", "{page}");
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        let expected: &[&str] = match page.as_str() {
            "man1/stencil.1" => {
                &["EXIT STATUS", "ENVIRONMENT", "FILES", "SEE ALSO", "75     the same call may succeed later"]
            }
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
    let asked = run("fish", &["--no-config", "-c", &format!("{fish}\ncomplete --do-complete 'stencil mou'")]);
    assert!(asked.starts_with("mount\t"), "{asked}");

    // Every file of the package is named by it, and no other came.
    let named: BTreeSet<String> =
        debian.out("dpkg -L stencil").lines().map(|path| path.trim_start_matches('/').to_owned()).collect();
    let came: Vec<String> = debian
        .files()
        .into_keys()
        .filter(|path| !before.contains_key(path) && !path.starts_with("var/lib/dpkg/info/stencil."))
        .filter(|path| !["root/guest.ram", "srv/templates", "tmp/stencil.deb"].contains(&path.as_str()))
        .collect();
    assert!(came.len() > 40 && came.iter().all(|path| named.contains(path)), "{came:?}");
}

/// Paths below a folder that are no folders, without `.gz`.
fn files_below(dir: &Path) -> BTreeSet<String> {
    run("find", &[dir.to_str().unwrap(), "!", "-type", "d", "-printf", "%P\\n"])
        .lines()
        .map(|path| path.trim_end_matches(".gz").to_owned())
        .collect()
}

#[test]
fn make_install_brings_what_the_package_has_and_takes_it_away_again() {
    let _host = host::shared();
    let dir = temporary("install-");
    let (unpacked, staged) = (dir.path().join("deb"), dir.path().join("staged"));
    run("dpkg-deb", &["-x", package().to_str().unwrap(), unpacked.to_str().unwrap()]);
    let (bin, dest) = (bin(), format!("DESTDIR={}", staged.display()));
    let words =
        |verb: &'static str| [verb, &bin, &dest, "PREFIX=/usr", "SBINDIR=/usr/sbin"].map(str::to_owned);
    // As a root without cargo and without what the builder has downloaded.
    let nothing = ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/nonexistent", "CARGO_HOME=/nonexistent"];
    let call = |words: [String; 5]| {
        let mut all: Vec<&str> = words.iter().map(String::as_str).collect();
        all.extend(nothing);
        make(&all)
    };
    let make = |words: [String; 5]| call(words).ok();

    let empty = format!("bin={}", dir.path().display());
    let refused = call(words("install-files").map(|word| if word == bin { empty.clone() } else { word }));
    assert!(refused.exits(2).err.contains("stencil is missing: run make build first"));
    assert!(!staged.exists(), "nothing is half-made");
    let installed = make(words("install-files"));
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
    make(words("uninstall"));
    assert_eq!(files_below(&staged), BTreeSet::new());

    let elsewhere = words("install-files").map(|word| word.replace("PREFIX=/usr", "PREFIX=/opt/x"));
    make(elsewhere);
    // A folder of its own, and no DESTDIR: systemd and the shells have to be told.
    let own = dir.path().join("own");
    let words = |verb: &str| {
        let place = |name: &str, at: &str| format!("{name}={}", own.join(at).display());
        [verb.to_owned(), bin.clone(), "DESTDIR=".into(), place("PREFIX", "x"), place("SBINDIR", "sbin")]
    };
    let unit = own.join("x/lib/systemd/system/stencil@.service");
    let said = make(words("install-files")).out;
    assert!(said.contains(&format!("systemctl link {}\n", unit.display())) && unit.is_file(), "{said}");
    make(words("uninstall"));
    assert_eq!(files_below(&own), BTreeSet::new());

    let helper = fs::canonicalize(staged.join("usr/sbin/mount.fuse.stencil")).unwrap();
    assert_eq!(helper, fs::canonicalize(staged.join("opt/x/bin/stencil")).unwrap());
    let unit = fs::read_to_string(staged.join("opt/x/lib/systemd/system/stencil@.service")).unwrap();
    assert!(unit.contains("\nExecStart=/opt/x/bin/stencil mount") && !unit.contains("/usr/local"), "{unit}");
    run(helper.to_str().unwrap(), &["--version"]);
}
