//! Sections of entries as a stream of bytes, and back. It knows neither files nor what the entries are.

use std::io::{self, Read, Write};

use super::{Digest, Footer, Header, Totals};

const MAGIC: [u8; 8] = *b"eremoisB";
/// The form that [`super`] describes. A higher one is refused.
const VERSION: u32 = 1;

const SECTION: u8 = 1;
const ENTRY: u8 = 2;
const SECTION_END: u8 = 3;
const FOOTER: u8 = 4;

/// Longest header and footer: a length that lies allocates no more.
const MAX_JSON_BYTES: u32 = 1 << 20;
/// Longest entry: 64 GiB, more than any memory that wrote it.
const MAX_ENTRY_BYTES: u64 = 1 << 36;

fn invalid(reason: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.to_string())
}

fn json(value: &impl serde::Serialize) -> io::Result<(Vec<u8>, u32)> {
    let bytes = serde_json::to_vec(value)?;
    let len = u32::try_from(bytes.len()).ok().filter(|len| *len <= MAX_JSON_BYTES);
    let len = len.ok_or_else(|| invalid("a header or footer of more than a MiB"))?;
    Ok((bytes, len))
}

/// Passes bytes on and hashes them.
struct Hashed<T> {
    inner: T,
    hasher: blake3::Hasher,
}

impl<W: Write> Hashed<W> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.inner.write_all(bytes)?;
        self.hasher.update(bytes);
        Ok(())
    }
}

impl<R: Read> Hashed<R> {
    fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.inner.read_exact(&mut bytes)?;
        self.hasher.update(&bytes);
        Ok(bytes)
    }

    fn bytes(&mut self, len: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        // Grows with what is there, not with what a length says.
        if (&mut self.inner).take(len).read_to_end(&mut bytes)? as u64 != len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.hasher.update(&bytes);
        Ok(bytes)
    }
}

/// Writes a stream: sections one after another, each of entries, then the end.
pub struct StreamWriter<W> {
    out: Hashed<W>,
    num_sections: u32,
    /// Of the section that was begun.
    totals: Totals,
}

impl<W: Write> StreamWriter<W> {
    /// Errors here and below: the writer's.
    pub fn new(inner: W, header: &Header) -> io::Result<Self> {
        let mut out = Hashed { inner, hasher: blake3::Hasher::new() };
        let (header, len) = json(header)?;
        out.put(&MAGIC)?;
        out.put(&VERSION.to_le_bytes())?;
        out.put(&len.to_le_bytes())?;
        out.put(&header)?;
        Ok(Self { out, num_sections: 0, totals: Totals::default() })
    }

    /// Begins a section. `kind` is a short word.
    pub fn begin(&mut self, kind: &str) -> io::Result<()> {
        let len = u8::try_from(kind.len()).map_err(|_| invalid("a kind of more than 255 bytes"))?;
        self.num_sections += 1;
        self.totals = Totals::default();
        self.out.put(&[SECTION, len])?;
        self.out.put(kind.as_bytes())
    }

    /// Adds an entry to it.
    pub fn entry(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.totals.add(bytes);
        self.out.put(&[ENTRY])?;
        self.out.put(&(bytes.len() as u64).to_le_bytes())?;
        self.out.put(bytes)
    }

    /// Ends it, and says what was in it.
    pub fn end(&mut self) -> io::Result<Totals> {
        let totals = std::mem::take(&mut self.totals);
        self.out.put(&[SECTION_END])?;
        self.out.put(&totals.num_entries.to_le_bytes())?;
        self.out.put(&totals.num_bytes.to_le_bytes())?;
        self.out.put(&totals.digest().0)?;
        Ok(totals)
    }

    /// Ends the stream.
    pub fn finish(mut self, footer: &Footer) -> io::Result<W> {
        let (footer, len) = json(footer)?;
        self.out.put(&[FOOTER])?;
        self.out.put(&self.num_sections.to_le_bytes())?;
        self.out.put(&len.to_le_bytes())?;
        self.out.put(&footer)?;
        let digest = *self.out.hasher.finalize().as_bytes();
        self.out.inner.write_all(&digest)?;
        Ok(self.out.inner)
    }
}

