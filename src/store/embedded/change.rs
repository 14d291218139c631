//! What a write does to the tables. Each function runs within the writer's transaction and leaves all tables agreeing.

use std::collections::BTreeMap;

use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, named_params, params};
use serde::Deserialize;
use serde::de::IntoDeserializer;
use serde::de::value::{Error as ValueError, StrDeserializer};

use super::fault::broken;
use super::row::{COLUMNS, Found, OutputRow, facts_text, feedback};
use super::rows;
use crate::Result;
use crate::store::Inserted;
use crate::store::record::{Feedback, InferenceId, Record, Status};

/// Writes a record as [`crate::store::Records::put`] says.
pub(super) fn put(conn: &Connection, record: &Record) -> Result<()> {
    let holder = match &record.facts.idempotency_key {
        Some(key) => id_of_key(conn, key)?,
        None => None,
    };
    let mut without_key;
    let record = match holder {
        Some(holder) if holder != record.id => {
            without_key = record.clone();
            without_key.facts.idempotency_key = None;
            tracing::warn!(id = %record.id, holder = %holder, "a record was kept without its idempotency key, which another holds");
            &without_key
        }
        _ => record,
    };
    let Some((seq, old_status)) = find(conn, &record.id)? else { return add(conn, record) };
    if old_status.is_final() && !record.facts.status.is_final() {
        return Ok(());
    }
    replace(conn, seq, record)
}

/// Writes a record as [`crate::store::Records::insert`] says.
pub(super) fn insert(conn: &Connection, record: &Record) -> Result<Inserted> {
    let sql = format!("SELECT {COLUMNS} FROM inferences AS i WHERE i.id = ?1");
    let mut there = conn.prepare_cached(&sql)?.query_row([record.id.0.as_bytes()], Found::read).optional()?;
    if let (None, Some(key)) = (&there, &record.facts.idempotency_key) {
        let sql = format!("SELECT {COLUMNS} FROM inferences AS i WHERE i.idempotency_key = ?1");
        there = conn.prepare_cached(&sql)?.query_row([key], Found::read).optional()?;
    }
    match there {
        Some(found) => Ok(Inserted::Exists(Box::new(found.record(conn, true)?))),
        None => add(conn, record).map(|()| Inserted::New),
    }
}

/// Deletes a record.
pub(super) fn delete(conn: &Connection, id: &InferenceId) -> Result<bool> {
    let mut statement = conn.prepare_cached("SELECT seq, facts FROM inferences WHERE id = ?1")?;
    let found = statement.query_row([id.0.as_bytes()], |row| Ok((row.get(0)?, row.get::<_, String>(1)?)));
    let Some((seq, facts)) = found.optional()? else { return Ok(false) };
    remove(conn, seq, id, &facts)?;
    Ok(true)
}

/// Deletes records of a user, oldest first.
pub(super) fn erase_user(conn: &Connection, user: &str, limit: usize) -> Result<Vec<Record>> {
    let sql =
        format!("SELECT {COLUMNS} FROM inferences AS i INDEXED BY by_user WHERE i.user = ?1 ORDER BY i.id LIMIT ?2");
    let mut statement = conn.prepare_cached(&sql)?;
    let found: Vec<Found> =
        statement.query_map(params![user, rows(limit)], Found::read)?.collect::<rusqlite::Result<_>>()?;
    let mut records = Vec::with_capacity(found.len());
    for found in found {
        records.push(found.record(conn, true)?);
        remove(conn, found.seq, &found.id, found.facts_text())?;
    }
    Ok(records)
}

/// Adds what somebody said, unless it is there.
pub(super) fn add_feedback(conn: &Connection, id: &InferenceId, feedback: &Feedback) -> Result<bool> {
    let Some((seq, _)) = find(conn, id)? else { return Ok(false) };
    join_feedback(conn, seq, std::slice::from_ref(feedback))?;
    Ok(true)
}

