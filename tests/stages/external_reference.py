"""An independent decode of real foreign files, in numpy, written from the table beside the weights and nothing of ours.

python tests/stages/external_reference.py NAME WEIGHTS DATA OUT.json [IMAGES]    detects, and prints the 12 statistics
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

SYNONYMS = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
NAMES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,bench,"
    "bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,"
    "sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,"
    "bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,"
    "toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,"
    "teddy bear,hair drier,toothbrush"
)
COCO = NAMES.split(",")
THRESHOLD = 0.01
NMS = {"yolo26n_int8": None, "yolov8n_int8": 0.7, "picodet_s_416": 0.6, "yolox_nano": 0.65}


def boxed(image, size, place):
    """The resized image on its canvas of 114, and the offset and scale of each axis."""
    if place == "stretch":
        return np.asarray(image.resize((size, size), Image.BILINEAR)), (0, 0), (size / image.width, size / image.height)
    scale = size / max(image.size)
    width, height = int(image.width * scale + 0.5), int(image.height * scale + 0.5)
    left, top = ((size - width) // 2, (size - height) // 2) if place == "centre" else (0, 0)
    canvas = Image.new("RGB", (size, size), (114, 114, 114))
    canvas.paste(image.resize((width, height), Image.BILINEAR), (left, top))
    return np.asarray(canvas), (left, top), (width / image.width, height / image.height)


def planes(pixels, dtype=np.float32):
    return np.ascontiguousarray(pixels.astype(dtype).transpose(2, 0, 1)[None])


def corners(cx, cy, w, h):
    return np.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1)


def yolo26n_int8(run, image):
    pixels, *back = boxed(image, 640, "centre")
    rows = run(planes(pixels) / np.float32(255))[0][0]
    scores = np.zeros((len(rows), 80), np.float32)
    scores[np.arange(len(rows)), rows[:, 5].astype(int)] = rows[:, 4]
    return rows[:, :4], scores, *back


def yolov8n_int8(run, image):
    pixels, *back = boxed(image, 640, "centre")
    rows = run(planes(pixels) / np.float32(255))[0][0].T
    return corners(*rows[:, :4].T), rows[:, 4:], *back


def picodet_s_416(run, image):
    pixels, *back = boxed(image, 416, "stretch")
    normal = (pixels.astype(np.float32) / np.float32(255) - np.float32([0.485, 0.456, 0.406])) / np.float32(
        [0.229, 0.224, 0.225]
    )
    maps = run(planes(normal))
    boxes = []
    for stride, bins in zip((8, 16, 32, 64), maps[4:], strict=True):
        weights = np.exp(bins[0].reshape(-1, 4, 8))
        left, top, right, bottom = (weights @ np.arange(8) / weights.sum(-1) * stride).T
        side = -(-416 // stride)
        y, x = ((one.ravel() + 0.5) * stride for one in np.mgrid[:side, :side])
        boxes.append(np.stack([x - left, y - top, x + right, y + bottom], -1))
    return np.concatenate(boxes), np.concatenate([one[0] for one in maps[:4]]), *back


def yolox_nano(run, image):
    pixels, *back = boxed(image, 416, "top_left")
    rows = run(planes(pixels[..., ::-1]))[0][0]
    cells = [(x, y, stride) for stride in (8, 16, 32) for y in range(416 // stride) for x in range(416 // stride)]
    x, y, stride = np.asarray(cells, np.float64).T
    wide, high = np.exp(rows[:, 2]) * stride, np.exp(rows[:, 3]) * stride
    return (
        corners((rows[:, 0] + x) * stride, (rows[:, 1] + y) * stride, wide, high),
        rows[:, 4:5] * rows[:, 5:],
        *back,
    )


def nms(boxes, scores, limit):
    """Greedy, of one class: indices that stay."""
    order, kept = list(np.argsort(-scores, kind="stable")), []
    while order:
        best = order.pop(0)
        kept.append(best)
        rest = boxes[order]
        sides = np.minimum(boxes[best, 2:], rest[:, 2:]) - np.maximum(boxes[best, :2], rest[:, :2])
        inter = np.clip(sides, 0, None).prod(1)
        both = (boxes[best, 2:] - boxes[best, :2]).prod() + (rest[:, 2:] - rest[:, :2]).prod(1) - inter
        order = [one for one, overlap in zip(order, inter / both, strict=True) if overlap <= limit]
    return kept


def detect(name, run, image, classes, best=False):
    """The 100 best detections of one image: rows of x1, y1, x2, y2, score and the index in `classes`."""
    boxes, scores, offset, scale = globals()[name](run, image)
    boxes = (boxes - [*offset, *offset]) / [*scale, *scale]
    boxes = boxes.clip(0, [image.width, image.height] * 2)
    if best:
        scores = np.where(scores == scores.max(1, keepdims=True), scores, 0)
    found = []
    for label, own in enumerate(classes):
        one = scores[:, COCO.index(SYNONYMS.get(own, own))]
        rows = np.flatnonzero((one > THRESHOLD) & (boxes[:, 2:] > boxes[:, :2]).all(1))
        kept = rows if NMS[name] is None else rows[nms(boxes[rows], one[rows], NMS[name])]
        found += [[*boxes[row], one[row], label] for row in kept]
    return sorted(found, key=lambda row: -row[4])[:100]


def results(name, weights, data, count=None, best=False):
    """COCO results of the first `count` validation images, and their annotations as COCO's own object."""
    document = json.loads((Path(data) / "annotations" / "instances_val.json").read_text())
    categories = sorted(document["categories"], key=lambda one: one["id"])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # one of the files lists its stored tensors as inputs
    file = Path(weights) / f"{name}.onnx"
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    (given,) = (one.name for one in session.get_inputs() if "image" in one.name)
    rows = []
    for record in document["images"][:count]:
        image = Image.open(Path(data) / "images" / record["file_name"]).convert("RGB")
        for x1, y1, x2, y2, score, label in detect(
            name, lambda array: session.run(None, {given: array}), image, [one["name"] for one in categories], best
        ):
            box = [float(x1), float(y1), float(x2 - x1), float(y2 - y1)]
            rows.append(
                {
                    "image_id": record["id"],
                    "category_id": categories[label]["id"],
                    "bbox": box,
                    "score": float(score),
                }
            )
    return rows


def statistics(rows, annotations, count=None):
    """The 12 COCO statistics by pycocotools, on the first `count` images."""
    from pycocotools.coco import COCO as Annotations
    from pycocotools.cocoeval import COCOeval

    truth = Annotations(str(annotations))
    judged = COCOeval(truth, truth.loadRes(rows), "bbox")
    judged.params.imgIds = [one["id"] for one in truth.dataset["images"][:count]]
    judged.evaluate()
    judged.accumulate()
    judged.summarize()
    return judged.stats.tolist()


if __name__ == "__main__":
    name, weights, data, out, *count = sys.argv[1:]
    number = int(count[0]) if count else None
    every = results(name, weights, data, number)
    Path(out).write_text(json.dumps(every))
    print(name, statistics(every, Path(data) / "annotations" / "instances_val.json", number))
