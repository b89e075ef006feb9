//! Reading a stream: bytes in order, counted, hashed, and never more than were announced.

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
use crate::store::silence;
use crate::sys::stream;

const BUFFER: usize = 256 << 10;

/// A stream whose front was read and is sound.
#[derive(Debug)]
pub struct Incoming {
    pub(super) front: StreamFront,
    pub(super) source: StreamSource,
}

impl Incoming {
    /// A template whose blocks were left out: its reader must have it.
    pub fn builds_on(&self) -> Option<&Digest> {
        self.front.without.first()
    }

    /// Reads the front of a stream. `name` is what errors call it. From now on no wait for its next byte is longer than
    /// `stall`, where that is given and not zero.
    ///
    /// # Errors
    /// A usage error when it is none, [`Code::Damage`](crate::error::Code) when it is cut short or changed,
    /// [`Code::TryAgain`](crate::error::Code) when it falls silent, or what the system says.
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
                "this is no stream of stencil save: it begins with \"{found}\", not \"{}\"",
                MAGIC.escape_ascii()
            ))
            .at(name)
            .remedy(
                "write one with: stencil save T -o FILE; guest memory is made a template by stencil import",
            ));
        }
        if have < MAGIC.len() {
            return Err(source.cut("its header"));
        }
        bytes.resize(Preamble::LEN, 0);
        source.exact(&mut bytes[MAGIC.len()..], "its header")?;
        let invalid = |e: Invalid| in_stream(name, e);
        let length = StreamFront::peek(&bytes).map_err(invalid)? as usize;
        // By steps: memory is taken for what has come, not for what was announced.
        while bytes.len() < length {
            let (have, more) = (bytes.len(), (length - bytes.len()).min(BUFFER));
            bytes.resize(have + more, 0);
            source.exact(&mut bytes[have..], "its header")?;
        }
        let front = StreamFront::decode(&bytes).map_err(invalid)?;
        Ok(Incoming { front, source })
    }
}

/// The bytes of a stream.
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
    /// Becomes true when another part of the work has failed.
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

    /// What errors call it.
    pub fn name(&self) -> &Path {
        &self.name
    }

    /// The error for a stream that is not what was written.
    pub fn damaged(&self, why: impl Into<String>) -> Error {
        damaged(&self.name, why)
    }

    /// The error for a part of the stream that is no valid structure.
    pub fn invalid(&self, invalid: Invalid, what: &str) -> Error {
        in_stream(&self.name, invalid).context(what)
    }

    fn cut(&self, what: &str) -> Error {
        self.damaged(format!("it ends after {} bytes, in {what}", self.offset))
    }

    /// How many bytes have been read.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Fails when the work is to stop.
    pub fn check(&self) -> Result<()> {
        if self.interrupt.as_ref().is_some_and(|i| i.load(Ordering::Relaxed)) {
            return Err(
                Error::failed("interrupted: nothing was loaded").remedy("run it again for the whole stream")
            );
        }
        match self.stop.load(Ordering::Relaxed) {
            true => Err(Error::failed("stopped")),
            false => Ok(()),
        }
    }

    /// Fills `out` from the stream; `what` is the word for what is being read.
    pub fn exact(&mut self, out: &mut [u8], what: &str) -> Result<()> {
        match self.fill(out)? {
            have if have == out.len() => Ok(()),
            _ => Err(self.cut(what)),
        }
    }

    /// Fills `out` as far as the stream reaches.
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

    /// False at the end.
    fn refill(&mut self) -> Result<bool> {
        self.buffer.resize(BUFFER, 0);
        self.used = 0;
        let got = loop {
            self.wait()?;
            match self.file.read(&mut self.buffer) {
                Ok(count) => break Ok(count),
                Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
                Err(e) => break Err(Error::io("cannot read the stream", &self.name, e)),
            }
        };
        self.buffer.truncate(*got.as_ref().unwrap_or(&0));
        got.map(|count| count > 0)
    }

    fn wait(&self) -> Result<()> {
        let fail = |e| Error::io("cannot read the stream", &self.name, e);
        if stream::wait_readable(&self.file, self.stall, || self.check(), fail)? {
            return Ok(());
        }
        Err(Error::try_again(format!(
            "the stream stands still: nothing came for {} s after {} bytes, and nothing was loaded",
            self.stall.unwrap_or_default().as_secs_f64(),
            self.offset
        ))
        .at(&self.name)
        .remedy(silence::REMEDY))
    }

    /// Compares the hash at the end, and that nothing follows.
    pub fn finish(&mut self) -> Result<()> {
        let got = Digest::from(self.hasher.finalize());
        let mut hash = [0; Digest::LEN];
        self.exact(&mut hash, "its hash")?;
        let expected = Digest::new(hash);
        if got != expected {
            return Err(self.damaged(format!("its content has hash {got}, expected {expected}")));
        }
        let end = self.offset;
        match self.fill(&mut [0])? {
            0 => Ok(()),
            _ => Err(self.damaged(format!("more follows its end at byte {end}"))),
        }
    }
}

const REMEDY: &str = "nothing was loaded; save it again, and load the whole stream";

/// The error for a stream that is not what was written.
pub(super) fn damaged(name: &Path, why: impl Into<String>) -> Error {
    in_stream(name, Invalid::damage(why))
}

fn in_stream(name: &Path, invalid: Invalid) -> Error {
    match invalid {
        Invalid::Damage(_) => invalid.in_file("stream", name).remedy(REMEDY),
        Invalid::Newer(_) => invalid.in_file("stream", name),
    }
}
