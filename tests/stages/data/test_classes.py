"""Classes kept, put in order and merged; what is left out is counted, and its images stay."""

import pytest
from pydantic import TypeAdapter, ValidationError

from pipeline.errors import UserError
from stages.data.classes import Classes, keep, parts, selected
from stages.data.coco_document import CocoCategory, CocoDocument

CATEGORIES: list[CocoCategory] = [
    {"id": 3, "name": "car"},
    {"id": 1, "name": "person"},
    {"id": 8, "name": "truck"},
    {"id": 9, "name": "dog"},
]


def read(value: object) -> list[tuple[str, tuple[str, ...]]]:
    """Pairs of new and old names, as the setting has them."""
    return parts(TypeAdapter(Classes).validate_python(value))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["car", "person"], [("car", ("car",)), ("person", ("person",))]),
        (["person", {"vehicle": ["car", "truck"]}], [("person", ("person",)), ("vehicle", ("car", "truck"))]),
        ({"vehicle": ["car", "truck"], "human": ["person"]}, [("vehicle", ("car", "truck")), ("human", ("person",))]),
    ],
)
def test_forms_of_the_setting(value: object, expected: object) -> None:
    assert read(value) == expected


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (["car", "car"], "new class 'car' stands there twice"),
        ([{"a": ["car"]}, {"b": ["car"]}], "class 'car' stands there twice"),
        ([{"a": ["car"], "b": ["truck"]}], "is not one new name"),
        ([{"a": []}], "is not one new name"),
        ([], "at least 1 item"),
    ],
)
def test_what_the_setting_refuses(value: object, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        read(value)


def test_the_order_is_part_of_the_setting() -> None:
    """Keys of stages are made of settings whose mappings are sorted: two orders must not have one key."""
    adapter = TypeAdapter(Classes)
    assert isinstance(adapter.dump_python(adapter.validate_python({"b": ["car"], "a": ["dog"]}), mode="json"), list)


def test_new_ids_are_in_the_order_that_was_asked_for() -> None:
    categories, ids = selected(CATEGORIES, ("person", {"vehicle": ("car", "truck")}))
    assert categories == [{"id": 1, "name": "person"}, {"id": 2, "name": "vehicle"}]
    assert ids == {1: 1, 3: 2, 8: 2}


def test_unknown_classes_are_named_all_at_once() -> None:
    with pytest.raises(UserError) as caught:
        selected(CATEGORIES, ("cart", {"x": ("lorry",)}))
    assert str(caught.value).splitlines() == [
        "classes: the data has no 'cart'; did you mean 'car'?",
        "classes: the data has no 'lorry'; there are: car, person, truck, dog",
    ]


def test_annotations_are_renumbered_or_left_out_and_images_stay() -> None:
    document: CocoDocument = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in (1, 2)],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 8, "bbox": (0, 0, 1, 1)},
            {"id": 2, "image_id": 1, "category_id": 3, "bbox": (0, 0, 1, 1), "iscrowd": 1},
            {"id": 3, "image_id": 2, "category_id": 9, "bbox": (0, 0, 1, 1)},
            {"id": 4, "image_id": 2, "category_id": 9, "bbox": (0, 0, 1, 1)},
        ],
        "categories": CATEGORIES,
    }
    dropped = keep(document, selected(CATEGORIES, ({"vehicle": ("car", "truck")},))[1])
    assert dropped == {"dog": 2}
    assert [(a["id"], a["category_id"], a.get("iscrowd", 0)) for a in document["annotations"]] == [(1, 1, 0), (2, 1, 1)]
    assert len(document["images"]) == 2
