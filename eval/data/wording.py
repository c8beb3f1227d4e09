"""How tasks word their prompts: templates as data, this project's own or those read out of the authors' code.

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
    """Return a task's wording. own: what the task brings along, used where no file has any."""
    project = _read(OWN)
    theirs = _read(data_dir / OWN.name) if data_dir and (data_dir / OWN.name).exists() else {}
    whole = next((file for file in (theirs, project) if task in file), {"source": "the task's file", task: own})
    if whole[task] is None:
        raise AUSteerError(f"there is no wording for {task!r} in {OWN.name}, and its class has no templates")
    instruction = (project.get(task) or own or {}).get("instruction", "")
    try:
        words = whole[task]
        return Wording(words.get("source", whole["source"]), words["train"], words["test"], instruction)
    except (AttributeError, KeyError, TypeError) as error:
        raise AUSteerError(f"the wording of {task!r} has no {error}; it needs source, train and test") from None


def _read(path: Path) -> dict:
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(words, dict):
            return words
        reason = f"it holds a {type(words).__name__}"
    except ValueError as error:
        reason = str(error)
    raise AUSteerError(f"{path} is not a wording file ({reason})")


def fill(template: str, row: dict) -> str:
    """Put a row's fields into the template's braces."""

    def value(match: re.Match) -> str:
        if match[1] not in row:
            raise AUSteerError(f"the template names {{{match[1]}}}; a row has {', '.join(row)}")
        return str(row[match[1]])

    return re.sub(r"\{(\w+)\}", value, template)
