//! NVML: the driver's management library, loaded at run time.

use nvml_wrapper::enum_wrappers::device::{Clock, TemperatureSensor};

use super::Gpu;
use crate::ops::monitor::Sample;

/// The library, and where its GPUs are.
pub struct Nvml {
    nvml: nvml_wrapper::Nvml,
    gpus: Vec<Watched>,
}

struct Watched {
    /// "cuda:0"
    name: String,
    pci_bus_id: String,
}

impl Nvml {
    /// For the CUDA devices of these ordinals. CUDA counts them in another order than NVML, and `CUDA_VISIBLE_DEVICES`
    /// hides some from it: the place on the PCI bus says which is which, also for a slice of a GPU.
    ///
    /// Errors: why not, in words.
    pub fn open(ordinals: &[usize]) -> Result<Self, String> {
        let nvml = nvml_wrapper::Nvml::init().map_err(|e| e.to_string())?;
        let mut gpus = Vec::new();
        for ordinal in ordinals {
            let pci_bus_id = Gpu::open(*ordinal).and_then(|gpu| gpu.pci_bus_id()).map_err(|e| e.to_string())?;
            nvml.device_by_pci_bus_id(pci_bus_id.as_str()).map_err(|e| format!("{pci_bus_id}: {e}"))?;
            gpus.push(Watched { name: format!("cuda:{ordinal}"), pci_bus_id });
        }
        Ok(Self { nvml, gpus })
    }

    /// What each GPU says now, by its name.
    pub fn samples(&self) -> impl Iterator<Item = (&str, Sample)> {
        self.gpus.iter().map(|gpu| (gpu.name.as_str(), self.sample(&gpu.pci_bus_id)))
    }

    fn sample(&self, pci_bus_id: &str) -> Sample {
        // A GPU that fell off the bus is found no more.
        let Ok(device) = self.nvml.device_by_pci_bus_id(pci_bus_id) else { return Sample::default() };
        let memory = device.memory_info().ok();
        let hertz = |clock| device.clock_info(clock).ok().map(|mhz| u64::from(mhz) * 1_000_000);
        Sample {
            utilization: device.utilization_rates().ok().map(|rates| f64::from(rates.gpu) / 100.0),
            memory_used_bytes: memory.as_ref().map(|memory| memory.used),
            memory_total_bytes: memory.as_ref().map(|memory| memory.total),
            power_watts: device.power_usage().ok().map(|milliwatts| f64::from(milliwatts) / 1000.0),
            temperature_celsius: device.temperature(TemperatureSensor::Gpu).ok(),
            sm_clock_hertz: hertz(Clock::SM),
            memory_clock_hertz: hertz(Clock::Memory),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_the_library_or_the_gpu_it_says_why() {
        // On a machine that has both, a device of this number is still missing.
        let reason = Nvml::open(&[4096]).err().unwrap();
        assert!(!reason.is_empty());
    }
}
