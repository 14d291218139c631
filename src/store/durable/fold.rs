//! What changes make of a record: the rules of [`Records`](crate::store::Records), as pure functions, for records whose
//! changes are still in the journal.

use crate::store::journal::Change;
use crate::store::query::Query;
use crate::store::record::{Feedback, InferenceId, Record};

/// The record after these changes of it, oldest first, upon what the store has.
pub fn fold(stored: Option<Record>, changes: Vec<Change>) -> Option<Record> {
    changes.into_iter().fold(stored, |record, change| match change {
        Change::Put(new) => Some(merge(record, *new)),
        Change::Delete(_) => None,
        Change::Erase(user) => record.filter(|record| record.facts.user.as_ref() != Some(&user)),
        Change::Feedback(_, feedback) => record.map(|mut record| {
            add_feedback(&mut record.facts.feedback, feedback);
            record
        }),
    })
}

/// What is there after a put: the new record, unless that would undo a final one; the feedback of both.
pub fn merge(old: Option<Record>, mut new: Record) -> Record {
    let Some(mut old) = old else { return new };
    if old.facts.status.is_final() && !new.facts.status.is_final() {
        return old;
    }
    let mut feedback = std::mem::take(&mut old.facts.feedback);
    for one in std::mem::take(&mut new.facts.feedback) {
        add_feedback(&mut feedback, one);
    }
    new.facts.feedback = feedback;
    new
}

/// Adds feedback unless it is there: the store may have got it already, from a replay that was interrupted.
pub fn add_feedback(to: &mut Vec<Feedback>, feedback: Feedback) {
    if !to.contains(&feedback) {
        to.push(feedback);
    }
}

/// Whether a record is wanted, all conditions of a query but its page considered.
pub fn matches(query: &Query, record: &Record) -> bool {
    let facts = &record.facts;
    query.model.as_ref().is_none_or(|model| *model == facts.model)
        && query.user.as_ref().is_none_or(|user| facts.user.as_ref() == Some(user))
        && query.status.is_none_or(|status| status == facts.status)
        && query.from.is_none_or(|from| record.id >= InferenceId::first_at(from))
        && query.to.is_none_or(|to| record.id < InferenceId::first_at(to))
        && query.metadata.iter().all(|(name, value)| facts.metadata.get(name) == Some(value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::record::{Facts, Status, now};

    fn record(status: Status) -> Record {
        let facts = Facts {
            user: Some("u".into()),
            metadata: [("a".to_string(), "1".to_string())].into(),
            ..Facts::new(status, "m", "1", "embed", "application")
        };
        Record { id: InferenceId::new(), facts, output: None }
    }

    fn put(record: &Record) -> Change {
        Change::Put(Box::new(record.clone()))
    }

    fn feedback(score: f64) -> Feedback {
        Feedback { at: now(), score: Some(score), label: None, comment: None }
    }

    #[test]
    fn an_older_state_undoes_nothing() {
        let done = record(Status::Succeeded);
        let mut queued = done.clone();
        queued.facts.status = Status::Queued;
        assert_eq!(fold(Some(done.clone()), vec![put(&queued)]), Some(done.clone()));
        assert_eq!(fold(Some(queued), vec![put(&done)]), Some(done));
    }

    #[test]
    fn feedback_outlives_a_put_and_is_counted_once() {
        let (bare, said) = (record(Status::Succeeded), feedback(1.0));
        let give = || Change::Feedback(bare.id, said.clone());
        let told = fold(None, vec![put(&bare), give(), give(), put(&bare)]).unwrap();
        assert_eq!(told.facts.feedback, std::slice::from_ref(&said));
        // Replayed upon a store that has it.
        assert_eq!(fold(Some(told.clone()), vec![give()]), Some(told));
        assert_eq!(fold(None, vec![give()]), None);
    }

    #[test]
    fn what_was_taken_away_stays_away_until_it_is_put_again() {
        let one = record(Status::Queued);
        let erase = |user: &str| Change::Erase(user.to_string());
        assert_eq!(fold(Some(one.clone()), vec![Change::Delete(one.id)]), None);
        assert_eq!(fold(Some(one.clone()), vec![erase("u")]), None);
        assert_eq!(fold(Some(one.clone()), vec![erase("v")]), Some(one.clone()));
        assert_eq!(fold(Some(one.clone()), vec![erase("u"), put(&one)]), Some(one.clone()));
    }

    #[test]
    fn every_condition_can_refuse() {
        let one = record(Status::Queued);
        let created = one.id.created_at();
        let later = created + jiff::SignedDuration::from_millis(1);
        let all = Query {
            model: Some("m".into()),
            user: Some("u".into()),
            status: Some(Status::Queued),
            from: Some(created),
            to: Some(later),
            metadata: one.facts.metadata.clone(),
            ..Query::default()
        };
        assert!(matches(&all, &one) && matches(&Query::default(), &one));
        let metadata = [("a".to_string(), "2".to_string())].into();
        let refusing = [
            Query { model: Some("n".into()), ..all.clone() },
            Query { user: Some("v".into()), ..all.clone() },
            Query { status: Some(Status::Failed), ..all.clone() },
            Query { from: Some(later), ..all.clone() },
            Query { to: Some(created), ..all.clone() },
            Query { metadata, ..all.clone() },
        ];
        for query in refusing {
            assert!(!matches(&query, &one), "{query:?}");
        }
    }
}
