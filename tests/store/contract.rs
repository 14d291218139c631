//! What every store promises, one function a promise of `eremois::store::Records`. Each gets an empty store.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use eremois::store::query::{MAX_LIMIT, Query};
use eremois::store::record::{InferenceId, Record, Status, StoredInput, StoredOutput};
use eremois::store::{Inserted, Records};
use jiff::Timestamp;
use serde_json::json;

use crate::samples::{awkward_values, embeddings, full_and_empty, queued, record, record_at, said, tensors};

type Store = Arc<dyn Records>;

/// A list of everything, by this many a page.
fn all(limit: usize) -> Query {
    Query { limit, with_output: true, ..Query::default() }
}

/// Walks a list to its end.
async fn walk(store: &Store, query: &Query) -> Vec<Record> {
    let mut query = query.clone();
    let mut found = Vec::new();
    loop {
        let page = store.list(&query).await.unwrap();
        assert!(page.records.len() <= query.limit);
        found.extend(page.records);
        query.after = page.next;
        if query.after.is_none() {
            return found;
        }
        assert_eq!(query.after, found.last().map(|record| record.id));
    }
}

fn ids(records: &[Record]) -> Vec<InferenceId> {
    records.iter().map(|record| record.id).collect()
}

fn tagged(mut record: Record, key: &str, value: &str) -> Record {
    record.facts.metadata.insert(key.to_string(), value.to_string());
    record
}

pub async fn an_empty_store_answers(store: Store) {
    assert!(!store.name().is_empty());
    store.ping().await.unwrap();
    assert_eq!(store.count().await, Ok(0));
    assert_eq!(store.get(&InferenceId::new()).await, Ok(None));
    assert_eq!(store.find_by_key("a").await, Ok(None));
    assert_eq!(store.delete(&InferenceId::new()).await, Ok(false));
    assert_eq!(store.add_feedback(&InferenceId::new(), &said(1, None, None, None)).await, Ok(false));
    assert_eq!(store.erase_user("nobody", 10).await, Ok(vec![]));
    assert_eq!(store.expire(Timestamp::now(), 10).await, Ok(0));
    let page = store.list(&all(10)).await.unwrap();
    assert_eq!((page.records.len(), page.next), (0, None));
    assert_eq!(store.put(&[]).await, Ok(()));
}

pub async fn a_record_comes_back_as_it_was_written(store: Store) {
    let mut records = full_and_empty().to_vec();
    for input in [StoredInput::Hash("ab".repeat(32)), StoredInput::None, StoredInput::Full(json!(null))] {
        let mut other = record();
        other.facts.input = input;
        records.push(other);
    }
    for status in [Status::Queued, Status::Running, Status::Failed, Status::Cancelled] {
        let mut other = queued();
        other.facts.status = status;
        records.push(other);
    }
    store.put(&records).await.unwrap();
    for expected in &records {
        assert_eq!(store.get(&expected.id).await.unwrap().as_ref(), Some(expected));
    }
    let listed = walk(&store, &all(3)).await;
    assert!(listed.iter().eq(records.iter().rev()));
    assert_eq!(store.count().await, Ok(records.len() as u64));
}

pub async fn outputs_come_back_bit_by_bit(store: Store) {
    let outputs = [
        embeddings(vec![awkward_values(1536)]),
        embeddings(vec![]),
        embeddings(vec![vec![]]),
        embeddings(vec![vec![1.5], vec![], vec![2.5, 3.5, -0.0], vec![]]),
        tensors(vec![awkward_values(6), awkward_values(12).split_off(6)]),
        tensors(vec![]),
        StoredOutput::Json(json!({"labels": [{"label": "ζ", "score": 0.5}, null], "n": 12345678901234567u64})),
        StoredOutput::Json(json!(null)),
        StoredOutput::Json(json!("text")),
    ];
    for output in outputs {
        let written = Record { output: Some(output), ..record() };
        store.put(std::slice::from_ref(&written)).await.unwrap();
        let read = store.get(&written.id).await.unwrap().unwrap();
        match (&written.output, &read.output) {
            (Some(StoredOutput::Embeddings(a)), Some(StoredOutput::Embeddings(b))) => {
                let bits = |rows: &[Vec<f32>]| -> Vec<Vec<u32>> {
                    rows.iter().map(|row| row.iter().map(|value| value.to_bits()).collect()).collect()
                };
                assert_eq!(bits(a), bits(b));
            }
            (Some(StoredOutput::Tensors(a)), Some(StoredOutput::Tensors(b))) => {
                assert_eq!(a.tensors, b.tensors);
                let bits = |rows: &[Vec<f32>]| rows.concat().iter().map(|value| value.to_bits()).collect::<Vec<_>>();
                assert_eq!((bits(&a.rows), a.rows.len()), (bits(&b.rows), b.rows.len()));
            }
            (a, b) => assert_eq!(a, b),
        }
    }
}

