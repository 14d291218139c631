//! What every store promises of parts of files, one function a promise. Each gets an empty store.

use std::sync::Arc;

use eremois::Error;
use eremois::store::work::{MAX_PART_BYTES, Work};

use crate::samples::{longest, noise};

type Store = Arc<dyn Work>;

async fn put(store: &Store, file: &str, index: u32, bytes: &[u8]) {
    store.put_part(file, index, bytes).await.unwrap();
}

/// Without the bytes in the message, which may be millions.
async fn assert_part(store: &Store, file: &str, index: u32, bytes: &[u8]) {
    let part = store.part(file, index).await.unwrap();
    let part = part.unwrap_or_else(|| panic!("part {index} of {file} is not there"));
    assert!(part == bytes, "part {index} of {file}: {} bytes for {}", part.len(), bytes.len());
}

pub async fn parts_come_back_bit_by_bit(store: Store) {
    let every: Vec<u8> = (0..=255).collect();
    let file = longest('f');
    for (index, bytes) in [(0, vec![]), (1, every), (7, vec![0]), (u32::MAX, noise(100_000, 1))] {
        put(&store, &file, index, &bytes).await;
        assert_part(&store, &file, index, &bytes).await;
    }
    assert_part(&store, &file, 0, &[]).await;
    for index in [2, 6, 8, u32::MAX - 1] {
        assert_eq!(store.part(&file, index).await, Ok(None));
    }
    assert_eq!(store.part("f", 1).await, Ok(None));
}

pub async fn a_part_has_its_limit(store: Store) {
    let largest = noise(MAX_PART_BYTES, 2);
    put(&store, "f", 0, &largest).await;
    put(&store, "f", 1, &largest[1..]).await;
    assert_part(&store, "f", 0, &largest).await;
    assert_part(&store, "f", 1, &largest[1..]).await;
    let refused = store.put_part("f", 0, &noise(MAX_PART_BYTES + 1, 3)).await;
    let (got, limit) = (MAX_PART_BYTES + 1, MAX_PART_BYTES);
    assert_eq!(refused, Err(Error::TooLarge { field: "part".into(), got, limit, unit: "bytes" }));
    assert_part(&store, "f", 0, &largest).await;
}

pub async fn a_part_is_replaced(store: Store) {
    put(&store, "f", 0, b"one").await;
    put(&store, "f", 1, b"other").await;
    put(&store, "f", 0, &noise(50_000, 4)).await;
    assert_part(&store, "f", 0, &noise(50_000, 4)).await;
    put(&store, "f", 0, b"").await;
    assert_part(&store, "f", 0, b"").await;
    assert_part(&store, "f", 1, b"other").await;
    // Many that write one part: it is one of theirs, whole.
    let writers = (0..8).map(|i| {
        let store = store.clone();
        async move { store.put_part("f", 9, &noise(20_000, i)).await }
    });
    let written = futures::future::join_all(writers).await;
    assert!(written.iter().all(Result::is_ok), "{written:?}");
    let part = store.part("f", 9).await.unwrap().unwrap();
    assert!((0..8).any(|i| part == noise(20_000, i)));
}

pub async fn all_parts_of_a_file_go_and_no_others(store: Store) {
    // Names that begin like the one that goes, and ones that order beside it.
    let others = ["f/", "f/0", "f0", "e", "g", "F", "", "f/0000000001", "f\u{1}"];
    for index in 0..19 {
        put(&store, "f", index * 1000, &[index as u8]).await;
    }
    for other in others {
        put(&store, other, 0, other.as_bytes()).await;
    }
    store.remove_parts("f").await.unwrap();
    for index in 0..19 {
        assert_eq!(store.part("f", index * 1000).await, Ok(None), "{index}");
    }
    for other in others {
        assert_part(&store, other, 0, other.as_bytes()).await;
    }
    store.remove_parts("f").await.unwrap();
    put(&store, "f", 3, b"again").await;
    assert_part(&store, "f", 3, b"again").await;
}
