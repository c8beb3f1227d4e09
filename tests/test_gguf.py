"""GGUF adapters: what the file holds, and, if llama-cpp-python is installed, that llama.cpp steers like the live model.

pip install gguf llama-cpp-python        # the latter is built from source: it takes minutes and a compiler
"""

import pytest
import torch
from test_adapters import plan_for
from tiny_families import plan_in_every_layer, save_family

import rmodels
from austeer.errors import AUSteerError
from austeer.export.adapter import open_weights
from austeer.export.gguf_lora import save_gguf_lora
from austeer.export.lora import lora_factors
from austeer.plan import Plan
from austeer.steering import steer

gguf = pytest.importorskip("gguf", reason="gguf is in requirements2.txt")
IDS = [1, 40, 77, 130, 9, 200, 31, 55, 12, 300, 7, 90]


def test_the_file_holds_the_factors(llama, tmp_path):
    plan = plan_for(llama, ["attention", "ffn"])
    assert save_gguf_lora(llama, plan, tmp_path / "a.gguf") == 4
    stored = {tensor.name: torch.tensor(tensor.data.copy()) for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    factors = lora_factors(open_weights(llama, plan), plan)
    assert len(stored) == 2 * len(factors)
    for name, (a, b) in factors.items():
        place = (
            name.replace("model.layers", "blk")
            .replace("self_attn.o_proj", "attn_output")
            .replace("mlp.down_proj", "ffn_down")
        )
        assert torch.equal(stored[f"{place}.weight.lora_a"], a)
        assert torch.equal(stored[f"{place}.weight.lora_b"], b)
    with pytest.raises(AUSteerError, match="not linear in alpha"):
        save_gguf_lora(llama, plan_for(llama, ["ffn", "neuron"]), tmp_path / "b.gguf")
    with pytest.raises(AUSteerError, match="exists already"):
        save_gguf_lora(llama, plan, tmp_path / "a.gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize(
    ("name", "sites", "attention"),
    [
        ("gpt2", ["attention", "neuron"], "attn.c_proj"),
        ("bloom", ["attention", "neuron"], "self_attention.dense"),
        ("gemma3_text", ["attention", "ffn"], "self_attn.o_proj"),
    ],
)
def test_names_of_other_architectures(tmp_path, name, sites, attention):
    """A Conv1D is stored like a Linear in GGUF files, and its factors are those of a Linear."""
    model = rmodels.load(save_family(tmp_path / "source", name), dtype="float32", device="cpu")
    plan = plan_in_every_layer(model, sites)
    save_gguf_lora(tmp_path / "source", plan, tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert reader.get_field("general.architecture").contents() == name.removesuffix("_text")
    stored = {tensor.name: torch.tensor(tensor.data.copy()) for tensor in reader.tensors}
    wanted = {f"blk.{layer}.{part}.weight" for layer in range(4) for part in ("attn_output", "ffn_down")}
    assert {key.rpartition(".")[0] for key in stored} == wanted
    weight = rmodels.decoder_layers(model)[1].get_submodule(attention).weight
    weight = weight.T if name == "gpt2" else weight  # (outputs, inputs)
    difference = stored["blk.1.attn_output.weight.lora_b"] @ stored["blk.1.attn_output.weight.lora_a"]
    assert torch.allclose(difference, weight * plan.scale("attention", 1), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("opt", "knows no llama.cpp architecture for opt"),
        ("qwen3_next", "linear_attn.out_proj may be stored in another order"),
        ("mixtral", "many experts"),
    ],
)
def test_what_llama_cpp_may_hold_otherwise_is_refused(tmp_path, name, why):
    model = rmodels.load(save_family(tmp_path / "source", name), dtype="float32", device="cpu")
    plan = plan_in_every_layer(model, ["ffn" if name == "mixtral" else "attention"])
    with pytest.raises(AUSteerError, match=why):
        save_gguf_lora(model, plan, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def write_base(model, path):
    """Write the model as llama.cpp's converter would, without a vocabulary."""
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")

    def paired(name, heads):  # llama.cpp rotates neighbouring pairs, transformers the two halves of a head
        weight = state[name]
        return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)

    tensors = {
        "token_embd": state["model.embed_tokens.weight"],
        "output_norm": state["model.norm.weight"],
        "output": state["lm_head.weight"],
    }
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        tensors[f"{theirs}.attn_q"] = paired(f"{ours}.self_attn.q_proj.weight", config.num_attention_heads)
        tensors[f"{theirs}.attn_k"] = paired(f"{ours}.self_attn.k_proj.weight", config.num_key_value_heads)
        for name, there in {
            "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_proj": "ffn_gate",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "ffn_norm",
        }.items():
            tensors[f"{theirs}.{there}"] = state[f"{ours}.{name}.weight"]
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.7])
def test_llama_cpp_equals_live(llama, tmp_path, alpha):
    llama_cpp = pytest.importorskip("llama_cpp")
    unit = plan_for(llama, ["attention", "ffn"])
    write_base(llama, tmp_path / "base.gguf")
    save_gguf_lora(llama, unit, tmp_path / "plan.gguf")
    engine = llama_cpp.Llama(
        str(tmp_path / "base.gguf"),
        lora_path=str(tmp_path / "plan.gguf"),
        lora_scale=alpha,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        n_ctx=64,
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
    )
    engine.eval(IDS)
    theirs = torch.tensor(engine.scores[: len(IDS)])
    with steer(llama, Plan({site: alpha * values for site, values in unit.scales.items()})):
        ours = llama(torch.tensor([IDS])).logits[0]
    idle = llama(torch.tensor([IDS])).logits[0]
    assert (ours - theirs).abs().max() < 1e-3
    assert alpha == 0 or (ours - idle).abs().max() > 0.2
