"""The tables of what gains are made of: from made-up records whose parts are known."""

from dataclasses import replace

import pytest

from eval.decomposition import LIKELIER, UNBIASED
from experiments import parts_report, records
from paper.manifest import Manifest
from paper.render.findings import _skill
from paper.render.parts import parts
from paper.render.sections import Section
from paper.specs import Spec

N = 200


def row(method: str, exact: int, likelier: int, unbiased: int, site: str | None = "ffn", draw: int = 0) -> dict:
    """A record in which the first so many items are right, by each reading."""
    columns = {
        "exact match": [item < exact for item in range(N)],
        LIKELIER: [item < likelier for item in range(N)],
        UNBIASED: [item < unbiased for item in range(N)],
        "an option at all": [item < exact for item in range(N)],
    }
    return {
        "id": f"{method}-{draw}", "method": method, "site": site, "draw": draw, "options": {}, "n": N, "right": exact,
        "measure": "exact match", "test_split": "test", "columns": records.pack_columns(columns),
        "outcomes": records.pack(columns["exact match"]), "extras": {"AUC": 0.75}, "gained": 0, "lost": 0, "p": 1.0,
    }  # fmt: skip


VANILLA = row("vanilla", 80, 100, 120, site=None)
BIASED = row("published", 120, 120, 120)  # it answers as the unsteered model does without its preference
SKILLED = row("causal", 160, 160, 170)
CONTROLS = [row("random", 80 + 20 * draw, 100, 120, draw=draw) for draw in (0, 1, 2)]
ROWS = [VANILLA, *CONTROLS, BIASED, SKILLED]


def test_a_line_per_row_and_two_that_steer_nothing():
    lines = {line.name: line for line in parts_report.lines_of(ROWS, {})}
    gains = {name: {part.name: part.gain for part in line.parts.values()} for name, line in lines.items()}
    assert gains["forced choice, nothing steered"] == {"skill": 0, "bias": 0, "format": 10}
    assert gains["fitted offset, nothing steered"] == {"skill": 0, "bias": 10, "format": 10}
    assert gains["published, FFN"] == {"skill": 0, "bias": 10, "format": 10}
    assert gains["causal, FFN"] == {"skill": 25, "bias": 5, "format": 10}
    assert lines["causal, FFN"].total == 40 and lines["causal, FFN"].p < 1e-9 and lines["published, FFN"].p == 1
    control = lines["random, FFN, 3 draws"]
    assert control.p is None and control.total == 10
    assert (control.parts["format"].low, control.parts["format"].gain, control.parts["format"].high) == (0, 10, 20)


def test_better_is_said_of_skill_alone():
    lost = row("caa", 140, 120, 90, site="layer")
    lines = parts_report.lines_of([*ROWS, row("sta", 130, 140, 160), lost], {})
    published, causal, sta, caa = parts_report.verdict(lines, VANILLA)
    assert (
        "published, FFN: +20.0 points; no skill is shown (+0.0 points of skill, Holm-adjusted p = 1); +10.0 of bias"
        in published
    )
    assert "+10.0 of format" in published and "it does not beat fitted offset" in published
    assert "the answers are better: +25.0 points of skill" in causal and "does not beat" not in causal
    assert "the answers are better" in sta and "of format" not in sta
    assert "skill is lost (-15.0 points of skill" in caa
    table = parts_report.table(lines)
    assert "| causal, FFN | +40.0 | +25.0 [" in table and table.count("\n|") == 2 + 2 + 5


def test_rows_as_skill_gain_what_is_skill():
    vanilla, *_, causal = parts_report.as_skill(ROWS)
    assert (vanilla["right"], causal["right"], causal["measure"]) == (120, 170, UNBIASED)
    assert vanilla["outcomes"] == VANILLA["columns"][UNBIASED]
    unreached = {"method": "caa", "kl": {"unreached": "it changes nothing"}}
    assert parts_report.as_skill([unreached]) == [unreached]


class Kept(Manifest):
    """A manifest that holds these records, by row."""

    def __init__(self, by_row: dict[str, list[dict]]):
        self.by_row = by_row

    def records(self, spec, block, row, column):
        return self.by_row.get(row, [])

    def why_missing(self, spec, block, row, column):
        return "not run"


