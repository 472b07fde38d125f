#!/usr/bin/env bash
# Compares the native kernels' results on an emulated arm64 and on the instruction sets of x86-64.
# On Debian: apt-get install g++-aarch64-linux-gnu qemu-user-static
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT

build() { # compiler, name, options
  "$1" -std=c++17 -O2 -ftree-vectorize -Wno-psabi -I. "${@:3}" tests/native/sanitize.cc \
    -o "$folder/$2" -pthread
}

build g++ avx512 # or the best that this processor has
build g++ avx2 '-D__builtin_cpu_supports(name)=(sizeof(name)<6)' # "avx2" and "fma" only
build g++ baseline '-D__builtin_cpu_supports(name)=false'
build aarch64-linux-gnu-g++ arm64 -static
for name in avx512 avx2 baseline; do "$folder/$name" digests >"$folder/$name.txt"; done
qemu-aarch64-static "$folder/arm64" digests >"$folder/arm64.txt"
python3 tests/native/compare_digests.py "$folder"/{avx512,avx2,baseline,arm64}.txt
