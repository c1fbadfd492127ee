"""A foreign detector that is made here, of every layout: what it finds is known by hand, and a wrong description is told."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from deploy.image import ImageSpec, decode
from deploy.postprocess import detect
from deploy.predictor import Predictor
from pipeline import graph, lookup
from pipeline.errors import UserError, VerdictError
from stages import benchmark, build_engine, external, quantize, release, validate
from stages.data.coco import CocoSplit
from stages.exporting.foreign import cleaned
from stages.exporting.graph_flops import graph_flops

# Two objects on a canvas of 64 px: corners, score at full gain, class.
FOUND = [((24.0, 20.0, 40.0, 28.0), 0.9, 2), ((0.0, 40.0, 16.0, 64.0), 0.5, 7)]
CELLS = [5, 12]  # of four by four, stride 16, in which they are
INPUT = {
    "fit": "centre",
    "colours": "bgr",
    "divide_by": 255,
    "mean": [0.1, 0.2, 0.3],
    "std": [1.1, 1, 1],
    "pad": [10, 20, 30],
}


def rows_of(columns, place):
    """16 rows of zeros, and at `CELLS` what `place(box, score, class)` gives."""
    table = np.zeros((16, columns), np.float32)
    for cell, found in zip(CELLS, FOUND, strict=True):
        for column, value in place(*found).items():
            table[cell, column] = value
    return table


def column_table():
    def place(box, score, label):
        x1, y1, x2, y2 = box
        return {0: (x1 + x2) / 2, 1: (y1 + y2) / 2, 2: x2 - x1, 3: y2 - y1, 4 + label: score}

    return [rows_of(14, place).T]  # turned round


def grid_table():
    def place(box, score, label):
        (x1, y1, x2, y2), (row, column) = box, divmod(CELLS[[one[2] for one in FOUND].index(label)], 4)
        offset = {0: (x1 + x2) / 32 - column, 1: (y1 + y2) / 32 - row}
        return {**offset, 2: np.log((x2 - x1) / 16), 3: np.log((y2 - y1) / 16), 4: score, 5 + label: 1.0}

    return [rows_of(15, place)]


def row_table():
    return [rows_of(6, lambda box, score, label: {**dict(enumerate(box)), 4: score, 5: label})]


def tensor_tables():
    boxes = rows_of(4, lambda box, score, label: dict(enumerate(box)))
    return [boxes, rows_of(10, lambda box, score, label: {label: score})]


def distribution_tables():
    def bins(distance):
        """Logits over 9 bins whose mean is this distance, in bins."""
        low = int(distance)
        shares = np.full(9, 1e-30)
        shares[low : low + 2] += [1 - (distance - low), distance - low]
        return np.log(shares)

    logits = np.zeros((16, 36), np.float32)
    for cell, ((x1, y1, x2, y2), _, _) in zip(CELLS, FOUND, strict=True):
        y, x = (16 * (one + 0.5) for one in divmod(cell, 4))
        logits[cell] = np.concatenate([bins(one / 16) for one in (x - x1, y - y1, x2 - x, y2 - y)])
    return [tensor_tables()[1], logits]


# Layout to its settings, tables, and in which columns of each the scores are.
LAYOUTS = {
    "columns": ({}, column_table, [slice(4, None)]),
    "grid": ({"strides": [16]}, grid_table, [slice(4, 5)]),
    "rows": ({}, row_table, [slice(4, 5)]),
    "tensors": ({}, tensor_tables, [slice(0, 0), slice(None)]),
    "distributions": ({"strides": [16]}, distribution_tables, [slice(None), slice(0, 0)]),
}


# What a file takes: its type and axes, how they become those of its convolution, and the type of that.
TAKES = {
    "nchw": ("float[{batch}, 3, 64, 64]", "images = Identity(given)", np.float32),
    "nhwc": ("float[{batch}, 64, 64, 3]", "images = Transpose<perm = [0, 3, 1, 2]>(given)", np.float32),
    "half": ("float16[{batch}, 3, 64, 64]", "images = Identity(given)", np.float16),
}


def write_foreign(path, tables, scores, batch=1, opset=11, extra="steady = Identity(mean)", takes="nchw"):
    """An old file for one image: its first channel's mean multiplies the scores. Its tensors are inputs too, as some have."""
    kind, as_images, dtype = TAKES[takes]
    stored = {"weight": np.asarray([1, 0, 0], dtype).reshape(1, 3, 1, 1), "flat": np.asarray([batch, 1, 1])}
    lines = [
        as_images,
        "convolved = Conv(images, weight)",
        "first = Cast<to = 1>(convolved)",
        "wide_mean = ReduceMean<axes = [2, 3], keepdims = 1>(first)",
        "mean = Reshape(wide_mean, flat)",
        extra,
    ]
    outputs = []
    for index, (table, columns) in enumerate(zip(tables, scores, strict=True)):
        mask = np.zeros_like(table)
        (mask.T if table.shape[0] < table.shape[1] and table.shape[1] == 16 else mask)[:, columns] = 1
        stored |= {f"still_{index}": (table * (1 - mask))[None], f"score_{index}": (table * mask)[None]}
        stored[f"shape_{index}"] = np.asarray([batch, *table.shape])
        lines += [f"bright_{index} = Mul(score_{index}, steady)", f"all_{index} = Add(bright_{index}, still_{index})"]
        lines.append(f"out_{index} = Reshape(all_{index}, shape_{index})")
        outputs.append(f"float[{batch}, {', '.join(map(str, table.shape))}] out_{index}")
    body, given = "\n".join(lines), f"{kind.format(batch=batch)} given"
    text = f'<ir_version: 6, opset_import: ["" : {opset}]>\nforeign ({given}) => ({", ".join(outputs)}) {{\n{body}\n}}'
    model = onnx.parser.parse_model(text)
    for name, value in stored.items():
        tensor = numpy_helper.from_array(value, name)
        model.graph.initializer.append(tensor)
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    onnx.helper.set_model_props(model, {"license": "MIT"})
    onnx.save(model, path)
    return path


