//! Buckets of batch sizes, and where each part of a batch lies in its upload. Needs no device.

use super::{Header, Span};
use crate::ops::pool::RowSpec;
use crate::{Error, Result};

/// Fewest tokens a bucket has room for.
pub const MIN_TOKENS: usize = 16;
/// Up to here a bucket is a power of two or half way to the next one; above, an octave has eight buckets, because the
/// products compute the bucket's rows and a half-empty one would cost more than the tuning of a few more.
const COARSE_TOKENS: usize = 1024;

/// The capacity of the bucket that `num_tokens` tokens belong to: the smallest that holds them.
///
/// Below 1024 at most a third of a bucket is empty, above at most a ninth. All are multiples of 8.
pub fn token_bucket(num_tokens: usize) -> usize {
    if num_tokens <= MIN_TOKENS {
        return MIN_TOKENS;
    }
    let upper = num_tokens.next_power_of_two();
    let lower = upper / 2;
    let step = if lower < COARSE_TOKENS { lower / 2 } else { lower / 8 };
    num_tokens.next_multiple_of(step)
}

/// The capacity in sequences: a power of two.
pub fn seq_bucket(num_seqs: usize) -> usize {
    num_seqs.next_power_of_two()
}

/// All token buckets up to the one that holds `max_tokens`, smallest first.
pub fn token_buckets(max_tokens: usize) -> Vec<usize> {
    let last = token_bucket(max_tokens);
    let mut buckets = vec![MIN_TOKENS];
    while let Some(&bucket) = buckets.last()
        && bucket < last
    {
        buckets.push(token_bucket(bucket + 1));
    }
    buckets
}

/// A batch on the host, as its owner checked it: bounds rise from 0 to the number of tokens.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// [total_tokens]
    pub input_ids: &'a [u32],
    /// [total_tokens]; `None` for all 0.
    pub token_type_ids: Option<&'a [u32]>,
    /// [num_seqs + 1]
    pub cu_seqlens: &'a [u32],
    /// [num_seqs]
    pub rows: &'a [RowSpec],
}

impl Batch<'_> {
    pub fn total_tokens(&self) -> usize {
        self.input_ids.len()
    }

    pub fn num_seqs(&self) -> usize {
        self.rows.len()
    }

    /// Length in tokens of the longest sequence; 0 for an empty batch.
    pub fn max_seqlen(&self) -> usize {
        self.cu_seqlens.windows(2).map(|w| w[1].saturating_sub(w[0]) as usize).max().unwrap_or(0)
    }

    /// Refuses what the kernels would take at its word: bounds and types that do not fit the tokens.
    pub fn check(&self) -> Result<()> {
        let shape = |operand, expected: String, got: usize| {
            Err(Error::Shape { op: "batch", operand, expected, got: got.to_string() })
        };
        let (total, num_seqs) = (self.total_tokens(), self.num_seqs());
        if num_seqs == 0 {
            return shape("rows", "at least one sequence".to_string(), 0);
        }
        if self.cu_seqlens.len() != num_seqs + 1 {
            return shape("cu_seqlens", format!("{} bounds", num_seqs + 1), self.cu_seqlens.len());
        }
        if self.cu_seqlens[0] != 0 || self.cu_seqlens.windows(2).any(|w| w[0] >= w[1]) {
            return shape("cu_seqlens", "rising bounds from 0".to_string(), self.cu_seqlens[0] as usize);
        }
        if self.cu_seqlens[num_seqs] as usize != total {
            return shape("cu_seqlens", format!("last bound {total}"), self.cu_seqlens[num_seqs] as usize);
        }
        match self.token_type_ids {
            Some(types) if types.len() != total => shape("token_type_ids", total.to_string(), types.len()),
            _ => Ok(()),
        }
    }
}

/// Where the parts of a batch lie in its upload, in u32 words. Fixed by the bucket, so that a captured graph's
/// pointers stay true.
///
/// ```text
/// header [8] | input_ids [tokens] | cu_seqlens [seqs + 1] | rows [seqs][2] | token_type_ids [tokens] if present
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    pub token_capacity: usize,
    pub seq_capacity: usize,
    cu_seqlens: usize,
    rows: usize,
    token_type_ids: usize,
}

/// The parts of an upload on the device.
#[derive(Debug, Clone, Copy)]
pub struct BatchSpans {
    pub header: Span,
    pub input_ids: Span,
    /// Null for a batch without.
    pub token_type_ids: Span,
    pub cu_seqlens: Span,
    pub rows: Span,
}

impl Layout {
    /// Of the bucket with these capacities. Each part begins on 16 bytes, as the launchers want it.
    pub fn new(token_capacity: usize, seq_capacity: usize) -> Self {
        let tokens = token_capacity.next_multiple_of(4);
        let cu_seqlens = Header::NUM_WORDS + tokens;
        let rows = cu_seqlens + (seq_capacity + 1).next_multiple_of(4);
        let token_type_ids = rows + (2 * seq_capacity).next_multiple_of(4);
        Self { token_capacity, seq_capacity, cu_seqlens, rows, token_type_ids }
    }

    /// Of the bucket that a batch belongs to.
    pub fn of(batch: &Batch) -> Self {
        Self::new(token_bucket(batch.total_tokens()), seq_bucket(batch.num_seqs()))
    }

    /// Words of the whole upload.
    pub fn num_words(&self, has_token_types: bool) -> usize {
        self.token_type_ids + if has_token_types { self.token_capacity.next_multiple_of(4) } else { 0 }
    }

