//! The collectives: plans judged as data, then runs with exact numbers, then faults.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::time::Duration;

use carrousel::comm::plan::{
    Action, Algorithm, Plan, Transfer, all_reduce, broadcast, direct_all_gather, direct_all_gather_of, direct_all_reduce, direct_exchange,
    direct_exchange_of_packets, direct_reduce_scatter, double_tree_all_reduce, grouped_all_reduce, owned_segment, ring_all_gather,
    ring_all_reduce, ring_reduce_scatter, segments, tree_all_reduce,
};
use carrousel::comm::{CommError, Communicator, Operation, Options, group, measure};
use carrousel::rng::{Purpose, StepKey, Stream};
use carrousel::shape::{ALIGN, BLOCK};

use crate::alloc_count::n_allocations;

const WORLDS: std::ops::RangeInclusive<usize> = 1..=9;

/// Lengths that a plan for `world` ranks must stand.
fn plan_lens(world: usize) -> Vec<usize> {
    vec![0, 1, 3, 17, world - 1, world, world * ALIGN - 1, world * ALIGN + 1, BLOCK * world - 1, BLOCK * world + 5, 10_000_000]
}

// Plans as data.

/// A stretch of the message that no plan cuts, as one rank holds it.
#[derive(Clone, Debug, PartialEq)]
struct Held {
    /// How often each rank's values are in the sum.
    parts: Vec<usize>,
    /// The ranks in the order in which they were added, as a formula: equal formulas are equal bits.
    formula: String,
}

impl Held {
    fn own(rank: usize, world: usize) -> Self {
        let mut parts = vec![0; world];
        parts[rank] = 1;
        Self { parts, formula: rank.to_string() }
    }

    fn plus(&self, other: &Self) -> Self {
        let parts = self.parts.iter().zip(&other.parts).map(|(a, b)| a + b).collect();
        Self { parts, formula: format!("({}+{})", self.formula, other.formula) }
    }
}

/// What a plan leaves behind, and what it cost.
struct Outcome {
    /// Stretches of the message, in order.
    stretches: Vec<Range<usize>>,
    /// By rank, then stretch.
    held: Vec<Vec<Held>>,
    /// Additions by stretch, all ranks together.
    n_additions: Vec<usize>,
}

/// Values on their way: stage and segment as the sender says, then what it holds.
type Sent = (usize, Range<usize>, Vec<Held>);

/// Plays the plans of all ranks against each other; an error says what does not fit.
fn play(plans: &[Plan], len: usize) -> Result<Outcome, String> {
    let world = plans.len();
    let mut cuts: BTreeSet<usize> = segments(world, len).iter().flat_map(|segment| [segment.start, segment.end]).collect();
    for (rank, plan) in plans.iter().enumerate() {
        let ends = [0].into_iter().chain(plan.parts.iter().map(|part| part.end));
        if !plan.parts.iter().map(|part| part.start).eq(ends.take(plan.parts.len())) || plan.parts.last().map_or(0, |part| part.end) != len
        {
            return Err(format!("the parts of rank {rank} do not cover 0..{len}"));
        }
        if plan.parts != plans[0].parts {
            return Err(format!("rank {rank} cuts the message in other parts than rank 0"));
        }
        for Transfer { peer, segment } in plan.steps.iter().flat_map(|step| step.sends.iter().chain(&step.recvs)) {
            if !plan.parts.contains(segment) {
                return Err(format!("segment {segment:?} is no part of 0..{len}"));
            }
            if *peer >= world || *peer == rank {
                return Err(format!("rank {rank} cannot talk to rank {peer}"));
            }
        }
        cuts.extend(plan.parts.iter().map(|part| part.end));
    }
    let cuts: Vec<usize> = cuts.into_iter().collect();
    let stretches: Vec<Range<usize>> = cuts.windows(2).map(|cut| cut[0]..cut[1]).collect();
    let within = |segment: &Range<usize>| {
        let of_cut = |at: usize| cuts.binary_search(&at).expect("every bound is a cut");
        of_cut(segment.start)..of_cut(segment.end)
    };
    let mut held: Vec<Vec<Held>> = (0..world).map(|rank| vec![Held::own(rank, world); stretches.len()]).collect();
    let mut n_additions = vec![0; stretches.len()];
    let mut links: Vec<VecDeque<Sent>> = vec![VecDeque::new(); world * world];
    let mut next_step = vec![0; world];
    let mut has_sent = vec![false; world];
    loop {
        let mut moved = false;
        for rank in 0..world {
            let Some(step) = plans[rank].steps.get(next_step[rank]) else { continue };
            if !has_sent[rank] {
                for Transfer { peer, segment } in &step.sends {
                    let values = held[rank][within(segment)].to_vec();
                    links[rank * world + peer].push_back((step.stage, segment.clone(), values));
                }
                has_sent[rank] = true;
                moved = true;
            }
            if step.recvs.iter().any(|recv| links[recv.peer * world + rank].is_empty()) {
                continue;
            }
            let mut came = Vec::new();
            for Transfer { peer, segment } in &step.recvs {
                let (stage, theirs, values) = links[peer * world + rank].pop_front().expect("something has come");
                if (stage, &theirs) != (step.stage, segment) {
                    return Err(format!(
                        "rank {rank} expects {segment:?} of rank {peer} at stage {}, which sends {theirs:?} at stage {stage}",
                        step.stage
                    ));
                }
                came.push((segment.clone(), values));
            }
            act(step.action, rank, world, len, &mut held[rank], &mut n_additions, &came, &within, &stretches)?;
            next_step[rank] += 1;
            has_sent[rank] = false;
            moved = true;
        }
        if !moved {
            break;
        }
    }
    if let Some(rank) = (0..world).find(|rank| next_step[*rank] < plans[*rank].steps.len()) {
        return Err(format!("rank {rank} waits in step {} for what nobody sends", next_step[rank]));
    }
    if let Some(link) = links.iter().position(|link| !link.is_empty()) {
        return Err(format!("rank {} sends to rank {} what nobody receives", link / world, link % world));
    }
    Ok(Outcome { stretches, held, n_additions })
}

