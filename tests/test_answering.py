"""Answers: batched equals one by one equals `generate`, steered or not; ends, options, resumption."""

import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES

import rmodels
from austeer.chat import chat_prompts
from austeer.errors import AUSteerError
from austeer.plan import Plan
from austeer.steering import steer
from eval.answering import answerer as answering
from eval.answering import live
from eval.answering.answer_file import Answer, AnswerFile
from eval.answering.answerer import Generation, option_tokens
from eval.answering.live import LiveAnswerer

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "the",
    "dog,",
    "who",
    "had",
    "3",
    "bones,",
    "ran",
    "12",
    "miles",
    "north",
    "of",
    "Paris",
    "in",
    "May",
]


def prompts(count: int, seed: int = 0, beginning: str = "") -> list[str]:
    rng = random.Random(seed)
    return [beginning + " ".join(rng.choices(WORDS, k=rng.randint(1, 12))) + ":" for _ in range(count)]


def by_generate(model, tokenizer, texts, new_tokens):
    """The authors' way: one prompt at a time, greedy; only the new tokens are decoded."""
    made = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
        )  # fmt: skip
        made.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return made


def texts_of(found):
    return [answer.text for answer in found]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, checkpoints):
    return rmodels.load(checkpoints[request.param], dtype="float32", device="cpu")


@pytest.mark.parametrize("beginning", ["", "Answer this in one word. "])
@pytest.mark.parametrize("new_tokens", [1, 20])
def test_batched_equals_one_by_one_equals_generate(model, tokenizer, beginning, new_tokens):
    asked = prompts(14, beginning=beginning)
    wanted = by_generate(model, tokenizer, asked, new_tokens)
    question = Generation(new_tokens)
    assert texts_of(LiveAnswerer(model, tokenizer).answer(asked, question, batch_size=1)) == wanted
    assert texts_of(LiveAnswerer(model, tokenizer).answer(asked, question, batch_size=5)) == wanted
    assert texts_of(LiveAnswerer(model, tokenizer).answer(asked, question)) == wanted


