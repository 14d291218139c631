//! What every store promises of tasks, one function a promise. Each gets an empty store.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use eremois::store::work::{Claim, DocumentKind, DocumentQuery, Hold, Task, TaskKind, Work};
use futures::future::join_all;
use serde_json::json;

use crate::samples::{LEASE, at, awkward, claim, longest, task};

type Store = Arc<dyn Work>;

fn ids(tasks: &[Task]) -> Vec<&str> {
    tasks.iter().map(|task| task.id.as_str()).collect()
}

async fn push(store: &Store, tasks: &[Task]) {
    store.push(tasks).await.unwrap();
}

/// Claims and returns the ids.
async fn claimed(store: &Store, claim: Claim) -> Vec<String> {
    store.claim(&claim).await.unwrap().into_iter().map(|task| task.id).collect()
}

async fn num_tasks(store: &Store) -> u64 {
    store.num_tasks().await.unwrap().into_iter().map(|(_, count)| count).sum()
}

const LEASE_MS: i64 = LEASE.as_millis() as i64;

pub async fn an_empty_store_answers(store: Store) {
    assert_eq!(store.push(&[]).await, Ok(()));
    assert_eq!(store.claim(&claim("a", 0, 10)).await, Ok(vec![]));
    assert_eq!(store.renew("x", "a", at(0)).await, Ok(Hold::Lost));
    assert_eq!(store.finish("x", "a").await, Ok(Hold::Lost));
    assert_eq!(store.postpone("x", "a", at(0)).await, Ok(Hold::Lost));
    assert_eq!(store.cancel("x").await, Ok(false));
    assert_eq!(store.num_tasks().await, Ok(vec![]));
    assert_eq!(store.document(DocumentKind::File, "x").await, Ok(None));
    assert_eq!(store.remove(DocumentKind::File, "x").await, Ok(false));
    let query = DocumentQuery { kind: DocumentKind::File, parent: None, after: None, limit: 10 };
    assert_eq!(store.documents(&query).await, Ok(vec![]));
    assert_eq!(store.expired(at(0), 10).await, Ok(vec![]));
    assert_eq!(store.part("x", 0).await, Ok(None));
    assert_eq!(store.remove_parts("x").await, Ok(()));
}

pub async fn a_task_comes_back_as_it_was_pushed(store: Store) {
    let kinds = TaskKind::ALL.iter().cycle();
    let tasks: Vec<Task> = awkward()
        .into_iter()
        .zip(kinds)
        .enumerate()
        .map(|(i, (payload, kind))| {
            let due = i as i64 - 5;
            Task { kind: *kind, payload, attempts: i as u32, ..task(&format!("task-{i:02}"), due) }
        })
        .collect();
    push(&store, &tasks).await;
    let found = store.claim(&claim("a", 100, 100)).await.unwrap();
    let expected: Vec<Task> = tasks.into_iter().map(|task| Task { attempts: task.attempts + 1, ..task }).collect();
    assert_eq!(found, expected);
    // A task that has been tried so often that nobody counts any more.
    push(&store, &[Task { attempts: u32::MAX, ..task("old", 0) }]).await;
    assert_eq!(store.claim(&claim("a", 100, 100)).await.unwrap()[0].attempts, u32::MAX);
}

pub async fn what_is_pushed_again_is_left_as_it_is(store: Store) {
    push(&store, &[task("a", 0), task("a", 5)]).await;
    let other = Task { kind: TaskKind::Batch, payload: json!("other"), attempts: 7, ..task("a", 50) };
    push(&store, &[other.clone(), task("b", 1)]).await;
    assert_eq!(num_tasks(&store).await, 2, "the one that is new is added beside it");
    let first = Task { attempts: 1, ..task("a", 0) };
    assert_eq!(store.claim(&claim("x", 0, 10)).await, Ok(vec![first]));
    // Also while it is held: it neither comes free nor loses its owner.
    push(&store, &[other]).await;
    assert_eq!(claimed(&store, claim("y", 1, 10)).await, ["b"]);
    assert_eq!(store.finish("a", "x").await, Ok(Hold::Held));
    assert_eq!(store.finish("b", "y").await, Ok(Hold::Held));
    assert_eq!(num_tasks(&store).await, 0);
    // What has ended may come again.
    push(&store, &[task("a", 2)]).await;
    assert_eq!(claimed(&store, claim("x", 2, 10)).await, ["a"]);
}