/// What a rank does with all that came in one step.
#[allow(clippy::too_many_arguments, reason = "the state of a whole play")]
fn act(
    action: Action,
    rank: usize,
    world: usize,
    len: usize,
    held: &mut [Held],
    n_additions: &mut [usize],
    came: &[(Range<usize>, Vec<Held>)],
    within: &impl Fn(&Range<usize>) -> Range<usize>,
    stretches: &[Range<usize>],
) -> Result<(), String> {
    match action {
        Action::Take => came.iter().for_each(|(segment, values)| held[within(segment)].clone_from_slice(values)),
        Action::Accumulate => {
            let Some((segment, _)) = came.first() else { return Ok(()) };
            if came.iter().any(|(other, _)| other != segment) {
                return Err(format!("rank {rank} adds different segments in one step"));
            }
            for (i, stretch) in within(segment).enumerate() {
                let sum = came.iter().map(|(_, values)| values[i].clone()).reduce(|a, b| a.plus(&b)).expect("there is a first");
                held[stretch] = sum.plus(&held[stretch]);
                n_additions[stretch] += came.len();
            }
        }
        Action::SumAll => {
            if came.len() + 1 != world || came.iter().any(|(segment, _)| *segment != (0..len)) {
                return Err(format!("rank {rank} adds up a whole without the whole of all"));
            }
            let owners = segments(world, len);
            for (i, stretch) in stretches.iter().enumerate().filter(|(_, stretch)| !stretch.is_empty()) {
                let owner = owners.iter().position(|owned| owned.contains(&stretch.start)).expect("someone owns it");
                let of = |of: usize| if of == rank { held[i].clone() } else { came[(of + world - rank - 1) % world].1[i].clone() };
                let sum = (1..=world).map(|k| of((owner + k) % world)).reduce(|a, b| a.plus(&b)).expect("a world has ranks");
                held[i] = sum;
                n_additions[i] += came.len();
            }
        }
    }
    Ok(())
}

/// Every stretch that `holders` names is the sum of all ranks, each once, added up `n_sums` times `world - 1` times in all.
fn check_sums(outcome: &Outcome, world: usize, n_sums: usize, holds: impl Fn(usize, &Range<usize>) -> bool) -> Result<(), String> {
    for (idx, stretch) in outcome.stretches.iter().enumerate().filter(|(_, stretch)| !stretch.is_empty()) {
        if outcome.n_additions[idx] != n_sums * (world - 1) {
            return Err(format!("elements {stretch:?} are added {} times, not {}", outcome.n_additions[idx], n_sums * (world - 1)));
        }
        let mut formula = None;
        for rank in (0..world).filter(|rank| holds(*rank, stretch)) {
            let held = &outcome.held[rank][idx];
            if held.parts.iter().any(|n| *n != 1) {
                return Err(format!("rank {rank} ends with {:?} at elements {stretch:?}", held.parts));
            }
            if formula.get_or_insert(&held.formula) != &&held.formula {
                return Err(format!("rank {rank} sums elements {stretch:?} in another order"));
            }
        }
        if formula.is_none() {
            return Err(format!("nobody holds elements {stretch:?}"));
        }
    }
    Ok(())
}

fn plans(world: usize, len: usize, plan: impl Fn(usize, usize, usize) -> Plan) -> Vec<Plan> {
    (0..world).map(|rank| plan(world, rank, len)).collect()
}

fn check_all_reduce(plans: &[Plan], len: usize) -> Result<(), String> {
    play(plans, len).and_then(|outcome| check_sums(&outcome, plans.len(), 1, |_, _| true))
}

/// A collective's plan for one rank: from world, rank and length.
type Make = fn(usize, usize, usize) -> Plan;

#[test]
fn segments_cover_the_message_in_rank_order_in_whole_blocks_with_the_remainder_first() {
    for world in WORLDS {
        let lens = (0..=300).chain((0..40).map(|i| i * 1021)).chain(plan_lens(world));
        for len in lens {
            let segments = segments(world, len);
            assert_eq!(segments.len(), world);
            assert_eq!((segments[0].start, segments[world - 1].end), (0, len));
            assert!(segments.windows(2).all(|pair| pair[0].end == pair[1].start), "{segments:?}");
            let unit = if len.div_ceil(BLOCK) >= world {
                BLOCK
            } else if len.div_ceil(ALIGN) >= world {
                ALIGN
            } else {
                1
            };
            assert!(segments.iter().all(|segment| segment.start % unit == 0 || segment.start == len), "{segments:?}");
            let units: Vec<usize> = segments.iter().map(|segment| segment.len().div_ceil(unit)).collect();
            assert!(units.windows(2).all(|pair| pair[0] >= pair[1]) && units[0] - units[world - 1] <= 1, "{segments:?}");
            assert!((0..world).all(|rank| owned_segment(world, rank, len) == segments[rank]));
        }
    }
}

