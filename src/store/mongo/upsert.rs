//! Writes that may be repeated: upserts of whole records, many a command.
//!
//! The command `update` and not the driver's bulk write, which needs MongoDB 8: this one every version has, and its reply
//! says which index a duplicate hit. A repetition needs no help of the server's retryable writes, since an upsert that
//! is done twice ends in the same document.

use std::collections::HashSet;

use mongodb::Database;
use mongodb::bson::{self, Bson, Document, RawArrayBuf, RawDocumentBuf, doc, rawdoc};

use super::document::{OPTIONAL, Stored};
use super::fault::{DUPLICATE_KEY, fault, fault_of_code, is_unavailable, unreadable};
use super::schema::INFERENCES;
use super::{PER_RECORD, WRITE_TIMEOUT, deadline_of, late, millis};
use crate::store::record::Status;
use crate::{Error, Result};

/// Most bytes of the upserts of one command. A command is a document, so 16 MiB bound it, whatever a message may hold.
pub(super) const MAX_COMMAND_BYTES: usize = 15 << 20;

/// Most upserts of one command. The server takes 100,000; one command must end within a call's deadline.
pub(super) const MAX_UPSERTS: usize = 500;

/// How often what an index refused is tried in another form, or again: once for a race between two first writes of one
/// record, once without its idempotency key, and once to see the outcome.
const NUM_PASSES: usize = 3;

/// A record on its way into the collection.
pub(super) struct Upsert {
    pub id: bson::Uuid,
    /// Whether a record that is final stays as it is.
    yields: bool,
    statement: RawDocumentBuf,
}

impl Upsert {
    /// Sets all fields of a document, takes away those it lacks, and adds its feedback to what is there.
    pub(super) fn new(stored: &Stored) -> Result<Self> {
        let mut set = bson::serialize_to_document(stored).map_err(|e| unreadable("a record", e))?;
        set.remove("_id");
        let feedback = set.remove("feedback");
        let absent: Document = OPTIONAL
            .iter()
            .filter(|name| !set.contains_key(**name))
            .map(|name| (name.to_string(), Bson::from("")))
            .collect();
        let mut update = doc! { "$set": set };
        if !absent.is_empty() {
            update.insert("$unset", absent);
        }
        match feedback {
            Some(Bson::Array(list)) if !list.is_empty() => {
                update.insert("$addToSet", doc! { "feedback": { "$each": list } });
            }
            _ => {
                update.insert("$setOnInsert", doc! { "feedback": [] });
            }
        }
        let yields = !stored.status.is_final();
        let mut query = doc! { "_id": stored.id };
        if yields {
            // Where the record is there and final, the filter finds nothing and the upsert hits its `_id`.
            query.insert("status", doc! { "$nin": finals() });
        }
        Ok(Self { id: stored.id, yields, statement: statement(doc! { "q": query, "u": update, "upsert": true })? })
    }

    pub(super) fn num_bytes(&self) -> usize {
        self.statement.as_bytes().len()
    }

    /// The same without the idempotency key, which another record has.
    fn without_key(&self) -> Result<Self> {
        let mut whole = Document::try_from(&self.statement).map_err(|e| unreadable("an upsert of ours", e))?;
        if let Ok(update) = whole.get_document_mut("u") {
            if let Ok(set) = update.get_document_mut("$set") {
                set.remove("idempotency_key");
            }
            match update.get_document_mut("$unset") {
                Ok(unset) => {
                    unset.insert("idempotency_key", "");
                }
                Err(_) => {
                    update.insert("$unset", doc! { "idempotency_key": "" });
                }
            }
        }
        Ok(Self { id: self.id, yields: self.yields, statement: statement(whole)? })
    }
}

fn statement(whole: Document) -> Result<RawDocumentBuf> {
    RawDocumentBuf::try_from(&whole).map_err(|e| unreadable("a record", e))
}

/// The states that nothing unfinished replaces, as the documents have them.
pub(super) fn finals() -> Vec<&'static str> {
    let all = [Status::Queued, Status::Running, Status::Succeeded, Status::Failed, Status::Cancelled];
    all.into_iter().filter(|status| status.is_final()).map(Status::as_str).collect()
}

/// Writes upserts of different records, which fit a command, and returns what came of each.
pub(super) async fn write(database: &Database, upserts: Vec<Upsert>) -> Vec<Result<()>> {
    let len = upserts.len();
    let deadline = deadline_of(upserts.iter().map(Upsert::num_bytes).sum()) + PER_RECORD * len as u32;
    let written = tokio::time::timeout(deadline, write_unbounded(database, upserts)).await;
    written.unwrap_or_else(|_| vec![Err(late(deadline)); len])
}

