#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| flashinfer_rs::fuzzing::manifest(bytes));
