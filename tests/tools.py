"""The same scenes as the labelling tools export them: a function ``tool(root, folder, named)`` each.

Photos go to `folder` below `root`; what a tool writes is as its own documentation and exports have it.
"""

import json
from urllib.parse import quote

from trees import save, write


def photos(root, folder, named):
    for name, drawn in named.items():
        save(root / folder / f"{name}.png", drawn.image)


def objects(drawn):
    return zip(drawn.boxes, drawn.labels, strict=True)


def labelme(root, folder, named):
    photos(root, folder, named)
    for name, drawn in named.items():
        height, width = drawn.image.shape[:2]
        shapes = [
            {
                "label": label,
                "points": [[x2, y1], [x1, y2]],
                "group_id": None,
                "shape_type": "rectangle",
                "flags": {},
            }
            for (x1, y1, x2, y2), label in objects(drawn)
        ]
        content = {
            "version": "5.5.0",
            "flags": {},
            "shapes": shapes,
            "imagePath": f"..\\old place\\{name}.png",
        }
        content |= {"imageData": None, "imageHeight": height, "imageWidth": width}
        write(root / folder / f"{name}.json", json.dumps(content, ensure_ascii=False))


def label_studio(root, folder, named):
    photos(root, folder, named)
    tasks = []
    for i, (name, drawn) in enumerate(named.items()):
        height, width = drawn.image.shape[:2]
        results = [
            {
                **{"id": f"r{k}", "type": "rectanglelabels", "from_name": "label", "to_name": "image"},
                **{"original_width": width, "original_height": height, "image_rotation": 0},
                "value": {
                    **{
                        "x": x1 / width * 100,
                        "y": y1 / height * 100,
                        "rotation": 0,
                        "rectanglelabels": [label],
                    },
                    **{"width": (x2 - x1) / width * 100, "height": (y2 - y1) / height * 100},
                },
            }
            for k, ((x1, y1, x2, y2), label) in enumerate(objects(drawn))
        ]
        url = f"/data/upload/7/0a1b2c3d-{quote(name)}.png"
        tasks.append(
            {
                "id": 10 + i,
                "annotations": [{"id": 1, "was_cancelled": False, "result": results}],
                "data": {"image": url},
            }
        )
    write(root / folder / "project-7-at-2024.json", json.dumps(tasks))


