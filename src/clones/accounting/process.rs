//! The memory of one clone: copied and replaced pages, page tables, and memory outside template mappings.

use std::ops::Range;

use serde::Serialize;

use super::frames::{self, Counted, Frames, Shared};
use super::replaced::{self, Replaced};
use crate::clones::find::CloneProcess;
use crate::clones::ranges::{joined, subtract};
use crate::clones::zero_memory::ZeroMemory;
use crate::error::{Code, Error, Result};
use crate::sys::memory::pagemap::{Categories, DirtyRange, Pagemap, Query};
use crate::sys::process::procfs::{self, MapLine};
use crate::sys::process::{cgroup, tasks};
use crate::units::{Bytes, PageCount};

/// User addresses on x86-64 with four-level page tables. With five levels, addresses above need an explicit hint to
/// mmap(2) (Documentation/arch/x86/x86_64/5level-paging.rst), which VMMs do not give.
const ADDRESS_SPACE: Range<u64> = 0..0x7FFF_FFFF_F000;

/// Memory of one clone, in bytes unless the name says pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct CloneMemory {
    /// Size of the template mappings and of the zero memory between them.
    pub mapped_bytes: Bytes,
    /// Template pages that the page tables map unchanged. A mapped page need not have been accessed.
    pub mapped_clean_bytes: Bytes,
    /// Copied template pages, and memory of replaced pages, in RAM.
    pub private_bytes: Bytes,
    /// Copied template pages, and memory of replaced pages, in swap. They take no RAM.
    pub swap_bytes: Bytes,
    /// Copied template pages, in RAM and in swap, and replaced pages.
    pub dirty_pages: PageCount,
    /// Template pages over which the process has mapped other memory.
    pub replaced_pages: PageCount,
    /// Page tables (`VmPTE`).
    pub page_table_bytes: Bytes,
    /// Private memory outside template mappings, in RAM.
    pub overhead_bytes: Bytes,
    /// Disks and jail in a file system without other storage; 0 on storage of the host.
    pub disk_bytes: Bytes,
    /// Part of `mapped_clean_bytes` that 2 MiB entries map.
    pub pmd_mapped_bytes: Bytes,
}

/// The memory of one clone, and its addresses.
#[derive(Debug, Clone)]
pub struct Measured {
    /// Memory figures.
    pub memory: CloneMemory,
    /// Copied pages of each mapping, in the order of the mappings.
    pub copied: Vec<Vec<DirtyRange>>,
    /// Clean pages of each mapping.
    pub clean: Vec<Bytes>,
    /// Ranges of replaced pages, and the private pages of the memory that is mapped there.
    pub replaced: Vec<(Replaced, Vec<DirtyRange>)>,
    /// Addresses of the private memory outside template mappings.
    pub overhead: Vec<Range<u64>>,
    /// Frames of the private pages, as far as another clone may have them too.
    pub(super) frames: Frames,
    /// Name of the command.
    pub command: String,
    /// Real user id.
    pub uid: u32,
    /// Control group.
    pub cgroup: String,
}

/// Measures one clone, and adds its zero memory to its mappings. Returns `None` if the clone has exited. `shared` tells of
/// which pages the frames are read.
///
/// # Errors
/// Returns an error if the process cannot be inspected.
pub(super) fn measure(
    clone: &mut CloneProcess,
    zeros: &ZeroMemory<'_>,
    shared: Shared,
) -> Result<Option<Measured>> {
    match inspect(clone, zeros, shared) {
        Err(error) if error.code() == Code::NotFound => Ok(None),
        other => other,
    }
}

