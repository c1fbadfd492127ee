"""The commands of `pipeline`. What is slow to import is imported by the command that needs it."""

import signal
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from pipeline import log
from pipeline.digest import Digests
from pipeline.errors import ConfigError, Interrupted, UserError, Waiting
from pipeline.plan import Memory, Plan, Step, complete, read
from pipeline.store import Store

if TYPE_CHECKING:
    from pipeline.graph import Graph

F = TypeVar("F", bound=Callable[..., Any])

_PATH = click.Path(path_type=Path)
_store = click.option("--store", "root", type=_PATH, default="runs", show_default=True, help="Where artifacts lie.")
_package = click.option("--package", default="stages", hidden=True)
_overrides = click.option(
    "--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change a setting, as stages.student.epochs=1."
)
_to = click.option("--to", multiple=True, metavar="STAGE", help="Only this stage and what feeds it.")
_config = click.argument("config", type=_PATH)


def _options(*options: Callable[[F], F]) -> Callable[[F], F]:
    def apply(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


class _Workplace:
    """A store, and the plans of configs against it, remembered or made."""

    def __init__(self, root: Path, package: str) -> None:
        self.store = Store(root)
        self.memory = Memory(self.store, package)
        self._digests = Digests(self.store.root / ".digests.json")
        self._package = package

    def recall(self, config: Path, overrides: tuple[str, ...]) -> Plan | None:
        """Return the remembered plan of a config, if nothing has changed since; no stage is imported."""
        return self.memory.recall(read(config), overrides, self._digests)

    def make(self, config: Path, overrides: tuple[str, ...]) -> tuple[Plan, "Graph"]:
        """Return the plan of a config, made anew and remembered, and its graph. Raises ConfigError."""
        from pipeline import graph, plan

        text = read(config)
        loaded = graph.load(config, overrides, self._package)
        made = plan.make(loaded, self._digests, self._package)
        self.memory.remember(text, overrides, made)
        self._digests.save()
        return made, loaded

    def plan(self, config: Path, overrides: tuple[str, ...] = ()) -> Plan:
        """Return the remembered plan of a config, or a new one."""
        return self.recall(config, overrides) or self.make(config, overrides)[0]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def pipeline() -> None:
    """Run a config: a graph of stages whose results are kept and found again by what made them."""


@pipeline.command()
@_options(_config, _overrides, _to, _store, _package)
@click.option("--force", multiple=True, metavar="STAGE", help="Make this stage's result again and replace it.")
@click.option(
    "--keep-older-code", multiple=True, metavar="STAGE", help="Keep what older code of this stage made, and record so."
)
def run(
    config: Path,
    overrides: tuple[str, ...],
    to: tuple[str, ...],
    root: Path,
    package: str,
    force: tuple[str, ...],
    keep_older_code: tuple[str, ...],
) -> int:
    """Make every result of CONFIG that is not there yet."""
    from pipeline.beside import Beside
    from pipeline.listing import outcome_lines
    from pipeline.provenance import of_process
    from pipeline.runner import Runner

    signal.signal(signal.SIGTERM, _interrupt)
    log.to_console()
    try:
        place = _Workplace(root, package)
        plan = place.recall(config, overrides)
        graph: Graph | None = None
        if not plan or force or keep_older_code or not complete(plan.upto(plan.select(to, "--to")), place.store):
            plan, graph = place.make(config, overrides)
        steps = plan.upto(plan.select(to, "--to"))
        again, keep = plan.select(force, "--force"), plan.select(keep_older_code, "--keep-older-code")
        outside = (again | keep) - {step.name for step in steps}
        if outside:
            raise ConfigError(
                [f"--to: does not reach {', '.join(sorted(outside))}, given to --force or --keep-older-code"]
            )
        # Without a graph everything is done already, and nothing will need to know about this process.
        process = of_process(_code(package)) if graph else {}
        options = [f"--store={root}", f"--package={package}", *(f"--set={setting}" for setting in overrides)]
        beside = Beside(graph.jobs if graph else 1, lambda step: _making(config, step, options, step.name in again))
        nodes, targets = (graph.by_name, graph.targets) if graph else ({}, {})
        outcome = Runner(place.store, nodes, process, again, keep, beside, targets).run(steps)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; what is finished stays, the same command continues") from None
    for line in outcome_lines(outcome, place.store):
        click.echo(line)
    for failure in outcome.failures:
        click.echo(f"failed: {failure}", err=True)
    for name, what in outcome.waiting.items():
        click.echo(f"{name}: {what}", err=True)
    return 3 if outcome.failures else Waiting.exit_code if outcome.waiting else 0


def _making(config: Path, step: Step, options: list[str], force: bool) -> list[str]:
    """Return the command line that makes one step whose inputs are there."""
    command = [sys.executable, "-m", "pipeline", "make", str(config), step.name, step.key, *options]
    return [*command, "--force"] if force else command


@pipeline.command(hidden=True)
@_options(_config, _overrides, _store, _package)
@click.argument("name")
@click.argument("key")
@click.option("--force", is_flag=True)
def make(config: Path, name: str, key: str, overrides: tuple[str, ...], root: Path, package: str, force: bool) -> None:
    """Make one node whose inputs are there: what `run` starts side by side."""
    from pipeline.beside import stop_with_parent
    from pipeline.provenance import of_process
    from pipeline.runner import Runner

    signal.signal(signal.SIGTERM, _interrupt)
    stop_with_parent()
    log.to_console()
    try:
        place = _Workplace(root, package)
        plan, graph = place.make(config, overrides)
        step = next((step for step in plan.steps if step.name == name), None)
        if step is None or step.key != key:
            raise UserError(f"{name}: config or code changed since the run began; give the same command again")
        again = frozenset([name] if force else [])
        Runner(place.store, graph.by_name, of_process(_code(package)), again).make(step, plan.steps)
    except KeyboardInterrupt:
        raise Interrupted("interrupted") from None


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _code(package: str) -> Path | None:
    """Return the folder of the stages' package, without importing it."""
    spec = find_spec(package.partition(".")[0])
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


@pipeline.command()
@_options(_config, _overrides, _to, _store, _package)
def plan(config: Path, overrides: tuple[str, ...], to: tuple[str, ...], root: Path, package: str) -> None:
    """Say what of CONFIG is done and what would run, and how long that took last time."""
    from pipeline.listing import plan_lines

    place = _Workplace(root, package)
    planned = place.plan(config, overrides)
    for line in plan_lines(planned.upto(planned.select(to, "--to")), place.store):
        click.echo(line)


@pipeline.command()
@_config
@click.argument("stage", required=False)
@_options(_overrides, _store, _package)
@click.option("--verify", is_flag=True, help="Read every file again and compare its hash.")
def show(config: Path, stage: str | None, overrides: tuple[str, ...], root: Path, package: str, verify: bool) -> int:
    """Show how the results of CONFIG, or of one STAGE of it, were made, and their files."""
    from pipeline.listing import show_lines

    place = _Workplace(root, package)
    planned = place.plan(config, overrides)
    wanted = planned.select([stage], "show") if stage else frozenset(step.name for step in planned.steps)
    steps = [step for step in planned.steps if step.name in wanted]
    for line in show_lines(steps, place.store):
        click.echo(line)
    if not verify:
        return 0
    directories = [made.directory for step in steps if (made := place.store.finished(step.uses, step.key))]
    wrong = [line for directory in directories for line in place.store.verify(directory)]
    for line in wrong:
        click.echo(f"{line}; make it again with --force", err=True)
    if not wrong:
        click.echo(f"verified: every file of {len(directories)} artifacts has the hash it was published with")
    return 3 if wrong else 0


@pipeline.command()
@click.argument("names", nargs=-1, metavar="[STAGE]...")
@_package
def stages(names: tuple[str, ...], package: str) -> None:
    """List the stages there are, and the machines of `targets`, with every setting, its default and its meaning."""
    from pipeline import lookup
    from pipeline.settings import stage_lines, target_lines

    for name in names or lookup.names(package):
        for line in stage_lines(package, name):
            click.echo(line)
    for line in target_lines() if not names else ():
        click.echo(line)


@pipeline.command()
@click.argument("configs", nargs=-1, required=True, type=_PATH)
@_options(_overrides, _store, _package)
def check(configs: tuple[Path, ...], overrides: tuple[str, ...], root: Path, package: str) -> None:
    """Check CONFIGS without running anything: every problem, one line each. Of the user's own data a picture is drawn."""
    from pipeline import graph

    def problems(config: Path) -> list[str]:
        try:
            loaded = graph.load(config, overrides, package)
            click.echo(f"{config}: fine, {len(loaded.nodes)} nodes")
            for node in loaded.nodes:
                for line in node.stage.show(node.config, root / "check" / config.stem / node.name):
                    click.echo(f"{node.name}: {line}")
        except ConfigError as error:
            return error.problems if len(configs) == 1 else [f"{config}: {line}" for line in error.problems]
        except UserError as error:
            return [f"{config}: {line}" for line in str(error).splitlines()]
        return []

    found = [problem for config in configs for problem in problems(config)]
    if found:
        raise ConfigError(found)


@pipeline.command()
@click.argument("configs", nargs=-1, required=True, type=_PATH)
@_options(_store, _package)
@click.option("--yes", is_flag=True, help="Delete; without it nothing is touched.")
def clean(configs: tuple[Path, ...], root: Path, package: str, yes: bool) -> None:
    """List, and with --yes delete, the artifacts that none of CONFIGS reaches.

    Every config whose results you want to keep must be named. What the same config with other --set made by today's
    code is kept too, and so is what another run is making at this moment.
    """
    from pipeline.cleaning import remove, unreached
    from pipeline.listing import size

    place = _Workplace(root, package)
    plans = [place.plan(config) for config in configs]
    plans += [variant for config in configs for variant in place.memory.variants(read(config))]
    found = unreached(place.store, plans)
    if yes:
        place.memory.forget_outdated()
    removed = 0
    for directory, count in found:
        if yes and not remove(place.store, directory):
            click.echo(f"kept, in use: {directory.name}")
            continue
        removed += count
        click.echo(
            f"{'deleted' if yes else 'would delete'} {size(count):>9}  {directory.relative_to(place.store.root)}"
        )
    click.echo(f"{size(removed)} {'freed' if yes else 'would be freed; add --yes to delete'}")


@pipeline.command()
@click.argument("folder", type=_PATH)
@click.option("--out", type=_PATH, default="my_detector.yaml", show_default=True, help="The config to write.")
@click.option("--coco", "source", flag_value="coco", help="The folder holds COCO JSON files.")
@click.option("--voc", "source", flag_value="voc", help="The folder holds Pascal VOC XML files.")
@click.option("--yolo", "source", flag_value="yolo", help="The folder holds a data.yaml and text files.")
@click.option(
    "--gflops", type=click.FloatRange(min=0, min_open=True), help="The most operations of the student, in 10^9."
)
@click.option("--target", metavar="NAME|USER@HOST", help="A machine on which the student is measured too.")
@click.option("--train-images", type=_PATH, help="COCO: the folder of the training images.")
@click.option("--train-annotations", type=_PATH, help="COCO: their JSON.")
@click.option("--val-images", type=_PATH, help="COCO: the folder of the validation images.")
@click.option("--val-annotations", type=_PATH, help="COCO: their JSON.")
@_package
def init(folder: Path, out: Path, package: str, **options: Any) -> None:
    """Write a commented config for your own data in FOLDER; the format is found out where no option says it."""
    if out.exists():
        raise ConfigError([f"{out}: is there already; name another file with --out, or remove it"])
    for line in import_module(f"{package}.starting.starter").write(folder, out, **options):
        click.echo(line)