/// What comes next in a stream.
#[derive(Debug)]
pub enum Part {
    /// Entries of this kind follow.
    Section(String),
    Entry(Vec<u8>),
    /// Number, bytes and checksum of the section's entries were right; this is the checksum.
    SectionEnd(Digest),
    /// The checksum of the whole was right, and nothing follows.
    End(Footer, Digest),
}

/// Reads a stream and checks all its sums on the way.
pub struct StreamReader<R> {
    input: Hashed<R>,
    pub header: Header,
    num_sections: u32,
    /// Of the section that is being read.
    totals: Option<Totals>,
}

impl<R: Read> StreamReader<R> {
    /// Errors here and below: the reader's, and `InvalidData` and `UnexpectedEof` saying what is wrong with the bytes.
    pub fn new(inner: R) -> io::Result<Self> {
        let mut input = Hashed { inner, hasher: blake3::Hasher::new() };
        if input.array()? != MAGIC {
            return Err(invalid("it is no backup of eremois"));
        }
        let version = u32::from_le_bytes(input.array()?);
        if version != VERSION {
            return Err(invalid(format!("it has format {version}, this program reads {VERSION}: use the newer one")));
        }
        let len = json_len(input.array()?)?;
        let header = serde_json::from_slice(&input.bytes(len)?).map_err(|e| invalid(format!("its header: {e}")))?;
        Ok(Self { input, header, num_sections: 0, totals: None })
    }

    /// The next part. After [`Part::End`] there is none.
    pub fn next_part(&mut self) -> io::Result<Part> {
        let [tag] = self.input.array()?;
        match (tag, &mut self.totals) {
            (SECTION, None) => {
                let [len] = self.input.array()?;
                let kind = self.input.bytes(u64::from(len))?;
                let kind = String::from_utf8(kind).map_err(|_| invalid("the kind of a section is no text"))?;
                self.num_sections += 1;
                self.totals = Some(Totals::default());
                Ok(Part::Section(kind))
            }
            (ENTRY, Some(totals)) => {
                let len = u64::from_le_bytes(self.input.array()?);
                if len > MAX_ENTRY_BYTES {
                    return Err(invalid(format!("an entry of {len} bytes")));
                }
                let bytes = self.input.bytes(len)?;
                totals.add(&bytes);
                Ok(Part::Entry(bytes))
            }
            (SECTION_END, Some(_)) => self.section_end(),
            (FOOTER, None) => {
                let num_sections = u32::from_le_bytes(self.input.array()?);
                let len = json_len(self.input.array()?)?;
                let footer = self.input.bytes(len)?;
                let digest = Digest(*self.input.hasher.finalize().as_bytes());
                if self.input.array()? != digest.0 || num_sections != self.num_sections {
                    return Err(invalid("its checksum is wrong"));
                }
                let footer = serde_json::from_slice(&footer).map_err(|e| invalid(format!("its footer: {e}")))?;
                // Whatever wraps the stream looks at its own end now.
                match self.input.inner.read(&mut [0])? {
                    0 => Ok(Part::End(footer, digest)),
                    _ => Err(invalid("something follows its end")),
                }
            }
            _ => Err(invalid(format!("a part of kind {tag} where none belongs"))),
        }
    }

    fn section_end(&mut self) -> io::Result<Part> {
        let num_entries = u64::from_le_bytes(self.input.array()?);
        let num_bytes = u64::from_le_bytes(self.input.array()?);
        let digest: [u8; 32] = self.input.array()?;
        let totals = self.totals.take().unwrap_or_default();
        let is_right = totals.num_entries == num_entries && totals.num_bytes == num_bytes;
        match is_right && totals.digest().0 == digest {
            true => Ok(Part::SectionEnd(totals.digest())),
            false => Err(invalid("the checksum of a section is wrong")),
        }
    }
}

