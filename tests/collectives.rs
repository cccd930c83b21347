//! The collectives: plans judged as data, then runs with exact numbers, then faults.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::time::Duration;

use carrousel::comm::plan::{
    Action, Plan, broadcast, owned_segment, ring_all_gather, ring_all_gather_of, ring_all_reduce, ring_reduce_scatter, segments,
};
use carrousel::comm::{CommError, Communicator, Operation, Options, group};
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

/// Plays the plans of all ranks against each other; an error says what does not fit.
fn play(plans: &[Plan], len: usize) -> Result<Outcome, String> {
    let world = plans.len();
    let steps = || plans.iter().flat_map(|plan| &plan.steps);
    let transfers = || steps().flat_map(|step| [&step.send, &step.recv]).flatten();
    let mut cuts = BTreeSet::from([0, len]);
    for transfer in transfers() {
        if transfer.segment.start > transfer.segment.end || transfer.segment.end > len {
            return Err(format!("segment {:?} does not lie in 0..{len}", transfer.segment));
        }
        if transfer.peer >= world {
            return Err(format!("there is no rank {}", transfer.peer));
        }
        cuts.extend([transfer.segment.start, transfer.segment.end]);
    }
    let cuts: Vec<usize> = cuts.into_iter().collect();
    let stretches: Vec<Range<usize>> = cuts.windows(2).map(|cut| cut[0]..cut[1]).collect();
    let within = |segment: &Range<usize>| {
        let of_cut = |at: usize| cuts.binary_search(&at).expect("every bound is a cut");
        of_cut(segment.start)..of_cut(segment.end)
    };
    let mut held: Vec<Vec<Held>> = (0..world).map(|rank| vec![Held::own(rank, world); stretches.len()]).collect();
    let mut n_additions = vec![0; stretches.len()];
    let mut links = vec![VecDeque::new(); world * world];
    let mut next_step = vec![0; world];
    let mut has_sent = vec![false; world];
    loop {
        let mut moved = false;
        for rank in 0..world {
            let Some(step) = plans[rank].steps.get(next_step[rank]) else { continue };
            if let (Some(send), Some(recv)) = (&step.send, &step.recv)
                && send.segment.start.max(recv.segment.start) < send.segment.end.min(recv.segment.end)
            {
                return Err(format!("rank {rank} receives into the segment that it sends: {:?}, {:?}", send.segment, recv.segment));
            }
            if let Some(send) = &step.send
                && !has_sent[rank]
            {
                links[rank * world + send.peer].push_back((send.segment.clone(), held[rank][within(&send.segment)].to_vec()));
                has_sent[rank] = true;
                moved = true;
            }
            if let Some(recv) = &step.recv {
                let Some((segment, values)) = links[recv.peer * world + rank].pop_front() else { continue };
                if segment != recv.segment {
                    return Err(format!("rank {rank} expects {:?} of rank {}, which sends {segment:?}", recv.segment, recv.peer));
                }
                for (stretch, theirs) in within(&segment).zip(values) {
                    let mine = &mut held[rank][stretch];
                    match step.action {
                        Action::Copy => *mine = theirs,
                        Action::Accumulate => {
                            mine.parts.iter_mut().zip(&theirs.parts).for_each(|(mine, theirs)| *mine += theirs);
                            mine.formula = format!("({}+{})", theirs.formula, mine.formula);
                            n_additions[stretch] += 1;
                        }
                    }
                }
            }
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

/// Every stretch that `holders` names is the sum of all ranks, each once, added up `world - 1` times in all.
fn check_sums(outcome: &Outcome, world: usize, holds: impl Fn(usize, &Range<usize>) -> bool) -> Result<(), String> {
    for (idx, stretch) in outcome.stretches.iter().enumerate().filter(|(_, stretch)| !stretch.is_empty()) {
        if outcome.n_additions[idx] != world - 1 {
            return Err(format!("elements {stretch:?} are added {} times, not {}", outcome.n_additions[idx], world - 1));
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
    play(plans, len).and_then(|outcome| check_sums(&outcome, plans.len(), |_, _| true))
}

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
fn reduce_scatter_plans_sum_every_element_once_at_its_owner() {
    for world in WORLDS {
        for len in plan_lens(world) {
            let plans = plans(world, len, ring_reduce_scatter);
            let outcome = play(&plans, len).unwrap();
            let owns = |rank, stretch: &Range<usize>| {
                let own = owned_segment(world, rank, len);
                own.start <= stretch.start && stretch.end <= own.end
            };
            check_sums(&outcome, world, owns).unwrap();
            for (rank, plan) in plans.iter().enumerate() {
                assert_eq!(plan.steps.len(), world - 1);
                assert_eq!(plan.n_sent(), len - owned_segment(world, rank, len).len());
            }
        }
    }
}

#[test]
fn all_gather_plans_bring_every_owners_segment_to_all() {
    for world in WORLDS {
        for len in plan_lens(world) {
            let plans = plans(world, len, ring_all_gather);
            assert!(plans.iter().all(|plan| plan.steps.len() == world - 1));
            let outcome = play(&plans, len).unwrap();
            for (idx, stretch) in outcome.stretches.iter().enumerate().filter(|(_, stretch)| !stretch.is_empty()) {
                let owner = segments(world, len).iter().position(|segment| segment.contains(&stretch.start)).unwrap();
                assert!(outcome.held.iter().all(|held| held[idx] == Held::own(owner, world)), "{world} ranks, {len}, {stretch:?}");
            }
        }
    }
}

#[test]
fn all_reduce_plans_sum_every_element_once_in_one_order_at_all_ranks() {
    for world in WORLDS {
        for len in plan_lens(world) {
            let plans = plans(world, len, ring_all_reduce);
            check_all_reduce(&plans, len).unwrap();
            assert!(plans.iter().all(|plan| plan.steps.len() == 2 * (world - 1)));
            // All ranks together send 2(P-1) S; each its share of it, but for the unevenness of two segments.
            assert_eq!(plans.iter().map(Plan::n_sent).sum::<usize>(), 2 * (world - 1) * len);
            let share = 2 * (world - 1) * len / world;
            assert!(plans.iter().all(|plan| plan.n_sent().abs_diff(share) <= 2 * BLOCK));
        }
    }
}

#[test]
fn all_gather_plans_take_segments_of_any_length() {
    let segments = [0..0, 0..100_000, 100_000..100_000, 100_000..100_001, 100_001..200_000];
    let plans: Vec<Plan> = (0..segments.len()).map(|rank| ring_all_gather_of(rank, &segments)).collect();
    let outcome = play(&plans, 200_000).unwrap();
    for (idx, stretch) in outcome.stretches.iter().enumerate() {
        let owner = segments.iter().position(|segment| segment.contains(&stretch.start)).unwrap();
        assert!(outcome.held.iter().all(|held| held[idx] == Held::own(owner, segments.len())));
    }
}

#[test]
fn broadcast_plans_bring_the_roots_message_to_all_down_a_chain() {
    for world in WORLDS {
        for root in 0..world {
            for len in [0, 1, 10, 11, 99] {
                let plans: Vec<Plan> = (0..world).map(|rank| broadcast(world, rank, root, len, 10)).collect();
                let outcome = play(&plans, len).unwrap();
                assert!(outcome.stretches.iter().enumerate().filter(|(_, stretch)| !stretch.is_empty()).all(|(idx, _)| {
                    outcome.held.iter().all(|held| held[idx] == Held::own(root, world)) && outcome.n_additions[idx] == 0
                }));
                let n_steps = if world == 1 { 0 } else { len.div_ceil(10).max(1) + world - 2 };
                assert!(plans.iter().all(|plan| plan.steps.len() == n_steps));
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
    let missing = fault(&|plans| plans[2].steps[1].send = None);
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
    let copied = fault(&|plans| plans.iter_mut().for_each(|plan| plan.steps[2].action = Action::Copy));
    assert!(copied.contains("times"), "{copied}");
    let twice = fault(&|plans| plans.iter_mut().for_each(|plan| plan.steps[4].action = Action::Accumulate));
    assert!(twice.contains("times"), "{twice}");
    let unsent = fault(&|plans| {
        plans[3].steps.pop();
    });
    assert!(unsent.contains("rank 0 waits in step 5"), "{unsent}");
    let unread = fault(&|plans| plans[3].steps[5].recv = None);
    assert!(unread.contains("nobody receives"), "{unread}");
    let outside = fault(&|plans| plans[1].steps[0].send.as_mut().unwrap().segment.end = 40_001);
    assert!(outside.contains("0..40000"), "{outside}");
}

// Runs.

/// Long enough for a loaded machine; no test that succeeds waits for it.
const PATIENT: Options = Options { deadline: Duration::from_secs(120), generation: 0 };

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
fn all_reduce_sums_exactly_at_every_world_and_length() {
    for world in WORLDS {
        let sent = on_ranks(group(world, PATIENT), |mut comm| {
            // Back to back on one group.
            for len in run_lens(world) {
                let mut data = exact_data(comm.rank(), len);
                comm.all_reduce(&mut data).unwrap();
                assert!(data == exact_sum(world, len), "rank {} of {world}, {len} floats", comm.rank());
            }
            assert_eq!(comm.world(), world);
            comm.bytes_sent()
        });
        for (rank, sent) in sent.into_iter().enumerate() {
            let planned: usize = run_lens(world).into_iter().map(|len| ring_all_reduce(world, rank, len).n_sent()).sum();
            assert_eq!(sent, 4 * planned as u64);
        }
    }
}

#[test]
fn reduce_scatter_completes_the_own_segment_and_all_gather_brings_it_to_all() {
    for world in WORLDS {
        on_ranks(group(world, PATIENT), |mut comm| {
            for len in run_lens(world) {
                let sum = exact_sum(world, len);
                let mut data = exact_data(comm.rank(), len);
                let own = comm.reduce_scatter(&mut data).unwrap();
                assert_eq!(own, owned_segment(world, comm.rank(), len));
                assert!(data[own.clone()] == sum[own.clone()], "rank {} of {world}, {len} floats", comm.rank());
                // What is not the own segment may be anything.
                data[..own.start].fill(f32::NAN);
                data[own.end..].fill(f32::NAN);
                comm.all_gather(&mut data).unwrap();
                assert!(data == sum, "rank {} of {world}, {len} floats", comm.rank());
            }
        });
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
        let total: usize = (0..world).map(len).sum();
        for (rank, sent) in sent.into_iter().enumerate() {
            let lengths = 3 * 8 * (world - 1);
            assert_eq!(sent, (total - len((rank + 1) % world) + lengths) as u64);
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
    let n_rounds_that_allocate = on_ranks(group(WORLD, PATIENT), |mut comm| {
        let mut data = vec![1.0; 100_000];
        let mut round = |comm: &mut Communicator| {
            let before = n_allocations();
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
    // The two channels that a rank waits on may meet their first wait only now, where the machine was busy; a call that allocated
    // would do so in every round.
    assert!(n_rounds_that_allocate.iter().all(|n| *n <= 2), "{n_rounds_that_allocate:?} of {N_ROUNDS} rounds");
}

// Faults.

#[test]
fn a_world_of_one_needs_nobody() {
    let mut comm = group(1, Options { deadline: Duration::ZERO, generation: 7 }).remove(0);
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
        let mut ranks = group(4, Options { deadline, generation: 0 });
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
    let mut ranks = group(2, Options { deadline, generation: 0 });
    let mut late = ranks.remove(1);
    on_ranks(ranks, |mut comm| comm.all_reduce(&mut [1.0; 5]).unwrap_err());
    let error = late.all_reduce(&mut [1.0; 5]).unwrap_err();
    assert_eq!(error, CommError::Timeout { waiting_for: 1, what: Operation::AllReduce, after: deadline });
}

#[test]
fn a_rank_that_is_dropped_is_named_by_all_long_before_the_deadline() {
    for rounds_before in [0, 2] {
        // The test ends because nobody waits: the deadline is a day.
        let errors = on_ranks(group(4, Options { deadline: Duration::from_secs(86_400), generation: 0 }), |mut comm| {
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
    let mut ranks = group(2, Options { deadline: Duration::from_secs(86_400), generation: 0 });
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
