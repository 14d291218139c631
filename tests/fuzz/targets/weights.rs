//! Safetensors or GGUF, as the first bytes say: the header, and every tensor by the shape that the header gives it.
#![no_main]

use std::io::Write;

use candle_core::Device;
use eremois::model::weights::Weights;

// libFuzzer's hook ends the process at any panic; candle's on a broken header is caught where the header is read. One that
// is not caught still ends it. What fuzzing looks for is told by the input, so nothing is printed.
libfuzzer_sys::fuzz_target!(init: std::panic::set_hook(Box::new(|_| {})), |bytes: &[u8]| {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(bytes).expect("a temporary file can be written");
    let Ok(weights) = Weights::open(&[file.path().to_path_buf()], &Device::Cpu) else { return };
    for name in weights.names() {
        let shape = weights.shape(name).unwrap_or_default().to_vec();
        let _ = weights.get(name, &shape);
    }
});
