"""Qwen3-MoE, except that every layer has AU gates.

The ffn site is the output of the whole sparse block, after the weighted sum over experts. The experts themselves are
fused three-dimensional tensors with nothing to hook: their neurons have gates of their own (rmodels/experts.py). Layers
that the config makes dense have an ordinary MLP. (For this family the authors' code has the attention site only.)
"""

from transformers.models.qwen3_moe import modeling_qwen3_moe as upstream

from rmodels.causal_lm import GatedCausalLM, GatedMLP


class Qwen3MoeAttention(upstream.Qwen3MoeAttention):
    # Site "attention": the input of o_proj, all heads concatenated. The gate is called between the
    # attention kernel and o_proj; see rmodels/causal_lm.py.
    eager_attention = staticmethod(upstream.eager_attention_forward)


class Qwen3MoeSparseMoeBlock(upstream.Qwen3MoeSparseMoeBlock):
    def forward(self, hidden_states):
        return self.au(super().forward(hidden_states))  # site "ffn": the summed output of the experts


class Qwen3MoeMLP(GatedMLP, upstream.Qwen3MoeMLP):
    """Gate the sites "neuron" and "ffn" of a dense layer: GatedMLP does both."""


class Qwen3MoeDecoderLayer(upstream.Qwen3MoeDecoderLayer):  # _no_split_modules matches this name
    def forward(self, *args, **kwargs):
        return self.au(super().forward(*args, **kwargs))  # site "layer": the residual stream


class Qwen3MoeForCausalLM(GatedCausalLM, upstream.Qwen3MoeForCausalLM):
    GATED = {
        upstream.Qwen3MoeAttention: Qwen3MoeAttention,
        upstream.Qwen3MoeSparseMoeBlock: Qwen3MoeSparseMoeBlock,
        upstream.Qwen3MoeMLP: Qwen3MoeMLP,
        upstream.Qwen3MoeDecoderLayer: Qwen3MoeDecoderLayer,
    }
