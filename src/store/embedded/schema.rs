//! Every table and index of the embedded store, in this one place.
//!
//! Measured for 200,000 records of 800 bytes with outputs of 1.5 KB in pages of 4 KiB, against tables that are kept in the
//! order of their ids (`WITHOUT ROWID`): rows by a number of their own take 28 % more inserts a second, list by status in
//! a fifth of the time, and make a file of 614 MB instead of 1104 MB, because a long row does not spill out of its page.
//! So a record is found by its id through one index more, and all indexes lead to its row by a short number.

/// Marks a file as ours: "erem" in ASCII. Source: sqlite.org/pragma.html, application_id.
pub(super) const APPLICATION_ID: i32 = 0x6572_656d;

/// The steps from an empty file to the present tables, the first from version 0 to 1. `PRAGMA user_version` counts those
/// that were taken. A step that was released is never changed: what comes later is a step of its own.
pub(super) const MIGRATIONS: &[&str] = &[
    // `seq` is a record's number in this file and means nothing outside it. The columns of `inferences` repeat what the
    // facts say, for the indexes and for whoever reads with SQL; one function writes both. `feedback` keeps no facts of its
    // own in the JSON, so that adding one rewrites no record. An output has either rows or JSON.
    "
    CREATE TABLE inferences (
        seq INTEGER PRIMARY KEY,
        id BLOB NOT NULL,
        created_ms INTEGER NOT NULL,
        status TEXT NOT NULL,
        model TEXT NOT NULL,
        version TEXT NOT NULL,
        user TEXT,
        idempotency_key TEXT,
        facts TEXT NOT NULL
    );
    CREATE TABLE outputs (
        seq INTEGER PRIMARY KEY,
        row_lens TEXT,
        rows BLOB,
        json TEXT,
        CHECK ((rows IS NULL) = (row_lens IS NULL) AND (rows IS NULL) <> (json IS NULL))
    );
    CREATE TABLE metadata (
        key TEXT NOT NULL,
        value TEXT NOT NULL,
        id BLOB NOT NULL,
        seq INTEGER NOT NULL,
        PRIMARY KEY (key, value, id)
    ) WITHOUT ROWID;
    CREATE TABLE feedback (
        seq INTEGER NOT NULL,
        idx INTEGER NOT NULL,
        at TEXT NOT NULL,
        score REAL,
        label TEXT,
        comment TEXT,
        PRIMARY KEY (seq, idx)
    ) WITHOUT ROWID;
    CREATE VIEW readable AS
        SELECT 'inf_' || lower(hex(id)) AS id,
            strftime('%Y-%m-%dT%H:%M:%fZ', created_ms / 1000.0, 'unixepoch') AS created_at,
            status, model, version, user, facts
        FROM inferences;
    ",
    // Background work. `leased_until_ms` is 0 where nobody holds the task, and `cancelled` 1 or nothing. A payload is in a
    // table of its own: it may have MiB, and a task's row is written anew by every claim and renewal.
    "
    CREATE TABLE tasks (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL,
        kind TEXT NOT NULL,
        due_ms INTEGER NOT NULL,
        attempts INTEGER NOT NULL,
        owner TEXT,
        leased_until_ms INTEGER NOT NULL,
        cancelled INTEGER,
        CHECK ((owner IS NULL) = (leased_until_ms = 0))
    );
    CREATE TABLE payloads (
        seq INTEGER PRIMARY KEY,
        payload TEXT NOT NULL
    );
    CREATE TABLE documents (
        seq INTEGER PRIMARY KEY,
        kind TEXT NOT NULL,
        id TEXT NOT NULL,
        parent TEXT,
        expires_ms INTEGER,
        revision INTEGER NOT NULL,
        body TEXT NOT NULL
    );
    CREATE TABLE parts (
        seq INTEGER PRIMARY KEY,
        file TEXT NOT NULL,
        idx INTEGER NOT NULL,
        bytes BLOB NOT NULL
    );
    ",
];

/// An index. They are no part of the migrations: opening compares the file with this list, makes what is missing and makes
/// anew what differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Index {
    /// Unique in the file.
    pub name: &'static str,
    pub table: &'static str,
    pub unique: bool,
    pub columns: &'static str,
    /// Only rows where this column has a value are in it.
    pub not_null: Option<&'static str>,
}

impl Index {
    /// The statement that makes it.
    pub(super) fn sql(&self) -> String {
        let unique = if self.unique { "UNIQUE " } else { "" };
        let only = self.not_null.map(|column| format!(" WHERE {column} IS NOT NULL")).unwrap_or_default();
        format!("CREATE {unique}INDEX {} ON {} ({}){only}", self.name, self.table, self.columns)
    }
}

const fn on(table: &'static str, name: &'static str, columns: &'static str) -> Index {
    Index { name, table, unique: false, columns, not_null: None }
}

const fn by(name: &'static str, columns: &'static str) -> Index {
    on("inferences", name, columns)
}

const fn by_user(name: &'static str, columns: &'static str) -> Index {
    Index { not_null: Some("user"), ..by(name, columns) }
}

/// The index that `numbers` walks, and its columns: all that usage and quality are made of, so that neither reads a row.
/// It begins with the id, so that an insert adds at its end and a span of time is a range of it. 124 bytes a record, and
/// 5 to 8 µs of an insert: SQLite reads the facts once for all of it.
pub(super) const BY_NUMBERS: &str = "by_numbers";
pub(super) const NUMBERS: &str = "id, model, version, user, status, facts ->> '$.source', facts ->> '$.error.kind', \
    facts ->> '$.usage.num_inputs', facts ->> '$.usage.num_cached', facts ->> '$.usage.num_tokens', \
    facts ->> '$.usage.num_chars', facts ->> '$.timings.total_us', facts ->> '$.timings.inference_us', \
    facts ->> '$.output_norms.num', facts ->> '$.output_norms.sum', facts ->> '$.output_norms.sum_squares', \
    facts ->> '$.output_norms.min', facts ->> '$.output_norms.max'";

/// Every index. Each of `inferences` that ends in `id` is a list of records in the order of their ids for one condition or
/// a pair of conditions, so that a page of it is one range. `list` chooses among them.
pub(super) const INDEXES: &[Index] = &[
    Index { unique: true, ..by("by_id", "id") },
    Index { unique: true, not_null: Some("idempotency_key"), ..by("by_idempotency_key", "idempotency_key") },
    by("by_model", "model, id"),
    by("by_status", "status, id"),
    by("by_model_status", "model, status, id"),
    by_user("by_user", "user, id"),
    by_user("by_user_model", "user, model, id"),
    by_user("by_user_status", "user, status, id"),
    by(BY_NUMBERS, NUMBERS),
    Index { unique: true, ..on("tasks", "tasks_by_id", "id") },
    // All that a claim asks of a kind's tasks: it reads no row that it does not take.
    on("tasks", "tasks_by_due", "kind, due_ms, id, leased_until_ms"),
    Index { not_null: Some("cancelled"), ..on("tasks", "tasks_cancelled", "leased_until_ms") },
    Index { unique: true, ..on("documents", "documents_by_id", "kind, id") },
    Index { not_null: Some("parent"), ..on("documents", "documents_by_parent", "parent, kind, id") },
    Index { not_null: Some("expires_ms"), ..on("documents", "documents_by_expiry", "expires_ms, kind, id") },
    Index { unique: true, ..on("parts", "parts_by_file", "file, idx") },
];
