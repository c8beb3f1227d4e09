"""Models with gates: where the atomic units (AUs) are.

    model = rmodels.load("meta-llama/Llama-2-7b-chat-hf")      # upstream's model, with an AU gate per site and layer
    for gate in rmodels.gates(model, "ffn"): ...

The paper's families have a file each here, like modeling_llama.py. Every other decoder gets its gates by structure
(structural.py). All are proven on the model itself when it is loaded (proof.py). Where structure is wrong about a family,
add a file named after its model type, here or in the folder that AUSTEER_FAMILIES names (docs/porting.md). This package
knows no task, no ranks and no metric.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from austeer.errors import AUSteerError, first_line, missing_extra
from rmodels import sources
from rmodels.causal_lm import KERNELS, GatedCausalLM, check_gates, gates, sites
from rmodels.gate import SITES, AUGate
from rmodels.memory import check_memory
from rmodels.proof import generates_on_caches, prove, reads_on_caches
from rmodels.structural import LinearMap, add_gates, decoder_layers, linear_maps, without_head

__all__ = [
    "SITES",
    "AUGate",
    "LinearMap",
    "check_gates",
    "code_roots",
    "context_length",
    "continues_on_caches",
    "decoder_layers",
    "families",
    "family",
    "gates",
    "linear_maps",
    "load",
    "load_processor",
    "load_tokenizer",
    "model_class",
    "site_shape",
    "sites",
    "skeleton",
    "without_head",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


if own_families := os.environ.get("AUSTEER_FAMILIES"):
    __path__.append(os.path.abspath(os.path.expanduser(own_families)))


def families() -> list[str]:
    """List the model types that have a file modeling_<config.model_type>.py, here or in AUSTEER_FAMILIES."""
    if not Path(__path__[-1]).is_dir():
        raise AUSteerError(f"AUSTEER_FAMILIES names {__path__[-1]}, which is no folder")
    names = [file.name for file in pkgutil.iter_modules(__path__)]
    return [name.removeprefix("modeling_") for name in names if name.startswith("modeling_")]


def family(model_type: str) -> type[PreTrainedModel]:
    """Return the patched ForCausalLM class of a family file."""
    if model_type not in families():
        raise AUSteerError(f"there is no file modeling_{model_type}.py; there are files of {', '.join(families())}")
    module = importlib.import_module(f"rmodels.modeling_{model_type}")
    own = (cls for name, cls in vars(module).items() if name.endswith("ForCausalLM"))
    return next(cls for cls in own if cls.__module__ == module.__name__)


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Return the class to load: the family file's, or upstream's, which then gets its gates by structure."""
    own = family(config.model_type) if config.model_type in families() else None
    upstream = _language_model(config)
    return own or getattr(transformers, upstream)


def _language_model(config: PretrainedConfig) -> str:
    """Return the name of upstream's class; refuse a checkpoint that is no decoder with a language-model head."""
    kind = config.model_type
    saved_as = next(iter(config.architectures or ()), kind)
    if config.is_encoder_decoder:
        raise AUSteerError(f"{saved_as} is an encoder-decoder: AUSteer steers decoders alone")
    names = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES]
    heads = [mapping[kind] for mapping in names if kind in mapping]
    for head in heads:
        if saved_as.lower() == head.lower():  # the first Llama was a LLaMAForCausalLM
            return head
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise AUSteerError(f"{saved_as} is an encoder, which does not continue texts: AUSteer steers decoders alone")
    if not heads or hasattr(transformers, saved_as):
        take = f"; take a checkpoint of {heads[0]}" if heads else ": AUSteer steers decoders alone"
        raise AUSteerError(f"{saved_as} has no language-model head{take}")
    if getattr(config, "auto_map", None):
        raise AUSteerError(
            f"{saved_as} is code in its model repository, which is never run here; take a checkpoint of {heads[0]}"
        )
    return heads[0]  # its config names no class, or one of somebody's own


