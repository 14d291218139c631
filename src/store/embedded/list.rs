//! A page of records as one range of one index.
//!
//! Whatever is asked for, one condition leads: its index holds the records that meet it in the order of their ids, the page
//! is a stretch of it, and the other conditions are looked up for each record on the way. Conditions on model, user and
//! status lead in pairs, because a pair can be rare where neither is (the failures of a model that never fails). Where
//! several could lead, the one whose next records reach furthest back is the rarest and does: [`choose`].
//!
//! SQLite's own planner is not asked (`INDEXED BY`, `CROSS JOIN`): it has statistics of columns and not of values, and a
//! wrong guess reads a million records.

use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension, params_from_iter};

use super::row::{COLUMNS, Found};
use crate::Result;
use crate::store::query::{MAX_LIMIT, Page, Query};
use crate::store::record::InferenceId;

/// Records ahead that [`choose`] looks at: fewer than these are cheap to go through whatever else is asked of them.
const LOOK_AHEAD: usize = 1000;

/// What can lead through a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lead<'a> {
    /// This index of `inferences`.
    Index(&'static str),
    /// The records that have this key and value.
    Metadata(&'a str, &'a str),
}

/// Reads a page. `conn` is in a transaction, so that all of it is of one moment.
pub(super) fn list(conn: &Connection, query: &Query) -> Result<Page> {
    let limit = query.limit.clamp(1, MAX_LIMIT);
    let lead = choose(conn, query)?;
    // One more than asked for tells whether there is a next page.
    let (sql, values) = select(query, lead, COLUMNS, limit + 1, 0);
    let mut statement = conn.prepare_cached(&sql)?;
    let mut rows = statement.query(params_from_iter(values))?;
    let mut page = Page::default();
    while let Some(row) = rows.next()? {
        if page.records.len() == limit {
            page.next = page.records.last().map(|record| record.id);
            break;
        }
        page.records.push(Found::read(row)?.record(conn, query.with_output)?);
    }
    Ok(page)
}

/// The lead whose next [`LOOK_AHEAD`] records reach furthest back.
fn choose<'a>(conn: &Connection, query: &'a Query) -> Result<Lead<'a>> {
    let leads = leads(query);
    let [first, others @ ..] = leads.as_slice() else { return Ok(Lead::Index("by_id")) };
    if others.is_empty() {
        return Ok(*first);
    }
    let mut rarest: Option<([u8; 16], Lead)> = None;
    for lead in &leads {
        let (sql, values) = select_ahead(query, *lead);
        let ahead = conn.prepare_cached(&sql)?.query_row(params_from_iter(values), |row| row.get(0)).optional()?;
        let Some(ahead) = ahead else { return Ok(*lead) };
        if rarest.is_none_or(|(id, _)| ahead < id) {
            rarest = Some((ahead, *lead));
        }
    }
    Ok(rarest.map_or(*first, |(_, lead)| lead))
}

/// Everything that could lead through this list.
fn leads(query: &Query) -> Vec<Lead<'_>> {
    let indexes: &[&str] = match (&query.model, &query.user, &query.status) {
        (None, None, None) => &[],
        (Some(_), None, None) => &["by_model"],
        (None, Some(_), None) => &["by_user"],
        (None, None, Some(_)) => &["by_status"],
        (Some(_), None, Some(_)) => &["by_model_status"],
        (Some(_), Some(_), None) => &["by_user_model"],
        (None, Some(_), Some(_)) => &["by_user_status"],
        (Some(_), Some(_), Some(_)) => &["by_user_model", "by_user_status", "by_model_status"],
    };
    let metadata = query.metadata.iter().map(|(key, value)| Lead::Metadata(key, value));
    indexes.iter().map(|index| Lead::Index(index)).chain(metadata).collect()
}

/// The ids of a list: from this one, to before that one.
fn range(query: &Query) -> (InferenceId, InferenceId) {
    let from = query.from.map_or(InferenceId(uuid::Uuid::nil()), InferenceId::first_at);
    let to = query.to.map_or(InferenceId(uuid::Uuid::max()), InferenceId::first_at);
    (from, query.after.map_or(to, |after| after.min(to)))
}

