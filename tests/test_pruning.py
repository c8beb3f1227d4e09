"""Pruning in four ways, and EoRA, which compensates it without training."""

import copy

import pytest
import torch
from conftest import COMMON, FAMILIES, save_tiny
from reference import hook_steering
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from upstream import TEXTS, load, upstream

import rmodels
from austeer.errors import AUSteerError
from austeer.identity import fingerprint
from austeer.plan import Plan
from austeer.pruning.blocks import same_length_batches, through_blocks
from austeer.pruning.eora import best_factors, compensated, eora
from austeer.pruning.masks import lowest
from austeer.pruning.prune import parse_sparsity, prune
from austeer.pruning.sparsegpt import sparsegpt
from austeer.steering import steer
from rmodels.tiny import tiny_config, tiny_model

DENSE_FAMILIES = [name for name in FAMILIES if name != "qwen3_moe"]
IDS = torch.tensor([TEXTS[2]])


def linears(model):
    return {n: m for n, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)}


def zero_lowest(scores, count):
    """Return the places of the `count` lowest scores, the first ones among ties."""
    return sorted(range(len(scores)), key=lambda i: (scores[i], i))[:count]


def prune_rows_by_loops(weight, score, sparsity):
    for row in range(len(weight)):
        group = sparsity[1] if isinstance(sparsity, tuple) else weight.shape[1]
        count = sparsity[0] if isinstance(sparsity, tuple) else int(group * sparsity)
        for start in range(0, weight.shape[1], group):
            for place in zero_lowest(score[row, start : start + group].tolist(), count):
                weight[row, start + place] = 0


@pytest.mark.parametrize("sparsity", [0.3, (2, 4)])
def test_magnitude_equals_loops(checkpoints, sparsity):
    model = load(checkpoints, "llama")
    before = copy.deepcopy(model)
    achieved = prune(model, "magnitude", sparsity)
    for name, linear in linears(before).items():
        weight = linear.weight.clone()
        if isinstance(sparsity, tuple):
            prune_rows_by_loops(weight, weight.abs(), sparsity)
        else:
            flat = weight.view(-1)
            for place in zero_lowest(flat.abs().tolist(), int(flat.numel() * sparsity)):
                flat[place] = 0
        assert torch.equal(linears(model)[name].weight, weight), name
        assert achieved.by_module[f"layers.{name}"] == (int((weight == 0).sum()), weight.numel())
    assert achieved.weights == sum(linear.weight.numel() for linear in linears(before).values())
    assert (
        achieved.sparsity
        == achieved.zeros / achieved.weights
        == pytest.approx(0.3 if sparsity == 0.3 else 0.5, abs=1e-3)
    )
    for untouched in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(model.state_dict()[untouched], before.state_dict()[untouched])
    assert fingerprint(model) != fingerprint(before)  # so plans for the dense model are refused


@pytest.mark.parametrize("sparsity", [0.5, (2, 4)])
@pytest.mark.parametrize("name", DENSE_FAMILIES)
def test_wanda_equals_loops_over_the_upstream_model(checkpoints, name, sparsity):
    """Prune text by text and block by block, each block after the pruned ones."""
    model = load(checkpoints, name, torch.float64)
    oracle = upstream(checkpoints, model, torch.float64)
    for layer in oracle.model.layers:
        parts = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
        squares = {n: torch.zeros(m.in_features, dtype=torch.float64) for n, m in parts.items()}

        def add(part, args, squares=squares, parts=parts):
            (own,) = (n for n, m in parts.items() if m is part)
            for token in args[0][0]:
                squares[own] += token**2

        handles = [m.register_forward_pre_hook(add) for m in parts.values()]
        for text in TEXTS:
            oracle(torch.tensor([text]))
        for handle in handles:
            handle.remove()
        for n, m in parts.items():
            prune_rows_by_loops(m.weight, m.weight.abs() * squares[n].sqrt(), sparsity)
    achieved = prune(model, "wanda", sparsity, TEXTS)
    for n, linear in linears(oracle).items():
        assert torch.equal(linears(model)[n].weight, linear.weight), n
    assert achieved.zeros == sum(int((m.weight == 0).sum()) for m in linears(oracle).values())
    assert achieved.sparsity == 0.5


def test_wanda_listens_to_its_calibration(checkpoints):
    plain, other, magnitude = (load(checkpoints, "llama") for _ in range(3))
    prune(plain, "wanda", 0.5, TEXTS)
    prune(other, "wanda", 0.5, [[1, 200, 3, 200, 3]])
    prune(magnitude, "magnitude", 0.5)
    assert len({fingerprint(plain), fingerprint(other), fingerprint(magnitude)}) == 3


