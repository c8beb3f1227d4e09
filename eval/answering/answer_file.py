"""An answer, and answers on disk as they come: a killed run loses only the batch that was in flight
(with --batch-size 1, the item).

A line is an answer. While a run is under way lines stand in the order of the batches; a finished file is in
the order of the items, so it is the same bytes however often the run was broken off. Of several processes only
the first reads and writes it: any number of them can go on where others stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from austeer import processes as shared_work
from austeer.errors import AUSteerError


@dataclass(frozen=True)
class Answer:
    text: str
    options: tuple[float, ...] = ()  # log-probability of each option's likeliest spelling, where asked for


class AnswerFile:
    """A line is {"item", "prompt", "answer", "options"}, which the judge and the raters' sheets read too."""

    def __init__(self, path: Path):
        self.path = path

    def read(self, prompts: Sequence[str]) -> dict[int, Answer]:
        """What is there already, of these prompts. A last line that was torn is cut off."""
        self.prompts = prompts
        return {item: Answer(text, tuple(options)) for item, text, options in shared_work.of_first(self._rows)}

    def _rows(self) -> list[tuple[int, str, list[float]]]:
        if not self.path.exists():
            return []
        whole, newline, torn = self.path.read_bytes().rpartition(b"\n")
        if torn:  # cut in place: written anew, a kill here would lose all
            os.truncate(self.path, len(whole) + len(newline))
        try:
            rows = [json.loads(line) for line in whole.splitlines()]
            found = [(row["item"], row["answer"], list(row["options"])) for row in rows]
            ours = all(row["item"] >= 0 and row["prompt"] == self.prompts[row["item"]] for row in rows)
        except (ValueError, TypeError, KeyError):
            raise AUSteerError(f"{self.path} is damaged; delete it, and its items are asked again") from None
        except IndexError:
            ours = False
        if not ours:
            raise AUSteerError(f"{self.path} holds answers to other prompts; move it away")
        return found

    def append(self, fresh: dict[int, Answer]) -> None:
        if not shared_work.is_first():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(b"".join(self._line(*item) for item in fresh.items()))
            file.flush()
            os.fsync(file.fileno())

    def finish(self, ordered: Sequence[Answer]) -> None:
        if not shared_work.is_first():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        temporary.write_bytes(b"".join(self._line(*item) for item in enumerate(ordered)))
        os.replace(temporary, self.path)

    def _line(self, item: int, answer: Answer) -> bytes:
        row = {"item": item, "prompt": self.prompts[item], "answer": answer.text, "options": answer.options}
        return (json.dumps(row, ensure_ascii=True) + "\n").encode()
