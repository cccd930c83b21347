//! The error of a person's own making, on whatever floor it is noticed.

/// What was asked for makes no sense, or cannot be had here; the text names it and the remedy. The program ends with exit code 2.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

impl UsageError {
    /// `Ok` if `fine`, else what `problem` says.
    ///
    /// # Errors
    /// See above.
    pub fn unless(fine: bool, problem: impl FnOnce() -> String) -> Result<(), Self> {
        if fine { Ok(()) } else { Err(Self(problem())) }
    }
}
