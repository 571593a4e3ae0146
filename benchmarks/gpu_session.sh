#!/usr/bin/env bash
# What a short session on a rented GPU should bring home: facts about the machine, the riskiest tests, the benchmarks.
#
#     benchmarks/gpu_session.sh OUT MINUTES [python]
#
# Needs no installation of this project. OUT gets six files: environment.txt, a log of each group of tests and
# of the benchmarks, and the benchmarks' rows, which grow while they run. Nothing that fails keeps the rest from running;
# the exit code is 1 then. Set FPN_ENGINE_COMMIT where the files have no git history, SMOKE_SECONDS for other than 90.
set -uo pipefail
[ $# -ge 2 ] || { echo "usage: $0 OUT MINUTES [python]" >&2; exit 2; }
out=$(realpath -m "$1")
end=$(awk -v now="$(date +%s)" -v minutes="$2" 'BEGIN { print int(now + 60 * minutes) }')
python=${3:-python3}
smoke=${SMOKE_SECONDS:-90}
cd "$(dirname "$0")/.." || exit 2
mkdir -p "$out" || exit 2
export PYTHONPATH=engine:kernels:export:. PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
failed=()

left() {
    echo $((end - $(date +%s)))
}

{
    date -u
    uname -srm
    timeout 20 nvidia-smi
    timeout 20 nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit --format=csv
    timeout 60 "$python" - <<'PYTHON'
import importlib.metadata as metadata, platform, torch
print("python", platform.python_version())
for name in ("torch", "torchvision", "triton", "numpy", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "pytest"):
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "is not installed")
print("CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version())
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0))
else:
    print("there is no CUDA device here")
PYTHON
} > "$out/environment.txt" 2>&1 || failed+=("environment")

# All three at once: they check results, not times. SIGINT makes pytest say what it was at.
declare -A tests=([kernels]=tests/kernels [runtime]=tests/engine/runtime [native]=tests/engine/native/cuda)
declare -A running=()
for name in "${!tests[@]}"; do
    timeout -s INT -k 10 "$smoke" "$python" -m pytest -m gpu -q -p no:cacheprovider "${tests[$name]}" \
        > "$out/tests-$name.log" 2>&1 &
    running[$name]=$!
done
for name in "${!running[@]}"; do
    wait "${running[$name]}"
    code=$?
    [ "$code" -eq 0 ] || failed+=("tests of $name: exit code $code")
done

seconds=$(left)
if [ "$seconds" -gt 30 ]; then
    minutes=$(awk -v seconds="$seconds" 'BEGIN { print (seconds - 20) / 60 }')
    timeout -k 10 "$seconds" "$python" -m benchmarks --all -o "$out/benchmarks.json" --minutes "$minutes" \
        > "$out/benchmarks.log" 2>&1 || failed+=("benchmarks: exit code $?")
    tail -n 60 "$out/benchmarks.log"
else
    failed+=("no time was left for the benchmarks")
fi
find "$out" -maxdepth 1 -name '*.tmp' -delete # of what was stopped while it wrote

tail -n 3 "$out"/tests-*.log
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