@pytest.mark.parametrize("tokens", ["all", "prompt", "generated", "last"])
def test_batched_equals_generate_when_steered(model, tokenizer, tokens):
    scale = torch.zeros(rmodels.site_shape(model, "attention"))
    scale[:, : scale.shape[1] // 2] = 1.5
    plan = Plan({"attention": scale}, {}, tokens)
    asked = prompts(9, beginning="Say it in one word. ")
    plain = by_generate(model, tokenizer, asked, 10)
    with steer(model, plan):
        wanted = by_generate(model, tokenizer, asked, 10)
        assert texts_of(LiveAnswerer(model, tokenizer).answer(asked, Generation(10), batch_size=4)) == wanted
        assert texts_of(LiveAnswerer(model, tokenizer).answer(asked, Generation(10), batch_size=1)) == wanted
        one = texts_of(LiveAnswerer(model, tokenizer).answer(asked, Generation(1)))
        assert one == by_generate(model, tokenizer, asked, 1)
    assert wanted != plain


def test_a_beginning_is_run_once(llama, tokenizer, monkeypatch):
    seen = []
    hook = llama.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    asked = [f"The very same beginning of every prompt {n}" for n in range(10, 20)]
    LiveAnswerer(llama, tokenizer).answer(asked, Generation(1), batch_size=5)
    hook.remove()
    shared = len(tokenizer("The very same beginning of every prompt 1")["input_ids"])
    assert seen == [(1, shared - 1), (5, 2), (5, 2)]  # the last two of a prompt are its own


def test_nothing_is_shared_beyond_a_sliding_window(checkpoints, tokenizer):
    model = rmodels.load(checkpoints["gemma2"], dtype="float32", device="cpu")
    ids = [[1, 2, 3, 4], [1, 2, 3, 5, 6]]
    assert live._shared(ids, Generation(7), model) == 2  # 5 + 7 columns fit the window of 12
    assert live._shared(ids, Generation(8), model) == 0


def test_ends(llama, tokenizer):
    asked = prompts(12)
    whole = by_generate(llama, tokenizer, asked, 40)
    letter = max(set("".join(whole)), key=lambda c: sum(c in text for text in whole) * (c != "\n") * c.isalpha())
    stopped = texts_of(LiveAnswerer(llama, tokenizer).answer(asked, Generation(40, stop=letter)))
    assert stopped == [text[: text.find(letter) + 1] if letter in text else text for text in whole]
    assert any(letter in text for text in whole) and any(len(a) < len(b) for a, b in zip(stopped, whole, strict=True))


def test_end_of_text_tokens(llama, tokenizer, monkeypatch):
    asked = prompts(12)
    ids = [tokenizer(text)["input_ids"] for text in by_generate(llama, tokenizer, asked, 20)]
    letters = {token for row in ids for token in row[1:] if tokenizer.decode([token]).isascii()}
    frequent = max(letters, key=lambda token: sum(token in row for row in ids))
    monkeypatch.setattr(llama.generation_config, "eos_token_id", [2, frequent])
    wanted = by_generate(llama, tokenizer, asked, 20)
    ended = tokenizer.decode([frequent])
    found = texts_of(LiveAnswerer(llama, tokenizer).answer(asked, Generation(20), batch_size=6))
    assert found == [text.removesuffix(ended) for text in wanted]  # generate keeps a token that ends, unless special


@torch.inference_mode()
def test_options(llama, tokenizer):
    asked = prompts(6)
    options = option_tokens(tokenizer, ["Yes", "No"], asked[0])
    first = {spelling: tokenizer(spelling)["input_ids"][1] for spelling in ("Y", "y", "N", "n")}
    # " Yes" and " No" both begin with the byte of the space: that token is left out
    assert options == (tuple(sorted((first["Y"], first["y"]))), tuple(sorted((first["N"], first["n"]))))
    found = LiveAnswerer(llama, tokenizer).answer(asked, Generation(1, options=options))
    for text, answer in zip(asked, found, strict=True):
        logp = llama(**tokenizer(text, return_tensors="pt")).logits[0, -1].log_softmax(-1)
        wanted = [math.log(sum(math.exp(float(logp[token])) for token in own)) for own in options]
        assert answer.options == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(AUSteerError, match="begin with the same tokens"):
        option_tokens(tokenizer, ["Yes", "Yeti"], asked[0])


def test_a_prompt_too_long_loses_its_start(llama, tokenizer):
    long = "x" * 400 + "the very end of it:"
    (found,) = LiveAnswerer(llama, tokenizer).answer([long], Generation(4))
    room = llama.config.max_position_embeddings - 4
    assert found.text == by_generate(llama, tokenizer, [long[-(room - 1) :]], 4)[0]
    with pytest.raises(AUSteerError, match="do not fit"):
        LiveAnswerer(llama, tokenizer).answer(["x"], Generation(256))


def test_no_tokens():
    with pytest.raises(AUSteerError, match="prompt 0 has no tokens"):
        answering.encode_prompts(lambda texts, **_: {"input_ids": [[]]}, [""], 8)


def test_inf_is_refused(checkpoints, tokenizer):
    model = rmodels.load(checkpoints["llama"], dtype="float32", device="cpu")
    model.lm_head.weight.data[5] = float("inf")
    with pytest.raises(AUSteerError, match="inf or nan"):
        LiveAnswerer(model, tokenizer).answer(prompts(2), Generation(3))


def test_out_of_memory_halves_the_batches(llama, tokenizer, monkeypatch):
    real, sizes = live._batch, []

    def scarce(model, tokenizer, rows, *rest):
        sizes.append(len(rows))
        if len(rows) > 3:
            raise torch.OutOfMemoryError("no room")
        return real(model, tokenizer, rows, *rest)

    asked = prompts(11)
    wanted = LiveAnswerer(llama, tokenizer).answer(asked, Generation(3))
    monkeypatch.setattr(live, "_batch", scarce)
    assert texts_of(LiveAnswerer(llama, tokenizer).answer(asked, Generation(3))) == texts_of(wanted)
    assert max(sizes[1:]) < sizes[0] and sum(size for size in sizes if size <= 3) == 11


def test_chat(tokenizer, monkeypatch):
    with pytest.raises(AUSteerError, match="no chat template"):
        chat_prompts(tokenizer, ["hello"])
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %} [assistant]"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert chat_prompts(tokenizer, ["hello"]) == ["[user] hello [assistant]"]  # BOS comes with the tokens


