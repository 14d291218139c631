//! A device with the kernels, memory for operands, and comparisons that name what differs.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use eremois::ops::CuSeqlens;
use eremois::ops::cuda::attention::AttentionKernels;
use eremois::ops::cuda::kernels::Kernels;
use eremois::ops::cuda::{Gpu, HalfType, Span};
use half::{bf16, f16};

use super::synthetic;

pub const TYPES: [HalfType; 2] = [HalfType::F16, HalfType::Bf16];
/// Rows that a bucket has beyond its batch.
pub const SPARE: usize = 5;
/// NaN in both types, and as two of them in f32: what is not written shows.
pub const POISON: u16 = 0xffff;

/// The device of these tests; `None` after saying so where there is none and none is asked for.
pub fn gpu() -> Option<Gpu> {
    match Gpu::open(0) {
        Ok(gpu) => Some(gpu),
        Err(error) if std::env::var_os("EREMOIS_TEST_GPU").is_some() => {
            panic!("no CUDA device, and EREMOIS_TEST_GPU asks for one: {error}")
        }
        Err(error) => {
            println!("no CUDA device: {error}");
            None
        }
    }
}

/// Whether only sizes are wanted that an emulated device computes in seconds.
pub fn is_small() -> bool {
    std::env::var("EREMOIS_TEST_GPU_SIZES").is_ok_and(|sizes| sizes == "small")
}

/// The first `num_small` of the cases on an emulated device, else all.
pub fn cases<T>(all: &[T], num_small: usize) -> &[T] {
    if is_small() { &all[..num_small.min(all.len())] } else { all }
}

/// Operands of launches, which live as long as it does.
pub struct Desk {
    pub kernels: Kernels,
    pub attention: AttentionKernels,
    pub stream: Arc<CudaStream>,
    slices: Vec<CudaSlice<u8>>,
}

impl Desk {
    /// `None` without a device.
    pub fn new() -> Option<Self> {
        let gpu = gpu()?;
        let kernels = Kernels::load(gpu.context()).unwrap();
        let attention = AttentionKernels::load(gpu.context()).unwrap();
        Some(Self { kernels, attention, stream: gpu.new_stream().unwrap(), slices: Vec::new() })
    }

    fn upload(&mut self, bytes: &[u8]) -> Span {
        let slice = self.stream.clone_htod(bytes).unwrap();
        let span = Span { ptr: slice.device_ptr(&self.stream).0, num_bytes: bytes.len() };
        self.slices.push(slice);
        span
    }

    /// Values in the 2-byte type, and `spare` poisoned ones behind them.
    pub fn halves(&mut self, dtype: HalfType, values: &[f32], spare: usize) -> Span {
        let poison = std::iter::repeat_n(POISON, spare);
        let bits = values.iter().map(|&x| to_bits(dtype, x)).chain(poison);
        self.upload(&bits.flat_map(u16::to_le_bytes).collect::<Vec<u8>>())
    }

    /// `len` poisoned 2-byte values.
    pub fn poisoned(&mut self, len: usize) -> Span {
        self.halves(HalfType::F16, &[], len)
    }

    pub fn floats(&mut self, values: &[f32]) -> Span {
        self.upload(&values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())
    }

    pub fn words(&mut self, words: &[u32]) -> Span {
        self.upload(&words.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())
    }

    /// A batch's header; the longest sequence is of no use to the kernels.
    pub fn header(&mut self, total_tokens: usize, num_seqs: usize, flags: u32) -> Span {
        self.words(&[total_tokens as u32, num_seqs as u32, 0, flags, 0, 0, 0, 0])
    }

    /// The memory at a span that one of the uploads returned, after all that was launched.
    fn bytes(&self, span: Span) -> Vec<u8> {
        let at = |slice: &&CudaSlice<u8>| slice.device_ptr(&self.stream).0 == span.ptr;
        let slice = self.slices.iter().find(at).expect("a span of this desk");
        let bytes = self.stream.clone_dtoh(slice).unwrap();
        self.stream.synchronize().unwrap();
        bytes
    }

