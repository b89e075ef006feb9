//! Reads a stream: bytes in order, counted and hashed, never more than the front announces.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::store::Digest;
use crate::store::format::stream::{MAGIC, StreamFront};
use crate::store::format::{Invalid, Preamble};
use crate::store::write::stall;
use crate::sys::files::stream;

const BUFFER: usize = 256 << 10;

/// A stream whose front was read and verified.
#[derive(Debug)]
pub struct Incoming {
    pub(super) front: StreamFront,
    pub(super) source: StreamSource,
}

impl Incoming {
    /// Returns a base template of the stream, whose blocks were left out. The loading store must have this template.
    pub fn builds_on(&self) -> Option<&Digest> {
        self.front.without.first()
    }

    /// Reads the front of a stream. Error messages call the stream `name`. A wait for the next byte is limited to
    /// `stall`, unless `stall` is `None` or zero.
    ///
    /// # Errors
    /// Returns a usage error if the file is not a stream, [`Code::Damage`](crate::error::Code) if the stream is
    /// truncated or changed, [`Code::TryAgain`](crate::error::Code) if the stream stalls, or an error if a system call
    /// fails.
    pub fn open(
        file: File,
        name: &Path,
        interrupt: Option<Arc<AtomicBool>>,
        stall: Option<Duration>,
    ) -> Result<Incoming> {
        let mut source = StreamSource::new(file, name, (interrupt, stall));
        let mut bytes = vec![0; MAGIC.len()];
        let have = source.fill(&mut bytes)?;
        if bytes[..have] != MAGIC[..have] {
            let found = bytes[..have].escape_ascii();
            return Err(Error::usage(format!(
                "not a stream from 'stencil save': magic is \"{found}\", expected \"{}\"",
                MAGIC.escape_ascii()
            ))
            .at(name)
            .hint(
                "create a stream with 'stencil save TEMPLATE -o FILE'; import guest memory with 'stencil import'",
            ));
        }
        if have < MAGIC.len() {
            return Err(source.truncated("the header"));
        }
        bytes.resize(Preamble::LEN, 0);
        source.exact(&mut bytes[MAGIC.len()..], "the header")?;
        let invalid = |e: Invalid| in_stream(name, e);
        let length = StreamFront::peek(&bytes).map_err(invalid)? as usize;
        // The buffer grows in steps, so that memory use is bounded by the received bytes, not by the announced length.
        while bytes.len() < length {
            let (have, more) = (bytes.len(), (length - bytes.len()).min(BUFFER));
            bytes.resize(have + more, 0);
            source.exact(&mut bytes[have..], "the header")?;
        }
        let front = StreamFront::decode(&bytes).map_err(invalid)?;
        Ok(Incoming { front, source })
    }
}

/// Source of a stream's bytes.
#[derive(Debug)]
pub(super) struct StreamSource {
    file: File,
    name: PathBuf,
    interrupt: Option<Arc<AtomicBool>>,
    stall: Option<Duration>,
    buffer: Vec<u8>,
    used: usize,
    hasher: blake3::Hasher,
    offset: u64,
    /// Set to true when another part of the load has failed.
    pub stop: Arc<AtomicBool>,
}

impl StreamSource {
    fn new(
        file: File,
        name: &Path,
        (interrupt, stall): (Option<Arc<AtomicBool>>, Option<Duration>),
    ) -> StreamSource {
        StreamSource {
            file,
            name: name.to_owned(),
            interrupt,
            stall,
            buffer: Vec::new(),
            used: 0,
            hasher: blake3::Hasher::new(),
            offset: 0,
            stop: Arc::default(),
        }
    }

    /// Returns the name of the stream in error messages.
    pub fn name(&self) -> &Path {
        &self.name
    }

    /// Returns the error for a damaged stream.
    pub fn damaged(&self, why: impl Into<String>) -> Error {
        damaged(&self.name, why)
    }

