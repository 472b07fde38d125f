#!/usr/bin/env bash
# Builds sanitize.cc with each sanitizer and runs it; any warning of the compiler is an error too.
# The argument is the number of rounds; the default takes less than a minute on two cores.
set -euo pipefail
cd "$(dirname "$0")/../.."
compiler=${CXX:-c++} rounds=${1:-10}
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT

sanitize() { # sanitizers, level of optimization
  local program="$folder/$1"
  local options=(-std=c++17 "-fsanitize=$1" -fno-sanitize-recover=all -pthread)
  if ! { echo 'int main() {}' | "$compiler" "${options[@]}" -x c++ - -o "$program" && "$program"; } \
    2>/dev/null; then
    echo "skipped: $compiler cannot build or run programs with -fsanitize=$1"
    return
  fi
  "$compiler" "${options[@]}" "$2" -g1 -Wall -Wextra -Werror -Wno-psabi -I. \
    tests/native/sanitize.cc -o "$program"
  echo "-fsanitize=$1: $("$program" "$rounds")"
}

# Those of addresses are compiled long, that of threads runs long.
sanitize address,undefined -O0 &
addresses=$!
sanitize thread -O1 &
threads=$!
failed=0
wait $addresses || failed=1
wait $threads || failed=1
exit $failed