/// The statement of a page and its values: `limit` records from the `offset`th on that meet every condition.
fn select(query: &Query, lead: Lead, columns: &str, limit: usize, offset: usize) -> (String, Vec<Value>) {
    let mut values = Vec::new();
    let mut conditions = Vec::new();
    let id = lead.id();
    let equal = [("model", &query.model), ("user", &query.user)];
    let status = query.status.map(|status| status.as_str().to_string());
    for (column, value) in equal.into_iter().chain([("status", &status)]) {
        if let Some(value) = value {
            conditions.push(format!("i.{column} = ?"));
            values.push(Value::Text(value.clone()));
        }
    }
    for (key, value) in &query.metadata {
        if lead != Lead::Metadata(key, value) {
            conditions
                .push(format!("EXISTS (SELECT 1 FROM metadata AS x WHERE x.key = ? AND x.value = ? AND x.id = {id})"));
            values.extend([Value::Text(key.clone()), Value::Text(value.clone())]);
        }
    }
    lead.add(query, &mut conditions, &mut values);
    let join = match lead {
        Lead::Index(_) => "",
        Lead::Metadata(..) => " CROSS JOIN inferences AS i ON i.seq = m.seq",
    };
    finish(format!("SELECT {columns} FROM {}{join}", lead.table()), lead, &conditions, values, limit, offset)
}

/// The id that lies [`LOOK_AHEAD`] records further on in a lead's list, other conditions left out.
fn select_ahead(query: &Query, lead: Lead) -> (String, Vec<Value>) {
    let (mut conditions, mut values) = (Vec::new(), Vec::new());
    if let Lead::Index(index) = lead {
        let status = query.status.map(|status| status.as_str().to_string());
        for (column, value) in [("model", &query.model), ("user", &query.user), ("status", &status)] {
            if let (Some(value), true) = (value, index.contains(column)) {
                conditions.push(format!("i.{column} = ?"));
                values.push(Value::Text(value.clone()));
            }
        }
    }
    lead.add(query, &mut conditions, &mut values);
    finish(format!("SELECT {} FROM {}", lead.id(), lead.table()), lead, &conditions, values, 1, LOOK_AHEAD)
}

fn finish(
    select: String,
    lead: Lead,
    conditions: &[String],
    mut values: Vec<Value>,
    limit: usize,
    offset: usize,
) -> (String, Vec<Value>) {
    // Both fit: a page has at most MAX_LIMIT records, and LOOK_AHEAD is a constant.
    values.extend([Value::Integer(limit as i64), Value::Integer(offset as i64)]);
    let sql = format!("{select} WHERE {} ORDER BY {} DESC LIMIT ? OFFSET ?", conditions.join(" AND "), lead.id());
    (sql, values)
}