pub async fn large_records_are_whole(store: Store) {
    // 2048 rows of 0 to 1023 values are 4 MiB; the input is 2 MiB.
    let mut large = record();
    let values = awkward_values(1024);
    large.output = Some(embeddings((0..2048).map(|len| values[..len % 1024].to_vec()).collect()));
    large.facts.input = StoredInput::Full(json!("ein langer Text ✂ ".repeat(100_000)));
    let small = record();
    store.put(&[large.clone(), small.clone()]).await.unwrap();
    assert_eq!(store.get(&large.id).await, Ok(Some(large.clone())));
    let without = Query { limit: 10, ..Query::default() };
    let page = store.list(&without).await.unwrap();
    assert_eq!(ids(&page.records), [small.id, large.id]);
    assert!(page.records.iter().all(|record| record.output.is_none()));
    assert_eq!(page.records[1].facts, large.facts);
    assert_eq!(store.list(&all(10)).await.unwrap().records, [small, large]);
}

pub async fn put_replaces_what_may_change(store: Store) {
    let mut job = tagged(queued(), "stage", "one");
    job.facts.user = Some("anna".to_string());
    store.put(&[job.clone()]).await.unwrap();
    job.facts.status = Status::Running;
    job.facts.metadata = BTreeMap::from([("stage".to_string(), "two".to_string())]);
    store.put(&[job.clone()]).await.unwrap();
    assert_eq!(store.get(&job.id).await, Ok(Some(job.clone())));
    // Back from running to queued, as when another server takes an abandoned job up.
    job.facts.status = Status::Queued;
    job.facts.user = Some("berta".to_string());
    store.put(&[job.clone()]).await.unwrap();
    assert_eq!(store.get(&job.id).await, Ok(Some(job.clone())));

    let done = Record { output: record().output, ..job.clone() };
    let done = Record { facts: eremois::store::record::Facts { status: Status::Succeeded, ..done.facts }, ..done };
    store.put(std::slice::from_ref(&done)).await.unwrap();
    assert_eq!(store.get(&done.id).await, Ok(Some(done.clone())));
    // An older state comes late and undoes nothing.
    store.put(&[job.clone()]).await.unwrap();
    assert_eq!(store.get(&done.id).await, Ok(Some(done.clone())));
    // A final state over a final one replaces it: the repetition of a write whose answer was lost.
    let mut failed = Record { output: None, ..done.clone() };
    failed.facts.status = Status::Failed;
    store.put(&[failed.clone(), failed.clone()]).await.unwrap();
    assert_eq!(store.get(&done.id).await, Ok(Some(failed.clone())));
    assert_eq!(store.count().await, Ok(1));

    // Every list knows the last state alone.
    let by = |query: Query| {
        let store = store.clone();
        async move { ids(&walk(&store, &Query { limit: 10, ..query }).await) }
    };
    let stage = |value: &str| BTreeMap::from([("stage".to_string(), value.to_string())]);
    assert_eq!(by(Query { status: Some(Status::Failed), ..Query::default() }).await, [done.id]);
    assert_eq!(by(Query { user: Some("berta".to_string()), ..Query::default() }).await, [done.id]);
    assert_eq!(by(Query { metadata: stage("two"), ..Query::default() }).await, [done.id]);
    for stale in [
        Query { status: Some(Status::Queued), ..Query::default() },
        Query { user: Some("anna".to_string()), ..Query::default() },
        Query { metadata: stage("one"), ..Query::default() },
    ] {
        assert_eq!(by(stale).await, []);
    }
}

pub async fn put_writes_many_and_repeats(store: Store) {
    let records: Vec<Record> = (0..700).map(|_| record()).collect();
    store.put(&records).await.unwrap();
    // Repeated with others between, in another order.
    let mut again = records.clone();
    again.reverse();
    again.push(record());
    store.put(&again).await.unwrap();
    assert_eq!(store.count().await, Ok(701));
    assert!(walk(&store, &all(MAX_LIMIT)).await.iter().rev().take(700).eq(&records));
}

