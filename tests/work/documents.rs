//! What every store promises of documents, one function a promise. Each gets an empty store.

use std::sync::Arc;

use eremois::store::work::{Document, DocumentKind, DocumentQuery, MAX_DOCUMENTS, Work};
use futures::future::join_all;
use serde_json::json;

use crate::samples::{at, awkward, document, longest};

type Store = Arc<dyn Work>;

const KINDS: [DocumentKind; 3] = [DocumentKind::File, DocumentKind::Batch, DocumentKind::Chunk];

fn of(kind: DocumentKind, limit: usize) -> DocumentQuery {
    DocumentQuery { kind, parent: None, after: None, limit }
}

async fn create(store: &Store, document: &Document) {
    assert_eq!(store.create(document).await, Ok(true), "{document:?}");
}

async fn ids(store: &Store, query: &DocumentQuery) -> Vec<String> {
    store.documents(query).await.unwrap().into_iter().map(|document| document.id).collect()
}

pub async fn a_document_comes_back_as_it_was_created(store: Store) {
    let mut written = Vec::new();
    for (i, body) in awkward().into_iter().enumerate() {
        let parent = (i % 2 == 0).then(|| format!("parent {i}"));
        let expires_at = (i % 3 == 0).then(|| at(i as i64));
        let plain = document(KINDS[i % 3], &format!("d{i:02}"));
        written.push(Document { parent, expires_at, body, ..plain });
    }
    // The same id in every kind is three documents.
    written.extend(KINDS.map(|kind| Document { body: json!(kind), ..document(kind, "same") }));
    for document in &written {
        // The revision that is given means nothing.
        create(&store, &Document { revision: 77, ..document.clone() }).await;
    }
    for document in &written {
        assert_eq!(store.document(document.kind, &document.id).await.unwrap().as_ref(), Some(document));
    }
    for kind in KINDS {
        let mut expected: Vec<Document> = written.iter().filter(|one| one.kind == kind).cloned().collect();
        expected.sort_by(|a, b| b.id.cmp(&a.id));
        assert_eq!(store.documents(&of(kind, 100)).await, Ok(expected));
    }
    assert_eq!(store.document(DocumentKind::File, "d01").await, Ok(None), "that is a batch's");
}

pub async fn one_of_many_creates_a_document(store: Store) {
    let callers = (0..10).map(|i| {
        let store = store.clone();
        let mine = Document { body: json!(i), ..document(DocumentKind::Chunk, "one") };
        tokio::spawn(async move { store.create(&mine).await.unwrap().then_some(mine) })
    });
    let created: Vec<Document> = join_all(callers).await.into_iter().filter_map(|one| one.unwrap()).collect();
    assert_eq!(created.len(), 1);
    assert_eq!(store.document(DocumentKind::Chunk, "one").await, Ok(Some(created[0].clone())));
    assert_eq!(store.create(&created[0]).await, Ok(false));
}

pub async fn what_was_read_is_replaced_and_no_other_revision(store: Store) {
    let first = document(DocumentKind::Batch, "b");
    assert_eq!(store.replace(&first).await, Ok(false), "it is not there");
    assert_eq!(store.document(DocumentKind::Batch, "b").await, Ok(None));
    create(&store, &first).await;
    let second = Document { body: json!({"state": 2}), expires_at: Some(at(9)), ..first.clone() };
    assert_eq!(store.replace(&second).await, Ok(true));
    let read = store.document(DocumentKind::Batch, "b").await.unwrap().unwrap();
    assert_eq!(read, Document { revision: 2, ..second.clone() });
    // Who has read the first one comes too late; nobody has read a later one.
    for revision in [0, 1, 3, u64::MAX] {
        let stale = Document { revision, body: json!("stale"), ..first.clone() };
        assert_eq!(store.replace(&stale).await, Ok(false), "{revision}");
    }
    assert_eq!(store.document(DocumentKind::Batch, "b").await, Ok(Some(read.clone())));
    // A time may be taken away.
    assert_eq!(store.replace(&Document { expires_at: None, ..read.clone() }).await, Ok(true));
    let third = Document { revision: 3, expires_at: None, ..read };
    assert_eq!(store.document(DocumentKind::Batch, "b").await, Ok(Some(third)));
    assert_eq!(store.expired(at(1000), 10).await, Ok(vec![]));
}