pub async fn what_is_due_the_longest_is_claimed_first(store: Store) {
    // Pushed in another order than they are due, with several of one time and different kinds.
    let of = |id: &str, due: i64, kind: TaskKind| Task { kind, ..task(id, due) };
    push(
        &store,
        &[
            of("e", 40, TaskKind::Chunk),
            of("b", 10, TaskKind::Callback),
            of("f", 50, TaskKind::Chunk),
            of("a", -3_600_000, TaskKind::Batch),
            of("d", 30, TaskKind::Inference),
            of("c", 10, TaskKind::Chunk),
        ],
    )
    .await;
    assert_eq!(store.claim(&claim("x", 100, 0)).await, Ok(vec![]));
    let first: BTreeSet<String> = claimed(&store, claim("x", 40, 3)).await.into_iter().collect();
    assert_eq!(first.into_iter().collect::<Vec<_>>(), ["a", "b", "c"]);
    // Not what is due a millisecond later, and `due_by` counts and not `now`.
    assert_eq!(claimed(&store, Claim { due_by: at(39), ..claim("x", 100, 10) }).await, ["d"]);
    assert_eq!(claimed(&store, claim("x", 40, 10)).await, ["e"]);
    assert_eq!(claimed(&store, claim("x", 49, 10)).await, [""; 0]);
    // A lease that is over changes nothing in the order.
    let again = store.claim(&claim("y", 100 + LEASE_MS, 10)).await.unwrap();
    assert_eq!(ids(&again)[0], "a");
    assert_eq!(ids(&again)[3..], ["d", "e", "f"]);
    let attempts: Vec<u32> = again.iter().map(|task| task.attempts).collect();
    assert_eq!(attempts, [2, 2, 2, 2, 2, 1]);
}

pub async fn a_claim_gets_only_what_it_names(store: Store) {
    let kinds = [TaskKind::Chunk, TaskKind::Callback, TaskKind::Chunk, TaskKind::Batch, TaskKind::Chunk];
    for (i, kind) in kinds.into_iter().enumerate() {
        push(&store, &[Task { kind, ..task(&format!("t{i}"), i as i64) }]).await;
    }
    let of = |kinds: &[TaskKind]| Claim { kinds: kinds.to_vec(), ..claim("x", 10, 10) };
    let named = |ids: &[&str]| Some(ids.iter().map(|id| id.to_string()).collect::<Vec<_>>());
    assert_eq!(claimed(&store, of(&[])).await, [""; 0]);
    assert_eq!(claimed(&store, of(&[TaskKind::Inference])).await, [""; 0]);
    assert_eq!(claimed(&store, of(&[TaskKind::Batch, TaskKind::Callback])).await, ["t1", "t3"]);
    assert_eq!(claimed(&store, Claim { ids: named(&[]), ..claim("x", 10, 10) }).await, [""; 0]);
    // One that is held, one that is not there, one that is named twice, one that is not due; and the limit.
    let some = named(&["t4", "nobody", "t1", "t2", "t2", "t0"]);
    assert_eq!(claimed(&store, Claim { ids: some.clone(), ..claim("x", 3, 2) }).await, ["t0", "t2"]);
    assert_eq!(
        claimed(&store, Claim { ids: some.clone(), kinds: vec![TaskKind::Batch], ..claim("x", 9, 9) }).await,
        [""; 0]
    );
    assert_eq!(claimed(&store, Claim { ids: some, ..claim("x", 9, 9) }).await, ["t4"]);
}

pub async fn nobody_gets_a_held_task_until_its_lease_is_over(store: Store) {
    push(&store, &[task("a", 0)]).await;
    assert_eq!(claimed(&store, claim("x", 0, 10)).await, ["a"]);
    let by_name = |now| Claim { ids: Some(vec!["a".to_string()]), ..claim("y", now, 10) };
    for now in [0, 1, LEASE_MS - 1] {
        assert_eq!(claimed(&store, claim("x", now, 10)).await, [""; 0], "not even its owner");
        assert_eq!(claimed(&store, claim("y", now, 10)).await, [""; 0]);
        assert_eq!(claimed(&store, by_name(now)).await, [""; 0]);
    }
    let taken = store.claim(&by_name(LEASE_MS)).await.unwrap();
    assert_eq!(taken, [Task { attempts: 2, ..task("a", 0) }]);
    assert_eq!(store.renew("a", "x", at(LEASE_MS * 5)).await, Ok(Hold::Lost));
    assert_eq!(store.finish("a", "x").await, Ok(Hold::Lost));
    assert_eq!(store.postpone("a", "x", at(0)).await, Ok(Hold::Lost));
    // What the old owner did changed nothing.
    assert_eq!(claimed(&store, claim("z", LEASE_MS * 2 - 1, 10)).await, [""; 0]);
    assert_eq!(store.claim(&claim("z", LEASE_MS * 2, 10)).await.unwrap()[0].attempts, 3);
    // A lease that never ends.
    push(&store, &[task("b", 0)]).await;
    let forever = Claim { lease: Duration::MAX, ..claim("x", 0, 10) };
    assert_eq!(claimed(&store, forever).await, ["b"]);
    assert_eq!(claimed(&store, claim("y", LEASE_MS * 2, 10)).await, [""; 0]);
}

