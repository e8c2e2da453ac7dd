#!/usr/bin/env bash
# From the base checkpoint to the forced one on two CPU cores, both stages: bash examples/tiny_qwen3/force.sh [SEED]
# CORES=1 takes one core, so that two seeds can run side by side.
# Works below build/forcing, which a second seed needs to itself; killed and started again, it goes on. times.tsv says when each part ended,
# in seconds since the epoch.
set -euo pipefail
cd "$(dirname "$0")/../.."
seed=${1:-42} cores=${CORES:-2} python=${PYTHON:-.venv/bin/python}
# On Linux with glibc: memory is kept between steps and comes in huge pages.
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1 MALLOC_MMAP_THRESHOLD_=30000000 MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_TOP_PAD_=200000000
# The layers are alike, so one is compiled for all.
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
