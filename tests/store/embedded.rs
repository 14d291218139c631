//! What the embedded store promises beyond the contract: of its folder, its file, and of what a killed process leaves.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use eremois::Error;
use eremois::store::embedded::Embedded;
use eremois::store::query::Query;
use eremois::store::record::{InferenceId, Record, Status};
use eremois::store::{Inserted, Records};

use crate::samples::{awkward_values, embeddings, full_and_empty, queued, record, said};

/// Tells the child which folder to write to.
const CHILD: &str = "EREMOIS_TEST_STORE_CHILD";

fn refusal(folder: &Path) -> String {
    match Embedded::open(folder) {
        Err(Error::Config { faults }) => faults.join("\n"),
        Err(other) => panic!("refused by the wrong error: {other:?}"),
        Ok(_) => panic!("{} was opened", folder.display()),
    }
}

fn shell(folder: &Path) -> rusqlite::Connection {
    rusqlite::Connection::open(folder.join("eremois.db")).unwrap()
}

#[tokio::test]
async fn everything_is_there_after_it_was_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    // Folders on the way are made as well.
    let folder = dir.path().join("a/b");
    let [full, empty] = full_and_empty();
    {
        let store = Embedded::open(&folder).unwrap();
        store.put(&[full.clone(), empty.clone()]).await.unwrap();
        assert!(store.add_feedback(&empty.id, &said(1, Some(1.0), None, None)).await.unwrap());
    }
    let store = Embedded::open(&folder).unwrap();
    assert_eq!(store.get(&full.id).await, Ok(Some(full)));
    assert_eq!(store.get(&empty.id).await.unwrap().unwrap().facts.feedback, [said(1, Some(1.0), None, None)]);
    assert_eq!(store.quick_check().await, Ok(vec![]));
}

#[tokio::test]
async fn a_second_server_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path()).unwrap();
    let refused = refusal(dir.path());
    assert!(refused.contains("database.path") && refused.contains(&dir.path().display().to_string()), "{refused}");
    assert!(refused.contains(&format!("process {}", std::process::id())), "{refused}");
    store.put(&[record()]).await.unwrap();
    drop(store);
    assert_eq!(Embedded::open(dir.path()).unwrap().count().await, Ok(1));
}

#[test]
fn what_is_no_store_of_ours_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let folder = |name: &str| {
        let folder = dir.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        folder
    };
    let newer = folder("newer");
    drop(Embedded::open(&newer).unwrap());
    shell(&newer).execute_batch("PRAGMA user_version = 9000").unwrap();
    assert!(refusal(&newer).contains("version 9000"), "{}", refusal(&newer));

    let other = folder("other");
    shell(&other).execute_batch("CREATE TABLE songs (x)").unwrap();
    assert!(refusal(&other).contains("another program"), "{}", refusal(&other));

    let garbage = folder("garbage");
    let text = "no database at all ".repeat(1000);
    std::fs::write(garbage.join("eremois.db"), &text).unwrap();
    assert!(refusal(&garbage).contains("not a database"), "{}", refusal(&garbage));
    assert_eq!(std::fs::read_to_string(garbage.join("eremois.db")).unwrap(), text);

    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    assert!(refusal(&file).contains("file"), "{}", refusal(&file));
}

#[tokio::test]
async fn what_is_erased_is_in_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path()).unwrap();
    let marker = "a secret that only this user knows";
    for i in 0..200 {
        let mut one = record();
        one.facts.user = Some(["erika", "hans"][i % 2].to_string());
        if i % 2 == 0 {
            one.facts.input = eremois::store::record::StoredInput::Full(marker.into());
            one.facts.metadata.insert("note".to_string(), marker.to_string());
            one.facts.feedback = vec![said(1, None, None, Some(marker))];
        }
        store.put(&[one]).await.unwrap();
    }
    let files_with_it = || -> Vec<PathBuf> {
        let files = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path());
        let has =
            |path: &PathBuf| std::fs::read(path).unwrap().windows(marker.len()).any(|bytes| bytes == marker.as_bytes());
        files.filter(has).collect()
    };
    assert!(!files_with_it().is_empty());
    assert_eq!(store.erase_user("erika", 60).await.unwrap().len(), 60);
    assert_eq!(store.erase_user("erika", 60).await.unwrap().len(), 40);
    assert_eq!(files_with_it(), Vec::<PathBuf>::new());
    assert_eq!(store.count().await, Ok(100));
}

