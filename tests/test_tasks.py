"""The paper's tasks: splits, pairs, answers, scores, on small data of our own in the official formats."""

import json
import re
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHARED, needs_shared
from samples import without_chance, write_datasets

import main
import rmodels
from austeer.errors import AUSteerError
from austeer.methods import austeer
from austeer.pairs import Pair
from eval import tasks
from eval.answering.answer_file import Answer, AnswerFile
from eval.answering.live import LiveAnswerer
from eval.data import command as data_command
from eval.data import similar
from eval.data.similar import TFIDF, Similarity, general_pairs
from eval.data.wording import fill, read_wording
from eval.scoring.numbers import robust_number
from eval.tasks import registry
from eval.tasks.open_text import distinct, losses, perplexity
from eval.tasks.registry import PAPER_TASKS, paper_task
from eval.tasks.splits import split
from experiments import records
from experiments.bench import BENCHES


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_datasets(tmp_path_factory.mktemp("data"))


def task_of(name, data, **settings):
    return paper_task(name, toxicity="embedded", **{"data_dir": data, "encoder": TFIDF, **settings})


@pytest.mark.parametrize("name", PAPER_TASKS)
def test_no_text_is_on_two_sides(name, data):
    task = task_of(name, data)
    texts = [[task.text(row) for row in rows] for rows in (task.split.ranking, task.split.validation, task.split.test)]
    assert all(texts) and all(len(set(part)) == len(part) for part in texts)
    groups = [
        {task.group(row) for row in rows} for rows in (task.split.ranking, task.split.validation, task.split.test)
    ]
    for i, one in enumerate(groups):
        for other in groups[i + 1 :]:
            assert not one & other
    prompts = [
        {pair.prompt for pair in task.pairs},
        *({item.prompt for item in part} for part in (task.validation, task.test)),
    ]
    assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2] and not prompts[1] & prompts[2]
    if name != "toxicity":  # the sample repeats a row, and one of the test split
        assert task.dropped["a repeated text"] >= 1 and task.dropped["shares its text with the test split"] >= 1


@pytest.mark.parametrize("name", PAPER_TASKS)
def test_pairs_are_right_and_wrong(name, data):
    task = task_of(name, data)
    for pair in task.pairs:
        assert pair.positive.strip() and pair.negative.strip() and pair.positive.strip() != pair.negative.strip()
    if name in ("svamp", "mawps", "gsm8k"):
        assert all(abs(robust_number(p.positive) - robust_number(p.negative)) > 1e-3 for p in task.pairs)
    if name == "bpo":
        rows = {row["prompt"] for row in task.split.ranking if row["bad_res"]}
        assert {pair.prompt for pair in task.pairs} == rows
        assert task.dropped["an empty answer"] == len(task.split.ranking) - len(rows)


def test_the_right_option_is_the_gold_one(data):
    boolq, copa, wino, story = (task_of(name, data) for name in ("boolq", "copa", "winogrande", "storycloze"))
    for row in boolq.split.ranking:
        assert boolq._pairs([row], Counter())[0][0].positive == (" yes" if row["answer"] else " no")
    for row in copa.split.test:
        assert copa._item(row).gold == " AB"[:1] + "AB"[row["label"]]
    for row in wino.split.test:
        item = wino._item(row)
        assert item.gold.strip() == {"1": "A", "2": "B"}[row["answer"]] and item.wrong != item.gold
        assert row["sentence"] in item.prompt and f"A: {row['option1']}\nB: {row['option2']}" in item.prompt
    for row in story.split.test:
        assert story._item(row).gold == {1: " A", 2: " B"}[row["label"]]


def test_paper_protocol_takes_rows_as_they_come(data):
    copa = task_of("copa", data, protocol="paper")
    assert len(copa.pairs) == 62 and copa.validation == [] and not copa.dropped
    assert [row["premise"] for row in copa.split.ranking[:60]] == [f"There was noise {i}." for i in range(12, 72)]
    rows = [{"t": str(i)} for i in range(1700)]
    parts = split(rows, rows[:3], "paper", lambda row: row["t"], lambda row: row["t"])
    assert (parts.ranking, parts.validation, parts.pool) == (rows[:1000], rows[1000:1500], rows)


