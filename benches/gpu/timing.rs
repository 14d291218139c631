//! Times of enqueued work by the device's own clock.

use cudarc::driver::{CudaStream, sys::CUevent_flags};
use eremois::Result;
use serde::Serialize;

/// Spans that are timed of one piece of work; the median of an odd number is one of them.
const NUM_SPANS: usize = 7;
/// Runs before anything is timed: plans are found, code is loaded, graphs are captured at the third use.
const NUM_WARM: usize = 5;
/// Most runs within a span: a microsecond's kernel needs no more to be told from its events.
const MAX_RUNS: usize = 2000;

/// Microseconds of one run: the median of the spans' means, and how far they lie apart.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    pub median_us: f64,
    pub min_us: f64,
    pub max_us: f64,
    /// Runs within each span.
    pub num_runs: usize,
}

/// Times what `run` enqueues on the stream, run after run with a rising number; `seconds` about altogether.
///
/// Within a span nothing waits for the host as long as a run takes longer than to enqueue it.
pub fn time(stream: &CudaStream, seconds: f64, mut run: impl FnMut(usize) -> Result<()>) -> Result<Spread> {
    let mut number = 0;
    let mut span = |num_runs: usize| -> Result<f64> {
        let start = stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?;
        for _ in 0..num_runs {
            run(number)?;
            number += 1;
        }
        let end = stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?;
        end.synchronize()?;
        Ok(f64::from(start.elapsed_ms(&end)?) * 1e3 / num_runs as f64)
    };
    span(NUM_WARM)?;
    let guess_us = span(NUM_WARM)?.max(0.5);
    let num_runs = ((seconds * 1e6 / NUM_SPANS as f64 / guess_us) as usize).clamp(1, MAX_RUNS);
    let mut spans = (0..NUM_SPANS).map(|_| span(num_runs)).collect::<Result<Vec<f64>>>()?;
    spans.sort_by(f64::total_cmp);
    Ok(Spread { median_us: spans[NUM_SPANS / 2], min_us: spans[0], max_us: spans[NUM_SPANS - 1], num_runs })
}

/// The value below which the share `q` of the samples lies, by the nearest rank. Not for an empty list.
pub fn quantile(samples: &mut [f64], q: f64) -> f64 {
    samples.sort_by(f64::total_cmp);
    let rank = (q * samples.len() as f64).ceil() as usize;
    samples[rank.clamp(1, samples.len()) - 1]
}
