//! How a segment's bytes are laid out, and how they are read when some of them are damaged. Pure functions.
//!
//! ```text
//! segment  magic, 8 bytes · version, u32 · CRC of the 12 bytes before · entries
//! entry    magic, 4 bytes · body length, u32 · sequence number, u64 · appended at, i64 ms · kind, u8 · 3 zeros
//!          · CRC of the body, u32 · CRC of the header's bytes before, u32 · body
//! ```
//!
//! Numbers are little-endian. The CRC is CRC-32/ISO-HDLC (polynomial 0x04C11DB7, reflected: zip's and Ethernet's).
//! A header has a CRC of its own, so that a damaged body does not hide where the next entry begins.

use std::ops::Range;

/// Bytes before the first entry of a segment.
pub const SEGMENT_HEADER_LEN: usize = 16;
/// Bytes of an entry before its body.
pub const HEADER_LEN: usize = 36;
/// The form this file describes. A segment of a higher one is left alone.
pub const VERSION: u32 = 1;

const SEGMENT_MAGIC: [u8; 8] = *b"eremoisJ";
/// 0xFF is in no UTF-8, so that no text of a client reads as the beginning of an entry.
const MAGIC: [u8; 4] = [0xFF, b'e', b'J', 0xFE];

/// What an entry does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The body is a record.
    Put = 1,
    /// The body is an id, 16 bytes.
    Delete = 2,
    /// The body is the name of a user.
    Erase = 3,
    /// The body is an id and feedback as JSON.
    Feedback = 4,
}

impl Kind {
    fn of(byte: u8) -> Option<Self> {
        [Self::Put, Self::Delete, Self::Erase, Self::Feedback].into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// What is known of an entry without its body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub seq: u64,
    /// Unix time in milliseconds.
    pub at_ms: i64,
    pub kind: Kind,
    pub body_len: u32,
    pub body_crc: u32,
}

impl Header {
    /// As it is written before the body.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..4].copy_from_slice(&MAGIC);
        bytes[4..8].copy_from_slice(&self.body_len.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.seq.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.at_ms.to_le_bytes());
        bytes[24] = self.kind as u8;
        bytes[28..32].copy_from_slice(&self.body_crc.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..32]);
        bytes[32..36].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// The header these bytes begin with, if it is whole.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; HEADER_LEN] = bytes.first_chunk()?;
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        if bytes[0..4] != MAGIC || u32_at(32) != crc32fast::hash(&bytes[..32]) {
            return None;
        }
        let kind = Kind::of(bytes[24])?;
        Some(Self { seq: u64_at(8), at_ms: u64_at(16) as i64, kind, body_len: u32_at(4), body_crc: u32_at(28) })
    }

    /// Bytes of the whole entry.
    pub fn entry_len(&self) -> u64 {
        HEADER_LEN as u64 + u64::from(self.body_len)
    }
}

/// What a segment begins with.
pub fn segment_header() -> [u8; SEGMENT_HEADER_LEN] {
    let mut bytes = [0; SEGMENT_HEADER_LEN];
    bytes[0..8].copy_from_slice(&SEGMENT_MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    let crc = crc32fast::hash(&bytes[..12]);
    bytes[12..16].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// The version a segment says it is of; `None` where its first bytes are damaged.
pub fn segment_version(bytes: &[u8]) -> Option<u32> {
    let header: &[u8; SEGMENT_HEADER_LEN] = bytes.first_chunk()?;
    let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    (header[0..8] == SEGMENT_MAGIC && word(12) == crc32fast::hash(&header[..12])).then(|| word(8))
}

/// An entry where it was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    pub header: Header,
    /// Of the entry's first byte in its segment.
    pub offset: u64,
}

impl Placed {
    /// Where its body lies.
    pub fn body(&self) -> Range<usize> {
        let start = self.offset as usize + HEADER_LEN;
        start..start + self.header.body_len as usize
    }
}

/// What is in a segment.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Scan {
    /// Whole entries, their sequence numbers rising.
    pub entries: Vec<Placed>,
    /// Bytes that are no entry, with whole entries after them.
    pub damage: Vec<Range<u64>>,
    /// Bytes that are no entry, up to the end: what a crash leaves of entries nobody was told of. A damaged last entry
    /// looks the same.
    pub tail: Option<Range<u64>>,
}

/// Finds the whole entries of a segment, also behind damaged ones. Entries numbered below `first_seq`, which the name of
/// the segment says, are none: what a disk's blocks held before them.
pub fn scan(bytes: &[u8], first_seq: u64) -> Scan {
    let mut scan = Scan::default();
    let mut next_seq = first_seq;
    // A damaged segment header says nothing of the entries, which say what they are themselves.
    let mut at = if segment_version(bytes).is_some() { SEGMENT_HEADER_LEN } else { 0 };
    while at < bytes.len() {
        if let Some(header) = whole_entry(bytes, at, next_seq) {
            scan.entries.push(Placed { header, offset: at as u64 });
            next_seq = header.seq.saturating_add(1);
            at += header.entry_len() as usize;
            continue;
        }
        let found = next_entry(bytes, at, next_seq);
        let damaged = at as u64..found.unwrap_or(bytes.len()) as u64;
        match found {
            Some(next) => {
                scan.damage.push(damaged);
                at = next;
            }
            None => {
                scan.tail = Some(damaged);
                break;
            }
        }
    }
    scan
}

