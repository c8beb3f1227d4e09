"""What of our numbers measures what the paper's does: only those get a difference, and the report says what differs."""

import json

import pytest
from test_paper import HALF, MOST, made_up

from paper import comparable, specs
from paper.manifest import Manifest
from paper.render import heat_maps, page, pictures, tables

THEIRS = {
    "task": "copa", "n": 500, "measured": {}, "wording": "authors: utils/load_dataset.py, sha256 0; 0123456789ab",
    "protocol": "paper", "kernel": "au_sdpa", "grid": [{"k": 16, "alpha": 50.0}], "search": None,
}  # fmt: skip
SEARCHED = {"grid": [{"k": 1}, {"k": 2}]}


def test_what_the_authors_code_measured_differs_in_nothing():
    assert comparable.differences(THEIRS) == []
    assert comparable.differences(THEIRS | {"grid": None}) == [], "an unsteered record has no grid"
    assert comparable.differences(THEIRS | SEARCHED | {"search": "test"}) == [], (
        "the paper, too, chose on the test split"
    )
    assert comparable.differences(THEIRS | {"measured": {"scorer": "perspective:first-span"}}) == []
    assert comparable.differences(THEIRS | {"task": "not the paper's", "n": 7}) == []


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"measured": {"scorer": "local:unitary/toxic-bert@a:toxic"}}, "scored by local:unitary/toxic-bert@a:toxic instead of Pers"),
        ({"measured": {"scorer": "embedded@0"}}, "scored by embedded@0"),
        ({"wording": "this project; 0123456789ab"}, "the prompts are not the authors'"),
        ({"wording": THEIRS["wording"] + ", in the model's chat format"}, "in the model's chat format"),
        ({"protocol": "clean", "kernel": "au_eager"}, "the protocol is clean"),
        ({"kernel": "au_eager"}, "the attention kernel is eager instead of sdpa"),
        (SEARCHED | {"search": "racing"}, "chosen on validation items"),
        ({"n": 300}, "not all test items of the paper"),
    ],
)  # fmt: skip
def test_every_difference_is_named(fields, reason):
    (said,) = comparable.differences(THEIRS | fields)
    assert reason in said


def test_the_judge_must_be_the_papers():
    theirs = {"judge": "gpt-5-mini", "orders": "one"}
    assert comparable.judge_differences(theirs) == []
    (said,) = comparable.judge_differences(theirs | {"judge": "another"})
    assert "another instead of GPT-5-mini" in said
    assert comparable.judge_differences({"judge": "gpt-5-mini", "orders": "both"}) == [
        "the judge sees both orders instead of one"
    ]


def test_the_scorer_is_in_the_heading_and_takes_the_difference_away(tmp_path):
    """An average has no difference either if one of its parts has none."""

    def shown(name, fields):
        outcomes = {(row, column): [MOST] for row in ("vanilla", "x") for column in ("a", "detox")}
        printed = {"b": {"x": {"a": 75.0, "detox": 70.0, "avg": 72.5}}}
        spec, manifest = made_up(tmp_path / name, outcomes, {"x": fields, "vanilla": fields}, printed=printed)
        (block,) = tables.blocks(spec, manifest)
        page.write([spec], manifest)
        return block, (tmp_path / name / "report.md").read_text(), (tmp_path / name / "report.html").read_text()

    block, markdown, html = shown("theirs", {"measured": {"scorer": "perspective"}})
    assert block.heads[1] == "detox (n = 100, perspective)"
    assert [value.difference for value in block.rows[1].values] == pytest.approx([5.0, 10.0, 7.5])
    assert "paper 70 (+10.0)" in markdown and "paper 70 (+10.0)" in html and "No difference" not in markdown
    block, markdown, html = shown("ours", {"measured": {"scorer": "embedded@0"}})
    assert block.heads[1] == "detox (n = 100, embedded@0)"
    assert [value.difference for value in block.rows[1].values] == [None, None, None]
    for text in (markdown, html):
        assert "paper 70" in text and "(+10.0)" not in text and "Toxicity: embedded@0." in text
        assert "toxicity is scored by embedded@0 instead of Perspective" in text


