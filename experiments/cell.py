"""A cell: a model, a task, a method and a search. Nothing else decides its number.

Specs of tables (paper/specs) and command lines describe a cell as one flat dict, such as {"model": ..., "task": ..., "ks": ...};
`cell_of` sorts its fields into the four parts and refuses a field that none of them has.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from austeer.errors import AUSteerError
from austeer.methods.registry import METHODS
from austeer.pairs import FIELDS

EMBEDDED = "embedded"  # also embedded-VARIANT: another model of the same task, such as embedded-seed1
UNSTEERED = ("vanilla", "prompt-only")
LIVE = "live"
AT_KL = "at-kl"


@dataclass(frozen=True)
class ModelSpec:
    name: str  # "embedded" or one of its variants, or what rmodels.load takes: a hub id, a folder, a GGUF file
    device: str | None = None
    dtype: str = "auto"
    quantization: str | None = None
    attn: str | None = None  # attention kernel; None: the default of rmodels.load
    weights: str | None = None  # folder or GGUF file of the weights, if the name does not say where they are
    engine: str = LIVE  # who answers: the model itself, or vLLM
    quick_proof: bool = False  # how the model is proven at load; records do not depend on it

    @property
    def embedded(self) -> bool:
        return self.name.partition("-")[0] == EMBEDDED

    @property
    def variant(self) -> str:
        """Return "-seed1" for embedded-seed1, and "" for the embedded model of a task."""
        return self.name.removeprefix(EMBEDDED)


@dataclass(frozen=True)
class PairsSpec:
    """Select the contrastive pairs that methods learn from. Unsteered cells do not depend on them."""

    n_pairs: int | None = None  # use only the first n
    pairs_draw: int | None = None  # seed by which n are drawn instead, in whole groups
    general_pairs: bool = False  # wrong answers by the paper's general recipe
    encoder: str | None = None  # sentence encoder that finds similar wrong answers
    swapped_choices: bool = False  # every item of COPA also with its choices swapped


@dataclass(frozen=True)
class TaskSpec:
    name: str  # a task of the embedded models, one of the paper, or the file of a user's pairs
    fields: tuple[str, str, str] = FIELDS  # columns of that file
    test_split: str = "test"
    limit: int | None = None  # at most this many items per split
    data_dir: str | None = None
    neutral: str | None = None  # file of neutral text; None: WikiText-2 in data_dir, or the project's prose
    protocol: str = "clean"
    toxicity: str = "local"
    chat: bool = False
    batch_size: int | None = None
    per_token: bool = False  # likelihoods of whole answers are compared per token
    pairs: PairsSpec = field(default_factory=PairsSpec)

    @property
    def label(self) -> str:
        return Path(self.name).stem


@dataclass(frozen=True)
class MethodSpec:
    name: str
    site: str | None = None  # None: nothing is steered
    draw: int = 0
    options: tuple[tuple[str, str], ...] = ()  # (("readout", "answer"), ...)


@dataclass(frozen=True)
class SearchSpec:
    kind: str = "grid"  # a key of experiments.search.SEARCHES, or "at-kl": no search, but a stated KL
    ks: tuple[int, ...] = ()  # values to try instead of the method's own; a single k and alpha mean no search
    alphas: tuple[float, ...] = ()
    level: float | None = None  # that KL, in nats per token; None for what has no strength


@dataclass(frozen=True)
class Cell:
    model: ModelSpec
    task: TaskSpec
    method: MethodSpec
    search: SearchSpec = field(default_factory=SearchSpec)

    @property
    def steered(self) -> bool:
        return self.method.name not in UNSTEERED

    def unsteered(self, name: str = "vanilla") -> Cell:
        """Return the cell of the same items without steering, which all methods, pairs and searches share."""
        return Cell(self.model, replace(self.task, pairs=PairsSpec()), MethodSpec(name))

    def __str__(self) -> str:
        return " ".join(filter(None, (self.task.label, self.method.site, self.method.name)))


_PARTS = {ModelSpec: "model", TaskSpec: "task", PairsSpec: "", MethodSpec: "method", SearchSpec: "search"}
_FLAT = {  # flat name of a field -> the part it belongs to, and its name there
    (_PARTS[part] if item.name in ("name", "kind") else item.name): (part, item.name)
    for part in _PARTS
    for item in fields(part)
    if item.name != "pairs"
}
FIELD_NAMES = frozenset(_FLAT)


def cell_of(**flat) -> Cell:
    """Build a cell from flat fields, leaving out the options of other methods."""
    parts = _parts(flat)
    method = parts[MethodSpec]
    method["options"] = tuple(
        (key.partition(".")[2], value)
        for key, value in method.get("options", ())
        if key.partition(".")[0] == method["name"]
    )
    cell = Cell(*_bench_specs(parts), MethodSpec(**method), SearchSpec(**parts[SearchSpec]))
    return cell if cell.steered else cell.unsteered(cell.method.name)


def at_kl(cell: Cell, level: float) -> Cell:
    """Return the cell at a stated KL. What has no strength, such as an instruction, stands at the KL that it has."""
    has_strength = cell.steered and METHODS[cell.method.name].scalable
    return replace(cell, search=replace(cell.search, kind=AT_KL, level=level if has_strength else None))


def bench_of(**flat) -> tuple[ModelSpec, TaskSpec]:
    """Return the model and the task to open a bench with, from flat fields."""
    return _bench_specs(_parts(flat))


def _parts(flat: dict) -> dict[type, dict]:
    unknown = sorted(set(flat) - FIELD_NAMES)
    if unknown:
        raise AUSteerError(f"a cell has no field {', '.join(unknown)}; its fields: {', '.join(sorted(FIELD_NAMES))}")
    parts: dict[type, dict] = {part: {} for part in _PARTS}
    for name, value in flat.items():
        part, own_name = _FLAT[name]
        parts[part][own_name] = _frozen(value)
    return parts


def _bench_specs(parts: dict[type, dict]) -> tuple[ModelSpec, TaskSpec]:
    return ModelSpec(**parts[ModelSpec]), TaskSpec(**parts[TaskSpec], pairs=PairsSpec(**parts[PairsSpec]))


def _frozen(value):
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