def settings(file, digits, of, **changes):
    """Those of a layout by its name `of`, but for some."""
    return {
        "model": str(file),
        "classes": list(digits.classes),
        "input": INPUT,
        "layout": {"name": of, **LAYOUTS[of][0]},
        "activation": "none",
        "nms": "host",
        "parity_images": 4,
        "score_threshold": 0.05,
        **changes,
    }


@pytest.fixture
def foreign(tmp_path):
    """A function that writes the file of a layout."""

    def write(layout, **changes):
        _, tables, scores = LAYOUTS[layout]
        return write_foreign(tmp_path / f"{layout}.onnx", tables(), scores, **changes)

    return write


@pytest.fixture(scope="module")
def columns(make, tmp_path_factory, digits):
    """The file of one layout, adapted."""
    folder = tmp_path_factory.mktemp("columns")
    file = write_foreign(folder / "columns.onnx", column_table(), LAYOUTS["columns"][2])
    return make(folder, "adapted", external, settings(file, digits, "columns"), data=digits)


def ours():
    """The text of one of the layouts."""
    return Path(lookup.module("stages.exporting.layouts", "columns").__file__).read_text()


def first_image(digits):
    return CocoSplit(digits.folder("val"), digits.annotations("val")).files[0]


def gain(digits):
    """What the scores are multiplied by in the first image: the mean of its blue, prepared as the settings say."""
    pixels, _ = ImageSpec(64, 64, (10, 20, 30), "centre").prepare(decode(first_image(digits)))
    return ((pixels[..., 2].astype(float) / 255 - 0.1) / 1.1).mean()


def test_a_new_layout_is_tried_here():
    assert set(lookup.names("stages.exporting.layouts")) == set(LAYOUTS), "say in LAYOUTS how the new layout is tried"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_finds_what_is_there(make, tmp_path, digits, foreign, layout):
    made = make(tmp_path, "adapted", external, settings(foreign(layout), digits, layout), data=digits)
    with Predictor.open(made.path(made.file)) as predictor:
        (found,) = predictor([first_image(digits)])
    np.testing.assert_allclose(found.boxes_xyxy, [2 * np.asarray(box) for box, _, _ in FOUND], atol=1e-3)
    np.testing.assert_allclose(found.scores, [score * gain(digits) for _, score, _ in FOUND], rtol=1e-4)
    assert found.labels.tolist() == [label for _, _, label in FOUND]
    assert made.parity.passed
    assert made.parity.images == 4
    assert made.parity.matched >= 4