pub async fn feedback_is_kept(store: Store) {
    let mut job = queued();
    store.put(&[job.clone()]).await.unwrap();
    let sayings = [
        said(1, Some(0.5), None, None),
        said(2, None, Some("good"), Some("héllo")),
        said(2, None, Some("good"), Some("hello")),
        said(3, Some(-0.123456789), Some(""), None),
    ];
    for saying in &sayings {
        assert_eq!(store.add_feedback(&job.id, saying).await, Ok(true));
        // Repeated, as after a lost answer.
        assert_eq!(store.add_feedback(&job.id, saying).await, Ok(true));
    }
    let feedback = |store: &Store| {
        let store = store.clone();
        async move { store.get(&job.id).await.unwrap().unwrap().facts.feedback }
    };
    assert_eq!(feedback(&store).await, sayings);
    // What replaces the record without knowing of them.
    job.facts.status = Status::Succeeded;
    store.put(&[job.clone()]).await.unwrap();
    assert_eq!(feedback(&store).await, sayings);
    // And what knows of one of them and of another: a copy from elsewhere.
    let new = said(4, Some(1.0), None, None);
    job.facts.feedback = vec![sayings[1].clone(), new.clone()];
    for _ in 0..2 {
        store.put(&[job.clone()]).await.unwrap();
        let expected: Vec<_> = sayings.iter().chain([&new]).cloned().collect();
        assert_eq!(feedback(&store).await, expected);
    }
    let page = store.list(&all(1)).await.unwrap();
    assert_eq!(page.records[0].facts.feedback.len(), 5);
}

pub async fn insert_says_what_was_there(store: Store) {
    let mut first = tagged(record(), "a", "b");
    first.facts.idempotency_key = Some("schlüssel \u{1f511}".to_string());
    assert_eq!(store.insert(&first).await, Ok(Inserted::New));
    let there = Ok(Inserted::Exists(Box::new(first.clone())));
    assert_eq!(store.insert(&first).await, there);
    // Another record of the same key; the same id without the key.
    let mut second = record();
    second.facts.idempotency_key = first.facts.idempotency_key.clone();
    assert_eq!(store.insert(&second).await, there);
    assert_eq!(store.insert(&Record { id: first.id, ..record() }).await, there);
    assert_eq!(store.count().await, Ok(1));
    assert_eq!(store.get(&second.id).await, Ok(None));
    assert_eq!(store.find_by_key("schlüssel \u{1f511}").await, Ok(Some(first.clone())));
    assert_eq!(store.find_by_key("schlüssel").await, Ok(None));
    // Records without a key never conflict.
    for _ in 0..3 {
        assert_eq!(store.insert(&record()).await, Ok(Inserted::New));
    }
    // A key is free again when its record is gone.
    assert_eq!(store.delete(&first.id).await, Ok(true));
    assert_eq!(store.find_by_key("schlüssel \u{1f511}").await, Ok(None));
    assert_eq!(store.insert(&second).await, Ok(Inserted::New));
}

pub async fn put_leaves_a_key_to_its_holder(store: Store) {
    let mut holder = record();
    holder.facts.idempotency_key = Some("taken".to_string());
    assert_eq!(store.insert(&holder).await, Ok(Inserted::New));
    let mut late = tagged(record(), "late", "yes");
    late.facts.idempotency_key = Some("taken".to_string());
    let other = record();
    for _ in 0..2 {
        store.put(&[late.clone(), other.clone()]).await.unwrap();
        let kept = store.get(&late.id).await.unwrap().unwrap();
        assert_eq!(kept.facts.idempotency_key, None);
        assert_eq!((&kept.output, &kept.facts.metadata), (&late.output, &late.facts.metadata));
        assert_eq!(store.get(&other.id).await, Ok(Some(other.clone())));
        assert_eq!(store.find_by_key("taken").await, Ok(Some(holder.clone())));
    }
    // The holder itself keeps its key over a put.
    store.put(&[holder.clone()]).await.unwrap();
    assert_eq!(store.find_by_key("taken").await, Ok(Some(holder)));
}

