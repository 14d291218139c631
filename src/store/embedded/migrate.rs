//! Brings a file to the present schema, one step after another, or refuses it.

use rusqlite::{Connection, Transaction, TransactionBehavior};

use super::schema::{APPLICATION_ID, INDEXES, Index, MIGRATIONS};
use crate::store::Migrated;
use crate::{Error, Result};

/// Takes the steps that `conn`'s file lacks and makes its indexes, all in one transaction under an exclusive lock: it
/// ends at the present schema, or as it was. Returns what was done.
///
/// Errors: [`Error::Config`] for the file of another program and for one that a newer version of this program has written.
pub(super) fn migrate(conn: &mut Connection, file: &str, migrations: &[&str], indexes: &[Index]) -> Result<Migrated> {
    let tx = conn.transaction_with_behavior(TransactionBehavior::Exclusive)?;
    let migrated = differences(&tx, file, migrations, indexes)?;
    for (step, sql) in migrations.iter().enumerate().skip(migrated.from as usize) {
        tx.execute_batch(sql)?;
        tracing::info!(file, version = step + 1, "migrated the embedded store");
    }
    tx.execute_batch(&format!(
        "PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {};",
        migrations.len()
    ))?;
    for index in indexes {
        ensure(&tx, index)?;
    }
    tx.commit()?;
    Ok(migrated)
}

/// What [`migrate`] would do to bring a file to the present schema. Errors: as there.
pub(super) fn pending(conn: &Connection, file: &str) -> Result<Migrated> {
    let tx = conn.unchecked_transaction()?;
    differences(&tx, file, MIGRATIONS, INDEXES)
}

fn differences(conn: &Connection, file: &str, migrations: &[&str], indexes: &[Index]) -> Result<Migrated> {
    let number = |pragma: &str| conn.query_row(&format!("PRAGMA {pragma}"), [], |row| row.get::<_, i64>(0));
    let (application, version) = (number("application_id")?, number("user_version")?);
    let num_objects: i64 = conn.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
    let is_empty = num_objects == 0 && version == 0;
    if !is_empty && application != i64::from(APPLICATION_ID) {
        return Err(fault(format!("{file} is a database of another program: name another folder")));
    }
    let taken = usize::try_from(version).ok().filter(|taken| *taken <= migrations.len()).ok_or_else(|| {
        fault(format!(
            "{file} has schema version {version}, this program knows them up to {}: use the newer program that wrote it",
            migrations.len()
        ))
    })?;
    let mut changes = Vec::new();
    for step in taken..migrations.len() {
        changes.push(format!("schema taken from version {step} to {}", step + 1));
    }
    for index in indexes {
        match found(conn, index)? {
            Some(sql) if sql == index.sql() => {}
            Some(_) => changes.push(format!("index `{}` made anew: it was not as declared", index.name)),
            None => changes.push(format!("index `{}` created", index.name)),
        }
    }
    // Numbers of steps in a list of the source: few.
    Ok(Migrated { from: taken as i32, to: migrations.len() as i32, changes })
}

/// The statement that made an index.
fn found(conn: &Connection, index: &Index) -> Result<Option<String>> {
    let mut found = conn.prepare("SELECT sql FROM sqlite_schema WHERE type = 'index' AND name = ?1")?;
    Ok(found.query_map([index.name], |row| row.get(0))?.next().transpose()?)
}

/// Makes an index that is missing or that is not as declared.
fn ensure(tx: &Transaction, index: &Index) -> Result<()> {
    let found = found(tx, index)?;
    if found.as_deref() == Some(&index.sql()) {
        return Ok(());
    }
    if found.is_some() {
        tracing::warn!(index = index.name, "an index of the embedded store was not as declared: it is made anew");
        tx.execute_batch(&format!("DROP INDEX {}", index.name))?;
    }
    tx.execute_batch(&index.sql())?;
    Ok(())
}

