//! Whole encoders with made-up weights on the device: checked against the CPU, then timed.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use cudarc::driver::{CudaStream, sys::CUevent_flags};
use eremois::ops::cuda::budget::Capacity;
use eremois::ops::cuda::engine::Engine;
use eremois::ops::cuda::sizes::EncoderSizes;
use eremois::ops::cuda::{Gpu, HalfType};
use eremois::ops::pool::Pooling;
use eremois::{Error, Result};
use serde_json::{Value, json};

use super::timing::{quantile, time};
use crate::synthetic::{self, CpuEncoder, Tokens, min_cosine, read_rows};

/// Batches of one case that take turns: the same ids again and again would read the same rows of the tables.
const NUM_BATCHES: usize = 4;
/// Batches on the device at a time: one computes, one waits behind it.
const NUM_UNDER_WAY: usize = 2;
/// Lengths of the sequences that are compared with the CPU, and with the peers.
const VERIFY_LENS: [usize; 4] = [1, 7, 33, 128];
/// The seed of their ids; benches/peers/gpu.py has the same.
const VERIFY_SEED: u32 = 1;

/// What is asked to be timed.
pub struct Case {
    pub model: String,
    pub sizes: EncoderSizes,
    pub dtype: HalfType,
    pub lens: Vec<usize>,
    pub seed: u32,
    pub seconds: f64,
}

/// The sizes of a model by its name. Errors: [`Error::Invalid`] for one that the benches do not have.
pub fn sizes(model: &str) -> Result<EncoderSizes> {
    synthetic::sizes_of(model).ok_or_else(|| Error::Invalid {
        field: "model".to_string(),
        reason: format!("`{model}` is none of minilm-l6, bert-base, bert-large"),
    })
}

/// Models that were asked for so far, on the device.
pub struct Models {
    gpu: Gpu,
    capacity: Capacity,
    held: HashMap<(String, HalfType), Held>,
}

struct Held {
    engine: Engine,
    compute: Arc<CudaStream>,
    /// Until its own products are timed nothing else should compute.
    setup_s: f64,
}

impl Models {
    pub fn new(gpu: Gpu, capacity: Capacity) -> Self {
        Self { gpu, capacity, held: HashMap::new() }
    }

    fn get(&mut self, model: &str, dtype: HalfType) -> Result<&Held> {
        let key = (model.to_string(), dtype);
        if !self.held.contains_key(&key) {
            let start = Instant::now();
            let (engine, compute) =
                synthetic::engine(&self.gpu, dtype, &sizes(model)?, None, Pooling::Mean, self.capacity, None)?;
            let held = Held { engine, compute, setup_s: start.elapsed().as_secs_f64() };
            self.held.insert(key.clone(), held);
        }
        Ok(&self.held[&key])
    }

    /// The rows of four sequences and their smallest cosine to the CPU's in f32.
    pub fn verify(&mut self, model: &str, dtype: HalfType) -> Result<Value> {
        let sizes = sizes(model)?;
        let held = self.get(model, dtype)?;
        let tokens = Tokens::new(&sizes, &VERIFY_LENS, VERIFY_SEED);
        let pending = held.engine.launch(&tokens.batch())?;
        let rows = read_rows(&pending, &tokens)?;
        let expected = CpuEncoder::new(&sizes, None)?.rows(&tokens, Pooling::Mean)?;
        Ok(json!({
            "min_cosine_to_cpu": min_cosine(&expected, &rows),
            "rows": rows,
            "setup_s": held.setup_s,
        }))
    }

