"""Figures 2, 6, 7 and 8: the single dimensions of one block, each steered alone, against the block as a whole.

params: site, layer, head (None: the whole layer's output), step (every so many dimensions), alpha (x -> (1 + alpha) x),
    n (items of either split, at most), positive and mixed (how many of the best dimensions make the positive
    combination, and how many of the worst join them in the mixed one), lines (numbers to show beside, such as the
    paper's: label -> accuracy in percent), paper_dims (the dimensions that the paper combined on this block of this
    model, if it is one of the paper's: positive, and mixed, which join those).

The combinations are chosen twice: on validation items, and, as the paper did, on the very test items they are then
tested on; where the paper's own are known, they are tested too. SADI and ITI edit this block alone, at the strength
that is best on validation.
"""

from __future__ import annotations

from pathlib import Path

from austeer.errors import AUSteerError
from austeer.evidence import Evidence
from austeer.methods.iti import ALPHAS as ITI_ALPHAS
from austeer.methods.iti import ITI
from austeer.methods.sadi import SADIHead, SADIHidden
from austeer.plan import Plan
from eval.statistics import holm, mcnemar, wilson
from experiments.bench import Bench
from paper.studies import picture
from paper.studies.block import Asked, Block

CHOSEN = {  # who chose a combination: its lines, and what they are called
    "validation": ("-", "chosen on validation"),
    "test": (":", "chosen on test"),  # the paper's way
    "paper": ("-.", "the paper's dimensions"),
}


def measure(bench: Bench, params: dict, progress: bool) -> dict:
    model, tokenizer, task = bench.model, bench.tokenizer, bench.task
    block, alpha = Block.of(model, params), params["alpha"]
    dims = list(range(0, block.width, params["step"]))
    splits = {"validation": task.validation[: params["n"]], "test": task.test[: params["n"]]}
    asked = {part: Asked(bench, items) for part, items in splits.items() if items}
    unsteered = {part: asking.scores(block.plan({})) for part, asking in asked.items()}
    vanilla = {part: scores.outcomes for part, scores in unsteered.items()}
    swept = {part: asking.sweep(block, dims, alpha, progress, part) for part, asking in asked.items()}

    def tested(plan: Plan) -> dict:
        outcomes = asked["test"].outcomes(plan)
        return {"right": sum(outcomes), "p": mcnemar(vanilla["test"], outcomes)[2]}

    choose = next(iter(asked))  # validation, if there is one

    def best_of(plans: dict[float, Plan]) -> dict:
        strength = max(plans, key=lambda strength: sum(asked[choose].outcomes(plans[strength])))
        return {"alpha": strength, "chosen_on": choose, **tested(plans[strength])}

    whole = {"block": {"alpha": alpha, **tested(block.plan(dict.fromkeys(range(block.width), alpha)))}}
    whole["sadi"] = best_of(_sadi(block, bench.grid_kind))
    if block.head is not None:
        iti = ITI().prepare(Evidence(model, tokenizer, task.pairs, block.site, _no_ranks))
        whole["iti"] = best_of(_iti(block, iti, bench.grid_kind))

    combinations = {}
    for part in asked:
        gains = {dim: sum(outcomes) - sum(vanilla[part]) for dim, outcomes in zip(dims, swept[part], strict=True)}
        good, bad = _beneficial(gains, params["positive"]), _detrimental(gains, params["mixed"])
        combinations[part] = {"positive": _combined(block, good, alpha, tested)}
        if good and bad:
            combinations[part]["mixed"] = _combined(block, good + bad, alpha, tested)
    if "paper_dims" in params:
        good, bad = (params["paper_dims"][key] for key in ("positive", "mixed"))
        combinations["paper"] = {
            "positive": _combined(block, good, alpha, tested),
            "mixed": _combined(block, good + bad, alpha, tested),
        }
    ps = holm([mcnemar(vanilla["test"], outcomes)[2] for outcomes in swept["test"]])
    return {
        "task": bench.task_spec.label,
        "where": str(block),
        "measure": unsteered["test"].main,
        "n": {part: len(outcomes) for part, outcomes in vanilla.items()},
        "vanilla": {part: sum(outcomes) for part, outcomes in vanilla.items()},
        "dims": dims,
        "right": {part: [sum(outcomes) for outcomes in by_dim] for part, by_dim in swept.items()},
        "p_holm": ps,  # of each dimension on the test split, adjusted for their number
        "whole": whole,
        "combinations": combinations,  # by who or what chose them; all are tested on the test split
    }


def _beneficial(gains: dict[int, int], count: int) -> list[int]:
    """The best, among those that help at all; ties go to the lower dimension."""
    return sorted((dim for dim in gains if gains[dim] > 0), key=lambda dim: (-gains[dim], dim))[:count]


