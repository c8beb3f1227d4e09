#!/usr/bin/env bash
# bash scripts/setup.sh FILE...   makes .venv and installs these requirements files, once; sourced by no one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || {
    echo "error: Python 3.10 to 3.12 is needed, $("$python" -V) found; set PYTHON=python3.11, say" >&2
    exit 1
}
stamp=.venv/installed-$(cat "$@" | cksum | cut -d' ' -f1)
[ -e "$stamp" ] && exit 0
[ -x .venv/bin/python ] || "$python" -m venv .venv
echo "installing $* into .venv (once; a few minutes)"
# torch first and alone: the others then take the build that is there
grep -h '^torch==' "$@" | xargs -r .venv/bin/python -m pip install --quiet --disable-pip-version-check
args=()
for file in "$@"; do args+=(-r "$file"); done
.venv/bin/python -m pip install --quiet --disable-pip-version-check "${args[@]}"
touch "$stamp"
