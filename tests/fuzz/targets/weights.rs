//! Safetensors or GGUF, as the first bytes say: the header, and every tensor by the shape that the header gives it.
#![no_main]

use std::io::Write;

use candle_core::Device;
use eremois::model::weights::Weights;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(bytes).expect("a temporary file can be written");
    let Ok(weights) = Weights::open(&[file.path().to_path_buf()], &Device::Cpu) else { return };
    for name in weights.names() {
        let shape = weights.shape(name).unwrap_or_default().to_vec();
        let _ = weights.get(name, &shape);
    }
});
