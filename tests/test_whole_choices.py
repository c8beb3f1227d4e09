"""Tasks by whole choices: the texts, the likelihoods by a plain loop, what is refused, and the command."""

import json

import pytest
import torch
from conftest import SHARED, needs_shared
from samples import write_datasets

import main
from austeer.errors import AUSteerError
from austeer.pairs import Pair
from eval.answering.answer_file import Answer
from eval.answering.live import LiveAnswerer
from eval.data.similar import TFIDF
from eval.data.wording import OWN
from eval.tasks.likelihood import with_whole_answers
from eval.tasks.registry import PAPER_TASKS, paper_task
from experiments.bench import BENCHES


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_datasets(tmp_path_factory.mktemp("data"))


def task_of(data, **settings):
    return paper_task("copa-choices", data_dir=data, encoder=TFIDF, **settings)


def test_texts_are_the_event_its_link_and_the_choices(tmp_path):
    """By hand, from the rows of copa and from its files."""
    rows = [
        {
            "premise": "My shadow fell. ",
            "question": "cause",
            "choice1": "The sun rose.",
            "choice2": " I hid.",
            "label": 0,
        },
        {
            "premise": "It rained.",
            "question": "effect",
            "choice1": "We sang.",
            "choice2": "The river rose.",
            "label": 1,
        },
    ]
    (tmp_path / "copa").mkdir()
    more = [{**rows[0], "premise": f"Event {i}.", "choice1": f"A {i}.", "choice2": f"B {i}."} for i in range(9)]
    for split, part in (("train", more), ("test", rows)):
        (tmp_path / "copa" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    task = task_of(tmp_path)
    assert [tuple(item) for item in task.test] == [
        ("My shadow fell because", " the sun rose.", " i hid."),
        ("It rained, so", " the river rose.", " we sang."),
    ]
    assert task.pairs[0] == Pair("Event 0 because", " a 0.", " b 0.")
    told = task.prompted(task.test)[1]
    assert told.prompt == f"{task.words.instruction}\n\nIt rained, so" and told[1:] == task.test[1][1:]
    assert task.words.instruction == paper_task("copa", data_dir=tmp_path).words.instruction


def test_winogrande_and_storycloze_go_on_with_either_choice():
    winogrande, storycloze = PAPER_TASKS["winogrande-choices"], PAPER_TASKS["storycloze-choices"]
    words = json.loads(OWN.read_text())
    row = {"sentence": " Sarah operated better than Maria so _ got the easier cases.", "option1": "Sarah", "option2": "Maria",
           "answer": "2"}  # fmt: skip
    filled = winogrande._filled(None, words["winogrande-choices"]["test"], row)
    assert filled == (
        "Sarah operated better than Maria so",
        " Maria got the easier cases.",
        " Sarah got the easier cases.",
    )
    story = {
        **{f"sent{n}": f"Sentence {n}. " for n in (1, 2, 3, 4)},
        "ending1": "The end.",
        "ending2": " No end. ",
        "label": 1,
    }
    filled = storycloze._filled(storycloze, words["storycloze-choices"]["test"], story)
    assert filled == ("Sentence 1. Sentence 2. Sentence 3. Sentence 4.", " The end.", " No end.")


@pytest.mark.parametrize("name", ["copa", "winogrande", "storycloze"])
def test_rows_and_splits_are_those_of_the_task_by_letters(data, name):
    ours, letters = (paper_task(task, data_dir=data) for task in (f"{name}-choices", name))
    assert ours.split == letters.split
    assert len(ours.pairs) == len(letters.pairs) and len(ours.test) == len(letters.test)
    for item, pair in zip(ours.test, ours.pairs, strict=False):
        assert item.gold != item.wrong and pair.positive != pair.negative


def by_a_plain_loop(model, tokenizer, prompt, *answers):
    """For each answer, the log-probability of its tokens, one forward of the whole text, and how many they are.

    They are the tokens from the first one on that is not the prompt's in both texts.
    """
    alone, *texts = (tokenizer(text)["input_ids"] for text in (prompt, prompt + answers[0], prompt + answers[1]))
    start = 0
    while start < len(alone) and all(ids[start] == alone[start] for ids in texts):
        start += 1
    for ids in texts:
        with torch.inference_mode():
            logp = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        yield sum(float(logp[at - 1, ids[at]]) for at in range(start, len(ids))), len(ids) - start


ITEMS = [
    ("They ga because", " the man slept.", " the man left for town."),  # the choices begin alike
    ("They ga", "ve it away.", "in."),  # a token crosses the seam
    ("A lamp fell, so", " it broke.", " we bought another lamp, and a better one."),
]


def test_likelihoods_are_of_the_whole_choice(data, llama, tokenizer):
    task = task_of(data)
    items = [*task.test, *(task.test[0]._replace(prompt=p, gold=r, wrong=w) for p, r, w in ITEMS)]
    answers = task.answers(LiveAnswerer(llama, tokenizer), items)
    for item, answer in zip(items, answers, strict=True):
        (right, n_right), (wrong, n_wrong) = by_a_plain_loop(llama, tokenizer, *item)
        assert answer.options[0] == pytest.approx(right - wrong, abs=2e-3)
        assert answer.options[1] == pytest.approx(right / n_right - wrong / n_wrong, abs=2e-4)
    one_by_one = task_of(data, batch_size=1).answers(LiveAnswerer(llama, tokenizer), items)
    for one, answer in zip(one_by_one, answers, strict=True):
        assert one.options == pytest.approx(answer.options, abs=1e-4)


def test_lengths_count_what_both_choices_begin_with(tokenizer):
    alike, seam, _ = with_whole_answers(ITEMS, tokenizer, 256)
    assert tokenizer.decode(alike.positive) == " the man slept." and len(alike.negative) == len(ITEMS[0][2])
    assert tokenizer.convert_ids_to_tokens(seam.positive)[0] == "gave"
    with pytest.raises(AUSteerError, match=r"longer than the model's context of 20 tokens: 'They ga because'"):
        with_whole_answers(ITEMS, tokenizer, 20)
    with pytest.raises(AUSteerError, match="the same tokens"):
        with_whole_answers([("a", " b", " b")], tokenizer, 256)


def test_right_is_the_likelier_choice(data):
    answers = [Answer("", (2.0, -0.1)), Answer("", (-0.5, 0.2)), Answer("", (0.0, 0.3))]
    whole, of_token = task_of(data), task_of(data, per_token=True)
    scores = whole.columns(whole.test[:3], answers)
    assert scores.main == "likelier choice" and scores.outcomes == [True, False, False]
    assert scores.columns["log-odds"] == [2.0, -0.5, 0.0]
    scores = of_token.columns(of_token.test[:3], answers)
    assert scores.main == "likelier choice, per token" and scores.outcomes == [False, True, True]
    assert scores.columns["log-odds, per token"] == [-0.1, 0.2, 0.3]
    assert (whole.measured, of_token.measured) == ({"likelihood": "whole choice"}, {"likelihood": "per token"})


def test_what_is_refused_is_one_line(data, tokenizer, tmp_path):
    with pytest.raises(AUSteerError, match=r"^copa: not in .*--fetch copa` fetches it$"):
        task_of(tmp_path)
    with pytest.raises(AUSteerError, match=r"^copa-choices continues a sentence, .*: leave out --chat$"):
        task_of(data, chat=tokenizer)
    with pytest.raises(AUSteerError, match=r"^copa-choices is not in the authors' code: use --protocol clean$"):
        task_of(data, protocol="paper")
    with pytest.raises(AUSteerError, match=r"^boolq does not compare likelihoods .*: leave out --per-token$"):
        paper_task("boolq", data_dir=data, per_token=True)
    command = ["--model", "m", "--data_name", "copa-choices", "--data-dir", str(data), "--engine", "vllm"]
    with pytest.raises(AUSteerError, match=r"^copa-choices is answered by likelihoods .*: leave out --engine vllm$"):
        main.main(command)
    with pytest.raises(AUSteerError, match=r"--per-token: for the paper's tasks only"):
        main.main(["--per-token"])


def test_the_command_ranks_steers_and_records_how_it_measured(data, checkpoints, tmp_path):
    BENCHES.close()
    shared = ["--model", str(checkpoints["llama"]), "--data_name", "copa-choices", "--data-dir", str(data), "--device", "cpu",
              "--results", str(tmp_path), "--path", str(tmp_path / "ranks"), "--limit", "6", "--applied_module", "ffn",
              "--method", "causal", "--k", "4", "--alpha", "1"]  # fmt: skip
    main.main(shared)
    main.main([*shared, "--per-token"])
    rows = [json.loads(file.read_text()) for file in (tmp_path / "records").glob("*.json")]
    found = {(row["method"], row["measured"]["likelihood"]): row for row in rows}
    for how, main_column in (("whole choice", "likelier choice"), ("per token", "likelier choice, per token")):
        for method in ("vanilla", "prompt-only", "causal"):
            row = found.pop((method, how))
            assert row["measure"] == main_column and len(row["columns"]["log-odds"]) == 6
    assert not found
    assert (tmp_path / "llama-copa-choices.md").exists() and (tmp_path / "llama-copa-choices-per-token.md").exists()
    BENCHES.close()


@needs_shared
def test_on_the_real_rows():
    task = task_of(SHARED / "data")
    assert (len(task.split.ranking), len(task.validation), len(task.test)) == (799, 200, 500)
    twins = [task.group(row) for row in task.split.ranking]
    assert len(set(twins)) < 0.6 * len(twins), "mirrored twins share their choices"