/// The entry at `at`, if it is whole and not numbered below `min_seq`.
fn whole_entry(bytes: &[u8], at: usize, min_seq: u64) -> Option<Header> {
    let header = Header::decode(&bytes[at..]).filter(|header| header.seq >= min_seq)?;
    let body = bytes[at + HEADER_LEN..].get(..header.body_len as usize)?;
    (crc32fast::hash(body) == header.body_crc).then_some(header)
}

/// Where the first whole entry after the broken one at `at` begins.
fn next_entry(bytes: &[u8], at: usize, min_seq: u64) -> Option<usize> {
    // A header that is whole says where its broken body ends; nothing inside that is an entry, whatever it looks like.
    let end = Header::decode(&bytes[at..]).map(|header| header.entry_len() as usize);
    let from = at.saturating_add(end.unwrap_or(1)).min(bytes.len());
    let magics = bytes[from..].windows(MAGIC.len()).enumerate().filter(|(_, window)| *window == MAGIC);
    magics.map(|(i, _)| from + i).find(|at| whole_entry(bytes, *at, min_seq).is_some())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(seq: u64, at_ms: i64, kind: Kind, body: &[u8]) -> Header {
        Header { seq, at_ms, kind, body_len: body.len() as u32, body_crc: crc32fast::hash(body) }
    }

    fn segment(bodies: &[Vec<u8>]) -> (Vec<u8>, Vec<Placed>) {
        let mut bytes = segment_header().to_vec();
        let mut placed = Vec::new();
        for (i, body) in bodies.iter().enumerate() {
            let header = header(7 + i as u64, 1_700_000_000_000 + i as i64, Kind::Put, body);
            placed.push(Placed { header, offset: bytes.len() as u64 });
            bytes.extend_from_slice(&header.encode());
            bytes.extend_from_slice(body);
        }
        (bytes, placed)
    }

    #[test]
    fn headers_are_read_as_they_were_written() {
        for kind in [Kind::Put, Kind::Delete, Kind::Erase, Kind::Feedback] {
            let header = header(u64::MAX - 1, -5, kind, b"body");
            assert_eq!(Header::decode(&header.encode()), Some(header));
        }
        assert_eq!(segment_version(&segment_header()), Some(VERSION));
    }

    #[test]
    fn the_checksum_is_the_one_that_is_documented() {
        // The check value of CRC-32/ISO-HDLC in Greg Cook's catalogue of CRC algorithms.
        assert_eq!(crc32fast::hash(b"123456789"), 0xCBF4_3926);
    }

    #[test]
    fn a_file_of_zeros_and_an_empty_one_hold_nothing() {
        assert_eq!(scan(&[], 1), Scan::default());
        assert_eq!(scan(&[0; 100], 1).tail, Some(0..100));
        // Written ahead of its size: the header, then nothing but zeros.
        let bytes = [&segment_header()[..], &[0; 64]].concat();
        assert_eq!(scan(&bytes, 1), Scan { tail: Some(16..80), ..Scan::default() });
    }

    #[test]
    fn an_entry_in_a_broken_body_is_none() {
        let inner = segment(&[vec![1; 8]]).0[SEGMENT_HEADER_LEN..].to_vec();
        let (mut bytes, placed) = segment(&[inner, b"after".to_vec()]);
        bytes[placed[0].body().end - 1] ^= 1;
        let scan = scan(&bytes, 1);
        assert_eq!(scan.entries, placed[1..]);
        assert_eq!(scan.damage.first(), Some(&(placed[0].offset..placed[1].offset)));
    }

    #[test]
    fn what_blocks_held_before_is_no_entry() {
        let (bytes, placed) = segment(&[b"old".to_vec()]);
        assert_eq!(scan(&bytes, 8), Scan { tail: Some(16..bytes.len() as u64), ..Scan::default() });
        assert_eq!(scan(&bytes, 7).entries, placed);
    }

    fn bodies() -> impl Strategy<Value = Vec<Vec<u8>>> {
        // Values close to the magic's, so that it also occurs inside bodies.
        let byte = prop_oneof![any::<u8>(), Just(0xFF), Just(b'e'), Just(b'J'), Just(0xFE)];
        proptest::collection::vec(proptest::collection::vec(byte, 0..80), 1..6)
    }

    proptest! {
        #[test]
        fn a_tail_cut_at_any_byte_costs_the_last_entry_alone(bodies in bodies()) {
            let (bytes, placed) = segment(&bodies);
            let (last, whole) = placed.split_last().unwrap();
            for len in last.offset..bytes.len() as u64 {
                let scan = scan(&bytes[..len as usize], 1);
                prop_assert_eq!(&scan.entries[..], whole);
                prop_assert_eq!(scan.tail, (len > last.offset).then_some(last.offset..len));
                prop_assert!(scan.damage.is_empty());
            }
        }

        #[test]
        fn a_flipped_bit_costs_its_entry_alone(bodies in bodies(), bit in any::<proptest::sample::Index>()) {
            let (mut bytes, placed) = segment(&bodies);
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            let hit = placed.iter().find(|p| (p.offset..p.offset + p.header.entry_len()).contains(&(bit as u64 / 8)));
            let scan = scan(&bytes, 1);
            let expected: Vec<Placed> = placed.iter().filter(|p| Some(*p) != hit).copied().collect();
            prop_assert_eq!(scan.entries, expected);
            // In the segment's header nothing is lost and the damage is seen; the last entry's looks like a torn tail.
            prop_assert!(scan.damage.len() + usize::from(scan.tail.is_some()) == 1);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            scan(&bytes, 1);
        }
    }
}
