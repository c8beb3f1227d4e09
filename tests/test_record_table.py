"""The table of records: its rules, its page, and one row run anew."""

import json
from copy import deepcopy
from pathlib import Path

import pytest

from austeer.errors import AUSteerError
from austeer.plan import Plan
from experiments import record_table, records
from experiments.cell import AT_KL

DOCS = Path(__file__).parents[1] / "docs"
KEPT = json.loads((DOCS / "records" / "embedded-copa-fisher-attention.json").read_text())


def entry(gain: float, p: float = 0.001, task: str = "copa") -> dict:
    return {**deepcopy(KEPT), "gain": [gain, gain - 1, gain + 1], "p": p, "cell": KEPT["cell"] | {"task": task}}


def with_right(count: int, task: str = "copa") -> dict:
    """Return a record in which so many more items are right than in the unsteered model."""
    made, before = entry(0, task=task), records.unpack(KEPT["vanilla"]["outcomes"])
    wrong = [index for index, right in enumerate(before) if not right][:count]
    for row in made["draws"]:
        row["outcomes"] = records.pack([right or index in wrong for index, right in enumerate(before)])
    return made


def test_the_page_is_made_from_the_files():
    assert (DOCS / "records.md").read_text() == record_table.table(record_table.standing(DOCS / "records"))


def test_a_record_is_five_draws_at_one_kl():
    cells = record_table.cells_of(KEPT["cell"], {"device": "cpu"})
    assert [cell.task.pairs.pairs_draw for cell in cells] == [0, 1, 2, 3, 4]
    assert {(cell.search.kind, cell.search.level, cell.task.pairs.n_pairs) for cell in cells} == {(AT_KL, 0.01, 400)}
    assert len({row["pairs_hash"] for row in KEPT["draws"]}) == 5
    assert all(abs(row["kl"]["measured"] / 0.01 - 1) < 0.1 for row in KEPT["draws"])


def test_rules():
    record_table.refuse(entry(5), [entry(4), entry(9, task="boolq")])
    other_split = entry(9) | {"cell": KEPT["cell"] | {"test_split": "test2"}}
    record_table.refuse(entry(5), [other_split])
    for new, old, rule in [
        (entry(-5), [], "rule 3"),
        (entry(5, p=0.02), [], "rule 3"),
        (entry(5), [entry(5)], "rule 4"),
    ]:
        with pytest.raises(AUSteerError, match=rule):
            record_table.refuse(new, old)


def test_the_largest_gain_of_a_place_stands_whatever_a_file_says(tmp_path):
    for number, (count, task) in enumerate([(40, "copa"), (90, "copa"), (60, "copa"), (10, "boolq")]):
        (tmp_path / f"{number}.json").write_text(json.dumps(with_right(count, task) | {"gain": [99, 99, 99]}))
    n = KEPT["vanilla"]["n"]
    standing = {record["cell"]["task"]: record["gain"][0] for record in record_table.standing(tmp_path)}
    assert standing == {"copa": pytest.approx(9000 / n), "boolq": pytest.approx(1000 / n)}
    page = record_table.table(record_table.standing(tmp_path))
    assert page.index("| boolq |") < page.index("| copa |") and f"{9000 / n:+.1f} [" in page


def test_a_replay_is_equal_but_for_rounding_on_another_processor():
    def with_flips(count: int, **environment) -> dict:
        other = deepcopy(KEPT)
        row = other["draws"][1]
        outcomes = records.unpack(row["outcomes"])
        row["outcomes"] = records.pack([not right for right in outcomes[:count]] + outcomes[count:])
        row["environment"] |= environment
        return other

    n = KEPT["draws"][1]["n"]
    allowed = int(record_table.MOST_DIFFERENT * n)
    assert record_table.compare(KEPT, KEPT) == record_table.compare(KEPT, with_flips(allowed, machine="another")) == []
    assert record_table.compare(KEPT, with_flips(1)) == [f"draw 1: 1 of {n} outcomes differ"]
    (line,) = record_table.compare(KEPT, with_flips(allowed + 1, machine="another"))
    assert line == f"draw 1: {allowed + 1} of {n} outcomes differ"
    fewer = deepcopy(KEPT) | {"vanilla": KEPT["vanilla"] | {"n": 3}}
    assert record_table.compare(KEPT, fewer) == ["vanilla: another n"]
    others = deepcopy(KEPT)
    others["draws"][2]["pairs_hash"] = "x"
    assert record_table.compare(KEPT, others) == ["draw 2: another pairs_hash"]


def test_uncommitted_code_enters_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(record_table, "environment", lambda: {"changed": True})
    with pytest.raises(AUSteerError, match="commit your changes first"):
        record_table.main(["enter", "--data_name", "copa", "--method", "fisher", "--applied_module", "attention"])


@pytest.mark.slow
def test_entering_a_row_writes_its_files_and_the_page(monkeypatch, tmp_path):
    monkeypatch.setattr(record_table, "environment", lambda: {"changed": False})
    folder = tmp_path / "records"
    command = [
        "enter",
        "--data_name",
        "copa",
        "--method",
        "causal-fitted",
        "--applied_module",
        "attention",
        "--device",
        "cpu",
    ]
    folders = ["--results", str(tmp_path / "r"), "--path", str(tmp_path / "ranks"), "--folder", str(folder)]
    record_table.main([*command, *folders])
    assert sorted(file.name for file in folder.iterdir()) == [
        f"embedded-copa-causal-fitted-attention.{end}" for end in ("json", "safetensors")
    ]
    assert "fitted temperature" in (tmp_path / "records.md").read_text()
    plan = Plan.load(folder / "embedded-copa-causal-fitted-attention.safetensors")
    record = json.loads((folder / "embedded-copa-causal-fitted-attention.json").read_text())
    assert len(plan.aus()) == record["draws"][0]["touched"]
    with pytest.raises(AUSteerError, match="rule 4"):
        record_table.main([*command, *folders])


@pytest.mark.parametrize(
    "command, message",
    [
        ("enter --data_name copa --method fisher --applied_module layer+x", "fisher acts at attention, ffn"),
        ("enter --method fisher --applied_module attention", "a record covers one task"),
        ("enter --data_name copa --method few-shot --applied_module prompt", "few-shot has no strength"),
        ("enter --data_name copa --method fisher --applied_module attention --limit 5", "leave out --limit"),
        ("replay nothing.json", "nothing.json"),
    ],
)
def test_wrong_input_is_told_in_a_line(command, message):
    with pytest.raises(AUSteerError, match=message):
        record_table.main(command.split())


@pytest.mark.slow
def test_a_row_is_run_anew(capsys):
    file = DOCS / "records" / "embedded-copa-fisher-attention.json"
    assert record_table.main(["replay", str(file), "--device", "cpu"]) is None
    assert "the same: +" in capsys.readouterr().out
