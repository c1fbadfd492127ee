"""NMS inside an ONNX file: nodes of ONNX itself behind the candidates, and the proof that they do what the host does.

Added to the finished file, so that whatever made it (tracing, half precision, quantisation) knows nothing of NMS. ONNX
Runtime executes the node; TensorRT's parser makes its INMSLayer of it; TensorRT-RTX parses it and cannot build it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx
from onnx import compose, parser

from deploy.contract import Contract
from deploy.detections import Detections
from deploy.image import Placement
from deploy.parity import Parity, Tolerance, compare
from deploy.postprocess import least_score
from deploy.predictor import Predictor
from pipeline.errors import VerdictError
from pipeline.log import logger

_OUTPUTS = ("boxes", "scores", "labels")
# Between them lies the order of float32's operations: one runtime divides the overlap, the other multiplies its limit.
_EXACT = Tolerance(box_px=1e-3, score=1e-6)
_BATCH = 4
_AT_THE_LIMIT = 1e-3  # share of the detections that may differ because an overlap equals NMS's limit to the last bit

# B images, N candidates, K classes. NMS runs for each class on its own scores: an offset per class, the usual trick with
# one pass, costs coordinates their last digits. Candidates of other classes have score 0, which NMS leaves out.
_GRAPH = """
<ir_version: {ir}, opset_import: ["" : {opset}]>
nms (float[batch, {candidates}, 4] candidate_boxes, float[batch, {candidates}] candidate_scores,
     int64[batch, {candidates}] candidate_labels)
=> (float[batch, {kept}, 4] boxes, float[batch, {kept}] scores, int64[batch, {kept}] labels)
<float zero = {{0}}, float[4] canvas = {{{width}, {height}, {width}, {height}}}, int64[1] first = {{1}}, int64[1] last = {{-1}},
 int64[1, {classes}, 1] every_class = {{{every_class}}}, int64 most = {{{kept}}}, int64[1] rows = {{{kept}}},
 float iou = {{{iou}}}, float least = {{{least}}}, int64[2] image_and_box = {{0, 2}}>
{{
    above = Max(candidate_boxes, zero)
    clipped = Min(above, canvas)
    x1, y1, x2, y2 = Split<axis = -1, num_outputs = 4>(clipped)
    wide = Greater(x2, x1)
    tall = Greater(y2, y1)
    sized_BN1 = And(wide, tall)
    sized = Squeeze(sized_BN1, last)
    sure = Where(sized, candidate_scores, zero)
    labels_B1N = Unsqueeze(candidate_labels, first)
    of_class_BKN = Equal(labels_B1N, every_class)
    sure_B1N = Unsqueeze(sure, first)
    scores_BKN = Where(of_class_BKN, sure_B1N, zero)
    selected = NonMaxSuppression(clipped, scores_BKN, most, iou, least)
    places = Gather<axis = 1>(selected, image_and_box)
    found = GatherND(sure, places)
    shape = Shape(sure)
    nothing = Expand(zero, shape)
    survivors = ScatterND(nothing, places, found)
    scores, best = TopK<axis = 1>(survivors, rows)
    best_BN1 = Unsqueeze(best, last)
    boxes = GatherND<batch_dims = 1>(clipped, best_BN1)
    labels = GatherElements<axis = 1>(candidate_labels, best)
}}
"""


def with_nms(model: onnx.ModelProto, contract: Contract) -> tuple[onnx.ModelProto, Contract]:
    """A file of candidates with NMS behind them, and its contract: that of the file, with NMS done by the graph.

    Boxes are clipped to the canvas, those of no size are dropped, every score above the lower of the contract's thresholds
    takes part, and the `max_detections` best leave the graph with scores of 0 where there are fewer. The host raises the
    threshold afterwards: a box is suppressed by better ones alone.
    """
    kept = min(contract.max_detections, contract.candidates)
    (opset,) = (one.version for one in model.opset_import if one.domain == "")
    suppression = parser.parse_model(
        _GRAPH.format(
            ir=model.ir_version,
            opset=opset,
            candidates=contract.candidates,
            kept=kept,
            width=contract.image.width,
            height=contract.image.height,
            classes=len(contract.classes),
            every_class=", ".join(map(str, range(len(contract.classes)))),
            iou=contract.nms_iou,
            least=least_score(contract),
        )
    )
    for node in suppression.graph.node:
        node.name = node.output[0]  # the parser names none
    given = {name: f"candidate_{one}" for name, one in zip(contract.output_names, _OUTPUTS, strict=True)}
    candidates = compose.add_prefix(
        model,
        "candidate/",
        rename_nodes=False,
        rename_edges=False,
        rename_inputs=False,
        rename_initializers=False,
        rename_value_infos=False,
        rename_functions=False,
    )
    suppression = compose.add_prefix(suppression, "nms/", rename_inputs=False, rename_outputs=False)
    merged = compose.merge_models(
        candidates,
        suppression,
        io_map=[(f"candidate/{name}", wanted) for name, wanted in given.items()],
        outputs=list(_OUTPUTS),
        producer_name=model.producer_name,
        producer_version=model.producer_version,
    )
    domains = {one.domain: one for one in merged.opset_import}  # merging lists a domain once for each model
    del merged.opset_import[:]
    merged.opset_import.extend(domains.values())
    return merged, replace(contract, nms="graph", candidates=kept, output_names=_OUTPUTS)


def add_nms(file: Path, into: Path, contract: Contract) -> Contract:
    """Write `file` with NMS behind its candidates, and its contract inside; returns that contract."""
    model, changed = with_nms(onnx.load(file), contract)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, into)
    changed.write_to_onnx(into)
    return changed


def with_nms_inside(file: Path, contract: Contract, images: Sequence[Path]) -> tuple[Contract, str]:
    """Put NMS into the file; its new contract, and what the comparison with the host's NMS found."""
    plain = file.with_name("candidates.onnx")
    file.rename(plain)
    changed = add_nms(plain, file, contract)
    with Predictor.open(plain) as host, Predictor.open(file) as graph:
        sentence = nms_parity(images, host, graph)
    plain.unlink()
    logger.info(sentence)
    return changed, sentence


