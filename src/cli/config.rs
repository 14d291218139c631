//! `eremois config`: the settings shown and checked.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;

use super::fail;
use crate::config::{Sources, show};

/// What `eremois config` can do.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Print every setting as commented TOML: meaning, default, current value and where it comes from.
    Show,
    /// Check the settings whole and report all faults; exits 1 if there are any.
    Check {
        /// The file to check, instead of the one the server would read.
        file: Option<PathBuf>,
    },
    /// Print the reference of all settings as Markdown (docs/config.md is made from it).
    #[command(hide = true)]
    Reference,
}

/// Runs one of them.
pub fn run(command: ConfigCommand, mut sources: Sources) -> ExitCode {
    match command {
        ConfigCommand::Show => match sources.load() {
            Ok(loaded) => print!("{}", show::toml(&loaded)),
            Err(e) => return fail(&e),
        },
        ConfigCommand::Check { file } => {
            sources.file = file.or(sources.file);
            match sources.load() {
                Ok(_) => println!("the settings are sound ({})", read_from(&sources)),
                Err(e) => return fail(&e),
            }
        }
        ConfigCommand::Reference => print!("{}", show::markdown()),
    }
    ExitCode::SUCCESS
}

fn read_from(sources: &Sources) -> String {
    let path = sources.path().display();
    if sources.file.is_some() || sources.path().exists() { format!("{path}") } else { format!("there is no {path}") }
}
