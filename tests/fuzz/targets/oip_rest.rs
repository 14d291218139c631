#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| eremois::api::fuzzing::oip_rest(bytes));