def _detrimental(gains: dict[int, int], count: int) -> list[int]:
    return sorted((dim for dim in gains if gains[dim] < 0), key=lambda dim: (gains[dim], dim))[:count]


def _combined(block: Block, dims: list[int], alpha: float, tested) -> dict:
    return {"dims": dims, **tested(block.plan(dict.fromkeys(dims, alpha)))}


def _sadi(block: Block, kind: str) -> dict[float, Plan]:
    """SADI scales all of a head, from the prompt's last token on."""
    alphas = (SADIHead if block.head is not None else SADIHidden).axes["alpha"][kind]
    return {alpha: block.plan(dict.fromkeys(range(block.width), alpha), "last") for alpha in alphas}


def _iti(block: Block, heads, kind: str) -> dict[float, Plan]:
    direction = heads.sigma[block.layer, block.head] * heads.direction[block.layer, block.head]
    return {a: block.shifted(a * direction, "last") for a in ITI_ALPHAS[kind]}


def _no_ranks(momentum: str):
    raise AUSteerError("ITI ranks heads by its own probes")


def draw(found: dict, params: dict, path: Path) -> None:
    figure, axis = picture.subplots(size=(12.5, 5.8))
    n, dims = found["n"]["test"], found["dims"]

    def percent(right: int) -> float:
        return 100 * right / n

    swept = [percent(right) for right in found["right"]["test"]]
    axis.plot(dims, swept, "-o", color=picture.BLUE, mfc="white", ms=7, lw=1.2, label="one dimension alone", zorder=3)
    sure = [(dim, y) for dim, y, p in zip(dims, swept, found["p_holm"], strict=True) if p < 0.05]
    if sure:
        label = "the same, differs from vanilla (McNemar, Holm, p < 0.05)"
        axis.plot(*zip(*sure, strict=True), "o", color=picture.BLUE, ms=7, label=label, zorder=4)
    low, high = (100 * edge for edge in wilson(found["vanilla"]["test"], n))
    axis.axhspan(low, high, color=picture.GREY, alpha=0.12, lw=0, label="vanilla, 95 % interval")
    picture.draw_levels(axis, _levels(found, params, percent))
    beside = 0.02 * (dims[-1] - dims[0]) or 0.5
    axis.set(xlabel="dimension", ylabel=f"{found['measure']} in %", xlim=(dims[0] - beside, dims[-1] + beside))
    axis.set_title(f"{found['task']}: {found['where']}, alpha = {params['alpha']:g}, n = {n}")
    axis.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    picture.save(figure, path)


def _levels(found: dict, params: dict, percent) -> list[picture.Level]:
    levels = [picture.Level(percent(found["vanilla"]["test"]), "vanilla", picture.GREY, "--", 1.5)]
    names = {
        "iti": ("ITI, this head", picture.GREEN),
        "sadi": ("SADI, this block", picture.ORANGE),
        "block": ("whole block", picture.SKY),
    }
    for key, (name, color) in names.items():
        if key in found["whole"]:
            whole = found["whole"][key]
            levels.append(picture.Level(percent(whole["right"]), f"{name}, alpha {whole['alpha']:g}", color))
    for by, both in found["combinations"].items():
        style, who = CHOSEN[by]
        for key, color in (("positive", picture.VERMILLION), ("mixed", picture.PURPLE)):
            if both.get(key, {}).get("dims"):
                levels.append(picture.Level(percent(both[key]["right"]), f"{key}, {who}", color, style))
    shown = params.get("lines", {}).items()
    return levels + [picture.Level(value, label, picture.BLACK, (0, (8, 3, 1, 3)), 1.0) for label, value in shown]


def note(found: dict, params: dict) -> str:
    """What was swept, and what the combinations are made of, or why there is none."""
    count, step = len(found["dims"]), params["step"]
    swept = f"all {count} dimensions" if step == 1 else f"one dimension in {step}, {count} in all"
    said = [f"Swept: {swept}."]
    for by, both in found["combinations"].items():
        good = both["positive"]["dims"]
        if not good:
            made = "no positive combination, as no swept dimension helps there, and no mixed one therefore"
        elif "mixed" in both:
            added = both["mixed"]["dims"][len(good) :]
            made = f"positive {_named(good)}; mixed adds {_named(added)}"
        else:
            made = f"positive {_named(good)}; no mixed combination, as no swept dimension harms there"
        who = CHOSEN[by][1]
        said.append(f"{who[0].upper()}{who[1:]}: {made}.")
    return " ".join(said)


def _named(dims: list[int]) -> str:
    return ", ".join(map(str, dims))