def test_file_resumes_to_the_same_bytes(llama, tokenizer, tmp_path):
    asked, question = prompts(13), Generation(6, options=((40,), (41,)))
    whole = AnswerFile(tmp_path / "whole.jsonl")
    wanted = LiveAnswerer(llama, tokenizer).answer(asked, question, batch_size=4, file=whole)
    lines = whole.path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 13 and AnswerFile(whole.path).read(asked) == dict(enumerate(wanted))

    calls = []
    hook = llama.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    for kept in (lines[:5], [lines[7], lines[2], b'{"item": 3, "pro'], lines):
        broken = AnswerFile(tmp_path / "broken.jsonl")
        broken.path.write_bytes(b"".join(kept))
        calls.clear()
        assert LiveAnswerer(llama, tokenizer).answer(asked, question, batch_size=4, file=broken) == wanted
        assert broken.path.read_bytes() == whole.path.read_bytes()
        assert bool(calls) == (kept is not lines)  # what is there is not asked again
    hook.remove()


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import torch; torch.set_num_threads(1)
import rmodels
from conftest import byte_tokenizer
from test_answering import prompts
from eval.answering.answer_file import AnswerFile
from eval.answering.answerer import Generation
from eval.answering.live import LiveAnswerer
class Dying(AnswerFile):
    def append(self, fresh):
        super().append(fresh)
        if len(self.read(self.prompts)) >= 8:
            with self.path.open("ab") as file: file.write(b'{{"item": 99, "prompt": "torn')
            os.kill(os.getpid(), signal.SIGKILL)
model = rmodels.load({checkpoint!r}, dtype="float32", device="cpu")
LiveAnswerer(model, byte_tokenizer()).answer(prompts(13), Generation(6), batch_size=4, file=Dying(Path({path!r})))
"""


def test_a_killed_run_goes_on(llama, tokenizer, checkpoints, tmp_path):
    path, tests = tmp_path / "answers.jsonl", Path(__file__).parent
    script = KILLED.format(
        root=str(tests.parent), tests=str(tests), checkpoint=str(checkpoints["llama"]), path=str(path)
    )
    died = subprocess.run([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert died.returncode == -signal.SIGKILL and path.read_bytes().endswith(b"torn")
    LiveAnswerer(llama, tokenizer).answer(prompts(13), Generation(6), batch_size=4, file=AnswerFile(path))
    whole = AnswerFile(tmp_path / "whole.jsonl")
    LiveAnswerer(llama, tokenizer).answer(prompts(13), Generation(6), batch_size=4, file=whole)
    assert path.read_bytes() == whole.path.read_bytes()


def test_answer_file_keeps_odd_text(tmp_path):
    file = AnswerFile(tmp_path / "a.jsonl")
    odd = Answer("line\u2028sep\nnew\x85 \ud800 é", (-1.5,))
    asked = ["what\u2028?"]
    assert file.read(asked) == {}
    file.append({0: odd})
    assert file.read(asked) == {0: odd}
    with pytest.raises(AUSteerError, match="other prompts"):
        file.read(["what?"])


def test_a_kill_while_a_torn_line_is_cut_loses_nothing(tmp_path, monkeypatch):
    file = AnswerFile(tmp_path / "a.jsonl")
    file.read(["x", "y"])
    file.append({0: Answer("one")})
    whole = file.path.read_bytes()
    file.path.write_bytes(whole + b'{"item": 1, "pro')

    def killed(*_):
        raise KeyboardInterrupt

    for name in ("write_bytes", "write_text"):
        monkeypatch.setattr(Path, name, killed)
    assert file.read(["x", "y"]) == {0: Answer("one")}
    monkeypatch.undo()
    assert file.path.read_bytes() == whole


@pytest.mark.parametrize("line", [b"\0\0\0", b'{"item": "a"}', b"[]"])
def test_a_damaged_answer_file(tmp_path, line):
    file = AnswerFile(tmp_path / "a.jsonl")
    file.path.write_bytes(line + b"\n")
    with pytest.raises(AUSteerError, match="is damaged; delete it"):
        file.read(["x"])