#[tokio::test]
async fn half_an_output_is_an_error_and_no_answer() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path()).unwrap();
    let (broken, sound) = (record(), record());
    store.put(&[broken.clone(), sound.clone()]).await.unwrap();
    shell(dir.path()).execute_batch("UPDATE outputs SET rows = substr(rows, 1, 8) WHERE seq = 1").unwrap();
    let got = store.get(&broken.id).await;
    assert!(matches!(&got, Err(Error::Internal { cause }) if cause.contains("rows")), "{got:?}");
    assert_eq!(store.get(&sound.id).await, Ok(Some(sound)));
}

#[tokio::test]
async fn the_file_can_be_read_with_sql() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path()).unwrap();
    let mut one = record();
    one.facts.user = Some("erika".to_string());
    store.put(std::slice::from_ref(&one)).await.unwrap();
    // The statements of docs/storage.md, while the store is open.
    let conn = shell(dir.path());
    let sql = "SELECT id, created_at, status, facts ->> '$.usage.num_tokens' FROM readable WHERE user = 'erika'";
    let read = |row: &rusqlite::Row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?));
    let found: (String, String, String, i64) = conn.query_row(sql, [], read).unwrap();
    let created_at = format!("{:.3}", one.id.created_at());
    assert_eq!(found, (one.id.to_string(), created_at, "succeeded".to_string(), 5));
    let sql = "SELECT row_lens, hex(rows) FROM outputs JOIN inferences USING (seq) WHERE user = 'erika'";
    let output: (String, String) = conn.query_row(sql, [], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    assert_eq!(output, ("[3]".to_string(), "0000803E000000BF0000803F".to_string()));
}

// ---- killed and full -------------------------------------------------------------------------------------------

/// The record of an id: whoever reads it back knows what it must be.
fn made_of(id: InferenceId) -> Record {
    let mut record = Record { id, ..record() };
    let start = (id.0.as_u128() % 1000) as usize;
    record.output = Some(embeddings(vec![awkward_values(1384)[start..start + 384].to_vec(), vec![start as f32]]));
    record.facts.completed_at = None;
    record.facts.idempotency_key = Some(format!("key of {id}"));
    record.facts.metadata.insert("id".to_string(), id.to_string());
    record
}

fn queued_of(id: InferenceId) -> Record {
    let mut record = Record { output: None, ..made_of(id) };
    record.facts.status = Status::Queued;
    record
}

/// No test of its own: what the tests below start as a process, to be killed. Eight tasks write, each in turns of four
/// kinds, and say on standard output what was acknowledged: `queued`, `done`, `deleting` (begun), `deleted` and the id.
#[test]
fn child() {
    let Ok(folder) = std::env::var(CHILD) else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let store = std::sync::Arc::new(Embedded::open(Path::new(&folder)).unwrap());
        let tasks = (0..8).map(|turn| {
            let store = store.clone();
            tokio::spawn(async move {
                let mut turn = turn;
                loop {
                    if let Err(error) = write_one(&store, turn).await {
                        return (error, store.count().await);
                    }
                    turn += 1;
                }
            })
        });
        for task in tasks.collect::<Vec<_>>() {
            let (error, count) = task.await.unwrap();
            println!("stopped by {error:?}, still reads {count:?}");
        }
    });
}

async fn write_one(store: &Embedded, turn: usize) -> eremois::Result<()> {
    let id = InferenceId::new();
    let record = made_of(id);
    match turn % 4 {
        0 => store.put(&[record]).await?,
        1 => assert_eq!(store.insert(&record).await?, Inserted::New),
        2 => {
            assert_eq!(store.insert(&queued_of(id)).await?, Inserted::New);
            println!("queued {id}");
            store.put(&[record]).await?;
        }
        _ => {
            store.put(&[record]).await?;
            println!("done {id}");
            println!("deleting {id}");
            assert!(store.delete(&id).await?);
            println!("deleted {id}");
            return Ok(());
        }
    }
    println!("done {id}");
    Ok(())
}

