import json

import onnx
import pytest

from deploy import onnx_proto
from deploy.contract import METADATA_KEY, Contract
from deploy.errors import DeployError
from deploy.image import ImageSpec


def test_round_trip(new_contract):
    contract = new_contract(producer={"name": "headstart", "detector": {"name": "retinanet"}}, nms="graph")
    assert Contract.from_json(contract.to_json()) == contract


def test_every_field_is_written(contract):
    assert set(json.loads(contract.to_json())) == set(Contract.__dataclass_fields__) - {"one_by_one"}


def test_what_older_readers_do_not_know_is_written_where_it_matters(new_contract):
    """An older reader knows neither field and refuses the file; it reads all others as before."""
    elsewhere = new_contract(one_by_one=True, image=ImageSpec(64, 64, (0, 0, 0), "centre"))
    written = json.loads(elsewhere.to_json())
    assert written["one_by_one"] is True
    assert written["image"]["fit"] == "centre"
    assert Contract.from_json(elsewhere.to_json()) == elsewhere


def test_unknown_and_missing_fields_and_wrong_types_are_told_at_once(contract):
    values = json.loads(contract.to_json())
    del values["classes"]
    values |= {"colour": "bgr", "candidates": "many", "max_detections": True}
    with pytest.raises(DeployError) as caught:
        Contract.from_json(json.dumps(values))
    message = str(caught.value)
    for part in (
        "unknown field 'colour'",
        "missing field 'classes'",
        "candidates must be int",
        "max_detections must be",
    ):
        assert part in message


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_what_is_no_contract_is_refused(text):
    with pytest.raises(DeployError, match="contract"):
        Contract.from_json(text)


def test_contradictions_are_told_at_once(new_contract):
    with pytest.raises(DeployError) as caught:
        new_contract(category_ids=(1,), nms="maybe", nms_iou=2.0, candidates=0, schema_version=99)
    message = str(caught.value)
    for part in ("2 classes but 1 category_ids", "'maybe'", "nms_iou", "candidates", "schema_version 99"):
        assert part in message
    with pytest.raises(DeployError, match="repeat"):
        new_contract(category_ids=(1, 1))


def test_it_travels_in_the_file_beside_other_metadata(model, new_contract):
    file = onnx.load(model)
    onnx.helper.set_model_props(file, {"author": "somebody", METADATA_KEY: "old"})
    onnx.save(file, model)
    contract = new_contract(score_threshold=0.4)
    contract.write_to_onnx(model)
    assert Contract.from_metadata(onnx_proto.read(model).metadata, str(model)) == contract
    assert {entry.key for entry in onnx.load(model).metadata_props} == {"author", METADATA_KEY}
    assert [file.name for file in model.parent.iterdir()] == [model.name]  # no partial file is left


def test_a_file_without_contract_is_refused(model):
    file = onnx.load(model)
    del file.metadata_props[:]
    onnx.save(file, model)
    with pytest.raises(DeployError, match=r"tiny\.onnx: the file carries no contract"):
        Contract.from_metadata(onnx_proto.read(model).metadata, str(model))
