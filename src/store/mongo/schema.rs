//! Collections, their validators and all indexes: the one list of them.

use std::time::Duration;

use mongodb::IndexModel;
use mongodb::bson::{Bson, Document, doc};
use mongodb::options::IndexOptions;

use crate::store::record::Status;

/// The version of the layout that this code reads and writes. A change of it comes with a step in
/// [`super::migrate`].
pub(super) const VERSION: i32 = 1;

/// The collection of records.
pub(super) const INFERENCES: &str = "inferences";
/// The collection of what does not fit a record.
pub(super) const OUTPUTS: &str = "outputs";
/// The collections of background work.
pub(super) const TASKS: &str = "tasks";
pub(super) const DOCUMENTS: &str = "documents";
pub(super) const PARTS: &str = "parts";
/// The collection of the layout's version and of the lock.
pub(super) const SCHEMA: &str = "schema";

/// The index that expires: its seconds are a setting.
pub(super) const RETENTION: &str = "retention";

/// Chunks outlive their record, whose expiry is seen up to a minute late, so that no record is found without them.
const CHUNKS_OUTLIVE: Duration = Duration::from_secs(3600);

/// A collection as it must be.
pub(super) struct Declared {
    pub name: &'static str,
    pub validator: Document,
    pub indexes: Vec<Index>,
    /// Seconds after `created_at` that a document is deleted; `None`: never.
    pub expires_after: Option<Duration>,
}

/// An index as it must be.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Index {
    pub name: String,
    pub keys: Vec<(String, i32)>,
    pub is_unique: bool,
    /// Only documents that have this field are in it.
    pub only_with: Option<String>,
    pub expires_after: Option<Duration>,
}

/// Everything there must be, for records that are kept this long; zero is for good.
pub(super) fn declared(retention: Duration) -> Vec<Declared> {
    // Seconds are an i32 for the server: 68 years.
    let bound = |time: Duration| time.clamp(Duration::from_secs(1), Duration::from_secs(i32::MAX as u64));
    let expires = |more: Duration| (!retention.is_zero()).then(|| bound(retention.saturating_add(more)));
    vec![
        Declared {
            name: INFERENCES,
            validator: records_validator(),
            indexes: vec![
                // Pages are ranges of `_id`, newest first, within what a filter leaves.
                Index::of("model", &[("model", 1), ("_id", -1)]),
                Index::of("status", &[("status", 1), ("_id", -1)]),
                Index::of("user", &[("user", 1), ("_id", -1)]).only_with("user"),
                // Not partial as those of a user are: of `$elemMatch` not every server concludes that the field is there.
                Index::of("metadata", &[("metadata.k", 1), ("metadata.v", 1), ("_id", -1)]),
                // What is asked for together: a user's results of a model, a model's failures.
                Index::of("user_model", &[("user", 1), ("model", 1), ("_id", -1)]).only_with("user"),
                Index::of("model_status", &[("model", 1), ("status", 1), ("_id", -1)]),
                Index::of("idempotency_key", &[("idempotency_key", 1)]).only_with("idempotency_key").unique(),
            ],
            expires_after: expires(Duration::ZERO),
        },
        Declared {
            name: OUTPUTS,
            validator: chunks_validator(),
            indexes: vec![Index::of("user", &[("user", 1)]).only_with("user")],
            expires_after: expires(CHUNKS_OUTLIVE),
        },
        // Background work has its own times, which those who do it keep.
        Declared {
            name: TASKS,
            validator: tasks_validator(),
            indexes: vec![
                // All that a claim asks of a kind's tasks: it reads no document that it does not take.
                Index::of("due", &[("kind", 1), ("due_at", 1), ("_id", 1), ("leased_until", 1)]),
                Index::of("cancelled", &[("leased_until", 1)]).only_with("cancelled"),
            ],
            expires_after: None,
        },
        Declared {
            name: DOCUMENTS,
            validator: documents_validator(),
            indexes: vec![
                Index::of("parent", &[("parent", 1), ("_id", -1)]).only_with("parent"),
                Index::of("expires_at", &[("expires_at", 1), ("_id", 1)]).only_with("expires_at"),
            ],
            expires_after: None,
        },
        Declared {
            name: PARTS,
            validator: parts_validator(),
            indexes: vec![Index::of("file", &[("file", 1)])],
            expires_after: None,
        },
    ]
}

impl Declared {
    /// Its indexes with the one that expires.
    pub(super) fn all_indexes(&self) -> Vec<Index> {
        let expiring = self
            .expires_after
            .map(|after| Index { expires_after: Some(after), ..Index::of(RETENTION, &[("created_at", 1)]) });
        self.indexes.iter().cloned().chain(expiring).collect()
    }
}

impl Index {
    fn of(name: &str, keys: &[(&str, i32)]) -> Self {
        let keys = keys.iter().map(|(name, order)| (name.to_string(), *order)).collect();
        Self { name: name.to_string(), keys, is_unique: false, only_with: None, expires_after: None }
    }

    fn only_with(self, field: &str) -> Self {
        Self { only_with: Some(field.to_string()), ..self }
    }

    fn unique(self) -> Self {
        Self { is_unique: true, ..self }
    }

