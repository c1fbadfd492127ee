"""config.pbtxt is parsed by protobuf itself, against a message with the names and numbers that Triton's documentation
gives for the fields used. No server has ever loaded it.
"""

import dataclasses
import json

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from deploy.__main__ import main
from deploy.bundle import Bundle
from deploy.contract import METADATA_KEY, Contract
from deploy.errors import DeployError
from deploy.predictor import Predictor
from deploy.release import write
from deploy.sidecar import Sidecar, beside
from deploy.triton import write as write_triton

# Field: number, type, repeated. Of triton-inference-server/common, protobuf/model_config.proto.
MESSAGES = {
    "Input": {"name": (1, "string"), "data_type": (2, ".DataType"), "dims": (4, "int64*")},
    "Output": {"name": (1, "string"), "data_type": (2, ".DataType"), "dims": (3, "int64*")},
    "Batching": {"preferred_batch_size": (1, "int32*"), "max_queue_delay_microseconds": (2, "uint64")},
    "Parameter": {"string_value": (1, "string")},
    "Entry": {"key": (1, "string"), "value": (2, ".Parameter")},
    "ModelConfig": {
        "name": (1, "string"),
        "max_batch_size": (4, "int32"),
        "input": (5, ".Input*"),
        "output": (6, ".Output*"),
        "dynamic_batching": (11, ".Batching"),
        "parameters": (14, ".Entry*"),
        "backend": (17, "string"),
    },
}
DATA_TYPES = {"TYPE_INVALID": 0, "TYPE_UINT8": 2, "TYPE_INT64": 9, "TYPE_FP32": 11}


@pytest.fixture(scope="module")
def parse():
    """Text to a ModelConfig message; what Triton's parser would not read is an error here too."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="config.proto", package="triton", syntax="proto3")
    kinds = file.enum_type.add(name="DataType")
    for name, number in DATA_TYPES.items():
        kinds.value.add(name=name, number=number)
    for message, fields in MESSAGES.items():
        described = file.message_type.add(name=message)
        for name, (number, kind) in fields.items():
            label = field.LABEL_REPEATED if kind.endswith("*") else field.LABEL_OPTIONAL
            made = described.field.add(name=name, number=number, label=label)
            kind = kind.rstrip("*")
            if kind.startswith("."):
                made.type = field.TYPE_ENUM if kind == ".DataType" else field.TYPE_MESSAGE
                made.type_name = f".triton{kind}"
            else:
                made.type = getattr(field, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    model_config = message_factory.GetMessageClass(pool.FindMessageTypeByName("triton.ModelConfig"))
    return lambda text: text_format.Parse(text, model_config())


def test_a_repository_that_protobuf_reads(bundle, tmp_path, contract, parse, capsys):
    out = tmp_path / "models"
    assert main(["convert", str(bundle), str(out), "--to", "triton", "--max-batch", "4"]) == 0
    found = parse((out / "tiny" / "config.pbtxt").read_text(encoding="utf-8"))
    assert (found.name, found.backend, found.max_batch_size) == ("tiny", "onnxruntime", 4)
    (images,) = found.input
    assert (images.name, DATA_TYPES["TYPE_UINT8"], list(images.dims)) == ("images", images.data_type, [64, 64, 3])
    outputs = [(one.name, one.data_type, list(one.dims)) for one in found.output]
    assert outputs == [("boxes", 11, [4, 4]), ("scores", 11, [4]), ("labels", 9, [4])]
    assert found.HasField("dynamic_batching")
    (parameter,) = found.parameters
    assert parameter.key == METADATA_KEY
    assert Contract.from_json(parameter.value.string_value) == contract
    assert (out / "tiny" / "labels.txt").read_text() == "cat\ndog\n"
    readme = (out / "README.md").read_text()
    assert "never loaded by a Triton server" in readme
    assert "{" not in readme
    with Predictor.open(out / "tiny" / "1" / "model.onnx") as predictor:  # the file is whole
        assert predictor.contract == contract


def test_a_graph_for_one_image_has_its_whole_shape(tmp_path, new_model, new_contract, entry, release):
    contract = new_contract(one_by_one=True)
    made = write(tmp_path / "b", [entry(new_model(tmp_path / "m.onnx", contract), contract=contract)], release, "c")
    text = (write_triton(made, made.models[0], tmp_path / "out") / "config.pbtxt").read_text()
    assert "max_batch_size: 0" in text
    assert "dims: [ 1, 64, 64, 3 ]" in text
    assert "dynamic_batching" not in text
    with pytest.raises(DeployError, match="takes 1 images at most"):
        write_triton(made, made.models[0], tmp_path / "more", 2)


def test_names_from_anywhere_survive(tmp_path, new_model, new_contract, entry, release, parse):
    contract = new_contract(classes=('caf\u00e9 "au lait"', "back\\slash"))
    model = entry(new_model(tmp_path / "m.onnx", contract), contract=contract)
    made = write(tmp_path / "b", [model], release | {"name": "a/b c"}, "card")
    folder = write_triton(made, made.models[0], tmp_path / "out")
    assert folder.name == "a_b_c"
    found = parse((folder / "config.pbtxt").read_text(encoding="utf-8"))
    assert json.loads(found.parameters[0].value.string_value)["classes"] == list(contract.classes)


def test_an_engine_and_what_triton_cannot(tmp_path, model, entry, release, parse):
    engine = tmp_path / "x.engine"
    engine.write_bytes(b"plan")
    made_for = {"compute_capabilities": ["7.5"]}
    beside(engine).write_text(
        json.dumps(
            {one.name: {} for one in dataclasses.fields(Sidecar)}
            | {"schema_version": 1, "settings": {"batch": [1, 1, 4]}}
        )
    )
    models = [
        entry(model),
        entry(engine, file="t4.engine", backend="tensorrt", made_for=made_for),
        entry(engine, file="rtx.engine", backend="tensorrt_rtx", made_for=made_for),
    ]
    made = write(tmp_path / "b", models, release, "card")
    folder = write_triton(made, made.model("t4.engine"), tmp_path / "out")
    assert (folder / "1" / "model.plan").read_bytes() == b"plan"
    found = parse((folder / "config.pbtxt").read_text())
    assert (found.backend, found.max_batch_size) == ("tensorrt", 4)  # what the engine takes
    with pytest.raises(DeployError, match=r"--max-batch 5: t4\.engine takes 4 images at most"):
        write_triton(made, made.model("t4.engine"), tmp_path / "larger", 5)
    assert '["7.5"]' in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(DeployError, match=r"rtx\.engine is for tensorrt_rtx, which Triton does not serve"):
        write_triton(made, made.model("rtx.engine"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("batch", "there", "message"), [(0, False, "--max-batch"), (8, True, "the folder exists")])
def test_what_is_wrong_is_refused(bundle, tmp_path, batch, there, message):
    opened, out = Bundle.open(bundle), tmp_path / "out"
    if there:
        out.mkdir()
    with pytest.raises(DeployError, match=message):
        write_triton(opened, opened.models[0], out, batch)
