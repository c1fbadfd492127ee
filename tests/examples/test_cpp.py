"""The C++ example: its NMS against ours wherever there is a compiler, and the whole of it where ONNX Runtime's headers are.

The library is that of the onnxruntime wheel, which has no headers; those are Debian 13's libonnxruntime-dev (or a release
of ONNX Runtime) and nlohmann-json3-dev, found where g++ looks or in CPLUS_INCLUDE_PATH.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from deploy.backend import Candidates
from deploy.contract import Contract
from deploy.digest import digest
from deploy.image import ImageSpec, Placement
from deploy.manifest import Model
from deploy.postprocess import detect
from deploy.predictor import Predictor
from deploy.release import Sample, write

CPP = Path(__file__).parents[2] / "examples" / "cpp"
COMPILE = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-O0", "-I/usr/include/onnxruntime", f"-I{CPP}"]
CHECK_NMS = """
#include <cstdio>
#include "nms.hpp"
#include "npy.hpp"

int main(int, char** arguments) {
  const std::string folder = arguments[1];
  const auto boxes = headstart::read_npy<float>(folder + "/boxes.npy");
  const auto scores = headstart::read_npy<float>(folder + "/scores.npy");
  const auto labels = headstart::read_npy<std::int64_t>(folder + "/labels.npy");
  const auto count = static_cast<std::size_t>(scores.shape.at(1));
  const headstart::Box content = {4, 3, 124, 93};
  for (std::int64_t image = 0; image < scores.shape.at(0); ++image)
    for (int kind = 0; kind < 3; ++kind) {
      const headstart::Limits limits = {0.3f, 0.5f, 50, kind != 2, kind == 1};
      for (const auto& one :
           headstart::detect(boxes.values.data() + 4 * count * image, scores.values.data() + count * image,
                             labels.values.data() + count * image, count, content, limits))
        std::printf("%d %d %a %a %a %a %a %d\\n", static_cast<int>(image), kind, one.box[0], one.box[1], one.box[2],
                    one.box[3], one.score, static_cast<int>(one.label));
    }
}
"""

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++; apt-get install g++")


def candidates(images, count=400):
    """Crowded boxes with equal scores among them, some that hang over the edges, some of no size, some not finite."""
    rng = np.random.default_rng(0)
    corner = rng.uniform(-20, 110, (images, count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0, 40, (images, count, 2))], 2).astype(np.float32)
    boxes[:, 5] = boxes[:, 5, [0, 1, 0, 1]]
    boxes[:, 6, 2] = np.nan
    scores = rng.uniform(0, 1, (images, count)).round(2).astype(np.float32)
    return Candidates(boxes, scores, rng.integers(0, 3, (images, count)))


def contract(**changes):
    spec = ImageSpec(96, 128, (0, 0, 0))
    return Contract(spec, ("a", "b", "c"), (1, 2, 3), 400, max_detections=50, **changes)


def test_nms_in_cpp_keeps_what_ours_keeps(tmp_path):
    found = candidates(6)
    for name, array in (("boxes", found.boxes_BN4), ("scores", found.scores_BN), ("labels", found.labels_BN)):
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "main.cpp").write_text(CHECK_NMS)
    program = tmp_path / "main"
    subprocess.run([*COMPILE, str(tmp_path / "main.cpp"), "-o", str(program)], check=True)
    printed = subprocess.run([program, tmp_path], capture_output=True, text=True, check=True).stdout
    theirs = {}
    for image, kind, *box, score, label in map(str.split, printed.splitlines()):
        row = (*map(float.fromhex, box), float.fromhex(score), int(label))
        theirs.setdefault((int(image), int(kind)), []).append(row)
    whole = Placement((90, 120), (90, 120), (3, 4))
    for image in range(6):
        for kind, rules in enumerate((contract(), contract(class_agnostic_nms=True), contract(nms="none"))):
            ours = detect(found.image(image), rules, whole)
            assert 10 < len(ours) <= 50
            rows = np.column_stack([whole.to_input(ours.boxes_xyxy), ours.scores, ours.labels])
            np.testing.assert_array_equal(np.asarray(theirs[image, kind]), rows)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The compiled example, and the environment in which it finds the wheel's library."""
    headers = "#include <onnxruntime_cxx_api.h>\n#include <nlohmann/json.hpp>\n"
    looked = subprocess.run(
        [*COMPILE, "-E", "-x", "c++", "-"], input=headers, capture_output=True, text=True, check=False
    )
    if looked.returncode:
        pytest.skip(
            "no headers of ONNX Runtime and nlohmann-json; apt-get install libonnxruntime-dev nlohmann-json3-dev "
            "(Debian 13), or name their folders in CPLUS_INCLUDE_PATH"
        )
    folder = tmp_path_factory.mktemp("cpp")
    (library,) = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).symlink_to(library)
    made = folder / "detect"
    subprocess.run([*COMPILE, str(CPP / "detect.cpp"), "-o", str(made), f"-L{folder}", "-lonnxruntime"], check=True)
    return lambda *words: subprocess.run(
        [made, *words], capture_output=True, text=True, check=False, env=os.environ | {"LD_LIBRARY_PATH": str(folder)}
    )


