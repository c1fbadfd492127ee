"""From an exported RetinaNet to engines: executed by OpenVINO on the CPU, built by TensorRT-RTX for GPUs that are not
here."""

import hashlib
import json
import shutil
import subprocess
from dataclasses import dataclass

import onnx as onnx_package
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from deploy import sidecar
from deploy.backend import backend_class
from deploy.contract import Contract
from deploy.predictor import Predictor
from pipeline.errors import UserError, VerdictError, Waiting
from pipeline.stage import NodeView
from stages import benchmark, build_engine, export, quantize, release, train, validate
from stages.artifacts.exported_model import ExportedModel
from stages.data.coco import CocoSplit
from stages.evaluation.report.chain import chains, hops
from stages.evaluation.report.evidence import Evidence, Roles
from stages.evaluation.report.sections.audit import proofs

TRAINING = {"steps": 3, "batch_size": 4, "device": "cpu", "optimizer": {"name": "adamw", "lr": 1e-3, "warmup": 1}}
GPUS = ("7.5", "8.6", "12.0")


def needs(name):
    """Skip where the package that builds is not installed."""
    pytest.importorskip(name, reason=f"{name} is not installed; pip install 'headstart[{name.replace('_', '-')}]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def student(make, folder, digits, student_settings):
    return make(folder, "student", train, {"detector": student_settings, **TRAINING}, data=digits)


@pytest.fixture(scope="module")
def onnx(make, folder, digits, student):
    config = {"score_threshold": 0.001, "parity_images": 4}
    return make(folder, "onnx", export, config, checkpoint=student, data=digits)


@pytest.fixture(scope="module")
def engine(make, folder, digits, onnx):
    """Built and executed by OpenVINO."""
    needs("openvino")
    return make(
        folder, "engine", build_engine, {"backend": {"name": "openvino"}, "parity_images": 6}, model=onnx, data=digits
    )


def test_the_engine_is_proven_on_images_and_counted(engine, onnx):
    assert (engine.backend, engine.source, engine.executed) == ("openvino", "onnx-key", True)
    assert engine.parity.passed
    assert engine.parity.matched > 0
    assert engine.parity.reference == "onnx"
    assert engine.census["verdict"]
    assert {one["precision"] for one in engine.census["built"] if one["kind"] == "convolution"} == {"fp32"}
    assert engine.contract == onnx.contract
    assert engine.sha256 == sidecar.read(engine.path(engine.file), "openvino").engine_sha256 != onnx.sha256


@pytest.fixture(scope="module")
def accuracy(make, folder, digits, student, onnx, engine):
    return make(folder, "accuracy", validate, {}, data=digits, checkpoints=[student], models=[onnx, engine])


@pytest.fixture(scope="module")
def latency(make, folder, digits, engine):
    return make(folder, "latency", benchmark, {"iterations": 3, "threads": 1}, data=digits, models=[engine])


def test_each_model_is_measured_by_its_own_backend(accuracy, latency, engine):
    assert [row.runtime["runtime"] for row in accuracy.rows] == ["torch", "onnxruntime", "openvino"]
    _, of_file, of_engine = accuracy.rows
    assert of_engine.statistics == pytest.approx(of_file.statistics, abs=2e-3)
    (timed,) = latency.rows
    assert (timed.runtime["runtime"], timed.sha256, timed.threads) == ("openvino", engine.sha256, 1)


def test_the_engine_is_a_hop_of_the_chain(digits, student, onnx, engine, accuracy, latency):
    roles = Roles("teacher", "student", "control", "control_equal_time")
    evidence = Evidence(digits, [accuracy], [latency], [student], [onnx, engine], roles)
    (chain,) = chains(evidence)
    assert [row.name for row in chain] == ["student", "onnx", "engine"]
    assert [(hop.source, hop.target, hop.kind) for hop in hops(chain, evidence)] == [
        ("student", "onnx", "loss"),
        ("onnx", "engine", "loss"),
    ]
    (sentence,) = [one for one in proofs(evidence).sentences if one.startswith("engine engine (openvino)")]
    assert "the runtime built" in sentence
    assert "compared with onnx on 6 validation images" in sentence


def test_an_engine_that_detects_something_else_fails(make, tmp_path, digits, onnx):
    needs("openvino")
    config = {"backend": {"name": "openvino"}, "parity_box_px": 1e-12, "parity_score": 1e-12}
    with pytest.raises(VerdictError, match=r"the engine does not detect what model\.onnx detects"):
        make(tmp_path, "engine", build_engine, config, model=onnx, data=digits)


def test_in_bf16_parity_is_recorded_and_ap_decides(make, tmp_path, digits, onnx):
    needs("openvino")
    config = {"backend": {"name": "openvino", "precision": "bf16"}, "parity_images": 4}
    try:
        made = make(tmp_path, "engine", build_engine, config, model=onnx, data=digits)
    except UserError as problem:
        if "would compute in" not in str(problem):
            raise
        pytest.skip(str(problem))  # a CPU without bfloat16
    assert made.precision == "bf16"
    assert made.parity.matched > 0


def test_an_engine_that_cannot_run_here_is_built_and_says_so(make, tmp_path, digits, onnx):
    needs("tensorrt_rtx")
    if not (problem := backend_class("tensorrt_rtx").obstacle({})):
        pytest.skip("this machine has a GPU")
    backend = {"name": "tensorrt_rtx", "compute_capabilities": GPUS}
    made = make(tmp_path, "rtx", build_engine, {"backend": backend}, model=onnx, data=digits)
    assert made.made_for["compute_capabilities"] == list(GPUS)
    assert (made.executed, made.parity, made.not_executed) == (False, None, problem)
    assert made.census["built"] is None
    message = "rtx cannot be executed here: cuda: .*or give the stage a target"
    with pytest.raises(UserError, match=f"validate: {message}"):
        make(tmp_path, "accuracy", validate, {}, data=digits, checkpoints=[], models=[onnx, made])
    with pytest.raises(UserError, match=f"benchmark: {message}"):
        make(tmp_path, "latency", benchmark, {}, data=digits, models=[made])
    with pytest.raises(UserError, match="release: no AP was measured on rtx"):  # a target may have measured it
        make(tmp_path, "bundle", release, {}, data=digits, models=[made], accuracy=[], latency=[], reports=[])
    half = {"backend": {**backend, "precision": "fp16"}}
    with pytest.raises(UserError, match="the ONNX is fp32; export it with precision fp16"):
        make(tmp_path, "half", build_engine, half, model=onnx, data=digits)
    assert list((tmp_path / "half").iterdir()) == []


def test_rtx_refuses_nms_in_the_graph(make, tmp_path, digits, student):
    needs("tensorrt_rtx")
    inside = make(tmp_path, "inside", export, {"nms": "graph", "parity_images": 2}, checkpoint=student, data=digits)
    backend = {"name": "tensorrt_rtx", "compute_capabilities": GPUS}
    with pytest.raises(UserError, match="has nothing that does its NMS; export the model with nms: host"):
        make(tmp_path, "rtx", build_engine, {"backend": backend}, model=inside, data=digits)


class Images(CalibrationDataReader):
    """Some validation images, one by one: what the ranges are is of no interest here."""

    def __init__(self, file, paths):
        with Predictor.open(file) as predictor:
            images = [predictor.prepare([predictor.decode(path)])[0] for path in paths]
        self.remaining = iter([{"images": image} for image in images])

    def get_next(self):
        return next(self.remaining, None)


def halve(model):
    """Each convolution in fp16 between two casts."""
    graph, nodes, weights = model.graph, [], set()
    for node in graph.node:
        if node.op_type != "Conv":
            nodes.append(node)
            continue
        (given, *parameters), (found,) = list(node.input), node.output
        weights |= set(parameters)
        half, output = f"{node.name}_input", f"{node.name}_output"
        node.input[0], node.output[0] = half, output
        nodes.append(helper.make_node("Cast", [given], [half], name=half, to=TensorProto.FLOAT16))
        nodes += [node, helper.make_node("Cast", [output], [found], name=output, to=TensorProto.FLOAT)]
    for tensor in graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float16"), tensor.name))
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)


