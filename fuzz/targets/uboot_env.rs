#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| offshoot_fuzz::uboot_env(data));
