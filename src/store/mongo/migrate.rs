//! The layout of the database: compared at every start with what [`super::schema`] declares, changed under a lock.
//!
//! Several processes may start at once. Each compares; one that finds a difference takes the lock, compares again and
//! changes what is still different. The lock is a document with a time at which it counts as left behind by a process
//! that died; its holder moves that time on as long as it works. All times are the server's.

use std::time::{Duration, Instant};

use futures::TryStreamExt;
use mongodb::Database;
use mongodb::bson::{DateTime, Document, doc};
use mongodb::options::ReturnDocument;

use super::fault::{code, fault, is_duplicate};
use super::millis;
use super::schema::{Declared, Index, SCHEMA, VERSION, declared};
use crate::store::Migrated;
use crate::{Error, Result};

/// How long the lock holds without being renewed.
const LEASE: Duration = Duration::from_secs(60);
/// How often it is renewed, and how often one that is held is asked for.
const RENEWAL: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(200);
/// How long one waits for another process that migrates; the next call of the store waits anew.
const MAX_WAIT: Duration = Duration::from_secs(600);

/// The codes of a collection that is there already, and of one that is not.
const NAMESPACE_EXISTS: i32 = 48;
const NAMESPACE_NOT_FOUND: i32 = 26;

/// One change.
#[derive(Debug)]
enum Change {
    Create(&'static str, Document),
    Validate(&'static str, Document),
    Index(&'static str, Index),
    Expiry(&'static str, Index),
    /// An index of ours that no setting asks for any more.
    Drop(&'static str, String),
    /// The layout's version.
    Version(i32),
}

impl Change {
    fn words(&self) -> String {
        match self {
            Self::Create(collection, _) => format!("collection `{collection}` created"),
            Self::Validate(collection, _) => format!("validator of `{collection}` set"),
            Self::Index(collection, index) => format!("index `{}` of `{collection}` created", index.name),
            Self::Expiry(collection, index) => {
                format!("`{collection}` expires after {} s", index.expires_after.unwrap_or_default().as_secs())
            }
            Self::Drop(collection, index) => format!("index `{index}` of `{collection}` dropped"),
            Self::Version(from) => format!("layout taken from version {from} to {VERSION}"),
        }
    }
}

/// Makes the database what it must be for records that are kept for `retention`. `holder` names this process in the lock.
///
/// Errors: [`Error::Internal`] where an index of ours has been made otherwise, naming it, or where a newer version of the
/// program has been here; [`Error::StoreUnavailable`] where another process takes too long with it.
pub(super) async fn migrate(database: &Database, retention: Duration, holder: &str) -> Result<Migrated> {
    let from = version(database).await?;
    if changes(database, retention).await?.is_empty() {
        return Ok(Migrated { from, to: VERSION, changes: Vec::new() });
    }
    let lock = Lock::take(database, holder).await?;
    let work = change(database, retention, holder);
    let renewals = lock.renew();
    tokio::pin!(work, renewals);
    let done = tokio::select! {
        done = &mut work => done,
        lost = &mut renewals => Err(lost),
    };
    lock.release().await;
    done
}

/// What [`migrate`] would do. Changes nothing, and needs no lock. Errors: as there.
pub(super) async fn pending(database: &Database, retention: Duration) -> Result<Migrated> {
    let from = version(database).await?;
    let changes = changes(database, retention).await?.iter().map(Change::words).collect();
    Ok(Migrated { from, to: VERSION, changes })
}

async fn change(database: &Database, retention: Duration, holder: &str) -> Result<Migrated> {
    let from = version(database).await?;
    let mut done = Vec::new();
    for change in changes(database, retention).await? {
        apply(database, &change, holder).await?;
        let words = change.words();
        tracing::info!(change = %words, "the MongoDB database is prepared");
        done.push(words);
    }
    Ok(Migrated { from, to: VERSION, changes: done })
}

/// The layout's version in the database; 0 where there is none.
pub(super) async fn version(database: &Database) -> Result<i32> {
    let found = database.collection::<Document>(SCHEMA).find_one(doc! { "_id": "schema" }).await.map_err(fault)?;
    let version = found.and_then(|schema| schema.get_i32("version").ok()).unwrap_or(0);
    if version > VERSION {
        return Err(Error::Internal {
            cause: format!("the database has layout {version}, this program knows {VERSION}: a newer one was here"),
        });
    }
    Ok(version)
}

/// What differs from the declared, in the order in which it is to be changed.
async fn changes(database: &Database, retention: Duration) -> Result<Vec<Change>> {
    let mut changes = Vec::new();
    let mut there = Vec::new();
    let mut collections = database.list_collections().await.map_err(fault)?;
    while let Some(collection) = collections.try_next().await.map_err(fault)? {
        there.push((collection.name, collection.options.validator.unwrap_or_default()));
    }
    for declared in declared(retention) {
        match there.iter().find(|(name, _)| name == declared.name) {
            None => changes.push(Change::Create(declared.name, declared.validator.clone())),
            Some((_, validator)) if *validator != declared.validator => {
                changes.push(Change::Validate(declared.name, declared.validator.clone()));
            }
            Some(_) => {}
        }
        compare_indexes(&declared, indexes(database, declared.name).await?, &mut changes)?;
    }
    let from = version(database).await?;
    if from != VERSION {
        changes.push(Change::Version(from));
    }
    Ok(changes)
}

/// All indexes of a collection by name; `None` for one that is not of our kind.
async fn indexes(database: &Database, collection: &str) -> Result<Vec<(String, Option<Index>)>> {
    let mut cursor = match database.collection::<Document>(collection).list_indexes().await {
        Ok(cursor) => cursor,
        Err(error) if code(&error) == Some(NAMESPACE_NOT_FOUND) => return Ok(Vec::new()),
        Err(error) => return Err(fault(error)),
    };
    let mut found = Vec::new();
    while let Some(model) = cursor.try_next().await.map_err(fault)? {
        let name = model.options.as_ref().and_then(|options| options.name.clone()).unwrap_or_default();
        found.push((name, Index::read(&model)));
    }
    Ok(found)
}

fn compare_indexes(declared: &Declared, there: Vec<(String, Option<Index>)>, changes: &mut Vec<Change>) -> Result<()> {
    let wanted = declared.all_indexes();
    for index in &wanted {
        let Some((_, found)) = there.iter().find(|(name, _)| *name == index.name) else {
            changes.push(Change::Index(declared.name, index.clone()));
            continue;
        };
        match found {
            Some(found) if found == index => {}
            Some(found) if found.is_like(index) => changes.push(Change::Expiry(declared.name, index.clone())),
            // Not replaced by itself: somebody made it so, and a large index takes hours to build.
            _ => {
                return Err(Error::Internal {
                    cause: format!(
                        "index `{}` of `{}` in MongoDB is not {:?}: drop it, and the next start makes it",
                        index.name, declared.name, index.keys
                    ),
                });
            }
        }
    }
    let retention = super::schema::RETENTION;
    if there.iter().any(|(name, _)| name == retention) && !wanted.iter().any(|index| index.name == retention) {
        changes.push(Change::Drop(declared.name, retention.to_string()));
    }
    Ok(())
}

async fn apply(database: &Database, change: &Change, holder: &str) -> Result<()> {
    let durable = || doc! { "w": "majority", "j": true };
    let command = match change {
        Change::Create(collection, validator) => doc! { "create": *collection, "validator": validator.clone() },
        Change::Validate(collection, validator) => doc! { "collMod": *collection, "validator": validator.clone() },
        Change::Expiry(collection, index) => {
            let seconds = index.expires_after.unwrap_or_default().as_secs() as i64;
            doc! { "collMod": *collection, "index": { "name": &index.name, "expireAfterSeconds": seconds } }
        }
        Change::Drop(collection, index) => doc! { "dropIndexes": *collection, "index": index },
        Change::Index(collection, index) => {
            let made = database.collection::<Document>(collection).create_index(index.model()).await;
            return made.map(|_| ()).map_err(|e| named(fault(e), &format!("index `{}` of `{collection}`", index.name)));
        }
        Change::Version(from) => {
            // Version 1 is the first: no document has another form yet. Steps between versions go here, by `from`.
            let step = doc! { "from": from, "to": VERSION, "at": DateTime::now(), "by": holder };
            let update = doc! { "$set": { "version": VERSION }, "$push": { "history": step } };
            let schema = database.collection::<Document>(SCHEMA);
            let done = schema.update_one(doc! { "_id": "schema" }, update).upsert(true).await;
            return done.map(|_| ()).map_err(fault);
        }
    };
    let mut command = command;
    command.insert("writeConcern", durable());
    match database.run_command(command).await {
        // A collection may have come into being by a first write, or by somebody's hand, since the comparison.
        Err(error) if code(&error) == Some(NAMESPACE_EXISTS) => Ok(()),
        done => done.map(|_| ()).map_err(|e| named(fault(e), &change.words())),
    }
}

/// An error with what it happened at.
fn named(error: Error, what: &str) -> Error {
    match error {
        Error::Internal { cause } => Error::Internal { cause: format!("{what}: {cause}") },
        other => other,
    }
}

/// The lock, held.
struct Lock<'a> {
    database: &'a Database,
    holder: &'a str,
}

impl<'a> Lock<'a> {
    /// Waits for the lock.
    async fn take(database: &'a Database, holder: &'a str) -> Result<Self> {
        let lock = Self { database, holder };
        let start = Instant::now();
        loop {
            if lock.try_take().await? {
                return Ok(lock);
            }
            if start.elapsed() > MAX_WAIT {
                let cause = format!("another process has been preparing the database for {MAX_WAIT:?}");
                return Err(Error::StoreUnavailable { cause });
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn try_take(&self) -> Result<bool> {
        // Both fields from the document as it was: whoever finds it free, or its time past, is the holder afterwards.
        // Compared as numbers, which the server of our tests does as MongoDB does it.
        let until = || doc! { "$toLong": { "$ifNull": ["$until", DateTime::from_millis(0)] } };
        let is_free = || doc! { "$lt": [until(), { "$toLong": "$$NOW" }] };
        let taken = doc! { "$set": {
            "holder": { "$cond": [is_free(), { "$literal": self.holder }, "$holder"] },
            "until": { "$cond": [is_free(), { "$add": ["$$NOW", millis(LEASE)] }, "$until"] },
        } };
        let locks = self.database.collection::<Document>(SCHEMA);
        let update = locks.find_one_and_update(doc! { "_id": "lock" }, vec![taken]).upsert(true);
        match update.return_document(ReturnDocument::After).await {
            Ok(lock) => Ok(lock.is_some_and(|lock| lock.get_str("holder").is_ok_and(|holder| holder == self.holder))),
            // Two made the first one at once.
            Err(error) if is_duplicate(&error) => Ok(false),
            Err(error) => Err(fault(error)),
        }
    }

    /// Renews it until it turns out to be lost; returns why.
    async fn renew(&self) -> Error {
        let locks = self.database.collection::<Document>(SCHEMA);
        let mut renewed = Instant::now();
        loop {
            tokio::time::sleep(RENEWAL).await;
            let own = doc! { "_id": "lock", "holder": self.holder };
            let longer = doc! { "$set": { "until": { "$add": ["$$NOW", millis(LEASE)] } } };
            match locks.find_one_and_update(own, vec![longer]).await {
                Ok(Some(_)) => renewed = Instant::now(),
                Ok(None) => return Error::StoreUnavailable { cause: "another process took the lock".into() },
                Err(error) if renewed.elapsed() > LEASE => return fault(error),
                Err(_) => {}
            }
        }
    }

    async fn release(&self) {
        let own = doc! { "_id": "lock", "holder": self.holder };
        if let Err(error) = self.database.collection::<Document>(SCHEMA).delete_one(own).await {
            tracing::warn!(cause = %fault(error), lease = ?LEASE, "the lock of the database is left to its lease");
        }
    }
}
