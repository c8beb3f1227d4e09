"""Family files: the one that docs/porting.md shows, found in a user's own folder, proven, ranked and steered."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PAIRS, save_tiny
from transformers import AutoConfig, AutoModelForCausalLM

import rmodels
from austeer.code_identity import reachable
from austeer.errors import AUSteerError
from austeer.steering import steer
from MFU_screening import screen
from set_MFU import set_MFU

ROOT = Path(__file__).parents[1]
IDS = torch.tensor([[1, 40, 77, 130, 9, 200, 31]])
LONGCAT = dict(
    hidden_size=48, ffn_hidden_size=80, num_layers=2, num_attention_heads=4, q_lora_rank=24, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=8, head_dim=8, v_head_dim=16, moe_topk=2, n_routed_experts=4, zero_expert_num=2,
    expert_ffn_hidden_size=24, vocab_size=320, max_position_embeddings=256, initializer_range=0.2, bos_token_id=1,
    eos_token_id=2, pad_token_id=0,
)  # fmt: skip


def shown(name):
    """Return the code of docs/porting.md that defines a class."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "porting.md").read_text(), re.S)
    (code,) = [block for block in blocks if f"class {name}" in block]
    return code


@pytest.fixture(scope="module")
def longcat(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("longcat"), AutoConfig.for_model("longcat_flash", **LONGCAT))


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """Let rmodels look for family files in a folder, too, and forget what it found there."""
    monkeypatch.setattr(rmodels, "__path__", [*rmodels.__path__, str(tmp_path)])
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("rmodels.modeling_longcat")]:
        del sys.modules[name]


def test_structure_refuses_layers_of_two_blocks(longcat):
    with pytest.raises(AUSteerError, match=r"has no list of 4 decoder layers: write a family file \(docs/porting.md\)"):
        rmodels.load(longcat, device="cpu")


def test_the_guides_file_loads_is_proven_and_steers(longcat, own_folder, tokenizer):
    (own_folder / "modeling_longcat_flash.py").write_text(shown("LongcatFlashForCausalLM"))
    model = rmodels.load(longcat, dtype="float32", device="cpu")
    assert type(model).__module__ == "rmodels.modeling_longcat_flash" and model.au_refused == {}
    assert "longcat_flash" in rmodels.families() and len(rmodels.decoder_layers(model)) == 2
    shapes = {site: [gate.width for gate in rmodels.gates(model, site)] for site in rmodels.sites(model)}
    assert shapes == {"attention": [64] * 4, "ffn": [48] * 4, "layer": [0, 48, 0, 48], "neuron": [80] * 4}
    upstream = AutoModelForCausalLM.from_pretrained(longcat).eval()
    assert torch.equal(model(IDS).logits, upstream(IDS).logits)
    ranks = screen(PAIRS, model, tokenizer, ["ffn"], progress=False)["ffn"]
    plan = set_MFU(ranks, 6, 1.5)
    rows = {index: plan.scale("ffn", index) for index in range(4)}
    with torch.no_grad():  # what the plan does to the second block of the first layer, for instance
        for index, scale in rows.items():
            upstream.model.layers[index // 2].mlps[index % 2].down_proj.weight.mul_((1 + scale)[:, None])
    with steer(model, plan):
        assert torch.allclose(model(IDS).logits, upstream(IDS).logits, atol=1e-4)
    assert {"rmodels.structural:add_gates", "rmodels.modeling_longcat_flash:LongcatFlashForCausalLM.au_blocks"} <= set(
        reachable(*rmodels.code_roots(type(model)))
    )


def test_a_file_that_names_a_module_twice_is_told_so(longcat, own_folder):
    code = shown("LongcatFlashForCausalLM").replace("mixer=attention.o_proj", "mixer=layer.self_attn[0].o_proj")
    (own_folder / "modeling_longcat_flash.py").write_text(
        code.replace("down=mlp.down_proj", "down=layer.mlps[0].down_proj")
    )
    model = rmodels.load(longcat, dtype="float32", device="cpu")
    assert rmodels.sites(model) == ("layer",)
    with pytest.raises(
        AUSteerError, match="no site 'ffn': block 0 has no gate of its own there; two blocks name one module"
    ):
        next(rmodels.gates(model, "ffn"))


def test_sites_that_no_block_has_are_said_to_be_absent(longcat, own_folder):
    code = shown("LongcatFlashForCausalLM").replace("down=mlp.down_proj", "down=None")
    (own_folder / "modeling_longcat_flash.py").write_text(code)
    model = rmodels.load(longcat, dtype="float32", device="cpu")
    assert rmodels.sites(model) == ("attention", "layer")
    with pytest.raises(AUSteerError, match="no site 'ffn': no layer has a projection for it"):
        next(rmodels.gates(model, "ffn"))


def test_the_guide_shows_the_papers_file_as_it_is():
    assert shown("Qwen3MLP") == (ROOT / "rmodels" / "modeling_qwen3.py").read_text()


A_FOLDER_THAT_COMES_LATE = """
import contextlib, importlib, io, json, os, sys
import rmodels
from austeer.commands.rank import main
from austeer.errors import AUSteerError

model, folder = sys.argv[1], os.environ["AUSTEER_FAMILIES"]
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main(["--help"])  # needs no family
try:
    rmodels.load(model, device="cpu")
except AUSteerError as error:
    lost = str(error)
os.rename(folder + "-late", folder)
importlib.invalidate_caches()
model = rmodels.load(model, device="cpu")
print(json.dumps([lost, type(model).__module__, rmodels.sites(model)]))
"""


def test_a_folder_named_in_the_environment_is_searched(longcat, tmp_path):
    """In one process, for time: first the folder is missing, then it is there."""
    folder, late = tmp_path / "own", tmp_path / "own-late"
    late.mkdir()
    (late / "modeling_longcat_flash.py").write_text(shown("LongcatFlashForCausalLM"))
    env = {**os.environ, "AUSTEER_FAMILIES": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", A_FOLDER_THAT_COMES_LATE, str(longcat)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lost, module, sites = json.loads(done.stdout)
    assert lost == f"AUSTEER_FAMILIES names {folder}, which is no folder"
    assert (module, sites) == ("rmodels.modeling_longcat_flash", list(rmodels.SITES))
