//! A list's conditions as a filter.

use mongodb::bson::{Document, doc};

use super::document::uuid;
use crate::store::query::Query;
use crate::store::record::InferenceId;

/// The filter of a query. Times are ranges of `_id`, as its pages are, so that one index serves both.
pub(super) fn filter(query: &Query) -> Document {
    let mut filter = Document::new();
    let mut ids = Document::new();
    if let Some(from) = query.from {
        ids.insert("$gte", uuid(&InferenceId::first_at(from)));
    }
    let ends = [query.to.map(InferenceId::first_at), query.after];
    if let Some(end) = ends.into_iter().flatten().min() {
        ids.insert("$lt", uuid(&end));
    }
    if !ids.is_empty() {
        filter.insert("_id", ids);
    }
    for (name, value) in [("model", &query.model), ("user", &query.user)] {
        if let Some(value) = value {
            filter.insert(name, value);
        }
    }
    if let Some(status) = query.status {
        filter.insert("status", status.as_str());
    }
    let pair = |(k, v): (&String, &String)| doc! { "metadata": { "$elemMatch": { "k": k, "v": v } } };
    let pairs: Vec<Document> = query.metadata.iter().map(pair).collect();
    if !pairs.is_empty() {
        filter.insert("$and", pairs);
    }
    filter
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use jiff::Timestamp;

    use super::*;
    use crate::store::record::Status;

    #[test]
    fn an_empty_query_has_no_conditions() {
        assert_eq!(filter(&Query::default()), doc! {});
    }

    #[test]
    fn the_earlier_of_two_ends_counts() {
        let at = |ms| Timestamp::from_millisecond(ms).unwrap();
        let after = InferenceId::first_at(at(5));
        let query = |to| Query { to: Some(at(to)), after: Some(after), ..Query::default() };
        assert_eq!(filter(&query(9)), doc! { "_id": { "$lt": uuid(&after) } });
        assert_eq!(filter(&query(4)), doc! { "_id": { "$lt": uuid(&InferenceId::first_at(at(4))) } });
    }

    #[test]
    fn all_conditions_hold() {
        let query = Query {
            model: Some("m".into()),
            user: Some("u".into()),
            status: Some(Status::Failed),
            metadata: BTreeMap::from([("a".into(), "1".into()), ("b".into(), "2".into())]),
            ..Query::default()
        };
        let wanted = doc! { "model": "m", "user": "u", "status": "failed", "$and": [
            { "metadata": { "$elemMatch": { "k": "a", "v": "1" } } },
            { "metadata": { "$elemMatch": { "k": "b", "v": "2" } } },
        ] };
        assert_eq!(filter(&query), wanted);
    }
}
