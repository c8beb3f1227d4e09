#!/usr/bin/env bash
# bash tests/run.sh [pytest arguments]   installs what is needed into .venv, a real model included, then runs the default
# tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh --smollm2 requirements.txt requirements2.txt
# one thread a process: on a busy machine two threads wait for each other longer than they work
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1
# two processes, each with whole files: fixtures of a file are made once
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
