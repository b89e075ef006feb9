//! The floors of other rows beside foreign tools that measure the same.

use std::path::Path;
use std::process::Command;

use stencilfs::error::{Error, Result};
use stencilfs::units::approximate;

use super::reads::{random, sweep};
use crate::run::Context;
use crate::run::floor::{Codec, encode};
use crate::run::interrupt;
use crate::run::sampling::{Counters, Measurement, Procedure, Title, drop_caches, touch_cold};
use crate::run::site::json_of;

const ROUNDS: u64 = 3;

pub fn measure(context: &Context, dense: &Path) -> Result<()> {
    if !context.wants(&["floors"]) {
        return Ok(());
    }
    let sequential = ["--rw=read", "--bs=128k", "--fadvise_hint=0"];
    let anywhere = ["--rw=randread", "--bs=4k", "--fadvise_hint=random", "--number_ios=4000", "--randseed=7"];
    let subjects = vec![
        touched(context, dense, "touch-sequential", &sweep("normal")(1)),
        fio(context, dense, "fio-sequential", &sequential),
        touched(context, dense, "touch-random", &random("random", 4000)(1)),
        fio(context, dense, "fio-random", &anywhere),
        compressed(context, dense, "floor-lz4", Codec::Lz4),
        foreign(context, dense, "lz4", &["-b1", "-i1", "-B4"]),
        compressed(context, dense, "floor-zstd", Codec::Zstd),
        foreign(context, dense, "zstd", &["-b3", "-i1", "-B64KB"]),
    ];
    let title = Title {
        name: "floors",
        about: "What this program measures as a floor, beside foreign tools: reads of the raw file on ext4 with cold \
                caches by fio (with blocks of 128 KiB, because memcpy of larger ones descends), and compression of \
                blocks of 64 KiB by one thread.",
        input: "dense",
        caches: "cold for reads, warm for compression",
    };
    context.row_in_rounds(title, subjects, Some(ROUNDS))
}

fn touched<'a>(context: &'a Context, dense: &'a Path, name: &'a str, words: &[String]) -> Procedure<'a> {
    let mut command = Command::new("touch");
    let command = context.site.recorded(command.arg(dense).args(words));
    let words = words.to_vec();
    Procedure {
        name,
        command,
        read_ahead_bytes: None,
        take: Box::new(move |_| {
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            let mut measurement = touch_cold(context.site, dense, &words, None)?;
            // The subjects of this row touch different pages.
            measurement.checksum = None;
            let bytes = measurement.sample.get("touched_bytes").cloned();
            measurement.sample.extend(bytes.map(|bytes| ("bytes".to_owned(), bytes)));
            Ok(measurement)
        }),
    }
}

fn fio<'a>(context: &'a Context, dense: &'a Path, name: &'a str, words: &[&str]) -> Procedure<'a> {
    let mut command = Command::new("fio");
    command.args(["--name=floor", "--readonly", "--ioengine=mmap", "--invalidate=0", "--output-format=json"]);
    command
        .arg(format!("--filename={}", dense.display()))
        .arg(format!("--size={}", context.dense_bytes))
        .args(words);
    Procedure {
        name,
        command: context.site.recorded(&command),
        read_ahead_bytes: None,
        take: Box::new(move |_| {
            drop_caches(context.site, 3 * context.dense_bytes)?;
            let found = json_of(&mut command)?;
            let read = &found["jobs"][0]["read"];
            match (read["runtime"].as_f64(), read["io_bytes"].as_u64()) {
                (Some(milliseconds), Some(bytes)) if milliseconds > 0.0 => {
                    Ok(Measurement::seconds(milliseconds / 1e3).count("bytes", bytes))
                }
                _ => Err(Error::failed(format!("fio printed no times: {read}"))),
            }
        }),
    }
}

fn compressed<'a>(context: &'a Context, dense: &'a Path, name: &'a str, codec: Codec) -> Procedure<'a> {
    Procedure {
        name,
        command: "stencil-bench: compress blocks of 64 KiB, by one thread".to_owned(),
        read_ahead_bytes: None,
        take: Box::new(move |_| {
            encode(dense, codec, 1, false)?;
            let before = Counters::now(context.site)?;
            let stored = encode(dense, codec, 1, false)?;
            let measurement = before.finish(context.site)?;
            Ok(measurement.count("bytes", context.dense_bytes).count("stored_bytes", stored))
        }),
    }
}

/// The benchmark of a compressor, which reads the file before it measures.
fn foreign<'a>(context: &'a Context, dense: &'a Path, name: &'a str, words: &[&str]) -> Procedure<'a> {
    let mut command = Command::new(name);
    command.args(words).arg(dense);
    Procedure {
        name,
        command: context.site.recorded(&command),
        read_ahead_bytes: None,
        take: Box::new(move |_| {
            let output = interrupt::output(&mut command)?;
            let text = [output.stdout, output.stderr].concat();
            let text = String::from_utf8_lossy(&text);
            let speed =
                speed(&text).ok_or_else(|| Error::failed(format!("{name} printed no speed: {text}")))?;
            let seconds = approximate(context.dense_bytes) / 1e6 / speed;
            Ok(Measurement::seconds(seconds).count("bytes", context.dense_bytes))
        }),
    }
}

/// The speed of compression, in 10^6 bytes per second: the first of two in the last report.
fn speed(text: &str) -> Option<f64> {
    let report = text.rsplit(['\r', '\n']).find(|line| line.matches("MB/s").count() == 2)?;
    report.split("MB/s").next()?.split_ascii_whitespace().last()?.trim_start_matches(',').parse().ok()
}

#[cfg(test)]
mod tests {
    use super::speed;

    #[test]
    fn the_last_report_of_a_benchmark_counts() {
        let lz4 = " 1-dense : 1000 ->\r 1#dense : 1000 -> 500 (2.000), 601.5 MB/s \r 1#dense : 1000 -> 500 \
                   (2.000), 607.1 MB/s ,3585.9 MB/s \n";
        assert_eq!(speed(lz4), Some(607.1));
        assert_eq!(speed(" 3#dense :1000 -> 400 (x2.5), 300.25 MB/s, 1000.0 MB/s\n"), Some(300.25));
        assert_eq!(speed("zstd: no such file"), None);
    }
}
