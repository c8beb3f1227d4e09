#!/usr/bin/env bash
# bash tests/run-vllm.sh [pytest arguments]   installs vLLM into .venv-vllm, once, then runs the tests that need it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup-vllm.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1 VLLM_NO_USAGE_STATS=1
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} # GiB
exec .venv-vllm/bin/python -m pytest -m vllm tests/test_vllm.py "$@"