#[test]
fn every_packet_of_an_exchange_reaches_the_one_whom_it_is_for() {
    for world in WORLDS {
        let plans: Vec<Plan> = (0..world).map(|rank| direct_exchange_of_packets(world, rank)).collect();
        let outcome = play(&plans, world * world).unwrap();
        for (rank, plan) in plans.iter().enumerate() {
            assert_eq!((plan.steps.len(), plan.n_sent()), (1.min(world - 1), world - 1));
            for from in 0..world {
                assert_eq!(outcome.held[rank][from * world + rank].formula, from.to_string(), "world {world}, from {from} to {rank}");
            }
        }
    }
}

#[test]
fn packets_of_any_length_are_handed_over_as_they_are() {
    let packet = |from: usize, to: usize| -> Vec<u8> { (0..from * 7 + to * 3).map(|i| (i + from + 16 * to) as u8).collect() };
    for world in WORLDS {
        let packet = &packet;
        std::thread::scope(|scope| {
            for (rank, mut comm) in group(world, Options::default()).into_iter().enumerate() {
                scope.spawn(move || {
                    for call in 0..3 {
                        let packets = (0..world).map(|to| std::sync::Arc::new(packet(rank + call, to))).collect();
                        let before = comm.bytes_sent();
                        let came = comm.exchange_bytes(packets).expect("an exchange");
                        for (from, came) in came.iter().enumerate() {
                            assert_eq!(**came, packet(from + call, rank), "world {world}: from {from} to {rank}");
                        }
                        let sent: usize = (0..world).filter(|to| *to != rank).map(|to| packet(rank + call, to).len()).sum();
                        assert_eq!(comm.bytes_sent() - before, sent as u64);
                    }
                });
            }
        });
    }
}

#[test]
fn reduce_scatter_plans_sum_every_element_once_at_its_owner() {
    for (make, n_steps) in [(ring_reduce_scatter as Make, usize::MAX), (direct_reduce_scatter, 1)] {
        for world in WORLDS {
            for len in plan_lens(world) {
                let plans = plans(world, len, make);
                let outcome = play(&plans, len).unwrap();
                let owns = |rank, stretch: &Range<usize>| {
                    let own = owned_segment(world, rank, len);
                    own.start <= stretch.start && stretch.end <= own.end
                };
                check_sums(&outcome, world, 1, owns).unwrap();
                for (rank, plan) in plans.iter().enumerate() {
                    assert_eq!(plan.steps.len(), n_steps.min(world - 1));
                    assert_eq!(plan.n_sent(), len - owned_segment(world, rank, len).len());
                }
            }
        }
    }
}

#[test]
fn all_gather_plans_bring_every_owners_segment_to_all() {
    for (make, n_steps) in [(ring_all_gather as Make, usize::MAX), (direct_all_gather, 1)] {
        for world in WORLDS {
            for len in plan_lens(world) {
                let plans = plans(world, len, make);
                assert!(plans.iter().all(|plan| plan.steps.len() == n_steps.min(world - 1)));
                assert_eq!(plans.iter().map(Plan::n_sent).sum::<usize>(), (world - 1) * len);
                let outcome = play(&plans, len).unwrap();
                for (idx, stretch) in outcome.stretches.iter().enumerate().filter(|(_, stretch)| !stretch.is_empty()) {
                    let owner = segments(world, len).iter().position(|segment| segment.contains(&stretch.start)).unwrap();
                    assert!(outcome.held.iter().all(|held| held[idx] == Held::own(owner, world)), "{world} ranks, {len}, {stretch:?}");
                }
            }
        }
    }
}

#[test]
fn all_reduce_plans_sum_every_element_once_in_one_order_at_all_ranks() {
    for make in [ring_all_reduce as Make, direct_all_reduce, tree_all_reduce, double_tree_all_reduce] {
        for world in WORLDS {
            for len in plan_lens(world) {
                let plans = plans(world, len, make);
                check_all_reduce(&plans, len).unwrap();
                // Whatever the way: all ranks together hand out 2(P-1) S.
                assert_eq!(plans.iter().map(Plan::n_sent).sum::<usize>(), 2 * (world - 1) * len);
            }
        }
    }
}

#[test]
fn ring_and_direct_all_reduce_share_the_work_evenly() {
    for (make, n_steps) in [(ring_all_reduce as Make, usize::MAX), (direct_all_reduce, 2)] {
        for world in WORLDS {
            for len in plan_lens(world) {
                let plans = plans(world, len, make);
                assert!(plans.iter().all(|plan| plan.steps.len() == n_steps.min(2 * (world - 1))));
                // Each rank its share, but for the unevenness of the segments.
                let share = 2 * (world - 1) * len / world;
                assert!(plans.iter().all(|plan| plan.n_sent().abs_diff(share) <= world * BLOCK));
            }
        }
    }
}

#[test]
fn grouped_all_reduce_sums_every_element_once_and_sends_each_groups_sum_out_of_it_once() {
    for world in WORLDS {
        for size in 1..=world + 1 {
            let n_groups = world.div_ceil(size);
            for len in plan_lens(world) {
                let plans = plans(world, len, |world, rank, len| grouped_all_reduce(size, world, rank, len));
                check_all_reduce(&plans, len).unwrap_or_else(|e| panic!("{world} ranks in groups of {size}, {len} floats: {e}"));
                let sent = |leaves: bool| -> usize {
                    let of_rank = |(rank, plan): (usize, &Plan)| -> usize {
                        let all = plan.steps.iter().flat_map(|step| &step.sends);
                        all.filter(|send| (send.peer / size != rank / size) == leaves).map(|send| send.segment.len()).sum()
                    };
                    plans.iter().enumerate().map(of_rank).sum()
                };
                assert_eq!(sent(true), 2 * (n_groups - 1) * len, "{world} ranks in groups of {size}, {len} floats");
                assert_eq!(sent(false), 2 * (world - n_groups) * len, "{world} ranks in groups of {size}, {len} floats");
            }
        }
    }
    for wrong in ["groups", "groups:0", "groups:x", "groups:-1", "star"] {
        assert!(wrong.parse::<Algorithm>().is_err(), "{wrong}");
    }
}

