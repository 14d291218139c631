//! Models put in, exchanged and taken out under requests.

use eremois::serve::{Retired, Standby};

use super::*;

async fn ready(engine: &Engine, controls: &Controls, standby: Standby) -> Option<Retired> {
    let end = Instant::now() + LONG;
    while standby.health() != Health::Ready {
        assert!(Instant::now() < end);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    controls.batch_sizes.lock().clear();
    engine.install(standby)
}

async fn gone(retired: &Retired) {
    let end = Instant::now() + LONG;
    while !retired.is_gone() {
        assert!(Instant::now() < end, "nobody holds the old one any more");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn the_old_one_answers_what_it_has_and_the_new_one_what_comes() {
    let (engine, old_controls) = engine(limits()).await;
    old_controls.hold();
    let on_old: Vec<JoinHandle<_>> = (1..=20)
        .map(|i| {
            let engine = engine.clone();
            tokio::spawn(async move { sums(&engine, &[&format!("w{i}")]).await })
        })
        .collect();
    while old_controls.num_seqs() == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    tokio::time::sleep(Duration::from_millis(20)).await;
    let (new, new_controls) = fake::model("fake", MAX_SEQ_LEN);
    let retired = ready(&engine, &new_controls, engine.prepare(new, limits()).unwrap()).await.unwrap();
    assert!(!retired.is_gone());
    assert_eq!(engine.retired().len(), 1);
    // While the old device stands still the new one answers.
    assert_eq!(sums(&engine, &["w7"]).await.unwrap(), [7.0]);
    assert_eq!(new_controls.num_seqs(), 1);
    old_controls.release();
    for (i, answer) in on_old.into_iter().enumerate() {
        assert_eq!(answer.await.unwrap().unwrap(), [(i + 1) as f32]);
    }
    assert_eq!((old_controls.num_seqs(), new_controls.num_seqs()), (20, 1));
    gone(&retired).await;
    assert!(engine.retired().is_empty());
    assert_eq!(engine.models().len(), 1);
}

#[tokio::test]
async fn what_is_removed_is_unknown_and_its_drain_is_the_engines() {
    let (engine, controls) = engine(limits()).await;
    engine.add(fake::model("other", MAX_SEQ_LEN).0, limits()).unwrap();
    wait_for(&engine, |health| *health == Health::Ready).await;
    controls.hold();
    let asked = tokio::spawn({
        let engine = engine.clone();
        async move { sums(&engine, &["w1", "w2"]).await }
    });
    while controls.num_seqs() == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let retired = engine.remove("fake").unwrap();
    assert!(matches!(engine.remove("fake"), Err(Error::UnknownModel { .. })));
    let named = Request { model: Some("fake".into()), ..request(&["w1"]) };
    assert!(matches!(engine.infer(named).await, Err(Error::UnknownModel { .. })));
    // Without a default, the first that is left answers.
    assert_eq!(&*engine.infer(request(&["w1"])).await.unwrap().model, "other");
    // A drain waits for it as for the others.
    assert_eq!(engine.drain(Duration::from_millis(50)).await, 2);
    controls.release();
    assert!(asked.await.unwrap().is_ok());
    gone(&retired).await;
}

#[tokio::test]
async fn one_that_never_got_ready_leaves_nothing_behind() {
    let (engine, controls) = engine(limits()).await;
    let (new, new_controls) = fake::model("fake", MAX_SEQ_LEN);
    new_controls.broken.store(true, Ordering::SeqCst);
    let standby = engine.prepare(new, limits()).unwrap();
    let end = Instant::now() + LONG;
    while !matches!(standby.health(), Health::Unhealthy(_)) {
        assert!(Instant::now() < end);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    drop(standby);
    assert_eq!(sums(&engine, &["w7"]).await.unwrap(), [7.0]);
    assert_eq!(controls.num_seqs(), 1);
    // Its worker ends: nobody holds what it computes with.
    while Arc::strong_count(&new_controls) > 1 {
        assert!(Instant::now() < end, "the worker of a model that was given up lives on");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn a_pinned_model_stays_what_it_was() {
    let (engine, controls) = engine(limits()).await;
    let pinned = engine.pin(None).unwrap();
    let (new, new_controls) = fake::model("fake", MAX_SEQ_LEN);
    let retired = ready(&engine, &new_controls, engine.prepare(new, limits()).unwrap()).await.unwrap();
    assert!(Arc::ptr_eq(pinned.info(), retired.info()));
    assert_eq!(pinned.infer(request(&["w3"])).await.unwrap().rows[0][0], 3.0);
    assert_eq!((controls.num_seqs(), new_controls.num_seqs()), (1, 0));
    assert!(!retired.is_gone());
    drop(pinned);
    gone(&retired).await;
}
