//! Tasks in SQL. Each function runs within the writer's transaction, so nobody comes between its statements.

use std::collections::BTreeSet;

use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, params};

use super::super::fault::{broken, time};
use super::super::rows;
use crate::store::work::{Claim, Hold, Task, TaskKind, after};
use crate::{Error, Result};

/// A task on its way into the tables.
pub(super) struct NewTask {
    id: String,
    kind: TaskKind,
    due_ms: i64,
    attempts: u32,
    /// JSON.
    pub payload: String,
}

impl NewTask {
    /// Writes the payload out, off the writer's thread.
    pub(super) fn new(task: &Task) -> Self {
        let Task { id, kind, payload, due_at, attempts } = task;
        let due_ms = due_at.as_millisecond();
        Self { id: id.clone(), kind: *kind, due_ms, attempts: *attempts, payload: payload.to_string() }
    }
}

/// Adds a task, unless it is there.
pub(super) fn add(conn: &Connection, task: &NewTask) -> Result<()> {
    let sql = "INSERT INTO tasks (id, kind, due_ms, attempts, leased_until_ms) VALUES (?1, ?2, ?3, ?4, 0)
               ON CONFLICT (id) DO NOTHING";
    let values = params![task.id, task.kind.as_str(), task.due_ms, task.attempts];
    if conn.prepare_cached(sql)?.execute(values)? > 0 {
        let seq = conn.last_insert_rowid();
        conn.prepare_cached("INSERT INTO payloads (seq, payload) VALUES (?1, ?2)")?
            .execute(params![seq, task.payload])?;
    }
    Ok(())
}

/// A task that a claim may take.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Free {
    due_ms: i64,
    id: String,
    seq: i64,
    kind: TaskKind,
}

/// Takes tasks as [`crate::store::work::Work::claim`] says.
pub(super) fn claim(conn: &Connection, claim: &Claim) -> Result<Vec<Task>> {
    remove_cancelled(conn, claim.now)?;
    let mut free = match &claim.ids {
        Some(ids) => free_of(conn, claim, ids)?,
        None => all_free(conn, claim)?,
    };
    free.sort();
    free.truncate(claim.limit);
    let mut tasks = Vec::with_capacity(free.len());
    for one in free {
        match take(conn, claim, one) {
            Ok(task) => tasks.push(task),
            // It stays where it is and the others are done: one broken task must not end all work.
            Err(error @ Error::Internal { .. }) => tracing::error!(%error, "a task cannot be read"),
            Err(error) => return Err(error),
        }
    }
    Ok(tasks)
}

/// Removes what was cancelled and whose owner did not live to learn of it.
fn remove_cancelled(conn: &Connection, now: Timestamp) -> Result<()> {
    let sql = "SELECT seq FROM tasks INDEXED BY tasks_cancelled WHERE cancelled IS NOT NULL AND leased_until_ms <= ?1";
    let mut statement = conn.prepare_cached(sql)?;
    let found = statement.query_map([now.as_millisecond()], |row| row.get(0))?;
    // Collected first: deleting from what is being read would skip rows.
    let found: Vec<i64> = found.collect::<rusqlite::Result<_>>()?;
    found.into_iter().try_for_each(|seq| remove(conn, seq))
}

/// Of each kind the tasks that are due the longest, as many as may be wanted of all kinds together.
fn all_free(conn: &Connection, claim: &Claim) -> Result<Vec<Free>> {
    let sql = "SELECT due_ms, id, seq FROM tasks INDEXED BY tasks_by_due
               WHERE kind = ?1 AND due_ms <= ?2 AND leased_until_ms <= ?3 ORDER BY due_ms, id LIMIT ?4";
    let mut statement = conn.prepare_cached(sql)?;
    let mut free = Vec::new();
    for kind in claim.kinds.iter().copied().collect::<BTreeSet<_>>() {
        let (due_by, now) = (claim.due_by.as_millisecond(), claim.now.as_millisecond());
        let found = statement.query_map(params![kind.as_str(), due_by, now, rows(claim.limit)], |row| {
            Ok(Free { due_ms: row.get(0)?, id: row.get(1)?, seq: row.get(2)?, kind })
        })?;
        free.extend(found.collect::<rusqlite::Result<Vec<_>>>()?);
    }
    Ok(free)
}

/// Those of these tasks that may be taken.
fn free_of(conn: &Connection, claim: &Claim, ids: &[String]) -> Result<Vec<Free>> {
    let sql = "SELECT due_ms, seq, kind FROM tasks WHERE id = ?1 AND due_ms <= ?2 AND leased_until_ms <= ?3";
    let mut statement = conn.prepare_cached(sql)?;
    let mut free = Vec::new();
    for id in ids.iter().collect::<BTreeSet<_>>() {
        let values = params![id, claim.due_by.as_millisecond(), claim.now.as_millisecond()];
        let found = statement.query_row(values, |row| Ok((row.get(0)?, row.get(1)?, row.get::<_, String>(2)?)));
        let Some((due_ms, seq, kind)) = found.optional()? else { continue };
        let wanted = claim.kinds.iter().copied().find(|wanted| wanted.as_str() == kind);
        free.extend(wanted.map(|kind| Free { due_ms, id: id.clone(), seq, kind }));
    }
    Ok(free)
}

