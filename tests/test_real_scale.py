"""The scale of small real models: which cells it has, and how methods at the same KL are shown."""

from dataclasses import replace

import pytest
from conftest import SHARED, needs_shared
from test_equal_kl import better, made_up
from test_parts_report import row

from eval.decomposition import UNBIASED
from eval.tasks.registry import paper_task
from paper import reproduce, specs
from paper.manifest import Manifest
from paper.render import findings, page, sections

COPA, WORDS = "SmolLM2-135M, COPA by whole choices", "SmolLM2-135M, BoolQ by words"


def spec_of(**how) -> specs.Spec:
    (spec,) = specs.read("real", ["skill"], **how)
    return spec


def cells_of(spec: specs.Spec, block: str, row: str) -> list:
    return [cell for entry in spec.entries if (entry.block, entry.row) == (block, row) for cell in entry.cells]


def test_a_level_is_asked_of_whatever_has_a_strength():
    spec = spec_of()
    assert {cell.search.level for cell in cells_of(spec, COPA, "fisher")} == {0.003, 0.01, 0.03, 0.1}
    for name in ("few-shot", "prompt-only"):
        assert {(cell.search.kind, cell.search.level) for cell in cells_of(spec, COPA, name)} == {("at-kl", None)}
    assert {cell.search.kind for cell in cells_of(spec, COPA, "vanilla")} == {"grid"}, "vanilla has no KL"


def test_the_default_leaves_out_what_takes_a_gpu():
    default, everything = spec_of(everything=False), spec_of()
    assert set(default.blocks) < set(everything.blocks) and set(default.columns) == {"0.03"}
    assert len(cells_of(default, COPA, "lora-r1")) == 5, "a cell for each draw of the pairs"
    assert not cells_of(default, WORDS, "lora-r1") and cells_of(everything, WORDS, "lora-r1"), "training takes long"
    assert "l0-gates" not in default.rows and "l0-gates" in everything.rows


def test_a_limit_takes_fewer_pairs_too_and_one_draw_of_them():
    (cell,) = cells_of(spec_of(limit=40, everything=False), WORDS, "fisher")
    assert (cell.task.limit, cell.task.pairs.n_pairs, cell.task.pairs.pairs_draw) == (40, 40, 0)
    (cell,) = cells_of(spec_of(limit=900, everything=False), COPA, "fisher")
    assert (cell.task.limit, cell.task.pairs.n_pairs) == (900, 400)
    (cell,) = cells_of(spec_of(limit=900, everything=False), WORDS, "fisher")
    assert cell.task.limit == 400, "a limit never adds items"
    assert len(spec_of(limit=900).rows) == 6 < len(spec_of().rows), "a quick look has the main rows alone"
    (pairs,) = specs.read("real", ["pairs"], limit=40)
    assert {cell.task.pairs.n_pairs for entry in pairs.entries for cell in entry.cells} == {40}


def test_controls_draw_anew_with_the_pairs():
    spec = spec_of(everything=False)
    draws = {
        name: [(cell.task.pairs.pairs_draw, cell.method.draw) for cell in cells_of(spec, COPA, name)]
        for name in spec.rows
    }
    assert draws["random-at-kl"] == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)]
    assert draws["fisher"] == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0)]


@needs_shared
def test_every_draw_of_pairs_leaves_some_over():
    for name in ("skill", "pairs"):
        (spec,) = specs.read("real", [name], data_dir=str(SHARED / "data"))
        for cell in {replace(cell.task, limit=1) for entry in spec.entries for cell in entry.cells}:
            if cell.pairs.pairs_draw is not None and cell.name == "copa-choices":
                assert paper_task(
                    cell.name, data_dir=cell.data_dir, toxicity="embedded", cache="", device=None, **vars(cell.pairs)
                ).left_over


RECORD = {"environment": {"commit": "c"}, "device": "cpu", "dtype": "torch.float32", "wording": "w"}


