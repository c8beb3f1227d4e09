"""AUSteer: steer a language model by a few of its atomic units.

    import austeer
    model, tokenizer = austeer.load("meta-llama/Llama-2-7b-chat-hf"), austeer.load_tokenizer("meta-llama/Llama-2-7b-chat-hf")
    ranks = austeer.MFU_screening(austeer.read_pairs("pairs.jsonl"), model, tokenizer, applied_module="ffn")
    with austeer.steer(model, austeer.set_MFU(ranks, k=16, alpha=2.0)):
        model.generate(...)

Each name is imported when it is first used: `rmodels` needs `austeer.errors` while `austeer` needs `rmodels`, and
importing torch takes seconds that `austeer --help` should not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from austeer.errors import AUSteerError
    from austeer.evidence import Evidence
    from austeer.methods.registry import METHODS
    from austeer.pairs import Pair, read_pairs
    from austeer.plan import Plan
    from austeer.ranks import AURanks
    from austeer.steering import apply, clear, steer
    from MFU_screening import MFU_screening, screen
    from rmodels import gates, load, load_tokenizer
    from set_MFU import set_MFU

    __version__: str

__all__ = [
    "METHODS", "AURanks", "AUSteerError", "Evidence", "MFU_screening", "Pair", "Plan", "__version__", "apply", "clear",
    "gates", "load", "load_tokenizer", "read_pairs", "screen", "set_MFU", "steer",
]  # fmt: skip

_HOMES = {
    "austeer.errors": ("AUSteerError",),
    "austeer.evidence": ("Evidence",),
    "austeer.methods.registry": ("METHODS",),
    "austeer.pairs": ("Pair", "read_pairs"),
    "austeer.plan": ("Plan",),
    "austeer.ranks": ("AURanks",),
    "austeer.steering": ("apply", "clear", "steer"),
    "MFU_screening": ("MFU_screening", "screen"),
    "rmodels": ("gates", "load", "load_tokenizer"),
    "set_MFU": ("set_MFU",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name == "__version__":
        return _version()
    if name not in _HOME_OF:
        raise AttributeError(f"module 'austeer' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("austeer")
    except PackageNotFoundError:
        return "checkout"