#[test]
fn a_direct_exchange_gives_everyone_every_sum_in_one_step() {
    for world in WORLDS {
        for len in plan_lens(world) {
            let plans = plans(world, len, direct_exchange);
            let outcome = play(&plans, len).unwrap();
            check_sums(&outcome, world, world, |_, _| true).unwrap();
            assert!(plans.iter().all(|plan| plan.steps.len() == 1.min(world - 1) && plan.n_sent() == (world - 1) * len));
        }
    }
}

#[test]
fn ring_and_direct_plans_add_in_the_same_order() {
    for world in WORLDS {
        for len in plan_lens(world) {
            let formulas = |make: Make| -> Vec<String> {
                let outcome = play(&plans(world, len, make), len).unwrap();
                let real = outcome.stretches.iter().zip(&outcome.held[0]).filter(|(stretch, _)| !stretch.is_empty());
                real.map(|(_, held)| held.formula.clone()).collect()
            };
            let of_ring = formulas(ring_all_reduce);
            assert_eq!(formulas(direct_all_reduce), of_ring, "{world} ranks, {len} floats");
            assert_eq!(formulas(direct_exchange), of_ring, "{world} ranks, {len} floats");
        }
    }
}

#[test]
fn trees_have_few_steps_and_inner_ranks_in_one_of_two_trees_only() {
    let log2 = |world: usize| world.next_power_of_two().ilog2() as usize;
    for world in WORLDS {
        let children = |plan: &Plan, half: usize| {
            let takes_in = |step: &&carrousel::comm::plan::Step| step.stage == half && step.action == Action::Accumulate;
            plan.steps.iter().filter(takes_in).map(|step| step.recvs.len()).sum::<usize>()
        };
        assert!(plans(world, 100, tree_all_reduce).iter().all(|plan| children(plan, 0) <= log2(world)));
        let double = plans(world, 100, double_tree_all_reduce);
        let is_inner = |plan: &Plan| [0, 1].map(|half| usize::from(children(plan, half) > 0)).iter().sum::<usize>();
        assert!(double.iter().filter(|plan| is_inner(plan) > 1).count() <= world % 2, "{world} ranks");
        assert!(double.iter().all(|plan| children(plan, 0) <= 2 && children(plan, 1) <= 2));
    }
}

#[test]
fn the_plan_for_an_algorithm_is_right_at_every_length() {
    for (name, algorithm) in Algorithm::ALL {
        assert_eq!((algorithm.to_string().as_str(), name.parse()), (name, Ok(algorithm)));
        for world in WORLDS {
            for len in plan_lens(world) {
                let plans = plans(world, len, |world, rank, len| all_reduce(algorithm, world, rank, len));
                let n_sums = if plans[0].steps.first().is_some_and(|step| step.action == Action::SumAll) { world } else { 1 };
                play(&plans, len).and_then(|outcome| check_sums(&outcome, world, n_sums, |_, _| true)).unwrap();
                let resolved = algorithm.resolve();
                assert!(resolved != Algorithm::Auto && (algorithm == Algorithm::Auto || algorithm == resolved));
            }
        }
    }
}

#[test]
fn all_gather_plans_take_segments_of_any_length() {
    let segments = [0..0, 0..100_000, 100_000..100_000, 100_000..100_001, 100_001..200_000];
    let plans: Vec<Plan> = (0..segments.len()).map(|rank| direct_all_gather_of(rank, segments.to_vec())).collect();
    let outcome = play(&plans, 200_000).unwrap();
    for (idx, stretch) in outcome.stretches.iter().enumerate().filter(|(_, stretch)| !stretch.is_empty()) {
        let owner = segments.iter().position(|segment| segment.contains(&stretch.start)).unwrap();
        assert!(outcome.held.iter().all(|held| held[idx] == Held::own(owner, segments.len())));
    }
}

#[test]
fn broadcast_plans_bring_the_roots_message_to_all_down_a_tree() {
    for world in WORLDS {
        for root in 0..world {
            for len in [0, 1, 10, 99] {
                let plans: Vec<Plan> = (0..world).map(|rank| broadcast(world, rank, root, len)).collect();
                let outcome = play(&plans, len).unwrap();
                assert!(outcome.stretches.iter().enumerate().filter(|(_, stretch)| !stretch.is_empty()).all(|(idx, _)| {
                    outcome.held.iter().all(|held| held[idx] == Held::own(root, world)) && outcome.n_additions[idx] == 0
                }));
                let n_sends = |plan: &Plan| plan.steps.iter().map(|step| step.sends.len()).sum::<usize>();
                assert!(plans.iter().all(|plan| n_sends(plan) <= world.next_power_of_two().ilog2() as usize));
                assert_eq!(plans.iter().map(Plan::n_sent).sum::<usize>(), (world - 1) * len);
            }
        }
    }
}