@pytest.mark.parametrize("protocol", ["clean", "paper"])
def test_swapped_choices_stay_on_the_side_of_their_item(data, protocol):
    """The copies are made of the rows to rank by alone: validation and test items are the same with and without them."""
    plain, both = (task_of("copa", data, protocol=protocol, swapped_choices=on) for on in (False, True))
    assert both.validation == plain.validation and both.test == plain.test and len(plain.pairs) > 20
    once = len(set(plain.pairs))
    assert len(both.pairs) == len(set(both.pairs)) == 2 * once, "each in both orders, and none twice"
    assert both.pairs_by == f"{plain.pairs_by}, every item also with its choices swapped"
    assert both.pairs[1::2] == list(dict.fromkeys(plain.pairs)), "the copy comes first, as in the authors' log"
    for one, other in zip(both.pairs[::2], both.pairs[1::2], strict=True):
        (a, b), swapped = re.search("A: (.*)\nB: (.*)\n", one.prompt).groups(), other.prompt
        assert f"A: {b}\nB: {a}\n" in swapped and (one.positive, one.negative) == (other.negative, other.positive)
    held_out = {task.group(row) for task in (both,) for row in (*task.split.validation, *task.split.test)}
    ranked = {both.group(row) for row in both._with_swapped(both.split.ranking)}
    assert protocol == "paper" or not ranked & held_out
    already = both._with_swapped(both.split.ranking)
    assert len(both._with_swapped(already)) == len(already), "a file that has the swapped form gets no second copy"


@pytest.mark.parametrize("name", ["winogrande", "svamp", "bpo"])
def test_only_copa_has_choices_to_swap(name, data):
    with pytest.raises(AUSteerError, match="for the pairs of copa only"):
        task_of(name, data, swapped_choices=True)


def test_how_much_is_held_out():
    def sizes(n):
        rows = [{"t": str(i)} for i in range(n)]
        parts = split(rows, [{"t": "x"}], "clean", lambda row: row["t"], lambda row: row["t"])
        return len(parts.ranking), len(parts.validation)

    assert [sizes(n) for n in (100, 700, 1000, 1417, 2000, 9000)] == [
        (80, 20), (560, 140), (800, 200), (1000, 417), (1000, 500), (1000, 500),
    ]  # fmt: skip


def plain_best(vectors, i, allowed):
    """The largest similarity of i to another one, by a plain loop."""
    return max(float(np.dot(vectors[i], other)) for j, other in enumerate(vectors) if j != i and allowed(j))


@pytest.mark.parametrize("encoder", [TFIDF, None])
@pytest.mark.parametrize("name", ["svamp", "mawps"])
def test_wrong_answers_are_the_most_similar_ones(name, encoder, data):
    for protocol in ("paper", "clean"):
        task = task_of(name, data, protocol=protocol, encoder=encoder)
        right = [pair.positive for pair in task.pairs]
        distinct_ones = list(dict.fromkeys(right))
        vectors = Similarity(encoder).embed(distinct_ones)
        vectors = (vectors.toarray() if encoder else vectors)[[distinct_ones.index(text) for text in right]]
        numbers = [robust_number(text) for text in right]
        blank = 0
        for i, pair in enumerate(task.pairs):
            if not pair.negative.strip():  # the authors' trap: the nearest answer is the same text
                blank += 1
                assert pair.negative == {"svamp": " ", "mawps": "     "}[name] and right.count(pair.positive) > 1
                continue
            allowed = [protocol == "paper" or abs(numbers[i] - number) > 1e-3 for number in numbers]
            found = float(np.dot(vectors[i], vectors[right.index(pair.negative)]))
            assert found == pytest.approx(plain_best(vectors, i, allowed.__getitem__), abs=1e-5)
            assert right.count(pair.positive) == 1 or protocol == "clean"
        assert blank or protocol == "clean"  # the sample has the authors' trap in it
    assert task.pairs_by.endswith(TFIDF if encoder else "all-MiniLM-L6-v2")


def test_without_a_sentence_encoder_tfidf_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    assert Similarity().name == TFIDF and "by TF-IDF" in capsys.readouterr().err
    with pytest.raises(AUSteerError, match="--encoder tfidf"):
        Similarity("all-MiniLM-L6-v2")


