#!/usr/bin/env bash
# bash scripts/serve.sh MODEL PLAN.safetensors [PLAN...] [vLLM's own flags]
# An OpenAI-compatible server (vLLM) of MODEL, and beside it of MODEL under each plan, chosen per request by name.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup-vllm.sh"
exec "$root/.venv-vllm/bin/python" -m austeer.export.serve "$@"
