#!/usr/bin/env bash
# bash benchmarks/run.sh [DIR]   every benchmark that this machine can run, one after another; figures go to DIR
#                                (default: benchmarks/results), half an hour on a CPU. vLLM's part runs where
#                                `bash scripts/setup-vllm.sh` was run, the part on a GPU where there is one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh requirements.txt requirements2.txt
bash benchmarks/peers.sh
out=${1:-benchmarks/results}
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
for name in core answering steering search methods; do
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