pub async fn a_lease_is_renewed_by_its_owner_alone(store: Store) {
    push(&store, &[task("a", 0), task("waits", 1_000_000)]).await;
    assert_eq!(claimed(&store, claim("x", 0, 10)).await, ["a"]);
    assert_eq!(store.renew("a", "y", at(90_000)).await, Ok(Hold::Lost));
    assert_eq!(store.renew("a", "", at(90_000)).await, Ok(Hold::Lost));
    assert_eq!(store.renew("waits", "x", at(90_000)).await, Ok(Hold::Lost));
    assert_eq!(store.renew("a", "x", at(50_000)).await, Ok(Hold::Held));
    assert_eq!(claimed(&store, claim("y", 49_999, 10)).await, [""; 0]);
    // Late, but nobody has taken it: it is still the owner's.
    assert_eq!(store.renew("a", "x", at(70_000)).await, Ok(Hold::Held));
    assert_eq!(claimed(&store, claim("y", 69_999, 10)).await, [""; 0]);
    assert_eq!(claimed(&store, claim("y", 70_000, 10)).await, ["a"]);
    assert_eq!(store.renew("a", "x", at(990_000)).await, Ok(Hold::Lost));
    assert_eq!(store.renew("a", "y", at(81_000)).await, Ok(Hold::Held));
    assert_eq!(claimed(&store, claim("x", 81_000, 10)).await, ["a"], "the renewal that was lost held nothing");
}

pub async fn what_is_finished_is_gone(store: Store) {
    push(&store, &[task("a", 0), task("b", 1)]).await;
    assert_eq!(store.finish("a", "x").await, Ok(Hold::Lost), "nobody holds it");
    assert_eq!(claimed(&store, claim("x", 0, 10)).await, ["a"]);
    assert_eq!(store.finish("a", "y").await, Ok(Hold::Lost));
    assert_eq!(num_tasks(&store).await, 2);
    // Also when the lease is over, as long as nobody has taken it.
    assert_eq!(store.finish("a", "x").await, Ok(Hold::Held));
    assert_eq!(store.finish("a", "x").await, Ok(Hold::Lost));
    assert_eq!(claimed(&store, claim("x", LEASE_MS * 9, 10)).await, ["b"]);
    assert_eq!(num_tasks(&store).await, 1);
}

pub async fn what_is_postponed_is_due_again_in_time(store: Store) {
    push(&store, &[task("a", 0)]).await;
    assert_eq!(store.postpone("a", "x", at(0)).await, Ok(Hold::Lost), "nobody holds it");
    assert_eq!(claimed(&store, claim("x", 0, 10)).await, ["a"]);
    assert_eq!(store.postpone("a", "y", at(0)).await, Ok(Hold::Lost));
    assert_eq!(store.postpone("a", "x", at(500)).await, Ok(Hold::Held));
    assert_eq!(store.renew("a", "x", at(90_000)).await, Ok(Hold::Lost));
    assert_eq!(store.finish("a", "x").await, Ok(Hold::Lost));
    assert_eq!(claimed(&store, claim("x", 499, 10)).await, [""; 0]);
    let again = store.claim(&claim("y", 500, 10)).await.unwrap();
    assert_eq!(again, [Task { attempts: 2, ..task("a", 500) }]);
    // Into the past: for another one at once.
    assert_eq!(store.postpone("a", "y", at(-1)).await, Ok(Hold::Held));
    assert_eq!(claimed(&store, claim("z", 0, 10)).await, ["a"]);
}

