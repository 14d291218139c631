//! What the commands that care for a store share: where it is, a runtime to reach it on, and keys.

use std::path::PathBuf;

use clap::Args;
use tokio::runtime::Runtime;

use crate::app::logs;
use crate::config::words::{DatabaseUrl, LogFilter};
use crate::config::{Database, Log, Settings, Sources};
use crate::store::backup::key::Key;
use crate::store::mongo::MongoSettings;
use crate::store::place::Place;
use crate::{Error, Result};

/// The store of the settings, and how to reach it.
pub struct Care {
    pub settings: Settings,
    pub place: Place,
    pub runtime: Runtime,
}

impl Care {
    /// Reads the settings. From here on warnings of the store are told on standard error.
    pub fn of(sources: &Sources) -> Result<Self> {
        let settings = sources.load()?.settings;
        // A command says itself what it did: of the log only what is wrong belongs beside it.
        logs::install(&Log { filter: LogFilter("warn".to_string()), ..settings.log.clone() });
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.map_err(|e| Error::Internal { cause: format!("no threads to work on: {e}") })?;
        Ok(Self { place: place(&settings.database), settings, runtime })
    }
}

/// The store of these settings.
fn place(database: &Database) -> Place {
    match &database.url {
        DatabaseUrl::Embedded => Place::Embedded(database.path.clone()),
        DatabaseUrl::Mongo(url) => Place::Mongo {
            settings: MongoSettings {
                url: url.clone(),
                pool_size: database.pool_size,
                replica_set: database.replica_set.clone(),
                retention: database.retention,
            },
            journal: database.path.join("journal"),
        },
    }
}

/// What opens a backup.
#[derive(Debug, Args)]
pub struct KeyArgs {
    /// A file with the passphrase, or with age's secret keys, that the backup was made with.
    #[arg(long, value_name = "FILE", conflicts_with = "identity")]
    key_file: Option<PathBuf>,
    /// A file with age's secret keys (AGE-SECRET-KEY-1…), one of whose recipients the backup was made for.
    #[arg(long, value_name = "FILE")]
    identity: Option<PathBuf>,
}

impl KeyArgs {
    /// Errors: those of [`Key::read`]; [`Error::Invalid`] for an identity file that holds a passphrase.
    pub fn read(&self) -> Result<Key> {
        match (&self.key_file, &self.identity) {
            (Some(path), _) => Key::read(path, "--key-file"),
            (None, None) => Ok(Key::None),
            (None, Some(path)) => match Key::read(path, "--identity")? {
                key @ Key::Identities(_) => Ok(key),
                Key::Passphrase(_) | Key::None => Err(Error::Invalid {
                    field: "--identity".to_string(),
                    reason: format!("{}: it holds no secret key of age; a passphrase is a --key-file", path.display()),
                }),
            },
        }
    }
}