def via(root, folder, named):
    photos(root, folder, named)
    images = {}
    for name, drawn in named.items():
        regions = [
            {
                "shape_attributes": {"name": "rect", "x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1},
                "region_attributes": {"kind": label, "note": "" if k else "first"},
            }
            for k, ((x1, y1, x2, y2), label) in enumerate(objects(drawn))
        ]
        about = {"filename": f"{name}.png", "size": 1234, "regions": regions, "file_attributes": {}}
        images[f"{name}.png1234"] = about
    content = {"_via_settings": {"core": {}}, "_via_img_metadata": images, "_via_attributes": {}}
    write(root / folder / "via_project.json", json.dumps(content))


def via_csv(root, folder, named):
    photos(root, folder, named)
    columns = (
        "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes"
    )
    lines = [columns]
    for name, drawn in named.items():
        for k, ((x1, y1, x2, y2), label) in enumerate(objects(drawn)):
            shape = f'""name"":""rect"",""x"":{x1},""y"":{y1},""width"":{x2 - x1},""height"":{y2 - y1}'
            count = len(drawn.labels)
            lines.append(f'{name}.png,9,"{{}}",{count},{k},"{{{shape}}}","{{""kind"":""{label}""}}"')
        if not drawn.labels:
            lines.append(f'{name}.png,9,"{{}}",0,0,"{{}}","{{}}"')
    write(root / folder / "via_export_csv.csv", "\n".join(lines) + "\n")


def cvat(root, folder, named):
    photos(root, folder, named)
    lines = ['<?xml version="1.0" encoding="utf-8"?>', "<annotations>", "<version>1.1</version>"]
    lines += ["<meta><job><size>4</size><labels><label><name>disc</name></label></labels></job></meta>"]
    for i, (name, drawn) in enumerate(named.items()):
        height, width = drawn.image.shape[:2]
        lines.append(
            f'<image id="{i}" name="{name}.png" width="{width}" height="{height}"><tag label="x" source="y"/>'
        )
        lines += [
            f'<box label="{label}" occluded="0" xtl="{x1}.00" ytl="{y1}" xbr="{x2}" ybr="{y2}" z_order="0">'
            '<attribute name="a">1</attribute></box>'
            for (x1, y1, x2, y2), label in objects(drawn)
        ]
        lines.append("</image>")
    write(root / folder / "annotations.xml", "\n".join([*lines, "</annotations>"]))


def createml(root, folder, named):
    photos(root, folder, named)
    content = [
        {
            "image": f"{name}.png",
            "annotations": [
                {
                    "label": label,
                    "coordinates": {
                        **{"x": (x1 + x2) / 2, "y": (y1 + y2) / 2, "width": x2 - x1, "height": y2 - y1},
                    },
                }
                for (x1, y1, x2, y2), label in objects(drawn)
            ],
        }
        for name, drawn in named.items()
    ]
    write(root / folder / "_annotations.createml.json", json.dumps(content))


def supervisely(root, folder, named):
    write(root / "meta.json", json.dumps({"classes": [{"title": "disc", "shape": "rectangle"}], "tags": []}))
    photos(root, f"{folder}/img", named)
    for name, drawn in named.items():
        height, width = drawn.image.shape[:2]
        found = [
            {
                **{"id": k, "classTitle": label, "geometryType": "rectangle", "tags": []},
                "points": {"exterior": [[x1, y1], [x2 - 1, y2 - 1]], "interior": []},
            }
            for k, ((x1, y1, x2, y2), label) in enumerate(objects(drawn))
        ]
        content = {
            "description": "",
            "tags": [],
            "size": {"height": height, "width": width},
            "objects": found,
        }
        write(root / folder / "ann" / f"{name}.png.json", json.dumps(content))


def tensorflow(root, folder, named, separator=","):
    photos(root, folder, named)
    lines = [separator.join(("filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax"))]
    for name, drawn in named.items():
        height, width = drawn.image.shape[:2]
        for box, label in objects(drawn):
            lines.append(separator.join(map(str, (f"{name}.png", width, height, label, *box))))
    write(root / folder / "_annotations.csv", "\n".join(lines) + "\n")


def deepforest(root, folder, named):
    photos(root, folder, named)
    rows = [(f"{name}.png", *box, label) for name, drawn in named.items() for box, label in objects(drawn)]
    lines = ["image_path;xmin;ymin;xmax;ymax;label", *(";".join(map(str, row)) for row in rows)]
    write(root / folder / "trees.csv", "\n".join(lines) + "\n")


def retinanet(root, folder, named):
    photos(root, folder, named)
    lines = []
    for name, drawn in named.items():
        rows = [",".join(map(str, (f"{name}.png", *box, label))) for box, label in objects(drawn)]
        lines += rows or [f"{name}.png,,,,,"]
    write(root / folder / "annotations.csv", "\n".join(lines) + "\n")


def open_images(root, folder, named):
    photos(root, folder, named)
    lines = ["ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf"]
    for name, drawn in named.items():
        height, width = drawn.image.shape[:2]
        for (x1, y1, x2, y2), label in objects(drawn):
            shares = (x1 / width, x2 / width, y1 / height, y2 / height)
            lines.append(",".join(map(str, (name, "human", label, 1, *shares, 0, 0, 0))))
    write(root / folder / "bbox.csv", "\n".join(lines) + "\n")


TOOLS = {
    **{"labelme": labelme, "labelstudio": label_studio, "via": via, "cvat": cvat, "createml": createml},
    **{"supervisely": supervisely, "csv": tensorflow},
}
MORE = {"via": [via_csv], "csv": [deepforest, retinanet, open_images]}
