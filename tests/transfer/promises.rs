//! Compatibility of streams between versions, and untrusted text in streams.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use stencilfs::progress::Silent;
use stencilfs::store::{Digest, FileKind, ImportFile, Source};

use crate::support::store::{Fixture, Ran, read_all, stencil};
use crate::support::stream::{import, load, save};

const BLOCK: usize = 64 << 10;

fn lines(number: usize, length: usize) -> Vec<u8> {
    format!("line {number} of a template that travels\n")
        .into_bytes()
        .into_iter()
        .cycle()
        .take(length)
        .collect()
}

/// The memory images of the two templates in `tests/data/stream-1.stencil`.
fn memories() -> [Vec<u8>; 2] {
    let mut first = vec![0; 1 << 20];
    let mut put = |at: usize, bytes: &[u8]| first[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &lines(0, BLOCK));
    put(2 * BLOCK, &lines(0, BLOCK));
    put(5 * BLOCK + 4096, &lines(1, 4096));
    put(15 * BLOCK, &[0, 1, 2, 3, 4, 5, 6, 7].repeat(BLOCK / 8));
    let mut second = first.clone();
    second[3 * BLOCK..4 * BLOCK].copy_from_slice(&lines(4, BLOCK));
    [first, second]
}

/// The stream was written by version 0.1.0: a template stored with lz4 and every field of a policy, and one stored with
/// zstd and two tags, saved by digest. A later version that fails here has broken its compatibility promise; the file
/// is never regenerated.
#[test]
fn a_stream_of_version_0_1_0_loads_and_saves_the_same_bytes() {
    const DIGESTS: [&str; 2] = [
        "9649b6d0395096a5a233f4e8abf11a2717d014ef4d5528878ecd49b767985606",
        "9544e8cb6867cac160901a91173ecb6c5eaea6a3537ac694597acdef1f7cd318",
    ];
    const CREATED: u64 = 1_795_397_838;
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/stream-1.stencil");
    let bytes = fs::read(&path).unwrap();
    let to = Fixture::new();
    to.run(&["load", "-i", path.to_str().unwrap()]).ok();
    let [first, second] = DIGESTS.map(|digest| digest.parse::<Digest>().unwrap());
    let [one, two] = memories();
    let files = [
        (first, 0, one.clone()),
        (first, 1, lines(3, BLOCK)),
        (first, 2, lines(2, 70_001)),
        (second, 0, two.clone()),
    ];
    for (digest, file, expected) in files {
        assert!(read_all(&to.store(), &digest, file).unwrap() == expected, "file {file} of {digest}");
    }
    let described = to.run(&["inspect", "web:1", "--json"]).ok().json();
    assert_eq!(described["digest"], DIGESTS[0]);
    assert_eq!(
        [&described["mode"], &described["uid"], &described["gid"]],
        [&json!("0440"), &json!(12), &json!(13)]
    );
    assert_eq!(described["labels"], json!({"made": "0.1.0"}));
    assert_eq!(described["recipe"]["argv"][1], "q35,memory-backend=ram");

    // The creation time belongs to the store; everything else must be equal.
    for digest in [first, second] {
        to.store().set_policy(&digest, |policy| policy.created = CREATED).unwrap();
    }
    assert!(save(&to, &["web:1", DIGESTS[1]]) == bytes, "save has written different bytes");

    // The same content has the same digest in every store.
    let own = Fixture::new();
    let mut request = own.request("web:1", &one);
    for (name, kind, bytes) in
        [("rom", FileKind::Rom, lines(3, BLOCK)), ("state", FileKind::Blob, lines(2, 70_001))]
    {
        request.files.push(ImportFile {
            name: name.into(),
            kind,
            source: Source::Path(own.file(name, &bytes)),
        });
    }
    request.compression = "none".parse().unwrap();
    assert_eq!(own.store().import(request, &Silent).unwrap().digest, first);
    assert_eq!(own.import("web:2", &two).digest, second);
}

fn policy_of(fixture: &Fixture, digest: &str) -> PathBuf {
    fixture.path("store/images").join(digest).join("policy")
}

/// Returns the JSON body of a policy.
fn body(path: &Path) -> Value {
    let text = fs::read_to_string(path).unwrap();
    serde_json::from_str(text.split_once('\n').unwrap().1).unwrap()
}