    /// An index as the server lists it. `None` where it has options that none of ours has.
    pub(super) fn read(model: &IndexModel) -> Option<Self> {
        let options = model.options.clone().unwrap_or_default();
        let number = |value: &Bson| match value {
            Bson::Int32(order) => Some(*order),
            Bson::Int64(order) => i32::try_from(*order).ok(),
            Bson::Double(order) => Some(*order as i32),
            _ => None,
        };
        let keys: Option<Vec<_>> =
            model.keys.iter().map(|(name, value)| Some((name.clone(), number(value)?))).collect();
        let only_with = match options.partial_filter_expression {
            None => None,
            Some(filter) => {
                let (field, condition) = filter.iter().next()?;
                if filter.len() != 1 || condition.as_document()? != &doc! { "$exists": true } {
                    return None;
                }
                Some(field.clone())
            }
        };
        if options.sparse == Some(true) || options.collation.is_some() || options.hidden == Some(true) {
            return None;
        }
        Some(Self {
            name: options.name?,
            keys: keys?,
            is_unique: options.unique.unwrap_or(false),
            only_with,
            expires_after: options.expire_after,
        })
    }

    /// As the driver creates it.
    pub(super) fn model(&self) -> IndexModel {
        let keys: Document = self.keys.iter().map(|(name, order)| (name.clone(), Bson::Int32(*order))).collect();
        let mut options = IndexOptions::default();
        options.name = Some(self.name.clone());
        options.unique = self.is_unique.then_some(true);
        options.partial_filter_expression =
            self.only_with.as_ref().map(|field| doc! { field.as_str(): { "$exists": true } });
        options.expire_after = self.expires_after;
        IndexModel::builder().keys(keys).options(options).build()
    }

    /// Whether the server would do the same with both, but for the time of expiry, which can be changed in place.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        let expires = |index: &Self| index.expires_after.is_some();
        self.keys == other.keys
            && self.is_unique == other.is_unique
            && self.only_with == other.only_with
            && expires(self) == expires(other)
    }
}

fn records_validator() -> Document {
    let states = [Status::Queued, Status::Running, Status::Succeeded, Status::Failed, Status::Cancelled];
    let text = doc! { "bsonType": "string" };
    doc! { "$jsonSchema": {
        "bsonType": "object",
        "required": ["_id", "created_at", "status", "model", "version", "task", "source", "usage", "timings", "feedback"],
        "properties": {
            "_id": { "bsonType": "binData" },
            "created_at": { "bsonType": "date" },
            "completed_at": { "bsonType": "date" },
            "status": { "enum": states.map(Status::as_str).to_vec() },
            "model": text.clone(),
            "version": text.clone(),
            "task": text.clone(),
            "source": text.clone(),
            "user": text.clone(),
            "metadata": {
                "bsonType": "array",
                "items": {
                    "bsonType": "object",
                    "required": ["k", "v"],
                    "properties": { "k": text.clone(), "v": text.clone() },
                },
            },
            "idempotency_key": text,
            "usage": { "bsonType": "object" },
            "timings": { "bsonType": "object" },
            "feedback": { "bsonType": "array" },
        },
    } }
}

fn chunks_validator() -> Document {
    doc! { "$jsonSchema": {
        "bsonType": "object",
        "required": ["_id", "created_at", "data"],
        "properties": {
            "_id": { "bsonType": "binData" },
            "created_at": { "bsonType": "date" },
            "user": { "bsonType": "string" },
            "data": { "bsonType": "binData" },
        },
    } }
}

fn tasks_validator() -> Document {
    doc! { "$jsonSchema": {
        "bsonType": "object",
        "required": ["_id", "kind", "due_at", "attempts", "payload", "leased_until"],
        "properties": {
            "_id": { "bsonType": "string" },
            "kind": { "bsonType": "string" },
            "due_at": { "bsonType": "date" },
            "attempts": { "bsonType": "long" },
            "payload": { "bsonType": "string" },
            "leased_until": { "bsonType": "date" },
            "owner": { "bsonType": "string" },
            "cancelled": { "enum": [true] },
        },
    } }
}

fn documents_validator() -> Document {
    doc! { "$jsonSchema": {
        "bsonType": "object",
        "required": ["_id", "revision", "body"],
        "properties": {
            "_id": { "bsonType": "string" },
            "parent": { "bsonType": "string" },
            "expires_at": { "bsonType": "date" },
            "revision": { "bsonType": "long" },
            "body": { "bsonType": "string" },
        },
    } }
}

fn parts_validator() -> Document {
    doc! { "$jsonSchema": {
        "bsonType": "object",
        "required": ["_id", "file", "data"],
        "properties": {
            "_id": { "bsonType": "string" },
            "file": { "bsonType": "string" },
            "data": { "bsonType": "binData" },
        },
    } }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_is_read_as_it_was_made() {
        for declared in declared(Duration::from_secs(60)) {
            for index in declared.all_indexes() {
                assert_eq!(Index::read(&index.model()), Some(index));
            }
        }
    }

    #[test]
    fn retention_is_an_index_only_where_records_expire() {
        let retention = |after| -> Vec<Option<Duration>> {
            let named = |declared: Declared| declared.all_indexes().into_iter().find(|index| index.name == RETENTION);
            declared(after)
                .into_iter()
                .map(|declared| named(declared).map(|index| index.expires_after.unwrap()))
                .collect()
        };
        assert_eq!(retention(Duration::ZERO), [None; 5]);
        let seconds = |s| Some(Duration::from_secs(s));
        assert_eq!(retention(Duration::from_secs(60)), [seconds(60), seconds(3660), None, None, None]);
        let most = seconds(i32::MAX as u64);
        assert_eq!(retention(Duration::MAX), [most, most, None, None, None]);
    }

    #[test]
    fn another_index_is_not_like_ours() {
        let index = Index::of("user", &[("user", 1), ("_id", -1)]).only_with("user");
        assert!(index.is_like(&index.clone()));
        assert!(!index.is_like(&Index::of("user", &[("_id", -1), ("user", 1)]).only_with("user")));
        assert!(!index.is_like(&Index::of("user", &[("user", 1), ("_id", -1)])));
        assert!(!index.is_like(&index.clone().unique()));
    }
}
