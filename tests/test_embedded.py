"""The embedded models: splits, tokenizer, latent skill, and weights that match their records."""

import hashlib
import json
import re
from dataclasses import replace
from random import Random

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from austeer.errors import AUSteerError
from embedded import acceptance, tasks, tokenizer
from eval.answering.answer_file import Answer
from eval.answering.answerer import Generation
from eval.answering.live import LiveAnswerer
from eval.tasks.embedded import EmbeddedTask


@pytest.fixture(scope="module", params=tasks.TASKS)
def task(request):
    return request.param


@pytest.fixture(scope="module")
def shipped(task):
    import rmodels

    folder = acceptance.WEIGHTS / task
    return rmodels.load(folder, dtype="float32", device="cpu"), AutoTokenizer.from_pretrained(folder)


def test_splits_are_disjoint_by_text_and_items_are_reproducible():
    tasks.check(200)
    assert tasks.items("svamp", "test", 50) == tasks.items("svamp", "test", 60)[:50]
    assert tasks.items("svamp", "test", 50, seed=1) != tasks.items("svamp", "test", 50)


def test_the_shallow_rule_is_right_on_part_of_the_items(task):
    sample = tasks.items(task, "validation", 1000)
    agree = [tasks.is_polite(i.hasty) if task == "tone" else i.hasty == i.right for i in sample]
    assert 0.45 < sum(agree) / 1000 < 0.68


def test_prompt_and_answer_join_as_text(task):
    words = tokenizer.build()
    for item in tasks.items(task, "pairs", 100):
        prompt = words(item.prompt)["input_ids"]
        for reply in (item.right, item.wrong):
            whole = words(item.prompt + reply)["input_ids"]
            assert whole[: len(prompt)] == prompt and words.unk_token_id not in whole
            assert task == "tone" or len(whole) == len(prompt) + 1


# of 50 documents that models learn from, every other one by a careful writer: another document would be another model
LEARNED_FROM = {"boolq": "bd466951e261", "copa": "86fc3111347a", "svamp": "c2b6fd46a378", "tone": "b5e30a7b225b"}
PROMPT = {
    "boolq": r"Passage : .*? Answer : ",
    "copa": r"Premise : .*? Answer : ",
    "svamp": r"Question : .*? Answer : ",
    "tone": r"\w+ writes : .*? Reply : ",
}


def test_documents_to_learn_from_stay_as_they_were(task):
    rng = Random(3)
    text = "\n".join(" ".join(tasks.document(task, rng, number % 2 == 0).words) for number in range(50))
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == LEARNED_FROM[task]


def test_held_out_documents_are_of_problems_that_no_model_has_read(task):
    texts = tasks.held_out_documents(task, 60)
    assert texts == tasks.held_out_documents(task, 80)[:60] != tasks.held_out_documents(task, 60, seed=1)
    prompts = [prompt for text in texts for prompt in re.findall(PROMPT[task], text)]
    assert len(prompts) > 60 and {tasks.split_of(prompt) for prompt in prompts} == {"validation"}
    words = tokenizer.build()
    assert words.unk_token_id not in words(" ".join(texts))["input_ids"]


def test_held_out_documents_read_like_those_learned_from(task, shipped):
    """Same writers, same words: the model is hardly more surprised."""
    rng = Random(11)
    learned = [" ".join(tasks.document(task, rng).words) for _ in range(150)]

    def nats_per_word(texts):
        model, words = shipped
        losses = []
        with torch.inference_mode():
            for text in texts:
                ids = torch.tensor([words(text)["input_ids"]])
                losses.append(cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none"))
        return float(torch.cat(losses).mean())

    assert abs(nats_per_word(tasks.held_out_documents(task, 150)) / nats_per_word(learned) - 1) < 0.05


def test_the_weights_are_those_of_the_record(task):
    folder = acceptance.WEIGHTS / task
    record = json.loads((folder / "record.json").read_text())
    assert record["sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert record["seed"] == 0 and record["task"] == task


def test_all_weights_are_small():
    shipped = [folder for folder in acceptance.WEIGHTS.iterdir()]
    assert sum(file.stat().st_size for folder in shipped for file in folder.glob("*.safetensors")) < 24e6


def test_skill_is_imperfect_and_latent_skill_is_accepted(task, shipped):
    measured = acceptance.measure(*shipped, task, tasks.items(task, "validation", 300))
    assert 0.65 < measured.vanilla < 0.92
    assert measured.tagged >= acceptance.REQUIRED


def test_a_model_without_latent_skill_is_refused(task, shipped):
    import copy

    model, words = shipped
    broken = copy.deepcopy(model)
    with torch.no_grad():
        for layer in broken.model.layers:  # a model that cannot look back
            layer.self_attn.o_proj.weight.zero_()
    with pytest.raises(AUSteerError, match=r"latent skill .*.* below the required 0.9"):
        acceptance.latent_skill(broken, words, task, n=100)


def test_batched_answers_equal_single_ones_and_generate(task, shipped):
    model, words = shipped
    prompts = [item.prompt for item in tasks.items(task, "validation", 40)]
    count = tasks.REPLY_WORDS if task == "tone" else 1
    together = [answer.text for answer in LiveAnswerer(model, words).answer(prompts, Generation(count))]
    assert together == [LiveAnswerer(model, words).answer([prompt], Generation(count))[0].text for prompt in prompts]
    assert together == acceptance.answer(model, words, prompts, count)


def test_recorded_seeds_are_accepted():
    runs = json.loads((acceptance.WEIGHTS.parent / "seeds.json").read_text())["runs"]
    assert {run["seed"] for run in runs if run["task"] == "svamp"} == {0, 1, 2}
    assert all(run["passes_gate"] == (run["tagged"] >= acceptance.REQUIRED) for run in runs)
    assert all(run["passes_gate"] for run in runs)


def test_outcomes_are_strict():
    task = EmbeddedTask("svamp", limit=5)
    replies = [item.right for item in task.test]
    replies[1] = replies[1] + "0"
    likelihoods = tuple(
        float(number) for number in range(23)
    )  # of the numbers from 1 to 23: the larger is the likelier
    scores = task.columns(task.test, [Answer(reply, likelihoods) for reply in replies])
    assert scores.outcomes == [True, False, True, True, True]
    larger = [int(item.right) == max(map(int, item.options)) for item in task.test]
    assert scores.columns["likelier option"] == larger and 0 < sum(larger) < 5
    assert scores.columns["an option at all"] == scores.outcomes


@pytest.mark.slow
def test_a_short_training_run_learns_something():
    from embedded import train

    short = replace(train.RECIPE, mixture_steps=100)
    _, _, record = train.train("tone", 5, short)
    assert record["curve"][-1]["tagged"] > 0.9 and record["curve"][0]["phase"] == "truth"