impl Lead<'_> {
    fn id(self) -> &'static str {
        match self {
            Self::Index(_) => "i.id",
            Self::Metadata(..) => "m.id",
        }
    }

    fn table(self) -> String {
        match self {
            Self::Index(index) => format!("inferences AS i INDEXED BY {index}"),
            Self::Metadata(..) => "metadata AS m".to_string(),
        }
    }

    /// The lead's own condition where `inferences` has no column for it, and the range of ids.
    fn add(self, query: &Query, conditions: &mut Vec<String>, values: &mut Vec<Value>) {
        if let Self::Metadata(key, value) = self {
            conditions.push("m.key = ? AND m.value = ?".to_string());
            values.extend([Value::Text(key.to_string()), Value::Text(value.to_string())]);
        }
        let (from, to) = range(query);
        let id = self.id();
        conditions.push(format!("{id} >= ? AND {id} < ?"));
        values.extend([Value::Blob(from.0.as_bytes().to_vec()), Value::Blob(to.0.as_bytes().to_vec())]);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::change;
    use super::super::migrate::migrate;
    use super::super::schema::{INDEXES, MIGRATIONS};
    use super::*;
    use crate::store::record::{Facts, Record, Status};

    fn store() -> Connection {
        let mut conn = Connection::open_in_memory().unwrap();
        migrate(&mut conn, "test", MIGRATIONS, INDEXES).unwrap();
        conn
    }

    /// Every combination of the filters, with values that nothing has.
    fn queries() -> Vec<Query> {
        let some = |mask: u32, bit: u32| (mask >> bit & 1 == 1).then(|| format!("value {bit}"));
        let query = |mask: u32| Query {
            model: some(mask, 0),
            user: some(mask, 1),
            status: some(mask, 2).map(|_| Status::Failed),
            from: some(mask, 3).map(|_| jiff::Timestamp::UNIX_EPOCH),
            to: some(mask, 4).map(|_| jiff::Timestamp::UNIX_EPOCH),
            metadata: (5..7).filter_map(|bit| Some((format!("key {bit}"), some(mask, bit)?))).collect(),
            limit: 10,
            ..Query::default()
        };
        (0..1 << 7).map(query).collect()
    }

    fn plan(conn: &Connection, (sql, values): (String, Vec<Value>)) -> Vec<String> {
        let mut statement = conn.prepare(&format!("EXPLAIN QUERY PLAN {sql}")).unwrap();
        let lines = statement.query_map(params_from_iter(values), |row| row.get("detail")).unwrap();
        lines.map(Result::unwrap).collect()
    }

    #[test]
    fn every_list_is_a_range_of_an_index() {
        let conn = store();
        let mut num_plans = 0;
        for query in queries() {
            for lead in leads(&query).into_iter().chain(leads(&query).is_empty().then_some(Lead::Index("by_id"))) {
                let first = match lead {
                    Lead::Index(index) => format!("INDEX {index} ("),
                    Lead::Metadata(..) => "SEARCH m USING PRIMARY KEY (key=? AND value=?".to_string(),
                };
                // The row of an entry of the index, and the other metadata of it: each finds one.
                let is_lookup = |line: &String| {
                    line.starts_with("CORRELATED SCALAR SUBQUERY")
                        || line.starts_with("SEARCH i USING INTEGER PRIMARY KEY (rowid=?)")
                        || line.starts_with("SEARCH x ") && line.contains("(key=? AND value=? AND id=?)")
                };
                for statement in [select(&query, lead, COLUMNS, 10, 0), select_ahead(&query, lead)] {
                    let lines = plan(&conn, statement.clone());
                    assert!(lines[0].starts_with("SEARCH") && lines[0].contains(&first), "{statement:?}: {lines:#?}");
                    assert!(lines[0].contains("id>? AND id<?"), "{statement:?}: {lines:#?}");
                    assert!(lines[1..].iter().all(is_lookup), "{statement:?}: {lines:#?}");
                    num_plans += 1;
                }
            }
        }
        assert!(num_plans > 400, "{num_plans}");
    }

    #[test]
    fn looking_ahead_reads_the_index_alone() {
        let conn = store();
        for query in queries() {
            for lead in leads(&query) {
                let lines = plan(&conn, select_ahead(&query, lead));
                let covering = matches!(lead, Lead::Metadata(..)) || lines[0].contains("COVERING INDEX");
                assert!(covering && lines.len() == 1, "{lines:?}");
            }
        }
    }

    fn add(conn: &Connection, num: usize, tenant: &str, user: &str) {
        for _ in 0..num {
            let facts = Facts {
                user: Some(user.to_string()),
                metadata: BTreeMap::from([("tenant".to_string(), tenant.to_string())]),
                ..Facts::new(Status::Succeeded, "m", "1", "embed", "application")
            };
            change::put(conn, &Record { id: InferenceId::new(), facts, output: None }).unwrap();
        }
    }

    #[test]
    fn the_rarest_condition_leads() {
        let conn = store();
        add(&conn, 10, "small", "busy");
        add(&conn, 3, "large", "quiet");
        for _ in 0..3 {
            add(&conn, 500, "large", "busy");
            add(&conn, 500, "medium", "busy");
        }
        let query = |tenant: &str, user: &str| Query {
            user: Some(user.to_string()),
            metadata: BTreeMap::from([("tenant".to_string(), tenant.to_string())]),
            limit: 10,
            ..Query::default()
        };
        for (tenant, user, expected) in [
            ("small", "busy", Lead::Metadata("tenant", "small")),
            ("large", "quiet", Lead::Index("by_user")),
            ("large", "busy", Lead::Metadata("tenant", "large")),
            ("nobody", "busy", Lead::Metadata("tenant", "nobody")),
        ] {
            let query = query(tenant, user);
            assert_eq!(choose(&conn, &query), Ok(expected), "{tenant} {user}");
        }
    }
}
