//! How many more clones each resource of a host or cgroup allows, and which resource ends first.

use serde::Serialize;

use super::growth::{Growth, Interval};
use crate::units::{Bytes, approximate, whole};

/// A number of bytes, clones or tasks between two bounds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Bounds {
    /// Lower bound.
    pub lower: u64,
    /// Most likely value.
    pub estimate: u64,
    /// Upper bound.
    pub upper: u64,
}

impl Bounds {
    /// Returns bounds that are all this number.
    pub fn exact(number: u64) -> Bounds {
        Bounds { lower: number, estimate: number, upper: number }
    }

    /// Returns the interval without fractions; negative numbers become 0.
    pub fn of(interval: Interval) -> Bounds {
        Bounds {
            lower: whole(interval.lower),
            estimate: whole(interval.estimate),
            upper: whole(interval.upper),
        }
    }

    fn interval(self) -> Interval {
        Interval {
            lower: approximate(self.lower),
            estimate: approximate(self.estimate),
            upper: approximate(self.upper),
        }
    }
}

/// A kind of resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Memory of the host.
    HostMemory,
    /// Memory below the limit of a cgroup.
    CgroupMemory,
    /// Memory for the pages of the template that are not in RAM yet.
    TemplateCache,
    /// Memory that processes may reserve.
    Commit,
    /// Process ids, and limits on processes and threads.
    Tasks,
    /// Mappings of one process.
    Mappings,
}

impl Kind {
    /// Returns the resource in words.
    pub fn name(self) -> &'static str {
        match self {
            Kind::HostMemory => "memory of the host",
            Kind::CgroupMemory => "memory of the cgroup",
            Kind::TemplateCache => "memory for the template",
            Kind::Commit => "reservable memory",
            Kind::Tasks => "tasks",
            Kind::Mappings => "mappings of a clone",
        }
    }
}

/// How much of a resource is free, and how much of it a clone takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(untagged)]
#[expect(missing_docs, reason = "documented in the JSON reference")]
pub enum Amount {
    Bytes { free_bytes: Bounds, bytes_per_clone: Bounds },
    Missing { free_bytes: Bounds, missing_bytes: u64 },
    Tasks { free_tasks: u64, tasks_per_clone: Bounds },
    Mappings { mappings_limit: u64, mappings_per_clone: Bounds },
}

/// A resource, and how many more clones it allows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Resource {
    /// Which resource.
    pub resource: Kind,
    /// What sets its limit: a figure of the kernel, or the directory of a cgroup.
    pub limit: String,
    /// Free and needed amounts.
    #[serde(flatten)]
    pub amount: Amount,
    /// How many more clones fit; `None` if this resource does not limit their number.
    pub further_clones: Option<Bounds>,
}

/// The pages of a template, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TemplatePages {
    /// Pages with data.
    pub data: Bytes,
    /// Pages in RAM.
    pub resident: Bytes,
}

impl TemplatePages {
    /// Returns the size of all pages that the page cache can hold. Pages without data are cached too once they are read.
    pub fn whole(&self) -> Bytes {
        self.data.max(self.resident)
    }

    /// Returns the size of the pages with data that are not in RAM.
    pub fn missing(&self) -> Bytes {
        self.data.saturating_sub(self.resident)
    }
}

/// The memory that clones will take.
#[derive(Debug, Clone, Copy)]
pub struct Demand<'a> {
    /// Memory of one further clone, as its process shows it.
    pub growth: &'a Growth,
    /// Memory of the kernel for one clone, besides page tables.
    pub kernel: Interval,
    /// What the present clones will take besides what they have.
    pub pending: f64,
    /// The lifetimes that the present clones have left, in units of a lifetime.
    pub remaining: f64,
}

/// Returns free memory with the pages of a template in mind.
///
/// The upper bound counts every page of the template as free: the kernel reclaims them if it must. The estimate leaves
/// the pages that are charged now. The lower bound leaves room for the whole template, so that no clone ever waits for a
/// page that was reclaimed.
pub fn free_memory(available: Bytes, reserve: Bytes, charged: Bytes, whole_template: Bytes) -> Interval {
    let left =
        |pages: Bytes| approximate(available.get()) - approximate(reserve.get()) - approximate(pages.get());
    Interval { lower: left(whole_template.max(charged)), estimate: left(charged), upper: left(Bytes::ZERO) }
}

