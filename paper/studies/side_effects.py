"""Ours: what a method changes beside its task, at the KL where methods are compared: other tasks, reworded prompts, plain text, items.

params: methods (label -> {"method", "site"}), level (KL in nats per token), tasks (others than the panel's), n (items of each).

Three gates at one operating point, after FaithSteer (arXiv 2603.18329). Controllable: the task itself gains significantly.
Harmless: no other task loses significantly (Holm-adjusted), and the perplexity of neutral text rises by less than DEARER.
Robust: under every rewording of the prompts at least half of the gain is left, the unsteered model reworded alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from austeer.change import Change, applied
from austeer.methods.few_shot import with_prompt
from eval.answering.answer_file import Answer
from eval.decomposition import LIKELIER
from eval.statistics import holm, mcnemar
from eval.tasks.base import Task
from eval.tasks.open_text import token_losses
from experiments.bench import BENCHES, Bench
from experiments.cell import AT_KL, Cell, MethodSpec, PairsSpec, SearchSpec
from experiments.costs import neutral_of
from experiments.engines.answering import answering
from experiments.equal_kl import Unreached
from experiments.parts_report import LEVEL, LOG_ODDS
from experiments.records import record_id
from experiments.run_cell import RunAtKL, cell_key, grid, method_of
from experiments.search import key_of
from paper.studies import picture

DEARER = 1.05
INSTRUCTION = "an instruction in front"
REWORDED = {  # what a prompt becomes; a wording that leaves all prompts as they are is left out
    "in lower case": str.lower,
    "as something said": lambda prompt: f'Somebody said: "{prompt}',
    "another link": lambda prompt: prompt.replace(" because", ". The reason is that").replace(", so", ". As a result,"),
}


@dataclass(frozen=True)
class Found:
    """Hold the answers to some items: which are right, and the log-odds of the right option where there are options."""

    right: list[bool]
    odds: list[float] | None


def measure(bench: Bench, params: dict, progress: bool) -> dict:
    """Return, for each method at the level, its KL and how answers, perplexity and single items change; and what reached no plan."""
    sets = {"itself": (bench.task, bench.task.test[: params["n"]])}
    sets |= {f"worded: {name}": (bench.task, items) for name, items in _reworded(bench.task, params["n"]).items()}
    sets |= {name: (task, task.test[: params["n"]]) for name, task in _other_tasks(bench, params).items()}
    before = {name: _found(bench, task, items, None) for name, (task, items) in sets.items()}
    plain = _perplexity(bench, None)
    result: dict = {"task": bench.task_spec.label, "level": params["level"], "methods": {}, "unreached": {}}
    for label, method in tqdm(params["methods"].items(), desc="side effects", disable=not progress):
        try:
            change, kl = _at_level(bench, method["method"], method["site"], params["level"])
        except Unreached as why:
            result["unreached"][label] = str(why)
            continue
        after = {name: _found(bench, task, items, change) for name, (task, items) in sets.items()}
        counts = {name: mcnemar(before[name].right, after[name].right) for name in sets}
        result["methods"][label] = {
            "kl": kl, "perplexity": _perplexity(bench, change) / plain,
            "sets": {name: [gained, lost, len(before[name].right), p] for name, (gained, lost, p) in counts.items()},
            "worse": _share_worse(before["itself"], after["itself"]),
        }  # fmt: skip
    return result


def depends_on(bench: Bench, params: dict) -> dict:
    """Return what the result depends on beside the bench: the neutral text, and the items of the other tasks."""
    items = {name: task.fingerprint for name, task in _other_tasks(bench, params).items()}
    return {"neutral": neutral_of(bench).hash, "items_of_others": items}


def _other_tasks(bench: Bench, params: dict) -> dict[str, Task]:
    spec = replace(bench.task_spec, pairs=PairsSpec())
    return {
        name: BENCHES.open(bench.model_spec, replace(spec, name=name), bench.store).task for name in params["tasks"]
    }


def n_prompts(params: dict, n_pairs: int, n_validation: int) -> int:
    sets = 2 + len(REWORDED) + len(params["tasks"])
    return (1 + len(params["methods"])) * sets * params["n"] + 3 * len(params["methods"]) * n_pairs


def _reworded(task: Task, n: int) -> dict[str, list]:
    items = list(task.test[:n])
    sets = {INSTRUCTION: task.prompted(items)}
    for name, reword in REWORDED.items():
        changed = [with_prompt(item, reword(item.prompt)) for item in items]
        if changed != items:
            sets[name] = changed
    return sets


def _at_level(bench: Bench, name: str, site: str, level: float) -> tuple[Change, float]:
    """Return a method's change at a KL, its other choices made on validation, and the KL that was measured."""
    cell = Cell(bench.model_spec, bench.task_spec, MethodSpec(name, site), SearchSpec(AT_KL, level=level))
    run, method = RunAtKL(cell, bench, record_id(cell_key(cell, bench))), method_of(cell.method)
    learned, _ = run.learned(method)
    brought, why = {}, Unreached("it has no candidates")
    for point in grid(cell):
        try:
            brought[key_of(point)] = (point, *run.at_level(method, learned, point))
        except Unreached as reason:
            why = reason
    if not brought:
        raise why
    chosen, _ = run.best_of(method, learned, brought)
    _, change, cost = brought[chosen]
    return change, cost["measured"]


