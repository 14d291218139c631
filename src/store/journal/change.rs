//! What an entry says: from a change of the store to bytes and back.

use std::sync::Arc;

use super::entry::Kind;
use super::index::Meta;
use crate::store::encode;
use crate::store::record::{Feedback, InferenceId, Record};
use crate::{Error, Result};

/// A change that the store has yet to see.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    Put(Box<Record>),
    Delete(InferenceId),
    /// All records of this user that came before.
    Erase(String),
    Feedback(InferenceId, Feedback),
}

/// A change as bytes, with what the index keeps of it.
pub struct Entry {
    pub(super) meta: Meta,
    pub(super) body: Vec<u8>,
    pub(super) body_len: u32,
    pub(super) body_crc: u32,
}

impl Entry {
    /// Blocks: for the copying of the output, about a millisecond for 4 MB. Errors: those of [`encode::write_record`].
    pub fn put(record: &Record) -> Result<Self> {
        let mut body = Vec::with_capacity(1024);
        encode::write_record(record, &mut body)?;
        Self::new(put_meta(record.id, &record.facts.user, &record.facts.idempotency_key), body)
    }

    /// Takes a record away.
    pub fn delete(id: InferenceId) -> Self {
        let meta = Meta { kind: Kind::Delete, id: Some(id), user: None, key: None };
        Self::of_len(meta, id.0.as_bytes().to_vec(), 16)
    }

    /// Takes all records of a user away. Errors: a name of 4 GiB or more.
    pub fn erase(user: &str) -> Result<Self> {
        Self::new(erase_meta(user), user.as_bytes().to_vec())
    }

    /// Adds feedback to a record. Errors: feedback of 4 GiB or more.
    pub fn feedback(id: InferenceId, feedback: &Feedback) -> Result<Self> {
        let mut body = id.0.as_bytes().to_vec();
        serde_json::to_writer(&mut body, feedback).map_err(|e| Error::Internal { cause: e.to_string() })?;
        Self::new(Meta { kind: Kind::Feedback, id: Some(id), user: None, key: None }, body)
    }

    fn of_len(meta: Meta, body: Vec<u8>, body_len: u32) -> Self {
        let body_crc = crc32fast::hash(&body);
        Self { meta, body, body_len, body_crc }
    }

    fn new(meta: Meta, body: Vec<u8>) -> Result<Self> {
        match u32::try_from(body.len()) {
            Ok(body_len) => Ok(Self::of_len(meta, body, body_len)),
            Err(_) => Err(Error::Internal { cause: format!("a journal entry of {} bytes is too long", body.len()) }),
        }
    }
}

fn put_meta(id: InferenceId, user: &Option<String>, key: &Option<String>) -> Meta {
    let shared = |text: &Option<String>| text.as_deref().map(Arc::from);
    Meta { kind: Kind::Put, id: Some(id), user: shared(user), key: shared(key) }
}

fn erase_meta(user: &str) -> Meta {
    Meta { kind: Kind::Erase, id: None, user: Some(Arc::from(user)), key: None }
}

/// What the index keeps of an entry read from a segment. Errors: [`Error::Internal`] for a body of another form.
pub(super) fn meta_of(kind: Kind, body: &[u8]) -> Result<Meta> {
    match kind {
        Kind::Put => {
            let (id, facts) = encode::read_facts(&mut &body[..])?;
            Ok(put_meta(id, &facts.user, &facts.idempotency_key))
        }
        Kind::Erase => Ok(erase_meta(read_user(body)?)),
        Kind::Delete | Kind::Feedback => Ok(Meta { kind, id: Some(read_id(body)?.0), user: None, key: None }),
    }
}

/// The change of an entry. Errors: as [`meta_of`].
pub(super) fn change_of(kind: Kind, body: &[u8]) -> Result<Change> {
    match kind {
        Kind::Put => Ok(Change::Put(Box::new(encode::read_record(body)?))),
        Kind::Erase => Ok(Change::Erase(read_user(body)?.to_string())),
        Kind::Delete => Ok(Change::Delete(read_id(body)?.0)),
        Kind::Feedback => {
            let (id, rest) = read_id(body)?;
            Ok(Change::Feedback(id, serde_json::from_slice(rest).map_err(|e| unreadable(&e.to_string()))?))
        }
    }
}

fn read_id(body: &[u8]) -> Result<(InferenceId, &[u8])> {
    let Some((id, rest)) = body.split_first_chunk::<16>() else { return Err(unreadable("too short for an id")) };
    Ok((InferenceId(uuid::Uuid::from_bytes(*id)), rest))
}

fn read_user(body: &[u8]) -> Result<&str> {
    std::str::from_utf8(body).map_err(|e| unreadable(&e.to_string()))
}

fn unreadable(why: &str) -> Error {
    Error::Internal { cause: format!("an entry of the journal cannot be read: {why}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::record::now;

    #[test]
    fn changes_are_read_as_they_were_written() {
        let id = InferenceId::new();
        let feedback = Feedback { at: now(), score: Some(-0.5), label: Some("bad".into()), comment: None };
        let cases = [
            (Entry::delete(id), Change::Delete(id)),
            (Entry::erase("jörg").unwrap(), Change::Erase("jörg".into())),
            (Entry::feedback(id, &feedback).unwrap(), Change::Feedback(id, feedback)),
        ];
        for (entry, change) in cases {
            assert_eq!(change_of(entry.meta.kind, &entry.body), Ok(change));
            assert_eq!(meta_of(entry.meta.kind, &entry.body), Ok(entry.meta));
        }
    }

    #[test]
    fn bodies_of_another_form_are_errors() {
        for kind in [Kind::Put, Kind::Delete, Kind::Feedback] {
            assert!(change_of(kind, b"short").is_err() && meta_of(kind, b"short").is_err());
        }
        assert!(change_of(Kind::Erase, &[0xFF]).is_err());
        assert!(change_of(Kind::Feedback, &[b'x'; 40]).is_err());
    }
}
