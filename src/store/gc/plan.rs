//! What is to be done with which packs, from what is needed of each.

use std::collections::BTreeSet;

use super::PACK_BYTES;
use super::PackId;

/// So much is copied at once, and takes room twice meanwhile.
const ROUND_BYTES: u64 = 4 * PACK_BYTES;

/// A pack as it counts here.
#[derive(Debug, Clone, Copy)]
pub struct Share {
    pub id: PackId,
    /// Bytes of its records, and of those that somebody needs.
    pub all: u64,
    pub live: u64,
}

/// Packs that go, and packs that are written anew before they go.
#[derive(Debug, Default)]
pub struct Plan {
    pub remove: BTreeSet<PackId>,
    /// The one of which least is needed comes last.
    repack: Vec<Share>,
    /// Bytes of dead records that stay.
    pub stays: u64,
}

impl Plan {
    /// A pack that is at least half dead is written anew. The rest may keep as many dead bytes as one pack holds, or a
    /// tenth of all: beyond that the worst ones are written anew too.
    ///
    /// With `all` every pack with a dead record is.
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
        plan.stays = rest.iter().map(dead).sum();
        while plan.stays > PACK_BYTES.max(total / 10)
            && let Some(pack) = rest.pop()
        {
            plan.repack.push(pack);
            plan.stays -= dead(&pack);
            total -= pack.all;
        }
        plan.repack.sort_by_key(|pack| std::cmp::Reverse((pack.live, pack.id)));
        plan
    }

    /// Bytes that are to be copied.
    pub fn live(&self) -> u64 {
        self.repack.iter().map(|pack| pack.live).sum()
    }

    /// Takes out the packs that are written anew next, where `room` bytes are free: those that give back most for what
    /// they take come first, and make room for the others. Half of the room is left to who else writes there.
    pub fn next_round(&mut self, room: u64) -> Vec<Share> {
        let (most, mut bytes, mut round) = (ROUND_BYTES.min(room / 2), 0, Vec::new());
        while let Some(pack) = self.repack.pop_if(|pack| round.is_empty() || bytes + pack.live <= most) {
            bytes += pack.live;
            round.push(pack);
        }
        round
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn dead_packs_go_and_half_dead_ones_are_written_anew() {
        let packs =
            [share(1, 100, 0), share(2, 100, 50), share(3, 100, 51), share(4, 100, 100), share(5, 0, 0)];
        let mut plan = Plan::of(packs, false);
        assert_eq!(plan.remove, [1, 5].map(|n| PackId([n; 16])).into());
        assert_eq!(plan.live(), 50);
        assert_eq!(plan.stays, 49);
        assert_eq!(repacked(&mut plan), [2]);
        assert!(Plan::of([], false).next_round(u64::MAX).is_empty());
    }

    #[test]
    fn all_of_the_dead_is_given_back_where_that_is_asked_for() {
        let mut plan = Plan::of([share(1, 100, 99), share(2, 100, 100), share(3, 100, 0)], true);
        assert_eq!((plan.stays, plan.remove.len()), (0, 1));
        assert_eq!(repacked(&mut plan), [1]);
    }

    #[test]
    fn what_stays_is_no_more_than_a_pack_or_a_tenth() {
        // Each has a third of dead bytes; the last one has most of all, by its share.
        let third = |number| share(number, PACK_BYTES, PACK_BYTES / 3 * 2);
        let mut plan = Plan::of([third(1), third(2)], false);
        assert!(repacked(&mut plan).is_empty(), "two thirds of a pack stay");
        let mut plan = Plan::of([third(1), share(9, 1000, 501), third(2), third(3), third(4)], false);
        assert!(plan.stays <= PACK_BYTES && plan.stays > PACK_BYTES / 2, "{}", plan.stays);
        let worst = repacked(&mut plan);
        assert!(worst.len() == 3 && worst.contains(&9), "the worst ones first, and no more: {worst:?}");
        // A large store keeps a tenth of what it has.
        let packs =
            |live: u64| (0..200).map(move |number| share(number, PACK_BYTES, PACK_BYTES / 100 * live));
        assert!(repacked(&mut Plan::of(packs(91), false)).is_empty());
        let mut plan = Plan::of(packs(89), false);
        let left = 200 - repacked(&mut plan).len() as u64;
        assert!(plan.stays <= PACK_BYTES.max(left * PACK_BYTES / 10), "{} of {left} packs", plan.stays);
    }

    #[test]
    fn a_round_takes_no_more_than_there_is_room_for() {
        let halves =
            |count| Plan::of((0..count).map(|number| share(number, PACK_BYTES, PACK_BYTES / 2)), false);
        let mut plan = halves(20);
        let rounds: Vec<_> =
            std::iter::from_fn(|| Some(plan.next_round(u64::MAX)).filter(|r| !r.is_empty())).collect();
        assert_eq!(rounds.iter().map(Vec::len).collect::<Vec<_>>(), [8, 8, 4]);
        let mut all: Vec<u8> = rounds.iter().flat_map(|round| numbers(round)).collect();
        all.sort_unstable();
        assert!(all.into_iter().eq(0..20), "each once");
        // With room for two at most, one at a time; and one is tried whatever there is.
        let mut plan = halves(3);
        assert_eq!([PACK_BYTES, 0, PACK_BYTES * 2].map(|room| plan.next_round(room).len()), [1, 1, 1]);
        // What costs least comes first.
        let mut plan = Plan::of([share(1, 100, 40), share(2, 100, 1), share(3, 100, 20)], false);
        assert_eq!(numbers(&plan.next_round(50)), [2, 3]);
        assert_eq!(numbers(&plan.next_round(50)), [1]);
    }
}
