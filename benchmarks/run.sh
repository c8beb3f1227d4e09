#!/usr/bin/env bash
# bash benchmarks/run.sh [DIR]   runs every benchmark that this machine can run, in half an hour on a CPU; figures go to
#                                DIR (default: benchmarks/results). vLLM's part needs `bash scripts/setup-vllm.sh` first,
#                                and the GPU's part a GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh requirements.txt requirements2.txt
bash benchmarks/peers.sh
out=${1:-benchmarks/results}
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
for name in core answering steering structure search methods; do
    echo "== $name"
    .venv/bin/python "benchmarks/$name.py" --out "$out/$name-cpu.json"
done
if [ -x .venv-vllm/bin/python ]; then
    echo "== engine"
    .venv-vllm/bin/python benchmarks/engine.py --out "$out/engine-cpu.json"
fi
if command -v nvidia-smi >/dev/null; then
    bash benchmarks/gpu.sh
fi