/// Deletes records that were created before a time, oldest first.
pub(super) fn expire(conn: &Connection, before: Timestamp, limit: usize) -> Result<usize> {
    let sql = "SELECT seq, id, facts FROM inferences INDEXED BY by_id WHERE id < ?1 ORDER BY id LIMIT ?2";
    let mut statement = conn.prepare_cached(sql)?;
    let first = InferenceId::first_at(before);
    let found = statement
        .query_map(params![first.0.as_bytes(), rows(limit)], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
    // Collected first: deleting from what is being read would skip rows.
    let found: Vec<(i64, [u8; 16], String)> = found.collect::<rusqlite::Result<_>>()?;
    for (seq, id, facts) in &found {
        remove(conn, *seq, &InferenceId(uuid::Uuid::from_bytes(*id)), facts)?;
    }
    Ok(found.len())
}

/// A record's number and status.
fn find(conn: &Connection, id: &InferenceId) -> Result<Option<(i64, Status)>> {
    let mut statement = conn.prepare_cached("SELECT seq, status FROM inferences WHERE id = ?1")?;
    let found = statement.query_row([id.0.as_bytes()], |row| Ok((row.get(0)?, row.get::<_, String>(1)?)));
    let Some((seq, word)) = found.optional()? else { return Ok(None) };
    let word: StrDeserializer<ValueError> = word.as_str().into_deserializer();
    let status = Status::deserialize(word).map_err(|e| broken("status", e))?;
    Ok(Some((seq, status)))
}

fn id_of_key(conn: &Connection, key: &str) -> Result<Option<InferenceId>> {
    let mut statement = conn.prepare_cached("SELECT id FROM inferences WHERE idempotency_key = ?1")?;
    let id: Option<[u8; 16]> = statement.query_row([key], |row| row.get(0)).optional()?;
    Ok(id.map(|id| InferenceId(uuid::Uuid::from_bytes(id))))
}

/// Writes a record that is not there.
fn add(conn: &Connection, record: &Record) -> Result<()> {
    let mut statement = conn.prepare_cached(
        "INSERT INTO inferences (id, created_ms, status, model, version, user, idempotency_key, facts)
         VALUES (:id, :created_ms, :status, :model, :version, :user, :key, :facts)",
    )?;
    let facts = &record.facts;
    statement.execute(named_params! {
        ":id": record.id.0.as_bytes(),
        ":created_ms": record.id.created_at().as_millisecond(),
        ":status": facts.status.as_str(),
        ":model": facts.model,
        ":version": facts.version,
        ":user": facts.user,
        ":key": facts.idempotency_key,
        ":facts": facts_text(facts)?,
    })?;
    let seq = conn.last_insert_rowid();
    add_metadata(conn, seq, record)?;
    add_output(conn, seq, record)?;
    join_feedback(conn, seq, &facts.feedback)
}

/// Writes a record over the one that has this number.
fn replace(conn: &Connection, seq: i64, record: &Record) -> Result<()> {
    let mut statement = conn.prepare_cached("SELECT facts FROM inferences WHERE seq = ?1")?;
    let old: String = statement.query_row([seq], |row| row.get(0))?;
    remove_metadata(conn, &record.id, &old)?;
    conn.prepare_cached("DELETE FROM outputs WHERE seq = ?1")?.execute([seq])?;
    let mut statement = conn.prepare_cached(
        "UPDATE inferences SET status = :status, model = :model, version = :version, user = :user,
         idempotency_key = :key, facts = :facts WHERE seq = :seq",
    )?;
    let facts = &record.facts;
    statement.execute(named_params! {
        ":seq": seq,
        ":status": facts.status.as_str(),
        ":model": facts.model,
        ":version": facts.version,
        ":user": facts.user,
        ":key": facts.idempotency_key,
        ":facts": facts_text(facts)?,
    })?;
    add_metadata(conn, seq, record)?;
    add_output(conn, seq, record)?;
    join_feedback(conn, seq, &facts.feedback)
}

fn add_metadata(conn: &Connection, seq: i64, record: &Record) -> Result<()> {
    let mut statement = conn.prepare_cached("INSERT INTO metadata (key, value, id, seq) VALUES (?1, ?2, ?3, ?4)")?;
    for (key, value) in &record.facts.metadata {
        statement.execute(params![key, value, record.id.0.as_bytes(), seq])?;
    }
    Ok(())
}

fn add_output(conn: &Connection, seq: i64, record: &Record) -> Result<()> {
    let Some(output) = &record.output else { return Ok(()) };
    let row = OutputRow::new(output)?;
    conn.prepare_cached("INSERT INTO outputs (seq, row_lens, rows, json) VALUES (?1, ?2, ?3, ?4)")?
        .execute(params![seq, row.row_lens, row.rows, row.json])?;
    Ok(())
}

/// Adds what is not there yet behind what is.
fn join_feedback(conn: &Connection, seq: i64, new: &[Feedback]) -> Result<()> {
    if new.is_empty() {
        return Ok(());
    }
    let mut there = feedback(conn, seq)?;
    let mut statement = conn
        .prepare_cached("INSERT INTO feedback (seq, idx, at, score, label, comment) VALUES (?1, ?2, ?3, ?4, ?5, ?6)")?;
    for said in new {
        if !there.contains(said) {
            // The place behind the last: nothing is taken out of a record's feedback but all of it.
            let idx = rows(there.len());
            statement.execute(params![seq, idx, said.at.to_string(), said.score, said.label, said.comment])?;
            there.push(said.clone());
        }
    }
    Ok(())
}

/// Deletes a record from every table.
fn remove(conn: &Connection, seq: i64, id: &InferenceId, facts: &str) -> Result<()> {
    remove_metadata(conn, id, facts)?;
    conn.prepare_cached("DELETE FROM feedback WHERE seq = ?1")?.execute([seq])?;
    conn.prepare_cached("DELETE FROM outputs WHERE seq = ?1")?.execute([seq])?;
    conn.prepare_cached("DELETE FROM inferences WHERE seq = ?1")?.execute([seq])?;
    Ok(())
}

/// Takes out the metadata that these facts name: an index by record would cost every insert for what only this needs.
fn remove_metadata(conn: &Connection, id: &InferenceId, facts: &str) -> Result<()> {
    #[derive(Deserialize)]
    struct Only {
        #[serde(default)]
        metadata: BTreeMap<String, String>,
    }
    let old: Only = serde_json::from_str(facts).map_err(|e| broken("facts", e))?;
    let mut statement = conn.prepare_cached("DELETE FROM metadata WHERE key = ?1 AND value = ?2 AND id = ?3")?;
    for (key, value) in &old.metadata {
        statement.execute(params![key, value, id.0.as_bytes()])?;
    }
    Ok(())
}