def lowered(onnx, digits, file, precision):
    """The exported file in fp16, or quantised by ONNX Runtime as TensorRT wants it."""
    source = onnx.path(onnx.file)
    model = onnx_package.load(source)
    if precision == "fp16":
        halve(model)
        onnx_package.save(model, file)
    else:
        signed = precision == "int8"
        quantize_static(
            source,
            file,
            Images(source, CocoSplit(digits.folder("val"), digits.annotations("val")).files[:2]),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            op_types_to_quantize=["Conv"],
            activation_type=QuantType.QInt8 if signed else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={
                "ActivationSymmetric": signed,
                "WeightSymmetric": True,
                "AddQDQPairToWeight": True,
                "DedicatedQDQPair": True,
                "QuantizeBias": False,
            },
        )
    Contract.from_json(json.dumps(onnx.contract)).write_to_onnx(file)
    return onnx.model_copy(update={"file": file.name, "precision": precision}).placed(
        file.parent, name=precision, key=precision
    )


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_lower_precision_is_built_for_three_gpus(make, tmp_path, digits, onnx, precision):
    needs("tensorrt_rtx")
    model = lowered(onnx, digits, tmp_path / "lower.onnx", precision)
    backend = {"name": "tensorrt_rtx", "compute_capabilities": GPUS, "precision": precision}
    made = make(tmp_path, "rtx", build_engine, {"backend": backend, "parity_images": 2}, model=model, data=digits)
    assert made.precision == precision
    assert made.census["verdict"]
    convolutions = [one["precision"] for one in made.census["requested"] if one["kind"] == "convolution"]
    assert set(convolutions) == {precision}
    with pytest.raises(UserError, match=f"the ONNX is {precision}; export it with precision fp32"):
        make(tmp_path, "fp32", build_engine, {"backend": {**backend, "precision": "fp32"}}, model=model, data=digits)