#[test]
fn unknown_policy_fields_are_kept_but_not_loaded_from_streams() {
    let (from, to) = (Fixture::new(), Fixture::new());
    let digest = import(&from, "web:1", 1, "lz4");
    let path = policy_of(&from, &digest);
    let mut policy = body(&path);
    policy["on_start"] = json!({"run": ["/bin/true"]});
    let text = policy.to_string();
    fs::write(&path, format!("stencil policy 1 blake3:{}\n{text}", Digest::of(text.as_bytes()))).unwrap();

    from.run(&["chmod", "0400", "web:1"]).ok();
    from.run(&["chown", "5:6", "web:1"]).ok();
    let now = body(&path);
    assert_eq!((&now["mode"], &now["uid"]), (&json!(0o400), &json!(5)));
    assert_eq!(now["on_start"], policy["on_start"]);

    let refused = load(&to, &save(&from, &["web:1"]));
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(refused.stdout.contains("needs a newer Stencil: unsupported field 'on_start'"), "{refused:?}");
    assert_eq!(to.files("images"), Vec::<PathBuf>::new());
}

#[test]
fn text_from_a_stream_is_sanitized_for_the_terminal() {
    let (from, to) = (Fixture::new(), Fixture::new());
    let digest = import(&from, "web:1", 1, "lz4");
    let evil = "a=\u{1b}[31mred\nmode     0444\r\u{9b}2K\u{202e}x";
    let argv = json!(["-name", evil, "größe"]);
    from.store()
        .set_policy(&digest.parse().unwrap(), |policy| {
            policy.labels = [(format!("k{evil}"), evil.to_owned())].into();
            policy.recipe = Some(json!({"version": 1, "vmm": "qemu", "program": "/bin/false", "vmm_version": evil, "argv": argv}));
        })
        .unwrap();
    load(&to, &save(&from, &["web:1"])).ok();
    let text = to.run(&["inspect", "web:1"]).ok().stdout;
    assert_eq!(text.lines().filter(|line| line.starts_with("mode ")).count(), 1, "{text}");
    assert!(
        text.contains(r"label    ka=\u001b[31mred\nmode     0444\u000d\u009b2K\u202ex=a=\u001b[31m"),
        "{text}"
    );
    let recipe = to.run(&["inspect", "--recipe", "web:1"]).ok().stdout;
    for shown in [&text, &recipe] {
        assert!(!shown.contains(|c: char| c != '\n' && (c.is_control() || c == '\u{202e}')), "{shown:?}");
    }
    assert!(recipe.contains("größe"), "{recipe}");
    assert_eq!(serde_json::from_str::<Value>(&recipe).unwrap()["argv"], argv);
    // Errors that quote an argument.
    let refused = to.run(&["load", "-i", "/no\u{1b}[2K\nstencil: ok"]);
    assert_eq!((refused.code, refused.stderr.lines().count()), (4, 2), "{refused:?}");
    assert!(refused.stderr.contains(r"/no\u001b[2K\nstencil: ok"), "{refused:?}");
}

#[test]
fn unusable_inputs_and_outputs_of_a_stream_are_reported() {
    let (from, to) = (Fixture::new(), Fixture::new());
    from.import("web:1", &lines(1, 1 << 20));
    from.import("web:2", &memories()[0]);
    let stream = from.path("s");
    from.run(&["save", "web:2", "--without", "web:1", "-o", stream.to_str().unwrap()]).ok();
    let based = to.run(&["load", "-i", stream.to_str().unwrap()]);
    assert_eq!(based.code, 4, "{based:?}");
    assert!(based.stderr.contains("was saved without the blocks of template"), "{based:?}");
    assert!(!to.path("store").exists(), "load has created a store");

    for (input, code) in [("/no/such/file", 4), ("/", 2)] {
        let refused = to.run(&["load", "-i", input]);
        assert_eq!(refused.code, code, "{refused:?}");
        assert!(refused.stderr.contains("name a file that 'stencil save -o' has written"), "{refused:?}");
    }
    assert!(!to.path("store").exists());

    let full = from.run(&["save", "web:2", "-o", "/dev/full"]);
    let piped =
        stencil(from.dir.path(), &["save", "web:2"]).stdout(File::create("/dev/full").unwrap()).output();
    for full in [full, piped.unwrap().into()] {
        assert_eq!(full.code, 1, "{full:?}");
        assert!(
            full.stderr.contains("free space") && full.stderr.contains("'stencil load' rejects it"),
            "{full:?}"
        );
        assert!(
            !full.stderr.contains("not changed") && !full.stderr.contains("nothing was changed"),
            "{full:?}"
        );
    }
    let program = env!("CARGO_BIN_EXE_stencil");
    let closed: Ran = Command::new("sh")
        .args(["-c", "\"$0\" --store \"$1\" save web:2 >&-", program])
        .arg(from.path("store"))
        .env("STENCIL_RUNTIME_DIR", from.path("run"))
        .output()
        .unwrap()
        .into();
    assert_eq!(closed.code, 2, "{closed:?}");
    assert!(closed.stderr.contains("standard output is closed"), "{closed:?}");
    // /dev/null is accepted.
    let lost = stencil(from.dir.path(), &["save", "web:2"]).stdout(Stdio::null()).status().unwrap();
    assert!(lost.success());
}
