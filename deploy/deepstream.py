"""DeepStream: a model of a bundle as files for the element nvinfer: its configuration, labels, and an ONNX file with the
input that nvinfer can give and outputs that it can read.

nvinfer hands a network float planes of RGB, never uint8 NHWC, and its parsers are told of float, half, int8 and int32
outputs, not of int64; so the graph is changed at both ends, and a test holds both files against each other. Written from
DeepStream's documentation (Gst-nvinfer; NvDsInferDataType) and never loaded by it.
"""

from __future__ import annotations

from configparser import ConfigParser
from typing import TYPE_CHECKING

from deploy import atomic, onnx_proto
from deploy.errors import DeployError
from deploy.trt_network import refuse_uint8

if TYPE_CHECKING:
    from pathlib import Path

    from deploy.bundle import Bundle
    from deploy.manifest import Model

ONNX = "model_planes.onnx"
CONFIG = "config_infer.txt"
PARSER = "NvDsInferParseHeadstart"
LIBRARY = "libnvdsinfer_headstart.so"

README = """# {name} for DeepStream

`{config}` configures `nvinfer`; it builds its engine from `{onnx}` at the first start. `{onnx}` is {file} with float
planes of RGB, 0 to 255, as input instead of uint8 NHWC, which nvinfer cannot give, and int32 labels.

**You must supply `{library}`** with the function `{parser}`: nvinfer knows no outputs like ours. For one image they are
`{boxes}` float [{count}, 4] (x1, y1, x2, y2 in pixels of the network's input), `{scores}` float [{count}] and `{labels}`
int32 [{count}] (from 0, the lines of labels.txt), highest score first. The function makes one NvDsInferObjectDetectionInfo
of each with a score above detectionParams.perClassPreclusterThreshold; {nms}

**Not tried**: these files were parsed and the ONNX file was run by ONNX Runtime when Headstart was tested; neither was
ever loaded by DeepStream. **AP is another** than that in release.json: nvinfer scales frames on the GPU without
antialiasing and pads with black, the model was measured on images {prepared}. Measure it there.
"""


def write(bundle: Bundle, model: Model, directory: Path, max_batch: int | None = None) -> Path:
    """Writes the folder, which appears whole or not at all, and returns its configuration file.

    Raises DeployError for what is no ONNX file, one quantised to uint8, a batch below 1, a folder that exists, or without
    the package onnx.
    """
    if not model.file.endswith(".onnx"):
        raise DeployError(
            f"deepstream: {model.file} is no ONNX file, which nvinfer builds from; choose a --model that is"
        )
    contract = model.contract
    most = 1 if contract.one_by_one else None
    max_batch = (most or 8) if max_batch is None else max_batch
    if max_batch < 1 or (most and max_batch > most):
        raise DeployError(f"deepstream: --max-batch must be {'1' if most else 'at least 1'}, given {max_batch}")
    with atomic.new_folder(directory) as partial:
        write_planes(bundle.path / model.file, partial / ONNX, contract.input_name, contract.output_names[2])
        with (partial / CONFIG).open("w", encoding="utf-8") as file:
            config(model, max_batch).write(file, space_around_delimiters=False)
        (partial / "labels.txt").write_text("\n".join(contract.classes) + "\n", encoding="utf-8")
        boxes, scores, labels = contract.output_names
        here = contract.nms == "host"
        readme = README.format(
            name=bundle.release["name"],
            config=CONFIG,
            onnx=ONNX,
            file=model.file,
            library=LIBRARY,
            parser=PARSER,
            boxes=boxes,
            scores=scores,
            labels=labels,
            count=contract.candidates,
            nms="nvinfer does NMS (cluster-mode 2)." if here else "they need no NMS (cluster-mode 4).",
            prepared=contract.image.sentence,
        )
        (partial / "README.md").write_text(readme, encoding="utf-8")
    return directory / CONFIG


def config(model: Model, batch: int) -> ConfigParser:
    """nvinfer's settings. Class-agnostic NMS, which it has not, is refused."""
    contract, spec = model.contract, model.contract.image
    if contract.nms == "host" and contract.class_agnostic_nms:
        raise DeployError("deepstream: nvinfer suppresses within a class alone, the contract says across; it cannot")
    made = ConfigParser(interpolation=None)
    made["property"] = {
        "gpu-id": "0",
        "onnx-file": ONNX,
        "labelfile-path": "labels.txt",
        "batch-size": str(batch),
        "network-mode": "0",  # fp32: the file's own types; the others would convert what was never measured
        "network-type": "0",  # a detector
        "num-detected-classes": str(len(contract.classes)),
        "infer-dims": f"3;{spec.height};{spec.width}",
        "model-color-format": "0",  # RGB
        "net-scale-factor": "1",  # the graph normalises
        "maintain-aspect-ratio": "0" if spec.fit == "stretch" else "1",
        "symmetric-padding": "1" if spec.fit == "centre" else "0",
        "cluster-mode": "2" if contract.nms == "host" else "4",
        "output-blob-names": ";".join(contract.output_names),
        "parse-bbox-func-name": PARSER,
        "custom-lib-path": LIBRARY,
    }
    made["class-attrs-all"] = {
        "pre-cluster-threshold": str(contract.score_threshold),
        "nms-iou-threshold": str(contract.nms_iou),
        "topk": str(contract.max_detections),
    }
    return made


def write_planes(source: Path, target: Path, name: str, labels: str) -> None:
    """The ONNX file with input float32 (B, 3, H, W) of RGB from 0 to 255 instead of uint8 (B, H, W, 3), and with int32
    labels.

    Our graphs cast before all else (and ask for the batch's size); both take the transposed planes instead. Raises
    DeployError for a graph that begins otherwise, and for one quantised to uint8, which nvinfer's TensorRT takes for int8.
    """
    try:
        import onnx
    except ImportError as error:
        raise DeployError(f"deepstream: the package onnx is needed here ({error}); pip install onnx") from error
    refuse_uint8(source, onnx_proto.read(source).quantised)
    model = onnx.load(source)
    (images,) = (one for one in model.graph.input if one.name == name)
    readers = [node for node in model.graph.node if name in node.input]
    shape = images.type.tensor_type.shape.dim
    if {node.op_type for node in readers} - {"Shape"} != {"Cast"} or len(shape) != 4:
        raise DeployError(
            f"{source}: a graph that casts {name} (B, H, W, 3) first is wanted, this one begins with "
            f"{', '.join(node.op_type for node in readers)}; export it with Headstart"
        )
    height, width = shape[1].dim_value, shape[2].dim_value
    batch = shape[0].dim_param or shape[0].dim_value
    images.CopyFrom(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [batch, 3, height, width]))
    for reader in readers:
        reader.input[:] = [f"{name}_nhwc"]
    model.graph.node.insert(
        0, onnx.helper.make_node("Transpose", [name], [f"{name}_nhwc"], name="planes", perm=[0, 2, 3, 1])
    )
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [f"{labels}_int64" if one == labels else one for one in names]
    int32 = onnx.TensorProto.INT32
    model.graph.node.append(onnx.helper.make_node("Cast", [f"{labels}_int64"], [labels], name="labels_int32", to=int32))
    (output,) = (one for one in model.graph.output if one.name == labels)
    output.type.tensor_type.elem_type = int32
    # Its contract speaks of uint8 NHWC images, and this file takes others.
    kept = [entry for entry in model.metadata_props if not entry.key.startswith("headstart.")]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, target)