@pytest.fixture
def released(tmp_path):
    """A bundle with a sample whose image must be scaled and padded; the model finds 400 crowded boxes."""
    onnx = pytest.importorskip("onnx")
    found, rules = candidates(1), contract()
    clean = np.nan_to_num(found.boxes_BN4)
    constants = [
        onnx.numpy_helper.from_array(array, name)
        for name, array in (("boxes", clean), ("scores", found.scores_BN), ("labels", found.labels_BN))
    ]
    nodes = [onnx.helper.make_node("Constant", [], [one.name], value=one) for one in constants]
    outputs = [onnx.helper.make_tensor_value_info(one.name, one.data_type, one.dims) for one in constants]
    images = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["batch", 96, 128, 3])
    graph = onnx.helper.make_graph(nodes, "constant", [images], outputs)
    model = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), model)
    rules.write_to_onnx(model)
    image = tmp_path / "image.png"
    Image.new("RGB", (300, 180), "gray").save(image)
    with Predictor.open(model) as predictor:
        sample = Sample.take(image, {"model.onnx": predictor})
    entry = Model("model.onnx", digest(model)["sha256"], "onnxruntime", "fp32", rules)
    return write(tmp_path / "bundle", [(model, entry)], {"name": "x", "licence": "x", "provenance": {}}, "card", sample)


def test_the_example_finds_what_the_bundle_says(program, released):
    done = program(str(released.path))
    assert done.returncode == 0, done.stderr
    first, *rows = done.stdout.splitlines()
    assert first == "raw outputs: boxes within 0 px, scores within 0, labels equal: equal"
    wanted = json.loads((released.path / "sample" / "detections.json").read_text())
    assert len(wanted) == len(rows) == 50
    for row, one in zip(rows, wanted, strict=True):
        name, score, *box = row.split()
        assert name == one["class"]
        assert float(score) == pytest.approx(one["score"], abs=1e-5)
        assert list(map(float, box)) == pytest.approx(one["box_xyxy"], abs=2e-3)


def test_another_output_is_told(program, released):
    file = released.path / "sample" / "scores.npy"
    np.save(file, np.load(file) + np.float32(0.01))
    done = program(str(released.path))
    assert done.returncode == 3
    assert "DIFFERENT" in done.stdout
    np.save(file, np.load(file).astype(np.float64))
    done = program(str(released.path))
    assert done.returncode == 1
    assert "<f4 in C order is wanted" in done.stderr


def test_what_is_no_bundle_is_told(program, tmp_path):
    assert "give a bundle's folder" in program(str(tmp_path)).stderr
    assert "usage" in program().stderr