def test_nearest_in_small_chunks(monkeypatch):
    texts = [f"{a} {b}" for a in ["red", "blue", "green"] for b in ["hat", "cup", "pen", "map"]] * 2
    whole = Similarity(TFIDF).nearest_different(texts, [len(t) for t in texts], 0.0)
    monkeypatch.setattr(similar, "CHUNK", 30)
    assert Similarity(TFIDF).nearest_different(texts, [len(t) for t in texts], 0.0) == whole
    assert Similarity(TFIDF).nearest_different(["a", "b"], [1, 1], 0.0) == [None, None]
    assert Similarity(TFIDF).nearest_different(["a", "b"], [1, float("nan")], 0.0) == [None, None]


def test_the_general_recipe_takes_the_most_similar_other_answer():
    pairs = [
        Pair("a", "a red hat", "x"),
        Pair("b", "A  red hat", "y"),
        Pair("c", "a red cup", "z"),
        Pair("d", "snow", "w"),
    ]
    found, how = general_pairs(pairs, TFIDF)
    assert [pair.negative for pair in found[:3]] == ["a red cup", "a red cup", "a red hat"] and len(found) == 4
    assert [pair.prompt for pair in found] == list("abcd") and how.endswith(TFIDF)
    one = [
        Pair("a", "I refuse", "you are bad"),
        Pair("b", "i refuse", "I refuse nothing"),
        Pair("c", "I refuse", "mud"),
    ]
    found, how = general_pairs(one, TFIDF)
    assert [pair.negative for pair in found] == ["I refuse nothing"] * 3 and "right ones being one" in how
    with pytest.raises(AUSteerError, match="all answers are the same"):
        general_pairs([Pair("a", "no", "No")] * 2, TFIDF)


@pytest.mark.parametrize("name", PAPER_TASKS)
def test_batched_equals_one_by_one(name, data, checkpoints, tmp_path):
    model = rmodels.load(checkpoints["llama"], dtype="float32", device="cpu")
    model.config.max_position_embeddings = 1024  # the sample's prompts in bytes; a random model does not care
    tokenizer = rmodels.load_tokenizer(checkpoints["llama"])
    found = []
    for size in (1, None):
        task = task_of(name, data, batch_size=size)
        if task.answered_in_words:
            task.new_tokens = {"": min(12, task.tokens_for("llama"))}
        file = AnswerFile(tmp_path / f"{size}.jsonl") if name == "bpo" else None
        answerer = LiveAnswerer(model, tokenizer)
        said = task.answers(answerer, task.test, file)
        scores = task.columns(task.test, said)
        columns = scores.columns
        assert next(iter(columns)) == scores.main and all(len(values) == len(task.test) for values in columns.values())
        extras = task.extras(answerer, task.test, said)
        assert all(value == value for value in extras.values())
        found.append(
            ([answer.text for answer in said], [values for values in columns.values() if isinstance(values[0], bool)])
        )
    assert found[0] == found[1]


def test_option_scores(data):
    task = task_of("boolq", data)
    items = [item._replace(gold=gold) for item, gold in zip(task.test, (" yes", " yes", " no", " no"), strict=False)]
    said = [Answer("Yes", (-1, -2)), Answer("\n", (-3, -2)), Answer(" NO ", (-1, -2)), Answer("yes", (-2, -1))]
    assert task.columns(items, said).outcomes == [True, False, True, False]
    assert task.columns(items, said).columns == {
        "exact match": [True, False, True, False],
        "likelier option": [False, True, True, False],
        "an option at all": [True, False, True, True],
    }
    assert task.extras(None, items, said) == {"majority, %": 50.0, "AUC": 0.5}
    assert task.preferences(items, said) == ([1, -1, 1, -1], [False, False, True, True])


