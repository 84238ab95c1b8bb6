"""What labelling tools export, as paths and contents: one set of scenes in every layout."""

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from PIL import Image

from trees import SHAPES, Scene, scene, voc_xml

Files = dict[str, bytes]
"""Contents by path, with ``/`` between folders."""

STEMS = ("IMG 1 (1)", "photo.v2.final", "ünï-猫", "$5 'or' 10")
TRAIN, VALID = STEMS[:3], STEMS[3:]
SCENES = {stem: scene(number, 48, 64) for number, stem in enumerate(STEMS, 1)}


def jpeg(stem: str) -> bytes:
    """Return the photo."""
    content = io.BytesIO()
    Image.fromarray(SCENES[stem].image).save(content, "JPEG", quality=95)
    return content.getvalue()


def xml(stem: str) -> bytes:
    """Return the VOC annotation."""
    return voc_xml(SCENES[stem].boxes, SCENES[stem].labels, (48, 64)).encode()


def lines(stem: str, polygons: bool = False) -> bytes:
    """Return the YOLO labels."""
    texts = []
    for (x1, y1, x2, y2), label in zip(SCENES[stem].boxes, SCENES[stem].labels, strict=True):
        numbers = [(x1 + x2) / 128, (y1 + y2) / 96, (x2 - x1) / 64, (y2 - y1) / 48]
        if polygons:
            numbers = [x1 / 64, y1 / 48, x2 / 64, y1 / 48, x2 / 64, y2 / 48, x1 / 64, y2 / 48]
        texts.append(" ".join(map(str, [SHAPES.index(label), *numbers])))
    return "\n".join(texts).encode()


