"""Mistral, except that every layer has AU gates."""

from transformers.models.mistral import modeling_mistral as upstream

from rmodels.causal_lm import GatedCausalLM, GatedMLP


class MistralAttention(upstream.MistralAttention):
    # Site "attention": the input of o_proj, all heads concatenated. The gate is called between the
    # attention kernel and o_proj; see rmodels/causal_lm.py.
    eager_attention = staticmethod(upstream.eager_attention_forward)


class MistralMLP(GatedMLP, upstream.MistralMLP):
    """Gate the sites "neuron", the input of down_proj, and "ffn", its output: GatedMLP does both."""


class MistralDecoderLayer(upstream.MistralDecoderLayer):  # _no_split_modules matches this name
    def forward(self, *args, **kwargs):
        return self.au(super().forward(*args, **kwargs))  # site "layer": the residual stream


class MistralForCausalLM(GatedCausalLM, upstream.MistralForCausalLM):
    GATED = {
        upstream.MistralAttention: MistralAttention,
        upstream.MistralMLP: MistralMLP,
        upstream.MistralDecoderLayer: MistralDecoderLayer,
    }