    /// A batch's time while others follow it without a pause, from upload to pooled rows, and how much of it the device
    /// did nothing.
    pub fn time(&mut self, case: &Case) -> Result<Value> {
        let batches = batches(case);
        let held = self.get(&case.model, case.dtype)?;
        let mut under_way = VecDeque::with_capacity(NUM_UNDER_WAY);
        let spread = time(&held.compute, case.seconds, |i| {
            if under_way.len() == NUM_UNDER_WAY
                && let Some(oldest) = under_way.pop_front()
            {
                wait(oldest)?;
            }
            under_way.push_back(held.engine.launch(&batches[i % NUM_BATCHES].batch())?);
            Ok(())
        })?;
        under_way.into_iter().try_for_each(wait)?;
        let num_tokens: usize = case.lens.iter().sum();
        Ok(json!({
            "spread": spread,
            "median_us": spread.median_us,
            "num_tokens": num_tokens,
            "num_seqs": case.lens.len(),
            "tokens_per_s": num_tokens as f64 / spread.median_us * 1e6,
            "idle_share": self.idle_share(case, spread.num_runs.clamp(20, 500))?,
        }))
    }

    /// The share of a span of batches in which the device worked at none of them: 1 - Σ (upload + forward) / span.
    fn idle_share(&mut self, case: &Case, num_batches: usize) -> Result<f64> {
        let batches = batches(case);
        let held = self.get(&case.model, case.dtype)?;
        let (mut under_way, mut busy_us) = (VecDeque::with_capacity(NUM_UNDER_WAY), 0.0);
        let mut finish = |pending: eremois::ops::cuda::engine::Pending| -> Result<()> {
            pending.wait()?;
            let times =
                pending.times().ok_or_else(|| Error::Internal { cause: "a batch without times".to_string() })?;
            busy_us += (times.upload + times.forward).as_secs_f64() * 1e6;
            Ok(())
        };
        let start = held.compute.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?;
        for i in 0..num_batches {
            if under_way.len() == NUM_UNDER_WAY
                && let Some(oldest) = under_way.pop_front()
            {
                finish(oldest)?;
            }
            under_way.push_back(held.engine.launch(&batches[i % NUM_BATCHES].batch())?);
        }
        let end = held.compute.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?;
        end.synchronize()?;
        let span_us = f64::from(start.elapsed_ms(&end)?) * 1e3;
        under_way.into_iter().try_for_each(finish)?;
        Ok((1.0 - busy_us / span_us).max(0.0))
    }

    /// A batch that is launched, waited for, and only then followed by the next: by the host's clock from the call to
    /// the rows on the host, and by the device's.
    pub fn latency(&mut self, case: &Case) -> Result<Value> {
        let batches = batches(case);
        let held = self.get(&case.model, case.dtype)?;
        let (mut wall_us, mut device_us) = (Vec::new(), Vec::new());
        for i in 0..10 {
            wait(held.engine.launch(&batches[i % NUM_BATCHES].batch())?)?;
        }
        let begun = Instant::now();
        while wall_us.len() < 50 || begun.elapsed().as_secs_f64() < case.seconds && wall_us.len() < 5000 {
            let batch = batches[wall_us.len() % NUM_BATCHES].batch();
            let start = Instant::now();
            let pending = held.engine.launch(&batch)?;
            pending.wait()?;
            wall_us.push(start.elapsed().as_secs_f64() * 1e6);
            if let Some(times) = pending.times() {
                device_us.push((times.upload + times.forward + times.download).as_secs_f64() * 1e6);
            }
        }
        let mut answer = json!({
            "num_tokens": case.lens.iter().sum::<usize>(),
            "num_seqs": case.lens.len(),
            "num_runs": wall_us.len(),
            "num_graphs": held.engine.num_graphs(),
            "wall_p50_us": quantile(&mut wall_us, 0.5),
            "wall_p99_us": quantile(&mut wall_us, 0.99),
        });
        if !device_us.is_empty() {
            answer["device_p50_us"] = json!(quantile(&mut device_us, 0.5));
            answer["device_p99_us"] = json!(quantile(&mut device_us, 0.99));
        }
        Ok(answer)
    }
}

fn batches(case: &Case) -> Vec<Tokens> {
    let seeds = (0..NUM_BATCHES as u32).map(|i| case.seed.wrapping_mul(NUM_BATCHES as u32).wrapping_add(i + 2));
    seeds.map(|seed| Tokens::new(&case.sizes, &case.lens, seed)).collect()
}

fn wait(pending: eremois::ops::cuda::engine::Pending) -> Result<()> {
    pending.wait()
}
