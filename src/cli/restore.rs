//! `eremois restore`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use jiff::Timestamp;

use super::fail;
use super::progress::Progress;
use super::store::{Care, KeyArgs};
use crate::config::Sources;
use crate::store::backup::restore::{Checked, Selected, Store, Target, Wanted, WantedWork, admit, check, restore};
use crate::{Error, Result};

/// Write what is in a backup into the store of the settings, whichever store the backup is of.
///
/// All of the file is read and checked before anything is written.
#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// The backup.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    #[command(flatten)]
    key: KeyArgs,
    /// Only what there was at this time, as far as records tell: RFC 3339, as 2026-11-25T12:00:00Z.
    ///
    /// Records made later are left out, and feedback given later. A record that was made before and ended after is left out
    /// as well: what it was at that time is not known. So is all background work. What was deleted before the backup does not come back.
    #[arg(long, value_name = "TIME")]
    until: Option<Timestamp>,
    /// Write into a store that has records. One of the same id is replaced, but never one that has ended by one that has
    /// not; feedback of both is kept. Also to go on with a restore that was interrupted.
    #[arg(long)]
    merge: bool,
    /// Leave background work out: tasks, batches and their files. Without this, what was accepted and not done by the time
    /// of the backup is done now, and clients are called back.
    #[arg(long)]
    without_work: bool,
    /// Check the backup, say what would be written, and write nothing.
    #[arg(long)]
    dry_run: bool,
}

/// Restores. Exits 1 where it could not.
pub fn run(args: &RestoreArgs, sources: &Sources) -> ExitCode {
    match write(args, sources) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => fail(&e),
    }
}

fn write(args: &RestoreArgs, sources: &Sources) -> Result<()> {
    let care = Care::of(sources)?;
    let key = args.key.read()?;
    let work = if args.without_work { WantedWork::None } else { WantedWork::All };
    let wanted = Wanted { until: args.until, work };
    let progress = Progress::of_records("check", 0);
    let checked = check(&args.file, &key, &wanted, &mut |num| progress.set(num));
    drop(progress);
    let checked = checked?;
    tell(args, &checked);
    let words = care.place.words();
    let num_records = checked.selected.num_records;
    if args.dry_run {
        println!("{num_records} records would be written into {words}; nothing was");
        return Ok(());
    }
    let (runtime, target) = (care.runtime.handle(), if args.merge { Target::Any } else { Target::Empty });
    let store = care.place.open()?;
    admit(runtime.block_on(store.records.count())?, target)?;
    let progress = Progress::of_records("restore", checked.num_records);
    let mut put = Store { runtime, store: &store };
    let written = restore(&args.file, &key, &wanted, &checked, &mut put, &mut |num| progress.set(num));
    drop(progress);
    written?;
    // Of a store that others write to meanwhile nobody knows how many it must have.
    let num_there = runtime.block_on(store.records.count())?;
    if target == Target::Empty && num_there < num_records {
        return Err(Error::Internal { cause: format!("{num_records} records were written, {num_there} are there") });
    }
    println!("{num_records} records are in {words}; `eremois verify --backup {}` compares", args.file.display());
    Ok(())
}

fn tell(args: &RestoreArgs, checked: &Checked) {
    let Checked { header, footer, num_records, digest, selected, .. } = checked;
    let (file, made, store) = (args.file.display(), header.created_at, &header.store);
    println!("{file} is whole: {num_records} records of a store `{store}`, made at {made} by {}", header.program);
    println!("checksum {digest}; {}", footer.consistency);
    if footer.num_damaged > 0 {
        println!("{} records or parts of that store could not be read and are not in it", footer.num_damaged);
    }
    let Selected { num_tasks, num_others, num_pieces_left_out, .. } = selected;
    if num_tasks + num_others > 0 {
        println!("{num_tasks} tasks, which go on, with {num_others} documents and parts of files");
    }
    if *num_pieces_left_out > 0 {
        println!("{num_pieces_left_out} tasks, documents and parts of files are left out");
    }
    let Some(until) = args.until else { return };
    let Selected { num_made_later, num_ended_later, num_without_feedback, .. } = selected;
    println!("until {until}: {num_made_later} records were made later and are left out");
    println!("{num_ended_later} were made before and ended later: what they were is not known, they are left out");
    println!("{num_without_feedback} are without feedback that was given later");
}
