"""Runner: makes the nodes of a plan that are not done yet, in order; some side by side, if the config says so.

for each step: done? -> next | wait for whoever makes it | adopt what older code made | run the stage, publish
                                                                                      | have it done elsewhere, publish
"""

import errno
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import log
from pipeline.adoption import MadeFrom, adoptable, refusal
from pipeline.beside import Beside
from pipeline.errors import PipelineError, UserError, Waiting
from pipeline.plan import Step, done
from pipeline.store import Finished, Store

if TYPE_CHECKING:
    from pipeline.artifact import Artifact
    from pipeline.graph import Node
    from pipeline.target import Target

_logger = logging.getLogger("pipeline.runner")
_WAITS = "it waits for work on another machine"


@dataclass
class Outcome:
    """What a run came to, by node: the artifacts in order, what waits for another machine and what is to be done about
    it, and the nodes left out behind one of these or behind a failed gate, with the reason."""

    finished: dict[str, Finished] = field(default_factory=dict)
    waiting: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def failures(self) -> list[str]:
        """The gates that failed, with their node."""
        return [f"{name}: {failure}" for name, made in self.finished.items() for failure in made.failures]


@dataclass(frozen=True)
class Runner:
    """Runs plans against a store.

    `force` and `keep_older_code` are node names; `process` is what provenance says of this process. `nodes` may lack
    what is done already. With `beside`, stages that may run side by side are made by its processes. `targets` are the
    other machines that nodes name.
    """

    store: Store
    nodes: Mapping[str, "Node"]
    process: Mapping[str, Any]
    force: frozenset[str] = frozenset()
    keep_older_code: frozenset[str] = frozenset()
    beside: Beside | None = None
    targets: Mapping[str, "Target"] = field(default_factory=dict)

    def run(self, steps: Sequence[Step]) -> Outcome:
        """Make what is not done. Raises what a stage raises, with the node's name noted on it; what is done stays."""
        self._refuse_early(steps)
        outcome, pending = Outcome(), list(steps)
        with self.beside or nullcontext():
            while pending or self._busy:
                # Those that run side by side start as soon as they can; all else is made when nothing else runs.
                startable = (step for step in pending if self._ready(step, outcome) and not self._waits(step))
                step = next(startable, None)
                if step is None:
                    self._join(steps, outcome)
                    continue
                pending.remove(step)
                self._advance(step, outcome)
        order = [step.name for step in steps]
        outcome.finished = {name: outcome.finished[name] for name in order if name in outcome.finished}
        return outcome

    @property
    def _busy(self) -> bool:
        return self.beside is not None and self.beside.busy

    def _helped(self, step: Step) -> bool:
        """Whether a process of its own makes this step."""
        apart = self.beside is not None and self.beside.jobs > 1 and step.name not in self.keep_older_code
        return apart and step.name in self.nodes and self.nodes[step.name].stage.side_by_side

    @staticmethod
    def _ready(step: Step, outcome: Outcome) -> bool:
        settled = {*outcome.finished, *outcome.waiting, *outcome.left_out}
        return all(name in settled for name in step.feeding)

    def _waits(self, step: Step) -> bool:
        """Whether a step that is ready has to wait for processes that run."""
        assert self.beside or not self._busy
        return self._busy and not (self._helped(step) and self.beside is not None and self.beside.free)

    def _advance(self, step: Step, outcome: Outcome) -> None:
        """Leave a step out, find it done, make it, start the process that makes it, or note that it waits."""
        blocked = [name for name in step.feeding if name not in outcome.finished or outcome.finished[name].failures]
        if blocked:
            waits = all(name in outcome.waiting or outcome.left_out.get(name) == _WAITS for name in blocked)
            outcome.left_out[step.name] = _WAITS if waits else "a gate before it failed"
            _logger.info("%s: left out, because of %s", step.name, ", ".join(blocked))
            return
        finished = None if step.name in self.force else done(step, self.store, _contents(outcome))
        if finished is not None:
            _logger.info("%s: done before (%s)", step.name, finished.directory.name)
        elif self.beside and self._helped(step):
            self.beside.start(step)
            return
        else:
            try:
                finished = self._obtain(step, outcome)
            except Waiting as waiting:  # what does not hang on it goes on: one way to the machine, not several
                outcome.waiting[step.name] = str(waiting)
                return
        self._finish(step, finished, outcome)

    def _finish(self, step: Step, finished: Finished, outcome: Outcome) -> None:
        outcome.finished[step.name] = finished
        self.store.link_latest(step.name, finished.directory)

    def _join(self, steps: Sequence[Step], outcome: Outcome) -> None:
        """Wait for a process that makes a step, and take up what it made."""
        assert self.beside
        name = self.beside.wait()
        step = next(step for step in steps if step.name == name)
        finished = done(step, self.store, _contents(outcome))
        if finished is None:
            raise PipelineError(
                f"{name}: its process ended well and left no artifact; was the store changed meanwhile?"
            )
        self._finish(step, finished, outcome)

    def make(self, step: Step, steps: Sequence[Step]) -> None:
        """Make one step of `steps`, all of whose inputs are done, here."""
        outcome = Outcome()
        for fed in (other for other in steps if other.name in step.feeding):
            finished = self.store.finished(fed.uses, fed.key)
            if finished is None:
                raise UserError(f"{step.name}: its input {fed.name} is gone; give the same command again")
            outcome.finished[fed.name] = finished
        self._obtain(step, outcome)

    def _obtain(self, step: Step, outcome: Outcome) -> Finished:
        """Make a step under its lock, unless another process has while we waited."""
        waited = False

        def waiting() -> None:
            nonlocal waited
            waited = True
            _logger.info("%s: waiting for another run that makes %s-%s", step.name, step.uses, step.key[:16])

        directory = self.store.directory(step.uses, step.key)
        try:
            with self.store.lock(directory.name, waiting):
                finished = done(step, self.store, _contents(outcome))
                if finished and (waited or step.name not in self.force):
                    _logger.info("%s: made meanwhile (%s)", step.name, directory.name)
                    return finished
                if directory.exists() and (damage := self.store.damage(directory)):
                    _logger.warning("%s: %s; it is made again", step.name, damage)
                inputs = made_from(step, _contents(outcome))
                if step.name not in self.keep_older_code:
                    return self._make(step, inputs, outcome)
                older = adoptable(step, inputs, self.store)
                if older is None:
                    raise UserError(refusal(step, inputs, self.store))
                return self._adopt(step, older, inputs)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            place = error.filename or self.store.root
            raise UserError(
                f"{step.name}: the disk is full at {place}; nothing finished was lost: free some space "
                "(`pipeline clean` lists what no config needs) and give the same command again"
            ) from error

    def _refuse_early(self, steps: Sequence[Step]) -> None:
        """Raise UserError when no artifact can be kept, whatever the inputs: before hours are spent on these."""
        kept = [step for step in steps if step.name in self.keep_older_code]
        missing = [step for step in kept if not self.store.finished(step.uses, step.key)]
        refused = [step for step in missing if not adoptable(step, None, self.store)]
        if refused:
            raise UserError("\n".join(refusal(step, None, self.store) for step in refused))

    def _make(self, step: Step, made_from: MadeFrom, outcome: Outcome) -> Finished:
        """Run the stage in its partial directory and publish what it returns; hold the lock."""
        node = self.nodes[step.name]
        fresh, forced = bool(step.target) or not node.stage.resumes, step.name in self.force
        partial = self.store.begin(step.uses, step.key, fresh=fresh, inputs=made_from, forced=forced)
        resumed = any(partial.iterdir())
        started, clock = datetime.now(timezone.utc), time.monotonic()
        with log.to_file(partial / "run.log"):
            _logger.info("%s: %s %s", step.name, "going on with" if resumed else "running", step.uses)
            try:
                result, there = self._result(step, node, partial, outcome)
            except Waiting as waiting:
                waiting.node = step.name
                _logger.info("%s: %s", step.name, waiting, extra=log.FILE_ONLY)
                raise
            except PipelineError as error:
                error.node = step.name
                _logger.error("%s: %s", step.name, error, extra=log.FILE_ONLY)
                raise
            except Exception as error:
                error.add_note(f"while running the node {step.name} in {partial}")
                _logger.exception("%s: failed", step.name, extra=log.FILE_ONLY)
                raise
            seconds = time.monotonic() - clock
            _logger.info("%s: made in %s (%s)", step.name, log.duration(seconds), partial.name)
        provenance = {
            **_described(step, made_from),
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(seconds, 3),
            "resumed": resumed,
            **self.process,
            **({"target": {"name": step.target, "device": there}} if there is not None else {}),
        }
        record = result.model_dump_json(indent=1).encode() + b"\n"
        incidental, scratch = node.stage.produces.incidental, node.stage.scratch
        return self.store.publish(step.uses, step.key, record, provenance, incidental, scratch=scratch)

    def _result(
        self, step: Step, node: "Node", partial: Path, outcome: Outcome
    ) -> tuple["Artifact", dict[str, Any] | None]:
        """Run a node's stage here, or have it done on its target; then also what that machine says it is."""
        inputs = self._inputs(step, outcome)
        if not step.target:
            return node.stage.run(node.config, partial, inputs), None
        from pipeline.target import Place

        place = Place(step.target, self.targets[step.target], self.store)
        return place.do(node, partial, self.store.work(step.uses, step.key), inputs)

    def _inputs(self, step: Step, outcome: Outcome) -> dict[str, Any]:
        """Return the artifacts for the stage's slots, placed and named."""
        node, keys = self.nodes[step.name], step.input_keys

        def load(fed: "Node") -> "Artifact":
            return fed.produces.load(outcome.finished[fed.name].directory, name=fed.name, key=keys[fed.name])

        loaded: dict[str, Any] = {}
        for slot, taken in node.stage.slots.items():
            artifacts = [load(fed) for fed in node.feeding(slot)]
            loaded[slot] = artifacts if taken.many else artifacts[0] if artifacts else None
        return loaded

    def _adopt(self, step: Step, older: Finished, made_from: MadeFrom) -> Finished:
        """Publish what older code made under the step's key, by links, and say so in its provenance."""
        before = older.provenance
        partial = self.store.begin(step.uses, step.key, fresh=True, inputs=made_from)
        for name in older.files:
            if name != "provenance.json":
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                _link(older.directory / name, partial / name)
        adopted = before.get("adopted_from") or {"key": before["key"], "code": before["parts"]["code"]}
        provenance = {**before, **_described(step, made_from), "adopted_from": adopted}
        _logger.warning("%s: keeps what older code made (%s)", step.name, older.directory.name)
        record = (older.directory / "artifact.json").read_bytes()
        # With the content it had: what older code made from it may be kept as well.
        return self.store.publish(step.uses, step.key, record, provenance, (), older.content)


def _contents(outcome: Outcome) -> dict[str, str]:
    return {name: finished.content for name, finished in outcome.finished.items()}


def made_from(step: Step, contents: Mapping[str, str]) -> MadeFrom:
    """Return the inputs of a step as provenance records them, from the contents by node name."""
    keys = step.input_keys
    return {
        slot: [{"node": name, "key": keys[name], "content": contents[name]} for name in names]
        for slot, names in step.inputs.items()
    }


def _described(step: Step, made_from: MadeFrom) -> dict[str, Any]:
    return {
        "node": step.name,
        "uses": step.uses,
        "key": step.key,
        "parts": dict(step.parts),
        "settings": dict(step.settings),
        "inputs": dict(made_from),
    }


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