def test_reasons_below_a_table_name_the_columns_they_are_about(tmp_path):
    spec, manifest = made_up(
        tmp_path, {("x", "a"): [MOST], ("x", "b"): [HALF]}, {"x": {"protocol": "clean"}},
        printed={"b": {"x": {"a": 75.0, "b": 50.0}}},
    )  # fmt: skip
    path = tmp_path / "records" / "x-b-0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "wording": "this project; 0123456789ab"}))
    (block,) = tables.blocks(spec, manifest)
    assert block.notes == [
        "Prompts: authors: a file; this project (b). Pairs: theirs. Protocol: clean. Attention kernel: sdpa.",
        "No difference from the paper's number is given where the protocol is clean instead of the authors'; or the prompts are "
        "not the authors' (b).",
    ]


@pytest.mark.parametrize("judge, orders, difference", [("gpt-5-mini", "one", 8.0), ("gpt-5-mini", "both", None)])
def test_a_win_rate_names_its_judge(tmp_path, judge, orders, difference):
    spec, manifest = made_up(
        tmp_path, {("vanilla", "bpo"): [HALF], ("x", "bpo"): [MOST]}, printed={"b": {"x": {"bpo": 22.0}}}
    )
    for row in ("vanilla", "x"):
        path = tmp_path / "records" / f"{row}-bpo-0.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "n": 200}))
    spec.columns["bpo"]["judge"] = True
    result = {"judge": judge, "orders": orders, "delta": 30.0, "delta_interval": [20.0, 40.0]}
    (tmp_path / "judge-x-bpo-0-test-vanilla-bpo-0-test-0.json").write_text(json.dumps(result))
    other = result | {"judge": "another", "orders": "both", "delta": 99.0}
    (tmp_path / "judge-x-bpo-0-test-vanilla-bpo-0-test-.json").write_text(json.dumps(other))
    (block,) = tables.blocks(spec, manifest)
    value = block.rows[-1].values[0]
    assert value.text == "30.0" and value.difference == difference and comparable.OUR_JUDGE_PROMPT in value.facts
    assert block.heads[0] == f"bpo (n = 200, judge {judge}, {orders} order{'s' * (orders == 'both')})"


def test_chosen_settings_have_a_difference_only_where_they_were_chosen_alike(tmp_path):
    (spec,) = specs.read("paper", ["table8"])

    def of(name, fields):
        _, manifest = made_up(tmp_path / name, {("x", "copa"): [MOST]}, {"x": {"n": 500} | fields})
        manifest.entries["table1"] = {"llama2-7b-chat|austeer-ffn|copa": ["x-copa-0"]}
        block = tables.blocks(spec, manifest)[0]
        return block.rows[0].values[block.columns.index("copa")].difference

    assert of("a", {}) == 2 - 50
    assert of("b", SEARCHED | {"search": "racing"}) is None


def test_a_grid_gets_no_map_of_differences_with_our_prompts(tmp_path, monkeypatch):
    (spec,) = specs.read("paper", ["figure10"])
    says, manifest = spec.columns["copa"], Manifest(tmp_path, "paper")
    scores = {f"{k:g},{alpha:g}": 0.9 for k in says["ks"] for alpha in says["alphas"]}
    record = THEIRS | {"wording": "this project; 0", "measure": "drawn", "grid_scores": scores, "grid_vanilla": "1:1"}
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "copa.json").write_text(json.dumps(record))
    manifest.entries["figure10"] = {"gemma2-9b-it|austeer-ffn|copa": ["copa"]}
    written = []
    monkeypatch.setattr(heat_maps, "_write", lambda axis, text: written.append(text))
    assert pictures.draw(spec, manifest, tmp_path)
    assert written == ["No difference:\nthe prompts are not the authors'."]


def test_the_row_of_the_authors_runs_as_their_code_did():
    (spec,) = specs.read("paper", ["table1"], attn="eager", engine="vllm")
    by_row = {}
    for entry in spec.entries:
        by_row.setdefault(entry.row, set()).update((cell.model.attn, cell.model.engine) for cell in entry.cells)
    assert by_row["authors"] == {("sdpa", "live")} and by_row["austeer-ffn"] == {("eager", "vllm")}
