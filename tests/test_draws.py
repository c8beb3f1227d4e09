"""Groups of pairs, and draws of pairs by whole groups."""

import json
from collections import Counter

import pytest
from conftest import SHARED, needs_shared
from samples import write_datasets

import main
from austeer.errors import AUSteerError
from austeer.pairs import Pair, pairs_hash
from eval.data import pairs_command
from eval.data.similar import TFIDF
from eval.tasks.embedded import EmbeddedTask
from eval.tasks.own_pairs import PairTask
from eval.tasks.registry import PAPER_TASKS, paper_task
from eval.tasks.splits import drawn
from experiments.bench import BENCHES
from experiments.cell import PairsSpec, TaskSpec, bench_of
from experiments.store import Store


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_datasets(tmp_path_factory.mktemp("data"))


def task_of(name, data, **settings):
    return paper_task(name, toxicity="embedded", data_dir=data, encoder=TFIDF, **settings)


@pytest.mark.parametrize("name", PAPER_TASKS)
@pytest.mark.parametrize("more", [{}, {"general_pairs": True}, {"protocol": "paper"}, {"swapped_choices": True}])
def test_every_pair_has_the_group_of_its_row(name, more, data):
    if (name.endswith("-choices") and "protocol" in more) or (name != "copa" and "swapped_choices" in more):
        return
    task = task_of(name, data, **more)
    assert len(task.groups) == len(task.pairs) > 0
    rows = {row["premise"]: row for row in task.split.ranking} if name == "copa" else {}
    for pair, group in zip(task.pairs, task.groups, strict=True):
        if name == "copa":  # the row is found by its premise, the group worked out by hand
            (row,) = [row for premise, row in rows.items() if f"Event: {premise}\n" in pair.prompt]
            assert group == "\n".join(sorted([row["choice1"], row["choice2"]]))
        elif name == "boolq":
            assert f"Passage: {group}\n" in pair.prompt
        elif name == "winogrande":
            assert group.startswith("Q") and "-" not in group
        else:
            assert group in {task.group(row) for row in task.split.ranking}
    if name in ("boolq", "winogrande"):
        assert max(Counter(task.groups).values()) > 1


def test_groups_of_tasks_without_rows_are_prompts():
    embedded = EmbeddedTask("svamp", limit=3)
    assert embedded.groups == [pair.prompt for pair in embedded.pairs]
    pairs = [Pair(f"prompt {i // 2}", f" {i}", " no") for i in range(300)]
    own = PairTask("mine", pairs)
    assert own.groups == [pair.prompt for pair in own.pairs] and len(set(own.groups)) == len(own.groups) / 2


def test_a_draw_is_of_whole_groups():
    groups = ["a", "b", "a", "c", "d", "d", "d", "e", "b"]
    seen = set()
    for seed in range(60):
        chosen = drawn(groups, 5, seed)
        assert chosen == sorted(chosen) == drawn(groups, 5, seed)
        names = {groups[i] for i in chosen}
        assert [i for i, name in enumerate(groups) if name in names] == chosen and len(chosen) in (4, 5)
        seen.add(tuple(chosen))
    assert len(seen) > 5, "other seeds, other draws"
    assert drawn(["x", "x", "x"], 2, 0) == []
    # the group that no longer fits is passed over, and smaller ones fill the room
    assert all(len(drawn(["x"] * 3 + list("abcdef"), 4, seed)) == 4 for seed in range(20))


@pytest.mark.parametrize("name", ["copa", "copa-choices", "svamp"])
def test_drawn_pairs_and_those_left_over_share_no_group(name, data):
    whole = task_of(name, data)
    task = task_of(name, data, n_pairs=20, pairs_draw=1)
    assert len(task.pairs) == 20 and task.pairs != whole.pairs[:20]
    assert [pair for pair in whole.pairs if pair in task.pairs] == task.pairs
    group_of = dict(zip(whole.pairs, whole.groups, strict=True))
    assert [group_of[pair] for pair in task.pairs] == task.groups
    assert set(task.pairs) | set(task.left_over) == set(whole.pairs)
    assert not {group_of[pair] for pair in task.left_over} & set(task.groups)
    assert (task.validation, task.test) == (whole.validation, whole.test)
    assert task_of(name, data, n_pairs=20, pairs_draw=2).pairs != task.pairs


