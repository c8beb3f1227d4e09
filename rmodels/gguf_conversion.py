"""Convert a GGUF file into an ordinary checkpoint: weights dequantised by transformers, tokenizer and chat template.

The checkpoint stands in the cache under the SHA-256 of the file and the dtype: a file that moved is not converted again,
and a file that changed is. Its config.json says what it was made from (SOURCE).
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from austeer.errors import AUSteerError, missing_extra, one_line
from austeer.files import locked, new_folder, sha256, write_text
from rmodels.memory import free_bytes

if TYPE_CHECKING:
    from gguf import GGUFReader

MAGIC = b"GGUF"
FORMAT = 1  # raised when conversions change, so that caches make them anew
SOURCE = "austeer_source"  # key of config.json: file, sha256, quantization
LLAMA_3 = (
    "llama3",
    "llama-v3",
    "llama-bpe",
)  # byte-pair tokenizers that begin texts with BOS, though the file may not say so
START, PER_WEIGHT = 60, 5e-8  # seconds on one busy core, measured; a free one is three times as fast


def converted(file: Path, dtype: str | None, cache: Path) -> Path:
    """Return the checkpoint made from a GGUF file, making it if the cache does not hold it. dtype None: any that is there."""
    _check_is_gguf(file)
    digest = _known_sha256(file, cache)
    home = cache / f"gguf-{FORMAT}" / digest
    if dtype is None:
        dtype = next((folder.parent.name for folder in sorted(home.glob("*/config.json"))), "bfloat16")
    folder = home / dtype
    if not folder.exists():
        with locked(folder):
            if not folder.exists():
                for leftover in home.glob(f".{dtype}.????????"):  # of a killed process, since no other holds the lock
                    shutil.rmtree(leftover, ignore_errors=True)
                with new_folder(folder) as unfinished:
                    _convert(file, digest, dtype, unfinished)
    return folder


def _check_is_gguf(file: Path) -> None:
    try:
        with file.open("rb") as opened:
            start = opened.read(len(MAGIC))
    except OSError as error:
        raise AUSteerError(f"cannot read {file}: {error.strerror}") from None
    if start != MAGIC:
        raise AUSteerError(f"{file} is not a GGUF file: it begins with {start!r}, not {MAGIC!r}")


def _known_sha256(file: Path, cache: Path) -> str:
    """Return the file's SHA-256, which takes minutes for the largest: noted under its path, size and time of change."""
    state = file.resolve(), file.stat().st_size, file.stat().st_mtime_ns
    note = cache / "sha256" / hashlib.sha256(repr(state).encode()).hexdigest()
    if note.exists():
        return note.read_text().strip()
    digest = sha256(file)
    with suppress(AUSteerError):  # a cache that can only be read still serves what it holds
        write_text(note, f"{digest}\n")
    return digest


def _convert(file: Path, digest: str, dtype: str, folder: Path) -> None:
    reader = _read(file)
    quantization = f"gguf {_quantization(reader)}"
    n_weights = sum(int(tensor.n_elements) for tensor in reader.tensors)
    size = n_weights * getattr(torch, dtype).itemsize
    free = shutil.disk_usage(folder).free
    if free < size:
        raise AUSteerError(
            f"converting {file} to {dtype} needs {size / 1e9:.1f} GB, and {folder.parents[1]} has {free / 1e9:.1f} GB free: "
            "name a folder on another disk in AUSTEER_CACHE"
        )
    if (memory := free_bytes("cpu")) < size:
        raise AUSteerError(
            f"converting {file} to {dtype} needs {size / 1e9:.1f} GB of memory, and {memory / 1e9:.1f} GB are free: take a "
            "smaller model"
        )
    minutes = round((START + n_weights * PER_WEIGHT) / 60)
    print(
        f"converting {file.name} ({quantization}) to a {dtype} checkpoint of {size / 1e6:.0f} MB, once: this may take "
        f"{minutes} minute{'s' * (minutes > 1)}",
        file=sys.stderr,
    )
    model, tokenizer = _load(file, _field(reader, "general.architecture"), dtype)
    tokenizer.add_bos_token = _begins_with_bos(reader)  # transformers does not read it from the file
    setattr(model.config, SOURCE, {"file": file.name, "sha256": digest, "quantization": quantization})
    stated = model.generation_config.eos_token_id  # a list where an answer may end in several ways
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=stated if isinstance(stated, list) else tokenizer.eos_token_id,
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):  # safetensors lets their owner only read them
        weights.chmod((folder / "config.json").stat().st_mode)


def _read(file: Path) -> GGUFReader:
    """Read the table of contents, and refuse what is damaged or is only a part."""
    if find_spec("gguf") is None:
        raise missing_extra("gguf", "export")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        reader.fields["general.architecture"].contents()
    except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise AUSteerError(f"{file} is damaged or was cut off ({one_line(error)}): get it again") from error
    if (parts := _field(reader, "split.count") or 1) > 1:
        raise AUSteerError(f"{file} is one of {parts} parts: join them with llama.cpp's `llama-gguf-split --merge`")
    return reader


def _field(reader: GGUFReader, name: str):
    field = reader.fields.get(name)
    return None if field is None else field.contents()


def _begins_with_bos(reader: GGUFReader) -> bool:
    """Say whether texts begin with BOS: as the file says, else as llama.cpp does for this kind of tokenizer."""
    stated = _field(reader, "tokenizer.ggml.add_bos_token")
    if stated is not None:
        return bool(stated)
    return _field(reader, "tokenizer.ggml.model") == "llama" or _field(reader, "tokenizer.ggml.pre") in LLAMA_3


def _quantization(reader: GGUFReader) -> str:
    """Return the file's own word, such as Q4_K_M; without one, the type that holds most weights."""
    from gguf import LlamaFileType

    names = {int(kind): kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in LlamaFileType}
    stated = _field(reader, "general.file_type")
    if stated in names:
        return names[stated]
    largest = max(reader.tensors, key=lambda tensor: tensor.n_elements)
    return largest.tensor_type.name


def _load(file: Path, architecture: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    with tempfile.TemporaryDirectory(prefix="austeer-") as alone:  # files beside it are of other models, perhaps
        link = Path(alone) / "model.gguf"
        link.symlink_to(file.resolve())
        try:
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=link.name, trust_remote_code=False)
            model, report = AutoModelForCausalLM.from_pretrained(
                alone, gguf_file=link.name, dtype=getattr(torch, dtype), output_loading_info=True, trust_remote_code=False,
                quantization_config=GgufConfig(dequantize=True),  # packed weights could not be saved
            )  # fmt: skip
        except Exception as error:  # of any kind, on files that it does not expect
            if "is not supported yet" in str(error):
                raise AUSteerError(
                    f"{file}: transformers cannot dequantise the architecture {architecture!r}; it can "
                    f"{', '.join(_architectures())}"
                ) from error
            raise AUSteerError(f"transformers cannot convert {file}: {one_line(error)}") from error
    lacking = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if lacking:
        raise AUSteerError(f"{file} lacks {len(lacking)} weights ({lacking[0]}, ...), which would be random numbers")
    return model, tokenizer


def _architectures() -> list[str]:
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES  # of its older reader

    return sorted({*GGUF_CONFIG_ARCHS, *GGUF_SUPPORTED_ARCHITECTURES} - {"general", "tokenizer"})
