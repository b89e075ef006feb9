//! The memory of one clone: copied and replaced pages, page tables, and memory outside template mappings.

use std::ops::Range;

use serde::Serialize;

use super::replaced::{self, Replaced};
use crate::clones::find::CloneProcess;
use crate::clones::ranges::subtract;
use crate::clones::zero_memory::ZeroMemory;
use crate::error::{Code, Result};
use crate::sys::memory::pagemap::{Categories, DirtyRange, Pagemap, Query};
use crate::sys::process::cgroup;
use crate::sys::process::procfs::{self, MapLine};
use crate::sys::process::tasks;
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
    /// Ranges of replaced pages, and the private pages of the memory that is mapped there.
    pub replaced: Vec<(Replaced, Vec<DirtyRange>)>,
    /// Addresses of the private memory outside template mappings.
    pub overhead: Vec<Range<u64>>,
    /// Name of the command.
    pub command: String,
    /// Real user id.
    pub uid: u32,
    /// Control group.
    pub cgroup: String,
}

impl Measured {
    /// Returns the private pages in place of template pages: copies, and memory of replaced pages.
    pub fn private(&self) -> impl Iterator<Item = &DirtyRange> {
        self.copied.iter().flatten().chain(self.replaced.iter().flat_map(|(_, private)| private))
    }
}

/// Measures one clone, and adds its zero memory to its mappings. Returns `None` if the clone has exited.
///
/// # Errors
/// Returns an error if the process cannot be inspected.
pub fn measure(clone: &mut CloneProcess, zeros: &ZeroMemory<'_>) -> Result<Option<Measured>> {
    match inspect(clone, zeros) {
        Err(error) if error.code() == Code::NotFound => Ok(None),
        other => other,
    }
}

fn inspect(clone: &mut CloneProcess, zeros: &ZeroMemory<'_>) -> Result<Option<Measured>> {
    let pagemap = Pagemap::open(clone.pid)?;
    // The kernel may have reused the process id. The open pagemap is bound to one address space, so a later reuse does
    // not change what is read.
    if !clone.process().is_alive() {
        return Ok(None);
    }
    let Some(lines) = procfs::maps(clone.pid, |_, _| true)? else { return Ok(None) };
    zeros.add(&mut clone.maps, &lines)?;
    let mut memory = CloneMemory::default();
    let mut copied = Vec::with_capacity(clone.maps.len());
    for map in &clone.maps {
        memory.mapped_bytes += map.length;
        let copies = pagemap.dirty(map.range())?;
        memory.dirty_pages += copies.iter().map(|copy| PageCount::new(copy.pages())).sum();
        memory.add_private(&copies);
        copied.push(copies);
        if map.anonymous {
            continue;
        }
        for region in pagemap.scan(map.range(), &clean())? {
            let bytes = Bytes::new(region.range.end - region.range.start);
            memory.mapped_clean_bytes += bytes;
            if region.categories.contains(Categories::HUGE) {
                memory.pmd_mapped_bytes += bytes;
            }
        }
    }
    let mut replaced = Vec::new();
    for found in replaced::replaced(&clone.maps, &lines, || runs_kvm(clone.pid)) {
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
    let overhead = outside(in_place.collect(), &lines, &pagemap)?;
    memory.overhead_bytes = overhead.iter().map(|range| Bytes::new(range.end - range.start)).sum();
    let Some(status) = procfs::status(clone.pid)? else { return Ok(None) };
    memory.page_table_bytes = status.page_tables;
    let Some(cgroup) = cgroup::path(clone.pid)? else { return Ok(None) };
    Ok(Some(Measured { memory, copied, replaced, overhead, command: status.name, uid: status.uid, cgroup }))
}

impl CloneMemory {
    fn add_private(&mut self, ranges: &[DirtyRange]) {
        for range in ranges {
            let bytes = PageCount::new(range.pages()).bytes();
            *(if range.swapped { &mut self.swap_bytes } else { &mut self.private_bytes }) += bytes;
        }
    }
}

/// Selects unchanged pages of the file.
fn clean() -> Query {
    Query { all: Categories::FILE | Categories::PRESENT, report: Categories::HUGE, ..Query::default() }
}

/// Returns the address ranges of anonymous memory outside of `skip`, in order.
fn outside(mut skip: Vec<Range<u64>>, lines: &[MapLine], pagemap: &Pagemap) -> Result<Vec<Range<u64>>> {
    let anonymous = Query {
        all: Categories::PRESENT,
        none: Categories::FILE | Categories::ZERO | Categories::GUARD,
        ..Query::default()
    };
    let present = pagemap.scan(ADDRESS_SPACE, &anonymous)?.into_iter().map(|region| region.range);
    let present: Vec<_> = present.collect();
    // Data pages of the kernel ([vvar]) look like private memory, but exist only once.
    skip.extend(lines.iter().filter(|line| line.path.starts_with("[v")).map(|line| line.start..line.end));
    skip.sort_unstable_by_key(|range| range.start);
    Ok(subtract(&present, &skip))
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
