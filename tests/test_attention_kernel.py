"""--attn: the kernel reaches the model, the record and the ranks, so that numbers of two kernels are never mixed."""

import json
from dataclasses import replace

import pytest
from conftest import PAIRS
from one_cell import bench_for, computed

import main
import rmodels
from austeer import arguments
from austeer.commands import rank
from austeer.errors import AUSteerError
from austeer.ranks import AURanks
from experiments.bench import BENCHES
from experiments.ranking import make_ranks, stored_ranks
from rmodels.causal_lm import KERNELS

FEW = {"task": "copa", "limit": 10}


def test_a_cell_has_its_kernel_and_records_it(tmp_path):
    BENCHES.close()
    by_kernel = {attn: computed(tmp_path, **FEW, method="vanilla", attn=attn) for attn in (None, "sdpa", "eager")}
    assert by_kernel[None]["id"] == by_kernel["sdpa"]["id"], "the default is no other question"
    assert by_kernel["eager"]["kernel"] == "au_eager" and by_kernel["eager"]["id"] != by_kernel["sdpa"]["id"]


def test_ranks_of_another_kernel_are_not_reused(tmp_path):
    sdpa, eager = (bench_for(tmp_path, **FEW, attn=attn) for attn in ("sdpa", "eager"))
    assert make_ranks(sdpa, "activation", ["ffn"]) == 1
    assert stored_ranks(sdpa, "activation", "ffn").header["kernel"] == "au_sdpa"
    assert stored_ranks(eager, "activation", "ffn") is None, "they are kept apart"
    there = sdpa.store.ranks_file(sdpa.model_spec, sdpa.task_spec, "activation", "ffn")
    in_its_place = eager.store.ranks_file(eager.model_spec, eager.task_spec, "activation", "ffn")
    in_its_place.parent.mkdir(parents=True)
    there.rename(in_its_place)
    assert stored_ranks(eager, "activation", "ffn") is None, "and checked, too"


def test_main_compares_with_the_kernel_that_it_is_given(tmp_path, capsys):
    shared = ["--data_name", "copa", "--limit", "5", "--method", "published", "--applied_module", "ffn", "--k", "4",
              "--alpha", "1", "--draws", "1", "--jobs", "1", "--results", str(tmp_path), "--path", str(tmp_path / "r")]  # fmt: skip
    main.main([*shared, "--attn", "eager"])
    kept = [json.loads(file.read_text()) for file in (tmp_path / "records").glob("*.json")]
    assert len(kept) == 3 and {record["kernel"] for record in kept} == {"au_eager"}
    assert "attention kernel: eager" in capsys.readouterr().out and (tmp_path / "embedded-copa-eager.md").exists()


def test_every_kernel_can_be_named_and_no_other(capsys):
    parser = arguments.attn_option()
    assert [parser.parse_args(["--attn", kernel]).attn for kernel in KERNELS] == list(KERNELS)
    assert parser.parse_args([]).attn is None
    with pytest.raises(SystemExit):
        parser.parse_args(["--attn", "fast"])
    assert "invalid choice: 'fast'" in capsys.readouterr().err


def test_rank_refuses_a_file_of_another_kernel(checkpoints, tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps(dict(zip(("prompt", "positive", "negative"), pair, strict=True))) + "\n" for pair in PAIRS)
    )
    command = ["--model", str(checkpoints["gemma2"]), "--pairs", str(tmp_path / "pairs.jsonl"), "--device", "cpu",
               "--out", str(tmp_path / "ffn.safetensors")]  # fmt: skip
    rank.main(command)
    assert AURanks.load(tmp_path / "ffn.safetensors").header["kernel"] == "au_eager", "the default of Gemma-2"
    rank.main(command)
    assert "already there" in capsys.readouterr().out
    with pytest.raises(AUSteerError, match="exists and differs in kernel; choose another --out"):
        rank.main([*command, "--attn", "sdpa"])
    earlier = AURanks.load(tmp_path / "ffn.safetensors")
    unnamed = {key: value for key, value in earlier.header.items() if key != "kernel"}
    replace(earlier, header=unnamed).save(tmp_path / "ffn.safetensors")
    rank.main(command)
    assert "already there" in capsys.readouterr().out, "ranks of an earlier version are not refused for it"


def test_gemma_is_eager_unless_told_otherwise(checkpoints):
    for attn, kernel in ((None, "au_eager"), ("sdpa", "au_sdpa")):
        model = rmodels.load(checkpoints["gemma2"], device="cpu", attn_implementation=attn)
        assert model.config._attn_implementation == kernel
