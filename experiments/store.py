"""The folders of a run: one of ranks, one of records, and the answers beside the records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experiments import records
from experiments.cell import ModelSpec, TaskSpec


@dataclass(frozen=True)
class Store:
    ranks: str = "AU_ranks"
    records: str = "results/records"

    def find(self, key: dict) -> dict | None:
        return records.find(Path(self.records), key)

    def write(self, key: dict, result: dict) -> dict:
        return records.write(Path(self.records), key, result)

    def ranks_file(self, model: ModelSpec, task: TaskSpec, momentum: str, site: str) -> Path:
        folder = momentum if task.protocol == "clean" else f"{momentum}-{task.protocol}"
        folder += f"-{task.pairs.n_pairs}-pairs" if task.pairs.n_pairs else ""
        folder += f"-draw-{task.pairs.pairs_draw}" if task.pairs.pairs_draw is not None else ""
        folder += "-general" if task.pairs.general_pairs else ""
        folder += "-swapped" if task.pairs.swapped_choices else ""
        folder += f"-{model.attn}" if model.attn else ""
        folder += f"-{Path(model.weights).name}" if model.weights else ""
        return Path(self.ranks) / Path(model.name).name / task.label / folder / f"{site}.safetensors"

    def costs_file(self, model: ModelSpec, task: TaskSpec, neutral_hash: str, name: str) -> Path:
        """Return the path of a cached cost measurement, such as the Fisher information of a site."""
        folder = Path(self.ranks) / Path(model.name).name
        folder /= task.label if model.embedded else ""  # an embedded model belongs to its task
        more = "".join(f"-{part}" for part in (model.attn, model.weights and Path(model.weights).name) if part)
        return folder / f"fisher-{neutral_hash[:8]}{more}" / f"{name}.safetensors"

    def answers_file(self, record: str, part: str = "test") -> Path:
        """Return the file to which a record's answers are written as they come, so that a killed run continues."""
        name = part.replace(" ", "-").replace("=", "")
        return Path(self.records).parent / "answers" / f"{record}-{name}.jsonl"

    @property
    def paid_scores(self) -> Path:
        """Return the file of scores that a paid service gave."""
        return Path(self.records).parent / "perspective.jsonl"