def coco(
    stems: tuple[str, ...], name: Callable[[str], str] = lambda stem: f"{stem}.jpg", start: int = 0
) -> bytes:
    """Return a COCO file whose ids count from `start`."""
    found: list[dict] = []
    for number, stem in enumerate(stems, start):
        for (x1, y1, x2, y2), label in zip(SCENES[stem].boxes, SCENES[stem].labels, strict=True):
            box = {"id": len(found), "image_id": number, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            found.append({**box, "category_id": SHAPES.index(label) + start})
    content = {
        "images": [
            {"id": number, "file_name": name(stem), "width": 64, "height": 48}
            for number, stem in enumerate(stems, start)
        ],
        "annotations": found,
        "categories": [{"id": number, "name": label} for number, label in enumerate(SHAPES, start)],
    }
    return json.dumps(content).encode()


NAMES = "\n".join(SHAPES).encode()


def placed(photos: str, annotations: str, suffix: str, content: Callable[[str], bytes], stems=STEMS) -> Files:
    """Return photos and annotations in two folders, which end in ``/`` or are empty."""
    files = {f"{photos}{stem}.jpg": jpeg(stem) for stem in stems}
    return files | {f"{annotations}{stem}{suffix}": content(stem) for stem in stems}


def yaml(**entries: str) -> bytes:
    return "".join(f"{key}: {value}\n" for key, value in entries.items()).encode()


LAYOUTS: Mapping[str, Files] = {
    "voc-beside": placed("", "", ".xml", xml),
    "voc": placed("JPEGImages/", "Annotations/", ".xml", xml),
    "voc-kaggle": placed("images/", "annotations/", ".xml", xml),
    "voc-annots": placed("images/", "annots/", ".xml", xml),
    "voc-batches": placed("JPEGImages/1/", "Annotations/1/", ".xml", xml, TRAIN)
    | placed("JPEGImages/2/", "Annotations/2/", ".xml", xml, VALID),
    "voc-cvat": placed("JPEGImages/", "Annotations/", ".xml", xml)
    | {
        "ImageSets/Main/default.txt": "\r\n".join(STEMS).encode(),
        "labelmap.txt": b"# label:color_rgb:parts:actions\n",
    },
    "voc-sets": placed("JPEGImages/", "Annotations/", ".xml", xml)
    | {
        "ImageSets/Main/train.txt": "\n".join(TRAIN).encode(),
        "ImageSets/Main/val.txt": "\n".join(VALID).encode(),
        "ImageSets/Main/disc_train.txt": "\n".join(f"{stem} -1" for stem in TRAIN).encode(),
    },
    "voc-roboflow": placed("train/", "train/", ".xml", xml, TRAIN)
    | placed("valid/", "valid/", ".xml", xml, VALID),
    "yolo-labelimg": placed("", "", ".txt", lines) | {"classes.txt": NAMES},
    "yolo-folders": placed("images/", "labels/", ".txt", lines) | {"classes.txt": NAMES},
    "yolo-classes-in-labels": placed("images/", "labels/", ".txt", lines) | {"labels/classes.txt": NAMES},
    "yolo-polygons": placed("images/", "labels/", ".txt", lambda stem: lines(stem, polygons=True))
    | {"classes.txt": NAMES},
    "yolo-splits": placed("images/train/", "labels/train/", ".txt", lines, TRAIN)
    | placed("images/val/", "labels/val/", ".txt", lines, VALID)
    | {"obj.names": NAMES},
    "yolo-darknet": placed("train/", "train/", ".txt", lines, TRAIN)
    | placed("valid/", "valid/", ".txt", lines, VALID)
    | {"train/_darknet.labels": NAMES, "valid/_darknet.labels": NAMES},
    "yolo-roboflow": placed("train/images/", "train/labels/", ".txt", lines, TRAIN)
    | placed("valid/images/", "valid/labels/", ".txt", lines, VALID)
    | {
        "data.yaml": yaml(
            train="../train/images", val="../valid/images", test="../test/images", names=list(SHAPES)
        )
    },
    "yolo-cvat": placed("obj_train_data/", "obj_train_data/", ".txt", lines)
    | {
        "obj.names": NAMES,
        "obj.data": b"classes = 3\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n",
        "train.txt": "".join(f"data/obj_train_data/{stem}.jpg\n" for stem in STEMS).encode(),
    },
    "yolo-list": placed("images/train/", "labels/train/", ".txt", lines)
    | {
        "train.txt": "".join(f"data/images/train/{stem}.jpg\n" for stem in STEMS).encode(),
        "data.yaml": yaml(path=".", train="train.txt", names=dict(enumerate(SHAPES))),
    },
    "yolo-windows": placed("images/train/", "labels/train/", ".txt", lines)
    | {
        "train.txt": "".join(f"D:\\set\\images\\train\\{stem}.jpg\r\n" for stem in STEMS).encode(),
        "data.yaml": yaml(train="D:\\set\\train.txt", names=list(SHAPES)),
    },
    "yolo-path": placed("set/images/", "set/labels/", ".txt", lines)
    | {"my.yaml": yaml(path="set", train="images", names=list(SHAPES))},
    "coco-cvat": {f"images/default/{stem}.jpg": jpeg(stem) for stem in STEMS}
    | {"annotations/instances_default.json": coco(STEMS, start=1)},
    "coco-label-studio": {f"images/{stem}.jpg": jpeg(stem) for stem in STEMS}
    | {"result.json": coco(STEMS, lambda stem: f"images/{stem}.jpg")},
    "coco-backslashes": {f"images/{stem}.jpg": jpeg(stem) for stem in STEMS}
    | {"result.json": coco(STEMS, lambda stem: f"..\\images\\{stem}.jpg")},
    "coco-beside": {f"{stem}.jpg": jpeg(stem) for stem in STEMS} | {"labels.json": coco(STEMS)},
    "coco-apart": {f"photos/a/{stem}.jpg": jpeg(stem) for stem in STEMS} | {"json/labels.json": coco(STEMS)},
    "coco-roboflow": {f"train/{stem}.jpg": jpeg(stem) for stem in TRAIN}
    | {f"valid/{stem}.jpg": jpeg(stem) for stem in VALID}
    | {"train/_annotations.coco.json": coco(TRAIN), "valid/_annotations.coco.json": coco(VALID)},
    "coco-2017": {f"train2017/{stem}.jpg": jpeg(stem) for stem in TRAIN}
    | {f"val2017/{stem}.jpg": jpeg(stem) for stem in VALID}
    | {
        "annotations/instances_train2017.json": coco(TRAIN),
        "annotations/instances_val2017.json": coco(VALID),
        "annotations/person_keypoints_val2017.json": coco(VALID),
    },
    "coco-split-files": {f"all photos/{stem}.jpg": jpeg(stem) for stem in STEMS}
    | {"train.json": coco(TRAIN), "test.json": coco(VALID)},
}


def write_files(root: Path, files: Files) -> Path:
    """Write files below a folder."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def scene_of(path: Path) -> Scene:
    """Return the scene that a photo shows, by its name."""
    return SCENES[path.stem]