@pytest.mark.parametrize(("takes", "precision"), [("nhwc", "fp32"), ("half", "fp16")])
def test_other_axes_and_half_precision(make, tmp_path, digits, foreign, takes, precision):
    config = settings(foreign("columns", takes=takes), digits, "columns")
    config["input"] = INPUT | {"layout": "nhwc" if takes == "nhwc" else "nchw"}
    made = make(tmp_path, "adapted", external, config, data=digits)
    assert made.precision == precision
    assert made.parity.passed
    with Predictor.open(made.path(made.file)) as predictor:
        (found,) = predictor([first_image(digits)])
    np.testing.assert_allclose(found.boxes_xyxy, [2 * np.asarray(box) for box, _, _ in FOUND], atol=1e-3)
    rtol = 1e-4 if precision == "fp32" else 2e-3
    np.testing.assert_allclose(found.scores, [score * gain(digits) for _, score, _ in FOUND], rtol=rtol)


@pytest.mark.parametrize(
    "backend",
    [{"name": "openvino"}, {"name": "tensorrt_rtx", "compute_capabilities": ["8.6"]}],
    ids=lambda b: b["name"],
)
def test_engines_are_built_from_it(make, tmp_path, digits, columns, backend):
    package = backend["name"]
    pytest.importorskip(
        package, reason=f"{package} is not installed; pip install 'headstart[{package.replace('_', '-')}]'"
    )
    engine = make(
        tmp_path, "engine", build_engine, {"backend": backend, "parity_images": 3}, model=columns, data=digits
    )
    assert engine.contract == columns.contract
    assert engine.foreign == columns.foreign
    assert engine.census["verdict"]
    assert engine.executed == (package == "openvino")
    assert engine.parity is None if not engine.executed else engine.parity.passed


def test_it_is_recorded_as_what_it_is(columns):
    assert (columns.foreign.file, columns.foreign.licence) == ("columns.onnx", "MIT")
    assert columns.parity.reference == "columns.onnx decoded in numpy"
    assert (columns.precision, columns.source, columns.candidates) == ("fp32", "", 160)
    # Of the weight and the two tables; the rest are shapes.
    assert columns.parameters == 3 + 2 * 16 * 14
    assert columns.initialisers == 3
    assert columns.flops == 2 * 64 * 64 * 3
    assert columns.contract["image"] == {"height": 64, "width": 64, "pad_rgb": [10, 20, 30], "fit": "centre"}


def test_a_batch_of_one_becomes_any_where_the_file_allows(columns, digits):
    images = CocoSplit(digits.folder("val"), digits.annotations("val")).files[:3]
    assert "one_by_one" not in columns.contract
    with Predictor.open(columns.path(columns.file)) as predictor:
        together, alone = list(predictor(images)), [predictor([image])[0] for image in images]
    assert [found.scores.tolist() for found in together] == [found.scores.tolist() for found in alone]