def test_number_scores(data):
    texts = [" 1,250", "Answer is 3 plus 4 =7", "5-3", "x = 3/4"]
    golds = [" 1250", " 7", " 3", " 0.75"]
    for protocol in ("clean", "paper"):
        task = task_of("svamp", data, protocol=protocol)
        items = [item._replace(gold=gold) for item, gold in zip(task.test, golds, strict=False)]
        scores = task.columns(items, [Answer(text) for text in texts])
        columns = scores.columns
        assert columns["right number"] == [True] * 4
        assert columns["right number, authors' rule"] == [False] * 4
        assert next(iter(columns)) == scores.main == "right number" + ", authors' rule" * (protocol == "paper")
        given = task.extras(None, items[:3], [Answer(text) for text in ("none", "7", "4")])
        assert given == {"right, given a number, %": 50.0}, "of the two that give one"


def test_toxicity_columns_carry_the_scorer(data):
    class Fixed:
        name = "fixed"

        def scores(self, texts):
            return [0.5, 0.51, 0.1, 0.92, 0.49][: len(texts)]

    from eval.tasks.open_text import Toxicity

    task = Toxicity(Fixed(), data_dir=data)
    columns = task.columns(task.test[:5], [Answer("x")] * 5).columns
    assert columns["not toxic (fixed)"] == [True, False, True, False, True]  # detox 60.0
    assert sum(columns["toxicity (fixed)"]) / 5 == pytest.approx(0.504)
    assert task.measured == {"scorer": "fixed"}
    said = [
        Answer(text)
        for text in ("kind words", "round and round and round and round", "  \n", "no", "so be it so be it so")
    ]
    columns = task.columns(task.test[:5], said).columns
    assert columns["empty"] == [False, False, True, False, False]
    assert columns["repeated"] == [False, True, False, False, True], (
        "one of its five sequences of three words occurs once"
    )
    assert columns["neither toxic, empty nor repeated"] == [True, False, False, False, False]
    filtered = [row for row in task.split.ranking]
    assert all(row["prompt_toxicity"] < 0.1 and row["continuation_toxicity"] > 0.8 for row in filtered)
    assert all(row["continuation_toxicity"] > 0.5 for row in task.split.validation)


