//! The seal: a checksum behind the compressed bytes, in a frame that every zstd passes over. It covers what a decoder does
//! not look at (reserved bits, the frame's own sizes), so that no changed byte goes unseen.

use std::io::{self, Read, Write};

/// The first of the numbers that begin a skippable frame. Source: RFC 8878, section 3.1.2.
const SKIPPABLE: u32 = 0x184D_2A50;
const HASH_LEN: usize = 32;
/// Bytes of a seal.
pub const SEAL_LEN: usize = 8 + HASH_LEN;

/// Bytes read at a time.
const BUFFER: usize = 64 << 10;

fn seal(hasher: &blake3::Hasher) -> [u8; SEAL_LEN] {
    let mut bytes = [0; SEAL_LEN];
    bytes[..4].copy_from_slice(&SKIPPABLE.to_le_bytes());
    bytes[4..8].copy_from_slice(&(HASH_LEN as u32).to_le_bytes());
    bytes[8..].copy_from_slice(hasher.finalize().as_bytes());
    bytes
}

/// Passes bytes on and hashes them.
pub struct Sealing<W> {
    inner: W,
    hasher: blake3::Hasher,
}

impl<W: Write> Sealing<W> {
    pub fn new(inner: W) -> Self {
        Self { inner, hasher: blake3::Hasher::new() }
    }

    /// Writes the seal. Errors: the writer's.
    pub fn finish(mut self) -> io::Result<W> {
        self.inner.write_all(&seal(&self.hasher))?;
        Ok(self.inner)
    }
}

impl<W: Write> Write for Sealing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..len]);
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Hands out what lies before the seal; its last read fails where the seal is not that of those bytes.
pub struct Sealed<R> {
    inner: R,
    hasher: blake3::Hasher,
    /// Read and not yet handed out; at least a seal's bytes stay in it until the end.
    held: Vec<u8>,
    /// What of `held` was handed out.
    given: usize,
}

impl<R: Read> Sealed<R> {
    pub fn new(inner: R) -> Self {
        Self { inner, hasher: blake3::Hasher::new(), held: Vec::with_capacity(BUFFER + SEAL_LEN), given: 0 }
    }

    /// Reads until there is something to hand out. `false` at the end.
    fn fill(&mut self) -> io::Result<bool> {
        while self.held.len() - self.given <= SEAL_LEN {
            self.held.drain(..self.given);
            self.given = 0;
            let before = self.held.len();
            self.held.resize(before + BUFFER, 0);
            let len = loop {
                match self.inner.read(&mut self.held[before..]) {
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    done => break done,
                }
            };
            self.held.truncate(before + *len.as_ref().unwrap_or(&0));
            if len? == 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl<R: Read> Read for Sealed<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if out.is_empty() {
            return Ok(0);
        }
        if !self.fill()? {
            return match self.held == seal(&self.hasher) {
                true => Ok(0),
                false => Err(io::Error::new(io::ErrorKind::InvalidData, "it is cut off, or its bytes were changed")),
            };
        }
        let len = out.len().min(self.held.len() - self.given - SEAL_LEN);
        let bytes = &self.held[self.given..self.given + len];
        out[..len].copy_from_slice(bytes);
        self.hasher.update(bytes);
        self.given += len;
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sealed(bytes: &[u8]) -> Vec<u8> {
        let mut writer = Sealing::new(Vec::new());
        writer.write_all(bytes).unwrap();
        writer.finish().unwrap()
    }

    /// Gives out at most so many bytes a read.
    struct Slow<'a>(&'a [u8], usize);

    impl Read for Slow<'_> {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            let len = out.len().min(self.1);
            self.0.read(&mut out[..len])
        }
    }

    fn opened(bytes: &[u8], a_read: usize) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        Sealed::new(Slow(bytes, a_read)).read_to_end(&mut out).map(|_| out)
    }

    proptest! {
        #[test]
        fn what_was_sealed_comes_back_however_it_is_read(len in 0usize..300, a_read in 1usize..100) {
            let bytes: Vec<u8> = (0..len).map(|i| i as u8).collect();
            prop_assert_eq!(opened(&sealed(&bytes), a_read).unwrap(), bytes);
        }
    }

    #[test]
    fn large_content_passes_through_the_buffer() {
        let bytes: Vec<u8> = (0..3 * BUFFER + 17).map(|i| (i * 7) as u8).collect();
        assert_eq!(opened(&sealed(&bytes), usize::MAX).unwrap(), bytes);
    }

    #[test]
    fn no_flip_no_cut_and_no_addition_passes() {
        let whole = sealed(b"some bytes");
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            assert!(opened(&flipped, 7).is_err(), "{at}");
            assert!(opened(&whole[..at], 7).is_err(), "{at}");
        }
        assert!(opened(&[&whole[..], &[0]].concat(), 7).is_err());
    }
}
