"""Searches of settings against each other, and plans in one batch against plans one at a time.

    python benchmarks/search.py [--only searches|batches] [--out benchmarks/results/search-cpu.json]

searches: at every place (task, site, kind of ranks) of the embedded models, every search live on 200 validation items,
and what it chose on 1000 test items, with 95 % intervals. Where a search chose nothing, its accuracies are those of doing
nothing. "against the grid" is what a search costs as a share of the full grid, in item-runs and in seconds (of CPU time on
one thread: what else the machine does cancels), and whether the test accuracy of its choice is inside the interval of the
grid's choice, or above or below it. Behind it "resampled": 200 times, 200 of those test items stand for validation, and how
often the choice of each search has its true accuracy (on all 1000) inside the interval around the validation score of the
full grid's choice, or above it; "regret" is the mean accuracy lost against the full grid.
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
from experiments.engines.grid_batches import FEW
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
from experiments.search import SEARCHES, key_of, shuffled

TASKS, SITES, NAMES = ("copa", "svamp", "tone"), ("attention", "ffn"), ("causal", "published")
COMPARED = ("grid", "sample", "racing")
TEST, DRAWS, SAMPLES = 1000, 200, (8, 25, 100)
RANKS = Path(__file__).parents[1] / "AU_ranks" / "embedded"


class Bench:
    """One task with its model, and outcomes of items under a plan."""

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
        """Outcomes under each plan, asked as experiments/run_cell.py does: few items with answers of several tokens in one batch."""
        if not (self.task.multi_token and len(plans) > 1 and 0 < len(items) <= FEW):
            return [self.outcomes(items, plan) for plan in plans]
        plans_of_rows = [plan for plan in plans for _ in items]
        answerer = LiveAnswerer(self.model, self.tokenizer, plans_of_rows)
        answers = self.task.answers(answerer, [*items] * len(plans))
        starts = range(0, len(answers), len(items))
        return [self.task.columns(items, answers[start : start + len(items)]).outcomes for start in starts]


def searched(bench: Bench, site: str, name: str) -> dict:
    method: AUSteer = METHODS[name]
    ranks = AURanks.load(RANKS / bench.task.name / method.momentum / f"{site}.safetensors")
    grid = method.grid("small")
    plans = {key_of(settings): method.plan(ranks, settings) for settings in grid}
    vanilla = bench.outcomes(bench.validation)
    tested = np.array([bench.outcomes(bench.test), *(bench.outcomes(bench.test, plan) for plan in plans.values())])

    def ask(some, start, stop):
        return bench.under([plans[key_of(settings)] for settings in some], bench.validation[start:stop])

    rows = {}
    for search in COMPARED:
        start = time.process_time()
        found = SEARCHES[search](ask, vanilla, grid)
        seconds = time.process_time() - start
        chosen = None if found.chosen is None else key_of(found.chosen)
        validated = vanilla[: found.n] if chosen is None else found.outcomes[chosen]
        right = int(tested[_row(found.chosen, grid)].sum())
        rows[search] = {
            "chosen": chosen,
            "validation": round(sum(validated) / len(validated), 4),
            "validated_on": len(validated),
            "test": right / TEST,
            "interval": [round(end, 4) for end in wilson(right, TEST)],
            "item_runs": found.n_evaluated,
            "seconds": round(seconds, 4),
        }
    against = {search: against_the_grid(row, rows["grid"]) for search, row in rows.items() if search != "grid"}
    return {
        "vanilla_test": float(tested[0].mean()),
        "searches": rows,
        "against the grid": against,
        "resampled": resampled(tested, grid),
    }


def against_the_grid(row: dict, grid: dict) -> dict:
    low, high = grid["interval"]
    return {
        "item_runs": round(row["item_runs"] / grid["item_runs"], 4),
        "seconds": round(row["seconds"] / grid["seconds"], 4),
        "test": "below" if row["test"] < low else "above" if row["test"] > high else "inside",
    }


def resampled(tested: np.ndarray, grid: list[dict]) -> dict:
    rng, true = np.random.default_rng(0), tested.mean(1)
    tally = {search: {"inside": 0, "regret": 0.0, "item_runs": 0} for search in COMPARED}
    for _ in range(DRAWS):
        drawn = tested[:, rng.choice(TEST, 200, replace=False)].tolist()

        def ask(some, start, stop, drawn=drawn):
            return [drawn[_row(settings, grid)][start:stop] for settings in some]

        found = {search: SEARCHES[search](ask, drawn[0], grid) for search in COMPARED}
        row = _row(found["grid"].chosen, grid)
        low, _ = wilson(sum(drawn[row]), 200)
        for search, tallied in tally.items():
            reached = true[_row(found[search].chosen, grid)]
            tallied["inside"] += bool(reached >= low) / DRAWS
            tallied["regret"] += float(true[row] - reached) / DRAWS
            tallied["item_runs"] += found[search].n_evaluated / DRAWS
    return {search: {key: round(value, 4) for key, value in tallied.items()} for search, tallied in tally.items()}


def _row(settings: dict | None, grid: list[dict]) -> int:
    return 0 if settings is None else 1 + grid.index(settings)


def searches() -> Iterator[tuple[str, dict]]:
    for name in TASKS:
        bench = Bench(name)
        for site in SITES:
            for method in NAMES:
                key = f"{name} {site} {method}"
                yield key, searched(bench, site, method)


def table(places: dict[str, dict]) -> str:
    """By place and search; at the end racing against the grid, over all places."""
    head = ["place", "search", "k, alpha", "validation", "test", "grid's interval", "item-runs", "time"]
    rows = []
    for place, found in places.items():
        low, high = found["searches"]["grid"]["interval"]
        for search, row in found["searches"].items():
            cost = found["against the grid"].get(
                search, {"item_runs": 1, "seconds": 1, "test": f"{low:.3f} to {high:.3f}"}
            )
            rows.append([
                place, search, row["chosen"] or "nothing", f"{row['validation']:.3f}", f"{row['test']:.3f}", cost["test"],
                f"{cost['item_runs']:.2f}", f"{cost['seconds']:.2f}",
            ])  # fmt: skip
    raced = Counter(found["against the grid"]["racing"]["test"] for found in places.values())
    said = ", ".join(f"{raced[where]} {where}" for where in ("inside", "above", "below"))
    return f"{markdown(head, rows, words=3)}\n\nracing's choices against the grid's interval: {said}"


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


def one_by_one(model, tokenizer, prompts, question, plans):
    found = []
    for plan in plans:
        with steer(model, plan):
            found += LiveAnswerer(model, tokenizer).answer(prompts, question)
    return found


def together(model, tokenizer, prompts, question, plans):
    plans_of_rows = [plan for plan in plans for _ in prompts]
    return LiveAnswerer(model, tokenizer, plans_of_rows).answer([*prompts] * len(plans), question)


def ratios(label: str, model, tokenizer, prompts, new_tokens: int, ranks: AURanks) -> dict[int, float]:
    method = METHODS["causal"]
    plans = [method.plan(ranks, settings) for settings in method.grid("small")]
    question, found = Generation(new_tokens), {}
    for count in SAMPLES:
        seconds = {one_by_one: 0.0, together: 0.0}
        told = {}
        repeats = max(1, SAMPLES[-1] // count // 4)
        for _ in range(repeats):  # in turn, so that they meet the same machine
            for way in seconds:
                start = time.process_time()
                told[way] = way(model, tokenizer, prompts[:count], question, plans)
                seconds[way] += time.process_time() - start
        assert [answer.text for answer in told[one_by_one]] == [answer.text for answer in told[together]], label
        found[count] = round(seconds[one_by_one] / seconds[together], 2)
        print(
            f"{label:<26} {count:>4} prompts x {len(plans)} plans: one batch is {found[count]:.2f} times as fast",
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("searches", "batches"))
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON; a part not run is kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    figures = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    figures |= {"machine": platform.machine(), "torch": torch.__version__, "threads": 1}
    for name, part in (("searches", searches), ("batches", batches)):
        if args.only in (None, name):
            figures[name] = {}
            for key, found in part():
                print(f"{name}: {key}", flush=True)
                figures[name][key] = found
                keep(figures, args.out)
    if "searches" in figures:
        print(table(figures["searches"]))


if __name__ == "__main__":
    run_command(main)
