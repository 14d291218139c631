//! What a worker does when the device has no memory for a batch: smaller ones, and a lower limit from then on.

use std::time::Instant;

use super::batch::{Batch, Failure};
use super::policy::BatchLimits;
use super::worker::Worker;
use crate::Error;

impl Worker {
    /// Computes a batch that there was no memory for in parts: halves by tokens, and halves of those that still do not
    /// fit, down to single entries. An entry that does not fit alone fails its request. The device gets no trial:
    /// it is well.
    ///
    /// A part of as many tokens as one that did not fit is halved untried, so of n entries less than 2n are launched,
    /// and usually log2(n) in vain.
    pub(super) fn relieve(&mut self, batch: Batch, cause: &str) {
        let num_failed = batch.num_tokens();
        let (mut fit, mut too_many) = (0, num_failed);
        self.shared.metrics.batches_out_of_memory.increment(1);
        let mut parts = vec![batch];
        while let Some(part) = parts.pop() {
            let start = Instant::now();
            let Some(part) = part.still_wanted(start) else { continue };
            if let Some(cause) = self.shared.vitals.lost() {
                self.hand_over(part, &Error::DeviceLost { cause });
                continue;
            }
            let num_tokens = part.num_tokens();
            let result = match num_tokens < too_many {
                true => self.compute(part, start),
                false => Err((part, Failure::OutOfMemory(cause.to_string()))),
            };
            match result {
                Ok(()) => fit = fit.max(num_tokens),
                Err((part, Failure::OutOfMemory(cause))) => {
                    self.shared.metrics.batches_out_of_memory.increment(u64::from(num_tokens < too_many));
                    too_many = too_many.min(num_tokens);
                    match part.halve() {
                        Ok((first, second)) => parts.extend([second, first]),
                        Err(alone) => alone.fail(&Error::OutOfMemory { cause }),
                    }
                }
                Err((part, failure)) => self.recover(part, &failure),
            }
        }
        // Where nothing fitted, nothing was learned of what does.
        if fit > 0 {
            self.lower_limits(fit, num_failed, cause);
        }
    }

    /// Lowers `max_batch_tokens` to what did fit, but not below the longest sequence: until new limits are set, and for
    /// all of the model's devices, because a request is cut for any of them.
    pub(super) fn lower_limits(&self, fit: usize, num_failed: usize, cause: &str) {
        let shared = &self.shared;
        let lowered = fit.max(shared.info.max_seq_len);
        let before = shared.limits.rcu(|limits| BatchLimits {
            max_batch_tokens: limits.max_batch_tokens.min(lowered),
            ..BatchLimits::clone(limits)
        });
        if before.max_batch_tokens <= lowered {
            return;
        }
        shared.metrics.max_batch_tokens.set(shared.limits.load().max_batch_tokens as f64);
        shared.metrics.limits_lowered.increment(1);
        tracing::warn!(
            model = %shared.info.name, device = shared.device, old = before.max_batch_tokens, new = lowered, num_failed, cause,
            "max_batch_tokens is lowered to what the device has memory for, until the settings are read again"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::encode::Encoding;
    use crate::model::pack::RowSpec;
    use crate::model::{DeviceTimes, Rows};
    use crate::request::Priority;
    use crate::serve::metrics::DeviceMetrics;
    use crate::serve::queue::Gate;
    use crate::serve::ticket::{Client, Ticket};
    use std::sync::Arc;
    use std::time::Duration;

    /// One request with inputs of these lengths, pushed at `pushed`.
    fn batch(lens: &[usize], pushed: Instant) -> Batch {
        let accepted = Arc::new(Gate::default()).enter(lens.len()).unwrap();
        let (client, _) =
            Client::new(lens.len(), pushed, pushed + Duration::from_secs(60), Priority::Interactive, accepted);
        let ticket = |(input_idx, &len): (usize, &usize)| Ticket {
            encoding: Encoding { input_ids: vec![1; len], ..Encoding::default() },
            row: RowSpec { normalize: false, dimensions: 1 }.into(),
            input_idx,
            pushed,
            was_handed_over: false,
            client: client.clone(),
        };
        Batch { tickets: lens.iter().enumerate().map(ticket).collect() }
    }

    #[test]
    fn halves_have_about_as_many_tokens_and_all_entries() {
        let lens = |batch: &Batch| batch.tickets.iter().map(Ticket::num_tokens).collect::<Vec<_>>();
        for (all, first, second) in [
            (&[4, 4, 4, 4][..], &[4, 4][..], &[4, 4][..]),
            (&[1, 1, 1, 9], &[1, 1, 1], &[9]),
            (&[9, 1, 1, 1], &[9], &[1, 1, 1]),
            (&[5, 5, 5], &[5], &[5, 5]),
            (&[7, 7], &[7], &[7]),
        ] {
            let Ok(halves) = batch(all, Instant::now()).halve() else { panic!("{all:?} is not a single entry") };
            assert_eq!((lens(&halves.0), lens(&halves.1)), (first.to_vec(), second.to_vec()), "{all:?}");
        }
        assert_eq!(lens(&batch(&[3], Instant::now()).halve().err().unwrap()), [3]);
    }

    #[test]
    fn a_gap_is_idle_time_while_something_waited() {
        let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
        let metrics = ::metrics::with_local_recorder(&recorder, || DeviceMetrics::new("m", "cpu"));
        let ms = Duration::from_millis;
        let pushed = Instant::now();
        let mut rows = Rows::with_capacity(0, 0);
        let mut computed = |idle: Option<Duration>, waited: Duration| {
            rows.device_times = Some(DeviceTimes { upload: ms(1), forward: ms(20), download: ms(2), idle });
            metrics.computed(&batch(&[1], pushed), &rows, pushed + waited);
        };
        computed(None, ms(5)); // the first batch
        computed(Some(ms(3)), ms(50)); // it waited for all of the gap
        computed(Some(ms(4000)), ms(5)); // nobody asked for most of it
        metrics.computed(&batch(&[1], pushed), &Rows::default(), pushed); // a device without a clock
        let text = recorder.handle().render();
        let value = |name: &str| {
            let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name}: {text}"));
            line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
        };
        assert_eq!(value("eremois_device_gap_seconds_count{model=\"m\",device=\"cpu\"}"), 2.0);
        assert!((value("eremois_device_gap_seconds_sum{model=\"m\",device=\"cpu\"}") - 0.008).abs() < 1e-9, "{text}");
        assert!(
            (value("eremois_device_seconds_sum{model=\"m\",device=\"cpu\",phase=\"forward\"}") - 0.060).abs() < 1e-9,
            "{text}"
        );
        assert_eq!(value("eremois_device_seconds_count{model=\"m\",device=\"cpu\",phase=\"download\"}"), 3.0);
    }
}
