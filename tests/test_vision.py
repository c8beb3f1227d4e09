"""Vision-language models: the text decoder is ranked and steered, with prompts of text alone or with an image."""

import json

import numpy as np
import pytest
import torch
from conftest import PAIRS, byte_tokenizer
from PIL import Image
from transformers import AutoConfig, Gemma3ForConditionalGeneration, Gemma3Processor, PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

import rmodels
from austeer.commands.steer import main as steer_command
from austeer.errors import AUSteerError
from austeer.steering import steer
from MFU_screening import screen
from set_MFU import set_MFU

IMAGE_TOKENS = dict(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save a tiny random Gemma-3 with a vision tower of four patches, and its processor."""
    folder = tmp_path_factory.mktemp("vision") / "gemma3"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer().backend_tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        padding_side="left", extra_special_tokens=IMAGE_TOKENS,
    )  # fmt: skip
    text = dict(
        hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=320, initializer_range=0.2, query_pre_attn_scalar=16, sliding_window=12,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    vision = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4, initializer_range=0.2,
        image_token_index=tokenizer.image_token_id, boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28}, do_pan_and_scan=False)
    Gemma3Processor(images, tokenizer, image_seq_length=4).save_pretrained(folder)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return rmodels.load(folder, dtype="float32", device="cpu")


def test_the_text_decoder_has_the_gates(model):
    assert rmodels.sites(model) == rmodels.SITES
    assert rmodels.site_shape(model, "attention") == (3, 64) and rmodels.site_shape(model, "neuron") == (3, 80)
    assert not [name for name, part in model.named_modules() if isinstance(part, rmodels.AUGate) and "vision" in name]


def test_an_image_prompt_is_answered_unsteered_and_steered(model, folder, capsys, tmp_path):
    tokenizer = rmodels.load_tokenizer(folder)
    ranks = screen(PAIRS, model, tokenizer, ["attention"], progress=False)["attention"]
    set_MFU(ranks, 100, -8.0).save(tmp_path / "plan.safetensors")
    command = ["--model", str(folder), "--dtype", "float32", "--plan", str(tmp_path / "plan.safetensors"), "--json"]
    command += ["--max-new-tokens", "8", "--prompt", "What is it?"]
    lines = []
    for image in ([], ["--image", str(folder / "picture.png")]):
        steer_command([*command, *image])
        lines.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert all(line["unsteered"] != line["steered"] for line in lines)
    assert lines[0]["unsteered"] != lines[1]["unsteered"]  # the image was seen
    with pytest.raises(AUSteerError, match="cannot read the image"):
        steer_command([*command, "--image", str(folder / "config.json")])


def test_a_gate_steers_the_positions_of_an_image_too(model, folder):
    processor = rmodels.load_processor(folder)
    picture = Image.open(folder / "picture.png")
    inputs = processor(text="<start_of_image>What?", images=picture, return_tensors="pt")
    plan = set_MFU(screen(PAIRS, model, rmodels.load_tokenizer(folder), ["layer"], progress=False)["layer"], 9, 1.0)
    seen = {}
    gate = next(gate for gate in rmodels.gates(model, "layer") if plan.scale("layer", gate.layer).any())
    hook = gate.register_forward_hook(lambda gate, args, out: seen.update(before=args[0], after=out))
    with steer(model, plan):
        model(**inputs)
    hook.remove()
    moved = (seen["before"] != seen["after"]).any(-1)[0]
    assert moved.all() and len(moved) == inputs["input_ids"].shape[1] > 4


def test_a_text_model_has_no_processor(checkpoints):
    with pytest.raises(AUSteerError, match="processor"):
        rmodels.load_processor(checkpoints["llama"])
