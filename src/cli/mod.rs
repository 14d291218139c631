//! The commands: thin, over the library.

pub mod backup;
pub mod bench;
pub mod cache;
pub mod config;
pub mod jobs;
pub mod migrate;
pub mod models;
mod progress;
pub mod restore;
pub mod serve;
mod store;
pub mod verify;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::config::Sources;
use crate::metrics::BUILD;

/// A model-serving server: embeddings over the OpenAI and text-embeddings-inference APIs.
///
/// Without a command it serves the models of the repository. Settings come from eremois.toml, from
/// EREMOIS_<SECTION>__<KEY> variables and from --set; `eremois config show` explains every one.
#[derive(Debug, Parser)]
#[command(name = "eremois", disable_version_flag = true)]
struct Cli {
    #[command(flatten)]
    global: Global,

    /// Print version, commit and features.
    #[arg(short = 'V', long)]
    version: bool,

    #[command(subcommand)]
    command: Option<Command>,
}

/// Where settings are read from; the same for every command.
#[derive(Debug, Args)]
struct Global {
    /// The settings file [default: eremois.toml, if there is one; or what EREMOIS_CONFIG names].
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,

    /// One setting, over file and environment; may be repeated. Example: --set ai.max_batch_size=8
    #[arg(long, global = true, value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the models of the repository (what no command does, too).
    Serve,
    /// Pull, import, list, verify and quantize models.
    #[command(subcommand)]
    Models(models::ModelsCommand),
    /// Show or check the settings.
    #[command(subcommand)]
    Config(config::ConfigCommand),
    /// List the batches of a server, or watch one.
    #[command(subcommand)]
    Jobs(jobs::JobsCommand),
    /// Bring the store to this program's schema, or look what there is to do.
    Migrate(migrate::MigrateArgs),
    /// Write all of the store into one file, while a server may work on it.
    Backup(backup::BackupArgs),
    /// Write what is in a backup into the store.
    Restore(restore::RestoreArgs),
    /// Read every record of the store and compare it with journal and backup.
    Verify(verify::VerifyArgs),
    /// Fill the cache of results from what was computed before.
    #[command(subcommand)]
    Cache(cache::CacheCommand),
    /// Put load on a server and measure it.
    Bench(Box<bench::BenchArgs>),
    /// Print version, commit and features.
    Version,
}

/// Exit status of a command that did what it was asked.
pub const SUCCESS: u8 = 0;

/// Exit status of a command that could not be carried out: a bad setting, a bad model, a port in use.
pub const FAILURE: u8 = 1;

/// Exit status of a server with a model whose last device is lost to its process: starting it anew helps. EX_TEMPFAIL of sysexits(3).
pub const RESTART: u8 = 75;

/// Runs what the process's arguments say.
///
/// Returns 0 for success, 1 for a failure told on standard error, 2 for wrong arguments. A server that must be started
/// anew ends the process itself, with 75.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.version {
        return version();
    }
    let sources = Sources::of_process(cli.global.config, cli.global.set);
    match cli.command.unwrap_or(Command::Serve) {
        Command::Serve => serve::run(sources),
        Command::Models(command) => models::run(command, &sources),
        Command::Config(command) => config::run(command, sources),
        Command::Jobs(command) => jobs::run(command),
        Command::Migrate(args) => migrate::run(&args, &sources),
        Command::Backup(args) => backup::run(&args, &sources),
        Command::Restore(args) => restore::run(&args, &sources),
        Command::Verify(args) => verify::run(&args, &sources),
        Command::Cache(command) => cache::run(&command, &sources),
        Command::Bench(args) => bench::run(&args),
        Command::Version => version(),
    }
}

fn version() -> ExitCode {
    println!("eremois {} (commit {}, features: {})", BUILD.version, BUILD.commit, BUILD.features);
    ExitCode::SUCCESS
}

/// Tells people what went wrong, one line a fault.
fn fail(error: &impl std::fmt::Display) -> ExitCode {
    for line in error.to_string().lines() {
        eprintln!("eremois: {line}");
    }
    ExitCode::from(FAILURE)
}