    pub fn read_bits(&self, span: Span) -> Vec<u16> {
        self.bytes(span).chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect()
    }

    pub fn read_words(&self, span: Span) -> Vec<u32> {
        self.bytes(span).chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }

    /// The values at a span are `exact` to one rounding and `tolerance` of max(1, |exact|), and those behind them are
    /// still poison.
    #[track_caller]
    pub fn assert_halves(&self, dtype: HalfType, span: Span, exact: &[f64], tolerance: f64, what: &str) {
        let bits = self.read_bits(span);
        for (i, (&bits, &e)) in bits.iter().zip(exact).enumerate() {
            let got = f64::from(from_bits(dtype, bits));
            let near = (got - e).abs() <= rounding(dtype) * e.abs() + tolerance * e.abs().max(1.0);
            assert!(near, "{what} {}: value {i} of {}: got {got}, expected {e}", dtype.name(), exact.len());
        }
        let beyond = bits[exact.len()..].iter().position(|&b| b != POISON);
        assert_eq!(beyond, None, "{what} {}: wrote beyond the batch", dtype.name());
    }

    /// As [`Desk::assert_halves`] for f32.
    #[track_caller]
    pub fn assert_floats(&self, span: Span, exact: &[f64], tolerance: f64, what: &str) {
        let words = self.read_words(span);
        for (i, (&word, &e)) in words.iter().zip(exact).enumerate() {
            let got = f64::from(f32::from_bits(word));
            assert!((got - e).abs() <= tolerance * e.abs().max(1.0), "{what}: value {i}: got {got}, expected {e}");
        }
        assert!(words[exact.len()..].iter().all(|&w| w == u32::MAX), "{what}: wrote beyond the batch");
    }
}

/// A CPU twin's values are `exact` as far as f32 goes: what the device is compared with is what the CPU serves.
#[track_caller]
pub fn assert_twin(twin: &Tensor, exact: &[f64], what: &str) {
    let twin = twin.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(twin.len(), exact.len(), "{what}");
    for (i, (&got, &e)) in twin.iter().zip(exact).enumerate() {
        let near = (f64::from(got) - e).abs() <= 5e-5 * e.abs().max(1.0);
        assert!(near, "{what}: the CPU's value {i}: got {got}, expected {e}");
    }
}

/// Half a unit in the last place, relative.
pub fn rounding(dtype: HalfType) -> f64 {
    match dtype {
        HalfType::F16 => 1.0 / 2048.0,
        HalfType::Bf16 => 1.0 / 256.0,
    }
}

fn to_bits(dtype: HalfType, x: f32) -> u16 {
    match dtype {
        HalfType::F16 => f16::from_f32(x).to_bits(),
        HalfType::Bf16 => bf16::from_f32(x).to_bits(),
    }
}

fn from_bits(dtype: HalfType, bits: u16) -> f32 {
    match dtype {
        HalfType::F16 => f16::from_bits(bits).to_f32(),
        HalfType::Bf16 => bf16::from_bits(bits).to_f32(),
    }
}

/// A value as the 2-byte type holds it.
pub fn rounded_value(dtype: HalfType, x: f32) -> f32 {
    from_bits(dtype, to_bits(dtype, x))
}

/// Noise that the 2-byte type holds exactly, so that all sides compute from the same values.
pub fn rounded(dtype: HalfType, tensor: u32, len: usize, scale: f32) -> Vec<f32> {
    synthetic::values(tensor, len, scale).into_iter().map(|x| rounded_value(dtype, x)).collect()
}

/// A CPU tensor for a twin.
pub fn on_cpu(values: &[f32], shape: &[usize]) -> Tensor {
    Tensor::from_vec(values.to_vec(), shape, &Device::Cpu).unwrap()
}

/// Bounds of sequences of these lengths.
pub fn bounds(lens: &[usize]) -> CuSeqlens {
    let mut bounds = vec![0u32];
    for len in lens {
        bounds.push(bounds[bounds.len() - 1] + *len as u32);
    }
    CuSeqlens::new(&bounds, &Device::Cpu).unwrap()
}
