#!/usr/bin/env bash
# bash reproduce.sh [options]   installs what it needs, then makes every table and figure, and results/<scale>/report.html
#   --scale embedded|real|small|paper   tiny shipped models (default), small real ones (both: two cores, no GPU), one 24 GB GPU,
#                                       the paper's models
#   --only table1,figure10   --models llama2-7b-chat   --limit N   --estimate   --dry-run   --help
# To resume, run it again: it continues where it stopped. In the background: nohup bash reproduce.sh > log 2>&1 &
# Several GPUs or nodes: docs/scaling.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
case " $* " in
*" --scale small "* | *" --scale paper "* | *" --scale="[sp]*) bash scripts/setup.sh requirements.txt requirements2.txt ;; # sentence encoder, 4-bit weights
*) bash scripts/setup.sh requirements.txt ;;
esac
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1
exec .venv/bin/python main.py reproduce "$@"