@pytest.fixture
def spec() -> Spec:
    names = ("vanilla", "offset", "published", "causal", "random", "caa")
    return Spec(
        "parts", "embedded", "title", "parts", "says", {"m": {}}, {name: {"label": name} for name in names}, {"copa": {}},
        source="table1", show={"unsteered": {"offset": UNBIASED}},
    )  # fmt: skip


def test_the_table_of_the_report(spec):
    kept = Kept({"vanilla": [VANILLA], "published": [BIASED], "causal": [SKILLED], "random": CONTROLS})
    shown = {one.key: one.values[0] for one in parts(spec, kept, "m").rows}
    assert (shown["vanilla"].text, shown["vanilla"].small) == ("60.0 %", "AUC 0.750")
    assert (shown["offset"].text, shown["offset"].small) == ("+0.0", "bias +10.0, format +10.0")
    assert (shown["causal"].text, shown["causal"].marks) == ("+25.0", "*")
    assert (shown["published"].text, shown["published"].marks) == ("+0.0", "")
    assert "gain +10.0; range of 3 draws of skill [+0.0, +0.0]" in shown["random"].facts
    assert shown["caa"].why == "not run" and spec.reads == {"vanilla", "published", "causal", "random", "caa"}
    old = VANILLA | {"columns": {"exact match": VANILLA["outcomes"]}}
    alone = parts(spec, Kept({"vanilla": [VANILLA], "random": [row("random", 90, 110, 160)]}), "m").rows[4].values[0]
    assert (alone.text, alone.marks) == ("+20.0", ""), "a control is not tested, even if only one draw is there"
    for mixed in ({"vanilla": [old], "causal": [SKILLED]}, {"vanilla": [VANILLA], "causal": [old]}):
        value = parts(spec, Kept(mixed), "m").rows[3].values[0]
        assert (value.text, value.why) == ("–", "computed before gains were taken apart")


def test_likelihoods_average_draws():
    def record(method, shift, draw=0, **more):
        columns = {
            "likelier choice": records.pack([True] * N),
            "log-odds": [shift + item / 20 - 4 for item in range(N)],
        }
        measured = {"likelihood": "whole choice"}
        return {
            "method": method,
            "site": None,
            "options": {},
            "draw": draw,
            "columns": columns,
            "measured": measured,
            **more,
        }

    vanilla = record("vanilla", 0.0)
    draws = [record("causal", 1.0, draw, kl={"asked": 0.03}) for draw in (0, 1)]
    prompts = record("few-shot", 0.5, kl={"asked": None, "measured": 0.1})  # prompts have no level
    untested = {"method": "caa", "kl": {"unreached": "it changes nothing"}}
    table = parts_report.likelihood_table([vanilla, *draws, prompts, untested], {}).splitlines()
    assert table[-1].startswith("| few-shot | +")
    (line,) = [line for line in table if line.startswith("| causal")]
    single = parts_report.likelihood_table([vanilla, draws[0]], {}).splitlines()[-1]
    assert line.startswith("| causal at 0.03, 2 draws | +") and line.split(" | ")[1:] == single.split(" | ")[1:]
    assert parts_report.likelihood_table(ROWS, {}) == "", "these answers are not compared by likelihood"


def test_a_finding_counts_places_with_skill(spec):
    fields = {"vanilla": ("vanilla", None), "offset": ("offset", None), "published": ("published", "ffn"),
              "causal": ("causal", "ffn"), "random": ("random", "ffn"), "caa": ("caa", "layer")}  # fmt: skip
    rows = {
        key: {"label": key, "method": method} | ({"site": site} if site else {})
        for key, (method, site) in fields.items()
    }
    spec = replace(spec, rows=rows, columns={"copa": {}, "boolq": {}}, blocks={"m": {}, "n": {}})

    class ByTask(Kept):
        def records(self, spec, block, row_name, column):
            method = SKILLED if column == "copa" else row("causal", 120, 120, 120)
            return {"vanilla": [VANILLA], "published": [BIASED], "causal": [method]}.get(row_name, [])

    kept = ByTask({})
    section = Section(spec, [parts(spec, kept, name) for name in ("m", "n")])
    found = _skill([section])
    assert "causal momentum in 2 of 4, the published rule in 0 of 4 places" in found.verdict
    assert "boolq of m (60.0 %), boolq of n (60.0 %)" in found.numbers and "copa" not in found.numbers
    assert _skill([]) is None and _skill([Section(spec, [parts(spec, Kept({}), "m")])]) is None
