"""The CLI of a released model: deploy predict | validate | benchmark | verify | inspect | build | work.

Exit codes: 0 all is well, 1 a bug, 2 something given is wrong, 3 a verdict failed, 130 interrupted. JSON goes to
standard output, all that is meant for people but a command's own table to standard error. A command imports only what
it needs: a device pays for every import.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.errors import DeployError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from deploy.predictor import Predictor


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; a user's error is one line on standard error."""
    parsed = _parser().parse_args(arguments)
    try:
        code: int = parsed.command(parsed)
    except DeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return code


def predict(arguments: argparse.Namespace) -> int:
    """Prints `[{image, detections: [{box_xyxy, score, label, class}]}]` of the images that could be read.

    An image that cannot be read is named on standard error and left out; the exit code is 2 then, and the others are
    there.
    """
    unreadable = 0
    rows = []
    if arguments.score is not None and not 0 <= arguments.score <= 1:
        raise DeployError(f"--score: a number from 0 to 1 is wanted, given {arguments.score}")
    with _open(arguments) as predictor:
        classes = predictor.contract.classes
        for file, drawing in zip(arguments.images, _drawing_names(arguments.images), strict=True):
            try:
                image = predictor.decode(file)
            except DeployError as error:
                print(f"error: {error}", file=sys.stderr)
                unreadable += 1
                continue
            (detections,) = predictor([image], arguments.score)
            rows.append({"image": file, "detections": detections.to_list(classes)})
            if not arguments.json:
                print(f"{file}: {_counted([classes[label] for label in detections.labels])}", file=sys.stderr)
            if arguments.out:
                from deploy.drawing import draw

                _save(draw(image, detections, classes), arguments.out / drawing)
    print(json.dumps(rows, indent=None if arguments.json else 1))
    return 2 if unreadable else 0


def validate(arguments: argparse.Namespace) -> int:
    """Prints the COCO statistics of the model on a dataset; 3 when AP is below --min-ap."""
    from deploy.accuracy import STATISTICS, evaluate_predictor

    with _open(arguments) as predictor:
        accuracy, _ = evaluate_predictor(
            predictor,
            arguments.images,
            arguments.annotations,
            arguments.evaluator,
            progress=None if arguments.json else _progress,
        )
    if arguments.json:
        print(json.dumps(accuracy.to_dict(), indent=1))
    else:
        for name in STATISTICS:
            print(f"{name:24}{_number(getattr(accuracy, name))}")
        for name, ap in accuracy.per_class.items():
            print(f"AP of {name:18}{_number(ap)}")
        print(f"{accuracy.images} images, {accuracy.evaluator} {accuracy.version}")
    if arguments.min_ap is not None and (accuracy.ap is None or accuracy.ap < arguments.min_ap):
        print(f"failed: AP {_number(accuracy.ap).strip()} is below {arguments.min_ap}", file=sys.stderr)
        return 3
    return 0


def benchmark(arguments: argparse.Namespace) -> int:
    """Prints the latency of each step; of the bundle's own sample when no images are given."""
    from deploy.latency import PERCENTILES, measure

    images = [Path(file) for file in arguments.images]
    if not images:
        from deploy.bundle import Bundle

        sample = Bundle.open(arguments.bundle).sample if Path(arguments.bundle).is_dir() else None
        if sample is None:
            raise DeployError(f"{arguments.bundle}: it has no sample image; give images to measure with")
        images = [sample[0]]
    with _open(arguments) as predictor:
        latency = measure(predictor, images, arguments.warmup, arguments.iterations)
    if arguments.json:
        print(json.dumps(latency.to_dict(), indent=1))
        return 0
    print(f"{'ms':14}{'mean':>9}" + "".join(f"{f'p{percent}':>9}" for percent in PERCENTILES))
    for name, timing in latency.steps.items():
        values = [timing.mean, *(getattr(timing, f"p{percent}") for percent in PERCENTILES)]
        print(f"{name:14}" + "".join(f"{'-' if value is None else f'{value:.2f}':>9}" for value in values))
    memory = "" if latency.peak_rss_bytes is None else f", peak memory {latency.peak_rss_bytes / 2**20:.0f} MiB"
    print(f"{latency.iterations} calls of one image after {latency.warmup} to warm up{memory}")
    print(", ".join(f"{name} {value}" for name, value in latency.backend.items()))
    if any(timing.p99 is None for timing in latency.steps.values()):
        print("-: too few calls for this percentile (p90 wants 100, p95 200, p99 1,000); see --iterations")
    if not latency.reliable:
        print("unreliable: " + "; ".join(latency.reasons))
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Prints one line a check; 3 when one fails."""
    from deploy.bundle import verify as checks_of

    if not Path(arguments.bundle).is_dir():
        raise DeployError(f"{arguments.bundle}: a bundle's folder is wanted")
    checks = checks_of(arguments.bundle, **_settings(arguments))
    words = {True: "ok", False: "FAILED", None: "-"}
    if arguments.json:
        print(json.dumps([vars(check) for check in checks], indent=1))
    else:
        for check in checks:
            print(f"{words[check.passed]:8}{check.name:10}{check.detail}")
    return 3 if any(check.passed is False for check in checks) else 0


def inspect(arguments: argparse.Namespace) -> int:
    """Prints what a bundle says of itself, or the contract in an exported file."""
    if Path(arguments.bundle).is_dir():
        from deploy.bundle import Bundle

        print(json.dumps(Bundle.open(arguments.bundle).release, indent=1))
        return 0
    with _open(arguments) as predictor:
        described = {"contract": json.loads(predictor.contract.to_json()), "backend": predictor.backend.identity()}
    print(json.dumps(described, indent=1))
    return 0


def work(arguments: argparse.Namespace) -> int:
    """Does the work in folders that were carried here; what is done already stays."""
    from deploy.work import do, do_one

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the task that runs is ended too
    try:
        for folder in arguments.folders:
            if arguments.task is None:
                do(folder.absolute(), lambda line: print(line, file=sys.stderr, flush=True))
            else:
                do_one(folder.absolute(), arguments.task)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def build(arguments: argparse.Namespace) -> int:
    """Builds an engine from an ONNX file and prints its sidecar's words on what was asked for and what was made."""
    from deploy.backend import build_engine

    made = build_engine(arguments.onnx, arguments.engine, arguments.backend, **_given(arguments.set))
    if arguments.json:
        print(json.dumps(made, indent=1))
        return 0
    print(f"{arguments.engine}: {made['engine_bytes'] / 1e6:.1f} MB, {made['backend']}, for {made['made_for']}")
    print(f"{made['settings']['precision']}: {made['census']['sentence']}")
    return 0