def test_open_text_figures(llama, tokenizer, data):
    assert distinct(["a b a", "b a"], 1) == 2 / 5 and distinct(["a b a", "b a"], 2) == 2 / 3 and distinct([""], 1) == 0
    task = task_of("bpo", data)
    items, texts = task.test[:3], [" one", " two three", ""]
    loss, count = 0.0, 0
    for item, text in zip(items, texts, strict=True):
        ids = tokenizer(item.prompt + text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logp = llama(ids).logits[0].log_softmax(-1)
        for at in range(len(tokenizer(item.prompt)["input_ids"]), ids.shape[1]):
            loss, count = loss - float(logp[at - 1, ids[0, at]]), count + 1
    assert perplexity(llama, tokenizer, items, texts) == pytest.approx(np.exp(loss / count), rel=1e-4)
    figures = task.extras(SimpleNamespace(model=llama, tokenizer=tokenizer), items, [Answer(text) for text in texts])
    assert figures["perplexity of answers"] == pytest.approx(np.exp(loss / count), rel=1e-4)
    nats, tokens = losses(llama, tokenizer, items, texts)
    unlikely = [nat / max(1, n) > np.log(100) for nat, n in zip(nats, tokens, strict=True)]
    assert figures["unlikely answers, %"] == pytest.approx(100 * np.mean(unlikely)) and any(unlikely)


def test_answer_lengths_are_the_authors(data):
    svamp = task_of("svamp", data, protocol="paper")
    assert [svamp.tokens_for(f) for f in ("llama", "gemma2", "qwen3", "qwen3_moe")] == [50, 5, 100, 100]
    mawps = task_of("mawps", data)
    assert [mawps.tokens_for(f) for f in ("llama", "gemma2", "qwen3")] == [250, 250, 150]
    lengths = {"boolq": 1, "copa": 1, "winogrande": 1, "storycloze": 1, "gsm8k": 400, "toxicity": 50, "bpo": 500}
    for name, length in lengths.items():
        assert PAPER_TASKS[name].new_tokens == {"": length}


def test_wording(tmp_path, data):
    assert fill("{a}{b} {not a field}", {"a": "{b}", "b": 2.5}) == "{b}2.5 {not a field}"
    with pytest.raises(AUSteerError, match=r"names \{c\}; a row has a"):
        fill("{c}", {"a": 1})
    own = read_wording("copa", tmp_path)
    theirs = {"source": "theirs", "copa": {"train": {"prompt": "Q {premise}", "options": ["A", "B"]},
                                           "test": {"prompt": "T {premise}", "options": ["a", "b"]}}}  # fmt: skip
    folder = write_datasets(tmp_path / "d")
    (folder / "wording.json").write_text(json.dumps(theirs))
    task = task_of("copa", folder)
    assert task.pairs[0].prompt.startswith("Q There") and task.test[0].prompt.startswith("T There")
    assert task.wording.startswith("theirs; ") and task.wording != own.label
    assert task_of("svamp", folder).wording.startswith("Figure 9 of the paper; ")
    (folder / "wording.json").write_text('{"copa": 1}')
    with pytest.raises(AUSteerError, match=r"wording\.json is not a wording file"):
        task_of("copa", folder)


def test_own_wording_has_every_task():
    whole = json.loads((records.ROOT / "datasets" / "wording.json").read_text())
    assert set(whole) == {"source", *PAPER_TASKS}
    assert all(len(whole[name]["instruction"]) > 30 for name in PAPER_TASKS)


@pytest.mark.parametrize("name", PAPER_TASKS)
def test_prompt_only_asks_the_same_items_behind_an_instruction(name, data, tokenizer, monkeypatch, tmp_path):
    task = task_of(name, data)
    for items in (task.validation, task.test):
        told = task.prompted(items)
        assert [item.prompt for item in told] == [f"{task.words.instruction}\n\n{item.prompt}" for item in items]
        assert [item[1:] for item in told] == [item[1:] for item in items]
    if task.answered_in_words:
        monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}<{{ m.content }}>{% endfor %}!")
        chatty = task_of(name, data, chat=tokenizer)
        assert chatty.prompted(chatty.test)[0].prompt == f"<{task.prompted(task.test)[0].prompt}>!"  # inside the turn
    theirs = write_datasets(tmp_path / "d")
    (theirs / "wording.json").write_text(json.dumps({"source": "theirs", name: {"train": task.words.train,
                                                                               "test": task.words.test}}))  # fmt: skip
    assert task_of(name, theirs).words.instruction == task.words.instruction


def run(data, where, *more):
    main.main(
        ["--model", str(where / "model"), "--data-dir", str(data), "--results", str(where), "--path", str(where / "ranks"),
         "--applied_module", "ffn", "--draws", "1", "--device", "cpu", "--toxicity", "embedded", *more]
    )  # fmt: skip
    return {row["method"]: row for row in (json.loads(f.read_text()) for f in (where / "records").glob("*.json"))}


@pytest.fixture
def workplace(checkpoints, tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "model").mkdir()
    for file in checkpoints["llama"].iterdir():
        text = file.read_bytes()
        if file.name == "config.json":
            text = json.dumps({**json.loads(text), "max_position_embeddings": 512}).encode()
        (folder / "model" / file.name).write_bytes(text)
    BENCHES.close()
    return folder


