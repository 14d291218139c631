//! How far a long run has come: a bar on a terminal, nothing elsewhere.

use std::io::IsTerminal as _;

use indicatif::{ProgressBar, ProgressStyle};

/// Drawn until it is dropped.
pub struct Progress(Option<ProgressBar>);

impl Progress {
    /// Begins at 0 of about so many records; of 0 where nobody knows.
    pub fn of_records(what: &'static str, total: u64) -> Self {
        if !std::io::stderr().is_terminal() {
            return Self(None);
        }
        let template = match total {
            0 => "{msg:10} {spinner} {pos:>10} records {per_sec:>12}",
            _ => "{msg:10} {wide_bar} {pos:>10}/{len} records {per_sec:>12} {eta:>5}",
        };
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        Self(Some(ProgressBar::new(total).with_style(style).with_message(what)))
    }

    /// What [`crate::store::backup`] tells.
    pub fn set(&self, num_records: u64) {
        if let Some(bar) = &self.0 {
            bar.set_position(num_records);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}
