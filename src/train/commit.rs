//! When a step happens: on all living ranks or on none; who is living, and who holds what a lost rank held. State machines without I/O.
//!
//! Each rank reports that it holds all that the update needs, or what kept it. The step commits when every rank has reported well; something
//! that is not finite aborts it everywhere; a rank that is lost, or that has no memory for its share, has it repeated by the others, from
//! where it began: until the commit nobody overwrites anything. Reports of another generation (from before the membership changed) do not count.

/// What a rank tells of its part of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// It holds all that the update needs.
    Well,
    /// Something was not finite, on this rank or in the sums.
    NonFinite,
    /// Another rank did not do its part, this one is well; `late` is the rank that lives but was not there in time, where that was it.
    Missed { late: Option<usize> },
    /// Its device has no memory for its share.
    NoMemory,
    /// Its device or its thread failed.
    Lost,
}

/// What all ranks are to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    Commit,
    Abort,
    /// Forget the step and take it once more: without the ranks that are lost, with less for those that are cramped.
    Repeat {
        lost: Vec<usize>,
        cramped: Vec<usize>,
    },
}

/// One step's reports.
#[derive(Debug)]
pub struct StepCommit {
    generation: u64,
    /// By rank.
    reports: Vec<Option<Report>>,
}

impl StepCommit {
    /// A step of `world` ranks in this generation of the membership.
    pub fn new(world: usize, generation: u64) -> Self {
        Self { generation, reports: vec![None; world] }
    }

    /// Takes a report; a rank's first counts, and only one of the step's generation.
    pub fn report(&mut self, rank: usize, generation: u64, report: Report) {
        if let Some(slot) = self.reports.get_mut(rank).filter(|slot| slot.is_none() && generation == self.generation) {
            *slot = Some(report);
        }
    }

    /// Whether others say that this rank was not there in time. Nobody waits for its report any more.
    pub fn is_late(&self, rank: usize) -> bool {
        self.reports.contains(&Some(Report::Missed { late: Some(rank) }))
    }

    /// The decision, once every rank has reported that is not late.
    pub fn decision(&self) -> Option<Decision> {
        if self.missing().next().is_some() {
            return None;
        }
        let ranks = |wanted: &dyn Fn(usize) -> bool| (0..self.reports.len()).filter(|&rank| wanted(rank)).collect::<Vec<_>>();
        let lost = ranks(&|rank| self.reports[rank] == Some(Report::Lost) || self.is_late(rank));
        let cramped = ranks(&|rank| self.reports[rank] == Some(Report::NoMemory) && !lost.contains(&rank));
        let is_whole = self.reports.iter().flatten().all(|report| matches!(report, Report::Well | Report::NonFinite));
        Some(if !is_whole {
            Decision::Repeat { lost, cramped }
        } else if self.reports.contains(&Some(Report::NonFinite)) {
            Decision::Abort
        } else {
            Decision::Commit
        })
    }

    /// Ranks whose reports are still waited for.
    pub fn missing(&self) -> impl Iterator<Item = usize> {
        let missing = self.reports.iter().enumerate().filter(|(_, report)| report.is_none()).map(|(rank, _)| rank);
        missing.filter(|&rank| !self.is_late(rank))
    }
}

/// Who is in the ring. A seat is a device's place in the list that the run began with; ranks are the living ones in that order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    generation: u64,
    n_seats: usize,
    /// By rank: the seat.
    living: Vec<usize>,
}

impl Membership {
    /// All of them, in the first generation.
    pub fn new(n_seats: usize) -> Self {
        Self { generation: 0, n_seats, living: (0..n_seats).collect() }
    }

    /// Changes with every change of the ring; what carries another one is not of this ring.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    pub fn world(&self) -> usize {
        self.living.len()
    }

    /// The seat of a rank.
    pub fn seat(&self, rank: usize) -> Option<usize> {
        self.living.get(rank).copied()
    }

    /// Seats that are empty.
    pub fn absent(&self) -> impl Iterator<Item = usize> {
        (0..self.n_seats).filter(|seat| !self.living.contains(seat))
    }

    /// Takes ranks out; those behind them move up. A new generation begins, also if none is taken out: links that broke are made anew.
    pub fn lose(&mut self, ranks: &[usize]) {
        self.generation += 1;
        let mut rank = 0;
        self.living.retain(|_| {
            rank += 1;
            !ranks.contains(&(rank - 1))
        });
    }

    /// Takes a seat back in; its rank. A new generation begins.
    pub fn admit(&mut self, seat: usize) -> usize {
        self.generation += 1;
        let rank = self.living.partition_point(|&living| living < seat);
        if seat < self.n_seats && self.living.get(rank) != Some(&seat) {
            self.living.insert(rank, seat);
        }
        rank
    }
}

