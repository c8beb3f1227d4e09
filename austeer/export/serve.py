"""Serve plans as named models of vLLM's OpenAI-compatible server, beside the model as it is.

    austeer serve MODEL PLAN.safetensors [PLAN...] [vLLM's own flags]
    bash scripts/serve.sh ...                                             the same in the checkout, vLLM included

A request names its model: MODEL is unsteered, and every plan is called by its file name without the ending.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from austeer.errors import STOPPING, AUSteerError, missing_extra, run_command
from austeer.export.checkpoint import Checkpoint, stored_dtype
from austeer.export.lora import max_lora_rank, save_lora
from austeer.plan import Plan


def server_command(model: str, plans: Sequence[Path], flags: Sequence[str], folder: Path) -> list[str]:
    """Write the adapters into the folder, and return the command that serves them."""
    names = [plan.stem for plan in plans]
    if len(set(names)) < len(names):
        raise AUSteerError(f"plans are served under their file names, which must differ: {', '.join(names)}")
    by_name = {path.stem: Plan.load(path) for path in plans}
    checkpoint = Checkpoint(model, stored_dtype(next(iter(by_name.values()))))
    for plan in by_name.values():
        checkpoint.check_plan(plan)
    adapters = [save_lora(checkpoint, plan, folder / name) for name, plan in by_name.items()]
    for adapter in adapters:
        adapter.check_for_vllm()
        print(adapter, flush=True)
    # on the CPU vLLM looks up "no adapter" in slot -1, the last one: it must stay empty, or the plain model is steered
    slots = len(adapters) + (not torch.cuda.is_available())
    targets = sorted({target for adapter in adapters for target in adapter.targets})
    command = [*_server(checkpoint.name), "--enable-lora", "--max-loras", str(slots)]
    command += ["--max-lora-rank", str(max_lora_rank(max(adapter.rank for adapter in adapters)))]
    command += ["--lora-target-modules", *targets]
    if checkpoint.name != model:  # a GGUF file, converted
        command += ["--served-model-name", model]
    return [*command, "--lora-modules", *[f"{name}={folder / name}" for name in names], *flags]


def _server(model: str) -> list[str]:
    """Return `vllm serve`, or for the CPU package the module: there the command fails to find its own version."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return [str(Path(sys.executable).with_name("vllm")), "serve", model]


def main(argv: Sequence[str] | None = None, prog: str = "bash scripts/serve.sh") -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__.rstrip())
        return 0
    first_flag = next((place for place, word in enumerate(argv) if word.startswith("-")), len(argv))
    model, plans, flags = argv[:1], [Path(plan) for plan in argv[1:first_flag]], argv[first_flag:]
    if first_flag < 2:
        raise AUSteerError(f"name a model and at least one plan: {prog} MODEL PLAN.safetensors [PLAN...] [vLLM flags]")
    if find_spec("vllm") is None:
        raise missing_extra("vllm", "serve")
    with TemporaryDirectory(prefix="austeer-") as folder:
        command = server_command(model[0], plans, flags, Path(folder))
        print(" ".join(command), flush=True)
        server = subprocess.Popen(command)
        for number in STOPPING:
            signal.signal(number, lambda *_: server.terminate())
        while True:
            try:
                return server.wait()
            except KeyboardInterrupt:  # vLLM received Ctrl-C, too, and is shutting down
                continue


if __name__ == "__main__":
    run_command(main)
