"""Compare searches with each other, and plans in one batch with plans one at a time.

    python benchmarks/search.py [--only searches|batches] [--out benchmarks/results/search-cpu.json]

searches: at every place (task, site, kind of ranks) of the embedded models, every search runs live on 200 validation
items, and its choice is tested on 1000 items, with 95 % intervals. The grid is that of the embedded scale, and with the
published ranks also that of the paper scale, which is eight times as fine. A search that chooses nothing has the accuracy of
vanilla. "against the grid" has the cost of a search as a share of the full grid's, in item-runs and in seconds of CPU time
on one thread, and whether the test accuracy of its choice is inside, above or below the interval of the grid's choice.
"resampled" lets 200 of the test items stand for validation, 200 times: "inside" is how often the true accuracy of the
choice (on all 1000) lies inside the interval around the validation score of the full grid's choice, or above it; "regret"
is the mean accuracy lost against the full grid.

batches: seconds of one plan at a time over seconds of all plans in one batch (above 1, the batch is faster), on embedded
models and on the random Llama of core.py (hidden 512, 8 layers) with prompts of about 24 tokens.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from answering import Tokens
from core import VOCABULARY, build
from figures import keep, markdown
from transformers.utils import logging as transformers_logging

import rmodels
from austeer.errors import run_command
from austeer.methods.austeer import AUSteer
from austeer.methods.registry import METHODS
from austeer.ranks import AURanks
from austeer.steering import steer
from embedded import acceptance
from eval.answering.answerer import Generation
from eval.answering.live import LiveAnswerer
from eval.statistics import wilson
from eval.tasks.embedded import EmbeddedTask
from experiments.engines.answering import FEW
from experiments.search import SEARCHES, key_of, shuffled

TASKS, SITES = ("copa", "svamp", "tone"), ("attention", "ffn")
GRIDS = {("causal", "small"): "causal", ("published", "small"): "published", ("published", "full"): "published, fine"}
COMPARED = ("grid", "sample", "racing")
TEST, DRAWS, SAMPLES = 1000, 200, (8, 25, 100)
RANKS = Path(__file__).parents[1] / "AU_ranks" / "embedded"


class Bench:
    """Score items of one task under plans, on the task's embedded model."""

    def __init__(self, name: str):
        folder = str(acceptance.WEIGHTS / name)
        self.task = EmbeddedTask(name)
        self.model, self.tokenizer = rmodels.load(folder, device="cpu"), rmodels.load_tokenizer(folder)
        order = shuffled(len(self.task.validation))
        self.validation, self.test = [self.task.validation[i] for i in order], self.task.test[:TEST]

    def outcomes(self, items, plan=None) -> list[bool]:
        if plan is None:
            answers = self.task.answers(LiveAnswerer(self.model, self.tokenizer), items)
        else:
            with steer(self.model, plan):
                answers = self.task.answers(LiveAnswerer(self.model, self.tokenizer), items)
        return self.task.columns(items, answers).outcomes

    def under(self, plans, items) -> list[list[bool]]:
        """Return outcomes under each plan, batched as experiments/run_cell.py does."""
        if not (self.task.multi_token and len(plans) > 1 and 0 < len(items) <= FEW):
            return [self.outcomes(items, plan) for plan in plans]
        plans_of_rows = [plan for plan in plans for _ in items]
        answerer = LiveAnswerer(self.model, self.tokenizer, plans_of_rows)
        answers = self.task.answers(answerer, [*items] * len(plans))
        starts = range(0, len(answers), len(items))
        return [self.task.columns(items, answers[start : start + len(items)]).outcomes for start in starts]


def compare_searches(bench: Bench, site: str, name: str, kind: str = "small") -> dict:
    method: AUSteer = METHODS[name]
    ranks = AURanks.load(RANKS / bench.task.name / method.momentum / f"{site}.safetensors")
    grid = method.grid(kind)
    plans = {key_of(point): method.plan(ranks, point) for point in grid}
    vanilla = bench.outcomes(bench.validation)
    test_outcomes = np.array(
        [bench.outcomes(bench.test), *(bench.outcomes(bench.test, plan) for plan in plans.values())]
    )

    def ask(points, start, stop):
        return bench.under([plans[key_of(point)] for point in points], bench.validation[start:stop])

    rows = {}
    for search in COMPARED:
        start = time.process_time()
        result = SEARCHES[search](ask, vanilla, grid)
        seconds = time.process_time() - start
        chosen = None if result.chosen is None else key_of(result.chosen)
        validation = vanilla[: result.n] if chosen is None else result.outcomes[chosen]
        right = int(test_outcomes[_row(result.chosen, grid)].sum())
        rows[search] = {
            "chosen": chosen,
            "validation": round(sum(validation) / len(validation), 4),
            "validated_on": len(validation),
            "test": right / TEST,
            "interval": [round(end, 4) for end in wilson(right, TEST)],
            "item_runs": result.n_evaluated,
            "seconds": round(seconds, 4),
        }
    against = {search: against_the_grid(row, rows["grid"]) for search, row in rows.items() if search != "grid"}
    return {
        "vanilla_test": float(test_outcomes[0].mean()),
        "searches": rows,
        "against the grid": against,
        "resampled": resampled(test_outcomes, grid),
    }


def against_the_grid(row: dict, grid: dict) -> dict:
    low, high = grid["interval"]
    return {
        "item_runs": round(row["item_runs"] / grid["item_runs"], 4),
        "seconds": round(row["seconds"] / grid["seconds"], 4),
        "test": "below" if row["test"] < low else "above" if row["test"] > high else "inside",
    }


