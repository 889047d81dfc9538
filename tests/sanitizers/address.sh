#!/usr/bin/env bash
# AddressSanitizer over the FFI layer, with the real libtvm_ffi. tests/sanitizers/address.sh [FILTER ...]
# Needs a nightly toolchain, and the wheel of libtvm_ffi in the cache or in FLASHINFER_RS_WHEELS.
set -euo pipefail
cd "$(dirname "$0")/../.."
export FLASHINFER_RS_EMBED=off FLASHINFER_RS_OFFLINE=1 FLASHINFER_RS_REQUIRE=libtvm_ffi
export RUSTFLAGS=-Zsanitizer=address
# Modules are never unloaded, and what the library keeps for the process is no leak.
export ASAN_OPTIONS="${ASAN_OPTIONS:-detect_leaks=0}"
target=$(rustc -vV | sed -n 's/^host: //p')
# A stack overflow that the sanitizer reports is not Rust's to report, and its allocator never shrinks.
cargo "+${TOOLCHAIN:-nightly}" test --no-default-features --target "$target" --test ffi -- "$@" \
    --skip stack_overflows_are_still_rusts_to_report
