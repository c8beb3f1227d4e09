"""Gemma-2, except that every layer has AU gates.

Gemma-2 normalises the output of each block before adding it to the residual stream. As in the authors' code, the ffn
gate sits before that norm, so scaling one AU rescales all the others through the RMS.
"""

from transformers.models.gemma2 import modeling_gemma2 as upstream

from rmodels.causal_lm import GatedCausalLM, GatedMLP


class Gemma2Attention(upstream.Gemma2Attention):
    # Site "attention": the input of o_proj, all heads concatenated. The gate is called between the
    # attention kernel and o_proj; see rmodels/causal_lm.py.
    eager_attention = staticmethod(upstream.eager_attention_forward)


class Gemma2MLP(GatedMLP, upstream.Gemma2MLP):
    """Gate "neuron", the input of down_proj, and "ffn", its output before the post-norm: GatedMLP does both."""


class Gemma2DecoderLayer(upstream.Gemma2DecoderLayer):  # _no_split_modules matches this name
    def forward(self, *args, **kwargs):
        return self.au(super().forward(*args, **kwargs))  # site "layer": the residual stream


class Gemma2ForCausalLM(GatedCausalLM, upstream.Gemma2ForCausalLM):
    DEFAULT_KERNEL = "eager"  # transformers' sdpa kernel drops the attention soft cap that Gemma-2 was trained with
    GATED = {
        upstream.Gemma2Attention: Gemma2Attention,
        upstream.Gemma2MLP: Gemma2MLP,
        upstream.Gemma2DecoderLayer: Gemma2DecoderLayer,
    }
