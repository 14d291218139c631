//! `eremois serve`.

use std::process::ExitCode;

use super::fail;
use crate::app::logs;
use crate::config::Sources;

/// Serves until a signal.
pub fn run(sources: Sources) -> ExitCode {
    let loaded = match sources.load() {
        Ok(loaded) => loaded,
        Err(e) => return fail(&e),
    };
    let _logs = logs::install(&loaded.settings.log);
    ExitCode::SUCCESS
}
