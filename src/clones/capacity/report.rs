//! The answer: how many more clones fit.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use super::growth::{Growth, Interval, Sample, Shape};
use super::limits;
use super::present::Present;
use super::recorded::Recorded;
use super::resources::{self, Bounds, Demand, Kind, Resource, TemplatePages};
use crate::clones::accounting::{self, Survey};
use crate::clones::audit;
use crate::clones::baseline::Baseline;
use crate::control::Mount;
use crate::error::{Error, Result};
use crate::store::{Digest, Template};
use crate::sys::memory::page_flags;
use crate::sys::process::ProcessId;
use crate::sys::process::cgroup::{self, GroupMemory};
use crate::units::{Bytes, PageCount, approximate, whole};

/// The request.
#[derive(Debug)]
pub struct Request<'a> {
    /// The mounts in which clones are searched.
    pub mounts: &'a [Mount],
    /// The template.
    pub template: &'a Template,
    /// Memory that must remain free.
    pub reserve: Bytes,
    /// Directory of the cgroup in which further clones run; `None` for that of the present clones.
    pub cgroup: Option<&'a Path>,
    /// Measurements from a recording.
    pub recorded: Vec<Recorded>,
    /// How long a clone lives; `None` for the age of the oldest measured clone.
    pub lifetime: Option<Duration>,
}

/// How many more clones fit.
#[derive(Debug, Clone, Serialize)]
pub struct Capacity {
    /// Digest of the template.
    pub digest: Digest,
    /// How many more clones fit; null if no resource limits their number.
    pub further_clones: Option<Bounds>,
    /// The resource that ends first.
    pub ends_first: Option<Kind>,
    /// How long a clone lives.
    pub lifetime_seconds: f64,
    /// Memory of a clone at the end of its life, without memory of the kernel.
    pub bytes_per_clone: Bounds,
    /// How this memory grows.
    pub growth: Shape,
    /// Number of present clones.
    pub clones: u64,
    /// Number of clones that were measured, with those of the recording.
    pub measured_clones: u64,
    /// Number of measurements.
    pub measurements: u64,
    /// Age of the oldest measured clone.
    pub oldest_seconds: f64,
    /// What the present clones will take besides what they have.
    pub pending_bytes: u64,
    /// The pages of the template.
    pub template: TemplateMemory,
    /// All resources.
    pub resources: Vec<Resource>,
    /// Notes on the answer.
    pub warnings: Vec<String>,
}

/// The pages of a template.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct TemplateMemory {
    /// Pages that are not zero.
    pub data_bytes: Bytes,
    /// Pages in RAM.
    pub resident_bytes: Bytes,
    /// Pages in RAM for which the cgroup pays; null without a cgroup, or if the kernel does not tell.
    pub charged_bytes: Option<Bytes>,
}

/// Ages that differ by less are equal: the clones are measured some time after their ages were read.
const SAME_AGE: f64 = 1.01;

/// Measures the clones and the host.
///
/// # Errors
/// Returns `Code::NotFound` without measurements of a clone and for a directory that is no cgroup, and an error if a
/// process or a figure cannot be read.
pub fn capacity(request: &Request<'_>) -> Result<Capacity> {
    let digest = *request.template.digest();
    let survey = accounting::survey(request.mounts, Some(&digest))?;
    let present = Present::of(&survey)?;
    let samples = samples(&request.recorded, &present);
    let oldest = samples.iter().map(|sample| sample.age_seconds).fold(0.0, f64::max);
    let lifetime = request.lifetime.map_or(oldest, |lifetime| lifetime.as_secs_f64());
    let growth = Growth::of(&samples, lifetime).ok_or_else(|| {
        Error::not_found(format!("no clone of template {digest} was measured"))
            .hint("launch some clones and run the command again, or name a recording: --recording FILE")
    })?;
    let groups = limits::groups(request.cgroup, &present)?;
    let group = limits::tightest(&groups, |group| group.limit);
    let kernel = limits::kernel_memory(group.map(|(group, _)| group), &present)?;
    let demand = |cgroup: Option<&Path>| {
        let clones = present.clones.iter().filter(|clone| cgroup.is_none_or(|path| clone.is_inside(path)));
        demand(&growth, kernel, lifetime, clones.map(|clone| clone.measured.age_seconds))
    };
    let mut warnings = Vec::new();
    if request.cgroup.is_some() && groups.iter().all(|group| group.limit.or(group.high).is_none()) {
        warnings.push("neither the cgroup nor those above have a limit on memory".to_owned());
    }
    if lifetime > oldest * SAME_AGE {
        warnings
            .push("no clone was measured at this age: the interval covers all plausible growth".to_owned());
        if growth.clones > 1 && growth.ages_are_equal {
            warnings.push("all measured clones have about the same age: their growth is unknown".to_owned());
        }
    }
    if growth.clones == 1 {
        warnings.push("one clone was measured: how much clones differ is unknown".to_owned());
    }
    let memory = Memory::of(request, &survey, &groups, &demand)?;
    warnings.extend(
        memory.slowed_after.map(|count| {
            format!("memory.high of the cgroup slows the clones down from about {count} more on")
        }),
    );
    let mut resources = memory.resources;
    resources.extend(limits::commit(request.template, &present)?);
    resources.extend(limits::tasks(request.cgroup, &present)?);
    resources.extend(limits::mappings(&present)?);
    let first = resources::ends_first(&resources);
    Ok(Capacity {
        digest,
        further_clones: first.map(|(_, further)| further),
        ends_first: first.map(|(index, _)| resources[index].resource),
        lifetime_seconds: lifetime,
        bytes_per_clone: Bounds::of(growth.mean),
        growth: growth.curve.shape(),
        clones: present.clones.len() as u64,
        measured_clones: growth.clones as u64,
        measurements: samples.len() as u64,
        oldest_seconds: oldest,
        pending_bytes: whole(demand(None).pending),
        template: memory.template,
        resources,
        warnings,
    })
}