/// Runs the child until `is_enough` of the lines it has written, kills it with SIGKILL, and returns all whole lines.
fn run_child(mut command: Command, folder: &Path, mut is_enough: impl FnMut(&[String]) -> bool) -> Vec<String> {
    command.env(CHILD, folder).args(["embedded::child", "--exact", "--nocapture"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap();
    let (sender, lines) = std::sync::mpsc::channel();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let reading = std::thread::spawn(move || {
        let mut line = String::new();
        // A last line without its end was cut by the kill: whether it was meant is unknown.
        while stdout.read_line(&mut line).is_ok_and(|len| len > 0) && line.ends_with('\n') {
            sender.send(std::mem::take(&mut line).trim_end().to_string()).unwrap();
        }
    });
    let mut seen = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_enough(&seen) && child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "the child wrote too little: {seen:?}");
        seen.extend(lines.recv_timeout(Duration::from_millis(5)));
    }
    let _ = child.kill();
    child.wait().unwrap();
    reading.join().unwrap();
    seen.extend(lines);
    seen
}

/// The last word about each id.
fn last_words(lines: &[String]) -> BTreeMap<InferenceId, String> {
    let word_and_id = |line: &String| {
        let (word, id) = line.split_once(' ')?;
        Some((id.parse().ok()?, word.to_string()))
    };
    lines.iter().filter_map(word_and_id).collect()
}

/// Everything acknowledged is there and whole, everything deleted is not, and nothing else is half there.
async fn check(folder: &Path, words: &BTreeMap<InferenceId, String>) {
    let store = Embedded::open(folder).unwrap();
    assert_eq!(store.quick_check().await, Ok(vec![]));
    for (id, word) in words {
        let found = store.get(id).await.unwrap();
        let (done, queued) = (found.as_ref() == Some(&made_of(*id)), found.as_ref() == Some(&queued_of(*id)));
        let is_right = match word.as_str() {
            "done" => done,
            "queued" => queued || done,
            "deleting" => done || found.is_none(),
            "deleted" => found.is_none(),
            other => panic!("an unknown word: {other}"),
        };
        assert!(is_right, "{word} {id}, found {found:?}");
    }
    let mut query = Query { limit: 500, with_output: true, ..Query::default() };
    let mut num_listed = 0;
    loop {
        let page = store.list(&query).await.unwrap();
        for record in &page.records {
            assert!(*record == made_of(record.id) || *record == queued_of(record.id), "{record:?}");
            let by_key = store.find_by_key(&format!("key of {}", record.id)).await.unwrap();
            assert_eq!(by_key.map(|found| found.id), Some(record.id));
        }
        num_listed += page.records.len() as u64;
        query.after = page.next;
        if query.after.is_none() {
            break;
        }
    }
    assert_eq!(store.count().await, Ok(num_listed));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_survives_kill_9() {
    let dir = tempfile::tempdir().unwrap();
    let mut words = BTreeMap::new();
    for round in 0..10u64 {
        let before = words.len();
        // Random by what the clock says; from a few commits to a few hundred.
        let jitter = u64::from(std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().subsec_micros());
        let wait = Duration::from_millis(5 + (round * 83 + jitter) % 400);
        let mut first = None;
        let is_enough = |lines: &[String]| {
            let written = lines.iter().any(|line| line.starts_with("done "));
            written && first.get_or_insert_with(Instant::now).elapsed() > wait
        };
        let program = Command::new(std::env::current_exe().unwrap());
        let folder = dir.path().to_path_buf();
        let lines = run_child(program, &folder, is_enough);
        words.extend(last_words(&lines));
        assert!(words.len() > before, "the child of round {round} wrote nothing");
        check(&folder, &words).await;
    }
    assert!(words.len() > 100, "{}", words.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_cannot_grow_fails_by_name_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new("sh");
    // Without the trap the signal for too large a file would end the child; so its write fails, as on a full disk.
    command.args(["-c", "trap '' XFSZ; ulimit -f 4000; exec \"$0\" \"$@\""]).arg(std::env::current_exe().unwrap());
    let folder = dir.path().to_path_buf();
    let lines = run_child(command, &folder, |_| false);
    let stopped: Vec<&String> = lines.iter().filter(|line| line.starts_with("stopped by ")).collect();
    assert_eq!(stopped.len(), 8, "{lines:?}");
    for line in stopped {
        assert!(line.contains("StoreUnavailable") && line.contains("still reads Ok("), "{line}");
    }
    let words = last_words(&lines);
    assert!(words.len() > 50, "{}", words.len());
    check(&folder, &words).await;
    // With room again it goes on.
    let store = Embedded::open(&folder).unwrap();
    let late = queued();
    store.put(std::slice::from_ref(&late)).await.unwrap();
    assert_eq!(store.get(&late.id).await, Ok(Some(late)));
}