def nms_parity(images: Sequence[Path], host: Predictor, graph: Predictor) -> str:
    """What the graph's NMS finds on real images is what the host's finds among the same candidates; one sentence of it.

    Both see the canvas: the graph cannot know where an image ends and its padding begins, and how many detections that
    changes is part of the sentence. Raises VerdictError where they differ.
    """
    threshold, most = host.contract.evaluation_score_threshold, host.contract.max_detections
    everything = replace(host.contract, nms="none", max_detections=host.contract.candidates)
    mine, theirs, before = (
        on_canvas(predictor, images, threshold) for predictor in (host, graph, Predictor(host.backend, everything))
    )
    parity = compare(mine, theirs, _EXACT, threshold, most, (before, before))
    differs = parity.unmatched + parity.excused
    if not parity.verdict or differs > max(1, _AT_THE_LIMIT * parity.matched):
        raise VerdictError(f"export: NMS in the graph does not keep what NMS on the host keeps: {told(parity)}")
    shipped = compare(
        list(host.batch(images, _BATCH, threshold)),
        list(graph.batch(images, _BATCH, threshold)),
        _EXACT,
        threshold,
        most,
    )
    return (
        f"NMS in the graph keeps what the host's keeps: {told(parity)}; {shipped.unmatched} of "
        f"{shipped.matched + shipped.unmatched} detections differ where padding begins, which only the host knows"
    )


def on_canvas(predictor: Predictor, images: Sequence[Path], threshold: float) -> list[Detections]:
    """Detections in pixels of the canvas, as if every image filled it; in batches, which NMS must not mix."""
    found: list[Detections] = []
    for start in range(0, len(images), _BATCH):
        batch, _ = predictor.prepare([predictor.decode(image) for image in images[start : start + _BATCH]])
        count, height, width, _ = batch.shape
        everywhere = Placement((height, width), (height, width))
        found += predictor.finish(predictor.infer(batch), [everywhere] * count, threshold)
    return found


def told(parity: Parity) -> str:
    """The numbers of a comparison in which nothing may differ."""
    alone = parity.unmatched + parity.excused
    return f"{parity.matched} detections in {parity.images} images are the same, {alone} are not"
