//! The answer to a lookup: which inode number of a file the kernel gets, and for how long.

use std::sync::atomic::Ordering;

use stencilfs::control::ServeMode;
use stencilfs::store::{FileKind, Serving, Template};
use stencilfs::units::Bytes;

use super::{Backings, State, key};
use crate::server::tree::ServingPolicy;
use crate::server::tree::node::NameLifetime;

impl Backings {
    /// Returns true if files with a backing can be opened for direct reads: EROFS does not support them for compressed
    /// files.
    pub fn allow_direct_reads(&self) -> bool {
        self.mode != ServeMode::Kernel
    }

    /// Returns true if the file may have a backing. An empty file needs none. A blob gets none with kernel decode: it
    /// may be a disk, which VMMs read directly (`O_DIRECT`), and the kernel refuses direct reads of files that it
    /// decodes.
    pub(super) fn may_have_backing(&self, template: &Template, file: usize) -> bool {
        let needs_direct_reads = |kind| !self.allow_direct_reads() && kind == FileKind::Blob;
        template.files().get(file).is_some_and(|f| f.size > Bytes::ZERO && !needs_direct_reads(f.kind))
    }
}

impl ServingPolicy for Backings {
    fn serving(&self, template: &Template, file: usize) -> Serving {
        match self.mode {
            _ if !self.may_have_backing(template, file) => return Serving::Decode,
            ServeMode::Decode => return Serving::Decode,
            ServeMode::Passthrough => return Serving::Passthrough,
            ServeMode::Auto | ServeMode::Kernel if !self.possible => return Serving::Decode,
            ServeMode::Auto | ServeMode::Kernel => {}
        }
        let key = key(template, file);
        let mut states = self.states();
        match states.get(&key) {
            None | Some(State::Evicting { .. } | State::Filling { .. })
                if self.crowded.load(Ordering::Relaxed) =>
            {
                Serving::Decode
            }
            None | Some(State::Ready(_) | State::Evicting { .. } | State::Filling { late: false, .. }) => {
                Serving::Passthrough
            }
            Some(state) if state.may_retry() => {
                states.remove(&key);
                Serving::Passthrough
            }
            Some(State::Filling { .. } | State::Decode { .. }) => Serving::Decode,
        }
    }

    fn lifetime(&self, template: &Template, file: usize) -> NameLifetime {
        match self.mode {
            // A later lookup may return the passthrough number.
            ServeMode::Auto | ServeMode::Kernel
                if self.possible
                    && self.may_have_backing(template, file)
                    && self.serving(template, file) == Serving::Decode =>
            {
                NameLifetime::Zero
            }
            _ => NameLifetime::Long,
        }
    }
}
