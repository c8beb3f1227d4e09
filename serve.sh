#!/usr/bin/env bash
# bash serve.sh MODEL PLAN.safetensors [PLAN...] [vLLM's own flags]
# An OpenAI-compatible server (vLLM) of MODEL, and beside it of MODEL under each plan, chosen per request by name.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bash "$here/setup-vllm.sh"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
exec "$here/.venv-vllm/bin/python" -m export.serve "$@"
