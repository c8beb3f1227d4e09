"""The command that tries all model families: `python main.py models`, or `austeer models`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import rmodels
from austeer import arguments
from austeer.errors import AUSteerError, missing_extra
from austeer.export.hot_patch import folded
from austeer.export.lora import save_lora
from austeer.files import check_writable, write_text
from austeer.plan import Plan
from austeer.steering import steer
from rmodels.proof import TOLERANCES
from rmodels.tiny import CLASSES, tiny_config, tiny_model

DESCRIPTION = """\
Try every family of language models that the installed transformers has, each as a tiny random model: put gates into it,
prove them, fold a plan into its weights, and load the plan as a LoRA through PEFT. A family that fails is a row with its
reason."""
SITES = ("attention", "ffn", "neuron", "layer")  # the layer's output does not fold
TOKENS = 12
LONGEST = 160  # letters of a reason
TOLERANCE = TOLERANCES[torch.float32]
HEADINGS = ("model type", "class", "sites", "proof", "fold", "LoRA", "seconds", "why not")
COLUMNS = """\
- sites: where its gates are proven, on the model itself (`rmodels/proof.py`)
- proof: the largest difference of logits between a gate and the scaled weight (or a plain hook, where no weight can be
  scaled), divided by the largest logit
- fold: the same between a plan steered live and folded into the weights, and at which sites, if not at all that could
- LoRA: where the plan, as a LoRA adapter loaded by PEFT, gives the logits of live steering"""


@dataclass
class Family:
    """Hold what became of one model type: errors by site where something worked, reasons where it did not."""

    model_type: str
    proof: dict[str, float] = field(default_factory=dict)
    fold: dict[str, float] = field(default_factory=dict)
    lora: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)  # by site, by "fold SITE" or "LoRA SITE"; "" is the family
    seconds: float = 0.0

    def row(self) -> tuple[str, ...]:
        could_fold = [site for site in self.proof if site != "layer"]

        def where(errors: dict[str, float], all_of_them: str) -> str:
            if not errors:
                return "-"
            return all_of_them if len(errors) == len(could_fold) else f"{all_of_them} ({' '.join(errors)})"

        return (
            self.model_type,
            CLASSES[self.model_type],
            " ".join(self.proof) or "-",
            _largest(self.proof),
            where(self.fold, _largest(self.fold)),
            where(self.lora, "yes"),
            f"{self.seconds:.1f}",
            self.why_not(),
        )

    def why_not(self) -> str:
        what: dict[str, list[str]] = {}
        for place, reason in self.reasons.items():
            what.setdefault(reason, []).append(place)
        return "; ".join(f"{', '.join(places)}: {reason}" if all(places) else reason for reason, places in what.items())


def try_family(model_type: str) -> Family:
    """Build, prove, fold and export one family. Whatever goes wrong becomes a reason."""
    family, start = Family(model_type), time.monotonic()
    what = "cannot be built small: "
    try:
        model = tiny_model(tiny_config(model_type))
        what = ""
        model = rmodels.with_proven_gates(model)
        errors, refused = model.au_proof_errors, getattr(model, "au_refused", {})
        for site in SITES:
            if site in rmodels.sites(model):
                family.proof[site] = errors[site]
            else:
                family.reasons[site] = refused.get(site, "the family file leaves it out")
        _try_exports(family, model)
    except Exception as error:  # of any kind: the families are transformers' code, and one must not stop the others
        family.reasons[""] = what * (not isinstance(error, AUSteerError)) + _in_a_few_words(error)
    family.seconds = time.monotonic() - start
    return family


def _try_exports(family: Family, model: PreTrainedModel) -> None:
    ids = torch.arange(TOKENS)[None] + 7
    for site in [site for site in family.proof if site != "layer"]:
        plan = _some_plan(model, site)
        idle = _logits(model, ids)
        with steer(model, plan):
            live = _logits(model, ids)
        if _difference(live, idle) < 100 * TOLERANCE:
            family.reasons[f"fold {site}"] = "the plan moves no logit"
            continue
        for name, errors, export in (("fold", family.fold, _folded), ("LoRA", family.lora, _with_lora)):
            try:
                errors[site] = _difference(export(model, plan, ids), live)
                if not errors[site] <= TOLERANCE:
                    raise AUSteerError(f"differs by {errors.pop(site):.0e}")
            except Exception as error:
                family.reasons[f"{name} {site}"] = _in_a_few_words(error)


def _some_plan(model: PreTrainedModel, site: str) -> Plan:
    """Scale four AUs of every layer that has the site."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.zeros(rmodels.site_shape(model, site))
    for gate in rmodels.gates(model, site):
        if gate.width:
            scale[gate.layer, torch.randperm(gate.width, generator=generator)[:4]] = torch.tensor(
                [1.5, -0.5, 2.0, -2.5]
            )
    return Plan({site: scale})