pub async fn replacing_leaves_kind_id_and_parent(store: Store) {
    let child = Document { parent: Some("p".into()), ..document(DocumentKind::Chunk, "c") };
    let orphan = document(DocumentKind::Chunk, "o");
    create(&store, &child).await;
    create(&store, &orphan).await;
    for other in [Some("q".to_string()), None] {
        let read = store.document(DocumentKind::Chunk, "c").await.unwrap().unwrap();
        assert_eq!(store.replace(&Document { parent: other, ..read }).await, Ok(true));
    }
    assert_eq!(store.replace(&Document { parent: Some("p".into()), ..orphan }).await, Ok(true));
    let of_p = DocumentQuery { parent: Some("p".into()), ..of(DocumentKind::Chunk, 10) };
    assert_eq!(store.documents(&of_p).await, Ok(vec![Document { revision: 3, ..child }]));
    assert_eq!(store.document(DocumentKind::Chunk, "o").await.unwrap().unwrap().parent, None);
    // Another kind of the same id is another document.
    let batch = Document { revision: 3, ..document(DocumentKind::Batch, "c") };
    assert_eq!(store.replace(&batch).await, Ok(false));
}

pub async fn no_change_of_many_is_lost(store: Store) {
    create(&store, &Document { body: json!(0), ..document(DocumentKind::Batch, "counter") }).await;
    let callers = (0..6).map(|_| {
        let store = store.clone();
        tokio::spawn(async move {
            for _ in 0..5 {
                loop {
                    let mut read = store.document(DocumentKind::Batch, "counter").await.unwrap().unwrap();
                    read.body = json!(read.body.as_u64().unwrap() + 1);
                    if store.replace(&read).await.unwrap() {
                        break;
                    }
                }
            }
        })
    });
    join_all(callers).await.into_iter().for_each(|caller| caller.unwrap());
    let last = store.document(DocumentKind::Batch, "counter").await.unwrap().unwrap();
    assert_eq!((last.body, last.revision), (json!(30), 31));
}

pub async fn what_is_removed_is_gone(store: Store) {
    for kind in [DocumentKind::File, DocumentKind::Batch] {
        create(&store, &Document { expires_at: Some(at(0)), parent: Some("p".into()), ..document(kind, "d") }).await;
    }
    let read = store.document(DocumentKind::File, "d").await.unwrap().unwrap();
    assert_eq!(store.remove(DocumentKind::File, "d").await, Ok(true));
    assert_eq!(store.remove(DocumentKind::File, "d").await, Ok(false));
    assert_eq!(store.document(DocumentKind::File, "d").await, Ok(None));
    assert_eq!(store.replace(&read).await, Ok(false));
    assert_eq!(ids(&store, &of(DocumentKind::File, 10)).await, [""; 0]);
    let over: Vec<DocumentKind> = store.expired(at(0), 10).await.unwrap().iter().map(|one| one.kind).collect();
    assert_eq!(over, [DocumentKind::Batch]);
    // It may be created anew, from its first revision on.
    create(&store, &document(DocumentKind::File, "d")).await;
    assert_eq!(store.document(DocumentKind::File, "d").await, Ok(Some(document(DocumentKind::File, "d"))));
}

pub async fn lists_fall_by_the_bytes_of_ids(store: Store) {
    let names = [
        "a",
        "B",
        "b",
        "a-",
        "a0",
        "a/",
        "a/b",
        "aa",
        "A",
        "~",
        "0",
        "10",
        "9",
        "_",
        " ",
        &longest('1'),
        &longest('2'),
    ];
    for name in names {
        create(&store, &document(DocumentKind::File, name)).await;
    }
    let mut falling: Vec<String> = names.iter().map(|name| name.to_string()).collect();
    falling.sort_by(|a, b| b.as_bytes().cmp(a.as_bytes()));
    assert_eq!(ids(&store, &of(DocumentKind::File, 100)).await, falling);
    // From any id on, also from one that is not there.
    for (i, name) in falling.iter().enumerate() {
        let after = DocumentQuery { after: Some(name.clone()), ..of(DocumentKind::File, 100) };
        assert_eq!(ids(&store, &after).await, falling[i + 1..]);
        let between = DocumentQuery { after: Some(format!("{name}\u{1}")), ..of(DocumentKind::File, 100) };
        let expected: Vec<&String> = falling.iter().filter(|id| **id < format!("{name}\u{1}")).collect();
        assert_eq!(ids(&store, &between).await.iter().collect::<Vec<_>>(), expected);
    }
    for kind in [DocumentKind::Batch, DocumentKind::Chunk] {
        assert_eq!(ids(&store, &of(kind, 100)).await, [""; 0]);
    }
}