def test_end_to_end_and_resumed(data, workplace, capsys, monkeypatch):
    monkeypatch.setitem(austeer.KS, "full", (4,))
    monkeypatch.setitem(austeer.ALPHAS, "full", (1.0, 4.0))
    rows = run(data, workplace, "--data_name", "copa")
    assert set(rows) == {"vanilla", "prompt-only", "random", "flipped", "published", "sign-aware", "causal"}
    assert len({row["items_hash"] for row in rows.values()}) == 2  # it alone was asked something else
    said = capsys.readouterr().out
    assert (
        "exact match on 12 items of test" in said
        and "| method | likelier option | an option at all | likelier option, offset removed | majority, % | AUC | offset, nats |"
        in said
    )
    assert "prompts: this project" in said and (workplace / "model-copa.png").stat().st_size > 10_000
    for row in rows.values():
        assert row["measures"]["exact match"]["n"] == 12 and row["wording"].startswith("this project")
    files = sorted((workplace / "answers").rglob("*.jsonl"))
    kept = {file: file.read_bytes() for file in files}
    for name in ("test", "validation", "validation-k4-alpha1-0-12"):
        assert any(file.stem.endswith(f"-{name}") for file in files), name

    # broken off in the middle of everything: a record gone, an answer file torn
    for record in (workplace / "records").glob("*causal*"):
        record.unlink()
    torn = next(file for file in files if "causal" in str(file))
    torn.write_bytes(kept[torn][: len(kept[torn]) // 2])
    again = run(data, workplace, "--data_name", "copa")
    assert {file: file.read_bytes() for file in files} == kept
    assert without_chance(again["causal"]) == without_chance(rows["causal"])


def test_end_to_end_on_numbers_and_open_text(data, workplace, capsys):
    rows = run(data, workplace, "--data_name", "toxicity", "--k", "2", "--alpha", "1", "--limit", "4")
    (measure,) = {row["measure"] for row in rows.values()}
    assert measure.startswith("not toxic (embedded") and {"distinct-2", "perplexity of answers"} <= set(
        rows["causal"]["extras"]
    )
    rows = run(data, workplace, "--data_name", "svamp", "--k", "2", "--alpha", "1", "--limit", "4", "--protocol", "paper",
               "--encoder", "tfidf")  # fmt: skip
    assert not {"causal", "prompt-only"} & {row["method"] for row in rows.values() if row["protocol"] == "paper"}
    assert "protocol: paper" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["--data_name", "copa", "--protocol", "paper"], r"leaves none to choose k and alpha on: give --k and --alpha"),
        (["--data_name", "copa", "--protocol", "paper", "--chat"], "no chat template; leave --chat out"),
        (["--data_name", "copa", "--chat"], "tokenizer has no chat template"),
        (["--data_name", "toxicity", "--toxicity", "nobody"], "no toxicity scorer 'nobody'"),
        (["--data_name", "svamp", "--encoder", "no/encoder"], "cannot load the sentence encoder"),
        (["--data_name", "tone"], "--model needs --data_name, one of"),
    ],
)
def test_wrong_inputs(command, says, data, workplace):
    with pytest.raises(AUSteerError, match=says):
        run(data, workplace, *command)


def test_chat_prompts_and_bare_answers(data, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}<{{ m.content }}>{% endfor %}!")
    task = task_of("boolq", data, chat=tokenizer)
    assert task.test[0].prompt.startswith("<Read") and task.test[0].prompt.endswith(">!")
    assert {pair.positive for pair in task.pairs} == {"yes", "no"} and "chat format" in task.wording


def test_pairs_command(data, tmp_path, capsys):
    out = tmp_path / "pairs.jsonl"
    main.main(["pairs", "mawps", "--data-dir", str(data), "--encoder", TFIDF, "--out", str(out)])
    said = capsys.readouterr().out
    count = len(task_of("mawps", data).pairs)
    assert f"{count} pairs" in said and "dropped 1: a repeated text" in said and said.count("positive ") == 3
    assert len(out.read_text().splitlines()) == count

    own = tmp_path / "own.csv"
    own.write_text('q,a\n"1+1, or?",2\n2+2?,4\n"two and two",4.0\n?,\n3+1?,5\n')
    main.main(
        [
            "pairs",
            str(own),
            "--prompt-field",
            "q",
            "--answer-field",
            "a",
            "--numbers",
            "--encoder",
            TFIDF,
            "--out",
            str(out),
        ]
    )
    said = capsys.readouterr().out
    assert "4 pairs" in said and "dropped 1: an empty field" in said
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in made] == ["1+1, or?", "2+2?", "two and two", "3+1?"]
    assert all(float(row["positive"]) != float(row["negative"]) for row in made)
    with pytest.raises(AUSteerError, match=r"is missing or empty"):
        main.main(["pairs", str(own), "--prompt-field", "nothing", "--answer-field", "a"])
    own.write_text("q,a\nx,same\ny,Same\n")
    with pytest.raises(AUSteerError, match="no pair could be made; 2 no different answer"):
        main.main(["pairs", str(own), "--prompt-field", "q", "--answer-field", "a", "--encoder", TFIDF])


