//! Where a store is, from plain values, and what can be done there without serving: looked at beside a server, migrated,
//! filled.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::runtime::Handle;

use super::backup::merged::Merged;
use super::embedded::Embedded;
use super::embedded::beside::Beside;
use super::journal::look::View;
use super::mongo::snapshot::Snapshot;
use super::mongo::{MongoSettings, MongoStore};
use super::work::Work;
use super::{Migrated, Records};
use crate::Result;

/// A store to write to.
pub struct Opened {
    pub records: Arc<dyn Records>,
    /// The same store.
    pub work: Arc<dyn Work>,
}

impl Opened {
    fn of<T: Records + Work>(store: T) -> Self {
        let store = Arc::new(store);
        Self { records: store.clone(), work: store }
    }
}

/// A store that may be in use.
#[derive(Debug, Clone)]
pub enum Place {
    /// Its folder.
    Embedded(PathBuf),
    Mongo {
        settings: MongoSettings,
        /// The folder of this server's journal, which need not be there.
        journal: PathBuf,
    },
}

impl Place {
    /// What people call it.
    pub fn words(&self) -> String {
        match self {
            Self::Embedded(folder) => format!("the embedded store in {}", folder.display()),
            Self::Mongo { .. } => "MongoDB".to_string(),
        }
    }

    /// What [`Place::migrate`] would do. Changes nothing, also where a server is at work.
    ///
    /// Blocks: for the database. `runtime` is where its calls are made; this and all others must not be called on one of its
    /// threads.
    /// Errors: as [`Records`]; [`crate::Error::Config`] for a place that is no store.
    pub fn pending(&self, runtime: &Handle) -> Result<Migrated> {
        match self {
            Self::Embedded(folder) => Embedded::pending(folder),
            Self::Mongo { settings, .. } => {
                let store = MongoStore::new(settings.clone())?;
                runtime.block_on(store.pending())
            }
        }
    }

    /// Brings the store to the present schema, and makes it where there is none. Returns what was done.
    ///
    /// Blocks: as long as that takes. Errors: as [`Place::pending`]; an embedded store that a server works on is
    /// [`crate::Error::Config`] naming that.
    pub fn migrate(&self, runtime: &Handle) -> Result<Migrated> {
        match self {
            Self::Embedded(folder) => Embedded::migrate(folder),
            Self::Mongo { settings, .. } => {
                let store = MongoStore::new(settings.clone())?;
                runtime.block_on(store.migrate())
            }
        }
    }

    /// All records with what the journal holds, read beside a server.
    ///
    /// Blocks, and errors: as [`Place::pending`].
    pub fn read(&self, runtime: &Handle) -> Result<Merged> {
        match self {
            Self::Embedded(folder) => Ok(Merged::new(Box::new(Beside::open(folder)?.snapshot()?), None)),
            Self::Mongo { settings, journal } => {
                // The journal first: see `Merged::new`.
                let view = View::open(journal)?;
                let store = MongoStore::new(settings.clone())?;
                Ok(Merged::new(Box::new(Snapshot::open(&store, runtime.clone())?), view))
            }
        }
    }

    /// The store to write to. An embedded one is this process's alone for as long as it is held.
    ///
    /// Blocks, and errors: as [`Place::migrate`].
    pub fn open(&self) -> Result<Opened> {
        match self {
            Self::Embedded(folder) => Ok(Opened::of(Embedded::open(folder)?)),
            Self::Mongo { settings, .. } => Ok(Opened::of(MongoStore::new(settings.clone())?)),
        }
    }
}
