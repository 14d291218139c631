//! Device memory for what is timed: noise, never zeros, which compute cooler and so faster than anything real.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use eremois::Result;
use eremois::ops::cuda::{HalfType, Span};
use half::{bf16, f16};

use crate::synthetic;

/// Values of noise before they repeat: odd, so that no two rows begin alike.
const PERIOD: usize = (1 << 20) + 7;
const MAX_SETS: usize = 16;

/// How many sets of operands to take turns with, one of them taking `num_bytes`, all of them `rotated_bytes`.
pub fn num_sets(num_bytes: usize, rotated_bytes: usize) -> usize {
    rotated_bytes.div_ceil(num_bytes.max(1)).clamp(2, MAX_SETS)
}

/// Owns what its spans point to.
pub struct Operands {
    stream: Arc<CudaStream>,
    slices: Vec<CudaSlice<u8>>,
    /// One period of noise in [-1, 1) in the 2-byte type.
    noise: Vec<u16>,
}

impl Operands {
    pub fn new(stream: &Arc<CudaStream>, dtype: HalfType) -> Self {
        let values = synthetic::values(77, PERIOD, 1.0);
        let noise = match dtype {
            HalfType::F16 => values.into_iter().map(|x| f16::from_f32(x).to_bits()).collect(),
            HalfType::Bf16 => values.into_iter().map(|x| bf16::from_f32(x).to_bits()).collect(),
        };
        Self { stream: stream.clone(), slices: Vec::new(), noise }
    }

    fn keep(&mut self, slice: CudaSlice<u8>) -> Span {
        let span = Span { ptr: slice.device_ptr(&self.stream).0, num_bytes: slice.num_bytes() };
        self.slices.push(slice);
        span
    }

    /// `len` values of noise in the 2-byte type. Results lie in such memory too.
    pub fn halves(&mut self, len: usize) -> Result<Span> {
        let bytes: Vec<u8> = self.noise.iter().cycle().take(len).flat_map(|bits| bits.to_le_bytes()).collect();
        let slice = self.stream.clone_htod(&bytes)?;
        Ok(self.keep(slice))
    }

    /// `len` values around 1.
    pub fn floats(&mut self, len: usize) -> Result<Span> {
        let values = synthetic::values(78, len, 0.1);
        let slice =
            self.stream.clone_htod(&values.iter().flat_map(|x| (x + 1.0).to_le_bytes()).collect::<Vec<u8>>())?;
        Ok(self.keep(slice))
    }

    pub fn words(&mut self, words: &[u32]) -> Result<Span> {
        let slice = self.stream.clone_htod(&words.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())?;
        Ok(self.keep(slice))
    }
}
