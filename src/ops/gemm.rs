//! The CPU's matrix product: weights packed once into panels, a register tile over them.
//!
//! ```text
//! weight [out, in]         panels of `width` columns of weightᵀ, each [in, width], the last one padded
//!   w00 w01 w02              w00 w10 | w20  0
//!   w10 w11 w12    ->        w01 w11 | w21  0
//!   w20 w21 w22              w02 w12 | w22  0
//! ```
//!
//! The innermost loop loads one line of a panel and one value of each of six rows, and does 6 x 4 fused
//! multiply-adds (6 x 2 where there are 16 registers). A packed panel is read straight through, so the
//! inputs need no packing. Packing once is what a general product cannot do.
//!
//! Every value of the result is one chain of multiply-adds in the order of `in`, whatever the number of
//! rows and however they are shared out: a row alone and a row in a batch are equal bit by bit.

use pulp::Simd;

use super::simd;

/// Rows of a full register tile. 6 rows of 4 vectors, 4 vectors of weights and one input fill 29 of
/// AVX-512's 32 registers; 6 of 2 fill 15 of AVX2's 16.
pub(super) const TILE_ROWS: usize = 6;

/// Vectors in a panel's line.
pub(super) const fn tile_vectors<S: Simd>() -> usize {
    if S::REGISTER_COUNT >= 32 { 4 } else { 2 }
}

/// A weight matrix in panels, with its bias.
pub(super) struct PackedWeight {
    /// [num_panels, in_features, width] from `start` on.
    panels: Vec<f32>,
    /// The first value on a cache line's boundary: a vector over two lines costs two loads.
    start: usize,
    /// [num_panels, width]; zeros where there is no bias.
    bias: Vec<f32>,
    /// Columns of a panel.
    width: usize,
    in_features: usize,
    out_features: usize,
}

impl PackedWeight {
    /// Shapes: `weight` [out_features, in_features]; `bias` [out_features].
    pub(super) fn new(weight: &[f32], bias: Option<&[f32]>, out_features: usize, in_features: usize) -> Self {
        assert_eq!(weight.len(), out_features * in_features, "the caller checked the shape");
        let width = panel_width();
        let num_panels = out_features.div_ceil(width);
        let len = num_panels * in_features * width;
        let mut panels = vec![0.0; len + 15];
        // Up to 15 values to the next 64 bytes; a platform that cannot tell gets unaligned panels.
        let start = panels.as_ptr().align_offset(64).min(15);
        for (p, panel) in panels[start..start + len].chunks_exact_mut(in_features * width).enumerate() {
            for (c, row) in weight[p * width * in_features..].chunks_exact(in_features).take(width).enumerate() {
                for (k, &w) in row.iter().enumerate() {
                    panel[k * width + c] = w;
                }
            }
        }
        let mut padded = vec![0.0; num_panels * width];
        if let Some(bias) = bias {
            padded[..out_features].copy_from_slice(bias);
        }
        Self { panels, start, bias: padded, width, in_features, out_features }
    }

    pub(super) fn num_panels(&self) -> usize {
        self.out_features.div_ceil(self.width)
    }

    pub(super) fn in_features(&self) -> usize {
        self.in_features
    }

    pub(super) fn out_features(&self) -> usize {
        self.out_features
    }

    /// First column and number of columns of panel `p`.
    pub(super) fn columns(&self, p: usize) -> (usize, usize) {
        (p * self.width, self.width.min(self.out_features - p * self.width))
    }

    fn panel(&self, p: usize) -> &[f32] {
        let len = self.in_features * self.width;
        &self.panels[self.start + p * len..][..len]
    }
}

/// Columns of a panel under [`simd::run`].
fn panel_width() -> usize {
    struct Width;
    impl pulp::WithSimd for Width {
        type Output = usize;
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> usize {
            tile_vectors::<S>() * S::F32_LANES
        }
    }
    simd::run(Width)
}

/// `out = x weightᵀ + bias` over panels `first_panel..first_panel + num_panels`.
///
/// Shapes: `x` [rows, in_features]; `out` [rows, ld], of which the panels' columns are written, the first
/// panel's first column at 0.
#[inline(always)]
pub(super) fn linear<S: Simd>(
    simd: S,
    x: &[f32],
    weight: &PackedWeight,
    panels: std::ops::Range<usize>,
    out: &mut [f32],
    ld: usize,
) {
    let k = weight.in_features;
    let origin = weight.columns(panels.start).0;
    // A panel stays in the second-level cache while all rows pass by it.
    for p in panels {
        let (column, columns) = weight.columns(p);
        let bias = &weight.bias[column..column + weight.width];
        let tile = Tile { x, ldx: k, depth: k, panel: weight.panel(p), out, ld, column: column - origin, columns };
        // `width` is what `panel_width` gave on this very machine, so 4 or 2 vectors are right here.
        if S::REGISTER_COUNT >= 32 {
            tiles::<S, 4>(simd, tile, Some(bias))
        } else {
            tiles::<S, 2>(simd, tile, Some(bias))
        }
    }
}

