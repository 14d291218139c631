#![no_main]

use std::path::Path;

use eremois::model::manifest::Manifest;

libfuzzer_sys::fuzz_target!(|text: &str| {
    let path = Path::new("manifest.toml");
    if let Ok(manifest) = Manifest::parse(text, path) {
        let written = manifest.to_toml();
        assert!(Manifest::parse(&written, path).is_ok(), "{written}");
    }
});
