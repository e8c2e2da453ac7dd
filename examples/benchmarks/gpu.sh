#!/usr/bin/env bash
# Run every test and benchmark that needs a GPU, in at most seven and a half minutes on one H100 or H200.
#
#   bash examples/benchmarks/gpu.sh OUT
#
# The parts run in order of importance, each with a limit of time. The results of a part stay if it or a later part fails.
#
#   tests   equality on CUDA of eager steps, compiled steps and CUDA graphs; kernels     90 s
#   steps   cost of a step, and a replay, at the shapes of known models                  115 s a shape
#   peers   transformers' own strategies on the tiny checkpoint                          60 s
#   growth  time by length of prompt and output                                          60 s
#
# The machine needs torch and transformers (5.17 with torch 2.11 is enough), and pydantic, pydantic-core, annotated-types, pytest, hypothesis,
# rich, typer, jinja2 and pyyaml. WHEELS names a folder with wheels of what is missing.
#
# OUT gets a JSON document for each part, gpu.log with all output, and parts.tsv: name, exit status (124: out of time), seconds.
# Environment variables:
#   PARTS   which of the parts tests, steps, peers, growth to run (default: all)
#   SHAPES  shapes of step_cost.py for `steps` (default: qwen3-1.7b qwen2.5-7b; give the others to a second run)
#   WHEELS  folder of wheels to use instead of the installed packages, for a machine without network
#   PYTHON  the interpreter (default: python3)
#   DRY     1: tiny shapes and few repeats, to try this script on a CPU
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:?give the folder for the results}
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3} benchmarks=examples/benchmarks dry=${DRY:-0}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "$WHEELS"/*.whl || exit
    export PYTHONPATH=$PWD:$site
fi
: > "$out/gpu.log"
printf 'part\tstatus\tseconds\n' > "$out/parts.tsv"

part() { # name, most seconds, command
    local name=$1 limit=$2 started=$SECONDS status
    shift 2
    [ "$dry" = 1 ] && limit=900 # a busy CPU must not fail the run
    printf '\n== %s: %s\n' "$name" "$*" >> "$out/gpu.log"
    timeout -k 5 "$limit" "$@" >> "$out/gpu.log" 2>&1
    status=$?
    printf '%s\t%s\t%s\n' "$name" "$status" $((SECONDS - started)) | tee -a "$out/parts.tsv"
    [ "$status" = 0 ] || failed=1
}

failed=0
for name in ${PARTS:-tests steps peers growth}; do
    case $name in
        tests)
            files="tests/jacobi_hf/test_cuda.py tests/jacobi_hf/decoding/test_selection.py tests/jacobi_hf/attention/test_attention.py"
            [ "$dry" = 1 ] && files="tests/jacobi_hf/test_cuda.py tests/jacobi_hf/decoding/test_layout.py"
            part tests 90 "$python" -m pytest $files
            ;;
        steps)
            if [ "$dry" = 1 ]; then
                part step_cost-tiny 115 "$python" $benchmarks/step_cost.py --shape tiny --backend eager --repeats 1 --tokens 32 \
                    --output "$out/step_cost-tiny.json"
            else
                for shape in ${SHAPES:-qwen3-1.7b qwen2.5-7b}; do
                    part "step_cost-$shape" 115 "$python" $benchmarks/step_cost.py --shape "$shape" --output "$out/step_cost-$shape.json"
                done
            fi
            ;;
        peers)
            settings="--count 4 --repeats 3"
            [ "$dry" = 1 ] && settings="--count 1 --repeats 1 --max-new-tokens 8"
            part peers 60 "$python" $benchmarks/peers.py --models forced --domains arithmetic $settings --output "$out/peers.json"
            ;;
        growth)
            settings="--repeats 1"
            [ "$dry" = 1 ] && settings="--repeats 1 --most 512"
            part growth 60 "$python" $benchmarks/growth.py $settings --output "$out/growth.json"
            ;;
        *)
            echo "PARTS names $name; the parts are tests, steps, peers and growth" >&2
            exit 2
            ;;
    esac
done
exit $failed
