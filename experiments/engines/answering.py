"""Who answers for a bench, under which plans: the loaded model itself, or vLLM with every plan as an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from austeer.errors import AUSteerError
from austeer.plan import Plan
from austeer.steering import steer
from eval.answering.answerer import Answerer
from eval.answering.live import LiveAnswerer
from eval.tasks.base import Task
from experiments.bench import Bench
from experiments.cell import LIVE
from experiments.engines.vllm_batches import adapters_code, vllm_answerer
from experiments.engines.vllm_engine import installed

Receipt = Callable[[], dict[str, int]]
ENGINES = (LIVE, "vllm")
# Token by token, a small batch costs nearly as much as a large one, and a search asks for the same few items again and
# again: for answers of several tokens one batch of all plans pays up to so many items, for answers of one token it does
# not (benchmarks/search.py measures both).
FEW = 25


def engine_name(engine: str) -> str:
    return LIVE if engine == LIVE else installed()


def engine_code(engine: str) -> tuple:
    """Return the roots of the code that answers."""
    return (live_answering,) if engine == LIVE else (vllm_answering, *adapters_code())


def check_engine(engine: str, device: str | None, **options: object) -> None:
    """Refuse options that an engine cannot serve; options: by name, as given."""
    if engine == LIVE:
        return
    installed()
    unfit = [f"--{name.replace('_', '-')}" for name, value in options.items() if value]
    unfit += [f"--device {device} (use CUDA_VISIBLE_DEVICES)"] if ":" in (device or "") else []
    if unfit:
        raise AUSteerError(
            f"leave out {', '.join(unfit)}: --engine {engine} answers in words only, in batches of its own and in one process"
        )


def pays_together(engine: str, task: Task, n_items: int) -> bool:
    """Say whether many plans are cheaper asked in one batch."""
    if engine != LIVE:
        return task.generates_on_validation
    return task.multi_token and n_items <= FEW


def answering(bench: Bench, plans: Sequence[Plan | None], n_items: int):
    """Open what answers `n_items` items under the first plan, then the same items under the second, ...

    Yields the answerer and a function that says what a single plan has done so far.
    """
    return (live_answering if bench.model_spec.engine == LIVE else vllm_answering)(bench, plans, n_items)


@contextmanager
def live_answering(bench: Bench, plans: Sequence[Plan | None], n_items: int) -> Iterator[tuple[Answerer, Receipt]]:
    if len(plans) > 1:
        yield LiveAnswerer(bench.model, bench.tokenizer, _of_rows(plans, n_items)), dict
        return
    with _steered(bench, plans[0]) as steering:
        yield LiveAnswerer(bench.model, bench.tokenizer), steering.receipt if steering else dict


@contextmanager
def vllm_answering(bench: Bench, plans: Sequence[Plan | None], n_items: int) -> Iterator[tuple[Answerer, Receipt]]:
    """Steer the loaded model too where there is one plan: likelihoods are its own."""
    plan = plans[0] if len(plans) == 1 else None
    with (
        _steered(bench, plan) as steering,
        vllm_answerer(bench.model, bench.tokenizer, _of_rows(plans, n_items)) as vllm,
    ):
        yield vllm, lambda: {"aus": steering.receipt()["aus"], **vllm.receipt()} if steering else {}


def _steered(bench: Bench, plan: Plan | None):
    return nullcontext() if plan is None else steer(bench.model, plan)


def _of_rows(plans: Sequence[Plan | None], n_items: int) -> list[Plan | None]:
    return [plan for plan in plans for _ in range(n_items)]
