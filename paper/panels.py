"""Compute a panel of a figure, a measurement of paper/studies/, or find its record; it is recorded like a cell."""

from __future__ import annotations

from multiprocessing import parent_process

from austeer.code_identity import code_hash
from austeer.errors import one_line
from austeer.identity import fingerprint, public_name
from austeer.pairs import pairs_hash
from experiments.bench import BENCHES, Bench
from experiments.store import Store
from paper.specs import Panel
from paper.studies import STUDIES
from rmodels import code_roots


def attempt(panel: Panel, store: Store) -> dict:
    """Return the panel's record, or {"failed": why}: one picture that fails does not end the others."""
    try:
        return measured(panel, store, progress=parent_process() is None)  # workers would draw over each other
    except Exception as error:
        return {"failed": one_line(error)}


def measured(panel: Panel, store: Store, progress: bool = False) -> dict:
    bench = BENCHES.open(panel.model, panel.task, store)
    key = panel_key(panel, bench)
    return store.find(key) or store.write(
        key, bench.origin | {"found": STUDIES[panel.study].measure(bench, panel.params, progress)}
    )


def panel_key(panel: Panel, bench: Bench) -> dict:
    model, task = bench.model, bench.task
    pairs = [task.pairs, *map(bench.pairs_of, panel.params.get("tasks", ()))]
    study = STUDIES[panel.study]
    return {
        "model": panel.model.name if panel.model.embedded else public_name(panel.model.name),
        "task": panel.task.label,
        "method": panel.study,
        "params": panel.params,
        "fingerprint": fingerprint(model),
        "dtype": str(model.dtype),
        "quantization": panel.model.quantization,
        "device": model.device.type,
        "kernel": model.config._attn_implementation,
        "items_hash": task.fingerprint,
        "pairs_hashes": [pairs_hash(task_pairs) for task_pairs in pairs],
        "pairs_by": task.pairs_by,
        "batch_size": panel.task.batch_size,
        "protocol": panel.task.protocol,
        "code": code_hash(study.measure, type(task), *code_roots(type(model))),
        **(study.depends_on(bench, panel.params) if hasattr(study, "depends_on") else {}),
    }