def test_where_neighbours_change_an_image_it_is_called_for_each(make, tmp_path, digits, foreign):
    """Scaled by the largest value of a call, as eight bits that are made while it runs."""
    file = foreign("columns", extra="most = ReduceMax<keepdims = 0>(mean)\nsteady = Div(mean, most)")
    made = make(tmp_path, "adapted", external, settings(file, digits, "columns"), data=digits)
    assert made.contract["one_by_one"] is True
    session = onnxruntime.InferenceSession(str(made.path(made.file)), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[0] == 1
    images = CocoSplit(digits.folder("val"), digits.annotations("val")).files[:3]
    with Predictor.open(made.path(made.file)) as predictor:
        together, alone = predictor(images), [predictor([image])[0] for image in images]
    assert [found.scores.tolist() for found in together] == [found.scores.tolist() for found in alone]


def test_the_same_stages_take_it(make, tmp_path, digits, columns):
    """Measured, timed and bundled as our own exports are."""
    accuracy = make(tmp_path, "accuracy", validate, {}, data=digits, checkpoints=[], models=[columns])
    (row,) = accuracy.rows
    assert row.crosschecked
    latency = make(tmp_path, "latency", benchmark, {"iterations": 3, "images": 2}, data=digits, models=[columns])
    bundle = make(
        tmp_path,
        "bundle",
        release,
        {"sample": True},
        data=digits,
        models=[columns],
        accuracy=[accuracy],
        latency=[latency],
        reports=[],
    )
    card = (bundle.path("bundle") / "README.md").read_text()
    assert "placed centre" in card
    assert "columns.onnx" in card
    assert "MIT" in card
    told = json.loads((bundle.path("bundle") / "release.json").read_text())
    assert told["sample"]["start"] == [0, 0]


def test_nms_can_be_put_into_it(make, tmp_path, digits, foreign):
    config = settings(foreign("columns"), digits, "columns", nms="graph")
    made = make(tmp_path, "adapted", external, config, data=digits)
    assert made.contract["nms"] == "graph"
    assert "NMS in the graph keeps what the host's keeps" in made.parity.sentence


def test_classes_are_matched_by_name(make, tmp_path, digits, foreign):
    """The model has them in another order, calls one otherwise and does not know another."""
    names = list(digits.classes)
    theirs = [f"number {names[2]}" if name == names[2] else name for name in names if name != names[7]]
    theirs = [*reversed(theirs), "something else"]
    config = settings(foreign("columns"), digits, "columns", classes=theirs)
    with pytest.raises(UserError, match=rf"the model knows no {names[2]}, {names[7]}; say what it calls them"):
        make(tmp_path, "refused", external, config, data=digits)
    config |= {"rename": {names[2]: f"number {names[2]}"}, "unknown": "ignore"}
    made = make(tmp_path, "adapted", external, config, data=digits)
    assert made.foreign.unknown_classes == (names[7],)
    with Predictor.open(made.path(made.file)) as predictor:
        (found,) = predictor([first_image(digits)])
    # Its second and seventh class, in its order.
    assert [digits.classes[label] for label in found.labels] == [theirs[2], theirs[7]]
    assert names[7] not in {digits.classes[label] for label in found.labels}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "sigmoid"}, "as sigmoid makes them of what are probabilities already; set activation: none"),
        ({"layout": {"name": "columns", "box": "xyxy"}}, "lie outside of the input of 64x64 or have no size"),
        ({"layout": {"name": "columns", "unit": True}}, "lie outside of the input"),
        ({"input": {**INPUT, "mean": [-9, 0, 0]}}, "are no probabilities; set activation: sigmoid or softmax"),
        ({"input": {**INPUT, "mean": [0.99, 0, 0]}}, "are no probabilities"),
        ({"input": {**INPUT, "divide_by": 1e6, "mean": [0, 0, 0]}}, "no score is above 0.01 in any image"),
        ({"layout": "grid"}, "layout grid wants one tensor with 15 columns"),
        ({"layout": {"name": "columns", "outputs": ["out_9"]}}, "has no output out_9; it has out_0"),
        ({"classes": ["a", "b"]}, "layout columns wants one tensor with 6 columns, for 2 classes"),
        ({"input": {**INPUT, "layout": "nhwc"}}, "give another input.layout"),
        ({"input": {**INPUT, "size": [32, 32]}}, "input.size is .32, 32.; leave it out"),
    ],
)
def test_a_wrong_description_is_told(make, tmp_path, digits, foreign, changes, message):
    with pytest.raises(UserError, match=message):
        make(tmp_path, "adapted", external, settings(foreign("columns"), digits, "columns", **changes), data=digits)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_zeros_of_other_classes_are_not_activated(digits, foreign, activation):
    """Each row would become a detection of every other class, with a score of a half."""
    config = external.Config(**settings(foreign("rows"), digits, "rows", activation=activation))
    (problem,) = external.check(config, {})
    assert problem.startswith(f"activation: {activation}, but rows.onnx gives one score a box")


def test_two_classes_are_not_one_of_the_models(make, tmp_path, digits, foreign):
    one, other = digits.classes[2], digits.classes[7]
    config = settings(foreign("columns"), digits, "columns", rename={other: one})
    with pytest.raises(UserError, match=rf"{one}, {other} would all be the model's {one}; make them one class"):
        make(tmp_path, "adapted", external, config, data=digits)


