import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from processes import without_pytorch
from sppnet.features import inference
from sppnet.features.backbone import Backbone

IMAGE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)


@pytest.fixture
def maps(backbone_file):
    """Return a function that compiles a backbone anew and returns a map of it."""
    path = backbone_file("test_efficientnet")
    return lambda: Backbone(path, ("head",), 32)(IMAGE, 64).stages[0]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    inference._warn_of_cache.cache_clear()
    monkeypatch.setattr(inference, "graph_cache", lambda: tmp_path / "graphs")
    return tmp_path / "graphs"


def test_compiled_graphs_are_kept_and_read_back(maps, folder):
    first = maps()
    (kept,) = folder.glob("*.blob")
    written = kept.stat().st_mtime_ns
    assert np.array_equal(maps(), first)
    assert [p.stat().st_mtime_ns for p in folder.glob("*.blob")] == [written]


@pytest.mark.parametrize("content", [b"", b"nothing of the runtime's" * 1000, None])
def test_a_damaged_entry_is_compiled_anew(maps, folder, content):
    first = maps()
    (kept,) = folder.glob("*.blob")
    kept.chmod(0o600)
    kept.write_bytes(kept.read_bytes()[:1000] if content is None else content)
    assert np.array_equal(maps(), first)


def test_only_the_newest_entries_are_kept(maps, folder, monkeypatch):
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.blob").touch()
    monkeypatch.setattr(inference, "_KEPT", 2)
    maps()
    assert len(list(folder.glob("*.blob"))) == 3  # two, and the one that came after


def test_a_folder_that_cannot_be_is_said_once(maps, folder):
    folder.write_text("in the way")
    with pytest.warns(UserWarning, match="graphs: cannot keep compiled graphs there"):
        first = maps()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(maps(), first)


def test_a_full_disk_is_said_once(maps, folder, monkeypatch):
    monkeypatch.setattr(inference, "_SPACE", 2**62)
    with pytest.warns(UserWarning, match="MB free.; they are compiled anew"):
        maps()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maps()


def test_a_runtime_that_refuses_the_cache_works_without(maps, folder, monkeypatch):
    core = inference._core()

    class Refusing:
        read_model = core.read_model

        def compile_model(self, network, device, settings):
            if "CACHE_DIR" in settings:
                raise RuntimeError("first line\nthe cache is no good")
            return core.compile_model(network, device, settings)

    monkeypatch.setattr(inference, "_core", Refusing)
    with pytest.warns(UserWarning, match="the cache is no good"):
        assert np.isfinite(maps()).all()


def test_two_processes_may_fill_an_empty_cache_at_once(tmp_path):
    code = """
import sys
import numpy as np
from processes import without_pytorch
from sppnet.features import inference
from sppnet.features.backbone import Backbone
from pathlib import Path
inference.graph_cache = lambda: Path(sys.argv[1]) / "graphs"
print(float(Backbone()(np.full((64, 64, 3), 90, np.uint8), 64).stages[0].sum()))
"""
    with ThreadPoolExecutor(3) as pool:
        sums = set(pool.map(lambda _: without_pytorch(code, tmp_path), range(3)))
    assert len(sums) == 1
    assert len(list((tmp_path / "graphs").glob("*.blob"))) == 1


def test_the_first_images_of_a_process_may_come_at_once(backbone_file):
    # Where the runtime starts in several threads at once, some processes never end.
    code = """
import sys
from threading import Barrier, Thread
import numpy as np
from sppnet.features.backbone import Backbone
graph = Backbone(sys.argv[1], ("head",), 32)._run
together = Barrier(8)

def run():
    together.wait()
    graph(np.zeros((1, 64, 64, 3), np.float32))

threads = [Thread(target=run) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
    path = backbone_file("test_efficientnet")
    for _ in range(6):
        without_pytorch(code, path, patience=60)


def test_threads_are_not_bound_to_cores():
    # Else several processes at once, such as the workers of a cluster, all have the same one.
    backbone = Backbone("pyramid-lite0", ("p3",), 32).for_threads(2)
    run: Any = backbone._run
    assert run._compiled.get_property("ENABLE_CPU_PINNING") is False
