#!/usr/bin/env bash
# Miri over what runs without foreign code: pages, sequences, prefixes, index arrays, versions, signatures,
# and what reads RECORD files. tests/sanitizers/miri.sh [FILTER ...]
# Needs a nightly toolchain with the components miri and rust-src.
set -euo pipefail
cd "$(dirname "$0")/../.."
# `kv::cache` zeroes memory of caches, which takes Miri minutes.
filters=("$@")
if [ $# = 0 ]; then
    filters=(artifacts::record artifacts::version ffi::signature indices:: kv::pages kv::batch)
fi
export FLASHINFER_RS_EMBED=off FLASHINFER_RS_OFFLINE=1
export MIRIFLAGS="${MIRIFLAGS:--Zmiri-disable-isolation}" PROPTEST_CASES="${PROPTEST_CASES:-2}"
cargo "+${TOOLCHAIN:-nightly}" miri test --no-default-features --lib -- "${filters[@]}"
