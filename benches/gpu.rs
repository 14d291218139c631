//! The CUDA engine timed on a device: its own peaks, each kernel, whole models, latency, idle gaps.
//!
//! A worker that `scripts/gpu run` drives, so that its rounds alternate with those of a peer that speaks the same
//! protocol (benches/peers/gpu.py): a request is one line of JSON on standard input, its answer one line on standard
//! output, `{"error": …}` where it failed. Every number's name ends with its unit. Without a device it says so and ends
//! with status 3.
//!
//! ```text
//! {"do": "hello"}                                                    what is measured, on what
//! {"do": "peaks"}                                                    GEMM and copy rates of this device
//! {"do": "verify", "model": "bert-base", "dtype": "f16"}             rows, and their cosine to the CPU's
//! {"do": "time", "model": …, "dtype": …, "lens": […], "seed": 1}     a batch's time at saturation
//! {"do": "latency", …}                                               a batch that waits for no other
//! {"do": "parts", …}                                                 each kernel of that forward by itself
//! {"do": "others", "dtype": "f16"}                                   kernels that encoders like BERT do not use
//! ```
//!
//! By hand: `echo '{"do": "peaks"}' | cargo bench --features cuda --bench gpu`. With `--small` the sizes are those of an
//! emulated device, to try the worker itself.

mod gpu {
    pub mod models;
    pub mod operands;
    pub mod parts;
    pub mod peaks;
    pub mod timing;
}
#[path = "../tests/gpu/synthetic.rs"]
mod synthetic;

use std::io::{BufRead, Write};
use std::process::ExitCode;

use cudarc::driver::sys::CUdevice_attribute as Attribute;
use eremois::ops::cuda::budget::Capacity;
use eremois::ops::cuda::{Gpu, HalfType};
use eremois::{Error, Result};
use gpu::models::{Case, Models};
use serde::Deserialize;
use serde_json::{Value, json};

/// Where there is no device.
const NO_DEVICE: u8 = 3;

/// One request.
#[derive(Debug, Deserialize)]
#[serde(tag = "do", rename_all = "lowercase")]
enum Ask {
    Hello,
    Peaks,
    Verify { model: String, dtype: String },
    Time(CaseAsk),
    Latency(CaseAsk),
    Parts(CaseAsk),
    Others { dtype: String },
}

#[derive(Debug, Deserialize)]
struct CaseAsk {
    model: String,
    dtype: String,
    /// Lengths in tokens of the batch's sequences.
    lens: Vec<usize>,
    #[serde(default)]
    seed: u32,
    /// About how long to measure.
    #[serde(default = "default_seconds")]
    seconds: f64,
}

fn default_seconds() -> f64 {
    0.3
}

/// How large what is timed is where no request says it.
#[derive(Debug, Clone, Copy)]
struct Scale {
    /// What the models hold memory for.
    capacity: Capacity,
    /// Rows, columns and depth of the product whose rate is a peak.
    gemm_side: usize,
    copy_bytes: usize,
    /// What the sets of operands of one kernel come to, so that none finds its own in the cache.
    rotated_bytes: usize,
}

impl Scale {
    /// The token budget of the goals, and room for its shortest sequences; five times the L2 of an H100 (50 MB).
    const DEVICE: Self = Self {
        capacity: Capacity { max_batch_tokens: 16_384, max_batch_size: 1024 },
        gemm_side: 8192,
        copy_bytes: 1 << 30,
        rotated_bytes: 256 << 20,
    };
    const SMALL: Self = Self {
        capacity: Capacity { max_batch_tokens: 192, max_batch_size: 8 },
        gemm_side: 128,
        copy_bytes: 1 << 16,
        rotated_bytes: 1 << 16,
    };
}

fn main() -> ExitCode {
    let scale = if std::env::args().any(|argument| argument == "--small") { Scale::SMALL } else { Scale::DEVICE };
    let gpu = match Gpu::open(0) {
        Ok(gpu) => gpu,
        Err(error) => {
            println!("{}", json!({"error": format!("no CUDA device: {error}")}));
            return ExitCode::from(NO_DEVICE);
        }
    };
    let mut models = Models::new(gpu.clone(), scale.capacity);
    for line in std::io::stdin().lock().lines().map_while(std::io::Result::ok) {
        let answer = serde_json::from_str(&line)
            .map_err(|error| Error::Invalid { field: "request".to_string(), reason: error.to_string() })
            .and_then(|ask| answer(&gpu, &scale, &mut models, ask));
        println!("{}", answer.unwrap_or_else(|error| json!({"error": error.to_string()})));
        // Whoever reads this is waiting for it.
        let _ = std::io::stdout().flush();
    }
    ExitCode::SUCCESS
}

fn answer(gpu: &Gpu, scale: &Scale, models: &mut Models, ask: Ask) -> Result<Value> {
    match ask {
        Ask::Hello => hello(gpu),
        Ask::Peaks => gpu::peaks::measure(gpu, scale),
        Ask::Verify { model, dtype } => models.verify(&model, half_type(&dtype)?),
        Ask::Time(ask) => models.time(&ask.check()?),
        Ask::Latency(ask) => models.latency(&ask.check()?),
        Ask::Parts(ask) => gpu::parts::of_forward(gpu, scale, &ask.check()?),
        Ask::Others { dtype } => gpu::parts::of_others(gpu, scale, half_type(&dtype)?),
    }
}

impl CaseAsk {
    fn check(&self) -> Result<Case> {
        let sizes = gpu::models::sizes(&self.model)?;
        let reach = 1..=sizes.max_seq_len();
        if self.lens.is_empty() || !self.lens.iter().all(|len| reach.contains(len)) {
            let reason = format!("lengths of 1 to {} tokens, at least one", sizes.max_seq_len());
            return Err(Error::Invalid { field: "lens".to_string(), reason });
        }
        Ok(Case {
            model: self.model.clone(),
            sizes,
            dtype: half_type(&self.dtype)?,
            lens: self.lens.clone(),
            seed: self.seed,
            seconds: self.seconds.clamp(0.01, 60.0),
        })
    }
}

fn half_type(name: &str) -> Result<HalfType> {
    match name {
        "f16" => Ok(HalfType::F16),
        "bf16" => Ok(HalfType::Bf16),
        _ => Err(Error::Invalid { field: "dtype".to_string(), reason: format!("`{name}` is none of f16, bf16") }),
    }
}

fn hello(gpu: &Gpu) -> Result<Value> {
    let context = gpu.context();
    let multiprocessors = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    let l2_bytes = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?;
    let (major, minor) = context.compute_capability()?;
    Ok(json!({
        "name": "eremois",
        "version": env!("CARGO_PKG_VERSION"),
        "commit": env!("BUILD_COMMIT"),
        "gpu": gpu.name()?,
        "compute_capability": format!("{major}.{minor}"),
        "num_multiprocessors": multiprocessors,
        "l2_bytes": l2_bytes,
        "total_memory_bytes": context.total_mem()?,
        "driver_cuda_version": gpu.driver_version()?,
        "ways": ["engine"],
    }))
}
