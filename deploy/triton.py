"""Triton: a model of a bundle as a model repository, DIR/NAME/config.pbtxt and DIR/NAME/1/model.onnx (or model.plan).

The server infers and no more: its clients prepare images as the contract says and do NMS. The contract is a parameter of
the model, which a client reads from the server. Written from Triton's model_config.proto and never loaded by a server.
"""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING

from deploy import atomic, sidecar
from deploy.contract import METADATA_KEY
from deploy.errors import DeployError

if TYPE_CHECKING:
    from pathlib import Path

    from deploy.bundle import Bundle
    from deploy.manifest import Model

# Our backend to Triton's, and the name under which that looks for its file.
_BACKENDS = {"onnxruntime": ("onnxruntime", "model.onnx"), "tensorrt": ("tensorrt", "model.plan")}

README = """# {name} for Triton

    tritonserver --model-repository=THIS_FOLDER

`{name}` takes `{input}`: uint8, batch x {height} x {width} x RGB, at most {batch} images a call, and gives the model's
candidates before NMS. A client prepares an image as `deploy.image.ImageSpec.prepare` does ({prepared}) and hands the
three outputs to `deploy.postprocess.detect`. The contract is the model's parameter `{key}`.

**Not tried**: config.pbtxt was parsed as protobuf text when Headstart was tested, and never loaded by a Triton server.
AP and latency in the bundle's release.json were measured without one. Server settings (instances, batching delay, the
execution provider) are left at Triton's defaults{engine}.
"""


def write(bundle: Bundle, model: Model, directory: Path, max_batch: int | None = None) -> Path:
    """Writes the repository, which appears whole or not at all, and returns the folder of the model in it.

    `max_batch` is 8, or what an engine takes where that is less. Raises DeployError for a backend that Triton has not,
    a batch below 1 or larger than the engine's, and a folder that exists.
    """
    if model.backend not in _BACKENDS:
        raise DeployError(
            f"triton: {model.file} is for {model.backend}, which Triton does not serve; choose a --model for "
            f"{' or '.join(_BACKENDS)}"
        )
    described = sidecar.peek(bundle.path / model.file)
    most = described.settings["batch"][2] if described else 1 if model.contract.one_by_one else None
    max_batch = min(8, most or 8) if max_batch is None else max_batch
    if max_batch < 1:
        raise DeployError(f"triton: --max-batch must be at least 1, given {max_batch}")
    if most is not None and max_batch > most:
        raise DeployError(f"triton: --max-batch {max_batch}: {model.file} takes {most} images at most; build another")
    backend, file = _BACKENDS[model.backend]
    name = re.sub(r"[^\w.-]", "_", str(bundle.release["name"]), flags=re.ASCII) or "detector"
    contract, spec = model.contract, model.contract.image
    with atomic.new_folder(directory) as partial:
        (partial / name / "1").mkdir(parents=True)
        shutil.copyfile(bundle.path / model.file, partial / name / "1" / file)
        (partial / name / "config.pbtxt").write_text(config(name, backend, model, max_batch), encoding="utf-8")
        (partial / name / "labels.txt").write_text("\n".join(contract.classes) + "\n", encoding="utf-8")
        engine = "" if backend == "onnxruntime" else f"; the engine loads only on {json.dumps(model.made_for)}"
        readme = README.format(
            name=name,
            input=contract.input_name,
            height=spec.height,
            width=spec.width,
            batch=max_batch,
            prepared=spec.sentence,
            key=METADATA_KEY,
            engine=engine,
        )
        (partial / "README.md").write_text(readme, encoding="utf-8")
    return directory / name


def config(name: str, backend: str, model: Model, max_batch: int) -> str:
    """config.pbtxt: the text form of Triton's ModelConfig. Dimensions are those of one image; the batch comes on top, but
    for a graph that takes one image and no more: of that Triton is told the whole shape and a largest batch of 0."""
    contract, spec = model.contract, model.contract.image
    count = contract.candidates
    boxes, scores, labels = contract.output_names
    one = [1] if contract.one_by_one else []
    outputs = [
        (boxes, "TYPE_FP32", [*one, count, 4]),
        (scores, "TYPE_FP32", [*one, count]),
        (labels, "TYPE_INT64", [*one, count]),
    ]
    lines = [
        f"name: {_quoted(name)}",
        f"backend: {_quoted(backend)}",
        f"max_batch_size: {0 if one else max_batch}",
        *_tensors("input", [(contract.input_name, "TYPE_UINT8", [*one, spec.height, spec.width, 3])]),
        *_tensors("output", outputs),
        *([] if one else ["dynamic_batching { }"]),
        f"parameters {{ key: {_quoted(METADATA_KEY)} value {{ string_value: {_quoted(contract.to_json())} }} }}",
    ]
    return "\n".join(lines) + "\n"


def _tensors(kind: str, tensors: list[tuple[str, str, list[int]]]) -> list[str]:
    return [
        f"{kind} {{ name: {_quoted(name)} data_type: {dtype} dims: [ {', '.join(map(str, dims))} ] }}"
        for name, dtype, dims in tensors
    ]


def _quoted(text: str) -> str:
    """A string of protobuf's text format: JSON's escapes but for its \\u, which are UTF-8 bytes here."""
    return json.dumps(text, ensure_ascii=False)
