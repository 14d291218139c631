//! `eremois cache`: the cache of results.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use jiff::{SignedDuration, Timestamp};

use super::fail;
use super::progress::Progress;
use super::store::Care;
use crate::app::warm;
use crate::config::Sources;
use crate::inference::warm::{Range, Warmed};
use crate::{Error, Result};

/// Records read where neither a number nor a time is said.
const LIMIT: usize = 10_000;

/// What `eremois cache` can do.
#[derive(Debug, Subcommand)]
pub enum CacheCommand {
    /// Fill the Redis of cache.url with recorded results, newest first, so that servers find them instead of computing.
    ///
    /// Used are records with their whole input (database.store_input = "full") that the model as it is served now has
    /// computed: same files, same kind of device, same release. A server works on meanwhile. The cache in a server's own
    /// process is filled when it starts: cache.warm.
    Warm(WarmArgs),
}

/// How far back.
#[derive(Debug, Args)]
pub struct WarmArgs {
    /// Only records made within this time, as 7d or 12h.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    last: Option<Duration>,
    /// At most the newest so many records [default: 10000, with --last all of that time].
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
}

/// Runs one of them.
pub fn run(command: &CacheCommand, sources: &Sources) -> ExitCode {
    let CacheCommand::Warm(args) = command;
    match fill(args, sources) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => fail(&e),
    }
}

fn fill(args: &WarmArgs, sources: &Sources) -> Result<()> {
    let care = Care::of(sources)?;
    let from = args.last.map(from).transpose()?;
    let limit = args.limit.unwrap_or(if from.is_some() { usize::MAX } else { LIMIT });
    let total = args.limit.or(from.is_none().then_some(LIMIT)).unwrap_or(0);
    let progress = Progress::of_records("cache warm", total as u64);
    let tell = |warmed: &Warmed| progress.set(warmed.num_records);
    let warmed = care.runtime.block_on(warm::once(&care.settings, &care.place, Range { limit, from }, &tell));
    drop(progress);
    let Warmed { num_records, num_items, num_of_others, num_without_input, num_unlike } = warmed?;
    println!("{num_items} results of {num_records} records are in Redis, for {:?}", care.settings.cache.ttl);
    for (num, what) in [
        (num_of_others, "are of a model, a version or files that are not served now"),
        (num_without_input, "have no input that was kept whole"),
        (num_unlike, "do not agree with themselves or with the model"),
    ] {
        if num > 0 {
            println!("{num} records {what}");
        }
    }
    Ok(())
}

fn from(last: Duration) -> Result<Timestamp> {
    let back = SignedDuration::try_from(last).ok().and_then(|last| Timestamp::now().checked_sub(last).ok());
    back.ok_or_else(|| Error::Invalid {
        field: "--last".to_string(),
        reason: "longer than there has been time".to_string(),
    })
}
