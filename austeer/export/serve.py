"""Plans as named models of vLLM's OpenAI-compatible server, beside the model as it is. Started by scripts/serve.sh.

    bash scripts/serve.sh MODEL PLAN.safetensors [PLAN...] [vLLM's own flags]

A request names its model: MODEL is unsteered, and every plan is called by its file name without the ending.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from austeer.errors import STOPPING, AUSteerError, run_command
from austeer.export.checkpoint import Checkpoint, local_folder
from austeer.export.lora import max_lora_rank, save_lora
from austeer.plan import Plan

USAGE = __doc__.split("\n\n")[1].strip()


def server_command(model: str, plans: Sequence[Path], flags: Sequence[str], folder: Path) -> list[str]:
    """Write the adapters into the folder; the command that serves them."""
    names = [plan.stem for plan in plans]
    if len(set(names)) < len(names):
        raise AUSteerError(f"plans are served under their file names, and some of these are alike: {', '.join(names)}")
    loaded, checkpoint = [Plan.load(plan) for plan in plans], Checkpoint(local_folder(model))
    for plan in loaded:
        checkpoint.check_plan(plan)
    made = [save_lora(model, plan, folder / name) for name, plan in zip(names, loaded, strict=True)]
    for adapter in made:
        print(adapter, flush=True)
    # on the CPU vLLM looks up "no adapter" as slot -1, the last one's: it must stay empty, or the plain model is steered
    slots = len(made) + (not torch.cuda.is_available())
    targets = sorted({target for adapter in adapters for target in adapter.targets})
    command = [*_server(model), "--enable-lora", "--max-loras", str(slots)]
    command += ["--max-lora-rank", str(max_lora_rank(max(adapter.rank for adapter in adapters)))]
    command += ["--lora-target-modules", *targets]
    return [*command, "--lora-modules", *[f"{name}={folder / name}" for name in names], *flags]


def _server(model: str) -> list[str]:
    """`vllm serve`, which asks for its version under the name of the GPU package and so fails in the one for CPUs."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return [str(Path(sys.executable).with_name("vllm")), "serve", model]


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    own = next((place for place, word in enumerate(argv) if word.startswith("-")), len(argv))
    model, plans, flags = argv[:1], [Path(plan) for plan in argv[1:own]], argv[own:]
    if own < 2:
        raise AUSteerError(f"name a model and at least one plan: {USAGE}")
    with TemporaryDirectory(prefix="austeer-") as folder:
        command = server_command(model[0], plans, flags, Path(folder))
        print(" ".join(command), flush=True)
        server = subprocess.Popen(command)
        for number in STOPPING:
            signal.signal(number, lambda *_: server.terminate())
        while True:
            try:
                return server.wait()
            except KeyboardInterrupt:  # vLLM has had it, too, and is closing down
                continue


if __name__ == "__main__":
    run_command(main)
