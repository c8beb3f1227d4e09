"""Qwen3 (dense), except that every layer has AU gates."""

from transformers.models.qwen3 import modeling_qwen3 as upstream

from rmodels.causal_lm import GatedCausalLM, GatedMLP


class Qwen3Attention(upstream.Qwen3Attention):
    # Site "attention": the input of o_proj, all heads concatenated. The gate is called between the
    # attention kernel and o_proj; see rmodels/causal_lm.py.
    eager_attention = staticmethod(upstream.eager_attention_forward)


class Qwen3MLP(GatedMLP, upstream.Qwen3MLP):
    """Gate the sites "neuron", the input of down_proj, and "ffn", its output: GatedMLP does both."""


class Qwen3DecoderLayer(upstream.Qwen3DecoderLayer):  # _no_split_modules matches this name
    def forward(self, *args, **kwargs):
        return self.au(super().forward(*args, **kwargs))  # site "layer": the residual stream


class Qwen3ForCausalLM(GatedCausalLM, upstream.Qwen3ForCausalLM):
    GATED = {
        upstream.Qwen3Attention: Qwen3Attention,
        upstream.Qwen3MLP: Qwen3MLP,
        upstream.Qwen3DecoderLayer: Qwen3DecoderLayer,
    }