/// Returns how many more clones free memory allows.
pub fn memory(resource: Kind, limit: String, free: Interval, demand: &Demand<'_>) -> Resource {
    let Interval { lower, estimate, upper } = demand.growth.mean;
    let one = estimate + demand.kernel.estimate;
    // The memory that a bound adds to the estimate is taken during the life of a clone.
    let pending = |mean: f64| (demand.pending + demand.remaining * (mean - estimate)).max(0.0);
    let count = ((free.estimate - pending(estimate)) / one).floor().max(0.0);
    let mean = demand.growth.of_further(count);
    let per_clone = Interval::new(mean.lower + demand.kernel.lower, one, mean.upper + demand.kernel.upper);
    let further = Interval::new(
        (free.lower - pending(upper)) / per_clone.upper,
        count,
        (free.upper - pending(lower)) / per_clone.lower,
    );
    Resource {
        resource,
        limit,
        amount: Amount::Bytes { free_bytes: Bounds::of(free), bytes_per_clone: Bounds::of(per_clone) },
        further_clones: Some(Bounds::of(further)),
    }
}

/// Returns whether free memory holds the pages of the template that are not in RAM yet. If it does not, the kernel reclaims
/// pages of the template while clones read others, and perhaps no further clone is of use. `memory` is what the same
/// memory allows otherwise.
pub fn template_cache(limit: String, free: Interval, pages: &TemplatePages, memory: &Resource) -> Resource {
    let missing = pages.missing().get();
    let lacks = approximate(missing) > free.estimate.max(0.0);
    Resource {
        resource: Kind::TemplateCache,
        limit,
        amount: Amount::Missing { free_bytes: Bounds::of(free), missing_bytes: missing },
        further_clones: memory.further_clones.filter(|_| lacks).map(|memory| Bounds { lower: 0, ..memory }),
    }
}

/// Returns how many more clones the reservable memory allows.
pub fn commit(free: Interval, per_clone: Bounds) -> Resource {
    Resource {
        resource: Kind::Commit,
        limit: "CommitLimit".to_owned(),
        amount: Amount::Bytes { free_bytes: Bounds::of(free), bytes_per_clone: per_clone },
        further_clones: divide(free, per_clone),
    }
}

/// Returns how many more clones a limit on tasks allows.
pub fn tasks(limit: String, free: u64, per_clone: Bounds) -> Resource {
    Resource {
        resource: Kind::Tasks,
        limit,
        amount: Amount::Tasks { free_tasks: free, tasks_per_clone: per_clone },
        further_clones: divide(Bounds::exact(free).interval(), per_clone),
    }
}

/// Returns whether a clone can have as many mappings as the present ones.
pub fn mappings(limit: u64, per_clone: Bounds) -> Resource {
    // The limit is for each process, so it does not limit the number of clones.
    Resource {
        resource: Kind::Mappings,
        limit: "vm.max_map_count".to_owned(),
        amount: Amount::Mappings { mappings_limit: limit, mappings_per_clone: per_clone },
        further_clones: (per_clone.estimate >= limit).then(Bounds::default),
    }
}

/// Divides what is free by what a clone takes. Returns `None` if a clone takes nothing.
fn divide(free: Interval, per_clone: Bounds) -> Option<Bounds> {
    let Interval { lower, estimate, upper } = per_clone.interval();
    (lower > 0.0)
        .then(|| Bounds::of(Interval::new(free.lower / upper, free.estimate / estimate, free.upper / lower)))
}

