"""The CLI of a released model: deploy predict | validate | benchmark | verify | inspect | convert | build | work.

Exit codes: 0 all is well, 1 a bug, 2 something given is wrong, 3 a verdict failed, 130 interrupted. JSON goes to
standard output, all that is meant for people but a command's own table to standard error. A command imports only what
it needs: a device pays for every import.
"""

from __future__ import annotations

import argparse
import io
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
    """Prints the latency of each step, for every batch and every number of threads; of the bundle's own sample when no
    images are given.

    With --json an object, or a list of them when there are several batches or numbers of threads. `at_rate` is null
    unless --rate asks for it.
    """
    from deploy.latency import forget_peak, measure, table

    images = [Path(file) for file in arguments.images]
    if not images:
        from deploy.bundle import Bundle

        sample = Bundle.open(arguments.bundle).sample_image if Path(arguments.bundle).is_dir() else None
        if sample is None:
            raise DeployError(f"{arguments.bundle}: it has no sample image; give images to measure with")
        images = [sample]
    combinations = [(batch, threads) for threads in arguments.threads or [None] for batch in arguments.batch]
    found = []
    for batch, arguments.threads in combinations:
        if len(combinations) > 1:
            forget_peak()
        with _open(arguments) as predictor:
            latency = measure(predictor, images, arguments.warmup, arguments.iterations, batch)
            at_rate = _at_rate(predictor, images, arguments) if arguments.rate is not None else None
        found.append(latency.to_dict() | {"at_rate": at_rate})
        if not arguments.json:
            print("\n".join(table(latency)))
            print(_told(at_rate) if at_rate else "", end="\n" if at_rate or len(combinations) > 1 else "")
    if arguments.json:
        print(json.dumps(found[0] if len(found) == 1 else found, indent=1))
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Prints one line a check; 3 when one fails."""
    from deploy.verification import verify as checks_of

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
    """Prints a bundle's models, what was measured on each, and which of them runs here; or an exported file's contract.

    With --json all of release.json as this release reads it.
    """
    if not Path(arguments.bundle).is_dir():
        with _open(arguments) as predictor:
            described = {"contract": json.loads(predictor.contract.to_json()), "backend": predictor.backend.identity()}
        print(json.dumps(described, indent=1))
        return 0
    from deploy.bundle import Bundle
    from deploy.selection import judge, this_device

    bundle = Bundle.open(arguments.bundle)
    if arguments.json:
        print(json.dumps(bundle.release, indent=1))
        return 0
    release = bundle.release
    print(f"{release['name']}, {len(release['classes'])} classes, licence {release['licence']}, {release['created']}")
    rows = [("file", "backend", "precision", "AP", "MB", "on this device")]
    for place, one in enumerate(judge(bundle.models, this_device(bundle.models))):
        ap = ((one.model.accuracy or {}).get("statistics") or {}).get("ap")
        size = release["files"][one.model.file]["size"] / 1e6
        backend = one.model.backend + (f" {one.provider}" if one.provider else "")
        taken = "taken: " if place == 0 and not one.refused else ""
        ap_text = "-" if ap is None else f"{ap:.4f}"
        rows.append((one.model.file, backend, one.model.precision, ap_text, f"{size:.2f}", taken + one.sentence()))
        if one.refused and one.model.rebuild:
            rows.append(("", "", "", "", "", f"make one for it: {one.model.rebuild}"))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        print("  ".join(f"{value:{width}}" for value, width in zip(row, [*widths, 0], strict=True)).rstrip())
    return 0


def convert(arguments: argparse.Namespace) -> int:
    """Writes a model of a bundle as the configuration of a server: a Triton model repository, or DeepStream's nvinfer.

    The folder's README.md says what was never tried, and what is still to be supplied.
    """
    from importlib import import_module

    from deploy.bundle import Bundle

    bundle = Bundle.open(arguments.bundle)
    model = bundle.model(arguments.model) if arguments.model else bundle.models[0]
    import_module(f"deploy.{arguments.to}").write(bundle, model, arguments.directory, arguments.max_batch)
    print(f"{arguments.directory}: {model.file} for {arguments.to}; read README.md there", file=sys.stderr)
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
    # With `prog`, argparse need not format the usage to know it, for which it would load 3 ms of modules.
    commands = parser.add_subparsers(required=True, metavar="COMMAND", prog="deploy")

    def add(
        command: Any, bundle: str = "a bundle's folder, or an exported file with its contract", runs: bool = True
    ) -> Any:
        one = commands.add_parser(command.__name__, help=command.__doc__.split("\n")[0], description=command.__doc__)
        one.set_defaults(command=command)
        one.add_argument("bundle", metavar="BUNDLE", help=bundle)
        default = "the fastest that runs here" if runs else "its first"
        one.add_argument("--model", metavar="FILE", help=f"a file of the bundle (default: {default})")
        if not runs:
            return one
        one.add_argument(
            "--backend", help="the runtime (default: that of the bundle's file or the engine, else onnxruntime)"
        )
        one.add_argument("--provider", help="what the runtime computes on, such as cpu or cuda (default: its own)")
        one.add_argument(
            "--threads",
            type=_numbers if command is benchmark else int,
            help="threads of one operator (default: the cores of this process)",
        )
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
    one.add_argument("--batch", type=_numbers, default=[1], metavar="N,...", help="images of one call (default: 1)")
    one.add_argument("--rate", type=float, help="also answer --iterations requests that come so often a second")
    add(verify, "a bundle's folder")
    add(inspect)
    one = add(convert, "a bundle's folder", runs=False)
    one.add_argument("directory", metavar="DIR", type=Path, help="a folder that does not exist yet")
    one.add_argument("--to", choices=("triton", "deepstream"), required=True)
    one.add_argument("--max-batch", type=int, help="largest batch of the server (default: 8, or an engine's own)")
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


def _numbers(text: str) -> list[int]:
    """`1,2,4` of a sweep."""
    return [int(part) for part in text.split(",")]


def _at_rate(predictor: Predictor, images: Sequence[Path], arguments: argparse.Namespace) -> dict[str, Any]:
    from deploy.arrivals import serve

    return serve(predictor, images, arguments.rate, arguments.iterations).to_dict()


def _told(at_rate: dict[str, Any]) -> str:
    values = [
        f"{name} {at_rate['response'][name]:.2f}" for name in ("p50", "p90", "p95", "p99") if at_rate["response"][name]
    ]
    line = f"at {at_rate['rate']:g} requests a second, ms from when each was due: {', '.join(values) or 'too few'}; "
    line += f"busy {100 * at_rate['busy']:.0f} % of the time"
    if not at_rate["kept_up"]:
        line += "; it did not keep up: the queue grew"
    return line + ("" if at_rate["reliable"] else "\nunreliable: " + "; ".join(at_rate["reasons"]))


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    chosen = {name: getattr(arguments, name) for name in ("model", "backend", "provider", "threads")}
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
    from deploy import atomic

    content = io.BytesIO()
    image.save(content, format="PNG")
    atomic.write(file, content.getvalue())


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
