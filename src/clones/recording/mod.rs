//! Recordings: samples of the memory of clones over time, in a file of limited size.
//!
//! A recording is a text file. Its first line is a header, each further line one sample in JSON. A line is complete with
//! its line feed: an incomplete or unreadable last line was cut by a crash and is not read. Read a recording with [`Recording::open`]
//! and [`Recording::samples`].

mod file;
mod measure;
mod sample;
mod thin;

pub use file::{Recorder, Recording, Samples};
pub use measure::Measuring;
pub use sample::{
    CloneSample, FilePlaces, Header, HostMemory, MAX_BUCKETS, ReasonSample, Sample, TemplateSample, Time,
    TotalsSample, WorkingSetSample,
};
