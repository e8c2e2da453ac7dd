#!/usr/bin/env bash
# Train the forced checkpoint from the base on two CPU cores, in two stages.
#
#   bash examples/tiny_qwen3/force.sh [SEED]
#
# CORES=1 uses one core, so that two seeds can run at the same time, each in its own clone. The script works in build/forcing. After an
# interruption, the same command continues. build/forcing/times.tsv has the time at which each part ended, in seconds since the epoch.
set -euo pipefail
cd "$(dirname "$0")/../.."
seed=${1:-42} cores=${CORES:-2} python=${PYTHON:-.venv/bin/python}
# With these variables, glibc on Linux keeps memory between steps and uses huge pages.
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1 MALLOC_MMAP_THRESHOLD_=30000000 MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_TOP_PAD_=200000000
# The layers are equal, so one compiled layer serves all.
export ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION=true ACCELERATE_USE_CPU=true TOKENIZERS_PARALLELISM=false

ended() { printf '%s\t%s\n' "$1" "$(date +%s)" >> build/forcing/times.tsv; }

mkdir -p build/forcing
ended start
OMP_NUM_THREADS="$cores" "$python" examples/tiny_qwen3/forcing_data.py --output-dir build/forcing
ended prompts
for recipe in tiny_qwen3_cpu tiny_qwen3_cpu_stage2; do
    options=(--config "examples/recipes/$recipe.yaml" --seed "$seed")
    OMP_NUM_THREADS=1 "$python" -m torch.distributed.run --nproc_per_node "$cores" -m jacobi_hf.cli collect "${options[@]}"
    ended "$recipe collect"
    OMP_NUM_THREADS="$cores" "$python" -m jacobi_hf.cli pack "${options[@]}"
    ended "$recipe pack"
    OMP_NUM_THREADS="$cores" "$python" -m jacobi_hf.cli train "${options[@]}"
    ended "$recipe train"
done