fn inspect(clone: &mut CloneProcess, zeros: &ZeroMemory<'_>, shared: Shared) -> Result<Option<Measured>> {
    let (pagemap, status) = Pagemap::open_with_status(clone.pid)?;
    // The kernel may have reused the process id. The open pagemap is bound to one address space, so a later reuse does
    // not change what is read.
    if !clone.process().is_alive() {
        return Ok(None);
    }
    zeros.add(&mut clone.maps, || all_maps(clone.pid))?;
    let mut memory = CloneMemory::default();
    let mut copied = Vec::with_capacity(clone.maps.len());
    let mut clean = Vec::with_capacity(clone.maps.len());
    for map in &clone.maps {
        memory.mapped_bytes += map.length;
        let pages = pagemap.of_file_mapping(map.range())?;
        memory.dirty_pages += pages.dirty.iter().map(|copy| PageCount::new(copy.pages())).sum();
        memory.add_private(&pages.dirty);
        memory.mapped_clean_bytes += pages.clean;
        memory.pmd_mapped_bytes += pages.clean_huge;
        clean.push(pages.clean);
        copied.push(pages.dirty);
    }
    let mut replaced = Vec::new();
    for found in replaced::replaced(&clone.maps, || all_maps(clone.pid), || runs_kvm(clone.pid))? {
        let pages = Bytes::new(found.range.end - found.range.start).pages();
        memory.dirty_pages += pages;
        memory.replaced_pages += pages;
        // Another template mapping in the gap has its own copies.
        let is_template = clone.maps.iter().any(|map| map.range().contains(&found.range.start));
        let private = if is_template { vec![] } else { pagemap.dirty(found.range.clone())? };
        memory.add_private(&private);
        replaced.push((found, private));
    }
    let in_place = clone.maps.iter().map(|map| map.range());
    let in_place = in_place.chain(replaced.iter().map(|(replaced, _)| replaced.range.clone()));
    let overhead = outside(joined(in_place.collect()), clone, &pagemap)?;
    memory.overhead_bytes = overhead.iter().map(|range| Bytes::new(range.end - range.start)).sum();
    memory.page_table_bytes = status.page_tables;
    let Some(cgroup) = cgroup::path(clone.pid)? else { return Ok(None) };
    let private = match shared {
        Shared::Nothing | Shared::Outside => Counted::exclusive(memory.private_bytes),
        Shared::ByFork | Shared::ByKsm => {
            let ranges = private_of(&copied, &replaced).filter(|range| !range.swapped);
            frames::count(&pagemap, &ranges.map(|range| range.range.clone()).collect::<Vec<_>>(), shared)?
        }
    };
    let outside = match shared {
        Shared::Nothing => Counted::exclusive(memory.overhead_bytes),
        _ => frames::count(&pagemap, &overhead, shared)?,
    };
    let frames = Frames { private, overhead: outside };
    let (command, uid) = (status.name, status.uid);
    Ok(Some(Measured { memory, copied, clean, replaced, overhead, frames, command, uid, cgroup }))
}

/// Returns the private pages in place of template pages: copies, and memory of replaced pages.
fn private_of<'a>(
    copied: &'a [Vec<DirtyRange>],
    replaced: &'a [(Replaced, Vec<DirtyRange>)],
) -> impl Iterator<Item = &'a DirtyRange> {
    copied.iter().flatten().chain(replaced.iter().flat_map(|(_, private)| private))
}

impl CloneMemory {
    fn add_private(&mut self, ranges: &[DirtyRange]) {
        for range in ranges {
            let bytes = PageCount::new(range.pages()).bytes();
            *(if range.swapped { &mut self.swap_bytes } else { &mut self.private_bytes }) += bytes;
        }
    }
}

/// Returns the address ranges of anonymous memory outside of `skip`, in order. The pages in `skip` are not scanned.
fn outside(skip: Vec<Range<u64>>, clone: &CloneProcess, pagemap: &Pagemap) -> Result<Vec<Range<u64>>> {
    let anonymous = Query {
        all: Categories::PRESENT,
        none: Categories::FILE | Categories::ZERO | Categories::GUARD,
        ..Query::default()
    };
    let mut present = Vec::new();
    for part in subtract(&[ADDRESS_SPACE], &skip) {
        present.extend(pagemap.scan(part, &anonymous)?.into_iter().map(|region| region.range));
    }
    // Data pages of the kernel ([vvar]) look like private memory, but exist only once.
    Ok(subtract(&present, &clone.kernel_pages))
}

fn all_maps(pid: u32) -> Result<Vec<MapLine>> {
    let lines = procfs::maps(pid, |_, _| true)?;
    lines.ok_or_else(|| Error::not_found(format!("process {pid} has exited")))
}

/// Returns true if the process has a KVM virtual machine. The kernel reports the second-level page tables of all VMs
/// together, as `SecPageTables`.
pub fn runs_kvm(pid: u32) -> bool {
    let tables = tasks::file_tables(pid).unwrap_or_default();
    let entries = tables.iter().flat_map(|thread| std::fs::read_dir(thread.join("fd")));
    entries
        .flatten()
        .flatten()
        .filter_map(|entry| std::fs::read_link(entry.path()).ok())
        .any(|target| target.as_os_str() == "anon_inode:kvm-vm")
}
