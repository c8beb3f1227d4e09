"""Measure what gates by structure cost against those of a family file: time per token of the same Llama on the same weights.

    python benchmarks/structure.py [--out FILE.json]

Five ways take turns token by token: upstream's unpatched model, and both kinds of gates, idle and live at site attention.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from core import build, build_upstream
from decoding import against_first, on_weights_of, shared, sparse_plan
from figures import keep, show

import rmodels
from austeer.errors import run_command
from austeer.steering import apply

TURNS = 200


def ways(model) -> dict:
    """Return the ways by name; all compute on the weights of `model`, a family file's."""
    plan = sparse_plan("attention", rmodels.site_shape(model, "attention"))
    by_kind = {
        "family file": lambda: shared(model),
        "structure": lambda: on_weights_of(model, rmodels.with_proven_gates(build_upstream(model))),
    }
    result = {"upstream": on_weights_of(model, build_upstream(model))}
    for kind, make in by_kind.items():
        result[f"{kind}, idle"], result[f"{kind}, live"] = make(), make()
        apply(result[f"{kind}, live"], plan)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also save the figures, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures = {name: asdict(one) for name, one in against_first(ways(build()), batch=1, turns=TURNS).items()}
    show({name: f"{one['ratio']:.3f} [{one['low']:.3f}, {one['high']:.3f}]" for name, one in figures.items()})
    keep(figures, args.out)


if __name__ == "__main__":
    run_command(main)
