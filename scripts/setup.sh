#!/usr/bin/env bash
# bash scripts/setup.sh [FILE...]   makes .venv with these requirements files (default: requirements.txt, enough for
#                                   reproduce.sh) and this checkout, so that it is importable from any folder; once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 0 ] || set -- requirements.txt
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || {
    echo "error: Python 3.10 to 3.12 is needed, $("$python" -V) found; set PYTHON=python3.11, say" >&2
    exit 1
}
stamp=.venv/installed-$(cat "$@" pyproject.toml | cksum | cut -d' ' -f1)
[ -e "$stamp" ] && exit 0
[ -x .venv/bin/python ] || "$python" -m venv .venv
echo "installing $* into .venv (once; a few minutes)"
pip=(.venv/bin/python -m pip --quiet --disable-pip-version-check)
# torch first and alone: the others then take the build that is there
grep -h '^torch==' "$@" | xargs -r "${pip[@]}" install
args=()
for file in "$@"; do args+=(-r "$file"); done
"${pip[@]}" install "${args[@]}"
# an environment that is linked here belongs to another checkout, and so does what it imports
[ -L .venv ] || "${pip[@]}" install --no-deps --no-build-isolation --editable .
touch "$stamp"