/// Where owners update, each rank's optimizer segments have a copy at the next one. By owner: the living rank that holds its segments; or the
/// first rank that was lost together with its copy.
///
/// # Errors
/// That rank.
pub fn holders(world: usize, lost: &[usize]) -> Result<Vec<usize>, usize> {
    let is_lost = |rank: usize| lost.contains(&rank);
    let holder = |rank: usize| [rank, (rank + 1) % world].into_iter().find(|&rank| !is_lost(rank)).ok_or(rank);
    (0..world).map(holder).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORTS: [Report; 7] = [
        Report::Well,
        Report::NonFinite,
        Report::Missed { late: None },
        Report::Missed { late: Some(0) },
        Report::Missed { late: Some(2) },
        Report::NoMemory,
        Report::Lost,
    ];
    const ORDERS: [[usize; 3]; 6] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];

    /// Every three reports.
    fn all() -> impl Iterator<Item = [Report; 3]> {
        REPORTS.into_iter().flat_map(|a| REPORTS.into_iter().flat_map(move |b| REPORTS.into_iter().map(move |c| [a, b, c])))
    }

    #[test]
    fn a_step_commits_only_when_all_ranks_have_reported_well_whatever_the_order() {
        for reports in all() {
            for order in ORDERS {
                let mut commit = StepCommit::new(3, 3);
                let mut decided = None;
                for rank in order {
                    assert!(decided.is_none() || commit.is_late(rank), "{reports:?}: decided before rank {rank} reported");
                    commit.report(rank, 3, reports[rank]);
                    decided = commit.decision();
                }
                let decision = decided.expect("all have reported");
                let all_are = |wanted: &[Report]| reports.iter().all(|report| wanted.contains(report));
                match &decision {
                    Decision::Commit => assert!(all_are(&[Report::Well]), "{reports:?}"),
                    Decision::Abort => assert!(all_are(&[Report::Well, Report::NonFinite]) && !all_are(&[Report::Well]), "{reports:?}"),
                    Decision::Repeat { lost, cramped } => {
                        assert!(!all_are(&[Report::Well, Report::NonFinite]), "{reports:?}");
                        for (rank, report) in reports.iter().enumerate() {
                            let late = reports.contains(&Report::Missed { late: Some(rank) });
                            assert_eq!(lost.contains(&rank), late || *report == Report::Lost, "{reports:?}, rank {rank}");
                            assert_eq!(cramped.contains(&rank), !late && *report == Report::NoMemory, "{reports:?}, rank {rank}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn nobody_waits_for_a_rank_that_was_late_and_what_it_reports_then_changes_nothing() {
        let mut commit = StepCommit::new(3, 0);
        commit.report(0, 0, Report::Missed { late: Some(1) });
        assert_eq!(commit.missing().collect::<Vec<_>>(), [2]);
        commit.report(2, 0, Report::Missed { late: Some(1) });
        let decision = Decision::Repeat { lost: vec![1], cramped: vec![] };
        assert_eq!(commit.decision(), Some(decision.clone()));
        commit.report(1, 0, Report::Well);
        assert_eq!(commit.decision(), Some(decision));
    }

    #[test]
    fn reports_of_another_generation_and_second_reports_do_not_count() {
        let mut commit = StepCommit::new(2, 1);
        commit.report(0, 0, Report::Well);
        assert_eq!(commit.missing().count(), 2);
        commit.report(0, 1, Report::NonFinite);
        commit.report(0, 1, Report::Well);
        commit.report(1, 1, Report::Well);
        commit.report(7, 1, Report::Well);
        assert_eq!(commit.decision(), Some(Decision::Abort));
    }

    #[test]
    fn ranks_move_up_behind_one_that_is_lost_and_back_when_it_returns() {
        let mut ring = Membership::new(4);
        ring.lose(&[1, 2]);
        assert_eq!((ring.world(), ring.generation()), (2, 1));
        assert_eq!([ring.seat(0), ring.seat(1), ring.seat(2)], [Some(0), Some(3), None]);
        assert_eq!(ring.absent().collect::<Vec<_>>(), [1, 2]);
        assert_eq!(ring.admit(2), 1);
        assert_eq!([ring.seat(0), ring.seat(1), ring.seat(2)], [Some(0), Some(2), Some(3)]);
        ring.lose(&[]);
        assert_eq!((ring.world(), ring.generation()), (3, 3), "links are made anew though nobody is lost");
        // One that is there already, or never was, changes nothing but the generation.
        ring.admit(3);
        ring.admit(9);
        assert_eq!((ring.world(), ring.generation()), (3, 5));
    }

    #[test]
    fn every_segment_has_a_holder_unless_two_neighbours_are_lost_at_once() {
        assert_eq!(holders(3, &[]), Ok(vec![0, 1, 2]));
        assert_eq!(holders(3, &[1]), Ok(vec![0, 2, 2]));
        assert_eq!(holders(2, &[1]), Ok(vec![0, 0]));
        assert_eq!(holders(4, &[3, 1]), Ok(vec![0, 2, 2, 0]));
        assert_eq!(holders(4, &[1, 2]), Err(1));
        assert_eq!(holders(4, &[0, 3]), Err(3));
        assert_eq!(holders(1, &[0]), Err(0));
    }
}
