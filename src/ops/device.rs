//! Which device to compute on.

use std::fmt;
use std::str::FromStr;

use candle_core::{Device, DeviceLocation};

use crate::{Error, Result};

/// What an operator asks for: `auto`, `cpu`, `cuda`, `cuda:1`, `cuda:0,1`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum DeviceSpec {
    /// The first CUDA device if there is one and it works, else the CPU.
    #[default]
    Auto,
    Cpu,
    /// These CUDA devices by ordinal, each once, and nothing else. Not empty.
    Cuda(Vec<usize>),
}

impl FromStr for DeviceSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let invalid = |reason: String| Error::Invalid { field: "device".to_string(), reason };
        match text.trim() {
            "auto" => return Ok(Self::Auto),
            "cpu" => return Ok(Self::Cpu),
            "cuda" => return Ok(Self::Cuda(vec![0])),
            _ => {}
        }
        let Some(list) = text.trim().strip_prefix("cuda:") else {
            return Err(invalid(format!("`{text}` is none of auto, cpu, cuda, cuda:N, cuda:N,M")));
        };
        let mut ordinals = Vec::new();
        for part in list.split(',') {
            let ordinal =
                part.trim().parse().map_err(|_| invalid(format!("`{part}` in `{text}` is no device number")))?;
            if ordinals.contains(&ordinal) {
                return Err(invalid(format!("device {ordinal} is named twice in `{text}`")));
            }
            ordinals.push(ordinal);
        }
        Ok(Self::Cuda(ordinals))
    }
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinals) => {
                let list: Vec<String> = ordinals.iter().map(usize::to_string).collect();
                write!(f, "cuda:{}", list.join(","))
            }
        }
    }
}

/// Opens the devices a spec asks for; at least one.
///
/// Blocks: opening a CUDA device takes some hundred milliseconds.
/// Errors: [`Error::Config`] if CUDA is asked for by name and the build or the machine has none; `auto`
/// falls back to the CPU with a log line.
pub fn select(spec: &DeviceSpec) -> Result<Vec<Device>> {
    match spec {
        DeviceSpec::Cpu => Ok(vec![Device::Cpu]),
        DeviceSpec::Auto => match open_cuda(0) {
            Ok(device) => Ok(vec![device]),
            Err(reason) => {
                tracing::info!(%reason, "device auto: computing on the CPU");
                Ok(vec![Device::Cpu])
            }
        },
        DeviceSpec::Cuda(ordinals) => {
            let (mut devices, mut faults) = (Vec::new(), Vec::new());
            for &ordinal in ordinals {
                match open_cuda(ordinal) {
                    Ok(device) => devices.push(device),
                    Err(reason) => faults.push(format!("ai.device: cuda:{ordinal}: {reason}")),
                }
            }
            if faults.is_empty() { Ok(devices) } else { Err(Error::Config { faults }) }
        }
    }
}

/// A device's name in logs, metrics and `/info`: "cpu", "cuda:0".
pub fn name(device: &Device) -> String {
    match device.location() {
        DeviceLocation::Cpu => "cpu".to_string(),
        DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    }
}

/// The name of several devices: "cuda:0,1", the form in which an operator asks for them.
pub fn names(devices: &[Device]) -> String {
    let cuda = |device: &Device| match device.location() {
        DeviceLocation::Cuda { gpu_id } => Some(gpu_id),
        _ => None,
    };
    match devices.iter().map(cuda).collect::<Option<Vec<_>>>() {
        Some(ordinals) if !ordinals.is_empty() => DeviceSpec::Cuda(ordinals).to_string(),
        _ => devices.iter().map(name).collect::<Vec<_>>().join(","),
    }
}

/// Opens one CUDA device or says why not. Tried by opening it: candle's `cuda_is_available` only looks
/// at the feature, not at the machine.
fn open_cuda(ordinal: usize) -> Result<Device, String> {
    if !cfg!(feature = "cuda") {
        return Err("this build has no CUDA support (built without the feature `cuda`)".to_string());
    }
    Device::new_cuda(ordinal).map_err(super::cause)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specs_are_read_and_written() {
        for (text, spec) in [
            ("auto", DeviceSpec::Auto),
            ("cpu", DeviceSpec::Cpu),
            (" cuda ", DeviceSpec::Cuda(vec![0])),
            ("cuda:2", DeviceSpec::Cuda(vec![2])),
            ("cuda:0, 3", DeviceSpec::Cuda(vec![0, 3])),
        ] {
            let read: DeviceSpec = text.parse().unwrap();
            assert_eq!(read, spec, "{text}");
            assert_eq!(read.to_string().parse::<DeviceSpec>().unwrap(), spec);
        }
    }

    #[test]
    fn bad_specs_name_the_fault() {
        for (text, part) in [
            ("gpu", "`gpu`"),
            ("", "auto, cpu, cuda"),
            ("cuda:", "no device number"),
            ("cuda:x", "`x`"),
            ("cuda:-1", "`-1`"),
            ("cuda:1,1", "twice"),
        ] {
            let error = text.parse::<DeviceSpec>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn cpu_and_auto_always_give_a_device() {
        assert_eq!(name(&select(&DeviceSpec::Cpu).unwrap()[0]), "cpu");
        assert_eq!(names(&select(&DeviceSpec::Cpu).unwrap()), "cpu");
        assert_eq!(select(&DeviceSpec::Auto).unwrap().len(), 1);
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn cuda_without_the_feature_is_refused_for_each_device() {
        let error = select(&DeviceSpec::Cuda(vec![0, 1])).unwrap_err().to_string();
        assert!(error.contains("ai.device: cuda:0") && error.contains("cuda:1"), "{error}");
        assert!(error.contains("without the feature `cuda`"), "{error}");
    }
}