async fn write_unbounded(database: &Database, mut upserts: Vec<Upsert>) -> Vec<Result<()>> {
    let mut results = vec![Ok(()); upserts.len()];
    let mut pending: Vec<usize> = (0..upserts.len()).collect();
    for pass in 0..NUM_PASSES {
        let refusals = match send(database, pending.iter().map(|&i| &upserts[i])).await {
            Ok(refusals) => refusals,
            Err(error) => {
                pending.iter().for_each(|&i| results[i] = Err(error.clone()));
                return results;
            }
        };
        let mut again = Vec::new();
        for refusal in refusals {
            let Some(&i) = pending.get(refusal.index) else { continue };
            match refusal.what {
                What::Key => match upserts[i].without_key() {
                    Ok(bare) => {
                        upserts[i] = bare;
                        again.push(i);
                    }
                    Err(error) => results[i] = Err(error),
                },
                // A final record is there, and stays. In the first pass it may be another's first write of this record.
                What::Id if pass > 0 && upserts[i].yields => {}
                What::Id => again.push(i),
                What::Other(error) => results[i] = Err(error),
            }
        }
        pending = again;
        if pending.is_empty() {
            return results;
        }
    }
    for i in pending {
        results[i] = Err(Error::StoreUnavailable { cause: "other writes of the same record won every time".into() });
    }
    results
}

/// Why one upsert of a command was not done.
struct Refusal {
    index: usize,
    what: What,
}

enum What {
    /// The index of idempotency keys has it under another `_id`.
    Key,
    /// The `_id` is there.
    Id,
    Other(Error),
}

async fn send(database: &Database, upserts: impl Iterator<Item = &Upsert>) -> Result<Vec<Refusal>> {
    let mut statements = RawArrayBuf::new();
    upserts.for_each(|upsert| statements.push(upsert.statement.as_ref()));
    let command = rawdoc! {
        "update": INFERENCES,
        "ordered": false,
        "writeConcern": { "w": "majority", "j": true, "wtimeout": millis(WRITE_TIMEOUT) },
        "updates": statements,
    };
    let reply = match database.run_raw_command(command.clone()).await {
        // As the driver repeats its own writes: once, on whatever server is the primary by then.
        Err(error) if is_unavailable(&error) => database.run_raw_command(command).await,
        first => first,
    };
    read_reply(&reply.map_err(fault)?)
}

fn read_reply(reply: &Document) -> Result<Vec<Refusal>> {
    if let Ok(concern) = reply.get_document("writeConcernError") {
        let message = concern.get_str("errmsg").unwrap_or("that a majority did not acknowledge");
        return Err(Error::StoreUnavailable { cause: format!("MongoDB says {message}") });
    }
    let Ok(list) = reply.get_array("writeErrors") else { return Ok(Vec::new()) };
    let refusals = list.iter().filter_map(Bson::as_document).map(|error| {
        let number = |name: &str| error.get(name).and_then(|value| value.as_i32().or(value.as_i64().map(|v| v as i32)));
        let message = error.get_str("errmsg").unwrap_or_default();
        let code = number("code").unwrap_or_default();
        let is_id = match error.get_document("keyPattern") {
            Ok(pattern) => pattern.contains_key("_id"),
            Err(_) => message.contains("index: _id_"),
        };
        let what = match code {
            DUPLICATE_KEY if is_id => What::Id,
            DUPLICATE_KEY => What::Key,
            _ => What::Other(fault_of_code(code, message)),
        };
        Refusal { index: number("index").and_then(|index| usize::try_from(index).ok()).unwrap_or(usize::MAX), what }
    });
    Ok(refusals.collect())
}

/// Groups of upserts that each fit a command and hold no record twice, in their order.
pub(super) fn groups(upserts: Vec<Upsert>) -> Vec<Vec<Upsert>> {
    let mut groups: Vec<Vec<Upsert>> = Vec::new();
    let mut room = Room::new(MAX_COMMAND_BYTES);
    for upsert in upserts {
        if groups.is_empty() || !room.fits([&upsert]) {
            groups.push(Vec::new());
            room = Room::new(MAX_COMMAND_BYTES);
        }
        room.take([&upsert]);
        groups.last_mut().expect("one was pushed above").push(upsert);
    }
    groups
}

/// What a command holds so far.
pub(super) struct Room {
    ids: HashSet<[u8; 16]>,
    num_bytes: usize,
    max_bytes: usize,
}

impl Room {
    pub(super) fn new(max_bytes: usize) -> Self {
        Self { ids: HashSet::new(), num_bytes: 0, max_bytes }
    }

    /// Whether these can join. Two states of one record in one command would be done in either order.
    pub(super) fn fits<'a>(&self, upserts: impl IntoIterator<Item = &'a Upsert>) -> bool {
        let (mut num_bytes, mut len) = (self.num_bytes, self.ids.len());
        upserts.into_iter().all(|upsert| {
            num_bytes += upsert.num_bytes();
            len += 1;
            num_bytes <= self.max_bytes && len <= MAX_UPSERTS && !self.ids.contains(&upsert.id.bytes())
        })
    }

    pub(super) fn take<'a>(&mut self, upserts: impl IntoIterator<Item = &'a Upsert>) {
        for upsert in upserts {
            self.num_bytes += upsert.num_bytes();
            self.ids.insert(upsert.id.bytes());
        }
    }
}
