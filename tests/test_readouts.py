"""The map of read-outs: what the unsteered model gets right by each way of reading its answers."""

import json

import pytest
from samples import write_datasets

import main
import rmodels
from austeer.errors import AUSteerError
from eval.tasks.likelihood import encoded_items, log_probabilities
from eval.tasks.registry import paper_task
from experiments.bench import BENCHES


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_datasets(tmp_path_factory.mktemp("data"))


def test_every_reading_has_a_line(data, checkpoints, tmp_path, capsys):
    BENCHES.close()
    tasks = ["copa", "winogrande-choices", "bpo"]
    main.main(["readouts", "--model", str(checkpoints["llama"]), "--data-dir", str(data), "--limit", "6", "--device", "cpu",
               "--task", *tasks, "--results", str(tmp_path)])  # fmt: skip
    BENCHES.close()
    printed = capsys.readouterr().out
    lines = [line.strip("| \n").split(" | ") for line in printed.splitlines() if line.startswith("| ")][1:]
    assert [tuple(line[:2]) for line in lines] == [
        ("copa", "word for word"), ("copa", "likelier option"), ("copa", "likelier option, offset removed"),
        ("winogrande-choices", "whole choice"), ("winogrande-choices", "whole choice, per token"),
        ("bpo", "wanted answer of a ranking pair, per token"),
    ]  # fmt: skip
    records = [json.loads(file.read_text()) for file in (tmp_path / "records").glob("*.json")]
    assert {record["task"] for record in records} == set(tasks[:2])
    (copa,) = [record for record in records if record["task"] == "copa"]
    assert lines[0][2].startswith(f"{100 * copa['right'] / copa['n']:.1f} [") and int(lines[0][3]) == copa["n"]
    assert lines[1][4] == f"{copa['extras']['AUC']:.3f}" and lines[1][5] == f"{copa['extras']['majority, %']:.1f}"
    model, tokenizer = rmodels.load(checkpoints["llama"], device="cpu"), rmodels.load_tokenizer(checkpoints["llama"])
    encoded = encoded_items(paper_task("bpo", data_dir=data).pairs[:6], tokenizer, rmodels.context_length(model))
    found = zip(encoded, log_probabilities(model, encoded).tolist(), strict=True)
    right = sum(a / len(pair.positive) > b / len(pair.negative) for pair, (a, b) in found)
    assert lines[5][2].startswith(f"{100 * right / len(encoded):.1f} [") and int(lines[5][3]) == len(encoded)
    assert "| task | read-out |" in (tmp_path / "readouts-llama.md").read_text()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--limit", "0"], "--limit must be at least 1"),
        (["--chat", "--task", "copa-choices"], "no chat form: leave out copa-choices, or --chat"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(AUSteerError, match=message):
        main.main(["readouts", "--model", "m", *options])
