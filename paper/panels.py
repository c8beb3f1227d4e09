"""A panel of a figure: a measurement of `studies/`, found or computed, recorded like a cell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from austeer import processes as shared_work
from austeer.errors import one_line
from austeer.identity import fingerprint, public_name
from austeer.pairs import pairs_hash
from experiments import records
from experiments.setting import load
from paper.specs import Panel
from paper.studies import STUDIES


def question(panel: Panel) -> dict:
    setting = panel.setting
    model, _, task = load(setting)
    tasks = [task, *(load(replace(setting, task=name))[2] for name in panel.params.get("tasks", ()))]
    return {
        "model": setting.model if setting.embedded else public_name(setting.model),
        "task": setting.task_name,
        "method": panel.study,
        "params": panel.params,
        "fingerprint": fingerprint(model),
        "dtype": str(model.dtype),
        "quantization": setting.quantization,
        "device": model.device.type,
        "items_hash": task.fingerprint,
        "pairs_hashes": [pairs_hash(one.pairs) for one in tasks],
        "pairs_by": task.pairs_by,
        "batch_size": setting.batch_size,
        "protocol": setting.protocol,
    }


def stored(panel: Panel) -> dict | None:
    return shared_work.of_first(lambda: records.find(Path(panel.setting.records), question(panel)))


def attempt(panel: Panel) -> dict:
    """The panel's record, or {"failed": why}."""
    try:
        return shared_work.together(lambda: compute(panel))
    except Exception as error:  # one picture that fails does not end the others
        return {"failed": one_line(error)}


def compute(panel: Panel) -> dict:
    found = stored(panel)
    if found is not None:
        return found
    measured = STUDIES[panel.study].measure(panel.setting, panel.params, progress=False)
    folder = Path(panel.setting.records)
    return shared_work.of_first(lambda: records.write(folder, question(panel), {"found": measured}))
