#!/usr/bin/env bash
# Distillation of the bundled model on one GPU for a few minutes, with a teacher that answers every batch.
#   bash scripts/distill_on_gpu.sh PHOTOS START OUT MINUTES [SETTING=VALUE ...]
# PHOTOS: a folder of photos. START: weights of ours to start from, of any depth; deepen them before. OUT: folder of the run; an
# existing one is resumed. MINUTES: when to stop; a checkpoint is written then, and OUT/model.safetensors is never older than VALIDATE
# steps (200). WORKERS (one per core but one) degrade crops; 192-pixel crops take about 20 ms of a core each.
# It needs the weights of realesrgan-x4plus and efficientnet-lite0 in the cache ('onestepsr models download' fetches them), and no network.
set -euo pipefail
photos=$1 start=$2 out=$3 minutes=$4
shift 4
workers=${WORKERS:-$(($(nproc) - 1))}
resume=()
[ -d "$out/checkpoints" ] && resume=(--resume)
set +e
timeout --signal=TERM --kill-after=60 "$((minutes * 60))" python -m onestepsr train distillation \
    --recipe "${RECIPE:-distillation-tiny}" --out "$out" "${resume[@]}" \
    "data.paths=[$photos]" data.pool_size=0 data.cache_bytes=8000000000 \
    "config.backbone=$start" config.deepen=null config.teacher.live=true \
    train.batch_size="${BATCH:-64}" train.num_workers="$workers" train.checkpoint_minutes=1 \
    validation.every="${VALIDATE:-200}" validation.images=4 validation.rows=4 "$@"
code=$?
set -e
[ "$code" = 124 ] && echo "stopped after $minutes minutes; the same command goes on" && exit 0
exit "$code"
