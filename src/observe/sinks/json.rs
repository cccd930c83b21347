//! Events as JSON lines on standard output, for other programs.

use std::io::Write;

use crate::observe::{Event, Sink};

/// One JSON object a line, flushed after each, so that a reader at the other end of a pipe sees it at once.
pub struct Json {
    out: Box<dyn Write + Send>,
}

impl Json {
    /// JSON lines on standard output. A reader that goes away is an error of the sink, never a panic.
    pub fn stdout() -> Self {
        Self::to(Box::new(std::io::stdout()))
    }

    /// JSON lines to any writer.
    pub fn to(out: Box<dyn Write + Send>) -> Self {
        Self { out }
    }
}

impl Sink for Json {
    fn name(&self) -> String {
        "standard output".into()
    }

    fn event(&mut self, event: &Event) -> anyhow::Result<()> {
        // One write a line: a line is never torn between two buffers.
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        self.out.write_all(&line)?;
        self.out.flush()?;
        Ok(())
    }

    fn finish(&mut self) -> anyhow::Result<()> {
        Ok(self.out.flush()?)
    }
}