def resampled(test_outcomes: np.ndarray, grid: list[dict]) -> dict:
    rng, true = np.random.default_rng(0), test_outcomes.mean(1)
    tally = {search: {"inside": 0, "regret": 0.0, "item_runs": 0} for search in COMPARED}
    for _ in range(DRAWS):
        sample = test_outcomes[:, rng.choice(TEST, 200, replace=False)].tolist()

        def ask(points, start, stop, sample=sample):
            return [sample[_row(point, grid)][start:stop] for point in points]

        results = {search: SEARCHES[search](ask, sample[0], grid) for search in COMPARED}
        row = _row(results["grid"].chosen, grid)
        low, _ = wilson(sum(sample[row]), 200)
        for search, totals in tally.items():
            accuracy = true[_row(results[search].chosen, grid)]
            totals["inside"] += bool(accuracy >= low) / DRAWS
            totals["regret"] += float(true[row] - accuracy) / DRAWS
            totals["item_runs"] += results[search].n_evaluated / DRAWS
    return {search: {key: round(value, 4) for key, value in totals.items()} for search, totals in tally.items()}


def _row(point: dict | None, grid: list[dict]) -> int:
    return 0 if point is None else 1 + grid.index(point)


def searches() -> Iterator[tuple[str, dict]]:
    for name in TASKS:
        bench = Bench(name)
        for site in SITES:
            for (method, kind), label in GRIDS.items():
                yield f"{name} {site} {label}", compare_searches(bench, site, method, kind)


def table(places: dict[str, dict]) -> str:
    """Return the table of all places and searches, and how racing compares with the grid over all places."""
    head = ["place", "search", "k, alpha", "validation", "test", "grid's interval", "item-runs", "time"]
    rows = []
    for place, figures in places.items():
        low, high = figures["searches"]["grid"]["interval"]
        for search, row in figures["searches"].items():
            cost = figures["against the grid"].get(
                search, {"item_runs": 1, "seconds": 1, "test": f"{low:.3f} to {high:.3f}"}
            )
            rows.append([
                place, search, row["chosen"] or "nothing", f"{row['validation']:.3f}", f"{row['test']:.3f}", cost["test"],
                f"{cost['item_runs']:.2f}", f"{cost['seconds']:.2f}",
            ])  # fmt: skip
    lines = [markdown(head, rows, words=3), ""]
    for of, is_fine in (("", False), (" on the fine grid", True)):
        positions = Counter(
            figures["against the grid"]["racing"]["test"]
            for place, figures in places.items()
            if place.endswith("fine") == is_fine
        )
        counts = ", ".join(f"{positions[where]} {where}" for where in ("inside", "above", "below"))
        lines.append(f"racing's choices{of} against the grid's interval: {counts}")
    return "\n".join(lines)


def batches() -> Iterator[tuple[str, dict]]:
    for name, new_tokens in (("copa", 1), ("tone", 8)):
        bench = Bench(name)
        ranks = AURanks.load(RANKS / name / "causal" / "attention.safetensors")
        prompts = [item.prompt for item in bench.validation]
        label = f"embedded {name}, {new_tokens} new"
        yield label, ratios(label, bench.model, bench.tokenizer, prompts, new_tokens, ranks)
    model = build()
    model.generation_config.eos_token_id = None  # random weights: no answer ends by itself
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(20, 29, (max(SAMPLES),), generator=generator).tolist()
    prompts = [tuple(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()) for length in lengths]
    score = torch.randn(8, 512, generator=generator)
    ranks = AURanks("attention", score, score.sign() / 10)
    for new_tokens in (1, 8):
        label = f"Llama 512 x 8, {new_tokens} new"
        yield label, ratios(label, model, Tokens(), prompts, new_tokens, ranks)


def one_by_one(model, tokenizer, prompts, generation, plans):
    answers = []
    for plan in plans:
        with steer(model, plan):
            answers += LiveAnswerer(model, tokenizer).answer(prompts, generation)
    return answers


def in_one_batch(model, tokenizer, prompts, generation, plans):
    plans_of_rows = [plan for plan in plans for _ in prompts]
    return LiveAnswerer(model, tokenizer, plans_of_rows).answer([*prompts] * len(plans), generation)


def ratios(label: str, model, tokenizer, prompts, new_tokens: int, ranks: AURanks) -> dict[int, float]:
    method = METHODS["causal"]
    plans = [method.plan(ranks, point) for point in method.grid("small")]
    generation, speedups = Generation(new_tokens), {}
    for count in SAMPLES:
        seconds = {one_by_one: 0.0, in_one_batch: 0.0}
        answers = {}
        repeats = max(1, SAMPLES[-1] // count // 4)
        for _ in range(repeats):  # in turn, so that both meet the same load
            for way in seconds:
                start = time.process_time()
                answers[way] = way(model, tokenizer, prompts[:count], generation, plans)
                seconds[way] += time.process_time() - start
        assert [answer.text for answer in answers[one_by_one]] == [answer.text for answer in answers[in_one_batch]], (
            label
        )
        speedups[count] = round(seconds[one_by_one] / seconds[in_one_batch], 2)
        print(
            f"{label:<26} {count:>4} prompts x {len(plans)} plans: one batch is {speedups[count]:.2f} times as fast",
            flush=True,
        )
    return speedups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("searches", "batches"))
    parser.add_argument(
        "--out",
        type=Path,
        help="also write the figures to this file, as JSON; the figures of a part that is not run stay in it",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    figures = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    figures |= {"machine": platform.machine(), "torch": torch.__version__, "threads": 1}
    for name, part in (("searches", searches), ("batches", batches)):
        if args.only in (None, name):
            figures[name] = {}
            for key, result in part():
                print(f"{name}: {key}", flush=True)
                figures[name][key] = result
                keep(figures, args.out)
    if "searches" in figures:
        print(table(figures["searches"]))


if __name__ == "__main__":
    run_command(main)
