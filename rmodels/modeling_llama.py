"""Llama, except that every layer has AU gates."""

from transformers.models.llama import modeling_llama as upstream

from rmodels.causal_lm import GatedCausalLM, GatedMLP


class LlamaAttention(upstream.LlamaAttention):
    # Site "attention": the input of o_proj, all heads concatenated. The gate is called between the
    # attention kernel and o_proj; see rmodels/causal_lm.py.
    eager_attention = staticmethod(upstream.eager_attention_forward)


class LlamaMLP(GatedMLP, upstream.LlamaMLP):
    """Gate the sites "neuron", the input of down_proj, and "ffn", its output: GatedMLP does both."""


class LlamaDecoderLayer(upstream.LlamaDecoderLayer):  # _no_split_modules matches this name
    def forward(self, *args, **kwargs):
        return self.au(super().forward(*args, **kwargs))  # site "layer": the residual stream


class LlamaForCausalLM(GatedCausalLM, upstream.LlamaForCausalLM):
    GATED = {
        upstream.LlamaAttention: LlamaAttention,
        upstream.LlamaMLP: LlamaMLP,
        upstream.LlamaDecoderLayer: LlamaDecoderLayer,
    }