@pytest.mark.parametrize("name", DENSE_FAMILIES)
def test_gates_of_a_pruned_model_steer(checkpoints, name):
    model = load(checkpoints, name)
    prune(model, "wanda", 0.5, TEXTS)
    rmodels.check_gates(model)
    plain = upstream(checkpoints, model)
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    plan = Plan({}, {"attention": torch.randn(rmodels.site_shape(model, "attention"))})
    with steer(model, plan), hook_steering(plain, plan):
        assert torch.equal(model(IDS).logits, plain(IDS).logits)


def test_what_cannot_be_pruned(checkpoints, llama, tmp_path):
    before = fingerprint(llama)
    for how, sparsity, texts, message in [
        ("slimgpt", 0.5, TEXTS, "unknown; use one of wanda, magnitude, sparsegpt, structured"),
        ("sparsegpt", (2, 7), TEXTS, "not a multiple of 7"),
        ("structured", (2, 4), TEXTS, "share of heads and channels, not 2:4"),
        ("structured", 0.001, TEXTS, "of 2 heads or 80 channels is none"),
        ("wanda", 0.5, [], "needs calibration texts"),
        ("wanda", 0.5, [[]], "needs calibration texts"),
        ("magnitude", (2, 7), [], "not a multiple of 7"),
    ]:
        with pytest.raises(AUSteerError, match=message):
            prune(llama, how, sparsity, texts)
    with steer(llama, Plan({"ffn": torch.ones(3, 48)}, {})), pytest.raises(AUSteerError, match="is steered"):
        prune(llama, "magnitude", 0.5)
    assert fingerprint(llama) == before
    with pytest.raises(
        AUSteerError, match=r"mlp\.experts of qwen3_moe is a Qwen3MoeExperts, whose weights would stay dense"
    ):
        prune(load(checkpoints, "qwen3_moe"), "magnitude", 0.5)
    gpt2 = AutoConfig.for_model("gpt2", **COMMON)
    with pytest.raises(AUSteerError, match=r"attn\.c_attn of gpt2 is a Conv1D, whose weights would stay dense"):
        prune(rmodels.load(save_tiny(tmp_path / "gpt2", gpt2), device="cpu"), "magnitude", 0.5)
    with pytest.raises(AUSteerError, match="inf or nan on the calibration"):
        broken = load(checkpoints, "llama")
        broken.model.embed_tokens.weight[3] = torch.inf
        prune(broken, "wanda", 0.5, TEXTS)


@pytest.mark.parametrize("name", ["bloom", "xglm"])
def test_blocks_run_as_in_the_model(name):
    """However the model calls its blocks: XGLM passes some arguments by position."""
    model = tiny_model(tiny_config(name))
    *_, last = through_blocks(model, [IDS[0].tolist()], "test")
    seen = []
    rmodels.decoder_layers(model)[-1].register_forward_hook(lambda layer, args, out: seen.append(out))
    with torch.no_grad():
        model(IDS, use_cache=False)
    out = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert torch.allclose(last.texts[0].hidden, out, atol=1e-5)


def test_a_quantised_model_is_not_pruned(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is in requirements2.txt")
    wide = {**COMMON, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **wide)).save_pretrained(tmp_path)
    model = rmodels.load(tmp_path, dtype="float32", device="cpu", quantization="4bit")
    with pytest.raises(AUSteerError, match="quantised model cannot be pruned"):
        prune(model, "magnitude", 0.5)


def test_sparsity_in_words():
    assert [parse_sparsity(text) for text in ("0.5", ".25", "2:4", "4:8")] == [0.5, 0.25, (2, 4), (4, 8)]
    for text in ("0", "1", "1.5", "-0.5", "0.0", "4:4", "0:4", "half", "nan", ""):
        with pytest.raises(AUSteerError, match="give a share above 0"):
            parse_sparsity(text)


def test_batches_of_one_length():
    result = same_length_batches([[1] * n for n in (3, 5, 3, 3, 5)], tokens=6)
    assert result == [[1], [4], [0, 2], [3]]


