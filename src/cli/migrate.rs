//! `eremois migrate`.

use std::process::ExitCode;

use clap::Args;

use super::store::Care;
use super::{FAILURE, fail};
use crate::Result;
use crate::config::Sources;
use crate::store::Migrated;

/// Bring the store to this program's schema: tables or collections, and every index.
///
/// A server does so itself when it starts. This is for doing it beforehand, or for looking what there is to do.
/// An embedded store that a server works on is left alone: stop the server, or have it do it at its next start.
#[derive(Debug, Args)]
pub struct MigrateArgs {
    /// Change nothing, and exit 1 when there is something to do. Works beside a server.
    #[arg(long)]
    check: bool,
}

/// Migrates, or looks. Exits 1 where it could not, or where `--check` found something to do.
pub fn run(args: &MigrateArgs, sources: &Sources) -> ExitCode {
    match migrate(args, sources) {
        Ok(code) => code,
        Err(e) => fail(&e),
    }
}

fn migrate(args: &MigrateArgs, sources: &Sources) -> Result<ExitCode> {
    let care = Care::of(sources)?;
    let (runtime, words) = (care.runtime.handle(), care.place.words());
    let Migrated { from, to, changes } = match args.check {
        true => care.place.pending(runtime)?,
        false => care.place.migrate(runtime)?,
    };
    let lead = if args.check { "to do: " } else { "" };
    changes.iter().for_each(|change| println!("{lead}{change}"));
    match (changes.is_empty(), args.check) {
        (true, _) => println!("{words} is as it must be, at schema version {to}"),
        (false, true) => {
            println!("{words} is at schema version {from} of {to}: {} to do", changes.len());
            return Ok(ExitCode::from(FAILURE));
        }
        (false, false) => println!("{words} was brought from schema version {from} to {to}"),
    }
    Ok(ExitCode::SUCCESS)
}
