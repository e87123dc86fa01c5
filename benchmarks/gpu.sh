#!/usr/bin/env bash
# All that needs a GPU, in under 9 minutes: the tests marked so, and the timings.
#
#   benchmarks/gpu.sh [folder for the results]
#
# The folder is $OUT, or benchmarks/results, if none is given; $PYTHON is the Python to run, which
# needs torch, triton, pytest and array-api-compat.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
folder=${1:-${OUT:-benchmarks/results}}
mkdir -p "$folder"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

status=0
timeout 240 "$python" -m pytest -m gpu tests/torch -q -rs -p no:cacheprovider || status=1
timeout 280 "$python" benchmarks/gpu.py "$folder" || status=1
exit "$status"
