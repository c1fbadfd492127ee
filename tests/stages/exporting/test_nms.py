"""NMS inside the file against NMS on the host, on candidates chosen to be difficult."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from deploy.contract import Contract
from deploy.image import ImageSpec
from deploy.predictor import Predictor
from pipeline.errors import VerdictError
from stages.exporting.nms import add_nms, nms_parity, on_canvas

SETS, CANDIDATES, CLASSES = 6, 300, 5
CONTRACT = Contract(
    image=ImageSpec(64, 96, (0, 0, 0)),
    classes=tuple("abcde"),
    category_ids=tuple(range(CLASSES)),
    candidates=CANDIDATES,
    evaluation_score_threshold=0.05,
    nms_iou=0.5,
    max_detections=40,
)


def difficult(rng):
    """Candidates on whole pixels, so that many are equal and many overlaps are exactly 1/2, reaching over the canvas; with
    equal scores, some below the threshold, some of no size and some that are no numbers."""
    corner = rng.integers(-4, 20, (SETS, CANDIDATES, 2)) * 4
    boxes = np.concatenate([corner, corner + rng.integers(0, 6, corner.shape) * 4], 2).astype(np.float32)
    boxes[:, 7], boxes[:, 11, 2] = np.nan, np.inf
    scores = np.sort(rng.integers(0, 64, (SETS, CANDIDATES)) / 64).astype(np.float32)[:, ::-1]
    return boxes, np.ascontiguousarray(scores), rng.integers(0, CLASSES, (SETS, CANDIDATES))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file that gives candidates number i for an image of brightness i, the same with NMS inside, and an image each."""
    folder = tmp_path_factory.mktemp("nms")
    boxes, scores, labels = difficult(np.random.default_rng(0))
    sets = {"all_boxes": boxes, "all_scores": scores, "all_labels": labels}
    constants = {**sets, "place": np.zeros(1, np.int64)}
    corner = {"starts": np.zeros(3, np.int64), "ends": np.ones(3, np.int64), "axes": np.arange(1, 4)}
    nodes = [
        helper.make_node("Cast", ["images"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Slice", ["whole", "starts", "ends", "axes"], ["pixel"]),
        helper.make_node("Squeeze", ["pixel", "axes"], ["number"]),
        *(helper.make_node("Gather", [f"all_{name}", "number"], [name]) for name in ("boxes", "scores", "labels")),
    ]
    value = helper.make_tensor_value_info
    outputs = [
        value("boxes", TensorProto.FLOAT, ["batch", CANDIDATES, 4]),
        value("scores", TensorProto.FLOAT, ["batch", CANDIDATES]),
        value("labels", TensorProto.INT64, ["batch", CANDIDATES]),
    ]
    graph = helper.make_graph(
        nodes,
        "sets",
        [value("images", TensorProto.UINT8, ["batch", 64, 96, 3])],
        outputs,
        [numpy_helper.from_array(array, name) for name, array in (constants | corner).items()],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "plain.onnx"
    )
    CONTRACT.write_to_onnx(folder / "plain.onnx")
    add_nms(folder / "plain.onnx", folder / "nms.onnx", CONTRACT)
    images = []
    for number in range(SETS):
        images.append(folder / f"{number}.png")
        Image.new("RGB", (96, 64), (number, 0, 0)).save(images[-1])
    return folder, images


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.8])
def test_the_graph_keeps_what_the_host_keeps(files, threshold):
    """At any threshold above the graph's own, and in batches: box for box, equal scores in any order."""
    folder, images = files
    with Predictor.open(folder / "plain.onnx") as host, Predictor.open(folder / "nms.onnx") as graph:
        for mine, theirs in zip(on_canvas(host, images, threshold), on_canvas(graph, images, threshold), strict=True):
            rows = [
                sorted(zip(one.scores.tolist(), one.labels.tolist(), one.boxes_xyxy.tolist(), strict=True))
                for one in (mine, theirs)
            ]
            assert len(rows[0]) > 5
            assert rows[0] == rows[1]


def test_the_contract_says_who_suppresses_and_how_many_leave(files):
    folder, images = files
    with Predictor.open(folder / "nms.onnx") as graph:
        assert graph.contract == replace(CONTRACT, nms="graph", candidates=40)
        batch, _ = graph.prepare([graph.decode(image) for image in images[:3]])
        found = graph.infer(batch)
    assert found.boxes_BN4.shape == (3, 40, 4)
    assert (np.diff(found.scores_BN) <= 0).all()


def test_parity_is_a_sentence_or_an_error(files, tmp_path):
    folder, images = files
    with Predictor.open(folder / "plain.onnx") as host:
        with Predictor.open(folder / "nms.onnx") as graph:
            sentence = nms_parity(images, host, graph)
        assert "NMS in the graph keeps what the host's keeps: " in sentence
        assert "0 are not; 0 of" in sentence
        add_nms(folder / "plain.onnx", tmp_path / "loose.onnx", replace(CONTRACT, nms_iou=0.6))
        with (
            Predictor.open(tmp_path / "loose.onnx") as graph,
            pytest.raises(VerdictError, match="does not keep what NMS"),
        ):
            nms_parity(images, host, graph)


def test_where_padding_begins_only_the_host_knows(files, tmp_path):
    """Two boxes that hang over the image's lower edge and are one box inside it: the host keeps one, the graph both."""
    folder, _ = files
    Image.new("RGB", (96, 16), (0, 0, 0)).save(tmp_path / "flat.png")
    with Predictor.open(folder / "plain.onnx") as host, Predictor.open(folder / "nms.onnx") as graph:
        sentence = nms_parity([tmp_path / "flat.png"], host, graph)
    differing = int(sentence.rpartition("; ")[2].split()[0])
    assert differing > 0
