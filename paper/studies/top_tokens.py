"""Figure 4: the five likeliest tokens after one prompt, while each of three AUs of one block is steered.

params: site, layer, head; dims (three, or None: the best, a neutral and the worst of a sweep on validation, which needs
    step); alpha; n (at most this many items); answer (what the prompt's right answer has to be, as in the paper, or None:
    any); item (the index of a test item, or None: the first of n with that answer that the unsteered model gets wrong and
    one of the AUs sets right; the first with that answer if there is none).

printed: the paper's tokens by AU, the likeliest first, written below ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from austeer.errors import AUSteerError
from austeer.plan import Plan
from experiments.bench import Bench
from paper.studies import picture
from paper.studies.answers import right_answer
from paper.studies.block import Block, Evaluator, extremes, n_dims, next_token
from paper.studies.counting import place

TOP = 5


def measure(bench: Bench, params: dict, progress: bool) -> dict:
    model, tokenizer, task = bench.model, bench.tokenizer, bench.task
    block, dims = Block.of(model, params), params["dims"]
    chosen = extremes(bench, block, params, progress) if dims is None else {f"dim{dim}": dim for dim in dims}
    plans = {"unsteered": block.plan({}), **{name: block.plan({dim: params["alpha"]}) for name, dim in chosen.items()}}
    index = params["item"]
    if index is None:
        places = _with_answer(task.test[: params["n"]], params["answer"])
        evaluator = Evaluator(bench, [task.test[i] for i in places])
        index = places[_first_set_right(evaluator, list(plans.values()))]
    item = task.test[index]
    probabilities = next_token(model, tokenizer, item.prompt, list(plans.values())).exp()
    columns = []
    for name, row in zip(plans, probabilities, strict=True):
        best = row.topk(TOP)
        tokens = tokenizer.convert_ids_to_tokens(best.indices.tolist())
        top = [[token, round(p, 6)] for token, p in zip(tokens, best.values.tolist(), strict=True)]
        columns.append({"name": name, "dim": chosen.get(name), "top": top})
    return {
        "task": bench.task_spec.label,
        "item": index,
        "prompt": item.prompt,
        "answer": right_answer(item).strip(),
        "columns": columns,
    }


def n_prompts(params: dict, n_pairs: int, n_validation: int) -> int:
    return n_dims(params) * params["n"]


def _with_answer(items: Sequence, answer: str | None) -> list[int]:
    """Return the places of the items with this right answer, or of all items if it is None."""
    places = [i for i, item in enumerate(items) if answer is None or right_answer(item).strip().lower() == answer]
    if not places:
        raise AUSteerError(f"no item of the first {len(items)} has the answer {answer!r}: raise n or change answer")
    return places


def _first_set_right(evaluator: Evaluator, plans: list[Plan]) -> int:
    unsteered, *steered = (evaluator.outcomes(plan) for plan in plans)
    set_right = (i for i, (before, *after) in enumerate(zip(unsteered, *steered, strict=True)) if any(after) > before)
    return next(set_right, 0)


def draw(result: dict, params: dict, path: Path, printed: dict) -> None:
    columns = result["columns"]
    values = np.array([[p for _, p in column["top"]] for column in columns]).T
    figure, axis = picture.subplots(size=(2.6 * len(columns) + 1.2, 6.2 if printed else 4.6))
    image = axis.imshow(values, aspect="auto", cmap="cividis", vmin=0, vmax=1)
    labels = [[f"{_printable(token)}\n{_percent(p)}" for token, p in column["top"]] for column in columns]
    papers = [
        [f"paper {_printable(token)}" for token in printed.get(str(column["dim"]), ())] or [""] * TOP
        for column in columns
    ]
    texts = picture.with_printed(_by_rank(labels), _by_rank(papers))
    picture.write_labels(axis, values, image, texts)
    axis.set_xticks(range(len(columns)), [_heading(column) for column in columns])
    axis.xaxis.tick_top()
    axis.set_yticks(range(TOP), [str(rank) for rank in range(1, TOP + 1)])
    axis.tick_params(length=0)
    axis.set_ylabel("rank")
    axis.set_xlabel(
        f"{result['task']}: {place(params)}, alpha = {params['alpha']:g}; test item {result['item']}, right answer: {result['answer']}"
    )
    figure.colorbar(image, ax=axis, label="probability")
    picture.save(figure, path)


def note(result: dict, params: dict) -> str:
    """Quote the prompt, with line breaks visible and backticks, which would end the quotation, replaced."""
    prompt = result["prompt"].replace("`", "'").replace("\n", " ⏎ ")
    return f"The prompt (test item {result['item']}): `{prompt}` The right answer: {result['answer']}."


def _by_rank(columns: list[list[str]]) -> list[list[str]]:
    return [list(row) for row in zip(*columns, strict=True)]


def _heading(column: dict) -> str:
    if column["dim"] is None:
        return column["name"]
    kind = "" if column["name"].startswith("dim") else f"\n({column['name']} of the sweep)"
    return f"AU {column['dim']}{kind}"


def _percent(p: float) -> str:
    return f"{100 * p:.1f} %" if p >= 0.0005 else "< 0.05 %"


def _printable(token: str) -> str:
    """Return a token with its leading space as _, as in the paper, and without characters that a font may lack."""
    text = token.replace("▁", "_").replace("Ġ", "_")
    return repr(text) if text.isascii() else ascii(text)
