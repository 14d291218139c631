//! The store of the settings, and what keeps results in it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::config::words::{DatabaseUrl, RecordScope, StoreInput};
use crate::config::{Database, Settings};
use crate::inference::Inferences;
use crate::inference::keep::{KeepSettings, Keeper, KeptInput, Scope};
use crate::store::durable::{Durable, Options, State};
use crate::store::embedded::Embedded;
use crate::store::memory::Memory;
use crate::store::mongo::{MongoSettings, MongoStore};
use crate::store::open::{self, Expiry};
use crate::store::record::Record;
use crate::store::work::Work;
use crate::store::work::memory::MemoryWork;
use crate::{Error, Result};

/// What is kept, and what keeps it tidy for as long as it is held.
pub struct Kept {
    pub keeper: Arc<Keeper>,
    /// Background work, in the same store.
    pub work: Arc<dyn Work>,
    /// Deletes old records of the embedded store; MongoDB does so itself.
    _expiry: Option<Expiry>,
    /// Forgets what replays erase. It holds the keeper, whose store holds the other end of its channel: it is ended with
    /// this, or neither would.
    forgetting: JoinHandle<()>,
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.forgetting.abort();
    }
}

/// Opens the store of these settings. MongoDB may be away: results go to the journal until it is there.
///
/// Blocks: opening files and migrations of the embedded store, off the async threads.
/// Errors: [`Error::Config`] for a folder that cannot be used or a connection string that is none.
pub async fn build(inferences: &Arc<Inferences>, settings: &Settings) -> Result<Kept> {
    let database = &settings.database;
    let (erased, to_forget) = mpsc::unbounded_channel();
    let Opened { records: store, work, expiry } = match (database.record, mongo_settings(database)) {
        // Nothing is written, so no folder is made either.
        (RecordScope::None, _) => Opened {
            records: Durable::local(Arc::new(Memory::default())),
            work: Arc::new(MemoryWork::default()),
            expiry: None,
        },
        (_, Some(settings)) => mongo(database, settings, erased).await?,
        (_, None) => embedded(database).await?,
    };
    let settings = KeepSettings {
        scope: match database.record {
            RecordScope::Application => Scope::Application,
            RecordScope::All => Scope::All,
            RecordScope::None => Scope::None,
        },
        input: match database.store_input {
            StoreInput::Full => KeptInput::Full,
            StoreInput::Hash => KeptInput::Hash,
            StoreInput::None => KeptInput::None,
        },
        timeout: settings.api.timeout,
    };
    let keeper = Arc::new(Keeper::new(inferences.clone(), Arc::new(store), settings));
    let forgetting = tokio::spawn(forget(keeper.clone(), to_forget));
    Ok(Kept { keeper, work, _expiry: expiry, forgetting })
}

/// The MongoDB of these settings; `None` where another store or none is written to.
pub fn mongo_settings(database: &Database) -> Option<MongoSettings> {
    match (&database.url, database.record) {
        (_, RecordScope::None) | (DatabaseUrl::Embedded, _) => None,
        (DatabaseUrl::Mongo(url), _) => Some(MongoSettings {
            url: url.clone(),
            pool_size: database.pool_size,
            replica_set: database.replica_set.clone(),
            retention: database.retention,
        }),
    }
}

/// A store, seen from its sides.
struct Opened {
    records: Durable,
    work: Arc<dyn Work>,
    expiry: Option<Expiry>,
}

/// Removes from the cache what was computed for records that a replay has erased from MongoDB.
async fn forget(keeper: Arc<Keeper>, mut erased: mpsc::UnboundedReceiver<Vec<Record>>) {
    while let Some(records) = erased.recv().await {
        if !keeper.forget(&records).await {
            tracing::warn!(
                num_records = records.len(),
                "results of erased records may stay cached until cache.ttl is over"
            );
        }
    }
}

async fn embedded(database: &Database) -> Result<Opened> {
    let folder = database.path.clone();
    let opened = tokio::task::spawn_blocking(move || Embedded::open(&folder)).await;
    let store = Arc::new(opened.map_err(|e| Error::Internal { cause: format!("opening the store: {e}") })??);
    let expiry = Expiry::start(store.clone(), database.retention);
    tracing::info!(path = %database.path.display(), "results are kept in the embedded store");
    Ok(Opened { records: Durable::local(store.clone()), work: store, expiry })
}

async fn mongo(
    database: &Database,
    settings: MongoSettings,
    erased: mpsc::UnboundedSender<Vec<Record>>,
) -> Result<Opened> {
    let store = Arc::new(MongoStore::new(settings)?);
    match store.migrate().await {
        Ok(migrated) => tracing::info!(?migrated, "results are kept in MongoDB"),
        Err(error @ Error::StoreUnavailable { .. }) => {
            tracing::warn!(%error, "MongoDB is away: results are kept in the journal until it is there");
        }
        Err(error) => return Err(error),
    }
    // Bounded by what the store returns of one erasure at a time; a server that ends has nothing to forget.
    let on_erased = Arc::new(move |records| {
        let _ = erased.send(records);
    });
    let options = Options { on_erased, ..Options::default() };
    let journal_max_bytes = database.journal_max_bytes.0 as u64;
    let records = open::remote(store.clone(), &database.path, journal_max_bytes, options).await?;
    Ok(Opened { records, work: store, expiry: None })
}

/// Ends the store: what its journal holds is replayed as far as `limit` allows.
pub async fn drain(keeper: &Keeper, limit: Duration) {
    if let state @ (State::Journalling { .. } | State::Full { .. }) = keeper.store().state() {
        tracing::info!(?state, "replaying the journal");
    }
    let num_left = keeper.store().drain(limit).await;
    if num_left > 0 {
        tracing::warn!(num_left, "entries stay in the journal: start this server again on the same disk");
    }
}
