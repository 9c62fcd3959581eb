"""Devices and attention implementations that are not there."""

import re

import pytest
import torch
from transformers import AttentionInterface

from sparsevlm.bundled import bundled_path
from sparsevlm.inputs import load_model, pick_device
from sparsevlm.inputs.device import check_attention


def test_devices_that_are_there():
    assert pick_device("cpu") == "cpu"
    assert pick_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("device", ["mps", "xpu", "mps:0"])
def test_accelerators_that_are_not_there(device):
    if torch.accelerator.is_available() and torch.accelerator.current_accelerator().type == torch.device(device).type:
        pytest.skip("it is there")
    with pytest.raises(ValueError, match=rf"^torch cannot use the device '{device}' \(.*\); use auto, cpu or cuda\.$"):
        pick_device(device)


@pytest.mark.parametrize(
    ("device", "message"), [("toaster", "unknown device 'toaster'"), ("meta", "'meta' holds no values")]
)
def test_devices_that_are_none(device, message):
    with pytest.raises(ValueError, match=message):
        pick_device(device)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_cuda_without_a_gpu(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    remedy = re.escape("use the CPU (device='cpu', --device cpu), or install a CUDA build")
    with pytest.raises(ValueError, match=f"device {device} was asked for, but torch finds no GPU; {remedy}"):
        pick_device(device)


@pytest.mark.parametrize(("n_gpus", "found"), [(1, "cuda:0 alone"), (2, "cuda:0 to cuda:1")])
def test_a_gpu_that_is_not_there(monkeypatch, n_gpus, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    assert pick_device(f"cuda:{n_gpus - 1}") == f"cuda:{n_gpus - 1}"
    with pytest.raises(ValueError, match=f"device cuda:7 was asked for, but torch finds {found}"):
        pick_device("cuda:7")


@pytest.mark.parametrize(
    ("attn", "device", "message"),
    [
        (
            "flash_attention_2",
            "cpu",
            "'flash_attention_2' .* needs a GPU, and the model is to run on the CPU; use sdpa",
        ),
        (
            "flash_attention_2",
            "cuda",
            "needs the package flash-attn, which is missing .*; use sdpa, or install it: pip install",
        ),
        ("flash_attention_3", "cuda:1", "'flash_attention_3' .* needs the package flash-attn"),
        (
            "flash",
            "cpu",
            r"attn_implementation 'flash' \(--attn\) does not exist; use one of sdpa, eager, flash_attention_2",
        ),
        (
            "kernels-community/flash-attn2",
            "cuda",
            "is a kernel of the hub, whose code would be fetched and run; use one of",
        ),
    ],
)
def test_attention_that_is_not_there(monkeypatch, attn, device, message):
    for version in (2, 3, 4):
        monkeypatch.setattr(f"transformers.utils.is_flash_attn_{version}_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        check_attention(attn, device)
    if device == "cpu":
        with pytest.raises(ValueError, match=message):
            load_model(bundled_path(), device="cpu", attn_implementation=attn)


def test_attention_that_is_there(monkeypatch):
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    AttentionInterface.register("test_device_own", lambda *_, **__: None)
    for attn, device in (("sdpa", "cpu"), ("eager", "cuda"), ("test_device_own", "cpu"), ("flash_attention_2", "cuda")):
        check_attention(attn, device)


def test_packages_that_transformers_finds_missing(monkeypatch):
    from transformers import AutoModelForImageTextToText

    def refuse(*_, **__):
        raise ImportError("this needs the package nothing")

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", refuse)
    with pytest.raises(ValueError, match="cannot be made with attn 'sdpa': this needs the package nothing"):
        load_model(bundled_path(), device="cpu")
