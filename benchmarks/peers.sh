#!/usr/bin/env bash
# bash benchmarks/peers.sh   makes .venv-peers with two other steering libraries and the dependencies of this project.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
peers="repeng==0.4.0 steering-vectors==0.12.2"
stamp=.venv-peers/installed-$(echo "$peers" | cat - requirements.txt pyproject.toml | cksum | cut -d' ' -f1)
[ -e "$stamp" ] && exit 0
[ -x .venv-peers/bin/python ] || "${PYTHON:-python3}" -m venv .venv-peers
echo "installing $peers into .venv-peers (once; a few minutes)"
pip=(.venv-peers/bin/python -m pip --quiet --disable-pip-version-check)
grep -h '^torch==' requirements.txt | xargs -r "${pip[@]}" install
# repeng uses names that numpy 2 has removed; both pin older versions of transformers or numpy, hence --no-deps below
grep -hE '^(transformers|accelerate|safetensors|tqdm)==' requirements.txt |
    xargs "${pip[@]}" install "numpy<2" scikit-learn "$(grep -h '^gguf==' requirements2.txt)"
"${pip[@]}" install --no-deps $peers
[ -L .venv-peers ] || "${pip[@]}" install --no-deps --no-build-isolation --editable . # a linked environment belongs to another checkout
touch "$stamp"
