"""Every method by name, in the order of tables. A new method is a file beside this one and a line here."""

from __future__ import annotations

import inspect

from austeer.errors import AUSteerError
from austeer.methods.all_aus import AllAUs
from austeer.methods.attribution import AttributionAUs, AttributionHeads
from austeer.methods.austeer import (
    AUSteer,
    Causal,
    CausalLocation,
    CausalSign,
    DifferenceAUs,
    FixedStrength,
    FlippedAUs,
    RandomAUs,
    SignAware,
    Suppress,
)
from austeer.methods.base import Method
from austeer.methods.both_sites import CausalBoth
from austeer.methods.caa import CAA
from austeer.methods.counted import CausalCounted
from austeer.methods.greedy import CausalGreedy
from austeer.methods.iti import ITI
from austeer.methods.learned_scaling import LearnedScaling
from austeer.methods.linear_act import LinearAcT
from austeer.methods.mean_difference import FixedVector, MeanDifference
from austeer.methods.mediation import Mediation
from austeer.methods.neurosteer import NeuroSteer
from austeer.methods.predicted import CausalPredicted
from austeer.methods.restore_lcc import RestoreLCC
from austeer.methods.sadi import SADIHead, SADIHidden, SADINeuron
from austeer.methods.significance import CausalFDR, PublishedFDR
from austeer.methods.sta import STA

_ALL = (
    RandomAUs(), FlippedAUs(), AUSteer(), SignAware(), Causal(),
    CausalBoth(), PublishedFDR(), CausalFDR(), CausalGreedy(), CausalPredicted(),
    DifferenceAUs(), FixedStrength(), FixedVector(), Suppress(), CausalLocation(), CausalSign(), CausalCounted(),
    AllAUs(), MeanDifference(),
    ITI(), ITI("probe"), CAA(), SADIHead(), SADINeuron(), SADIHidden(), STA(), NeuroSteer(),
    LinearAcT(), AttributionAUs(), AttributionHeads(), Mediation(), LearnedScaling(),
)  # fmt: skip
METHODS: dict[str, Method] = {method.name: method for method in _ALL}
# repairs a pruned model, which the others do not have: main.py restore
OWN_COMMAND: dict[str, type[Method]] = {RestoreLCC.name: RestoreLCC}
# the comparison of the first page
DEFAULT = ("random", "flipped", "published", "sign-aware", "causal")


def with_options(name: str, options: dict[str, str]) -> Method:
    """A method built with other options than its own, given as text: {"readout": "answer"}."""
    method, known = METHODS[name], options_of(name)
    for key, text in options.items():
        if key not in known:
            there = f"its options: {', '.join(known)}" if known else "it has none"
            raise AUSteerError(f"{name} has no option {key!r}; {there}")
        known[key] = _as_type(type(known[key]), text, f"{name}.{key}")
    return type(method)(**known) if options else method


def options_of(name: str) -> dict[str, object]:
    """What a method can be built with, and what it is."""
    method = METHODS[name]
    return {key: getattr(method, key) for key in inspect.signature(type(method)).parameters if hasattr(method, key)}


def _as_type(kind: type, text: str, what: str) -> object:
    if kind is bool:
        if text.lower() not in ("yes", "no", "true", "false"):
            raise AUSteerError(f"{what} is yes or no, not {text!r}")
        return text.lower() in ("yes", "true")
    if kind not in (int, float):
        return text
    try:
        return kind(text)
    except ValueError:
        raise AUSteerError(f"{what} is a number, not {text!r}") from None