/// The memory of the host and of a cgroup.
struct Memory {
    template: TemplateMemory,
    resources: Vec<Resource>,
    /// Number of further clones from which on the kernel slows them down (`memory.high`).
    slowed_after: Option<u64>,
}

impl Memory {
    fn of<'a>(
        request: &Request<'_>,
        survey: &Survey,
        groups: &[GroupMemory],
        demand: &dyn Fn(Option<&Path>) -> Demand<'a>,
    ) -> Result<Memory> {
        let row = survey.density.templates.iter().find(|row| row.digest == *request.template.digest());
        let resident = row.map_or(Bytes::ZERO, |row| row.resident_bytes);
        let pages = TemplatePages { data: request.template.data_bytes(), resident };
        let mut template =
            TemplateMemory { data_bytes: pages.data, resident_bytes: resident, charged_bytes: None };
        let free =
            |available, charged| resources::free_memory(available, request.reserve, charged, pages.whole());
        let of_host = free(Baseline::now()?.available(), resident);
        let host = resources::memory(Kind::HostMemory, "MemAvailable".to_owned(), of_host, &demand(None));
        let below = |(group, limit): (&GroupMemory, Bytes)| -> Result<_> {
            let told = charged_pages(request, survey, group)?;
            // Without the kernel's word, the cgroup may pay for all of the template that its cached pages have room for.
            let charged = told.unwrap_or(resident.min(group.files));
            let (mut free, name) = (free(group.left_below(limit), charged), group.path.display().to_string());
            free.upper += approximate(limits::charged_ahead().get());
            let demand = demand(Some(&group.path));
            Ok((told, free, resources::memory(Kind::CgroupMemory, name, free, &demand)))
        };
        let limit = limits::tightest(groups, |group| group.limit);
        let high = limits::tightest(groups, |group| group.high).filter(|(group, high)| {
            limit.is_none_or(|(limited, limit)| group.left_below(*high) < limited.left_below(limit))
        });
        let slowed = high.map(below).transpose()?.and_then(|(_, _, memory)| memory.further_clones);
        let slowed_after = slowed.map(|further| further.estimate);
        let Some(limit) = limit else {
            let cache = resources::template_cache(host.limit.clone(), of_host, &pages, &host);
            return Ok(Memory { template, resources: vec![cache, host], slowed_after });
        };
        let (told, of_group, cgroup) = below(limit)?;
        template.charged_bytes = told;
        let cache = resources::template_cache(cgroup.limit.clone(), of_group, &pages, &cgroup);
        Ok(Memory { template, resources: vec![cache, host, cgroup], slowed_after })
    }
}

/// Returns what clones will take, and present clones of these ages.
fn demand(growth: &Growth, kernel: Interval, lifetime: f64, ages: impl Iterator<Item = f64>) -> Demand<'_> {
    let mut demand = Demand { growth, kernel, pending: 0.0, remaining: 0.0 };
    for age in ages {
        demand.pending += (growth.curve.at(lifetime) - growth.curve.at(age)).max(0.0);
        if lifetime > 0.0 {
            demand.remaining += (1.0 - age / lifetime).max(0.0);
        }
    }
    demand
}

/// Joins the measurements of a recording and of the present clones.
fn samples(recorded: &[Recorded], present: &Present) -> Vec<Sample> {
    let mut numbers: HashMap<ProcessId, usize> = HashMap::new();
    let present = present.clones.iter().map(|clone| &clone.measured);
    let numbered = |of: &Recorded| {
        let next = numbers.len();
        let clone = *numbers.entry(of.process).or_insert(next);
        Sample { clone, age_seconds: of.age_seconds, bytes: of.bytes }
    };
    recorded.iter().chain(present).map(numbered).collect()
}

/// Returns the pages of the template for which a cgroup pays: the cgroup of the process that read them first. Returns
/// `None` if the kernel does not tell.
fn charged_pages(request: &Request<'_>, survey: &Survey, group: &GroupMemory) -> Result<Option<Bytes>> {
    let digest = request.template.digest();
    let frames = audit::template_frames(request.mounts, survey, |other| other == digest)?;
    let tree = cgroup::tree(&group.path)?;
    let inodes = tree.iter().map(|path| cgroup::inode(path)).collect::<Result<_>>()?;
    Ok(page_flags::charged(frames, &inodes)?.map(PageCount::bytes))
}
