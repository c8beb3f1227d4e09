"""A sparse autoencoder (SAE) of the residual stream: it maps h (width) to mostly zero latents z, and back.

    z = f((h - c) W_enc + b_enc)        h' = z W_dec + b_dec

f is ReLU or, with a threshold, JumpReLU: pre-activations up to the threshold count as zero (Gemma Scope, Llama
Scope). c is b_dec for SAEs that subtract it from their input, else 0. `layer` is the decoder layer whose output is h.

An SAE is found by its name: a file of this project's format, or RELEASE/ID of sae-lens, such as
gemma-scope-9b-it-res/layer_20/width_16k/average_l0_91. Without a name it is the one in the model's own checkpoint folder
(BESIDE_WEIGHTS), as the embedded models have it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from austeer.errors import AUSteerError, first_line, missing_extra
from austeer.evidence import Evidence
from austeer.files import read_tensors, write_tensors
from austeer.forward import PairTexts, tapped
from austeer.identity import fingerprint, precision
from rmodels import site_shape

FORMAT, SITE = "austeer-sae-1", "layer"
# in a folder of its own: vLLM and others load every *.safetensors file directly beside the weights
BESIDE_WEIGHTS = Path("sae", "residual.safetensors")
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


@dataclass(frozen=True)
class SAE:
    """Hold the weights of a sparse autoencoder, and encode and decode with them."""

    W_enc: Tensor  # (width, latents)
    b_enc: Tensor
    W_dec: Tensor  # (latents, width)
    b_dec: Tensor
    layer: int
    threshold: Tensor | None = None  # (latents,), for JumpReLU
    centered: bool = False  # b_dec is subtracted from the input
    header: dict = field(default_factory=dict)  # JSON values: model, fingerprint, trained on, ...

    def __post_init__(self):
        width, latents = self.W_enc.shape
        shapes = {"W_dec": (latents, width), "b_enc": (latents,), "b_dec": (width,), "threshold": (latents,)}
        for name, tensor in self._tensors().items():
            if tuple(tensor.shape) != shapes.get(name, (width, latents)):
                raise AUSteerError(
                    f"{name} of the SAE has shape {tuple(tensor.shape)}, which does not fit W_enc of "
                    f"{width} x {latents}"
                )
            if not torch.isfinite(tensor).all():
                raise AUSteerError(f"{name} of the SAE holds inf or nan; download or train it again")

    @property
    def latents(self) -> int:
        return self.W_enc.shape[1]

    def encode(self, h: Tensor) -> Tensor:
        h = h.to(self.W_enc)
        x = (h - self.b_dec if self.centered else h) @ self.W_enc + self.b_enc
        return x.relu() if self.threshold is None else x.relu() * (x > self.threshold)

    def decode(self, z: Tensor) -> Tensor:
        return z @ self.W_dec + self.b_dec

    def to(self, where: torch.device | torch.dtype) -> SAE:
        return replace(self, **{name: tensor.to(where) for name, tensor in self._tensors().items()})

    def save(self, path: str | Path) -> None:
        header = {**self.header, "site": SITE, "layer": self.layer, "centered": self.centered}
        write_tensors(Path(path), self._tensors(), {"format": FORMAT, "header": json.dumps(header, sort_keys=True)})

    @classmethod
    def load(cls, path: str | Path) -> SAE:
        tensors, metadata = read_tensors(Path(path), FORMAT, "SAE")
        header = json.loads(metadata["header"])
        missing = {"W_enc", "b_enc", "W_dec", "b_dec"} - set(tensors)
        if missing or header.get("site") != SITE or not isinstance(header.get("layer"), int):
            raise AUSteerError(
                f"{path} is not an SAE of the residual stream: it needs W_enc, b_enc, W_dec, b_dec and a layer"
            )
        values = {name: tensor.float() for name, tensor in tensors.items() if name in TENSORS}
        return cls(**values, layer=header["layer"], centered=bool(header.get("centered")), header=header)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in TENSORS if getattr(self, name) is not None}


def find_sae(evidence: Evidence, name: str | None = None) -> SAE:
    """Return the SAE of this name, checked against the model and on its device; without a name, the checkpoint's own."""
    model = evidence.model
    name = name or files_beside(model).get("sae")
    if name is None:
        raise AUSteerError(
            "this method needs a sparse autoencoder of the model: give --option sta.sae=FILE, a file or RELEASE/ID of "
            "sae-lens, such as gemma-scope-9b-it-res/layer_20/width_16k/average_l0_91"
        )
    is_file = Path(name).suffix == ".safetensors" or Path(name).exists()
    sae = SAE.load(name) if is_file else from_sae_lens(name)
    layers, width = site_shape(model, SITE)
    if sae.W_enc.shape[0] != width or not 0 <= sae.layer < layers:
        raise AUSteerError(
            f"the SAE reads layer {sae.layer} of width {sae.W_enc.shape[0]}; "
            f"this model has {layers} layers of {width}: give the SAE of this model (--option sta.sae=FILE)"
        )
    theirs, ours = sae.header.get("fingerprint"), fingerprint(model)
    # another precision has other bits, and then only the shapes can be compared
    if theirs and ours and theirs != ours and sae.header.get("precision") == precision(model):
        raise AUSteerError(
            f"the SAE was trained on other weights ({sae.header.get('model')}); "
            "give the SAE of this model (--option sta.sae=FILE)"
        )
    return sae.to(model.device)


