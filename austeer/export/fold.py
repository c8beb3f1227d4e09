"""Fold a plan into a checkpoint, and undo it bit for bit.

    certificate = fold("meta-llama/Llama-2-7b-chat-hf", plan, "folded")      # writes an ordinary checkpoint
    unfold("folded", "back")                                                # writes the original's very bytes

OUT/austeer/ holds the plan, the original rows and columns (undo) and the parity certificate: in a folder of their own,
because engines load every *.safetensors beside the weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import safetensors
from torch import Tensor
from tqdm import tqdm

import rmodels
from austeer.errors import AUSteerError
from austeer.export.certificate import certify
from austeer.export.checkpoint import Checkpoint, stored_dtype
from austeer.export.weights import DIMENSIONS, Edit, Tally
from austeer.files import check_new, new_folder, save_readable, sha256, write_json
from austeer.plan import Plan

FORMAT = "austeer-undo-1"
# errors that reading a damaged undo file may raise
DAMAGE = (safetensors.SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)
PLAN, UNDO, CERTIFICATE = "austeer/plan.safetensors", "austeer/undo.safetensors", "austeer/certificate.json"


def fold(
    model: str | Path, plan: Plan, out: str | Path, *, certificate: bool = True, quick_proof: bool = False
) -> dict | None:
    """Write the checkpoint of `model` (folder, hub id or GGUF file) with the plan in its weights to the new folder `out`.

    With a certificate, the original steered live is compared with the result, and without parity there is no `out`.
    certificate=False loads no model: for models that do not fit in the memory of this machine. quick_proof: as in
    rmodels.load.
    """
    check_new(out)
    source = Checkpoint(model, stored_dtype(plan))
    if (source.folder / UNDO).exists():
        raise AUSteerError(
            f"{model} is folded already: --unfold it and fold the sum of the plans (--plan A B), or, to fold on top of "
            f"it, delete {source.folder / UNDO}"
        )
    edits = [piece for edit in source.edits(plan) for piece in source.in_files(edit)]
    for edit in edits:
        source.dtype(edit.weight)  # refuses weights that are not floats
    tokenizer = rmodels.load_tokenizer(source.folder) if certificate else None
    source.check_plan(plan)
    with new_folder(out) as folder:
        hashes = source.copy_to(folder)
        (folder / "austeer").mkdir()
        plan.save(folder / PLAN)
        metadata = {"format": FORMAT, "sha256": json.dumps(hashes)}
        result, tally, undo = Checkpoint(folder), Tally(), {}
        for edit in tqdm(edits, desc="fold", unit="tensor"):
            undo |= _fold(source, result, edit, tally)
        save_readable(undo, folder / UNDO, metadata)
        tally.check()
        if tokenizer is None:
            return None
        parity = certify(source, plan, result, tokenizer, quick_proof)
        parity["unchanged_by_rounding"] = tally.unchanged
        parity["sha256"] = {
            "plan": sha256(folder / PLAN),
            "original": hashes,
            "folded": {name: sha256(folder / name) for name in result.files},
        }
        write_json(folder / CERTIFICATE, parity)
    return parity


def unfold(folded: str | Path, back: str | Path) -> None:
    """Write the original of a folded checkpoint to the new folder `back`, and prove that its files are the same."""
    source = Checkpoint(folded)
    hashes = _original_hashes(source)
    with new_folder(back) as folder:
        source.copy_to(folder)
        target = Checkpoint(folder)
        for part, name, index, old in tqdm(_original_parts(source), desc="undo", unit="tensor"):
            tensor = target.read(name).clone()  # a view into the file would change while it is written
            target.write(name, tensor.index_copy_(DIMENSIONS[part], index, old))
        changed = [name for name in hashes if sha256(folder / name) != hashes[name]]
        if changed:
            raise AUSteerError(f"{folded} was changed after it was folded: {changed[0]} cannot be restored")


def _original_hashes(source: Checkpoint) -> dict[str, str]:
    """Return the SHA-256 of every weight file before it was folded."""
    path = source.folder / UNDO
    if not path.exists():
        raise AUSteerError(f"{source.folder} has no {UNDO}: it was not folded by this project, or the file is lost")
    try:
        with safetensors.safe_open(path, framework="pt") as undo:
            metadata = undo.metadata()
        hashes = json.loads(metadata["sha256"])
        is_valid = metadata["format"] == FORMAT and set(hashes) == set(source.files)
    except DAMAGE:
        is_valid = False
    if not is_valid:
        raise _damaged(path)
    return hashes


def _original_parts(source: Checkpoint) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """Yield (rows or columns, name, index, original values) of each changed tensor, one at a time."""
    path = source.folder / UNDO
    try:
        with safetensors.safe_open(path, framework="pt") as undo:
            for key in [key for key in undo.keys() if key.startswith("at.")]:  # noqa: SIM118 - not a dict
                _, part, name = key.split(".", 2)
                index, old = undo.get_tensor(key).long(), undo.get_tensor(f"was.{part}.{name}")
                new = source.read(name).index_select(DIMENSIONS[part], index)
                if (old.dtype, old.shape) != (new.dtype, new.shape):
                    raise _damaged(path)
                yield part, name, index, old
    except DAMAGE:
        raise _damaged(path) from None


def _damaged(path: Path) -> AUSteerError:
    return AUSteerError(f"{path} is damaged, or belongs to another checkpoint or version: the fold cannot be undone")


def _fold(source: Checkpoint, target: Checkpoint, edit: Edit, tally: Tally) -> dict[str, Tensor]:
    """Fold one edit into the target, and return the index and the original values of each change."""
    tensors = {name: source.read(name) for name in (edit.weight, edit.bias) if name is not None}
    changes = edit.changes(tensors[edit.weight], tensors.get(edit.bias))
    tally.count(changes)
    undo = {}
    for change in changes:
        undo[f"at.{change.part}.{change.tensor}"] = change.index.int()
        undo[f"was.{change.part}.{change.tensor}"] = change.old
        tensors[change.tensor].index_copy_(DIMENSIONS[change.part], change.index, change.new)
    for name in {change.tensor for change in changes}:
        target.write(name, tensors[name])
    return undo
