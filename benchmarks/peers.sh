#!/usr/bin/env bash
# bash benchmarks/peers.sh   makes .venv-peers: two other steering libraries and what this project needs, once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
peers="repeng==0.4.0 steering-vectors==0.12.2"
stamp=.venv-peers/installed-$(echo "$peers" | cat - requirements.txt pyproject.toml | cksum | cut -d' ' -f1)
[ -e "$stamp" ] && exit 0
[ -x .venv-peers/bin/python ] || "${PYTHON:-python3}" -m venv .venv-peers
echo "installing $peers into .venv-peers (once; a few minutes)"
pip=(.venv-peers/bin/python -m pip --quiet --disable-pip-version-check)
grep -h '^torch==' requirements.txt | xargs -r "${pip[@]}" install
# repeng names things that numpy 2 no longer has; each asks for an older transformers or numpy than its peers here
grep -hE '^(transformers|accelerate|safetensors|tqdm)==' requirements.txt |
    xargs "${pip[@]}" install "numpy<2" scikit-learn "$(grep -h '^gguf==' requirements2.txt)"
"${pip[@]}" install --no-deps $peers
[ -L .venv-peers ] || "${pip[@]}" install --no-deps --no-build-isolation --editable . # a linked one is another checkout's
touch "$stamp"
