"""The table of records: its rules, its page, and one row run anew."""

import json
from copy import deepcopy
from pathlib import Path

import pytest

from austeer.errors import AUSteerError
from experiments import record_table, records
from experiments.cell import AT_KL

DOCS = Path(__file__).parents[1] / "docs"
KEPT = json.loads((DOCS / "records" / "embedded-copa-fisher.json").read_text())


def entry(gain: float, p: float = 0.001, task: str = "copa") -> dict:
    return {**deepcopy(KEPT), "gain": [gain, gain - 1, gain + 1], "p": p, "cell": KEPT["cell"] | {"task": task}}


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
    for new, old, rule in [
        (entry(-5), [], "rule 3"),
        (entry(5, p=0.02), [], "rule 3"),
        (entry(5), [entry(5)], "rule 4"),
    ]:
        with pytest.raises(AUSteerError, match=rule):
            record_table.refuse(new, old)


def test_the_largest_gain_of_a_place_stands(tmp_path):
    for number, (gain, task) in enumerate([(4, "copa"), (9, "copa"), (6, "copa"), (1, "boolq")]):
        (tmp_path / f"{number}.json").write_text(json.dumps(entry(gain, task=task)))
    standing = {record["cell"]["task"]: record["gain"][0] for record in record_table.standing(tmp_path)}
    assert standing == {"copa": 9, "boolq": 1}
    page = record_table.table(record_table.standing(tmp_path))
    assert page.index("| boolq |") < page.index("| copa |") and "+9.0 [+8.0, +10.0]" in page


def test_a_replay_may_differ_by_rounding_alone():
    def with_flips(count: int) -> dict:
        other = deepcopy(KEPT)
        outcomes = records.unpack(KEPT["draws"][1]["outcomes"])
        other["draws"][1]["outcomes"] = records.pack([not right for right in outcomes[:count]] + outcomes[count:])
        return other

    allowed = int(record_table.SPREAD * KEPT["draws"][1]["n"])
    assert record_table.compare(KEPT, KEPT) == record_table.compare(KEPT, with_flips(allowed)) == []
    (line,) = record_table.compare(KEPT, with_flips(allowed + 1))
    assert line == f"draw 1: {allowed + 1} of {KEPT['draws'][1]['n']} outcomes differ"
    fewer = deepcopy(KEPT) | {"vanilla": KEPT["vanilla"] | {"n": 3}}
    assert record_table.compare(KEPT, fewer) == ["vanilla: other items or another measure"]


@pytest.mark.parametrize(
    "command, message",
    [
        ("enter --data_name copa --method fisher --applied_module layer+x", "fisher acts at attention, ffn"),
        ("enter --method fisher --applied_module attention", "a record is of one task"),
        ("replay nothing.json", "nothing.json"),
    ],
)
def test_wrong_input_is_told_in_a_line(command, message):
    with pytest.raises(AUSteerError, match=message):
        record_table.main(command.split())


@pytest.mark.slow
def test_a_row_is_run_anew(tmp_path, capsys):
    file = tmp_path / "records" / "embedded-copa-fisher.json"
    file.parent.mkdir()
    file.write_text(json.dumps(KEPT))
    folders = ["--results", str(tmp_path / "r"), "--path", str(tmp_path / "ranks"), "--folder", str(file.parent)]
    assert record_table.main(["replay", str(file), "--device", "cpu", *folders]) is None
    assert "the same: +" in capsys.readouterr().out
