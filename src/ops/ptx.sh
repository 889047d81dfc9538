#!/bin/sh
# Compiles the CUDA C of this folder and of serve/ to PTX, with the nvcc that is given or found: CUDA
# 13.0's made what is there. A test compares the digest in each first line with that of the source,
# which is that of the headers that it includes and its own text.
set -eu
cd "$(dirname "$0")/../.."
find src/ops serve/src -name '*.cu' | while read -r source; do
    target=${source%.cu}.ptx
    headers=$(sed -n "s,^#include \"\(.*\)\",$(dirname "$source")/\1,p" "$source")
    # Instructions that older GPUs lack are told by a line of the source.
    architecture=$(sed -n 's,^// Architecture: ,,p' "$source")
    version=8.3
    [ -n "$architecture" ] || { architecture=compute_80 version=7.0; }
    "${1:-nvcc}" -std=c++17 -ptx "-arch=$architecture" -o "$target.new" "$source"
    {
        # shellcheck disable=SC2086 # one word for each header
        echo "// Made of $(basename "$source") by ptx.sh: sha256 $(cat $headers "$source" | sha256sum | cut -d' ' -f1)"
        # Nothing in it is newer.
        sed -e '/^\/\//d' -e "s/^\.version .*/.version $version/" "$target.new"
    } >"$target"
    rm "$target.new"
    # What the driver will do.
    "$(dirname "$(command -v "${1:-nvcc}")")/ptxas" "-arch=sm_${architecture#compute_}" -o /dev/null "$target"
done