pub async fn one_of_many_inserts_of_a_key_wins(store: Store) {
    for round in 0..5 {
        let contenders: Vec<Record> = (0..24)
            .map(|_| {
                let mut contender = record();
                contender.facts.idempotency_key = Some(format!("round {round}"));
                contender
            })
            .collect();
        let tasks: Vec<_> = contenders
            .iter()
            .cloned()
            .map(|contender| {
                let store = store.clone();
                tokio::spawn(async move { store.insert(&contender).await })
            })
            .collect();
        let mut winners = Vec::new();
        let mut seen = Vec::new();
        for (task, contender) in tasks.into_iter().zip(&contenders) {
            match task.await.unwrap().unwrap() {
                Inserted::New => winners.push(contender.clone()),
                Inserted::Exists(there) => seen.push(*there),
            }
        }
        assert_eq!((winners.len(), seen.len()), (1, 23));
        assert!(seen.iter().all(|record| *record == winners[0]));
        assert_eq!(store.find_by_key(&format!("round {round}")).await, Ok(Some(winners.remove(0))));
    }
    assert_eq!(store.count().await, Ok(5));
}

pub async fn pages_follow_each_other(store: Store) {
    let records: Vec<Record> = (0..60).map(|_| record()).collect();
    store.put(&records).await.unwrap();
    let newest_first: Vec<InferenceId> = records.iter().rev().map(|record| record.id).collect();
    for limit in [1, 7, 20, 59, 60, 61, MAX_LIMIT] {
        assert_eq!(ids(&walk(&store, &all(limit)).await), newest_first, "{limit}");
    }
    // The last full page says that it is the last.
    let mut query = all(20);
    for is_last in [false, false, true] {
        let page = store.list(&query).await.unwrap();
        assert_eq!((page.records.len(), page.next.is_none()), (20, is_last));
        query.after = page.next;
    }
    // Behind the oldest there is nothing; and a place need not be a record's.
    let after = |id| Query { after: Some(id), ..all(20) };
    assert_eq!(store.list(&after(newest_first[59])).await.unwrap().records, []);
    assert_eq!(ids(&store.list(&after(InferenceId::new())).await.unwrap().records), newest_first[..20]);
    store.delete(&newest_first[30]).await.unwrap();
    assert_eq!(ids(&store.list(&after(newest_first[30])).await.unwrap().records), newest_first[31..51]);
}

pub async fn a_late_record_stands_at_its_time(store: Store) {
    let at = |ms, number| record_at(ms, number);
    let records = [at(5000, 1), at(3000, 9), at(4000, 3), at(3000, 2), at(4000, 4), at(1, 0)];
    for record in &records {
        store.put(std::slice::from_ref(record)).await.unwrap();
    }
    let expected = [0, 4, 2, 1, 3, 5].map(|i: usize| records[i].id);
    assert_eq!(ids(&walk(&store, &all(4)).await), expected);
}

pub async fn filters_hold_alone_and_together(store: Store) {
    let models = ["m1", "m2", "'; DROP TABLE inferences; --"];
    let users = [None, Some("u1"), Some("u2"), Some("ü ∑")];
    let statuses = [Status::Succeeded, Status::Failed, Status::Queued, Status::Running, Status::Cancelled];
    let mut records = Vec::new();
    for i in 0..420usize {
        let mut one = record_at(10_000 + (i as i64 / 3) * 10, i as u64);
        one.facts.model = models[i % 3].to_string();
        one.facts.user = users[i / 2 % 4].map(str::to_string);
        one.facts.status = statuses[i * i % 5];
        if !i.is_multiple_of(4) {
            one = tagged(one, "tenant", ["a", "b"][i / 5 % 2]);
        }
        if i.is_multiple_of(3) {
            one = tagged(one, "a.b$c", "x");
        }
        records.push(one);
    }
    store.put(&records).await.unwrap();
    let time = |ms| Some(Timestamp::from_millisecond(ms).unwrap());
    let metadata = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    let spans = [(None, None), (time(10_500), None), (None, time(10_500)), (time(10_200), time(10_700))];
    let tags: [BTreeMap<String, String>; 5] = [
        metadata(&[]),
        metadata(&[("tenant", "a")]),
        metadata(&[("a.b$c", "x")]),
        metadata(&[("tenant", "b"), ("a.b$c", "x")]),
        metadata(&[("tenant", "nobody")]),
    ];
    let mut num_found = 0;
    for mask in 0..8 {
        for (from, to) in spans {
            for tags in &tags {
                let query = Query {
                    model: (mask & 1 != 0).then(|| models[2].to_string()),
                    user: (mask & 2 != 0).then(|| "ü ∑".to_string()),
                    status: (mask & 4 != 0).then_some(Status::Failed),
                    from,
                    to,
                    metadata: tags.clone(),
                    limit: 17,
                    ..Query::default()
                };
                let expected: Vec<InferenceId> =
                    records.iter().rev().filter(|record| meets(record, &query)).map(|record| record.id).collect();
                assert_eq!(ids(&walk(&store, &query).await), expected, "{query:?}");
                num_found += expected.len();
            }
        }
    }
    assert!(num_found > 2000, "the filters let too little through to tell them apart: {num_found}");
    // A value is compared whole.
    for query in [
        Query { user: Some("u".to_string()), ..all(10) },
        Query { user: Some(String::new()), ..all(10) },
        Query { model: Some("M1".to_string()), ..all(10) },
        Query { metadata: metadata(&[("Tenant", "a")]), ..all(10) },
        Query { metadata: metadata(&[("tenant", "A")]), ..all(10) },
        Query { metadata: metadata(&[("tenant", "")]), ..all(10) },
    ] {
        assert_eq!(walk(&store, &query).await, [], "{query:?}");
    }
}