def test_without_a_draw_the_first_pairs_are_taken(data):
    whole, first = task_of("copa", data), task_of("copa", data, n_pairs=7)
    assert first.pairs == whole.pairs[:7] and first.groups == whole.groups[:7] and whole.left_over == []
    # the twin of a pair that is used is not left over
    groups = dict(zip(whole.pairs, whole.groups, strict=True))
    assert first.left_over == [pair for pair in whole.pairs[7:] if groups[pair] not in first.groups]


def test_draws_that_make_no_sense_are_refused(data):
    with pytest.raises(AUSteerError, match="add --n-pairs"):
        task_of("copa", data, pairs_draw=0)
    with pytest.raises(AUSteerError, match=r"^svamp has \d+ pairs, so every draw of 500 is the same"):
        _ = task_of("svamp", data, n_pairs=500, pairs_draw=0).pairs
    with pytest.raises(AUSteerError, match="add --n-pairs"):
        main.main(["--pairs-draw", "0", "1"])


def test_ranks_of_a_draw_have_a_folder_of_their_own():
    def folder(**pairs):
        model, task = bench_of(model="m", task="copa", **pairs)
        return Store("ranks").ranks_file(model, task, "causal", "ffn").parent.name

    assert folder() == "causal" and folder(n_pairs=5) == "causal-5-pairs"
    assert folder(n_pairs=5, pairs_draw=0) == "causal-5-pairs-draw-0"
    assert TaskSpec("copa", pairs=PairsSpec(5, 0)) != TaskSpec("copa", pairs=PairsSpec(5))


def test_the_command_reports_each_draw_beside_one_vanilla_row(data, checkpoints, tmp_path, capsys):
    BENCHES.close()
    command = ["--model", str(checkpoints["llama"]), "--data_name", "copa-choices", "--data-dir", str(data), "--device", "cpu",
               "--results", str(tmp_path), "--path", str(tmp_path / "ranks"), "--limit", "6", "--applied_module", "ffn",
               "--method", "causal", "--k", "4", "--alpha", "1", "--n-pairs", "20", "--pairs-draw", "0", "3"]  # fmt: skip
    main.main(command)
    printed = capsys.readouterr().out
    assert "## copa-choices, draw 0 of the pairs" in printed and "## copa-choices, draw 3 of the pairs" in printed
    rows = [json.loads(file.read_text()) for file in (tmp_path / "records").glob("*.json")]
    assert Counter(row["method"] for row in rows) == {"vanilla": 1, "prompt-only": 1, "causal": 2}
    expected = {pairs_hash(task_of("copa-choices", data, n_pairs=20, pairs_draw=draw).pairs) for draw in (0, 3)}
    assert {row["pairs_hash"] for row in rows if row["method"] == "causal"} == expected
    assert (tmp_path / "llama-copa-choices-20-pairs-draw-0-draw-3.md").exists()
    BENCHES.close()


@needs_shared
def test_draws_of_the_real_copa():
    task = task_of("copa-choices", SHARED / "data", n_pairs=400, pairs_draw=0)
    assert (len(task.pairs), len(task.left_over), len(task.validation), len(task.test)) == (400, 399, 200, 500)


def test_the_pairs_command_writes_a_draw_with_its_groups(tmp_path, capsys):
    data = write_datasets(tmp_path / "data")
    command = ["copa-choices", "--data-dir", str(data), "--n-pairs", "12", "--out", str(tmp_path / "pairs.jsonl")]
    written = []
    for draw in ("0", "1"):
        pairs_command.main([*command, "--pairs-draw", draw])
        written.append([json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()])
    assert all(len(rows) == 12 and all(row["group"] for row in rows) for rows in written) and written[0] != written[1]
