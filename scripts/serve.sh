#!/usr/bin/env bash
# bash scripts/serve.sh MODEL PLAN.safetensors [PLAN...] [vLLM's own flags]
# Serves MODEL, and MODEL under each plan, by vLLM's OpenAI-compatible server; a request chooses one by name.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup-vllm.sh"
exec "$root/.venv-vllm/bin/python" -m austeer.export.serve "$@"