/// Operands of one panel's column of tiles.
pub(super) struct Tile<'a> {
    /// [rows, ldx], of which the first `depth` columns are multiplied.
    pub x: &'a [f32],
    pub ldx: usize,
    pub depth: usize,
    /// [depth, vectors * lanes]
    pub panel: &'a [f32],
    /// [rows, ld]: `columns` values of each row are written from `column` on.
    pub out: &'a mut [f32],
    pub ld: usize,
    pub column: usize,
    pub columns: usize,
}

/// `out[.., column..] = x panel + bias` for all rows, with VECTORS vectors a panel line.
#[inline(always)]
pub(super) fn tiles<S: Simd, const VECTORS: usize>(simd: S, tile: Tile<'_>, bias: Option<&[f32]>) {
    let Tile { x, ldx, depth, panel, out, ld, column, columns } = tile;
    let rows = out.len() / ld;
    let mut row = 0;
    while row < rows {
        let x = &x[row * ldx..];
        let out = &mut out[row * ld..];
        // The rest is shared out evenly: tiles of 4 and 4 rows hide the latency of a multiply-add,
        // tiles of 6 and 2 do not.
        let left = rows - row;
        let take = if left >= 2 * TILE_ROWS { TILE_ROWS } else { left.div_ceil(left.div_ceil(TILE_ROWS)) };
        let part = Tile { x, ldx, depth, panel, out, ld, column, columns };
        match take {
            1 => one_tile::<S, 1, VECTORS>(simd, part, bias),
            2 => one_tile::<S, 2, VECTORS>(simd, part, bias),
            3 => one_tile::<S, 3, VECTORS>(simd, part, bias),
            4 => one_tile::<S, 4, VECTORS>(simd, part, bias),
            5 => one_tile::<S, 5, VECTORS>(simd, part, bias),
            _ => one_tile::<S, TILE_ROWS, VECTORS>(simd, part, bias),
        }
        row += take;
    }
}

#[inline(always)]
fn one_tile<S: Simd, const ROWS: usize, const VECTORS: usize>(simd: S, tile: Tile<'_>, bias: Option<&[f32]>) {
    let Tile { x, ldx, depth, panel, out, ld, column, columns } = tile;
    let lanes = S::F32_LANES;
    let mut acc = [[simd.splat_f32s(0.0); VECTORS]; ROWS];
    if let Some(bias) = bias {
        let bias = S::as_simd_f32s(bias).0;
        for row in &mut acc {
            row.copy_from_slice(&bias[..VECTORS]);
        }
    }

    let lines = S::as_simd_f32s(panel).0;
    assert!(lines.len() >= depth * VECTORS, "a panel holds `depth` lines");
    assert!(x.len() >= (ROWS - 1) * ldx + depth, "x holds `ROWS` rows");
    for k in 0..depth {
        let mut line = [simd.splat_f32s(0.0); VECTORS];
        for (v, w) in line.iter_mut().enumerate() {
            // SAFETY: k < depth and v < VECTORS, so the index is below depth * VECTORS, which the
            // first assertion holds against the length.
            *w = unsafe { *lines.get_unchecked(k * VECTORS + v) };
        }
        for (r, acc) in acc.iter_mut().enumerate() {
            // SAFETY: r < ROWS and k < depth, so the index is at most (ROWS - 1) * ldx + depth - 1, which
            // the second assertion holds against the length.
            let value = simd.splat_f32s(unsafe { *x.get_unchecked(r * ldx + k) });
            for (acc, w) in acc.iter_mut().zip(line) {
                *acc = simd.mul_add_e_f32s(value, w, *acc);
            }
        }
    }

    for (r, acc) in acc.iter_mut().enumerate() {
        let out = &mut out[r * ld + column..][..columns];
        if columns == VECTORS * lanes {
            S::as_mut_simd_f32s(out).0.copy_from_slice(acc);
        } else {
            for (out, acc) in out.chunks_mut(lanes).zip(acc) {
                out.copy_from_slice(&simd::as_lanes::<S>(acc)[..out.len()]);
            }
        }
    }
}
