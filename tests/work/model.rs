//! Calls at random, on a store and on the plain one in memory: each must have the same outcome on both.

use std::sync::Arc;
use std::time::Duration;

use eremois::store::work::memory::MemoryWork;
use eremois::store::work::{Claim, Document, DocumentKind, DocumentQuery, Task, TaskKind, Work};
use serde_json::json;

use crate::samples::{at, claim, document, task};

/// xorshift: the same calls at every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }

    fn one_of<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len() as u64) as usize]
    }
}

const IDS: [&str; 5] = ["a", "b", "c", "d", "e"];
const OWNERS: [&str; 3] = ["x", "y", "z"];
const DOCUMENT_KINDS: [DocumentKind; 2] = [DocumentKind::Batch, DocumentKind::Chunk];

/// One call, made of `dice`, and its outcome in words.
async fn call(store: &dyn Work, dice: &mut Dice, now: i64) -> String {
    let (id, owner) = (*dice.one_of(&IDS), *dice.one_of(&OWNERS));
    let kind = *dice.one_of(&DOCUMENT_KINDS);
    let some_time = at(now + dice.below(40) as i64 - 20);
    let plain = document(kind, id);
    let a_task = Task { kind: *dice.one_of(TaskKind::ALL), due_at: some_time, ..task(id, 0) };
    let a_document = Document {
        parent: Some(dice.one_of(&IDS).to_string()).filter(|_| dice.below(2) == 0),
        expires_at: Some(some_time).filter(|_| dice.below(2) == 0),
        revision: 1 + dice.below(3),
        body: json!(dice.below(1000)),
        ..plain
    };
    let a_claim = Claim {
        due_by: at(now - dice.below(10) as i64),
        lease: Duration::from_millis(dice.below(30)),
        kinds: TaskKind::ALL[dice.below(4) as usize..].to_vec(),
        ids: Some(IDS[dice.below(5) as usize..].iter().map(|id| id.to_string()).collect())
            .filter(|_| dice.below(2) == 0),
        ..claim(owner, now, 1 + dice.below(3) as usize)
    };
    let a_query = DocumentQuery {
        kind,
        parent: a_document.parent.clone(),
        after: Some(id.to_string()).filter(|_| dice.below(2) == 0),
        limit: 1 + dice.below(4) as usize,
    };
    match dice.below(14) {
        0 | 1 => format!("push {a_task:?} {:?}", store.push(std::slice::from_ref(&a_task)).await),
        2..=4 => {
            // Among those of one time the store chooses, and how many it gets is known.
            let got = store.claim(&a_claim).await;
            format!("claim {a_claim:?} {got:?}")
        }
        5 => format!("renew {id} {owner} {some_time} {:?}", store.renew(id, owner, some_time).await),
        6 => format!("finish {id} {owner} {:?}", store.finish(id, owner).await),
        7 => format!("postpone {id} {owner} {some_time} {:?}", store.postpone(id, owner, some_time).await),
        8 => format!("cancel {id} {:?}", store.cancel(id).await),
        9 => format!("create {a_document:?} {:?}", store.create(&a_document).await),
        10 => format!("replace {a_document:?} {:?}", store.replace(&a_document).await),
        11 => format!("remove {kind:?} {id} {:?}", store.remove(kind, id).await),
        12 => format!("list {a_query:?} {:?}", store.documents(&a_query).await),
        _ => format!("expired {some_time} {:?}", store.expired(some_time, 2).await),
    }
}

pub async fn any_calls_have_the_outcomes_of_the_plain_store(store: Arc<dyn Work>) {
    let plain = MemoryWork::default();
    let (mut mine, mut theirs, mut clock) = (Dice(0x5eed), Dice(0x5eed), Dice(0xc10c));
    let mut past = Vec::new();
    let mut now = 0;
    for _ in 0..1500 {
        now += clock.below(5) as i64;
        let expected = call(&plain, &mut theirs, now).await;
        let got = call(store.as_ref(), &mut mine, now).await;
        assert_eq!(got, expected, "after {past:#?}");
        past.push(expected);
        if past.len() > 30 {
            past.remove(0);
        }
    }
}