def shown(tmp_path, block: str, records: list[dict]) -> sections.Section:
    """Return the report section of these records, each placed in the first row of its method."""
    spec, manifest = spec_of(everything=False), Manifest(tmp_path, "real")
    entries = manifest.entries.setdefault("skill", {})
    for number, record in enumerate(records):
        record = record | RECORD | {"id": f"{record['method']}-{number}"}
        manifest._bundle[record["id"]] = record
        row = next(name for name, fields in spec.rows.items() if fields["method"] == record["method"])
        entries.setdefault(f"{block}|{row}|0.03", []).append(record["id"])
    page.write([spec], manifest)
    return sections.section(spec, manifest)


def test_gains_stars_and_controls(tmp_path):
    vanilla = {key: value for key, value in made_up("vanilla", better(0)).items() if key != "kl"} | {"columns": {}}
    steered = [made_up("fisher", better(20), level=0.03, pairs=draw) for draw in "ab"]
    records = [
        vanilla,
        *steered,
        made_up("lora-r1", better(2, 1), level=0.03),
        made_up("random-at-kl", better(9), level=0.03),
    ]
    examples = made_up("few-shot", better(30), level=None, measured=0.2)
    unreached = made_up("caa", better(0), level=0.03, unreached="it overflowed")
    del unreached["outcomes"], unreached["kl"]["measured"]
    records += [made_up("published", better(30), level=0.1), examples, unreached]
    section = shown(tmp_path, COPA, [record | {"columns": {}} for record in records])
    (block,) = section.blocks
    gains = {row.key: row.values[block.columns.index("gain")] for row in block.rows}
    assert gains["fisher"].text.startswith("+20.0 [") and gains["fisher"].significant and len(gains["fisher"].ids) == 2
    assert not gains["lora-r1"].significant and not gains["random-at-kl"].significant, "no control is tested"
    assert gains["published"].significant and gains["few-shot"].significant and gains["caa"].text == "–"
    assert any("it overflowed" in note for note in block.notes)
    (found,) = findings.findings([section])
    assert "AUSteer" not in found.verdict and "xamples" not in found.verdict, "of the primary level alone"
    assert f"{COPA}: causal, KL budget, FFN, 2 draws +20.0" in found.verdict and "random" not in found.verdict
    assert (tmp_path / "figures" / "skill.png").exists()
    assert any("AUSteer, Neuron / 0.03" in line and "not run" in line for line in section.missing)


def test_on_words_the_finding_counts_skill_and_not_exact_match(tmp_path):
    vanilla = row("vanilla", 80, 100, 120, site=None)
    kl = {"kl": {"asked": 0.03, "measured": 0.03, "text": "prose"}, "pairs_hash": "p", "touched": 1}
    biased = row("published", 120, 120, 120) | kl  # 20 points of exact match, none of skill
    skilled = row("fisher", 160, 160, 170) | kl
    section = shown(tmp_path, WORDS, [vanilla, biased, skilled])
    exact, skill, parts = section.blocks
    assert UNBIASED in skill.name and "exact match" in exact.name and "made of" in parts.name
    (found,) = findings.findings([section])
    assert "causal, KL budget, FFN +25.0" in found.verdict and "published" not in found.verdict.lower()
    assert "AUSteer" not in found.verdict
    forced = next(row for row in parts.rows if row.label.startswith("forced choice"))
    assert [value.text for value in forced.values] == ["+10.0", "+0.0", "+0.0", "+10.0"]


@pytest.mark.slow
def test_dry_run_of_the_real_scale(tmp_path):
    from samples import write_datasets

    data = write_datasets(tmp_path / "data")
    command = ["--scale", "real", "--dry-run", "--data-dir", str(data), "--results", str(tmp_path), "--jobs", "2"]
    assert reproduce.main(command) is None
    assert "DRY RUN" in (tmp_path / "real-dry-run" / "report.md").read_text()