    /// Writes a checked batch. What lies between the parts' ends and their capacities is left as it was: no kernel
    /// reads it. The memory may be write-combined: it is written once, in order, and not read.
    ///
    /// Errors: [`Error::Shape`] for a batch that is larger than the bucket, or `words` too short for it.
    pub fn write(&self, batch: &Batch, words: &mut [u32]) -> Result<()> {
        let num_words = self.num_words(batch.token_type_ids.is_some());
        let (total, num_seqs) = (batch.total_tokens(), batch.num_seqs());
        if total > self.token_capacity || num_seqs > self.seq_capacity || words.len() < num_words {
            return Err(Error::Shape {
                op: "batch",
                operand: "layout",
                expected: format!("{} tokens, {} sequences", self.token_capacity, self.seq_capacity),
                got: format!("{total}, {num_seqs} in {} words", words.len()),
            });
        }
        let flags = if batch.token_type_ids.is_some() { Header::HAS_TOKEN_TYPES } else { 0 };
        let header = [total as u32, num_seqs as u32, batch.max_seqlen() as u32, flags, 0, 0, 0, 0];
        words[..Header::NUM_WORDS].copy_from_slice(&header);
        words[Header::NUM_WORDS..][..total].copy_from_slice(batch.input_ids);
        words[self.cu_seqlens..][..num_seqs + 1].copy_from_slice(batch.cu_seqlens);
        for (row, words) in batch.rows.iter().zip(words[self.rows..].chunks_exact_mut(2)) {
            words[0] = row.dimensions as u32;
            words[1] = u32::from(row.normalize);
        }
        if let Some(types) = batch.token_type_ids {
            words[self.token_type_ids..][..total].copy_from_slice(types);
        }
        Ok(())
    }

    /// The parts of an upload that lies at `base`.
    ///
    /// Errors: [`Error::Shape`] if it does not reach there.
    pub fn spans(&self, base: Span, has_token_types: bool) -> Result<BatchSpans> {
        let part = |offset: usize, num_words: usize| base.part(offset * WORD, num_words * WORD);
        Ok(BatchSpans {
            header: part(0, Header::NUM_WORDS)?,
            input_ids: part(Header::NUM_WORDS, self.token_capacity)?,
            token_type_ids: match has_token_types {
                true => part(self.token_type_ids, self.token_capacity)?,
                false => Span::NULL,
            },
            cu_seqlens: part(self.cu_seqlens, self.seq_capacity + 1)?,
            rows: part(self.rows, 2 * self.seq_capacity)?,
        })
    }
}

/// Bytes of a u32.
pub const WORD: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_their_tokens_and_waste_little() {
        for num_tokens in 1..20_000 {
            let bucket = token_bucket(num_tokens);
            assert!(bucket >= num_tokens && bucket.is_multiple_of(8), "{num_tokens}: {bucket}");
            assert_eq!(token_bucket(bucket), bucket, "a bucket's capacity lies in it");
            if num_tokens > 1024 {
                assert!((bucket - num_tokens) * 9 <= bucket, "{num_tokens}: {bucket}");
            } else if num_tokens > MIN_TOKENS {
                assert!((bucket - num_tokens) * 3 <= bucket, "{num_tokens}: {bucket}");
            }
        }
        assert_eq!(token_buckets(100), [16, 24, 32, 48, 64, 96, 128]);
        assert_eq!(token_buckets(1200), [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1152, 1280]);
    }

    #[test]
    fn a_batch_lies_where_the_spans_say() {
        let rows = [RowSpec { normalize: true, dimensions: 7 }, RowSpec { normalize: false, dimensions: 9 }];
        let (ids, types) = ([5, 6, 7], [0, 1, 0]);
        let batch = Batch { input_ids: &ids, token_type_ids: Some(&types), cu_seqlens: &[0, 1, 3], rows: &rows };
        batch.check().unwrap();
        let layout = Layout::of(&batch);
        assert_eq!((layout.token_capacity, layout.seq_capacity), (16, 2));
        let mut words = vec![u32::MAX; layout.num_words(true)];
        layout.write(&batch, &mut words).unwrap();

        let base = Span { ptr: 4096, num_bytes: words.len() * WORD };
        let spans = layout.spans(base, true).unwrap();
        let at = |span: Span, len: usize| {
            assert!(span.ptr.is_multiple_of(16));
            let first = (span.ptr as usize - 4096) / WORD;
            words[first..first + len].to_vec()
        };
        assert_eq!(at(spans.header, 8), [3, 2, 2, 1, 0, 0, 0, 0]);
        assert_eq!(at(spans.input_ids, 4), [5, 6, 7, u32::MAX]);
        assert_eq!(at(spans.cu_seqlens, 3), [0, 1, 3]);
        assert_eq!(at(spans.rows, 4), [7, 1, 9, 0]);
        assert_eq!(at(spans.token_type_ids, 3), [0, 1, 0]);
        assert!(layout.spans(base, false).unwrap().token_type_ids.is_null());
        // Without types the upload ends before them, and has no room for them.
        assert!(layout.write(&batch, &mut words[..layout.num_words(false)]).is_err());
    }

    #[test]
    fn broken_batches_are_refused() {
        let row = [RowSpec { normalize: true, dimensions: 1 }];
        let batch = |ids: &'static [u32], cu_seqlens: &'static [u32]| {
            Batch { input_ids: ids, token_type_ids: None, cu_seqlens, rows: &row }.check()
        };
        assert!(batch(&[1, 2], &[0, 2]).is_ok());
        for (ids, bounds) in [(&[1, 2][..], &[0, 1][..]), (&[1], &[0]), (&[1], &[1, 1]), (&[], &[0, 0])] {
            assert!(batch(ids, bounds).is_err(), "{ids:?} {bounds:?}");
        }
        let types = Batch { input_ids: &[1], token_type_ids: Some(&[]), cu_seqlens: &[0, 1], rows: &row };
        assert!(types.check().is_err());
    }
}