pub async fn pages_follow_each_other(store: Store) {
    for i in 0..40 {
        let parent = (i % 4 != 0).then(|| ["p", "p2", "p"][i % 3].to_string());
        create(&store, &Document { parent, ..document(DocumentKind::Chunk, &format!("c{i:02}")) }).await;
    }
    // Of another kind, with the same parent.
    create(&store, &Document { parent: Some("p".into()), ..document(DocumentKind::File, "c00") }).await;
    let expected = |wanted: &dyn Fn(usize) -> bool| -> Vec<String> {
        (0..40).rev().filter(|i| wanted(*i)).map(|i| format!("c{i:02}")).collect()
    };
    let is_of_p = |i: usize| !i.is_multiple_of(4) && i % 3 != 1;
    for (parent, all) in [
        (None, expected(&|_| true)),
        (Some("p"), expected(&is_of_p)),
        (Some("p2"), expected(&|i| i % 4 != 0 && i % 3 == 1)),
        (Some("nobody"), vec![]),
    ] {
        for limit in [1, 3, 7, 40, 41] {
            let mut query = DocumentQuery { parent: parent.map(str::to_string), ..of(DocumentKind::Chunk, limit) };
            let mut found: Vec<String> = Vec::new();
            loop {
                let page = ids(&store, &query).await;
                assert!(page.len() <= limit);
                query.after = page.last().cloned();
                found.extend(page);
                if query.after.is_none() {
                    break;
                }
                // What is written in front of the page or removed behind it moves nothing.
                let new = format!("z{}", found.len());
                store
                    .create(&Document { parent: query.parent.clone(), ..document(DocumentKind::Chunk, &new) })
                    .await
                    .unwrap();
            }
            assert_eq!(found, all, "{parent:?} by {limit}");
            for i in 0..=41 {
                store.remove(DocumentKind::Chunk, &format!("z{i}")).await.unwrap();
            }
        }
    }
}

pub async fn a_page_has_its_limit(store: Store) {
    let numbers: Vec<usize> = (0..MAX_DOCUMENTS + 1).collect();
    for some in numbers.chunks(100) {
        let creations = some.iter().map(|i| {
            let store = store.clone();
            async move { store.create(&document(DocumentKind::Chunk, &format!("c{i:04}"))).await }
        });
        assert!(join_all(creations).await.into_iter().all(|created| created == Ok(true)));
    }
    for (limit, len) in [(usize::MAX, MAX_DOCUMENTS), (MAX_DOCUMENTS + 1, MAX_DOCUMENTS), (0, 1), (1, 1)] {
        let page = ids(&store, &of(DocumentKind::Chunk, limit)).await;
        assert_eq!((page.len(), page[0].as_str()), (len, "c1000"), "{limit}");
    }
}

pub async fn what_is_over_comes_earliest_first(store: Store) {
    for (i, (kind, expires)) in [
        (DocumentKind::File, Some(30)),
        (DocumentKind::Batch, Some(10)),
        (DocumentKind::File, None),
        (DocumentKind::Chunk, Some(20)),
        (DocumentKind::File, Some(40)),
        (DocumentKind::File, Some(-5)),
    ]
    .into_iter()
    .enumerate()
    {
        create(&store, &Document { expires_at: expires.map(at), ..document(kind, &format!("d{i}")) }).await;
    }
    let over = async |now: i64, limit: usize| -> Vec<String> {
        store.expired(at(now), limit).await.unwrap().into_iter().map(|document| document.id).collect()
    };
    assert_eq!(over(-6, 10).await, [""; 0]);
    assert_eq!(over(-5, 10).await, ["d5"], "at its time, and not a moment later");
    assert_eq!(over(39, 10).await, ["d5", "d1", "d3", "d0"]);
    assert_eq!(over(1000, 2).await, ["d5", "d1"]);
    assert_eq!(over(1000, 0).await, [""; 0]);
    // Returned whole, and again until they are removed.
    let first = store.expired(at(1000), 1).await.unwrap();
    assert_eq!(first, [Document { expires_at: Some(at(-5)), ..document(DocumentKind::File, "d5") }]);
    assert_eq!(store.remove(DocumentKind::File, "d5").await, Ok(true));
    let later = Document { expires_at: Some(at(2000)), ..document(DocumentKind::Batch, "d1") };
    assert_eq!(store.replace(&later).await, Ok(true));
    assert_eq!(over(1000, 10).await, ["d3", "d0", "d4"]);
}
