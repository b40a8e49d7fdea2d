#!/usr/bin/env bash
# Everything there is to learn on a CUDA card, in at most 22 minutes on an H100: the GPU tests, then the speed.
# Its tables are appended to docs/speed.md. A step that fails or takes too long does not stop the others.
set -u
cd "$(dirname "$0")/.."
failed=0
run() { # run SECONDS COMMAND...
    echo "--- ${*:2}"
    timeout "$@" || { echo "--- failed: ${*:2}"; failed=1; }
}
speed() { run "$1" python -m experiments.speed "${@:2}"; }

run 240 python -m pytest -q -m gpu
speed 240 --model paper --batch-size 8 --compile blocks default --baseline       # the headline; what is known is kept
speed 120 --model paper --batch-size 1 4 --repeats 5                      # without compilation
speed 150 --model paper --batch-size 1 --tasks forward --compile reduce-overhead   # CUDA graphs
speed 90 --model paper --batch-size 1 8 --tasks train --checkpoint-activations --repeats 5
speed 60 --model paper --batch-size 8 --profile
speed 180 --model large --batch-size 8 --compile blocks --repeats 5
speed 90 --model base --batch-size 1 4 8 --repeats 5
speed 150 --model large --batch-size 8 --tasks train loader evaluate --repeats 3  # the real loader beside it
exit $failed