def _given(settings: Sequence[str]) -> dict[str, Any]:
    """`name=value` with JSON values; what is no JSON is text."""
    found: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise DeployError(f"--set: NAME=VALUE is wanted, given {setting}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deploy", description="Run, check and measure a released detector.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(command: Any, bundle: str = "a bundle's folder, or an exported file with its contract") -> Any:
        one = commands.add_parser(command.__name__, help=command.__doc__.split("\n")[0], description=command.__doc__)
        one.set_defaults(command=command)
        one.add_argument("bundle", metavar="BUNDLE", help=bundle)
        one.add_argument("--backend", help="the runtime (default: the engine's own, or onnxruntime)")
        one.add_argument("--provider", help="what the runtime computes on, such as cpu or cuda (default: its own)")
        one.add_argument("--threads", type=int, help="threads of one operator (default: the cores of this process)")
        one.add_argument("--json", action="store_true", help="JSON and nothing else on standard output")
        return one

    one = add(predict)
    one.add_argument("images", metavar="IMAGE", nargs="+")
    one.add_argument("--score", type=float, help="lowest score shown (default: the contract's)")
    one.add_argument("--out", type=Path, metavar="DIR", help="also draw the detections into images there")
    one = add(validate)
    one.add_argument("--images", type=Path, required=True, metavar="DIR")
    one.add_argument("--annotations", type=Path, required=True, metavar="JSON", help="COCO annotations")
    one.add_argument("--min-ap", type=float, help="exit with 3 below this AP, from 0 to 1")
    one.add_argument("--evaluator", choices=("hotcoco", "pycocotools"), default="hotcoco")
    one = add(benchmark)
    one.add_argument("images", metavar="IMAGE", nargs="*", help="default: the bundle's sample")
    one.add_argument("--iterations", type=int, default=200)
    one.add_argument("--warmup", type=int, default=10, help="calls at least that do not count")
    add(verify, "a bundle's folder")
    add(inspect)
    one = commands.add_parser("work", help=work.__doc__, description=work.__doc__)
    one.set_defaults(command=work)
    one.add_argument("folders", metavar="FOLDER", nargs="+", type=Path, help="a folder with work.json")
    one.add_argument("--task", help=argparse.SUPPRESS)  # this one alone, in this process
    one = commands.add_parser("build", help="build an engine", description=build.__doc__)
    one.set_defaults(command=build)
    one.add_argument("onnx", type=Path, metavar="ONNX", help="an exported file with its contract")
    one.add_argument("engine", type=Path, metavar="ENGINE", help="the file to write; its sidecar lies beside it")
    one.add_argument("--backend", required=True, help="such as tensorrt, tensorrt_rtx or openvino")
    one.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of its build, as JSON")
    one.add_argument("--json", action="store_true", help="print the whole sidecar")
    return parser


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    chosen = {name: getattr(arguments, name) for name in ("backend", "provider", "threads")}
    return {name: value for name, value in chosen.items() if value is not None}


def _open(arguments: argparse.Namespace) -> Predictor:
    from deploy.predictor import Predictor

    return Predictor.open(arguments.bundle, **_settings(arguments))


def _drawing_names(images: Sequence[str]) -> list[str]:
    """Each image's own name as PNG; where two have one name, with their places in front."""
    stems = [Path(image).stem for image in images]
    return [
        f"{stem}.png" if stems.count(stem) == 1 else f"{place:04}-{stem}.png" for place, stem in enumerate(stems, 1)
    ]


def _save(image: Image.Image, file: Path) -> None:
    partial = file.with_name(f".{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(partial, format="PNG")
        partial.replace(file)
    except OSError as error:
        raise DeployError(f"{file}: the drawing cannot be written ({error}); choose another --out") from error


def _counted(names: Sequence[str]) -> str:
    counts = {name: list(names).count(name) for name in dict.fromkeys(names)}
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing found"


def _number(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:.4f}':>8}"


def _progress(done: int, of: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done} of {of} images", end="\n" if done == of else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
