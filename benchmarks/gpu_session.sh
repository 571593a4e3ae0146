#!/usr/bin/env bash
# What a short session on a rented GPU should bring home: facts about the machine, the riskiest tests, the benchmarks.
#
#     benchmarks/gpu_session.sh OUT MINUTES [python]
#
# Needs no installation of this project. OUT gets seven files: environment.txt, a log of each group of tests and
# of the benchmarks, the benchmarks' rows, which grow while they run, and replay.json. What fails keeps nothing from running;
# the exit code is 1 then. Set FPN_ENGINE_COMMIT where the files have no git history, SMOKE_SECONDS for other than 90.
set -uo pipefail
[ $# -ge 2 ] || { echo "usage: $0 OUT MINUTES [python]" >&2; exit 2; }
out=$(realpath -m "$1")
end=$(awk -v now="$(date +%s)" -v minutes="$2" 'BEGIN { print int(now + 60 * minutes) }')
python=${3:-python3}
smoke=${SMOKE_SECONDS:-90}
cd "$(dirname "$0")/.." || exit 2
mkdir -p "$out" || exit 2
export PYTHONPATH=engine:kernels:export:.${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
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

# take SHARE name words...: a part of the time that is left, for a module of benchmarks/; what it saved stays.
take() {
    local seconds=$(($(left) * $1 / 100 - 5))
    [ "$seconds" -ge 20 ] || { failed+=("$2: no time was left for it"); return; }
    local minutes
    minutes=$(awk -v seconds="$seconds" 'BEGIN { print 0.8 * seconds / 60 }')
    echo "+ $2 ${*:4}" >> "$out/benchmarks.log"
    timeout -k 5 "$seconds" "$python" -m "$3" "${@:4}" ${minutes_of[$2]:+--minutes "$minutes"} \
        >> "$out/benchmarks.log" 2>&1 || failed+=("$2: exit code $?")
}

# The most wanted first: one image kernel by kernel, of a detector and of masks, then beside torchvision, then what fp16
# finds, then batches.
declare -A minutes_of=([peers]=1 [precision]=1 [batches]=1 [rest]=1)
rows="$out/benchmarks.json"
take 25 replay benchmarks.replay -o "$out/replay.json"
take 30 masks benchmarks.replay_masks -o "$out/replay.json" --seconds 25
take 30 peers benchmarks.bench_peers -o "$rows" --only "R50-FPN, 800x1216, batch 1" \
    --contestant "torchvision fp16 autocast*" --contestant "*native fp16" --contestant "*native bf16"
take 25 precision benchmarks.bench_precision -o "$rows"
take 50 batches benchmarks.bench_engine -o "$rows" --contestant "*native fp16"
take 100 rest benchmarks --all -o "$rows"
tail -n 60 "$out/benchmarks.log"
find "$out" -maxdepth 1 -name '*.tmp' -delete # of what was stopped while it wrote

tail -n 3 "$out"/tests-*.log
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
