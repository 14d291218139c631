//! Background work as entries of a backup: tasks, documents, parts of files.
//!
//! ```text
//! task, document  JSON
//! part            length of the file's name, u32 · name · number, u32 · bytes
//! ```

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::store::encode::{take, unreadable, write_u32};
use crate::store::work::{Document, DocumentKind, MAX_PART_BYTES, Task, TaskKind};
use crate::{Error, Result};

/// What a [`Piece`] is: a section of a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PieceKind {
    Task,
    Document,
    Part,
}

impl PieceKind {
    /// In the order in which they are read. Tasks are first: of work that ends meanwhile a task too many is done again, one
    /// too few never. What a document speaks of was written before it, and what is deleted goes with its document.
    pub const ALL: [Self; 3] = [Self::Task, Self::Document, Self::Part];

    /// The kind of its section.
    pub fn section(self) -> &'static str {
        match self {
            Self::Task => "tasks",
            Self::Document => "documents",
            Self::Part => "parts",
        }
    }

    /// The way back from [`PieceKind::section`].
    pub fn of(section: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.section() == section)
    }
}

/// Something of background work.
#[derive(Debug, Clone, PartialEq)]
pub enum Piece {
    /// Whoever holds it at the time of the backup holds it no more after a restore.
    Task(Task),
    Document(Document),
    Part {
        file: String,
        index: u32,
        bytes: Vec<u8>,
    },
}

#[derive(Serialize, Deserialize)]
struct TaskEntry {
    id: String,
    kind: TaskKind,
    payload: serde_json::Value,
    due_at: Timestamp,
    attempts: u32,
}

/// Without its revision, which counts the writes of one store.
#[derive(Serialize, Deserialize)]
struct DocumentEntry {
    kind: DocumentKind,
    id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    parent: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expires_at: Option<Timestamp>,
    body: serde_json::Value,
}

impl Piece {
    /// Its section.
    pub fn kind(&self) -> PieceKind {
        match self {
            Self::Task(_) => PieceKind::Task,
            Self::Document(_) => PieceKind::Document,
            Self::Part { .. } => PieceKind::Part,
        }
    }

    /// Its bytes. Errors: [`Error::Internal`] for what has none, such as a name of 4 GiB.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let json = |entry: serde_json::Result<Vec<u8>>| entry.map_err(|e| Error::Internal { cause: e.to_string() });
        match self {
            Self::Task(Task { id, kind, payload, due_at, attempts }) => json(serde_json::to_vec(&TaskEntry {
                id: id.clone(),
                kind: *kind,
                payload: payload.clone(),
                due_at: *due_at,
                attempts: *attempts,
            })),
            Self::Document(Document { kind, id, parent, expires_at, revision: _, body }) => {
                json(serde_json::to_vec(&DocumentEntry {
                    kind: *kind,
                    id: id.clone(),
                    parent: parent.clone(),
                    expires_at: *expires_at,
                    body: body.clone(),
                }))
            }
            Self::Part { file, index, bytes } => {
                let mut entry = Vec::with_capacity(8 + file.len() + bytes.len());
                write_u32(file.len(), &mut entry)?;
                entry.extend_from_slice(file.as_bytes());
                entry.extend_from_slice(&index.to_le_bytes());
                entry.extend_from_slice(bytes);
                Ok(entry)
            }
        }
    }

    /// The piece of these bytes, all of them. Errors: [`Error::Internal`] for bytes of another form.
    pub fn decode(kind: PieceKind, bytes: &[u8]) -> Result<Self> {
        let broken = |e: serde_json::Error| unreadable(&e.to_string());
        match kind {
            PieceKind::Task => {
                let TaskEntry { id, kind, payload, due_at, attempts } =
                    serde_json::from_slice(bytes).map_err(broken)?;
                Ok(Self::Task(Task { id, kind, payload, due_at, attempts }))
            }
            PieceKind::Document => {
                let DocumentEntry { kind, id, parent, expires_at, body } =
                    serde_json::from_slice(bytes).map_err(broken)?;
                Ok(Self::Document(Document { kind, id, parent, expires_at, revision: 0, body }))
            }
            PieceKind::Part => {
                let mut rest = bytes;
                let number = |bytes: &[u8]| bytes.try_into().map_or(0, u32::from_le_bytes);
                let len = number(take(&mut rest, 4)?) as usize;
                let file = std::str::from_utf8(take(&mut rest, len)?).map_err(|e| unreadable(&e.to_string()))?;
                let index = number(take(&mut rest, 4)?);
                if rest.len() > MAX_PART_BYTES {
                    return Err(unreadable(&format!("a part of {} bytes", rest.len())));
                }
                Ok(Self::Part { file: file.to_string(), index, bytes: rest.to_vec() })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn pieces() -> Vec<Piece> {
        let at = Timestamp::from_millisecond(1_700_000_000_123).unwrap();
        vec![
            Piece::Task(Task {
                id: "inf_1".into(),
                kind: TaskKind::Chunk,
                payload: json!({"lines": [1, 2]}),
                due_at: at,
                attempts: 2,
            }),
            Piece::Document(Document {
                kind: DocumentKind::Batch,
                id: "b".into(),
                parent: Some("p".into()),
                expires_at: Some(at),
                revision: 0,
                body: json!({"a": null}),
            }),
            Piece::Part { file: "ü".into(), index: u32::MAX, bytes: vec![0, 255] },
            Piece::Part { file: String::new(), index: 0, bytes: Vec::new() },
        ]
    }

    #[test]
    fn pieces_are_read_as_they_were_written() {
        for piece in pieces() {
            let bytes = piece.encode().unwrap();
            assert_eq!(Piece::decode(piece.kind(), &bytes), Ok(piece.clone()));
            let header_len = match &piece {
                Piece::Part { file, .. } => 8 + file.len(),
                _ => bytes.len(),
            };
            for len in 0..header_len {
                assert!(Piece::decode(piece.kind(), &bytes[..len]).is_err(), "{piece:?} {len}");
            }
        }
        let large = [&[0; 8][..], &vec![0; MAX_PART_BYTES + 1]].concat();
        assert!(Piece::decode(PieceKind::Part, &large).is_err());
        assert_eq!(PieceKind::ALL.map(|kind| PieceKind::of(kind.section())), PieceKind::ALL.map(Some));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            for kind in PieceKind::ALL {
                let _ = Piece::decode(kind, &bytes);
            }
        }
    }
}
