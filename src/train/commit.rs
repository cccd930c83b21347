//! When a step happens: on all ranks or on none. A state machine without I/O.
//!
//! Each rank reports that it holds all that the update needs, or that something was not finite. The step commits when every rank has reported well;
//! one bad report aborts it everywhere. Reports of another generation (from before the membership changed) do not count.

/// What all ranks are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    Commit,
    Abort,
}

/// One step's reports.
#[derive(Debug)]
pub struct StepCommit {
    generation: u64,
    /// By rank: nothing yet, or whether all was well.
    reports: Vec<Option<bool>>,
}

impl StepCommit {
    /// A step of `world` ranks in this generation of the membership.
    pub fn new(world: usize, generation: u64) -> Self {
        Self { generation, reports: vec![None; world] }
    }

    /// Takes a report; a rank's first counts, and only one of the step's generation.
    pub fn report(&mut self, rank: usize, generation: u64, well: bool) {
        if let Some(slot) = self.reports.get_mut(rank).filter(|slot| slot.is_none() && generation == self.generation) {
            *slot = Some(well);
        }
    }

    /// The decision, once every rank has reported.
    pub fn decision(&self) -> Option<Decision> {
        let reports: Option<Vec<bool>> = self.reports.iter().copied().collect();
        reports.map(|r| if r.into_iter().all(|well| well) { Decision::Commit } else { Decision::Abort })
    }

    /// Ranks that have not reported.
    pub fn missing(&self) -> impl Iterator<Item = usize> {
        self.reports.iter().enumerate().filter(|(_, r)| r.is_none()).map(|(rank, _)| rank)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_commits_only_when_all_ranks_have_reported_well() {
        for world in 1..=4 {
            for bad in 0..=world {
                let mut commit = StepCommit::new(world, 3);
                for rank in 0..world {
                    assert_eq!(commit.decision(), None);
                    assert_eq!(commit.missing().next(), Some(rank));
                    commit.report(rank, 3, rank != bad);
                }
                assert_eq!(commit.decision(), Some(if bad == world { Decision::Commit } else { Decision::Abort }));
            }
        }
    }

    #[test]
    fn reports_of_another_generation_and_second_reports_do_not_count() {
        let mut commit = StepCommit::new(2, 1);
        commit.report(0, 0, true);
        assert_eq!(commit.missing().count(), 2);
        commit.report(0, 1, false);
        commit.report(0, 1, true);
        commit.report(1, 1, true);
        commit.report(7, 1, true);
        assert_eq!(commit.decision(), Some(Decision::Abort));
    }
}
