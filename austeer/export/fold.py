"""Fold a plan into a checkpoint, and undo it bit for bit.

    certificate = fold("meta-llama/Llama-2-7b-chat-hf", plan, "folded")      # an ordinary checkpoint
    unfold("folded", "back")                                                # the original's very bytes

Beside the weights, OUT/austeer/ holds the plan, the original rows and columns (undo) and the parity certificate. A
folder of their own, because engines load every *.safetensors that lies beside the weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import safetensors
import torch
from torch import Tensor
from tqdm import tqdm

import rmodels
from austeer.errors import AUSteerError
from austeer.export.certificate import certify
from austeer.export.checkpoint import Checkpoint, check_new, local_folder, new_folder, sha256, write_one_by_one
from austeer.export.weights import DIMENSIONS, Edit, Tally, find_edits
from austeer.plan import Plan

FORMAT = "austeer-undo-1"
# what reading a damaged undo file may raise
DAMAGE = (
    safetensors.SafetensorError,
    OSError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    RuntimeError,
)
PLAN, UNDO, CERTIFICATE = "austeer/plan.safetensors", "austeer/undo.safetensors", "austeer/certificate.json"


def fold(model: str | Path, plan: Plan, out: str | Path, *, certificate: bool = True) -> dict | None:
    """Write the checkpoint of `model` (folder or hub id) with the plan in its weights to the new folder `out`.

    Without a certificate nothing is loaded: for models that do not fit where they are folded. Otherwise the
    original, steered live, and the result are compared, and without parity there is no `out`.
    """
    check_new(out)
    source = Checkpoint(local_folder(model))
    if (source.folder / UNDO).exists():
        raise AUSteerError(
            f"{model} is folded already: --unfold it and fold the sum of the plans (--plan A B), or, if it is the "
            f"original to you, delete {source.folder / UNDO}"
        )
    edits = find_edits(plan, source.shapes)
    for edit in edits:
        source.dtype(edit.weight)  # refuses those that are no floats
    tokenizer = rmodels.load_tokenizer(source.folder) if certificate else None
    source.check_plan(plan)
    with new_folder(out) as folder:
        hashes = source.copy_to(folder)
        (folder / "austeer").mkdir()
        plan.save(folder / PLAN)
        metadata = {"format": FORMAT, "sha256": json.dumps(hashes)}
        result, tally = Checkpoint(folder), Tally()
        write_one_by_one(folder / UNDO, _layout(source, edits), _patch(source, result, edits, tally), metadata)
        tally.check()
        if tokenizer is None:
            return None
        parity = certify(source, plan, result, tokenizer)
        parity["unchanged_by_rounding"] = tally.unchanged
        parity["sha256"] = {
            "plan": sha256(folder / PLAN),
            "original": hashes,
            "folded": {name: sha256(folder / name) for name in result.files},
        }
        (folder / CERTIFICATE).write_text(json.dumps(parity, indent=2) + "\n")
    return parity


def unfold(folded: str | Path, back: str | Path) -> None:
    """Write the checkpoint that was folded to the new folder `back`, and prove that its files are the original's."""
    source = Checkpoint(folded)
    hashes = _original_hashes(source)
    with new_folder(back) as folder:
        source.copy_to(folder)
        target = Checkpoint(folder)
        for part, name, index, old in tqdm(_original_parts(source), desc="undo", unit="tensor"):
            tensor = target.read(name).clone()  # not a view into the file that is written next
            target.write(name, tensor.index_copy_(DIMENSIONS[part], index, old))
        changed = [name for name in hashes if sha256(folder / name) != hashes[name]]
        if changed:
            raise AUSteerError(f"{folded} was changed after it was folded: {changed[0]} does not come back as it was")


def _original_hashes(source: Checkpoint) -> dict[str, str]:
    """The SHA-256 of every weight file before it was folded."""
    path = source.folder / UNDO
    if not path.exists():
        raise AUSteerError(f"{source.folder} has no {UNDO}: it was not folded here, or its undo file is lost")
    try:
        with safetensors.safe_open(path, framework="pt") as undo:
            metadata = undo.metadata()
        hashes = json.loads(metadata["sha256"])
        fits = metadata["format"] == FORMAT and set(hashes) == set(source.files)
    except DAMAGE:
        fits = False
    if not fits:
        raise _damaged(path)
    return hashes


def _original_parts(source: Checkpoint) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """Of each changed tensor whether rows or columns, its name, which, and what was there; one after another."""
    path = source.folder / UNDO
    try:
        with safetensors.safe_open(path, framework="pt") as undo:
            for key in [key for key in undo.keys() if key.startswith("at.")]:  # noqa: SIM118 - not a dict
                _, part, name = key.split(".", 2)
                index, old = undo.get_tensor(key).long(), undo.get_tensor(f"was.{part}.{name}")
                there = source.read(name).index_select(DIMENSIONS[part], index)
                if (old.dtype, old.shape) != (there.dtype, there.shape):
                    raise _damaged(path)
                yield part, name, index, old
    except DAMAGE:
        raise _damaged(path) from None


def _damaged(path: Path) -> AUSteerError:
    return AUSteerError(f"{path} is damaged, or not of this checkpoint or version: it cannot be undone")


def _layout(source: Checkpoint, edits: list[Edit]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes of what `_patch` yields."""
    layout = {}
    for edit in edits:
        parts = [(edit.weight, part, len(index)) for part, index in edit.parts().items()]
        if edit.moves_bias:
            parts.append((edit.bias, "columns", source.shapes[edit.bias][0]))
        for name, part, count in parts:
            shape = list(source.shapes[name])
            shape[DIMENSIONS[part]] = count
            layout[f"at.{part}.{name}"] = torch.int32, (count,)
            layout[f"was.{part}.{name}"] = source.dtype(name), tuple(shape)
    return layout


def _patch(source: Checkpoint, target: Checkpoint, edits: list[Edit], tally: Tally) -> Iterator[Tensor]:
    """Fold one tensor after another, handing out where and what was there before."""
    for edit in tqdm(edits, desc="fold", unit="tensor"):
        tensors = {name: source.read(name) for name in (edit.weight, edit.bias) if name is not None}
        changes = edit.changes(tensors[edit.weight], tensors.get(edit.bias))
        tally.count(changes)
        for change in changes:
            yield change.index.int()
            yield change.old
            tensors[change.tensor].index_copy_(DIMENSIONS[change.part], change.index, change.new)
        for name in {change.tensor for change in changes}:
            target.write(name, tensors[name])