def obs_by_loops(weight, gram, sparsity, columns):
    """Remove weights one by one by Optimal Brain Surgeon, each time with an inverse of its own; return the result."""
    width, weight = weight.shape[1], weight.clone()
    hessian = gram + 0.01 * gram.diagonal().mean() * torch.eye(width, dtype=gram.dtype)
    inverses = [torch.linalg.inv(hessian[column:, column:]) for column in range(width)]

    def growth(row, column):
        return float(weight[row, column] ** 2 / inverses[column][0, 0])

    zeroed = set()
    for column in range(width):
        if isinstance(sparsity, tuple):
            if column % sparsity[1] == 0:
                near = range(column, column + sparsity[1])
                for row in range(len(weight)):
                    zeroed |= {(row, near[i]) for i in zero_lowest([growth(row, c) for c in near], sparsity[0])}
        elif column % columns == 0:
            places = [(row, c) for row in range(len(weight)) for c in range(column, min(column + columns, width))]
            lowest = zero_lowest([growth(*place) for place in places], int(len(places) * sparsity))
            zeroed |= {places[i] for i in lowest}
        for row in range(len(weight)):
            if (row, column) in zeroed:
                weight[row, column:] -= weight[row, column] / inverses[column][0, 0] * inverses[column][:, 0]
                weight[row, column] = 0
    return weight


def a_layer(outputs=6, inputs=24, tokens=200, seed=0):
    """Return a weight and inputs whose features are correlated and of different size."""
    drawn = torch.Generator().manual_seed(seed)
    mixed = torch.randn(inputs, inputs, generator=drawn, dtype=torch.float64) * torch.logspace(-0.5, 0.5, inputs)
    x = torch.randn(tokens, inputs, generator=drawn, dtype=torch.float64) @ mixed
    return torch.randn(outputs, inputs, generator=drawn, dtype=torch.float64), x


@pytest.mark.parametrize(("sparsity", "columns"), [(0.5, 128), (0.3, 8), ((2, 4), 8), ((1, 3), 7)])
def test_sparsegpt_equals_one_weight_at_a_time(sparsity, columns):
    weight, x = a_layer()
    expected = obs_by_loops(weight, x.T @ x, sparsity, columns)
    pruned = sparsegpt(weight, x.T @ x, sparsity, columns)
    assert torch.allclose(pruned, expected, atol=1e-9) and torch.equal(pruned == 0, expected == 0)


@pytest.mark.parametrize("sparsity", [0.5, (2, 4)])
@pytest.mark.parametrize("seed", range(5))
def test_sparsegpt_leaves_less_error_than_masks_and_not_less_than_the_best_weights(sparsity, seed):
    weight, x = a_layer(seed=seed)

    def error(changed):
        return float((x @ (weight - changed).T).square().sum())

    pruned = sparsegpt(weight, x.T @ x, sparsity)
    rivals = [
        weight.masked_fill(lowest(score, sparsity, by_row), 0)
        for score, by_row in ((weight.abs(), False), (weight.abs() * x.norm(dim=0), True))
    ]
    assert all(error(pruned) < error(rival) for rival in rivals)
    assert all((rival == 0).sum() == (pruned == 0).sum() for rival in rivals)
    best = torch.zeros_like(weight)
    for row in range(len(weight)):  # all weights that are left, fitted anew
        kept = pruned[row] != 0
        best[row, kept] = torch.linalg.lstsq(x[:, kept], x @ weight[row]).solution
    assert error(best) <= error(pruned)


def test_features_that_are_never_on_lose_their_weights():
    weight, x = a_layer()
    x[:, 5] = 0
    pruned = sparsegpt(weight, x.T @ x, 0.25)
    assert torch.isfinite(pruned).all() and not pruned[:, 5].any() and (pruned == 0).sum() == weight.numel() // 4


@pytest.mark.parametrize("sparsity", [0.5, (2, 4)])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_sparsegpt_equals_loops_over_the_upstream_model(checkpoints, name, sparsity):
    model = load(checkpoints, name, torch.float64)
    oracle = upstream(checkpoints, model, torch.float64)
    for layer in oracle.model.layers:
        parts = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
        inputs = {m: [] for m in parts.values()}
        handles = [m.register_forward_pre_hook(lambda m, args, i=inputs: i[m].append(args[0][0])) for m in inputs]
        for text in TEXTS:
            oracle(torch.tensor([text]))
        for handle in handles:
            handle.remove()
        for m in parts.values():
            x = torch.cat(inputs[m])
            m.weight.copy_(obs_by_loops(m.weight, x.T @ x, sparsity, 128))
    achieved = prune(model, "sparsegpt", sparsity, TEXTS)
    for n, linear in linears(oracle).items():
        ours = linears(model)[n].weight
        assert torch.allclose(ours, linear.weight, atol=1e-8), n
        if isinstance(sparsity, tuple):
            assert ((ours.view(len(ours), -1, 4) == 0).sum(-1) == 2).all(), n
    assert achieved.sparsity == 0.5