/// Returns how many more clones fit with all resources, and the index of the resource that ends first: of two with the
/// same estimate, the first in the list. Returns `None` if no resource limits their number.
pub fn ends_first(resources: &[Resource]) -> Option<(usize, Bounds)> {
    let limits = || resources.iter().enumerate().filter_map(|(index, r)| Some((index, r.further_clones?)));
    let (first, further) = limits().min_by_key(|(_, further)| further.estimate)?;
    let least = |bound: fn(&Bounds) -> u64| limits().map(|(_, further)| bound(&further)).min().unwrap_or(0);
    Some((first, Bounds { lower: least(|b| b.lower), estimate: further.estimate, upper: least(|b| b.upper) }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clones::capacity::growth::Sample;

    const MIB: f64 = 1_048_576.0;

    #[test]
    fn present_clones_may_grow_as_much_as_the_bounds_say() {
        // No growth is measured at equal ages, and growth at four times this age is possible.
        let samples: Vec<Sample> =
            (0..20).map(|clone| Sample { clone, age_seconds: 10.0, bytes: 2.0 * MIB }).collect();
        let growth = Growth::of(&samples, 40.0).unwrap();
        let kernel = Interval::default();
        let free = Interval { lower: 200.0 * MIB, estimate: 200.0 * MIB, upper: 200.0 * MIB };
        let lower = |remaining| {
            let demand = Demand { growth: &growth, kernel, pending: 0.0, remaining };
            memory(Kind::HostMemory, String::new(), free, &demand).further_clones.unwrap().lower
        };
        // A further clone takes up to 8 MiB, each of 20 present clones 6 MiB × 3/4 more.
        assert_eq!((lower(0.0), lower(15.0)), (25, 13));
    }

    /// Growth of clones that all take 2 MiB.
    fn growth() -> Growth {
        let samples: Vec<Sample> =
            (0..10).map(|clone| Sample { clone, age_seconds: 10.0, bytes: 2.0 * MIB }).collect();
        Growth::of(&samples, 10.0).unwrap()
    }

    fn mib(number: u64) -> Bytes {
        Bytes::new(number << 20)
    }

    fn limited(resource: Kind, lower: u64, estimate: u64, upper: u64) -> Resource {
        let per_clone = Bounds::exact(1);
        Resource {
            resource,
            limit: String::new(),
            amount: Amount::Tasks { free_tasks: 1, tasks_per_clone: per_clone },
            further_clones: Some(Bounds { lower, estimate, upper }),
        }
    }

    #[test]
    fn pages_of_the_template_make_the_bounds_of_free_memory() {
        let free = free_memory(mib(100), mib(10), mib(20), mib(30));
        assert_eq!((free.lower, free.estimate, free.upper), (60.0 * MIB, 70.0 * MIB, 90.0 * MIB));
        let free = free_memory(mib(100), mib(0), mib(50), mib(30));
        assert_eq!((free.lower, free.estimate), (50.0 * MIB, 50.0 * MIB));
    }

    #[test]
    fn memory_allows_what_is_free_divided_by_what_a_clone_takes() {
        let growth = growth();
        let kernel = Interval { lower: 0.0, estimate: 0.0, upper: 0.5 * MIB };
        let demand = Demand { growth: &growth, kernel, pending: 20.0 * MIB, remaining: 0.0 };
        let free = Interval { lower: 100.0 * MIB, estimate: 121.0 * MIB, upper: 140.0 * MIB };
        let found = memory(Kind::HostMemory, String::new(), free, &demand).further_clones;
        assert_eq!(found, Some(Bounds { lower: 32, estimate: 50, upper: 60 }));
        // What the present clones will take is more than what is free.
        let none = Interval { lower: -5.0 * MIB, estimate: 10.0 * MIB, upper: 19.0 * MIB };
        let found = memory(Kind::HostMemory, String::new(), none, &demand).further_clones;
        assert_eq!(found, Some(Bounds::default()));
    }

    #[test]
    fn the_smallest_estimate_ends_first_and_each_bound_is_the_smallest() {
        let memory = limited(Kind::HostMemory, 80, 100, 130);
        let group = limited(Kind::CgroupMemory, 90, 95, 99);
        let tasks = limited(Kind::Tasks, 20, 500, 500);
        let mut unlimited = limited(Kind::Mappings, 0, 0, 0);
        unlimited.further_clones = None;
        let all = [memory, group, tasks, unlimited.clone()];
        let bounds = Bounds { lower: 20, estimate: 95, upper: 99 };
        assert_eq!(ends_first(&all), Some((1, bounds)));
        assert_eq!(ends_first(&[unlimited]), None);
        assert_eq!(ends_first(&[]), None);
    }

    #[test]
    fn a_template_that_does_not_fit_ends_first() {
        let memory = limited(Kind::HostMemory, 5, 10, 12);
        let pages = |resident| TemplatePages { data: mib(100), resident: mib(resident) };
        let free = free_memory(mib(60), mib(0), mib(30), mib(100));
        let cache = template_cache(String::new(), free, &pages(30), &memory);
        assert_eq!(
            ends_first(&[cache, memory.clone()]).unwrap(),
            (0, Bounds { lower: 0, estimate: 10, upper: 12 })
        );
        let cache = template_cache(String::new(), free, &pages(80), &memory);
        assert_eq!(ends_first(&[cache, memory]).unwrap().0, 1);
    }

    #[test]
    fn tasks_and_reservations_are_divided_with_their_bounds() {
        let per_clone = Bounds { lower: 2, estimate: 4, upper: 5 };
        let found = tasks("pid_max".into(), 100, per_clone).further_clones;
        assert_eq!(found, Some(Bounds { lower: 20, estimate: 25, upper: 50 }));
        let free = Interval { lower: 50.0, estimate: 100.0, upper: 100.0 };
        assert_eq!(
            commit(free, per_clone).further_clones,
            Some(Bounds { lower: 10, estimate: 25, upper: 50 })
        );
        assert_eq!(commit(free, Bounds::exact(0)).further_clones, None);
    }

    #[test]
    fn mappings_end_only_at_the_limit_of_a_process() {
        assert_eq!(mappings(65530, Bounds::exact(40)).further_clones, None);
        assert_eq!(mappings(40, Bounds::exact(40)).further_clones, Some(Bounds::default()));
    }
}
