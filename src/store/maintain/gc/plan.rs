//! Plan of a collection: which packs to remove and which to rewrite.

use std::collections::BTreeSet;

use crate::store::format::PackId;
use crate::store::write::pack_writer::PACK_BYTES;

/// Bytes of referenced records to copy in one round. The copies take this space in addition to the old packs.
const ROUND_BYTES: u64 = 4 * PACK_BYTES;

/// A pack and the size of its records.
#[derive(Debug, Clone, Copy)]
pub struct Share {
    pub id: PackId,
    /// Bytes of all records.
    pub all: u64,
    /// Bytes of referenced records.
    pub live: u64,
}

/// Packs to remove, and packs to rewrite and then remove.
#[derive(Debug, Default)]
pub struct Plan {
    pub remove: BTreeSet<PackId>,
    /// Sorted by referenced bytes, the smallest last.
    repack: Vec<Share>,
    /// Bytes of unreferenced records in packs that are not rewritten.
    pub remaining_dead: u64,
}

impl Plan {
    /// Plans the rewrite of packs of which at least half is unreferenced (dead). All other packs together may keep as
    /// many dead bytes as one pack holds, or a tenth of all bytes. If they hold more, the packs with the largest dead
    /// share are rewritten too.
    ///
    /// With `all`, every pack with an unreferenced record is rewritten.
    pub fn of(packs: impl IntoIterator<Item = Share>, all: bool) -> Plan {
        let mut plan = Plan::default();
        let mut rest: Vec<Share> = Vec::new();
        let dead = |pack: &Share| pack.all - pack.live;
        for pack in packs {
            if pack.live == 0 {
                plan.remove.insert(pack.id);
            } else if dead(&pack) >= pack.live || all && dead(&pack) > 0 {
                plan.repack.push(pack);
            } else {
                rest.push(pack);
            }
        }
        let worse = |a: &Share, b: &Share| u128::from(dead(a)) * u128::from(b.all);
        rest.sort_by(|a, b| worse(a, b).cmp(&worse(b, a)));
        let mut total: u64 = rest.iter().map(|pack| pack.all).sum();
        plan.remaining_dead = rest.iter().map(dead).sum();
        while plan.remaining_dead > PACK_BYTES.max(total / 10)
            && let Some(pack) = rest.pop()
        {
            plan.repack.push(pack);
            plan.remaining_dead -= dead(&pack);
            total -= pack.all;
        }
        plan.repack.sort_by_key(|pack| std::cmp::Reverse((pack.live, pack.id)));
        plan
    }

    /// Returns the bytes of the records to copy.
    pub fn live(&self) -> u64 {
        self.repack.iter().map(|pack| pack.live).sum()
    }

    /// Removes from the plan and returns the packs to rewrite next, with `available` bytes free. The packs with the
    /// fewest referenced bytes come first: they cost least and make room for the others. Half of the available space is
    /// left to other writers.
    pub fn next_round(&mut self, available: u64) -> Vec<Share> {
        let (limit, mut bytes, mut round) = (ROUND_BYTES.min(available / 2), 0, Vec::new());
        while let Some(pack) = self.repack.pop_if(|pack| round.is_empty() || bytes + pack.live <= limit) {
            bytes += pack.live;
            round.push(pack);
        }
        round
    }
}

#[cfg(test)]
mod tests {
    use crate::store::maintain::gc::plan::*;

    fn share(number: u8, all: u64, live: u64) -> Share {
        Share { id: PackId([number; 16]), all, live }
    }

    fn numbers(round: &[Share]) -> Vec<u8> {
        round.iter().map(|pack| pack.id.0[0]).collect()
    }

    fn repacked(plan: &mut Plan) -> Vec<u8> {
        let mut numbers = numbers(&std::mem::take(&mut plan.repack));
        numbers.sort_unstable();
        numbers
    }

    #[test]
    fn removes_dead_packs_and_rewrites_half_dead_ones() {
        let packs =
            [share(1, 100, 0), share(2, 100, 50), share(3, 100, 51), share(4, 100, 100), share(5, 0, 0)];
        let mut plan = Plan::of(packs, false);
        assert_eq!(plan.remove, [1, 5].map(|n| PackId([n; 16])).into());
        assert_eq!(plan.live(), 50);
        assert_eq!(plan.remaining_dead, 49);
        assert_eq!(repacked(&mut plan), [2]);
        assert!(Plan::of([], false).next_round(u64::MAX).is_empty());
    }

    #[test]
    fn rewrites_every_pack_with_dead_records_on_request() {
        let mut plan = Plan::of([share(1, 100, 99), share(2, 100, 100), share(3, 100, 0)], true);
        assert_eq!((plan.remaining_dead, plan.remove.len()), (0, 1));
        assert_eq!(repacked(&mut plan), [1]);
    }

    #[test]
    fn keeps_at_most_a_pack_or_a_tenth_of_dead_bytes() {
        // Each pack is one third dead, except pack 9, which has the largest dead share.
        let third = |number| share(number, PACK_BYTES, PACK_BYTES / 3 * 2);
        let mut plan = Plan::of([third(1), third(2)], false);
        assert!(repacked(&mut plan).is_empty(), "two thirds of a pack may stay");
        let mut plan = Plan::of([third(1), share(9, 1000, 501), third(2), third(3), third(4)], false);
        assert!(
            plan.remaining_dead <= PACK_BYTES && plan.remaining_dead > PACK_BYTES / 2,
            "{}",
            plan.remaining_dead
        );
        let worst = repacked(&mut plan);
        assert!(
            worst.len() == 3 && worst.contains(&9),
            "only the packs with the largest dead share: {worst:?}"
        );
        // A large store may keep a tenth of its bytes.
        let packs =
            |live: u64| (0..200).map(move |number| share(number, PACK_BYTES, PACK_BYTES / 100 * live));
        assert!(repacked(&mut Plan::of(packs(91), false)).is_empty());
        let mut plan = Plan::of(packs(89), false);
        let left = 200 - repacked(&mut plan).len() as u64;
        assert!(
            plan.remaining_dead <= PACK_BYTES.max(left * PACK_BYTES / 10),
            "{} of {left} packs",
            plan.remaining_dead
        );
    }

    #[test]
    fn limits_a_round_to_the_available_space() {
        let halves =
            |count| Plan::of((0..count).map(|number| share(number, PACK_BYTES, PACK_BYTES / 2)), false);
        let mut plan = halves(20);
        let rounds: Vec<_> =
            std::iter::from_fn(|| Some(plan.next_round(u64::MAX)).filter(|r| !r.is_empty())).collect();
        assert_eq!(rounds.iter().map(Vec::len).collect::<Vec<_>>(), [8, 8, 4]);
        let mut all: Vec<u8> = rounds.iter().flat_map(|round| numbers(round)).collect();
        all.sort_unstable();
        assert!(all.into_iter().eq(0..20), "each pack once");
        // If there is space for at most two packs, one pack is rewritten at a time. A single pack is tried with any
        // amount of space.
        let mut plan = halves(3);
        assert_eq!(
            [PACK_BYTES, 0, PACK_BYTES * 2].map(|available| plan.next_round(available).len()),
            [1, 1, 1]
        );
        // The packs with the fewest referenced bytes come first.
        let mut plan = Plan::of([share(1, 100, 40), share(2, 100, 1), share(3, 100, 20)], false);
        assert_eq!(numbers(&plan.next_round(50)), [2, 3]);
        assert_eq!(numbers(&plan.next_round(50)), [1]);
    }
}