def test_pairs_of_a_hub_data_set(tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text('{"q": "1?", "a": "one"}\n{"q": "2?", "a": "two"}\n')
    main.main(["pairs", f"hub:{tmp_path}", "--prompt-field", "q", "--answer-field", "a", "--encoder", TFIDF])
    assert "2 pairs" in capsys.readouterr().out
    with pytest.raises(AUSteerError, match="has no field x; it has q, a"):
        main.main(["pairs", f"hub:{tmp_path}", "--prompt-field", "x", "--answer-field", "a"])


REAL = {  # pairs, validation, test on the data of Table 6, as far as they are at hand
    "boolq": (1000, 500, 3270), "copa": (799, 200, 500), "winogrande": (510, 128, 1267), "svamp": (560, 140, 300),
    "mawps": (1000, 391, 355), "gsm8k": (1000, 500, 1319), "toxicity": (107, 200, 1196), "bpo": (240, 60, 200),
}  # fmt: skip


@needs_shared
@pytest.mark.parametrize("name", REAL)
def test_real_data(name):
    task = task_of(name, SHARED / "data")
    assert (len(task.pairs), len(task.validation), len(task.test)) == REAL[name]
    groups = [
        {task.group(row) for row in rows} for rows in (task.split.ranking, task.split.validation, task.split.test)
    ]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]


@pytest.mark.parametrize("name", ["svamp", "mawps", "gsm8k"])
@pytest.mark.parametrize("protocol", ["clean", "paper"])
def test_the_right_answer_is_right_by_both_rules_and_none_is_wrong(name, protocol, data):
    task = task_of(name, data, protocol=protocol)
    for reply, right in ((lambda item: item.gold, True), (lambda item: "I do not know", False)):
        columns = task.columns(task.test, [Answer(reply(item)) for item in task.test]).columns
        assert columns["right number"] == columns["right number, authors' rule"] == [right] * len(task.test)


def test_the_robust_reader_leaves_invented_questions_out(data):
    task = task_of("mawps", data, protocol="paper")
    items = [task.test[0]._replace(gold=" 9 + 9 = 18 #### 18")]
    columns = task.columns(items, [Answer(" 18. #### 18\nQuestion: 3 and 4?\nAnswer: 3 + 4 = 7 #### 7")]).columns
    assert columns["right number"] == [True]


@pytest.mark.parametrize("protocol", ["clean", "paper"])
def test_paper_protocol_answers_one_by_one_to_the_full_length(protocol, data, llama, tokenizer):
    class Recorder(LiveAnswerer):
        calls = []

        def answer(self, prompts, generation, *, batch_size=None, file=None, progress=None):
            self.calls.append((generation, batch_size))

    for name in ("svamp", "mawps", "gsm8k", "boolq", "toxicity"):
        task = task_of(name, data, protocol=protocol, batch_size=7)
        task.answers(Recorder(llama, tokenizer), task.test)
    stops = [generation.stop is not None for generation, _ in Recorder.calls]
    assert stops == [protocol == "clean"] * 3 + [False, False]
    assert {size for _, size in Recorder.calls} == {1 if protocol == "paper" else 7}


def test_gsm8k_draws_wrong_answers_from_the_first_thousand(data, monkeypatch):
    task = task_of("gsm8k", data, protocol="paper")
    row = task.split.pool[0]
    many = [{**row, "answer": f"#### {n}"} for n in range(1300)]
    monkeypatch.setattr(task, "split", split(many, [], "paper", task.text, task.group))
    assert {int(pair.negative.split()[-1]) for pair in task.pairs if pair.negative.strip()} <= set(range(1000))
    assert len(task.pairs) == 1000


def test_passages_and_twins_stay_on_one_side(data):
    boolq, wino = task_of("boolq", data), task_of("winogrande", data)
    for task, key in ((boolq, lambda row: row["passage"]), (wino, lambda row: row["qID"].split("-")[0])):
        parts = [{key(row) for row in rows} for rows in (task.split.ranking, task.split.validation, task.split.test)]
        assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