def files_beside(model: PreTrainedModel) -> dict[str, Path]:
    """Return the SAE that the model's checkpoint folder holds, if it holds one."""
    file = Path(model.config.name_or_path) / BESIDE_WEIGHTS
    return {"sae": file} if file.exists() else {}


def from_sae_lens(name: str) -> SAE:
    """Load RELEASE/ID of sae-lens, which downloads it if need be."""
    release, _, sae_id = name.partition("/")
    if not sae_id:
        raise AUSteerError(f"{name} is neither a file nor RELEASE/ID of sae-lens; give one of them")
    try:
        import sae_lens
    except ImportError:
        raise missing_extra("sae-lens", "sae") from None
    try:
        theirs = sae_lens.SAE.from_pretrained(release, sae_id)
    except (ValueError, OSError, KeyError) as error:
        raise AUSteerError(f"sae-lens cannot load {name}: {first_line(error)}") from error
    return convert(theirs, name)


def convert(theirs, name: str) -> SAE:
    """Convert an SAE of sae-lens (version 6), which folds the input scale of a release into its weights."""
    config = theirs.cfg
    kind, hook = config.architecture(), config.metadata.hook_name or ""
    place = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook)
    if kind not in ("standard", "jumprelu") or config.normalize_activations != "none":
        raise AUSteerError(
            f"{name} is a {kind} SAE with input scaling {config.normalize_activations}; use a ReLU or JumpReLU SAE "
            "without input scaling"
        )
    # the input of a layer is the output of the one before
    layer = int(place[1]) - (place[2] == "pre") if place else -1
    if layer < 0:
        raise AUSteerError(f"{name} reads {hook or 'an unnamed place'}; use an SAE of a layer's output (resid_post)")
    values = {key: getattr(theirs, key).detach().float() for key in TENSORS if kind == "jumprelu" or key != "threshold"}
    centered = bool(config.apply_b_dec_to_input)
    if (getattr(config.metadata, "model_from_pretrained_kwargs", None) or {}).get("center_writing_weights"):
        values = _reading_mean_free(values, centered)
    header = {"source": name, "model": config.metadata.model_name}
    return SAE(**values, layer=layer, centered=centered, header=header)


def _reading_mean_free(values: dict[str, Tensor], centered: bool) -> dict[str, Tensor]:
    """Let an SAE take the mean out of its input itself. SAEs of GPT-2 are trained on residual streams of mean zero, which
    TransformerLens makes by centering all weights that write to the stream; as every LayerNorm takes the mean out, too,
    the model's answers are the same."""
    W_enc = values["W_enc"]
    kept = values["b_dec"].mean() * W_enc.sum(0) if centered else 0  # b_dec is subtracted after the mean
    return {**values, "W_enc": W_enc - W_enc.mean(0), "b_enc": values["b_enc"] - kept}


@torch.inference_mode()
def token_activations(evidence: Evidence, layer: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the layer's output at all tokens of each pair, three times (tokens, width): on the shared prefix, on the
    rest of the right text, on the rest of the wrong text. Padding is left out."""
    model = evidence.model
    for batch in evidence.batches():
        outputs: list[Tensor] = []
        tails = [tail for pair in batch for tail in (pair.positive, pair.negative)]
        with tapped(model, [SITE], lambda gate, rows=outputs: _collect(rows) if gate.layer == layer else None):
            texts = PairTexts(model, batch, logits=False)
            texts.run_tails(tails)
        if not all(torch.isfinite(x).all() for x in outputs):
            raise AUSteerError(f"activations are inf or nan in {model.dtype}; load the model in bfloat16 or float32")
        prompts = outputs.pop(0) if texts.cache is not None else None
        # after shared prefixes both tails of all pairs ran at once, padded on the right; otherwise text by text
        rows = [row for x in outputs for row in x]
        starts = texts.first.expand(len(rows)).tolist()
        rest = [row[start : start + len(tail)] for row, start, tail in zip(rows, starts, tails, strict=True)]
        for index, pair in enumerate(batch):
            shared = rows[2 * index][: starts[2 * index]] if prompts is None else prompts[index]
            yield shared[len(shared) - len(pair.prefix) :], rest[2 * index], rest[2 * index + 1]


def _collect(outputs: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def tap(x: Tensor) -> Tensor:
        outputs.append(x)
        return x

    return tap