#[test]
fn the_plan_checker_finds_planted_faults() {
    let good = plans(4, 40_000, ring_all_reduce);
    assert_eq!(check_all_reduce(&good, 40_000), Ok(()));
    let fault = |plant: &dyn Fn(&mut Vec<Plan>)| {
        let mut plans = good.clone();
        plant(&mut plans);
        check_all_reduce(&plans, 40_000).expect_err("a planted fault")
    };
    // One rank skips a segment: its successor gets the next one in its place.
    let missing = fault(&|plans| plans[2].steps[1].sends.clear());
    assert!(missing.contains("rank 3 expects"), "{missing}");
    // All skip the same step: everything fits, but sums are missing.
    let skipped = fault(&|plans| {
        for plan in plans {
            plan.steps.remove(1);
        }
    });
    assert!(skipped.contains("times"), "{skipped}");
    let swapped = fault(&|plans| plans[0].steps.swap(3, 4));
    assert!(swapped.contains("expects"), "{swapped}");
    let late = fault(&|plans| plans[0].steps[2].stage = 9);
    assert!(late.contains("at stage 9"), "{late}");
    let taken = fault(&|plans| plans.iter_mut().for_each(|plan| plan.steps[2].action = Action::Take));
    assert!(taken.contains("times"), "{taken}");
    let twice = fault(&|plans| plans.iter_mut().for_each(|plan| plan.steps[4].action = Action::Accumulate));
    assert!(twice.contains("times"), "{twice}");
    let unsent = fault(&|plans| {
        plans[3].steps.pop();
    });
    assert!(unsent.contains("rank 0 waits in step 5"), "{unsent}");
    let unread = fault(&|plans| plans[3].steps[5].recvs.clear());
    assert!(unread.contains("nobody receives"), "{unread}");
    let outside = fault(&|plans| plans[1].steps[0].sends[0].segment.end = 40_001);
    assert!(outside.contains("0..40000"), "{outside}");
    let uncovered = fault(&|plans| plans[1].parts[2].end -= 1);
    assert!(uncovered.contains("do not cover"), "{uncovered}");
}

// Runs.

/// Long enough for a loaded machine; no test that succeeds waits for it.
const PATIENT: Options = Options { deadline: Duration::from_secs(120), generation: 0, algorithm: Algorithm::Auto, tap: None };

/// [`PATIENT`] by a given algorithm.
fn by(algorithm: Algorithm) -> Options {
    Options { algorithm, ..PATIENT }
}

/// [`PATIENT`] no longer.
fn within(deadline: Duration) -> Options {
    Options { deadline, ..PATIENT }
}

/// Runs `work` on a thread a rank and returns what each returned, in rank order.
fn on_ranks<T: Send>(ranks: Vec<Communicator>, work: impl Fn(Communicator) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(move || work(rank))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no rank panics")).collect()
    })
}

/// Small integers, so that any order of summing is exact, and different at every rank and element.
fn exact(rank: usize, i: usize) -> f32 {
    ((i * 7 + rank * 131) % 1009) as f32 - 500.0
}

fn exact_data(rank: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| exact(rank, i)).collect()
}

fn exact_sum(world: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| (0..world).map(|rank| exact(rank, i)).sum()).collect()
}

fn run_lens(world: usize) -> [usize; 8] {
    [0, 1, 3, 17, world - 1, ALIGN * world + 1, BLOCK * world + 5, 40_000]
}

#[test]
fn all_reduce_sums_exactly_at_every_world_and_length_by_every_algorithm() {
    for (name, algorithm) in Algorithm::ALL {
        for world in WORLDS {
            let sent = on_ranks(group(world, by(algorithm)), |mut comm| {
                // Back to back on one group.
                for len in run_lens(world) {
                    let mut data = exact_data(comm.rank(), len);
                    comm.all_reduce(&mut data).unwrap();
                    assert!(data == exact_sum(world, len), "{name}: rank {} of {world}, {len} floats", comm.rank());
                }
                assert_eq!(comm.world(), world);
                comm.bytes_sent()
            });
            for (rank, sent) in sent.into_iter().enumerate() {
                let planned: usize = run_lens(world).into_iter().map(|len| all_reduce(algorithm, world, rank, len).n_sent()).sum();
                assert_eq!(sent, 4 * planned as u64, "{name}: rank {rank} of {world}");
            }
        }
    }
}

#[test]
fn shared_messages_are_summed_in_place_call_after_call() {
    for (name, algorithm) in Algorithm::ALL {
        for world in [1, 2, 4, 5] {
            on_ranks(group(world, by(algorithm)), |mut comm| {
                let mut messages: Vec<_> = run_lens(world).into_iter().map(|len| comm.shared(len)).collect();
                for round in 0..4 {
                    for message in &mut messages {
                        let len = message.len();
                        let mine = exact_data(comm.rank() + round, len);
                        message.fill(&mine);
                        comm.all_reduce_shared(message).unwrap();
                        let sum: Vec<f32> = (0..len).map(|i| (0..world).map(|rank| exact(rank + round, i)).sum()).collect();
                        assert!(message.parts().all(|(range, part)| part == &sum[range]), "{name}: {world} ranks, {len} floats");
                    }
                }
            });
        }
    }
}

