"""nvinfer's file is read back by configparser, its ONNX file runs and finds what the bundle's does. DeepStream itself has
never loaded either.
"""

import configparser

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, load, save

from deploy.__main__ import main
from deploy.bundle import Bundle
from deploy.deepstream import config, write_planes
from deploy.deepstream import write as write_deepstream
from deploy.errors import DeployError
from deploy.image import ImageSpec
from deploy.release import write


@pytest.fixture
def folder(bundle, tmp_path):
    assert main(["convert", str(bundle), str(tmp_path / "out"), "--to", "deepstream", "--max-batch", "2"]) == 0
    return tmp_path / "out"


def test_the_configuration_says_what_the_contract_does(folder, contract):
    read = configparser.ConfigParser(interpolation=None, strict=True)
    read.read_string((folder / "config_infer.txt").read_text())
    found = read["property"]
    assert (found["onnx-file"], found["batch-size"], found["num-detected-classes"]) == ("model_planes.onnx", "2", "2")
    assert (found["infer-dims"], found["net-scale-factor"], found["model-color-format"]) == ("3;64;64", "1", "0")
    assert (found["maintain-aspect-ratio"], found["symmetric-padding"], found["cluster-mode"]) == ("1", "0", "2")
    assert found["output-blob-names"] == "boxes;scores;labels"
    limits = read["class-attrs-all"]
    assert float(limits["pre-cluster-threshold"]) == contract.score_threshold
    assert float(limits["nms-iou-threshold"]) == contract.nms_iou
    assert (folder / "labels.txt").read_text() == "cat\ndog\n"


def test_the_readme_says_what_lacks(folder):
    text = (folder / "README.md").read_text()
    for part in ("You must supply `libnvdsinfer_headstart.so`", "never loaded by DeepStream", "AP is another"):
        assert part in text.replace("\n", " ").replace("was ever loaded", "never loaded")
    assert "{" not in text


def test_a_graph_that_asks_for_its_batch_too_is_taken(model, tmp_path):
    """As exported ones do; the shape it is told must stay that of the images as they were."""
    written = load(model)
    written.graph.node.insert(0, helper.make_node("Shape", ["images"], ["shape"]))
    written.graph.output.append(helper.make_tensor_value_info("shape", TensorProto.INT64, [4]))
    save(written, model)
    write_planes(model, tmp_path / "planes.onnx", "images", "labels")
    session = onnxruntime.InferenceSession(str(tmp_path / "planes.onnx"), providers=["CPUExecutionProvider"])
    (shape,) = session.run(["shape"], {"images": np.zeros((2, 3, 64, 64), np.float32)})
    assert shape.tolist() == [2, 64, 64, 3]


def test_uint8_is_refused(new_convolution, tmp_path):
    with pytest.raises(DeployError, match=r"2 quantisers are uint8.*TensorRT would read them as int8"):
        write_planes(new_convolution("uint8"), tmp_path / "planes.onnx", "images", "labels")
    assert not (tmp_path / "planes.onnx").exists()


def test_planes_of_floats_give_what_the_bundle_gives(folder, model):
    rng = np.random.default_rng(0)
    images_BHWC = rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    ours = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    theirs = onnxruntime.InferenceSession(str(folder / "model_planes.onnx"), providers=["CPUExecutionProvider"])
    (taken,) = theirs.get_inputs()
    assert (taken.name, taken.type, taken.shape[1:]) == ("images", "tensor(float)", [3, 64, 64])
    planes_BCHW = np.ascontiguousarray(images_BHWC.transpose(0, 3, 1, 2)).astype(np.float32)
    wanted, found = ours.run(None, {"images": images_BHWC}), theirs.run(None, {"images": planes_BCHW})
    for a, b in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(a, b)
    assert found[2].dtype == np.int32
    # Its input is another, so no runtime of ours may take it for one of ours.
    assert "headstart.contract" not in theirs.get_modelmeta().custom_metadata_map


@pytest.mark.parametrize(("fit", "said"), [("centre", ("1", "1")), ("stretch", ("0", "0"))])
def test_other_placements_are_told(tmp_path, new_model, new_contract, entry, release, fit, said):
    contract = new_contract(image=ImageSpec(64, 64, (0, 0, 0), fit), one_by_one=True)
    made = write(tmp_path / "b", [entry(new_model(tmp_path / "m.onnx", contract), contract=contract)], release, "c")
    written = config(made.models[0], 1)["property"]
    assert (written["maintain-aspect-ratio"], written["symmetric-padding"]) == said
    with pytest.raises(DeployError, match="--max-batch must be 1, given 2"):
        write_deepstream(made, made.models[0], tmp_path / "out", 2)


def test_a_graph_that_begins_otherwise_is_refused(tmp_path):
    images = helper.make_tensor_value_info("images", 2, ["b", 4, 4, 3])
    out = helper.make_tensor_value_info("out", 2, ["b", 3, 4, 4])
    node = helper.make_node("Transpose", ["images"], ["out"], perm=[0, 3, 1, 2])
    save(helper.make_model(helper.make_graph([node], "g", [images], [out])), tmp_path / "m.onnx")
    with pytest.raises(DeployError, match=r"casts images .* first is wanted, this one begins with Transpose"):
        write_planes(tmp_path / "m.onnx", tmp_path / "out.onnx", "images", "out")


def test_what_nvinfer_cannot_is_refused(tmp_path, model, new_model, new_contract, entry, release):
    engine = tmp_path / "x.engine"
    engine.write_bytes(b"plan")
    contract = new_contract(class_agnostic_nms=True)
    across = entry(new_model(tmp_path / "a.onnx", contract), file="across.onnx", contract=contract)
    made = write(
        tmp_path / "b", [entry(model), entry(engine, file="x.engine", backend="tensorrt"), across], release, "c"
    )
    for name, message in (("x.engine", "is no ONNX file"), ("across.onnx", "suppresses within a class alone")):
        with pytest.raises(DeployError, match=message):
            write_deepstream(made, made.model(name), tmp_path / "out")
    with pytest.raises(DeployError, match="--max-batch"):
        write_deepstream(made, made.models[0], tmp_path / "out", 0)
    assert not list(tmp_path.glob("*out*"))


def test_an_existing_folder_is_left_alone(bundle, tmp_path):
    (tmp_path / "out").mkdir()
    opened = Bundle.open(bundle)
    with pytest.raises(DeployError, match="the folder exists"):
        write_deepstream(opened, opened.models[0], tmp_path / "out")
