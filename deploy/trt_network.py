"""From an ONNX file to a serialised engine, for TensorRT 10 and 11 and for TensorRT-RTX: they have one builder API.

`trt` is the module, `tensorrt` or `tensorrt_rtx`. Networks are strongly typed: each layer computes in the types that the
ONNX file has, so precision is decided there, and no flag of the builder changes it (TensorRT 11 and RTX know no other
networks). Source: TensorRT's Python API, https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy import census, onnx_proto
from deploy.census import CONVOLUTION, PRODUCT, Layer
from deploy.contract import METADATA_KEY, Contract
from deploy.errors import DeployError

if TYPE_CHECKING:
    from collections.abc import Sequence

_PRECISIONS = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16"}  # others by their own name, lower case
_KINDS = {"CONVOLUTION": CONVOLUTION, "DECONVOLUTION": CONVOLUTION, "MATRIX_MULTIPLY": PRODUCT}
_PASSING = ("SHUFFLE", "IDENTITY")  # layers that only hand on what a quantiser gave


@dataclass(frozen=True)
class Network:
    """A parsed ONNX file. The parser owns the weights and the builder the network, so all are kept together."""

    contract: Contract
    contract_json: str
    builder: Any
    parser: Any
    definition: Any
    log: Any

    def layers(self) -> tuple[Layer, ...]:
        """The precision that each layer is asked for, by the types of its tensors."""
        return requested(self.definition)


def parse(trt: Any, onnx: Path) -> Network:
    """Parses a file with a contract into a strongly typed network.

    Raises DeployError for a file without a contract, with uint8 quantisation, that the parser does not take, or whose
    inputs and outputs are not its contract's.
    """
    said = onnx_proto.read(onnx)
    contract = Contract.from_metadata(said.metadata, str(onnx))
    refuse_uint8(onnx, said.quantised)
    log = logger(trt)
    builder = trt.Builder(log)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # gone where nothing else is known
    definition = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(definition, log)
    if not parser.parse_from_file(str(onnx)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        told = [f"{one.node_operator()} {one.node_name()}: {one.desc()}" for one in errors[:3]]
        raise DeployError(f"{onnx}: {trt.__name__} {trt.__version__} cannot parse it: {'; '.join(told)}")
    inputs = [definition.get_input(index) for index in range(definition.num_inputs)]
    outputs = [definition.get_output(index).name for index in range(definition.num_outputs)]
    if [one.name for one in inputs] != [contract.input_name] or set(contract.output_names) != set(outputs):
        raise DeployError(
            f"{onnx}: the network must take {contract.input_name} and give {', '.join(contract.output_names)}; it takes "
            f"{', '.join(one.name for one in inputs)} and gives {', '.join(outputs)}; export the model again"
        )
    if inputs[0].dtype != trt.DataType.UINT8:
        raise DeployError(f"{onnx}: its input must be uint8, it is {inputs[0].dtype.name}; export the model again")
    return Network(contract, said.metadata[METADATA_KEY], builder, parser, definition, log)


def refuse_uint8(onnx: Path, quantised: dict[str, str]) -> None:
    """Raises DeployError where something is quantised to uint8: TensorRT takes it for int8 with a warning, and the
    upper half of its range is lost."""
    if wrong := [name for name, kind in quantised.items() if kind == "uint8"]:
        raise DeployError(
            f"{onnx}: {len(wrong)} quantisers are uint8, such as {wrong[0]}, and TensorRT would read them as int8; "
            "quantise the model for TensorRT (signed, symmetric)"
        )


def configure(trt: Any, network: Network, workspace_mb: int | None) -> Any:
    """The builder's settings that all engines share: layers that can be inspected, and fp32 that is fp32."""
    config = network.builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default, with 10 bits of mantissa
    if workspace_mb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mb << 20)
    return config


def serialise(trt: Any, network: Network, config: Any, batch: Sequence[int]) -> bytes:
    """The engine file's content, for batches of `batch`: least, best and most images. Raises DeployError where it
    cannot be built."""
    least, best, most = batch
    if not 1 <= least <= best <= most:
        raise DeployError(f"batch: least, best and most images are wanted, in that order, given {list(batch)}")
    given = network.definition.get_input(0)
    if given.shape[0] == -1:
        profile, rest = network.builder.create_optimization_profile(), tuple(given.shape)[1:]
        profile.set_shape(given.name, (least, *rest), (best, *rest), (most, *rest))
        config.add_optimization_profile(profile)
    elif not least == most == given.shape[0]:
        raise DeployError(f"batch: the ONNX file takes {given.shape[0]} images only, asked for {list(batch)}")
    memory = network.builder.build_serialized_network(network.definition, config)
    if memory is None:
        raise DeployError(f"{trt.__name__} {trt.__version__}: the engine cannot be built: {network.log.errors()}")
    return bytes(memory)


def requested(definition: Any) -> tuple[Layer, ...]:
    """Each layer with the type in which it is asked to compute: an int8 convolution is one whose input was
    dequantised from int8, the others compute in the type of what they give."""
    layers = [definition.get_layer(index) for index in range(definition.num_layers)]
    makers = {
        layer.get_output(index).name: layer
        for layer in layers
        for index in range(layer.num_outputs)
        if layer.get_output(index) is not None
    }
    return tuple(Layer(layer.name, _kind(layer), _requested_of(layer, makers)) for layer in layers)


def _kind(layer: Any) -> str:
    name = str(layer.type.name)
    return _KINDS.get(name, name.lower())


def _requested_of(layer: Any, makers: dict[str, Any]) -> str:
    if layer.type.name in _KINDS:
        quantised = _quantised_to(layer.get_input(0), makers)
        if quantised is not None:
            return quantised
        return _precision(layer.get_input(0).dtype)
    output = layer.get_output(0) if layer.num_outputs else None
    return _precision(output.dtype) if output is not None else "none"


def _quantised_to(tensor: Any, makers: dict[str, Any]) -> str | None:
    maker = makers.get(tensor.name)
    while maker is not None and maker.type.name in _PASSING:
        tensor = maker.get_input(0)
        maker = makers.get(tensor.name)
    if maker is None or maker.type.name != "DEQUANTIZE":
        return None
    return _precision(maker.get_input(0).dtype)


def _precision(dtype: Any) -> str:
    name = str(dtype.name)
    return _PRECISIONS.get(name, name.lower())


def logger(trt: Any) -> Any:
    """A logger that keeps what it is told: TensorRT returns None and says why here alone."""

    class Log(trt.ILogger):  # type: ignore[misc]  # TensorRT's or TensorRT-RTX's, as given
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.told: list[tuple[str, str]] = []

        def log(self, severity: Any, message: str) -> None:
            if severity.name in ("INTERNAL_ERROR", "ERROR", "WARNING"):
                self.told.append((severity.name, message))

        def errors(self) -> str:
            """The errors, or else the warnings, in one line."""
            errors = [message for severity, message in self.told if severity != "WARNING"]
            return "; ".join((errors or self.warnings())[:4]) or "no reason was given"

        def warnings(self) -> list[str]:
            """The warnings, each once."""
            return list(dict.fromkeys(message for severity, message in self.told if severity == "WARNING"))

    return Log()


def verdict(asked: str, layers: Sequence[Layer], onnx: Path) -> None:
    """Raises DeployError where the network is not what was asked for, before anything is built."""
    passed, sentence = census.judge(asked, layers, "the network asks for")
    if not passed:
        mend = "quantise it for TensorRT first" if asked == "int8" else f"export it with precision {asked}"
        raise DeployError(f"{onnx}: the ONNX is {census.precision_of(layers)}; {mend} ({sentence})")
