#!/usr/bin/env bash
# Everything there is to learn on a CUDA card, in at most 22 minutes on an H100: the GPU tests, then the benchmark.
# Its tables are appended to BENCHMARKS.md. A step that fails or takes too long does not stop the others.
set -u
cd "$(dirname "$0")/.."
failed=0
run() { # run SECONDS COMMAND...
    echo "--- ${*:2}"
    timeout "$@" || { echo "--- failed: ${*:2}"; failed=1; }
}
bench() { run "$1" python tools/benchmark.py "${@:2}"; }

run 240 python -m pytest -q -m gpu
bench 240 --model paper --batch-size 8 --compile default --baseline       # the headline
bench 120 --model paper --batch-size 1 4 --repeats 5                      # without compilation
bench 150 --model paper --batch-size 1 --tasks forward --compile reduce-overhead   # CUDA graphs
bench 90 --model paper --batch-size 1 8 --tasks train --checkpoint-activations --repeats 5
bench 60 --model paper --batch-size 8 --profile
bench 180 --model large --batch-size 8 --compile default --repeats 5
bench 90 --model base --batch-size 1 4 8 --repeats 5
bench 150 --model large --batch-size 8 --tasks train loader evaluate --repeats 3  # the real loader beside it
exit $failed
