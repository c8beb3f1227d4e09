"""Train the sparse autoencoders of the embedded models on the residual stream after the middle layer.

They have ReLU, an L1 penalty and unit decoder rows, and see documents of the training split only, as the models did.
The same seed gives the same weights with the same library versions on the same kind of CPU. The header of each records its
quality on held-out documents: explained variance, active latents per token, and dead latents.

    python -m embedded.sae          # all four, each into the folder of its model, embedded/weights/<task>/sae/
"""

import argparse
import time
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from austeer.identity import model_header
from austeer.sae import BESIDE_WEIGHTS, SAE
from embedded import acceptance, tasks
from embedded.train import as_tensors

LAYER, LATENTS = 1, 512  # the second of four layers; four latents per dimension
DOCUMENTS, HELD_OUT, BATCH = 3000, 500, 1024
STEPS, LEARNING_RATE, WARM_UP, COOL_DOWN = 1500, 2e-3, 0.2, 0.3  # WARM_UP of the penalty, COOL_DOWN of the rate
PENALTY = 0.1


@torch.no_grad()
def activations(model, ids: dict[str, int], task: str, rng: Random, documents: int) -> Tensor:
    """Return activations over documents, (tokens, width), with `<s>` and `</s>` but without padding."""
    rows = []
    for _ in range(0, documents, 100):
        tokens, _ = as_tensors([tasks.document(task, rng) for _ in range(100)], ids)
        rows.append(model(tokens, output_hidden_states=True).hidden_states[LAYER + 1][tokens != ids["<pad>"]])
    return torch.cat(rows)


def train(h: Tensor, seed: int, steps: int, progress: str = "") -> SAE:
    """Train on h centred and scaled to a mean square of 1 per dimension; the SAE that is returned takes h unscaled."""
    generator = torch.Generator().manual_seed(seed)
    mean = h.mean(0)
    scale = (h - mean).square().mean().sqrt()
    x = (h - mean) / scale
    # every latent starts as the direction of some token, so few are dead from the start
    start = normalize(x[torch.randint(len(x), (LATENTS,), generator=generator)], dim=1)
    W_dec, W_enc = start.clone().requires_grad_(), start.T.clone().requires_grad_()
    b_enc, b_dec = torch.zeros(LATENTS, requires_grad=True), torch.zeros(x.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([W_enc, b_enc, W_dec, b_dec], LEARNING_RATE, betas=(0.9, 0.99))
    for step in tqdm(range(steps), desc=progress, disable=not progress):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, (steps - step) / (COOL_DOWN * steps))
        batch = x[torch.randint(len(x), (BATCH,), generator=generator)]
        z = ((batch - b_dec) @ W_enc + b_enc).relu()
        error = (z @ W_dec + b_dec - batch).square().sum(1)
        penalty = PENALTY * min(1, step / (WARM_UP * steps)) * x.shape[1] ** 0.5 * z.sum(1)
        optimizer.zero_grad()
        (error + penalty).mean().backward()
        optimizer.step()
        with torch.no_grad():  # otherwise small latents with long rows would evade the penalty
            W_dec.copy_(normalize(W_dec, dim=1))
    values = [W_enc, scale * b_enc, W_dec, mean + scale * b_dec]
    return SAE(*(value.detach() for value in values), layer=LAYER, centered=True)


@torch.no_grad()
def quality(sae: SAE, h: Tensor) -> dict:
    z = sae.encode(h)
    error = (sae.decode(z) - h).square().sum() / (h - h.mean(0)).square().sum()
    active = z > 0
    return {
        "explained_variance": round(1 - float(error), 4),
        "mean_active": round(float(active.sum(1).float().mean()), 1),
        "dead_latents": int((~active.any(0)).sum()),
    }


def make(task: str, seed: int = 0, steps: int = STEPS, documents: int = DOCUMENTS) -> SAE:
    model, tokenizer = acceptance.load(acceptance.WEIGHTS / task)
    ids = tokenizer.get_vocab()
    started = time.process_time()
    h = activations(model, ids, task, Random(f"{task} sae {seed}"), documents)
    sae = train(h, seed, steps, f"{task} seed {seed}").to(torch.float16)  # the stored precision
    held_out = activations(model, ids, task, Random(f"{task} sae held out {seed}"), HELD_OUT)
    sae.header.update({name: value for name, value in model_header(model).items() if name not in ("gates", "revision")})
    sae.header.update(
        quality(sae.to(torch.float32), held_out), latents=LATENTS, seed=seed, steps=steps, penalty=PENALTY
    )
    sae.header.update(trained_on=f"{documents} documents of {task}, split train", tokens=len(h))
    sae.header["cpu_seconds"] = round(time.process_time() - started)
    return sae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", nargs="+", default=tasks.TASKS, choices=tasks.TASKS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=acceptance.WEIGHTS, help="folder that holds one folder per model")
    args = parser.parse_args()

    torch.set_num_threads(1)  # the order of sums, and so the weights, depends on the number of threads
    torch.use_deterministic_algorithms(True)
    for task in args.task:
        sae = make(task, args.seed)
        sae.save(args.out / task / BESIDE_WEIGHTS)
        print({name: sae.header[name] for name in ("explained_variance", "mean_active", "dead_latents", "cpu_seconds")})


if __name__ == "__main__":
    main()