def load(
    name_or_path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: str | dict | None = None,
    quantization: str | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    weights: str | Path | None = None,
    quick_proof: bool = False,
) -> PreTrainedModel:
    """Load a checkpoint with gates, frozen and in eval mode.

    name_or_path: a hub id, a folder, a GGUF file, or another name that rmodels/sources.py knows.
    dtype: "auto" (the checkpoint's), "float32", "bfloat16", "float16" or a torch.dtype.
    device: by default the first GPU, else the CPU. device_map: accelerate's, to spread the model over several devices.
    quantization: "4bit" (nf4) or "8bit", through bitsandbytes.
    attn_implementation: "sdpa", "eager", "flash_attention_2", "flash_attention_3"; by default upstream's choice, except
    that Gemma-2 gets "eager", because transformers' sdpa drops its soft cap.
    weights: where the weights are instead; name_or_path is then only what headers and records call the model.
    quick_proof: prove the gates of three layers only, for huge models.
    """
    if device is not None and device_map is not None:
        raise AUSteerError("give either device or device_map, not both")
    if attn_implementation is not None and attn_implementation not in KERNELS:
        raise AUSteerError(f"attention kernel {attn_implementation!r} is unknown; use one of {', '.join(KERNELS)}")
    dtype, quantizer = _dtype(dtype), _quantization(quantization)
    device = check_device(device) if device_map is None else None
    given_name, name_or_path = str(name_or_path), sources.local(weights or name_or_path, dtype, revision)
    config = _config(name_or_path, revision)
    cls = model_class(config)
    try:
        if device_map is None:
            check_memory(name_or_path, skeleton(config), dtype, quantization, device)
            device_map = {"": device}
        model, report = cls.from_pretrained(
            name_or_path,
            revision=revision,
            dtype=dtype,
            device_map=device_map,
            quantization_config=quantizer,
            attn_implementation=attn_implementation or getattr(cls, "DEFAULT_KERNEL", None),
            use_safetensors=True,  # never a pickle
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ImportError, SafetensorError, RuntimeError, torch.OutOfMemoryError) as error:
        raise AUSteerError(f"cannot load the weights of {name_or_path}: {first_line(error)}") from error
    if missing := report["missing_keys"]:
        raise AUSteerError(
            f"{name_or_path} lacks {len(missing)} weights ({min(missing)}, ...), which would be random numbers; "
            "get the whole checkpoint"
        )
    for module in model.modules():
        # on some CPUs bitsandbytes repacks 4-bit weights at the first forward, for a kernel without gradients
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.given_name = given_name
    return with_proven_gates(model.eval().requires_grad_(False), quick_proof)


def code_roots(cls: type[PreTrainedModel]) -> tuple[type | Callable, ...]:
    """Return the code here that gates a class of models, for hashes that name results: its family file, or structure."""
    own = (cls,) if cls.__module__.startswith(f"{__name__}.") else ()
    return own if issubclass(cls, GatedCausalLM) else (*own, add_gates)


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """Build a model with gates but without its weights, so that it takes no memory."""
    with torch.device("meta"):
        model = model_class(config)(config)
    if not isinstance(model, GatedCausalLM):
        add_gates(model)
    return model


def with_proven_gates(model: PreTrainedModel, quick: bool = False) -> PreTrainedModel:
    """Give a model its gates if it has none, and prove them. A site that is not proven is left out, with the reason."""
    if isinstance(model, GatedCausalLM):
        check_gates(model)
    else:
        add_gates(model)
    faults, model.au_proof_errors = prove(model, gates(model), quick=quick)
    has_own_gates = isinstance(model, GatedCausalLM)
    if faults and (has_own_gates or not set(sites(model)) - set(faults)):
        todo = "mend" if model.config.model_type in families() else "write"
        listed = "; ".join(f"site {site}: {reason}" for site, reason in faults.items())
        raise AUSteerError(
            f"the gates of {type(model).__name__} fail their proof ({listed}); "
            f"{todo} the family file modeling_{model.config.model_type}.py (docs/porting.md)"
        )
    if not has_own_gates:
        model.SITES = tuple(site for site in SITES if site not in faults)
        model.au_refused = faults
        model.au_reads_on_caches = reads_on_caches(model)
        if not model.au_reads_on_caches and not generates_on_caches(model):
            model.generation_config.use_cache = False
    return model


