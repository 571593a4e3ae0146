#!/usr/bin/env bash
# What minutes on a rented GPU can do for the bundled model: train it further, and torchvision's own R18-FPN beside it.
#
#     benchmarks/gpu_training.sh OUT MINUTES [python]
#
# Needs no installation of this project. Scenes are drawn on all cores first; the rest of the time goes to both models
# in equal parts. OUT gets ours/best.pth, torchvision/last.pth, each with its JSON, their logs and curves, and
# environment.txt; what is large and of no more use goes. Ours is then scored by benchmarks.bundle and
# benchmarks.score_bundled, torchvision's by fpn-engine export, build and eval.
set -uo pipefail
[ $# -ge 2 ] || { echo "usage: $0 OUT MINUTES [python]" >&2; exit 2; }
out=$(realpath -m "$1")
begin=$(date +%s)
total=$(awk -v minutes="$2" 'BEGIN { print int(60 * minutes) }')
python=${3:-python3}
count=${SCENES:-8000} batch=${BATCH:-16} probe=${PROBE:-40}
workers=${WORKERS:-$(nproc)}
cd "$(dirname "$0")/.." || exit 2
mkdir -p "$out" || exit 2
export PYTHONPATH=engine:kernels:export:.${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

{
    date -u
    timeout 20 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
    "$python" -c 'import torch, torchvision; print("torch", torch.__version__, "torchvision", torchvision.__version__)'
} > "$out/environment.txt" 2>&1

"$python" -m fpn_engine scenes "$scratch/train" --seed 11 --count "$count" >> "$out/scenes.log" 2>&1 || exit 1
"$python" -m fpn_engine scenes "$scratch/val" --seed 2 --count $((count / 80 + 1)) >> "$out/scenes.log" 2>&1 || exit 1

# ours STEPS FOLDER words...: the bundled model, from where it is.
ours() {
    "$python" -m fpn_engine train --annotations "$scratch/train/annotations.json" --images "$scratch/train/images" \
        --arch resnet18 --set body_width=32 --fpn-channels 64 --representation-size 256 --min-size 800 --max-size 1067 \
        --set 'anchor_sizes=[[16],[32],[64],[128],[256]]' --set canonical_size=150 \
        --init export/fpn_export/models/demo.safetensors --batch "$batch" --learning-rate 0.04 --schedule cosine --nesterov \
        --clip-norm 5 --scales 0.75 1.1 --brightness 0.2 --precision bf16 --freeze-norm --frozen-stages 0 \
        --recipe rois_per_image=256 --recipe proposals_per_image=1000 --recipe box_weight=2 \
        --workers "$workers" --steps "$1" -o "$2" "${@:3}"
}

# The schedule has to end with the time: how long is an update? The first ones, which load and compile, do not count.
ours "$probe" "$scratch/probe" --warmup 10 > "$out/probe.log" 2>&1 || { tail -n 5 "$out/probe.log" >&2; exit 1; }
each=$(awk -F, 'NR > 1 { last = $NF } NR == 11 { first = $NF } END { print (last - first) / (NR - 11) }' "$scratch/probe/log.csv")
share=$(((total - ($(date +%s) - begin)) * 46 / 100))
steps=$(awk -v share="$share" -v each="$each" 'BEGIN { print int(share / each) }')
echo "an update takes $each s; $steps of them, $batch images each" | tee -a "$out/environment.txt"
[ "$steps" -ge 20 ] || { echo "no time is left to train" >&2; exit 1; }

ours "$steps" "$out/ours" --warmup 100 --validate-every "$steps" --save-every 200 \
    --val-annotations "$scratch/val/annotations.json" --val-images "$scratch/val/images" > "$out/ours.log" 2>&1
code=$?
"$python" -m benchmarks.train_torchvision --annotations "$scratch/train/annotations.json" \
    --images "$scratch/train/images" --batch "$batch" --workers "$workers" --learning-rate 0.04 \
    --min-size 800 --max-size 1067 --minutes "$(awk -v share="$share" 'BEGIN { print share / 60 }')" \
    -o "$out/torchvision" > "$out/torchvision.log" 2>&1
code=$((code | $?))
rm -f "$out"/*/state.pt "$out"/*/falling.pt "$out"/ours/last.pth
tail -n 2 "$out"/*.log
exit "$code"