#[test]
fn a_sum_may_be_summed_again_and_go_through_other_collectives() {
    const LEN: usize = 30_000;
    for (name, algorithm) in Algorithm::ALL {
        on_ranks(group(3, by(algorithm)), |mut comm| {
            let mut message = comm.shared(LEN);
            message.fill(&exact_data(comm.rank(), LEN));
            let sum = exact_sum(3, LEN);
            let check = |message: &carrousel::comm::Shared, times: f32| {
                let mut got = vec![0.0; LEN];
                message.copy_to(&mut got);
                assert!(got.iter().zip(&sum).all(|(got, sum)| *got == times * sum), "{name}, times {times}");
            };
            comm.all_reduce_shared(&mut message).unwrap();
            check(&message, 1.0);
            comm.all_reduce_shared(&mut message).unwrap();
            check(&message, 3.0);
            comm.reduce_scatter_shared(&mut message).unwrap();
            let own = message.own_segment();
            let mine = message.get(own.clone()).expect("the own segment is one part").to_vec();
            assert!(mine.iter().zip(&sum[own]).all(|(got, sum)| *got == 9.0 * sum));
            comm.all_gather_shared(&mut message).unwrap();
            check(&message, 9.0);
            // Nobody's memory was written while another read it: an old sum stays what it was.
            let mut other = comm.shared(LEN);
            for round in 0..5 {
                other.fill(&exact_data(comm.rank() + round, LEN));
                comm.all_reduce_shared(&mut other).unwrap();
            }
            check(&message, 9.0);
        });
    }
}

#[test]
fn algorithms_that_add_in_one_order_give_one_result_bit_for_bit() {
    for world in [2, 3, 7] {
        // Below and above the length that is exchanged in one step.
        for len in [200, 1000, 50_000] {
            let run = |algorithm| {
                on_ranks(group(world, by(algorithm)), |mut comm| {
                    let mut random = Stream::new(StepKey::new(10, 0), Purpose::Test, 0, comm.rank() as u32);
                    let mut data: Vec<f32> = (0..len).map(|_| random.normal() as f32).collect();
                    comm.all_reduce(&mut data).unwrap();
                    data.into_iter().map(f32::to_bits).collect::<Vec<u32>>()
                })
            };
            let of_ring = run(Algorithm::Ring);
            assert!(of_ring.iter().all(|bits| *bits == of_ring[0]));
            assert!(run(Algorithm::Direct) == of_ring, "{world} ranks, {len} floats");
            let of_tree = run(Algorithm::Tree);
            assert!(of_tree.iter().all(|bits| *bits == of_tree[0]));
        }
    }
}

#[test]
fn reduce_scatter_completes_the_own_segment_and_all_gather_brings_it_to_all() {
    for (name, algorithm) in Algorithm::ALL {
        for world in WORLDS {
            on_ranks(group(world, by(algorithm)), |mut comm| {
                for len in run_lens(world) {
                    let sum = exact_sum(world, len);
                    let mut data = exact_data(comm.rank(), len);
                    let own = comm.reduce_scatter(&mut data).unwrap();
                    assert_eq!(own, owned_segment(world, comm.rank(), len));
                    assert!(data[own.clone()] == sum[own.clone()], "{name}: rank {} of {world}, {len} floats", comm.rank());
                    // What is not the own segment may be anything.
                    data[..own.start].fill(f32::NAN);
                    data[own.end..].fill(f32::NAN);
                    comm.all_gather(&mut data).unwrap();
                    assert!(data == sum, "{name}: rank {} of {world}, {len} floats", comm.rank());
                }
            });
        }
    }
}

#[test]
fn all_reduce_sums_two_million_floats_on_three_ranks() {
    const LEN: usize = 2_000_000;
    let sum = exact_sum(3, LEN);
    let sent = on_ranks(group(3, PATIENT), |mut comm| {
        let mut data = exact_data(comm.rank(), LEN);
        comm.all_reduce(&mut data).unwrap();
        assert!(data == sum);
        comm.bytes_sent()
    });
    assert_eq!(sent.iter().sum::<u64>(), 4 * 4 * LEN as u64);
}

#[test]
fn the_measurement_of_an_all_reduce_checks_its_sums_and_reports_what_ran() {
    for (asked, ran) in [(Algorithm::Ring, Algorithm::Ring), (Algorithm::Auto, Algorithm::Direct)] {
        let measured = measure::measure(3, 40_000, asked, Some(5)).unwrap();
        assert_eq!((measured.algorithm, measured.n_calls), (ran, 5));
        assert!(0.0 < measured.min_seconds && measured.min_seconds <= measured.seconds);
        let floor = 4.0 * 40_000.0 / measured.memory_bandwidth;
        assert!((measured.floor_seconds - floor).abs() <= 1e-9 * floor);
        assert!((measured.busbw(3, 40_000) / measured.algbw(40_000) - 4.0 / 3.0).abs() < 1e-9);
    }
}

#[test]
fn all_ranks_end_with_the_same_bits_run_after_run() {
    const LEN: usize = 70_001;
    for world in [2, 3, 5, 9] {
        let run = || {
            on_ranks(group(world, PATIENT), |mut comm| {
                let mut random = Stream::new(StepKey::new(8, 0), Purpose::Test, 0, comm.rank() as u32);
                let mut data: Vec<f32> = (0..LEN).map(|_| random.normal() as f32).collect();
                comm.all_reduce(&mut data).unwrap();
                data.into_iter().map(f32::to_bits).collect::<Vec<u32>>()
            })
        };
        let first = run();
        assert!(first.iter().all(|bits| *bits == first[0]), "{world} ranks differ");
        assert!(run() == first, "{world} ranks, two runs differ");
    }
}

#[test]
fn reduce_scatter_with_all_gather_gives_the_bits_of_all_reduce() {
    on_ranks(group(3, PATIENT), |mut comm| {
        let mut random = Stream::new(StepKey::new(9, 0), Purpose::Test, 0, comm.rank() as u32);
        let mut whole: Vec<f32> = (0..50_000).map(|_| random.normal() as f32).collect();
        let mut halves = whole.clone();
        comm.all_reduce(&mut whole).unwrap();
        comm.reduce_scatter(&mut halves).unwrap();
        comm.all_gather(&mut halves).unwrap();
        assert!(whole.iter().map(|x| x.to_bits()).eq(halves.iter().map(|x| x.to_bits())));
    });
}