@torch.no_grad()
def _logits(model: Callable, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def _folded(model: PreTrainedModel, plan: Plan, ids: Tensor) -> Tensor:
    with folded(model, plan):
        return _logits(model, ids)


def _with_lora(model: PreTrainedModel, plan: Plan, ids: Tensor) -> Tensor:
    if find_spec("peft") is None:
        raise missing_extra("peft", "export")
    from peft import PeftModel  # takes seconds

    with TemporaryDirectory() as folder:
        save_lora(model, plan, Path(folder) / "lora")
        adapted = PeftModel.from_pretrained(model, str(Path(folder) / "lora"))
    try:
        return _logits(adapted, ids)
    finally:
        adapted.unload()


def _difference(some: Tensor, others: Tensor) -> float:
    return float((some - others).abs().max() / others.abs().max())


def _largest(errors: dict[str, float]) -> str:
    if not errors:
        return "-"
    return f"{max(errors.values()):.0e}" if any(errors.values()) else "0"


def _in_a_few_words(error: Exception) -> str:
    name = "" if isinstance(error, AUSteerError) else f"{type(error).__name__}: "
    words = " ".join(str(error).partition(";")[0].split()).removesuffix(".")
    return name + (words if len(words) <= LONGEST else f"{words[:LONGEST]} ...")


def counts(families: Sequence[Family]) -> list[tuple[str, ...]]:
    """Count the families with each site proven, and of those with the same by fold and by LoRA."""
    rows = [("site", "gate = weight or hook", "= fold", "= LoRA")]
    for site in SITES:
        numbers = [
            sum(site in errors for errors in (vars(family)[kind] for family in families))
            for kind in ("proof", "fold", "lora")
        ]
        rows.append((site, *map(str, numbers)) if site != "layer" else (site, str(numbers[0]), "-", "-"))
    return rows


def _document(families: Sequence[Family], command: str) -> str:
    steered = [family for family in families if family.proof]
    others = [family for family in families if not family.proof]
    return "\n".join(
        [
            "# Models: what was tried with which result", "",
            "Made by", "",
            f"    {command}", "",
            f"with transformers {transformers.__version__}, in float32, on tiny random models of the true classes. "
            f"Of {len(families)} model types, {len(steered)} can be steered:", "",
            *_markdown(counts(families)), "",
            COLUMNS, "",
            "## Families that can be steered", "",
            *_markdown([HEADINGS, *(family.row() for family in steered)]), "",
            "## The others", "",
            *_markdown([("model type", "class", "why not"), *((*family.row()[:2], family.reasons[""]) for family in others)]), "",
        ]
    )  # fmt: skip


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = arguments.parser(prog or "main.py models", DESCRIPTION)
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="these model types (default: all, some minutes)")
    parser.add_argument("--out", help="also write the table to this file, as Markdown")
    args = parser.parse_args(argv)
    if unknown := set(args.only or ()) - set(CLASSES):
        raise AUSteerError(
            f"transformers {transformers.__version__} has no language model of type {min(unknown)!r}; "
            "name the model_type of a config.json"
        )
    if args.out:
        check_writable(Path(args.out))
    transformers.logging.set_verbosity_error()
    families = []
    for number, model_type in enumerate(chosen := args.only or sorted(CLASSES), 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            families.append(try_family(model_type))
        name, _, *rest, seconds, why_not = families[-1].row()
        print(
            f"{number}/{len(chosen)} {name}: "
            + ", ".join(f"{heading} {cell}" for heading, cell in zip(HEADINGS[2:], [*rest, seconds], strict=False))
            + f"  {why_not}",
            flush=True,
        )
    for row in counts(families):
        print("  ".join(f"{cell:<21}" for cell in row).rstrip())
    if args.out:
        only = f" --only {' '.join(args.only)}" if args.only else ""
        write_text(Path(args.out), _document(families, f"python main.py models{only} --out {args.out}"))
        print(f"written to {args.out}")
