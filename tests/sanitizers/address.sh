#!/usr/bin/env bash
# AddressSanitizer over the FFI layer, with the real libtvm_ffi. tests/sanitizers/address.sh
# Needs a nightly toolchain, and the wheels of libtvm_ffi in the cache or in FLASHINFER_RS_WHEELS.
set -euo pipefail
cd "$(dirname "$0")/../.."
export FLASHINFER_RS_EMBED=off FLASHINFER_RS_OFFLINE=1 FLASHINFER_RS_REQUIRE=libtvm_ffi
export RUSTFLAGS=-Zsanitizer=address
target=$(rustc -vV | sed -n 's/^host: //p')
# Tests that hold the process's memory to a bound, or run the whole program again with a later library.
bounded=(a_million_calls_leak_nothing a_later_library_serves_as_well)
run() {
    # Modules are never unloaded, and what the library keeps for the process is no leak.
    ASAN_OPTIONS="detect_leaks=0:$1" \
        cargo "+${TOOLCHAIN:-nightly}" test --no-default-features --target "$target" --test ffi -- "${@:2}"
}
run "" "${bounded[@]/#/--skip=}"
# What is freed stays in a quarantine, of 256 MiB unless it is said: no leak, but more than the bound.
run quarantine_size_mb=1 "${bounded[@]}"
