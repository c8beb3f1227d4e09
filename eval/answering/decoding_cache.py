"""A key-value cache for answering: room for the whole answer at once, and a beginning that prompts share.

transformers' own cache copies everything it holds at every token. This one writes into room allocated beforehand, and every
row begins with the shared keys and values, computed once. No layer drops tokens that leave a sliding window: the mask
still hides them.
"""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer


class DecodingCache(Cache):
    def __init__(self, config: PreTrainedConfig, room: int, prompt_end: int, start: DecodingCache | None = None):
        """Allocate layers. room: columns in all. prompt_end: the column where answers begin, which a plan for some tokens needs to know."""
        starts = start.layers if start is not None else [None] * config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(layers=[_Layer(room, layer) for layer in starts])
        self.prompt_end = prompt_end


class _Layer(DynamicLayer):
    def __init__(self, room: int, start: _Layer | None):
        super().__init__()
        self.room, self.start = room, start
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.all_keys, self.all_values = (
            x.new_empty(*x.shape[:-2], self.room, x.shape[-1]) for x in (key_states, value_states)
        )
        if self.start is not None:  # one row, the same for all
            self._write(self.start.keys, self.start.values)
            self.start = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._write(key_states, value_states)
        return self.keys, self.values

    def _write(self, keys: Tensor, values: Tensor) -> None:
        end = self.length + keys.shape[-2]
        self.all_keys[..., self.length : end, :] = keys
        self.all_values[..., self.length : end, :] = values
        self.length = end
        self.keys, self.values = self.all_keys[..., :end, :], self.all_values[..., :end, :]

    def get_seq_length(self) -> int:
        return self.length if self.start is None else self.start.length

    def batch_select_indices(self, indices: Tensor) -> None:
        self.all_keys, self.all_values = self.all_keys[indices], self.all_values[indices]
        self.keys, self.values = self.all_keys[..., : self.length, :], self.all_values[..., : self.length, :]