    /// Returns the error for a part of the stream that cannot be decoded.
    pub fn invalid(&self, invalid: Invalid, what: &str) -> Error {
        in_stream(&self.name, invalid).context(what)
    }

    fn truncated(&self, what: &str) -> Error {
        self.damaged(format!("truncated at offset {}, within {what}", self.offset))
    }

    /// Returns the number of bytes read.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Fails if the load was interrupted or another part of it has failed.
    pub fn check(&self) -> Result<()> {
        if self.interrupt.as_ref().is_some_and(|i| i.load(Ordering::Relaxed)) {
            return Err(Error::failed("interrupted; nothing was loaded")
                .hint("run the command again with the whole stream"));
        }
        match self.stop.load(Ordering::Relaxed) {
            true => Err(Error::failed("load stopped")),
            false => Ok(()),
        }
    }

    /// Fills `out` from the stream. `what` names the part of the stream in error messages.
    pub fn exact(&mut self, out: &mut [u8], what: &str) -> Result<()> {
        match self.fill(out)? {
            have if have == out.len() => Ok(()),
            _ => Err(self.truncated(what)),
        }
    }

    /// Fills `out` until the end of the stream. Returns the number of bytes read.
    fn fill(&mut self, out: &mut [u8]) -> Result<usize> {
        let mut have = 0;
        while have < out.len() {
            if self.used == self.buffer.len() && !self.refill()? {
                break;
            }
            let now = (self.buffer.len() - self.used).min(out.len() - have);
            out[have..have + now].copy_from_slice(&self.buffer[self.used..self.used + now]);
            self.used += now;
            have += now;
        }
        self.hasher.update(&out[..have]);
        self.offset += have as u64;
        Ok(have)
    }

    /// Reads more bytes into the buffer. Returns false at the end of the stream.
    fn refill(&mut self) -> Result<bool> {
        self.buffer.resize(BUFFER, 0);
        self.used = 0;
        let got = loop {
            self.wait()?;
            match self.file.read(&mut self.buffer) {
                Ok(count) => break Ok(count),
                Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
                Err(e) => break Err(Error::io("cannot read stream", &self.name, e)),
            }
        };
        self.buffer.truncate(*got.as_ref().unwrap_or(&0));
        got.map(|count| count > 0)
    }

    fn wait(&self) -> Result<()> {
        let fail = |e| Error::io("cannot read stream", &self.name, e);
        if stream::wait_readable(&self.file, self.stall, || self.check(), fail)? {
            return Ok(());
        }
        Err(Error::try_again(format!(
            "the stream stalled at offset {}: no bytes for {} s; nothing was loaded",
            self.offset,
            self.stall.unwrap_or_default().as_secs_f64()
        ))
        .at(&self.name)
        .hint(stall::REMEDY))
    }

    /// Verifies the hash at the end of the stream, and that no bytes follow.
    pub fn finish(&mut self) -> Result<()> {
        let got = Digest::from(self.hasher.finalize());
        let mut hash = [0; Digest::LEN];
        self.exact(&mut hash, "the hash")?;
        let expected = Digest::new(hash);
        if got != expected {
            return Err(self.damaged(format!("content has hash {got}, expected {expected}")));
        }
        let end = self.offset;
        match self.fill(&mut [0])? {
            0 => Ok(()),
            _ => Err(self.damaged(format!("unexpected bytes after its end at offset {end}"))),
        }
    }
}

const REMEDY: &str = "save the templates again and load the whole stream; nothing was loaded";

/// Returns the error for a damaged stream.
pub(super) fn damaged(name: &Path, why: impl Into<String>) -> Error {
    in_stream(name, Invalid::damage(why))
}

fn in_stream(name: &Path, invalid: Invalid) -> Error {
    match invalid {
        Invalid::Damage(_) => invalid.in_file("stream", name).hint(REMEDY),
        Invalid::Newer(_) => invalid.in_file("stream", name),
    }
}
