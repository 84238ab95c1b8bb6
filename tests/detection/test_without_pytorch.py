"""Everything but learning layers works where PyTorch is not installed."""

import numpy as np

from processes import without_pytorch

FIT = """
import sys
from pathlib import Path
import numpy as np
import trees
from sppnet.detection.detector import Detector
from sppnet.detection.ensemble import Ensemble
from sppnet.detection.tuning import Tuning
from sppnet.errors import SppnetError
from sppnet.proposals.maps import Objectness

folder = Path(sys.argv[1])
images, windows, targets = trees.drawn(range(1, 7))
samples = trees.samples(images, targets)
settings = {"levels": (2, 1), "scales": (160,), "reference": 160}
detector = Detector(**settings).fit(samples, windows=windows)
detector.save(folder / "plain.safetensors")
loaded = Detector.load(folder / "plain.safetensors")
found = loaded.predict(images[0], windows[0])
assert len(found.labels) > 0
print(loaded.evaluate(samples[:2], proposals="dense").mean_ap)
other = Detector(**settings, seed=1, negatives="released").fit(samples, windows=windows)
assert len(Ensemble([loaded, other]).predict(images[0], windows[0]).labels) > 0
for changed in ({"layer": "fc6", "tuning": Tuning()}, {"objectness": Objectness()}):
    try:
        Detector(**settings, **changed).fit(samples, windows=windows)
    except SppnetError as error:
        print(error)
assert "torch" not in sys.modules
"""

HEADED = """
import sys
from pathlib import Path
import numpy as np
from sppnet.detection.detector import Detector

folder = Path(sys.argv[1])
detector = Detector.load(folder / "headed.safetensors")
image = np.load(folder / "image.npy")
found = detector.predict(image)  # Its maps propose the windows.
np.savez(folder / "found.npz", boxes=found.boxes, scores=found.scores, labels=found.labels)
thin = detector.compressed((3, 0))
thin.save(folder / "thin.safetensors")
print(*Detector.load(folder / "thin.safetensors").fitted_.head.ranks)
"""


def test_a_detector_is_fitted_used_kept_and_measured(tmp_path):
    measured, *refused = without_pytorch(FIT, tmp_path).splitlines()
    assert 0 <= float(measured) <= 1
    assert refused == [
        f'{what} needs PyTorch: pip install "sppnet[torch]"'
        for what in ("training layers", "learning to propose windows from maps")
    ]


def test_what_was_trained_with_pytorch_runs_without(tmp_path):
    import trees
    from sppnet.detection.detector import Detector
    from sppnet.detection.tuning import Tuning
    from sppnet.proposals.maps import Objectness

    images, windows, targets = trees.drawn(range(1, 7))
    detector = Detector(
        levels=(2, 1),
        scales=(160,),
        reference=160,
        layer="fc7",
        tuning=Tuning("4", batches=4, batch=16, width=8, windows=8, epochs=1),
        proposals="maps",
        objectness=Objectness(sizes=(0.5, 1.0), reference=40, width=8, kernel=3, steps=4, limit=50),
    )
    detector.fit(trees.samples(images, targets), windows=windows).save(tmp_path / "headed.safetensors")
    np.save(tmp_path / "image.npy", images[0])
    assert without_pytorch(HEADED, tmp_path) == "3 0\n"
    found = np.load(tmp_path / "found.npz")
    expected = Detector.load(tmp_path / "headed.safetensors").predict(images[0])
    assert found["labels"].tolist() == list(expected.labels)
    np.testing.assert_allclose(found["scores"], expected.scores, atol=1e-4)
    np.testing.assert_allclose(found["boxes"], expected.boxes, atol=0.1)
