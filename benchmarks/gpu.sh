#!/usr/bin/env bash
# bash benchmarks/gpu.sh [SHAPE...]   runs benchmarks/gpu.py on one GPU, at the true shapes of four models, or of those
#                                     named. Nothing is downloaded; figures go to benchmarks/results/gpu-SHAPE.json.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh requirements.txt requirements2.txt
[ $# -gt 0 ] || set -- llama2-7b gemma2-9b qwen3-8b qwen3-30b-a3b
failed=0
for shape in "$@"; do
    echo "== $shape"
    .venv/bin/python benchmarks/gpu.py --shape "$shape" --out "benchmarks/results/gpu-$shape.json" || failed=1
done
exit $failed