fn fault(reason: String) -> Error {
    Error::Config { faults: vec![format!("database.path: {reason}")] }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(conn: &Connection) -> i64 {
        conn.query_row("PRAGMA user_version", [], |row| row.get(0)).unwrap()
    }

    fn names(conn: &Connection, kind: &str) -> Vec<String> {
        let sql = "SELECT name FROM sqlite_schema WHERE type = ?1 AND name NOT LIKE 'sqlite_%' ORDER BY name";
        let mut statement = conn.prepare(sql).unwrap();
        statement.query_map([kind], |row| row.get(0)).unwrap().map(Result::unwrap).collect()
    }

    fn message(error: Error) -> String {
        assert!(matches!(error, Error::Config { .. }), "{error:?}");
        error.to_string()
    }

    #[test]
    fn an_empty_file_gets_every_table_and_index_once() {
        let mut conn = Connection::open_in_memory().unwrap();
        for round in 0..2 {
            let announced = pending(&conn, "a.db").unwrap();
            let migrated = migrate(&mut conn, "a.db", MIGRATIONS, INDEXES).unwrap();
            assert_eq!(migrated, announced);
            let num_changes = if round == 0 { MIGRATIONS.len() + INDEXES.len() } else { 0 };
            assert_eq!(migrated.changes.len(), num_changes, "{migrated:?}");
            assert_eq!(version(&conn), MIGRATIONS.len() as i64);
            let tables = ["documents", "feedback", "inferences", "metadata", "outputs", "parts", "payloads", "tasks"];
            assert_eq!(names(&conn, "table"), tables);
            let mut declared: Vec<&str> = INDEXES.iter().map(|index| index.name).collect();
            declared.sort();
            assert_eq!(names(&conn, "index"), declared);
        }
    }

    #[test]
    fn only_the_steps_that_are_missing_are_taken() {
        let mut conn = Connection::open_in_memory().unwrap();
        migrate(&mut conn, "a.db", &["CREATE TABLE a (x); INSERT INTO a VALUES (1)"], &[]).unwrap();
        migrate(&mut conn, "a.db", &["fails if it is taken again", "ALTER TABLE a ADD COLUMN y DEFAULT 2"], &[])
            .unwrap();
        let row: (i64, i64) = conn.query_row("SELECT x, y FROM a", [], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
        assert_eq!((row, version(&conn)), ((1, 2), 2));
    }

    #[test]
    fn a_step_that_fails_leaves_the_file_as_it_was() {
        let mut conn = Connection::open_in_memory().unwrap();
        migrate(&mut conn, "a.db", &["CREATE TABLE a (x)"], &[]).unwrap();
        let steps = ["CREATE TABLE a (x)", "CREATE TABLE b (x)", "CREATE TABLE b (x)"];
        assert!(matches!(migrate(&mut conn, "a.db", &steps, &[]), Err(Error::Internal { .. })));
        assert_eq!((version(&conn), names(&conn, "table")), (1, vec!["a".to_string()]));
    }

    #[test]
    fn a_newer_file_and_that_of_another_program_are_refused() {
        let mut conn = Connection::open_in_memory().unwrap();
        migrate(&mut conn, "a.db", &["CREATE TABLE a (x)", "CREATE TABLE b (x)"], &[]).unwrap();
        let refused = message(migrate(&mut conn, "a.db", &["CREATE TABLE a (x)"], &[]).unwrap_err());
        assert!(refused.contains("a.db has schema version 2") && refused.contains("up to 1"), "{refused}");
        assert_eq!(version(&conn), 2);

        let mut other = Connection::open_in_memory().unwrap();
        other.execute_batch("CREATE TABLE songs (x)").unwrap();
        let refused = message(migrate(&mut other, "b.db", MIGRATIONS, INDEXES).unwrap_err());
        assert!(refused.contains("b.db") && refused.contains("another program"), "{refused}");
        assert_eq!(names(&other, "table"), ["songs"]);
    }

    #[test]
    fn indexes_are_made_as_declared() {
        let mut conn = Connection::open_in_memory().unwrap();
        migrate(&mut conn, "a.db", MIGRATIONS, INDEXES).unwrap();
        conn.execute_batch("DROP INDEX by_user; DROP INDEX by_model; CREATE INDEX by_model ON inferences (id, model)")
            .unwrap();
        let expected = ["index `by_model` made anew: it was not as declared", "index `by_user` created"];
        assert_eq!(pending(&conn, "a.db").unwrap().changes, expected);
        assert_eq!(migrate(&mut conn, "a.db", MIGRATIONS, INDEXES).unwrap().changes, expected);
        assert!(pending(&conn, "a.db").unwrap().changes.is_empty());
        for index in INDEXES {
            let sql: String = conn
                .query_row("SELECT sql FROM sqlite_schema WHERE name = ?1", [index.name], |row| row.get(0))
                .unwrap();
            assert_eq!(sql, index.sql());
        }
    }
}
