"""Weights that do not fit into memory are refused before they are loaded, and nothing else is."""

from types import SimpleNamespace

import pytest
import torch
from conftest import COMMON, SPECIAL, save_tiny
from transformers import AutoConfig

import rmodels
from austeer.errors import AUSteerError
from rmodels import memory


def config_of(name):
    return AutoConfig.for_model(name, **COMMON, **SPECIAL[name])


def leave(monkeypatch, free, swap=0):
    """Let the machine have so many bytes left."""
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    monkeypatch.setattr(memory.psutil, "swap_memory", lambda: SimpleNamespace(free=swap))


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_counted_as_they_are_loaded(tmp_path, name, dtype):
    model = rmodels.load(save_tiny(tmp_path, config_of(name)), dtype=dtype, device="cpu")
    actual = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    assert memory.weight_bytes(rmodels.skeleton(config_of(name)), getattr(torch, dtype)) == actual


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantised_weights_are_never_overestimated(checkpoints, bits):
    pytest.importorskip("bitsandbytes")
    model = rmodels.load(checkpoints["llama"], dtype="bfloat16", device="cpu", quantization=bits)
    actual = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    if bits == "4bit":  # scales of blocks of 64 weights are no parameters
        actual += sum(w.quant_state.absmax.nbytes for w in model.parameters() if hasattr(w, "quant_state"))
    estimate = memory.weight_bytes(rmodels.skeleton(config_of("llama")), torch.bfloat16, bits)
    assert 0.9 * actual < estimate <= actual


def test_what_does_not_fit_is_refused_with_what_would(checkpoints, monkeypatch):
    needed = memory.weight_bytes(rmodels.skeleton(config_of("llama")), torch.float32)
    load = dict(dtype="float32", device="cpu")
    for share, options in (
        (0.9, "--dtype bfloat16, --quantization 4bit, --device-map auto"),
        (0.45, "--quantization 4bit, --device-map auto"),
        (0.1, "--device-map auto"),
    ):
        leave(monkeypatch, int(needed * share))
        with pytest.raises(
            AUSteerError,
            match=rf"cpu has 0\.0 GB free, and the weights of .*/llama take .* in float32; take {options} \(",
        ):
            rmodels.load(checkpoints["llama"], **load)
    leave(monkeypatch, int(needed))
    rmodels.load(checkpoints["llama"], **load)
    leave(monkeypatch, 0, swap=int(needed))
    rmodels.load(checkpoints["llama"], **load)
    leave(monkeypatch, int(needed / 2))
    rmodels.load(checkpoints["llama"], dtype="bfloat16", device="cpu")


def test_a_model_that_accelerate_spreads_is_not_refused(checkpoints, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    rmodels.load(checkpoints["llama"], dtype="float32", device_map="auto")
    with pytest.raises(memory.TooLittleMemory):
        rmodels.load(checkpoints["llama"], dtype="float32", device="cpu")


def test_the_checkpoints_own_precision_counts_and_unknown_ones_little(monkeypatch):
    skeleton = rmodels.skeleton(config_of("llama"))
    leave(monkeypatch, int(memory.weight_bytes(skeleton, torch.float16)))
    memory.check_memory("m", skeleton, "auto", None, "cpu")
    skeleton.config.dtype = torch.float32
    with pytest.raises(memory.TooLittleMemory, match="in float32"):
        memory.check_memory("m", skeleton, "auto", None, "cpu")
    skeleton.config.quantization_config = {"quant_method": "fp8"}
    memory.check_memory("m", skeleton, "auto", None, "cpu")


def test_a_fold_says_that_its_certificate_needs_the_memory(checkpoints, tmp_path, monkeypatch):
    from austeer.export.fold import fold
    from austeer.plan import Plan

    scale = torch.zeros(3, 48)
    scale[1, 3] = 0.5
    leave(monkeypatch, 1000)
    with pytest.raises(AUSteerError, match=r"as the certificate needs them; --no-certificate folds without$"):
        fold(checkpoints["llama"], Plan({"ffn": scale}, {}), tmp_path / "out")
    fold(checkpoints["llama"], Plan({"ffn": scale}, {}), tmp_path / "out", certificate=False)


CGROUPS = {  # the lines of /proc/self/cgroup, files of control groups, and what these leave
    "version 2, the limit on a parent": (
        "0::/batch/job\n",
        {"batch/memory.max": "9000", "batch/memory.current": "5000",
         "batch/memory.stat": "anon 1\ninactive_file 300\nactive_file 200",
         "batch/job/memory.max": "max", "batch/job/memory.current": "10", "batch/job/memory.stat": "inactive_file 0"},
        4500,
    ),
    "version 2, in a container": (
        "0::/\n",
        {"memory.max": "700", "memory.current": "800", "memory.stat": "inactive_file 0"},
        0,
    ),
    "version 1, in a container": (
        "4:memory:/docker/abc\n1:cpu:/\n",
        {"memory/memory.limit_in_bytes": "9000", "memory/memory.usage_in_bytes": "6000",
         "memory/memory.stat": "cache 5\ntotal_inactive_file 1000"},
        4000,
    ),
    "none": ("0::/\n", {}, 50_000),
}  # fmt: skip


@pytest.mark.parametrize("case", CGROUPS)
def test_the_limit_of_a_container_counts(tmp_path, monkeypatch, case):
    own, files, left = CGROUPS[case]
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "groups")
    leave(monkeypatch, 50_000, swap=7)
    assert memory.free_bytes("cpu") == left + 7
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "none")
    assert memory.free_bytes("cpu") == 50_007


def test_on_a_gpu_its_own_memory_counts(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert memory.free_bytes("cuda:1") == 1200 and asked == ["cuda:1"]
