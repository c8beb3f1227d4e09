"""Open the answerer of a bench's prompts under changes of the model: the loaded model, or vLLM with each plan as a LoRA adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from austeer.change import Adapter, Change, applied
from austeer.errors import AUSteerError
from austeer.plan import Plan
from eval.answering.answerer import Answerer
from eval.answering.live import LiveAnswerer
from eval.tasks.base import Task
from eval.tasks.registry import PAPER_TASKS
from experiments.bench import Bench
from experiments.cell import LIVE
from experiments.engines.vllm_batches import adapters_code, vllm_answerer
from experiments.engines.vllm_engine import installed

Receipt = Callable[[], dict[str, int]]
ENGINES = (LIVE, "vllm")
# Decoding a small batch takes nearly as long as a large one, so for answers of several tokens, a search that asks few
# items runs all plans in one batch. For one-token answers that does not pay (benchmarks/search.py measures both).
FEW = 25  # items


def engine_name(engine: str) -> str:
    return LIVE if engine == LIVE else installed()


def engine_code(engine: str) -> tuple:
    """Return the roots of the code that answers."""
    return (live_answering,) if engine == LIVE else (vllm_answering, *adapters_code())


def check_engine(
    engine: str,
    device: str | None,
    *,
    batch_size: int | None,
    ray: str | None,
    task: str | None = None,
    pairs: str | None = None,
    quantization: str | None = None,
    attn: str | None = None,
) -> None:
    """Refuse options that the engine cannot serve."""
    if engine == LIVE:
        return
    if task in PAPER_TASKS and not PAPER_TASKS[task].answered_in_words:
        raise AUSteerError(f"{task} is answered by likelihoods of the loaded model: leave out --engine {engine}")
    installed()
    options = {
        "--pairs": pairs, "--quantization": quantization, "--attn": attn, "--batch-size": batch_size, "--ray": ray,
    }  # fmt: skip
    conflicts = [option for option, value in options.items() if value]
    conflicts += [f"--device {device} (use CUDA_VISIBLE_DEVICES)"] if ":" in (device or "") else []
    if conflicts:
        raise AUSteerError(
            f"leave out {', '.join(conflicts)}: --engine {engine} returns text only, has its own kernels and batches and runs in one process"
        )


def one_batch_pays(engine: str, task: Task, n_items: int) -> bool:
    """Say whether answering under many plans is faster in one batch."""
    if engine != LIVE:
        return task.generates_on_validation
    return task.multi_token and n_items <= FEW


def answering(bench: Bench, changes: Sequence[Change | None], n_items: int):
    """Open the answerer of `n_items` items under the first change of the model, then of the same items under the second, ...

    Several changes at once must be plans. The context yields the answerer and a function that returns what a single
    change has done so far.
    """
    return (live_answering if bench.model_spec.engine == LIVE else vllm_answering)(bench, changes, n_items)


@contextmanager
def live_answering(bench: Bench, changes: Sequence[Change | None], n_items: int) -> Iterator[tuple[Answerer, Receipt]]:
    if len(changes) > 1:
        yield LiveAnswerer(bench.model, bench.tokenizer, _plan_per_row(changes, n_items)), dict
        return
    with applied(bench.model, changes[0]) as change:
        yield LiveAnswerer(bench.model, bench.tokenizer), change.receipt if change else dict


@contextmanager
def vllm_answering(bench: Bench, changes: Sequence[Change | None], n_items: int) -> Iterator[tuple[Answerer, Receipt]]:
    """Answer with vLLM. A single plan also steers the loaded model, which computes the likelihoods."""
    if any(isinstance(change, Adapter) for change in changes):
        raise AUSteerError("vLLM serves plans; what this method makes is no plan: use --engine live")
    plan = changes[0] if len(changes) == 1 else None
    with (
        applied(bench.model, plan) as steering,
        vllm_answerer(bench.model, bench.tokenizer, _plan_per_row(changes, n_items)) as vllm,
    ):
        yield vllm, lambda: {"aus": steering.receipt()["aus"], **vllm.receipt()} if steering else {}


def _plan_per_row(plans: Sequence[Plan | None], n_items: int) -> list[Plan | None]:
    return [plan for plan in plans for _ in range(n_items)]
