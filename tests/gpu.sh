#!/usr/bin/env bash
# Everything that tests/kernels has to say on a CUDA machine: the tests marked gpu, those that run on any device, and, if
# compute-sanitizer is on the PATH, its memcheck and racecheck on the kernels. Non-zero if any of it failed.
#
#     tests/gpu.sh [python]
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
failed=()

check() {
    echo "+ ${*:2}"
    "${@:2}" || failed+=("$1")
}

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "no CUDA device here" >&2; exit 1; }
check "gpu tests" "$python" -m pytest -q -m gpu tests/kernels
check "tests on the GPU" "$python" -m pytest -q -m "not gpu" tests/kernels/triton tests/kernels/test_registration.py

# One launch each, since sanitized kernels take many times as long: not the thousand replays of test_capturable.
selected="real or gradient_equals"
sanitized=("$python" -m pytest -q -k "$selected" --timeout 3000 -p no:cacheprovider tests/kernels/triton)
if command -v compute-sanitizer > /dev/null; then
    sanitizer=(compute-sanitizer --target-processes all --report-api-errors no --error-exitcode 86)
    # One allocation a tensor, or accesses beyond the end of one would fall into another and go unseen.
    check memcheck env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${sanitizer[@]}" --tool memcheck "${sanitized[@]}"
    check racecheck "${sanitizer[@]}" --tool racecheck --racecheck-report analysis "${sanitized[@]}"
else
    echo "compute-sanitizer is not on the PATH: memcheck and racecheck were not run" >&2
    failed+=("compute-sanitizer is missing")
fi

if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "all passed"