def test_uint8_activations_are_refused_by_tensorrt_and_computed_by_openvino(make, tmp_path, digits, onnx):
    needs("tensorrt_rtx")
    model = lowered(onnx, digits, tmp_path / "lower.onnx", "uint8")
    backend = {"name": "tensorrt_rtx", "compute_capabilities": GPUS, "precision": "int8"}
    with pytest.raises(UserError, match=r"quantisers are uint8, such as .*; quantise the model for TensorRT"):
        make(tmp_path, "rtx", build_engine, {"backend": backend}, model=model, data=digits)
    needs("openvino")
    config = {"backend": {"name": "openvino", "precision": "int8"}, "parity_images": 4}
    made = make(tmp_path, "openvino", build_engine, config, model=model, data=digits)
    built = [one["precision"] for one in made.census["built"] if one["kind"] == "convolution"]
    assert built.count("int8") > 0.5 * len(built)
    assert made.parity.matched > 0


@pytest.fixture(scope="module")
def there(folder, digits, onnx, bare_python):
    """Built by OpenVINO and executed by whoever carries folders, without any package of ours or torch."""
    needs("openvino")
    config, work = build_engine.Config(backend={"name": "openvino"}, parity_images=4), folder / "work"
    command = build_engine.work(config, work, model=onnx, data=digits)
    with pytest.raises(Waiting):
        build_engine.take(config, folder, work, "box", model=onnx, data=digits)
    ran = subprocess.run([bare_python, *command], cwd=work, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return config, work


def test_an_engine_built_on_a_target_is_compared_here(tmp_path, digits, onnx, there):
    config, work = there
    made, device = build_engine.take(config, tmp_path, work, "box", model=onnx, data=digits)
    made = made.placed(tmp_path, name="engine", key="engine-key")
    assert device["name"]
    assert (made.executed, made.source, made.census["verdict"]) == (True, onnx.key, True)
    assert made.parity.passed
    assert (made.parity.reference, made.parity.images) == ("onnx", 4)
    assert made.parity.matched > 0
    assert sidecar.read(made.path(made.file), "openvino").engine_sha256 == made.sha256


@pytest.fixture
def changed(tmp_path, there):
    """The work with one file of the result changed by a function of its bytes, and the new hash in its record."""

    def change(name, how):
        config, work = there
        copy = shutil.copytree(work, tmp_path / "copy")
        file, record = copy / "results/onnx" / name, copy / "results/onnx/result.json"
        content = how(file.read_bytes())
        file.write_bytes(content)
        told = json.loads(record.read_text())
        told["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        record.write_text(json.dumps(told))
        return config, copy

    return change


def test_another_engine_than_its_sidecar_says_is_refused(tmp_path, digits, onnx, changed):
    config, work = changed("model.blob", lambda content: content[::-1])
    with pytest.raises(UserError, match=r"model\.blob is not the engine that its sidecar describes"):
        build_engine.take(config, tmp_path, work, "box", model=onnx, data=digits)


def test_an_engine_that_detects_something_else_there_fails(tmp_path, digits, onnx, changed):
    def shifted(content):
        found = json.loads(content)
        for one in found["after"][0]:
            one["score"] += 0.05
        return json.dumps(found).encode()

    config, work = changed("detections.json", shifted)
    with pytest.raises(VerdictError, match=r"the engine does not detect what model\.onnx detects"):
        build_engine.take(config, tmp_path, work, "box", model=onnx, data=digits)


@dataclass(frozen=True)
class Planned(NodeView):
    """A stage of a plan, and the one that feeds it."""

    name: str
    uses: str
    config: object
    behind: tuple = ()
    produces: type = ExportedModel

    def feeding(self, slot):
        return self.behind


EXPORTED = Planned("onnx", "export", export.Config())
HALF = Planned("half", "export", export.Config(precision="fp16"))
SUPPRESSED = Planned("suppressed", "export", export.Config(nms="graph"))
UNSIGNED = Planned("int8", "quantize", quantize.Config(), behind=(EXPORTED,))
SIGNED = Planned("int8", "quantize", quantize.Config(runtime="tensorrt"), behind=(EXPORTED,))


@pytest.mark.parametrize(
    ("backend", "given", "problems"),
    [
        ({"name": "tensorrt"}, EXPORTED, []),
        ({"name": "tensorrt"}, SUPPRESSED, []),
        ({"name": "tensorrt", "precision": "fp16"}, HALF, []),
        ({"name": "tensorrt", "precision": "int8"}, SIGNED, []),
        ({"name": "openvino", "precision": "int8"}, UNSIGNED, []),
        ({"name": "openvino", "precision": "bf16"}, EXPORTED, []),
        ({"name": "tensorrt", "precision": "fp16"}, EXPORTED, ["fp16, and stage onnx gives a file in fp32, which no"]),
        ({"name": "openvino", "precision": "int8"}, EXPORTED, ["int8, and stage onnx gives a file in fp32"]),
        ({"name": "openvino"}, UNSIGNED, ["fp32, and stage int8 gives a file in int8"]),
        ({"name": "tensorrt_rtx", "precision": "int8"}, UNSIGNED, ["set runtime: tensorrt in stage int8"]),
        ({"name": "tensorrt_rtx"}, SUPPRESSED, ["the NMS in the file of stage suppressed; export one with nms: host"]),
        ({"name": "tensorrt"}, Planned("own", "mine.py", export.Config()), []),
    ],
)
def test_a_file_that_cannot_be_built_is_told_before_anything_runs(backend, given, problems):
    found = list(build_engine.check(build_engine.Config(backend=backend), {"model": (given,)}))
    assert len(found) == len(problems)
    assert all(part in problem for part, problem in zip(problems, found, strict=True))


def test_what_is_not_float32_is_not_quantised():
    assert list(quantize.check(quantize.Config(), {"model": (EXPORTED,)})) == []
    (problem,) = quantize.check(quantize.Config(), {"model": (Planned("engine", "build_engine", None),)})
    assert "stage engine gives an engine; give the file that it is built from" in problem
    for node in (HALF, SIGNED):
        (problem,) = quantize.check(quantize.Config(), {"model": (node,)})
        assert f"stage {node.name} gives a file in" in problem


@pytest.mark.parametrize(
    ("name", "message"),
    [("onnxruntime", "takes the ONNX file as it is"), ("tensorrt_rxt", "is no backend; did you mean 'tensorrt_rtx'")],
)
def test_who_builds_nothing_is_told_before_anything_runs(name, message):
    (problem,) = build_engine.check(build_engine.Config(backend={"name": name}), {})
    assert message in problem


def test_the_key_knows_what_the_engine_is_for():
    needs("tensorrt_rtx")
    backend = {"name": "tensorrt_rtx", "compute_capabilities": GPUS}
    assert build_engine.identity(build_engine.Config(backend=backend))["compute_capabilities"] == list(GPUS)


def test_a_runtime_that_is_not_here_is_a_users_error():
    if backend_class("tensorrt").obstacle({}) is None:
        pytest.skip("this machine has TensorRT")
    with pytest.raises(UserError, match=r"build_engine: .*; or give the stage a target"):
        build_engine.identity(build_engine.Config(backend={"name": "tensorrt"}))


def test_settings_of_another_backend_are_told_before_anything_runs():
    config = build_engine.Config(backend={"name": "openvino", "batch": (1, 1, 8), "workspace_mb": 512})
    (problem,) = build_engine.check(config, {})
    assert problem == "backend: openvino has no setting batch, workspace_mb; it knows precision"