def _found(bench: Bench, task: Task, items: Sequence, change: Change | None) -> Found:
    """Return how the bench's model answers items of any task under a change."""
    with answering(bench, [change], len(items)) as (answerer, _):
        answers = task.answers(answerer, items)
    scores = task.columns(items, answers)
    odds = scores.columns.get(LOG_ODDS) or _odds(task, items, answers)
    return Found(scores.columns.get(LIKELIER) or scores.outcomes, odds)


def _odds(task: Task, items: Sequence, answers: Sequence[Answer]) -> list[float] | None:
    preferences = task.preferences(items, answers)
    return preferences and [odds if first else -odds for odds, first in zip(*preferences, strict=True)]


def _perplexity(bench: Bench, change: Change | None) -> float:
    """Return the perplexity of the second halves of the neutral text that nothing was chosen on."""
    texts: Tensor = neutral_of(bench).part("report")
    half = texts.shape[1] // 2
    with applied(bench.model, change, prompt_end=half):
        nats, tokens = token_losses(bench.model, texts.tolist(), [half] * len(texts))
    return math.exp(sum(nats) / sum(tokens))


def _share_worse(before: Found, after: Found) -> float | None:
    """Return the share of items whose right option became less likely."""
    if before.odds is None or after.odds is None:
        return None
    return float(np.mean(np.asarray(after.odds) < np.asarray(before.odds)))


def gates(found: dict) -> dict[str, bool]:
    """Return whether a method passes each of the three gates."""
    sets = found["sets"]
    gains = {name: (gained - lost) / n for name, (gained, lost, n, _) in sets.items()}
    others = [name for name in sets if name != "itself" and not name.startswith("worded: ")]
    adjusted = dict(zip(others, holm([sets[name][3] for name in others]), strict=True))
    return {
        "controllable": gains["itself"] > 0 and sets["itself"][3] < LEVEL,
        "harmless": found["perplexity"] < DEARER
        and not any(gains[name] < 0 and adjusted[name] < LEVEL for name in others),
        "robust": gains["itself"] > 0
        and all(gain >= gains["itself"] / 2 for name, gain in gains.items() if name.startswith("worded: ")),
    }


def draw(result: dict, params: dict, path: Path, printed: object) -> None:
    """Draw a table: gains on the task, its rewordings and other tasks in points, then perplexity and items that became worse."""
    methods = result["methods"]
    columns = list(next(iter(methods.values()))["sets"])
    gains = np.array(
        [[100 * (gained - lost) / n for gained, lost, n, _ in found["sets"].values()] for found in methods.values()]
    )
    figure, axes = picture.subplots(1, (5.5 + 1.15 * len(columns), 2.4 + 0.5 * len(methods)), squeeze=False)
    axis, most = axes[0][0], max(1.0, float(np.abs(gains).max()))
    image = axis.imshow(gains, cmap="PuOr_r", vmin=-most, vmax=most, aspect="auto")
    texts = [
        [
            f"{gain:+.1f}" + ("*" if one[3] < LEVEL else "")
            for gain, one in zip(row, found["sets"].values(), strict=True)
        ]
        for row, found in zip(gains, methods.values(), strict=True)
    ]
    picture.write_labels(axis, gains, image, texts)
    sizes = [n for _, _, n, _ in next(iter(methods.values()))["sets"].values()]
    names = [f"{name.removeprefix('worded: ')} ({n})" for name, n in zip(columns, sizes, strict=True)]
    axis.set_xticks(range(len(columns)), names, rotation=30, ha="right")
    axis.set_yticks(range(len(methods)), [f"{label} {_marks(found)}" for label, found in methods.items()])
    figure.colorbar(image, ax=axes, label="gain, points")
    figure.suptitle(f"{result['task']}: side effects at {result['level']:g} nats", fontsize=14)
    picture.save(figure, path)


def _marks(found: dict) -> str:
    return "".join(name[0].upper() if passed else "–" for name, passed in gates(found).items())


def note(result: dict, params: dict) -> str:
    """Say how to read the picture, and which gates each method passes."""
    lines = []
    for label, found in result["methods"].items():
        passed = [name for name, is_passed in gates(found).items() if is_passed]
        worse = (
            ""
            if found["worse"] is None
            else f", the right option became less likely in {100 * found['worse']:.0f} % of items"
        )
        lines.append(
            f"{label}: {found['kl']:.3g} nats, perplexity of neutral text times {found['perplexity']:.3f}{worse}; "
            f"passes {', '.join(passed) or 'no gate'}."
        )
    lines += [f"{label} is left out: {why}." for label, why in result["unreached"].items()]
    return (
        "Gains in points over the unsteered model, worded alike, by the likelier option where there are options; * p < "
        f"{LEVEL:g} by McNemar's test, not adjusted. C, H, R: controllable (the task itself gains significantly), harmless (no other "
        f"task loses significantly, Holm-adjusted, and perplexity rises by less than {100 * DEARER - 100:.0f} %), robust (every rewording "
        f"keeps half of the gain, which compares estimates and is no test). {' '.join(lines)}"
    )