def test_structured_pruning_equals_a_smaller_model(checkpoints):
    """Its groups are those that score lowest, and without them the model computes what one without them computes."""
    model = load(checkpoints, "llama", torch.float64)
    dense = upstream(checkpoints, model, torch.float64)
    achieved = prune(model, "structured", 0.5, TEXTS)
    small = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **{**COMMON, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 40}),
        dtype=torch.float64,
    )  # fmt: skip
    weights = {name: weight for name, weight in model.state_dict().items() if name in small.state_dict()}
    for index, layer in enumerate(model.model.layers):
        at = f"model.layers.{index}."
        heads = [h for h in range(2) if layer.self_attn.k_proj.weight[16 * h : 16 * h + 16].any()]
        channels = layer.mlp.up_proj.weight.any(1).nonzero().flatten()
        assert len(heads) == 1 and len(channels) == 40
        one, two = (slice(size * heads[0], size * heads[0] + size) for size in (16, 32))
        for name, own in (("q", two), ("k", one), ("v", one)):
            weights[f"{at}self_attn.{name}_proj.weight"] = getattr(layer.self_attn, f"{name}_proj").weight[own]
        weights[f"{at}self_attn.o_proj.weight"] = layer.self_attn.o_proj.weight[:, two]
        weights[f"{at}mlp.gate_proj.weight"] = layer.mlp.gate_proj.weight[channels]
        weights[f"{at}mlp.up_proj.weight"] = layer.mlp.up_proj.weight[channels]
        weights[f"{at}mlp.down_proj.weight"] = layer.mlp.down_proj.weight[:, channels]
        if index == 0:  # its inputs are those of the dense model
            scores = _contributions(dense.model.layers[0], dense)
            assert heads == [scores["self_attn.o_proj"].view(2, 32).sum(1).argmax()]
            assert channels.tolist() == sorted(scores["mlp.down_proj"].topk(40).indices.tolist())
    small.load_state_dict(weights)
    assert torch.allclose(model(IDS).logits, small.eval()(IDS).logits, atol=1e-9)
    assert achieved.sparsity == 0.5


def _contributions(layer, model):
    """Return the sum over tokens and outputs of (w x)^2 of every column of o_proj and down_proj, by loops."""
    sums = {}
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        linear = layer.get_submodule(name)
        sums[name] = torch.zeros(linear.in_features, dtype=torch.float64)

        def add(linear, args, total=sums[name]):
            for token in args[0][0]:
                total += (linear.weight * token).square().sum(0)

        handle = linear.register_forward_pre_hook(add)
        for text in TEXTS:
            model(torch.tensor([text]))
        handle.remove()
    return sums


@pytest.mark.parametrize("tokens", [200, 10])  # with 10, the inputs lie in fewer directions than there are features
def test_eora_is_the_best_of_its_rank(tokens):
    lost, x = a_layer(tokens=tokens)

    def error(matrix):
        return float((x @ (lost - matrix).T).norm())

    outputs = torch.linalg.svd(x @ lost.T)
    for rank in (1, 3):
        a, b = best_factors(lost, x.T @ x, rank)
        assert a.shape == (rank, 24) and b.shape == (6, rank)
        left = float(outputs.S[rank:].norm())  # Eckart and Young: no outputs of this rank come nearer
        assert error(b @ a) == pytest.approx(left, rel=1e-6)
        u, s, v = torch.linalg.svd(lost, full_matrices=False)
        assert error(b @ a) < error(u[:, :rank] * s[:rank] @ v[:rank])  # the nearest in weights


def test_eora_beside_every_linear_brings_the_pruned_model_nearer(checkpoints):
    dense = load(checkpoints, "llama")
    pruned = copy.deepcopy(dense)
    prune(pruned, "magnitude", 0.5)
    texts = [[1, *torch.randint(3, 300, (40,), generator=torch.Generator().manual_seed(i)).tolist()] for i in range(9)]
    factors = eora(dense, pruned, [*TEXTS, *texts], 48)
    plain, target = pruned(IDS).logits, dense(IDS).logits
    distance = [float((plain - target).norm())]
    for rank in (16, 48):
        with compensated(pruned, factors, rank) as model:
            distance.append(float((model(IDS).logits - target).norm()))
    assert distance[0] > distance[1] > distance[2] and torch.equal(pruned(IDS).logits, plain)
    assert distance[2] < 1e-3 * distance[0]  # of full rank nothing is lost
