"""Read how tasks word their prompts: templates as data, this project's own or those read out of the authors' code.

A template names a row's fields in braces, {passage}; nothing else in it has a meaning. The project's own templates are
in `datasets/wording.json`, or in the task's file. A `wording.json` in the user's data folder, as `import-authors` writes
it, takes their place, task by task.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from austeer.errors import AUSteerError
from austeer.files import read_json

OWN = Path(__file__).parents[2] / "datasets" / "wording.json"


@dataclass(frozen=True)
class Wording:
    """Hold one task's templates: `train` makes pairs, `test` makes the items to answer."""

    source: str
    train: dict
    test: dict
    instruction: str  # asks for the behaviour in words: the prompt-only control. Always this project's

    @property
    def label(self) -> str:
        """Say, for records, whose wording this is, and exactly which."""
        text = json.dumps([self.train, self.test], sort_keys=True)
        return f"{self.source}; {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def read_wording(task: str, data_dir: Path | None = None, own: dict | None = None) -> Wording:
    """Return a task's wording. own: the wording in the task's own file, used if no data file has one."""
    project = _read(OWN)
    instruction = (project.get(task) or own or {}).get("instruction", "")
    theirs = data_dir / OWN.name if data_dir else OWN
    for place, whole in (
        (theirs, _read(theirs)),
        (OWN, project),
        ("the task's class", {"source": "the task", task: own}),
    ):
        if whole.get(task) is not None:
            try:
                source = whole[task].get("source", whole["source"])
                return Wording(source, whole[task]["train"], whole[task]["test"], instruction)
            except (AttributeError, KeyError, TypeError) as error:
                raise AUSteerError(f"{place} is not a wording file ({type(error).__name__}: {error})") from None
    raise AUSteerError(f"there is no wording for {task!r} in {OWN.name}, and its class has no templates")


def _read(path: Path) -> dict:
    words = read_json(path) if path.exists() else {}
    if not isinstance(words, dict):
        raise AUSteerError(f"{path} is not a wording file (it holds a {type(words).__name__})")
    return words


def fill(template: str, row: dict) -> str:
    """Put a row's fields into the template's braces."""

    def value(match: re.Match) -> str:
        if match[1] not in row:
            raise AUSteerError(f"the template names {{{match[1]}}}; a row has {', '.join(row)}")
        return str(row[match[1]])

    return re.sub(r"\{(\w+)\}", value, template)