#[test]
fn copies_keep_every_bit_of_values_that_are_no_numbers() {
    let odd = [f32::from_bits(0x7FA0_0001), -0.0, f32::INFINITY, f32::from_bits(1)];
    on_ranks(group(2, PATIENT), |mut comm| {
        let own = owned_segment(2, comm.rank(), odd.len());
        let mut data = [1.0; 4];
        data[own.clone()].copy_from_slice(&odd[own]);
        comm.all_gather(&mut data).unwrap();
        assert_eq!(data.map(f32::to_bits), odd.map(f32::to_bits));
    });
}

#[test]
fn all_gather_bytes_returns_unequal_lengths_in_rank_order() {
    // Nothing, a little, and more than the buffers of a link hold.
    let bytes = |rank: usize, round: usize| -> Vec<u8> {
        let len = [0, 5, 700_000, 1, 65_536][(rank + round) % 5];
        (0..len).map(|i| (i * 3 + rank * 17 + round) as u8).collect()
    };
    for world in WORLDS {
        let sent = on_ranks(group(world, PATIENT), |mut comm| {
            for round in 0..3 {
                let all = comm.all_gather_bytes(&bytes(comm.rank(), round)).unwrap();
                assert_eq!(all.len(), world);
                assert!((0..world).all(|rank| all[rank] == bytes(rank, round)), "rank {} of {world}", comm.rank());
            }
            comm.bytes_sent()
        });
        let len = |rank: usize| (0..3).map(|round| bytes(rank, round).len()).sum::<usize>();
        for (rank, sent) in sent.into_iter().enumerate() {
            assert_eq!(sent, ((world - 1) * len(rank)) as u64);
        }
    }
}

#[test]
fn broadcast_replaces_what_the_others_hold_by_the_roots_bytes() {
    let bytes = |root: usize, len: usize| -> Vec<u8> { (0..len).map(|i| (i * 5 + root) as u8).collect() };
    for world in [1, 2, 3, 9] {
        on_ranks(group(world, PATIENT), |mut comm| {
            for root in 0..world {
                for len in [0, 1, 700_001] {
                    let mut data = if comm.rank() == root { bytes(root, len) } else { vec![99; comm.rank() * 1000] };
                    comm.broadcast(root, &mut data).unwrap();
                    assert!(data == bytes(root, len), "rank {} of {world}, root {root}, {len} bytes", comm.rank());
                }
            }
            let error = comm.broadcast(world, &mut Vec::new()).unwrap_err();
            assert_eq!(error, CommError::UnknownRoot { root: world, world });
            // It did no harm.
            comm.all_reduce(&mut [1.0]).unwrap();
        });
    }
}

#[test]
fn different_collectives_follow_each_other_on_one_group_though_ranks_run_ahead() {
    const WORLD: usize = 4;
    on_ranks(group(WORLD, PATIENT), |mut comm| {
        let rank = comm.rank();
        for round in 0..50 {
            let len = round * 977;
            // Now this rank is late, now that.
            if round % WORLD == rank {
                std::thread::sleep(Duration::from_millis(1));
            }
            let mut data = exact_data(rank, len);
            comm.all_reduce(&mut data).unwrap();
            assert!(data == exact_sum(WORLD, len));
            let mut text = if rank == round % WORLD { format!("round {round}").into_bytes() } else { Vec::new() };
            comm.broadcast(round % WORLD, &mut text).unwrap();
            assert_eq!(text, format!("round {round}").into_bytes());
            let all = comm.all_gather_bytes(&vec![rank as u8; rank * round]).unwrap();
            assert!((0..WORLD).all(|rank| all[rank] == vec![rank as u8; rank * round]));
        }
    });
}

#[test]
fn the_steady_state_allocates_nothing() {
    const WORLD: usize = 3;
    const N_ROUNDS: usize = 200;
    let lens = [100_000, 17, 4096 * 5];
    for (name, algorithm) in Algorithm::ALL {
        let n_rounds_that_allocate = on_ranks(group(WORLD, by(algorithm)), |mut comm| {
            let mut data = vec![1.0; 100_000];
            let mut messages: Vec<_> = lens.into_iter().map(|len| comm.shared(len)).collect();
            let mut round = |comm: &mut Communicator| {
                let before = n_allocations();
                for message in &mut messages {
                    message.parts_mut().for_each(|(_, part)| part.fill(1.0));
                    comm.all_reduce_shared(message).unwrap();
                }
                for len in lens {
                    comm.all_reduce(&mut data[..len]).unwrap();
                    comm.reduce_scatter(&mut data[..len]).unwrap();
                    comm.all_gather(&mut data[..len]).unwrap();
                    data.fill(1.0);
                }
                n_allocations() - before
            };
            assert!(round(&mut comm) > 0, "the first round makes plans and buffers");
            // Each rank is late once, so that all others wait once: a channel makes its list of waiters at the first wait.
            for late in 0..WORLD {
                if comm.rank() == late {
                    std::thread::sleep(Duration::from_millis(20));
                }
                round(&mut comm);
            }
            (0..N_ROUNDS).filter(|_| round(&mut comm) > 0).count()
        });
        // The channels that a rank waits on may meet their first wait only now, where the machine was busy; a call that allocated would do
        // so in every round.
        assert!(n_rounds_that_allocate.iter().all(|n| *n <= 2), "{name}: {n_rounds_that_allocate:?} of {N_ROUNDS} rounds");
    }
}

