//! `eremois backup`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use indicatif::HumanBytes;

use super::fail;
use super::progress::Progress;
use super::store::Care;
use crate::Result;
use crate::config::Sources;
use crate::store::backup::Consistency;
use crate::store::backup::key::{Key, Lock};
use crate::store::backup::write::{OnDamage, Written, back_up};

/// Write all of the store into one file, compressed and checksummed; a server may go on working on it.
///
/// With MongoDB the records that wait in this server's journal (database.path) are in it too.
/// Examples:
///   eremois backup --out store.backup --key-file passphrase.txt
///   eremois backup --out store.backup --recipient age1…      (`age-keygen` makes recipients and their secret keys)
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub struct BackupArgs {
    /// The file to write. It must not be there; it is when it is whole.
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// Encrypt with what this file holds: a passphrase in one line, or age's secret keys.
    #[arg(long, value_name = "FILE", conflicts_with = "recipient")]
    key_file: Option<PathBuf>,
    /// Encrypt for the holder of this recipient's secret key, which this machine need not have; may be repeated.
    #[arg(long, value_name = "age1…")]
    recipient: Vec<String>,
    /// Leave out what cannot be read, instead of ending without a backup.
    #[arg(long)]
    skip_damaged: bool,
}

/// Backs up. Exits 1 where it could not; then there is no file.
pub fn run(args: &BackupArgs, sources: &Sources) -> ExitCode {
    match write(args, sources) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => fail(&e),
    }
}

fn write(args: &BackupArgs, sources: &Sources) -> Result<()> {
    let care = Care::of(sources)?;
    let lock = match (&args.key_file, args.recipient.as_slice()) {
        (Some(path), _) => Key::read(path, "--key-file")?.lock(),
        (None, []) => Lock::Open,
        (None, recipients) => Lock::recipients(recipients)?,
    };
    let on_damage = if args.skip_damaged { OnDamage::LeaveOut } else { OnDamage::Fail };
    let mut from = care.place.read(care.runtime.handle())?;
    let progress = Progress::of_records("backup", from.count()?);
    let written = back_up(from, &args.out, &lock, on_damage, &mut |num| progress.set(num));
    drop(progress);
    let Written { num_records, num_pieces, digest, num_file_bytes, footer } = written?;
    println!(
        "{num_records} records of {} in {}, {}",
        care.place.words(),
        args.out.display(),
        HumanBytes(num_file_bytes)
    );
    println!("checksum {digest}; {}", footer.consistency);
    if num_pieces > 0 {
        println!("with {num_pieces} tasks, documents and parts of files of background work");
    }
    if footer.consistency == Consistency::Ranges {
        println!("what was written meanwhile may be in it, or may not");
    }
    if footer.num_from_journal > 0 {
        println!("{} of them come from the journal", footer.num_from_journal);
    }
    if footer.num_damaged > 0 {
        println!("{} could not be read and are not in it: `eremois verify` names them", footer.num_damaged);
    }
    if lock.is_open() {
        println!("it is not encrypted: whoever has the file can read it (--key-file, --recipient)");
    }
    Ok(())
}
