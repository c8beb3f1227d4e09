#!/usr/bin/env bash
# bash reproduce.sh [main.py arguments]   sets itself up, then runs the whole comparison on the embedded models.
# Resumable: run it again and it goes on where it stopped. In the background: nohup bash reproduce.sh > log 2>&1 &
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash setup.sh requirements.txt
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1
exec .venv/bin/python main.py "$@"