fn json_len(bytes: [u8; 4]) -> io::Result<u64> {
    match u32::from_le_bytes(bytes) {
        len @ ..=MAX_JSON_BYTES => Ok(u64::from(len)),
        len => Err(invalid(format!("a header or footer of {len} bytes"))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Consistency;
    use super::*;

    fn header() -> Header {
        Header { program: "0.1.0".into(), created_at: jiff::Timestamp::UNIX_EPOCH, store: "embedded".into(), schema: 1 }
    }

    fn footer() -> Footer {
        Footer { consistency: Consistency::Snapshot, num_from_journal: 0, num_damaged: 0 }
    }

    fn stream(sections: &[(&str, &[&[u8]])]) -> Vec<u8> {
        let mut writer = StreamWriter::new(Vec::new(), &header()).unwrap();
        for (kind, entries) in sections {
            writer.begin(kind).unwrap();
            entries.iter().for_each(|entry| writer.entry(entry).unwrap());
            writer.end().unwrap();
        }
        writer.finish(&footer()).unwrap()
    }

    /// Kinds and entries, if all sums are right.
    fn read(bytes: &[u8]) -> io::Result<Vec<(String, Vec<Vec<u8>>)>> {
        let mut reader = StreamReader::new(bytes)?;
        let mut sections: Vec<(String, Vec<Vec<u8>>)> = Vec::new();
        loop {
            match reader.next_part()? {
                Part::Section(kind) => sections.push((kind, Vec::new())),
                Part::Entry(bytes) => sections.last_mut().expect("entries come in sections").1.push(bytes),
                Part::SectionEnd(_) => {}
                Part::End(found, _) => {
                    assert_eq!(found, footer());
                    return Ok(sections);
                }
            }
        }
    }

    #[test]
    fn sections_come_back_as_they_were_written() {
        let bytes = stream(&[("a", &[b"one", b"", b"three"]), ("none", &[]), ("b", &[&[7; 70_000]])]);
        let sections = read(&bytes).unwrap();
        let expected = [
            ("a".to_string(), vec![b"one".to_vec(), Vec::new(), b"three".to_vec()]),
            ("none".to_string(), Vec::new()),
            ("b".to_string(), vec![vec![7; 70_000]]),
        ];
        assert_eq!(sections, expected);
        assert_eq!(StreamReader::new(&bytes[..]).unwrap().header, header());
        assert_eq!(read(&stream(&[])).unwrap(), []);
    }

    #[test]
    fn no_flip_no_cut_and_no_addition_passes() {
        let whole = stream(&[("a", &[b"one", b"two"]), ("b", &[])]);
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut flipped = whole.clone();
                flipped[at] ^= 1 << bit;
                assert!(read(&flipped).is_err(), "byte {at}, bit {bit}");
            }
            assert!(read(&whole[..at]).is_err(), "{at}");
        }
        assert!(read(&[&whole[..], &[0]].concat()).is_err());
    }

    #[test]
    fn a_newer_format_is_named() {
        let mut newer = stream(&[]);
        newer[8] = 2;
        let refused = read(&newer).unwrap_err().to_string();
        assert!(refused.contains("format 2") && refused.contains("reads 1"), "{refused}");
        assert!(read(b"something else entirely").unwrap_err().to_string().contains("no backup"));
    }

    #[test]
    fn the_checksum_of_a_section_depends_on_its_entries_alone() {
        let digest = |entries: &[&[u8]]| {
            let mut totals = Totals::default();
            entries.iter().for_each(|entry| totals.add(entry));
            totals.digest()
        };
        assert_eq!(digest(&[b"a", b"b"]), digest(&[b"a", b"b"]));
        for other in [&[&b"b"[..], b"a"][..], &[b"ab"], &[b"a"], &[b"a", b"b", b""]] {
            assert_ne!(digest(other), digest(&[b"a", b"b"]));
        }
    }
}
