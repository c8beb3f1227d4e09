"""Say before loading whether the weights fit into memory: afterwards a full CPU ends the process without a word.

The skeleton of a model has the very weights that loading makes, tied ones once, so counting them needs no file and no
network. Activations are not counted, and swap counts as memory: what might fit is let through.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from austeer.errors import AUSteerError

# of a weight: codes, and for 4-bit a float32 scale per 64 of them
QUANTISED_BYTES = {"4bit": 0.5 + 4 / 64, "8bit": 1.0}
OWN_CGROUPS, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# where a control group is, and the names of its limit, its use, and the parts of that which give way (version 2, 1)
CGROUP_FILES = (
    ("", "", "memory.max", "memory.current", ("inactive_file", "active_file")),
    (
        "memory",
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)


class TooLittleMemory(AUSteerError):
    """Report weights that do not fit: what is lacking, and what to do about it."""

    def __init__(self, lack: str, remedy: str):
        super().__init__(f"{lack}; {remedy}")
        self.lack = lack


def check_memory(
    name: str, skeleton: PreTrainedModel, dtype: torch.dtype | str, quantization: str | None, device: str
) -> None:
    """Refuse weights that do not fit, and name what would. dtype: "auto" is the checkpoint's own."""
    if getattr(skeleton.config, "quantization_config", None) is not None:
        return  # quantised already: its skeleton does not know how far
    if dtype == "auto":
        dtype = skeleton.config.dtype or torch.float16  # unknown: a small one, to refuse nothing that fits
    needed, free = weight_bytes(skeleton, dtype, quantization), free_bytes(device)
    if needed <= free:
        return
    others = {"--dtype bfloat16": (torch.bfloat16, quantization), "--quantization 4bit": (dtype, "4bit")}
    fitting = [option for option, how in others.items() if weight_bytes(skeleton, *how) <= free]
    how = str(dtype).removeprefix("torch.") + (f", {quantization}" if quantization else "")
    raise TooLittleMemory(
        f"{device} has {free / 1e9:.1f} GB free, and the weights of {name} take {needed / 1e9:.1f} GB in {how}",
        f"take {', '.join([*fitting, '--device-map auto (other GPUs, the CPU and the disk help out)'])} or a smaller model",
    )


def weight_bytes(skeleton: PreTrainedModel, dtype: torch.dtype, quantization: str | None = None) -> float:
    """Return what the weights take. Quantisers leave embeddings, the head, norms and fused experts as they are."""
    total = sum(weight.numel() for weight in skeleton.parameters()) * dtype.itemsize
    if quantization is None:
        return total
    head = skeleton.get_output_embeddings()
    linears = [module for module in skeleton.modules() if isinstance(module, nn.Linear | Conv1D) and module is not head]
    return total - sum(part.weight.numel() for part in linears) * (dtype.itemsize - QUANTISED_BYTES[quantization])


def free_bytes(device: str) -> int:
    """Return how many bytes of a device's memory are free for weights."""
    if torch.device(device).type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, of what was freed
        return torch.cuda.mem_get_info(device)[0] + kept
    return min([psutil.virtual_memory().available, *_left_in_cgroups()]) + psutil.swap_memory().free


def _left_in_cgroups() -> Iterator[int]:
    """Yield what the control groups of this process, as of a container or a batch job, leave it."""
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:  # no Linux
        return
    own = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    for controllers, folder, limit, use, cached in CGROUP_FILES:
        root = CGROUPS / folder
        here = root / own.get(controllers, "/").lstrip("/")
        for group in (here, *here.parents):
            if group.is_relative_to(root) and (left := _left(group, limit, use, cached)) is not None:
                yield left


def _left(group: Path, limit: str, use: str, cached: tuple[str, ...]) -> int | None:
    """Return what a control group has left, None where it is without a limit or, inside a container, not to be seen."""
    try:
        most, used = (group / limit).read_text().strip(), int((group / use).read_text())
        fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    return None if most == "max" else max(0, int(most) - used + sum(int(fields.get(name, 0)) for name in cached))