// Faults.

#[test]
fn a_world_of_one_needs_nobody() {
    let mut comm = group(1, Options { deadline: Duration::ZERO, generation: 7, ..PATIENT }).remove(0);
    let mut data = [1.0, 2.0, 3.0];
    assert_eq!(comm.reduce_scatter(&mut data).unwrap(), 0..3);
    comm.all_gather(&mut data).unwrap();
    comm.all_reduce(&mut data).unwrap();
    assert_eq!(data, [1.0, 2.0, 3.0]);
    assert_eq!(comm.all_gather_bytes(b"me").unwrap(), vec![b"me".to_vec()]);
    let mut bytes = b"mine".to_vec();
    comm.broadcast(0, &mut bytes).unwrap();
    assert_eq!(bytes, b"mine");
    assert_eq!((comm.rank(), comm.world(), comm.generation(), comm.bytes_sent()), (0, 1, 7, 0));
    assert!(group(0, PATIENT).is_empty());
}

#[test]
fn a_rank_that_stays_away_is_named_by_all_when_the_deadline_is_over() {
    let deadline = Duration::from_secs(1);
    for len in [5, 300_000] {
        let mut ranks = group(4, within(deadline));
        // It lives, but does not come.
        let away = ranks.remove(1);
        let errors = on_ranks(ranks, |mut comm| {
            let error = comm.all_reduce(&mut vec![1.0; len]).unwrap_err();
            assert_eq!(comm.all_reduce(&mut [1.0]).unwrap_err(), error, "a closed communicator keeps its error");
            error
        });
        let expected = CommError::Timeout { waiting_for: 1, what: Operation::AllReduce, after: deadline };
        assert!(errors.iter().all(|error| *error == expected), "{errors:?}");
        drop(away);
    }
}

#[test]
fn a_rank_that_comes_too_late_learns_that_it_was_given_up() {
    let deadline = Duration::from_millis(200);
    let mut ranks = group(2, within(deadline));
    let mut late = ranks.remove(1);
    on_ranks(ranks, |mut comm| comm.all_reduce(&mut [1.0; 5]).unwrap_err());
    let error = late.all_reduce(&mut [1.0; 5]).unwrap_err();
    assert_eq!(error, CommError::Timeout { waiting_for: 1, what: Operation::AllReduce, after: deadline });
}

#[test]
fn a_rank_that_is_dropped_is_named_by_all_long_before_the_deadline() {
    for rounds_before in [0, 2] {
        // The test ends because nobody waits: the deadline is a day.
        let errors = on_ranks(group(4, within(Duration::from_secs(86_400))), |mut comm| {
            for round in 0.. {
                if comm.rank() == 1 && round == rounds_before {
                    return None;
                }
                if let Err(error) = comm.all_reduce(&mut vec![1.0; 300_000]) {
                    return Some(error);
                }
            }
            None
        });
        let gone = Some(CommError::PeerGone { rank: 1 });
        assert_eq!(errors, [gone.clone(), None, gone.clone(), gone]);
    }
}

#[test]
fn a_rank_that_panics_is_gone() {
    let mut ranks = group(2, within(Duration::from_secs(86_400)));
    let panicking = ranks.remove(1);
    let ended = std::thread::spawn(move || {
        let _held = panicking;
        // Not a panic's message on the screen, but its unwinding.
        std::panic::resume_unwind(Box::new("planted"));
    });
    assert_eq!(ranks[0].all_gather(&mut [1.0, 2.0]), Err(CommError::PeerGone { rank: 1 }));
    assert!(ended.join().is_err());
}

/// Both ranks of a group of two do something else; the errors in rank order.
fn two_ranks(work: impl Fn(&mut Communicator) -> Result<(), CommError> + Sync) -> Vec<CommError> {
    on_ranks(group(2, PATIENT), |mut comm| work(&mut comm).unwrap_err())
}

#[test]
fn different_lengths_are_a_mismatch_that_names_both() {
    for lens in [[5, 6], [0, 1], [100_000, 100_001], [0, 2_000_000]] {
        let errors = two_ranks(|comm| comm.all_reduce(&mut vec![1.0; lens[comm.rank()]]));
        for error in errors {
            let CommError::Mismatch(mismatch) = &error else { panic!("expected a mismatch, got {error}") };
            assert_eq!((mismatch.mine.len, mismatch.theirs.len), (lens[mismatch.rank], lens[mismatch.peer]));
            let text = error.to_string();
            assert!(lens.iter().all(|len| text.contains(&format!("of {len} "))), "{text}");
        }
    }
}

#[test]
fn different_calls_are_a_mismatch() {
    let errors = two_ranks(|comm| if comm.rank() == 0 { comm.all_gather(&mut [1.0; 9]) } else { comm.all_reduce(&mut [1.0; 9]) });
    assert!(errors.iter().all(|error| matches!(error, CommError::Mismatch(_))), "{errors:?}");
    let text = errors[0].to_string();
    assert!(text.contains("all-gather of 9") && text.contains("all-reduce of 9"), "{text}");
}

#[test]
fn different_roots_are_found_out_at_the_next_call() {
    let errors = two_ranks(|comm| {
        let mut bytes = vec![1, 2, 3];
        comm.broadcast(comm.rank(), &mut bytes)?;
        comm.all_reduce(&mut [1.0; 9])
    });
    assert!(errors.iter().all(|error| matches!(error, CommError::Mismatch(_))), "{errors:?}");
}