def load_tokenizer(
    name_or_path: str | Path, *, revision: str | None = None, weights: str | Path | None = None
) -> PreTrainedTokenizerBase:
    """Load with AutoTokenizer, and never run a model repository's code: with the flag unset transformers would ask."""
    folder = sources.local(weights or name_or_path, None, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, AttributeError) as error:
        raise AUSteerError(f"cannot load the tokenizer of {folder}: {first_line(error)}") from error
    tokenizer.name_or_path = str(name_or_path)
    return tokenizer


def load_processor(
    name_or_path: str | Path, *, revision: str | None = None, weights: str | Path | None = None
) -> ProcessorMixin:
    """Load what turns images and text into a vision-language model's inputs."""
    folder = sources.local(weights or name_or_path, None, revision)
    try:
        processor = AutoProcessor.from_pretrained(folder, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, AttributeError) as error:
        raise AUSteerError(f"cannot load the processor of {name_or_path}: {first_line(error)}") from error
    if not hasattr(processor, "image_processor"):
        raise AUSteerError(f"{name_or_path} has no image processor: it reads text alone")
    return processor


def check_device(device: str | torch.device | None) -> str:
    """Return the device to use: the named one if it exists, by default the first GPU, else the CPU."""
    if device is None:
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise AUSteerError(f"device {device!r} is unknown; use cpu, cuda, cuda:1, mps, ...") from None
    if kind == "mps" and not torch.backends.mps.is_available():
        raise AUSteerError("no Apple GPU here; use --device cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise AUSteerError("no CUDA device here; use --device cpu, or install a CUDA build of torch")
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise AUSteerError(f"there is no {device}: here are {torch.cuda.device_count()} CUDA devices; take a lower one")
    return str(device)


def continues_on_caches(model: PreTrainedModel) -> bool:
    """Say whether a batch of prompts can be padded on the left and continued on their cache, repeated or not."""
    return getattr(model, "au_reads_on_caches", True)


def context_length(model: PreTrainedModel) -> int:
    """Return how many tokens a text may have: where the config names no limit, as for Mamba, any number."""
    config = model.config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "max_seq_len", "seq_length", "model_max_length")
    return next((limit for name in names if isinstance(limit := getattr(config, name, None), int)), 1 << 20)


def site_shape(model: PreTrainedModel, site: str) -> tuple[int, int]:
    """Return (layers, AUs per layer) of one site: of the widest layer, where layers differ."""
    widths = [gate.width for gate in gates(model, site)]
    if not widths:
        raise AUSteerError(f"{type(model).__name__} has no AU gates; load it with rmodels.load")
    return len(widths), max(widths)


def _config(name_or_path: str, revision: str | None):
    try:
        return AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        text = str(error)
        is_folder = Path(name_or_path).is_dir()
        if is_folder and not (Path(name_or_path) / "config.json").exists():
            reason = "the folder has no config.json"
        elif "gated repo" in text.lower() or "restricted" in text.lower():
            reason = "the repository is gated: accept its terms on the hub, then set HF_TOKEN"
        elif is_folder and "does not recognize this architecture" not in text and "custom code" not in text:
            reason = f"its config.json cannot be read ({first_line(error)})"
        elif "model type" in text or "custom code" in text:
            raise AUSteerError(
                f"{name_or_path}: transformers does not know its model type, and the code of a model repository "
                f"is never run here; update transformers, or take a model that it knows (docs/models.md)"
            ) from error
        else:
            reason = f"there is no such folder, and the hub does not offer it ({first_line(error)})"
        raise AUSteerError(f"cannot load model {name_or_path}: {reason}") from error


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise AUSteerError(f"dtype {dtype!r} is unknown; use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _quantization(bits: str | None) -> BitsAndBytesConfig | None:
    if bits is None:
        return None
    if bits not in ("4bit", "8bit"):
        raise AUSteerError(f"quantization {bits!r} is unknown; use 4bit or 8bit")
    if find_spec("bitsandbytes") is None:
        raise missing_extra("bitsandbytes", "quantization")
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