pub async fn what_waits_is_cancelled_at_once(store: Store) {
    push(&store, &[task("a", 0), task("b", 0)]).await;
    assert_eq!(store.cancel("a").await, Ok(true));
    assert_eq!(store.cancel("a").await, Ok(false));
    assert_eq!(claimed(&store, claim("x", 0, 10)).await, ["b"]);
    // One that was given back waits again.
    assert_eq!(store.postpone("b", "x", at(0)).await, Ok(Hold::Held));
    assert_eq!(store.cancel("b").await, Ok(true));
    assert_eq!(num_tasks(&store).await, 0);
}

pub async fn the_owner_learns_of_a_cancellation(store: Store) {
    push(&store, &[task("a", 0), task("b", 1), task("c", 2)]).await;
    assert_eq!(claimed(&store, claim("x", 2, 10)).await, ["a", "b", "c"]);
    for id in ["a", "b", "c"] {
        assert_eq!(store.cancel(id).await, Ok(true));
        assert_eq!(store.cancel(id).await, Ok(true), "it is there until its owner has ended it");
    }
    // Pushing it again takes nothing back.
    push(&store, &[task("a", 0)]).await;
    assert_eq!(store.renew("a", "y", at(0)).await, Ok(Hold::Lost));
    assert_eq!(store.renew("a", "x", at(20_000)).await, Ok(Hold::Cancelled));
    assert_eq!(num_tasks(&store).await, 3);
    assert_eq!(store.finish("a", "x").await, Ok(Hold::Cancelled));
    assert_eq!(store.postpone("b", "y", at(0)).await, Ok(Hold::Lost));
    assert_eq!(store.postpone("b", "x", at(0)).await, Ok(Hold::Cancelled));
    assert_eq!(num_tasks(&store).await, 1);
    for id in ["a", "b"] {
        assert_eq!(store.finish(id, "x").await, Ok(Hold::Lost));
        assert_eq!(store.cancel(id).await, Ok(false));
    }
    assert_eq!(store.renew("c", "x", at(20_000)).await, Ok(Hold::Cancelled));
    assert_eq!(store.finish("c", "x").await, Ok(Hold::Cancelled));
    // Not cancelled any more once it comes anew.
    push(&store, &[task("c", 3)]).await;
    assert_eq!(claimed(&store, claim("x", 3, 10)).await, ["c"]);
    assert_eq!(store.finish("c", "x").await, Ok(Hold::Held));
}

pub async fn a_cancelled_task_of_a_dead_owner_is_gone(store: Store) {
    push(&store, &[task("a", 0), task("b", 0)]).await;
    assert_eq!(claimed(&store, Claim { ids: Some(vec!["a".to_string()]), ..claim("x", 0, 10) }).await, ["a"]);
    assert_eq!(store.cancel("a").await, Ok(true));
    assert_eq!(claimed(&store, claim("y", LEASE_MS - 1, 10)).await, ["b"]);
    assert_eq!(num_tasks(&store).await, 2, "its owner may live");
    let by_name = Claim { ids: Some(vec!["a".to_string()]), ..claim("y", LEASE_MS, 10) };
    assert_eq!(claimed(&store, by_name).await, [""; 0]);
    assert_eq!(claimed(&store, claim("y", LEASE_MS, 10)).await, [""; 0]);
    assert_eq!(store.renew("a", "x", at(90_000)).await, Ok(Hold::Lost));
    assert_eq!(num_tasks(&store).await, 1);
    push(&store, &[task("a", 5)]).await;
    assert_eq!(claimed(&store, claim("y", 5, 10)).await, ["a"]);
}

pub async fn tasks_are_counted_by_kind(store: Store) {
    let of = |id: &str, kind: TaskKind| Task { kind, ..task(id, 0) };
    push(&store, &[of("a", TaskKind::Callback), of("b", TaskKind::Inference), of("c", TaskKind::Callback)]).await;
    push(&store, &[Task { due_at: at(1_000_000), ..of("d", TaskKind::Callback) }]).await;
    assert_eq!(store.claim(&claim("x", 0, 2)).await.unwrap().len(), 2);
    let mut counts = store.num_tasks().await.unwrap();
    counts.sort();
    assert_eq!(counts, [(TaskKind::Inference, 1), (TaskKind::Callback, 3)], "held and waiting, due or not");
}

