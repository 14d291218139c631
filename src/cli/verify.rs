//! `eremois verify`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use jiff::{SignedDuration, Timestamp};

use super::progress::Progress;
use super::store::{Care, KeyArgs};
use super::{FAILURE, fail};
use crate::Result;
use crate::config::Sources;
use crate::store::backup::verify::{Against, BackupReport, MAX_TOLD, Report, Told, verify};

/// Read every record of the store and compare: with the journal, and with a backup. Changes nothing; a server may go on.
///
/// Exits 1 naming what is wrong: records that cannot be read, tables that do not agree, damage of the journal, and records of
/// the backup that are not in the store, or are something else there.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// A backup whose records must be in the store, as they are in it or in a later state.
    #[arg(long, value_name = "FILE")]
    backup: Option<PathBuf>,
    #[command(flatten)]
    key: KeyArgs,
    /// Records of the backup may be missing: they were deleted, or their users erased. They are counted all the same.
    #[arg(long, requires = "backup")]
    allow_missing: bool,
}

/// Verifies. Exits 1 where something is wrong or could not be read.
pub fn run(args: &VerifyArgs, sources: &Sources) -> ExitCode {
    match check(args, sources) {
        Ok(code) => code,
        Err(e) => fail(&e),
    }
}

fn check(args: &VerifyArgs, sources: &Sources) -> Result<ExitCode> {
    let care = Care::of(sources)?;
    let key = args.key.read()?;
    let retention = SignedDuration::try_from(care.settings.database.retention).unwrap_or(SignedDuration::MAX);
    let expired_before = Some(retention).filter(|time| !time.is_zero());
    let expired_before = expired_before.and_then(|time| Timestamp::now().checked_sub(time).ok());
    let against = args.backup.as_ref().map(|path| Against { path, key: &key, expired_before });
    let mut from = care.place.read(care.runtime.handle())?;
    let progress = Progress::of_records("verify", from.count()?);
    let report = verify(from, against.as_ref(), &mut |num| progress.set(num));
    drop(progress);
    let report = report?;
    tell(&care.place.words(), args, &report);
    let is_sound = report.is_sound() || (args.allow_missing && report.faults.num == 0);
    println!("{}", if is_sound { "sound" } else { "NOT sound" });
    Ok(if is_sound { ExitCode::SUCCESS } else { ExitCode::from(FAILURE) })
}

fn tell(words: &str, args: &VerifyArgs, report: &Report) {
    let Report { num_records, digest, consistency, num_pieces, journal, backup, faults } = report;
    println!("{words}: {num_records} records can be read, {consistency}");
    println!("checksum {digest}");
    if *num_pieces > 0 {
        println!("{num_pieces} tasks, documents and parts of files of background work can be read");
    }
    if let Some(journal) = journal {
        let (held, waiting) = (journal.num_in_store, journal.num_waiting);
        println!("journal: of {} changes {held} are in the store, {waiting} wait to be replayed", held + waiting);
        if journal.num_torn > 0 {
            println!("journal: {} ends of segments are no entries: under way, or left by a crash", journal.num_torn);
        }
    }
    if let (Some(path), Some(backup)) = (&args.backup, backup) {
        let BackupReport { header, num_records, digest, num_same, num_later, num_expired, missing } = backup;
        println!("{}: {num_records} records, made at {}, checksum {digest}", path.display(), header.created_at);
        println!("of them in the store: {num_same} the same, {num_later} in a later state; {num_expired} have expired");
        list(&format!("{} are not there", missing.num), missing);
    }
    list(&format!("{} faults", faults.num), faults);
}

fn list(title: &str, told: &Told) {
    if told.num == 0 {
        return;
    }
    println!("{title}:");
    told.first.iter().for_each(|line| println!("  {line}"));
    if told.num > MAX_TOLD as u64 {
        println!("  and {} more", told.num - MAX_TOLD as u64);
    }
}