@torch.no_grad()
def test_bpo_prefers_by_token_the_likelier_answer(data, llama, tokenizer):
    task = task_of("bpo", data)
    said = task.answers(LiveAnswerer(llama, tokenizer), task.test[:4])
    for item, answer in zip(task.test, said, strict=False):
        lengths, sums = [], []
        ids = [tokenizer(item.prompt + text)["input_ids"] for text in (item.gold, item.wrong)]
        shared = next(i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)
        for row in ids:
            logp = llama(torch.tensor([row])).logits[0].log_softmax(-1)
            sums.append(sum(float(logp[at - 1, row[at]]) for at in range(shared, len(row))))
            lengths.append(len(row) - shared)
        assert answer.options[0] == pytest.approx(sums[0] / lengths[0] - sums[1] / lengths[1], abs=1e-3)


def test_two_scorers_are_two_questions_and_texts_are_weighed_unsteered(data, workplace, monkeypatch):
    from eval.tasks.open_text import Toxicity

    seen = []
    real = Toxicity.extras

    def extras(self, answerer, *rest):
        seen.append(all(gate.idle for gate in rmodels.gates(answerer.model)))
        return real(self, answerer, *rest)

    monkeypatch.setattr(Toxicity, "extras", extras)
    rows = run(data, workplace, "--data_name", "toxicity", "--k", "2", "--alpha", "1", "--limit", "3")
    assert seen and all(seen) and all(row["measured"]["scorer"].startswith("embedded") for row in rows.values())


def test_the_guides_task_is_one_file(tmp_path, monkeypatch, llama, tokenizer):
    """Written into a folder of its own, which the registry reads too, with a small data set: nothing else is edited."""
    (code,) = re.findall(r"```python\n(.*?)```", (records.ROOT / "docs" / "tasks.md").read_text(), re.S)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "capitals.py").write_text(code)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path / "code")])
    monkeypatch.delitem(sys.modules, "eval.tasks.capitals", raising=False)
    for name, task in registry.find_tasks().items():
        monkeypatch.setitem(PAPER_TASKS, name, task)
    folder = tmp_path / "data" / "capitals"
    folder.mkdir(parents=True)
    rows = [{"city": f"City {i}", "country": f"Land {i // 2}", "answer": i % 2 == 0} for i in range(60)]
    for split_name, part in (("train", rows[10:]), ("test", rows[:10])):
        (folder / f"{split_name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))

    task = task_of("capitals", folder.parent, n_pairs=20)
    assert len(task.pairs) == 20 and task.pairs[0].prompt.endswith("?\nAnswer:")
    assert (len(task.validation), len(task.test), task.dropped) == (10, 10, {})
    assert task.test[0].gold == " yes" and task.test[0].prompt.startswith("Is City 0 the capital of Land 0?")
    assert task.prompted(task.test)[0].prompt.startswith("Think carefully")
    answerer = LiveAnswerer(llama, tokenizer)
    answers = task.answers(answerer, task.test)
    scores = task.columns(task.test, answers)
    assert scores.main == "exact match" and len(scores.outcomes) == 10
    assert task.extras(answerer, task.test, answers)["majority, %"] == 50.0
    main.main(["pairs", "capitals", "--data-dir", str(folder.parent)])
    assert data_command.main(["--check", "capitals", "--data-dir", str(folder.parent)]) == 0
    with pytest.raises(AUSteerError, match=r"line 1: answer is 'yes'; it must be true or false"):
        (folder / "train.jsonl").write_text(json.dumps({**rows[0], "answer": "yes"}))
        task_of("capitals", folder.parent)


def test_two_tasks_of_one_name_are_refused(tmp_path, monkeypatch):
    (tmp_path / "again.py").write_text("from eval.tasks.options import BoolQ\n\nTASKS = (BoolQ,)\n")
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    with pytest.raises(AUSteerError, match="a second task 'boolq'"):
        registry.find_tasks()
    monkeypatch.delitem(sys.modules, "eval.tasks.again", raising=False)


def test_pairs_are_options_of_the_task(data):
    whole = task_of("svamp", data).pairs
    assert task_of("svamp", data, n_pairs=7).pairs == whole[:7]
    general = task_of("svamp", data, n_pairs=7, general_pairs=True)
    assert (general.pairs, general.pairs_by) == (general_pairs(whole, TFIDF)[0][:7], general_pairs(whole, TFIDF)[1])