/// What a query's words mean, without the page.
fn meets(record: &Record, query: &Query) -> bool {
    let (facts, created_at) = (&record.facts, record.id.created_at());
    query.model.as_ref().is_none_or(|model| *model == facts.model)
        && query.user.is_none_or_same(&facts.user)
        && query.status.is_none_or(|status| status == facts.status)
        && query.from.is_none_or(|from| created_at >= from)
        && query.to.is_none_or(|to| created_at < to)
        && query.metadata.iter().all(|(key, value)| facts.metadata.get(key) == Some(value))
}

/// A condition on a field that may be empty.
trait Condition {
    fn is_none_or_same(&self, field: &Self) -> bool;
}

impl Condition for Option<String> {
    fn is_none_or_same(&self, field: &Self) -> bool {
        self.is_none() || self == field
    }
}

pub async fn pages_are_stable_while_others_write(store: Store) {
    let old: Vec<Record> = (0..300).map(|i| tagged(record(), "age", if i % 2 == 0 { "old" } else { "odd" })).collect();
    store.put(&old).await.unwrap();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let writer = {
        let (store, stop) = (store.clone(), stop.clone());
        tokio::spawn(async move {
            let mut num = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                store.put(&[record(), tagged(record(), "age", "old")]).await.unwrap();
                num += 2;
            }
            num
        })
    };
    let begin = InferenceId::new();
    for tag in [None, Some("old")] {
        let mut query = Query { after: Some(begin), ..all(11) };
        query.metadata.extend(tag.map(|tag| ("age".to_string(), tag.to_string())));
        let mut found = Vec::new();
        let mut pages = 0;
        loop {
            let page = store.list(&query).await.unwrap();
            found.extend(page.records);
            pages += 1;
            if pages == 3 {
                // What is deleted ahead is gone, and nothing else is missed or comes twice.
                store.delete(&old[0].id).await.unwrap();
            }
            query.after = page.next;
            if query.after.is_none() {
                break;
            }
        }
        let newer = ids(&found);
        assert!(newer.windows(2).all(|pair| pair[0] > pair[1]), "out of order");
        let expected: BTreeSet<InferenceId> = old[1..]
            .iter()
            .filter(|record| tag.is_none_or(|tag| record.facts.metadata["age"] == tag))
            .map(|r| r.id)
            .collect();
        let found: BTreeSet<InferenceId> = newer.into_iter().filter(|id| *id <= old[299].id).collect();
        assert_eq!(found, expected);
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let num_written = writer.await.unwrap();
    assert_eq!(store.count().await, Ok(299 + num_written));
}