def test_it_is_told_before_anything_runs(digits, foreign, tmp_path):
    config = external.Config(**settings(foreign("columns"), digits, "rows"))
    (problem,) = external.check(config, {})
    assert problem.startswith("layout rows wants one tensor with 6 columns")
    (tmp_path / "no.onnx").write_bytes(b"nothing")
    (problem,) = external.check(external.Config(**settings(tmp_path / "no.onnx", digits, "rows")), {})
    assert "is not a valid ONNX file" in problem


def test_what_a_user_writes_is_a_layout(make, tmp_path, digits, foreign):
    """By its path, and no less than ours."""
    (tmp_path / "mine.py").write_text(ours())
    config = settings(foreign("columns"), digits, "columns", layout={"name": str(tmp_path / "mine.py")})
    assert make(tmp_path, "adapted", external, config, data=digits).parity.passed


def test_a_layout_whose_two_halves_differ_fails(make, tmp_path, digits, foreign):
    (tmp_path / "mine.py").write_text(
        ours().replace("return Decoded(boxes_BN4, rows", "return Decoded(boxes_BN4 + 2, rows")
    )
    config = settings(foreign("columns"), digits, "columns", layout={"name": str(tmp_path / "mine.py")})
    with pytest.raises(VerdictError, match=r"does not detect what columns\.onnx does: differs"):
        make(tmp_path, "adapted", external, config, data=digits)


def test_int8_of_it_is_calibrated_on_images_as_it_wants_them(make, tmp_path, digits, columns):
    config = {"images": 4, "held_out": 8, "sensitivity_images": 2, "max_ap_drop": 1.0}
    made = make(tmp_path, "int8", quantize, config, model=columns, data=digits)
    assert made.precision == "int8"
    assert made.foreign == columns.foreign
    assert [layer.layer for layer in made.quantisation.layers] == ["weight"]


def test_only_the_best_class_of_a_box(make, tmp_path, digits):
    table = column_table()[0]
    table[4, CELLS[0]] = 0.6  # the first object looks like another class too
    file = write_foreign(tmp_path / "two.onnx", [table], LAYOUTS["columns"][2])
    found = {}
    for per_box in ("every", "best"):
        config = settings(file, digits, "columns", per_box=per_box)
        made = make(tmp_path, per_box, external, config, data=digits)
        with Predictor.open(made.path(made.file)) as predictor:
            found[per_box] = len(predictor([first_image(digits)])[0])
    assert found == {"every": 3, "best": 2}


def test_detections_of_a_centred_image_are_clipped_to_it(columns):
    spec = ImageSpec(64, 64, (0, 0, 0), "centre")
    placement = spec.placement(32, 64)  # rows 16 to 48
    assert placement.start == (16, 0)
    with Predictor.open(columns.path(columns.file)) as predictor:
        found = predictor.infer(np.full((1, 64, 64, 3), 200, np.uint8))
        boxes = detect(found, predictor.contract, placement).boxes_xyxy
    np.testing.assert_allclose(boxes, [[24, 4, 40, 12], [0, 24, 16, 32]], atol=1e-4)


def test_the_config_of_the_how_to_is_whole(tmp_path, monkeypatch, digits):
    text = (Path(__file__).parents[2] / "docs" / "how-to.md").read_text().replace("\r", "")
    (config,) = [
        part.partition("```")[0] for part in text.split("```yaml\n") if "uses: external" in part.partition("```")[0]
    ]
    (tmp_path / "config.yaml").write_text(config)
    (tmp_path / "weights").mkdir()
    table = np.zeros((64 + 16 + 4, 85), np.float32)
    write_foreign(tmp_path / "weights" / "yolox_nano.onnx", [table], [slice(4, 5)])
    for folder in ("images", "annotations"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for name in ("train", "val"):
        (tmp_path / "data" / "annotations" / f"{name}.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    nodes = graph.load(tmp_path / "config.yaml", (), "stages").nodes
    assert {node.uses for node in nodes} == {"dataset", "external", "validate", "benchmark", "report", "release"}


def test_flops_are_those_of_products_and_convolutions(foreign):
    assert graph_flops(cleaned(foreign("columns"))) == 2 * 64 * 64 * 3
