"""Show that the published sign depends on the basis, and that the causal one does not (docs/sign.md).

The same embedded model is written in several bases: signs of value dimensions are flipped in v_proj and flipped back in
o_proj, so every logit stays the same. Each version is ranked, steered with the same k and alpha, and tested, so any
difference between the results comes from the method.

    python -m docs.sign [--task svamp] [--k 16] [--alpha 2] [--out docs/pictures/sign.png]
"""

import argparse
import copy
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

import rmodels
from austeer.steering import steer
from embedded import acceptance, tasks
from MFU_screening import screen
from set_MFU import set_MFU

BASES, ITEMS, PAIRS = 12, 1000, 500
COLORS = {"activation": "#0072B2", "causal": "#D55E00"}


@torch.no_grad()
def rewritten(model, seed: int):
    """Return the same function in another basis; seed 0 is the shipped one."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for layer in twin.model.layers if seed else ():
        sign = torch.randint(0, 2, (layer.self_attn.v_proj.out_features,), generator=generator) * 2.0 - 1
        layer.self_attn.v_proj.weight *= sign[:, None]
        layer.self_attn.o_proj.weight *= sign
    return twin


def accuracy(model, tokenizer, items) -> float:
    replies = acceptance.answer(model, tokenizer, [item.prompt for item in items], 1)
    return 100 * sum(reply.strip() == item.right for reply, item in zip(replies, items, strict=True)) / len(items)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="svamp", choices=[task for task in tasks.TASKS if task != "tone"])
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=2.0)
    parser.add_argument("--out", type=Path, help="draw the picture here (.png)")
    args = parser.parse_args()

    torch.set_num_threads(1)
    folder = acceptance.WEIGHTS / args.task
    model, tokenizer = rmodels.load(folder, device="cpu"), rmodels.load_tokenizer(folder)
    pairs = [(item.prompt, item.right, item.wrong) for item in tasks.items(args.task, "pairs", PAIRS)]
    items = tasks.items(args.task, "test", ITEMS)
    probe = torch.tensor([tokenizer(items[0].prompt)["input_ids"]])
    vanilla, logits = accuracy(model, tokenizer, items), model(probe).logits
    results: dict[str, list[float]] = {momentum: [] for momentum in COLORS}
    for seed in tqdm(range(BASES), desc="bases"):
        twin = rewritten(model, seed)
        assert torch.equal(twin(probe).logits, logits), "a change of basis must not change a single logit"
        for momentum, accuracies in results.items():
            ranks = screen(pairs, twin, tokenizer, ["attention"], momentum=momentum, progress=False)["attention"]
            with steer(twin, set_MFU(ranks, args.k, args.alpha)):
                accuracies.append(accuracy(twin, tokenizer, items))
    print(
        f"{args.task}, attention, k {args.k}, alpha {args.alpha:g}; vanilla {vanilla:.1f} % of {ITEMS} in every basis"
    )
    for momentum, accuracies in results.items():
        spread = f"{min(accuracies):.1f} to {max(accuracies):.1f} %"
        print(
            f"{momentum:>10} momentum: {spread} over {BASES} bases of the same function "
            f"({accuracies[0]:.1f} % as shipped)"
        )
    if args.out:
        draw(results, vanilla, args)


def draw(results: dict[str, list[float]], vanilla: float, args: argparse.Namespace) -> None:
    plt.rcParams.update({"font.size": 13})
    figure, axis = plt.subplots(figsize=(8.5, 4.2))
    for y, (momentum, accuracies) in enumerate(results.items()):
        axis.plot(accuracies[1:], [y] * (BASES - 1), "o", ms=11, alpha=0.6, color=COLORS[momentum])
        axis.plot(accuracies[:1], [y], "D", ms=11, color=COLORS[momentum], markeredgecolor="black")
    axis.axvline(vanilla, color="#555555", ls="--")
    axis.text(vanilla, 1.55, " vanilla", color="#555555")
    axis.set_yticks([0, 1], ["published sign", "causal sign"])
    axis.set_ylim(-0.6, 1.8)
    axis.set_xlabel(f"accuracy in % ({args.task}, k = {args.k}, alpha = {args.alpha:g})")
    axis.set_title(f"One function, written in {BASES} bases (diamond: as shipped)")
    axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
