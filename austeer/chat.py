"""Put prompts, and the pairs that methods learn from, into a model's chat format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from austeer.errors import AUSteerError
from austeer.pairs import Pair


def chat_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str]) -> list[str]:
    """Put prompts into the model's chat format as a user's turn, without the BOS that tokenizing adds again."""
    if not getattr(tokenizer, "chat_template", None):
        raise AUSteerError("this tokenizer has no chat template; leave --chat out, or use an instruction-tuned model")
    adds_bos = tokenizer.bos_token and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    turns = []
    for prompt in prompts:
        message = [{"role": "user", "content": prompt}]
        # the tasks' few tokens have room for answers, not for thoughts; templates without thinking ignore this
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        turns.append(text.removeprefix(tokenizer.bos_token) if adds_bos else text)
    return turns


def pairs_in_chat(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> list[Pair]:
    """Return the pairs in the chat format. An answer then begins a turn, so the space before it is dropped."""
    prompts = chat_prompts(tokenizer, [pair.prompt for pair in pairs])
    return [
        Pair(prompt, pair.positive.lstrip(), pair.negative.lstrip())
        for prompt, pair in zip(prompts, pairs, strict=True)
    ]


def is_in_chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> bool:
    """Return whether a prompt is already in the chat format, that is, begins like a user's turn."""
    if not getattr(tokenizer, "chat_template", None):
        return False
    content = "the user's words"
    opening = chat_prompts(tokenizer, [content])[0].partition(content)[0]
    return bool(opening) and prompt.startswith(opening)