/// Gives a task to the claim's owner.
fn take(conn: &Connection, claim: &Claim, free: Free) -> Result<Task> {
    let sql = "UPDATE tasks SET owner = ?1, leased_until_ms = ?2, attempts = min(attempts + 1, ?3) WHERE seq = ?4
               RETURNING attempts";
    let until = leased_until(after(claim.now, claim.lease));
    let values = params![claim.owner, until, u32::MAX, free.seq];
    let attempts = conn.prepare_cached(sql)?.query_row(values, |row| row.get(0))?;
    let mut statement = conn.prepare_cached("SELECT payload FROM payloads WHERE seq = ?1")?;
    let payload: Option<String> = statement.query_row([free.seq], |row| row.get(0)).optional()?;
    let payload = payload.ok_or_else(|| broken("payloads", format!("none of task {}", free.id)))?;
    let payload = serde_json::from_str(&payload).map_err(|e| broken("payloads", format!("task {}: {e}", free.id)))?;
    let due_at = time("tasks.due_ms", free.due_ms)?;
    Ok(Task { id: free.id, kind: free.kind, payload, due_at, attempts })
}

/// Holds a task longer.
pub(super) fn renew(conn: &Connection, id: &str, owner: &str, until: Timestamp) -> Result<Hold> {
    let (hold, seq) = held(conn, id, owner)?;
    conn.prepare_cached("UPDATE tasks SET leased_until_ms = ?1 WHERE seq = ?2")?
        .execute(params![leased_until(until), seq])?;
    Ok(hold)
}

/// Ends a task.
pub(super) fn finish(conn: &Connection, id: &str, owner: &str) -> Result<Hold> {
    let (hold, seq) = held(conn, id, owner)?;
    if let Some(seq) = seq {
        remove(conn, seq)?;
    }
    Ok(hold)
}

/// Gives a task back, or ends it where it is cancelled.
pub(super) fn postpone(conn: &Connection, id: &str, owner: &str, due_at: Timestamp) -> Result<Hold> {
    let (hold, seq) = held(conn, id, owner)?;
    match (hold, seq) {
        (Hold::Held, seq) => {
            let sql = "UPDATE tasks SET owner = NULL, leased_until_ms = 0, due_ms = ?1 WHERE seq = ?2";
            conn.prepare_cached(sql)?.execute(params![due_at.as_millisecond(), seq])?;
        }
        (Hold::Cancelled, Some(seq)) => remove(conn, seq)?,
        _ => {}
    }
    Ok(hold)
}

/// Ends a task that waits, marks one that is held.
pub(super) fn cancel(conn: &Connection, id: &str) -> Result<bool> {
    let mut statement = conn.prepare_cached("SELECT seq, owner IS NULL FROM tasks WHERE id = ?1")?;
    let found = statement.query_row([id], |row| Ok((row.get(0)?, row.get(1)?)));
    match found.optional()? {
        None => return Ok(false),
        Some((seq, true)) => remove(conn, seq)?,
        Some((seq, false)) => {
            conn.prepare_cached("UPDATE tasks SET cancelled = 1 WHERE seq = ?1")?.execute([seq])?;
        }
    }
    Ok(true)
}

/// Number of tasks of each kind.
pub(super) fn count(conn: &Connection) -> Result<Vec<(TaskKind, u64)>> {
    let mut counts = Vec::new();
    let mut statement = conn.prepare_cached("SELECT count(*) FROM tasks INDEXED BY tasks_by_due WHERE kind = ?1")?;
    for kind in TaskKind::ALL {
        let count: i64 = statement.query_row([kind.as_str()], |row| row.get(0))?;
        counts.extend(u64::try_from(count).ok().filter(|count| *count > 0).map(|count| (*kind, count)));
    }
    Ok(counts)
}

/// How a task stands with an owner, and its number while it is the owner's.
fn held(conn: &Connection, id: &str, owner: &str) -> Result<(Hold, Option<i64>)> {
    let mut statement =
        conn.prepare_cached("SELECT seq, cancelled IS NOT NULL FROM tasks WHERE id = ?1 AND owner = ?2")?;
    let found = statement.query_row([id, owner], |row| Ok((row.get(0)?, row.get(1)?))).optional()?;
    Ok(match found {
        None => (Hold::Lost, None),
        Some((seq, true)) => (Hold::Cancelled, Some(seq)),
        Some((seq, false)) => (Hold::Held, Some(seq)),
    })
}

fn remove(conn: &Connection, seq: i64) -> Result<()> {
    conn.prepare_cached("DELETE FROM payloads WHERE seq = ?1")?.execute([seq])?;
    conn.prepare_cached("DELETE FROM tasks WHERE seq = ?1")?.execute([seq])?;
    Ok(())
}

/// A lease's end as it is kept: 0 says that nobody holds the task.
fn leased_until(until: Timestamp) -> i64 {
    until.as_millisecond().max(1)
}

#[cfg(test)]
mod tests {
    use super::super::super::migrate::migrate;
    use super::super::super::schema::{INDEXES, MIGRATIONS};
    use super::*;

    #[test]
    fn a_claim_reads_only_the_index_of_what_is_due() {
        let mut conn = Connection::open_in_memory().unwrap();
        migrate(&mut conn, "a.db", MIGRATIONS, INDEXES).unwrap();
        let sql = "EXPLAIN QUERY PLAN SELECT due_ms, id, seq FROM tasks INDEXED BY tasks_by_due
                   WHERE kind = 'a' AND due_ms <= 2 AND leased_until_ms <= 3 ORDER BY due_ms, id LIMIT 4";
        let mut statement = conn.prepare(sql).unwrap();
        let plan: Vec<String> =
            statement.query_map([], |row| row.get(3)).unwrap().collect::<rusqlite::Result<_>>().unwrap();
        assert_eq!(plan, ["SEARCH tasks USING COVERING INDEX tasks_by_due (kind=? AND due_ms<?)"]);
    }
}