pub async fn many_claimers_never_share_a_task(store: Store) {
    const NUM_TASKS: usize = 150;
    let tasks: Vec<Task> = (0..NUM_TASKS).map(|i| task(&format!("t{i:03}"), (i % 7) as i64)).collect();
    push(&store, &tasks).await;
    // Twice: once for what waits, once for what those of the first time left behind.
    for (round, now) in [(1, 10), (2, 10 + LEASE_MS)] {
        let claimers = (0..12).map(|i| {
            let store = store.clone();
            let owner = format!("owner {round} {i}");
            tokio::spawn(async move {
                let mut got = Vec::new();
                loop {
                    let tasks = store.claim(&claim(&owner, now, 1 + i % 5)).await.unwrap();
                    if tasks.is_empty() {
                        return (owner, got);
                    }
                    assert!(tasks.len() <= 1 + i % 5);
                    got.extend(tasks);
                }
            })
        });
        let mut seen = BTreeSet::new();
        for claimer in join_all(claimers).await {
            let (owner, got) = claimer.unwrap();
            for task in got {
                assert!(seen.insert(task.id.clone()), "{} was claimed twice in round {round}", task.id);
                assert_eq!(task.attempts, round);
                assert_eq!(store.renew(&task.id, &owner, at(10 + LEASE_MS * i64::from(round))).await, Ok(Hold::Held));
            }
        }
        assert_eq!(seen.len(), NUM_TASKS, "whoever finds none leaves none behind");
    }
}

pub async fn one_of_many_ends_a_task(store: Store) {
    for i in 0..20 {
        let id = format!("t{i}");
        push(&store, &[task(&id, 0)]).await;
        assert_eq!(claimed(&store, claim("x", 0, 10)).await, std::slice::from_ref(&id));
        let finished = (0..3).map(|_| store.finish(&id, "x"));
        let postponed = (0..3).map(|_| store.postpone(&id, "x", at(1_000_000)));
        let (finished, postponed, cancelled) = tokio::join!(join_all(finished), join_all(postponed), store.cancel(&id));
        let holds: Vec<Hold> = finished.iter().chain(&postponed).map(|hold| hold.clone().unwrap()).collect();
        let ended: Vec<&Hold> = holds.iter().filter(|hold| **hold != Hold::Lost).collect();
        assert_eq!(ended.len(), 1, "{holds:?}");
        let is_left = num_tasks(&store).await == 1;
        // Postponed before it was cancelled, it waited, and was gone at once.
        assert!(!is_left || !cancelled.clone().unwrap(), "{cancelled:?} {holds:?}");
        store.cancel(&id).await.unwrap();
    }
    assert_eq!(num_tasks(&store).await, 0);
}

pub async fn payloads_of_several_mib_are_whole(store: Store) {
    let large = |i: usize| json!({"lines": vec![format!("ein langer Text ✂ {i} "); 150_000], "last": i});
    let tasks: Vec<Task> = (0..3).map(|i| Task { payload: large(i), ..task(&format!("t{i}"), i as i64) }).collect();
    assert!(tasks[0].payload.to_string().len() > 3 << 20);
    push(&store, &tasks).await;
    let found = store.claim(&claim("x", 10, 10)).await.unwrap();
    assert_eq!(found.len(), 3);
    for (found, task) in found.iter().zip(&tasks) {
        assert!(found.payload == task.payload, "{} is not what was pushed", task.id);
    }
    assert_eq!(store.renew("t0", "x", at(50_000)).await, Ok(Hold::Held));
    assert_eq!(store.postpone("t1", "x", at(20)).await, Ok(Hold::Held));
    assert_eq!(store.finish("t2", "x").await, Ok(Hold::Held));
    let again = store.claim(&claim("y", 20, 10)).await.unwrap();
    assert_eq!(ids(&again), ["t1"]);
    assert!(again[0].payload == tasks[1].payload);
}

pub async fn ids_may_have_their_longest(store: Store) {
    let (one, two) = (longest('1'), longest('2'));
    push(&store, &[task(&one, 0), task(&two, 1)]).await;
    let owner = longest('x');
    let named = Claim { ids: Some(vec![one.clone(), two.clone()]), ..claim(&owner, 1, 10) };
    assert_eq!(claimed(&store, named).await, [one.clone(), two.clone()]);
    assert_eq!(store.finish(&one, &owner).await, Ok(Hold::Held));
    assert_eq!(store.cancel(&two).await, Ok(true));
    assert_eq!(store.renew(&two, &owner, at(9)).await, Ok(Hold::Cancelled));
}
