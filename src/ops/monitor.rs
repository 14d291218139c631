//! What a GPU says of itself: load, memory, power, temperature and clocks, as gauges.
//!
//! The numbers come from NVML, NVIDIA's management library, which is part of the driver and is looked for when it is asked
//! the first time. They are of the whole device, with what other processes do on it.

#[cfg(any(feature = "cuda", test))]
use ::metrics::gauge;
use ::metrics::{Unit, describe_gauge};

use super::device::DeviceSpec;

/// Registers help and unit of the gauges. Call it once, after the recorder is installed.
pub fn describe() {
    describe_gauge!("eremois_gpu_utilization_ratio", Unit::Count, "Share of time in which a kernel ran, by device");
    describe_gauge!("eremois_gpu_memory_used_bytes", Unit::Bytes, "Device memory in use, by device");
    describe_gauge!("eremois_gpu_memory_total_bytes", Unit::Bytes, "Device memory there is, by device");
    describe_gauge!("eremois_gpu_power_watts", "Power drawn by the board, by device");
    describe_gauge!("eremois_gpu_temperature_celsius", "Temperature of the GPU, by device");
    describe_gauge!("eremois_gpu_clock_hertz", "Clock, by device and clock: sm or memory");
}

/// The GPUs that models are computed on.
pub struct Monitor {
    #[cfg(feature = "cuda")]
    nvml: super::cuda::nvml::Nvml,
}

impl Monitor {
    /// For the devices of these names, as [`super::device::name`] gives them: "cpu", "cuda:0", also "cuda:0,1". `None`
    /// where no GPU is among them, and, with a line in the log, where NVML or the GPU in it is not found.
    ///
    /// Blocks: some milliseconds.
    pub fn open<'a>(names: impl IntoIterator<Item = &'a str>) -> Option<Self> {
        let ordinals = ordinals(names);
        if ordinals.is_empty() {
            return None;
        }
        #[cfg(feature = "cuda")]
        match super::cuda::nvml::Nvml::open(&ordinals) {
            Ok(nvml) => return Some(Self { nvml }),
            Err(reason) => tracing::debug!(reason, "no metrics of the GPU"),
        }
        None
    }

    /// Reads every value and sets its gauge. What a GPU does not tell keeps the value before.
    ///
    /// Blocks: some milliseconds a device; call it off the async threads.
    pub fn sample(&self) {
        #[cfg(feature = "cuda")]
        self.nvml.samples().for_each(|(device, sample)| sample.record(device));
    }
}

/// Each device once, in order.
fn ordinals<'a>(names: impl IntoIterator<Item = &'a str>) -> Vec<usize> {
    let mut ordinals: Vec<usize> = Vec::new();
    for name in names {
        if let Ok(DeviceSpec::Cuda(named)) = name.parse() {
            ordinals.extend(named);
        }
    }
    ordinals.sort_unstable();
    ordinals.dedup();
    ordinals
}

/// What one GPU says at one time; `None` where it does not.
#[cfg(any(feature = "cuda", test))]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Sample {
    /// 0 to 1
    pub utilization: Option<f64>,
    pub memory_used_bytes: Option<u64>,
    pub memory_total_bytes: Option<u64>,
    pub power_watts: Option<f64>,
    pub temperature_celsius: Option<u32>,
    pub sm_clock_hertz: Option<u64>,
    pub memory_clock_hertz: Option<u64>,
}

#[cfg(any(feature = "cuda", test))]
impl Sample {
    /// Sets the gauges of a device.
    fn record(&self, device: &str) {
        let d = || device.to_string();
        let clock = |clock: &'static str| gauge!("eremois_gpu_clock_hertz", "device" => d(), "clock" => clock);
        let whole = |value: Option<u64>| value.map(|value| value as f64);
        for (gauge, value) in [
            (gauge!("eremois_gpu_utilization_ratio", "device" => d()), self.utilization),
            (gauge!("eremois_gpu_memory_used_bytes", "device" => d()), whole(self.memory_used_bytes)),
            (gauge!("eremois_gpu_memory_total_bytes", "device" => d()), whole(self.memory_total_bytes)),
            (gauge!("eremois_gpu_power_watts", "device" => d()), self.power_watts),
            (gauge!("eremois_gpu_temperature_celsius", "device" => d()), self.temperature_celsius.map(f64::from)),
            (clock("sm"), whole(self.sm_clock_hertz)),
            (clock("memory"), whole(self.memory_clock_hertz)),
        ] {
            if let Some(value) = value {
                gauge.set(value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_found_among_names_of_devices() {
        assert_eq!(ordinals(["cuda:2", "cpu", "cuda:0,2", "metal:0", "cuda:1"]), [0, 1, 2]);
        assert!(Monitor::open(["cpu"]).is_none());
    }

    #[test]
    fn what_is_told_is_set_and_the_rest_left_out() {
        let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
        let sample = Sample {
            utilization: Some(0.87),
            memory_used_bytes: Some(3 << 30),
            temperature_celsius: Some(64),
            sm_clock_hertz: Some(1_980_000_000),
            ..Sample::default()
        };
        ::metrics::with_local_recorder(&recorder, || sample.record("cuda:1"));
        let text = recorder.handle().render();
        for line in [
            "eremois_gpu_utilization_ratio{device=\"cuda:1\"} 0.87",
            "eremois_gpu_memory_used_bytes{device=\"cuda:1\"} 3221225472",
            "eremois_gpu_temperature_celsius{device=\"cuda:1\"} 64",
            "eremois_gpu_clock_hertz{device=\"cuda:1\",clock=\"sm\"} 1980000000",
        ] {
            assert!(text.contains(line), "no {line} in {text}");
        }
        let other = Sample { power_watts: Some(350.5), ..Sample::default() };
        ::metrics::with_local_recorder(&recorder, || other.record("cuda:1"));
        let text = recorder.handle().render();
        assert!(text.contains("eremois_gpu_power_watts{device=\"cuda:1\"} 350.5"), "{text}");
        assert!(text.contains("eremois_gpu_utilization_ratio{device=\"cuda:1\"} 0.87"), "it keeps its value: {text}");
    }
}
