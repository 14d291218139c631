//! MPNet's relative attention bias, spread from buckets to distances.

use candle_core::Tensor;

use crate::Result;

/// Distances beyond this share the last bucket. Fixed in MPNet's code, not in its config.
const MAX_DISTANCE: f64 = 128.0;
/// Buckets that distances are put in, both directions together; fixed likewise, whatever the table's size.
const NUM_BUCKETS: usize = 32;

/// The bias of each key - query distance, as [`crate::ops::attention::Attention`] takes it.
///
/// Shapes: `table` [num_buckets, num_heads]. Returns [num_heads, 2 * max_seq_len - 1] f32.
/// Source: Song et al. 2020; the bucketing is T5's: Raffel et al. 2019, section 2.1.
pub(super) fn distance_bias(table: &Tensor, max_seq_len: usize) -> Result<Tensor> {
    let longest = max_seq_len as i64 - 1;
    let buckets: Vec<u32> = (-longest..=longest).map(bucket).collect();
    let buckets = Tensor::new(buckets, table.device())?;
    Ok(table.index_select(&buckets, 0)?.t()?.contiguous()?)
}

/// The bucket of a distance: half of the buckets for keys after the query, half for the others; in each
/// half one bucket a distance up to a quarter of all, then wider and wider ones.
fn bucket(key_minus_query: i64) -> u32 {
    let half = NUM_BUCKETS / 2;
    let exact = half / 2;
    let direction = if key_minus_query > 0 { half } else { 0 };
    let distance = key_minus_query.unsigned_abs() as usize;
    let bucket = if distance < exact {
        distance
    } else {
        // In f32 and in this order: rounding decides the bucket of distances at the edge of two.
        let ratio = (distance as f32 / exact as f32).ln() / (MAX_DISTANCE / exact as f64).ln() as f32;
        (exact + (ratio * (half - exact) as f32) as usize).min(half - 1)
    };
    (direction + bucket) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_exact_near_and_logarithmic_far() {
        // Worked by hand: 8 + 8 ln(d / 8) / ln 16, so 16 is 10, 32 is 12 and 64 is 14.
        let cases =
            [(0, 0), (-1, 1), (-7, 7), (-8, 8), (-16, 10), (-32, 12), (-64, 14), (-128, 15), (-500, 15), (1, 17)];
        for (distance, expected) in cases {
            assert_eq!(bucket(distance), expected, "distance {distance}");
            assert_eq!(
                bucket(-distance),
                if distance < 0 {
                    expected + 16
                } else if distance == 0 {
                    0
                } else {
                    1
                }
            );
        }
    }
}
