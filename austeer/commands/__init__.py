"""The command line of the installed package: `austeer`, or `python -m austeer`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from austeer.errors import AUSteerError, run_command

COMMANDS = {  # name: module with a main, and what it does
    "rank": ("austeer.commands.rank", "contrastive pairs -> ranks of a model's atomic units"),
    "fisher": ("austeer.commands.fisher", "what steering a model's atomic units costs, measured on neutral text"),
    "plan": ("austeer.commands.plan", "ranks, and k and alpha or a budget of KL -> a steering plan"),
    "steer": ("austeer.commands.steer", "answers without and with a plan, side by side"),
    "export": ("austeer.export.command", "a plan -> a folded checkpoint, a LoRA, IA3 or GGUF adapter; and back"),
    "serve": ("austeer.export.serve", "plans as named models of a vLLM server"),
    "models": (
        "austeer.commands.models",
        "every model family of the installed transformers, tried: sites, folds, adapters",
    ),
    "methods": ("austeer.commands.methods", "the methods that make plans, by name"),
}
EXAMPLES = """\
austeer rank --model M --pairs pairs.jsonl --site ffn --out ranks.safetensors
austeer plan --ranks ranks.safetensors --k 16 --alpha 2 --out plan.safetensors
austeer steer --model M --plan plan.safetensors --prompt "The weather today"
austeer export --model M --plan plan.safetensors --fold M-steered"""


def main(argv: Sequence[str] | None = None) -> int | None:
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
        return None
    if name == "--version":
        from austeer import __version__

        print(f"austeer {__version__}")
        return None
    if name not in COMMANDS:
        raise AUSteerError(f"there is no command {name!r}; the commands are {', '.join(COMMANDS)}")
    # imported on demand: most commands need torch, which takes seconds
    return importlib.import_module(COMMANDS[name][0]).main(rest, prog=f"austeer {name}")


def run() -> None:
    """Run the command line as a program: one line for an error, and an exit code."""
    run_command(main)


def _help() -> str:
    commands = "\n".join(f"  {name:<8} {what}" for name, (_, what) in COMMANDS.items())
    examples = "\n".join(f"  {line}" for line in EXAMPLES.splitlines())
    return (
        "usage: austeer COMMAND [options]\n\nSteer a language model by a few of its atomic units.\n\n"
        f"commands (each has its own --help):\n{commands}\n\nexamples:\n{examples}"
    )