pub async fn what_is_deleted_is_gone(store: Store) {
    let [full, empty] = full_and_empty();
    store.put(&[full.clone(), empty.clone()]).await.unwrap();
    assert_eq!(store.delete(&full.id).await, Ok(true));
    assert_eq!(store.delete(&full.id).await, Ok(false));
    assert_eq!(store.get(&full.id).await, Ok(None));
    assert_eq!(store.find_by_key(full.facts.idempotency_key.as_deref().unwrap()).await, Ok(None));
    for (key, value) in &full.facts.metadata {
        let query = Query { metadata: BTreeMap::from([(key.clone(), value.clone())]), ..all(10) };
        assert_eq!(walk(&store, &query).await, []);
    }
    assert_eq!(walk(&store, &Query { user: full.facts.user.clone(), ..all(10) }).await, []);
    assert_eq!(walk(&store, &all(10)).await, std::slice::from_ref(&empty));
    // One that comes again, in a later record's place, has nothing of what was deleted.
    let again = Record { output: None, ..full.clone() };
    let again = Record { facts: eremois::store::record::Facts { feedback: vec![], ..again.facts }, ..again };
    store.put(std::slice::from_ref(&again)).await.unwrap();
    assert_eq!(store.get(&full.id).await, Ok(Some(again)));
    assert_eq!(store.count().await, Ok(2));
}

pub async fn a_user_is_erased_in_chunks(store: Store) {
    let mut theirs = BTreeMap::new();
    let mut others = Vec::new();
    for i in 0..60 {
        let mut one = tagged(record(), "n", "1");
        one.facts.feedback = vec![said(i, Some(0.5), None, None)];
        one.facts.user = [Some("erika"), None, Some("erik")][i as usize % 3].map(str::to_string);
        if i % 3 == 0 {
            theirs.insert(one.id, one.clone());
        } else {
            others.push(one.clone());
        }
        store.put(&[one]).await.unwrap();
    }
    let mut erased = Vec::new();
    for expected in [8, 8, 4, 0] {
        let chunk = store.erase_user("erika", 8).await.unwrap();
        assert_eq!(chunk.len(), expected);
        erased.extend(chunk);
    }
    let erased: BTreeMap<InferenceId, Record> = erased.into_iter().map(|record| (record.id, record)).collect();
    assert_eq!(erased, theirs);
    let left = walk(&store, &all(50)).await;
    assert!(left.iter().rev().eq(&others));
    for id in theirs.keys() {
        assert_eq!(store.get(id).await, Ok(None));
    }
}

pub async fn old_records_expire(store: Store) {
    let records: Vec<Record> = (0..10).map(|i| tagged(record_at(1000 + i * 10, 7), "a", "b")).collect();
    let recent = record();
    store.put(&records).await.unwrap();
    store.put(std::slice::from_ref(&recent)).await.unwrap();
    let before = Timestamp::from_millisecond(1070).unwrap();
    if store.name() == "mongodb" {
        // A TTL index of the server does it.
        assert_eq!(store.expire(before, 5).await, Ok(0));
        return;
    }
    for (num_expired, left) in [(5, &records[5..]), (2, &records[7..]), (0, &records[7..])] {
        assert_eq!(store.expire(before, 5).await, Ok(num_expired));
        let expected: Vec<&Record> = left.iter().chain([&recent]).rev().collect();
        assert!(walk(&store, &all(4)).await.iter().eq(expected));
    }
}

pub async fn many_write_at_once(store: Store) {
    let tasks: Vec<_> = (0..16u64)
        .map(|writer| {
            let store = store.clone();
            tokio::spawn(async move {
                let mut written = Vec::new();
                for i in 0..30 {
                    let mut one = tagged(record(), "writer", &writer.to_string());
                    one.output = Some(embeddings(vec![vec![writer as f32, i as f32]]));
                    match i % 3 {
                        0 => store.put(&[one.clone()]).await.unwrap(),
                        1 => assert_eq!(store.insert(&one).await, Ok(Inserted::New)),
                        _ => {
                            store.put(&[one.clone()]).await.unwrap();
                            assert_eq!(store.add_feedback(&one.id, &said(i, None, None, None)).await, Ok(true));
                            one.facts.feedback.push(said(i, None, None, None));
                        }
                    }
                    // What was acknowledged is there at once.
                    assert_eq!(store.get(&one.id).await, Ok(Some(one.clone())));
                    if i % 10 == 9 {
                        assert_eq!(store.delete(&one.id).await, Ok(true));
                    } else {
                        written.push(one);
                    }
                }
                written
            })
        })
        .collect();
    let mut written = BTreeMap::new();
    for task in tasks {
        written.extend(task.await.unwrap().into_iter().map(|record| (record.id, record)));
    }
    assert_eq!(store.count().await, Ok(16 * 27));
    assert!(walk(&store, &all(100)).await.iter().rev().eq(written.values()));
}
