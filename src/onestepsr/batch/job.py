"""Jobs on a Ray cluster: images enlarged into an output folder, and files measured for ``evaluate --ray``."""

from __future__ import annotations

import json
import logging
import os
import pickle
import posixpath
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch

from onestepsr import __version__
from onestepsr.batch.files import root_of, split_query
from onestepsr.batch.images import Item, Row, UpscaleImages, new_row
from onestepsr.batch.inputs import list_inputs
from onestepsr.batch.manifest import FLUSH_S, Manifest
from onestepsr.core.errors import MissingExtra, UserError, first_line
from onestepsr.evaluate.pairing import Case
from onestepsr.evaluate.run import Problem, Score, Scorer, score_files
from onestepsr.imaging.formats import EXTENSIONS, FORMATS

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Resources of a job on Ray."""

    address: str = "local"
    """local: a cluster on this machine for the time of the job; auto: the one that runs here; or ray://HOST:PORT;
    none: without Ray, in this process alone."""
    num_cpus: float = 1.0
    """Processor cores of one actor."""
    num_gpus: float = 0.0
    """GPUs of one actor; fractions share one."""
    actors: int | None = None
    """Actors; None for as many as the cluster has room for."""
    images: int = 16
    """Images in one task: what the loss of a machine repeats at most, per actor."""
    retries: int = 3
    """Rounds in which images that came back from no actor are tried again, before they count as failed."""

    def __post_init__(self) -> None:
        if self.num_cpus < 0 or self.num_gpus < 0 or self.num_cpus + self.num_gpus == 0:
            raise UserError(f"{self.num_cpus:g} CPUs and {self.num_gpus:g} GPUs per actor: accepted: more than none")
        if self.images < 1:
            raise UserError(f"{self.images} images per task: accepted: 1 and more")

    @property
    def lost(self) -> str:
        """The reason for images that come back from no actor."""
        return f"its process died in {self.retries + 1} tries"

    def spread(self, missing: dict[str, Row], actor: type, argument: Any) -> Generator[Row, None, None]:
        """Rows that actors of the class ``actor`` make of those of ``missing``, by "input"; what came is taken out.

        An actor is made with ``argument`` and called with tables of a task. It may die: what is left in ``missing`` at
        the end has taken its process with it in every round.
        """
        if not missing:
            return
        if self.address == "none":
            own = actor(argument)
            items = list(missing.values())
            for start in range(0, len(items), self.images):
                group = items[start : start + self.images]
                for row in own({name: [item[name] for item in group] for name in group[0]}).to_pylist():
                    del missing[row["input"]]
                    yield row
            return
        started = _connect(self.address)
        try:
            # Ray tries a task of a lost actor again, but it may use its tries up on a machine that is gone. Images that
            # come back from no actor have a round of their own, in the last one each by itself: only one that takes
            # its process with it is left then.
            for turn in range(self.retries + 1):
                alone = 0 < turn == self.retries
                for row in self._turn(list(missing.values()), 1 if alone else self.images, actor, argument):
                    if missing.pop(row["input"], None) is not None:
                        yield row
                if not missing:
                    return
                logger.warning("%d images came back from no actor", len(missing))
        finally:
            if started:
                import ray

                ray.shutdown()

    def _turn(self, items: list[Row], size: int, actor: type, argument: Any) -> Generator[Row, None, None]:
        """Rows that come back of ``items``, in tasks of ``size``."""
        import ray

        blocks = -(-len(items) // size)
        # Ray 2.60 to 2.63 take max_task_retries this way only, and warn that it will be a parameter.
        warnings.filterwarnings("ignore", category=ray.util.annotations.RayDeprecationWarning)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.max_errored_blocks = -1  # images of an actor that died too often are rows, not the end of the job
        dataset = ray.data.from_items(items, override_num_blocks=blocks).map_batches(
            actor,
            fn_constructor_args=(argument,),
            batch_size=None,  # a task is a block
            num_cpus=self.num_cpus or None,
            num_gpus=self.num_gpus or None,
            compute=ray.data.ActorPoolStrategy(size=self._actors(ray.cluster_resources(), blocks)),
            max_task_retries=1,
        )
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from batch.to_pylist()

    def _actors(self, resources: Mapping[str, float], blocks: int) -> int:
        """Actors for which the cluster has room; UserError if for none."""
        room = [
            int(resources.get(kind, 0) / each)
            for kind, each in (("CPU", self.num_cpus), ("GPU", self.num_gpus))
            if each > 0
        ]
        most = min(room)
        if most < 1:
            have = f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"
            wanted = f"{self.num_cpus:g} CPUs and {self.num_gpus:g} GPUs"
            raise UserError(f"the cluster has {have}, but one actor takes {wanted}")
        return max(1, min(self.actors or most, most, blocks))


@dataclass(kw_only=True)
class BatchJob:
    """All images of a folder, pattern or list into a folder; call :meth:`run`, again after an interruption."""

    source: str
    """Path or URI: see :func:`list_inputs`. Settings of its filesystem may follow a question mark."""
    output: str
    """Folder, local or on another filesystem; names below it mirror those of the inputs."""
    upscale: UpscaleImages = field(default_factory=UpscaleImages)
    cluster: Cluster = field(default_factory=Cluster)
    file_format: str = "keep"
    """Format of outputs; "keep" for that of the input, or PNG where that is only read."""
    column: str | None = None
    """Column of paths in a list."""
    overwrite: bool = False
    """Make every image anew, instead of those that are missing."""
    total: int = field(init=False, default=0)
    """Images of the job."""
    done: int = field(init=False, default=0)
    """Of these, those that earlier runs have made."""

    def plan(self) -> tuple[Manifest, list[tuple[str, str]], list[Row]]:
        """The manifest, (input, output) of images to make, and rows of those that cannot be; UserError in one line."""
        source, queries = split_query(self.source)
        output, more = split_query(self.output)
        self.upscale.queries.update({**queries, **more})
        listed = list_inputs(source, self.upscale.queries, self.column).outside(output)
        manifest = Manifest(output, self.upscale.queries)
        self.upscale.skip_existing = not self.overwrite
        rows = manifest.begin(self._description(), overwrite=self.overwrite)
        there = manifest.outputs() if rows else set()
        taken: dict[str, str] = {}
        pairs: list[tuple[str, str]] = []
        refused: list[Row] = []
        for path, name in zip(listed.inputs, listed.names, strict=True):
            target = f"{manifest.output}/{self._renamed(name)}"
            if target in taken:
                why = f"{path}: its output {target} is that of {taken[target]} already"
                refused.append({**new_row(path, None), "status": "failed", "error": why})
                continue
            taken[target] = path
            if rows.get(path, {}).get("status") not in ("written", "found") or target not in there:
                pairs.append((path, target))
        self.total = len(listed.inputs)
        self.done = self.total - len(pairs) - len(refused)
        return manifest, pairs, refused

    def run(self) -> Generator[Row, None, None]:
        """Make what is missing; yields the row of every image as it is finished. Close the generator to stop early."""
        manifest, pairs, waiting = self.plan()
        yield from waiting
        flushed, any_made = time.monotonic(), False
        try:
            with closing(self._made(pairs)) as made:
                for row in made:
                    any_made = True
                    waiting.append(row)
                    if time.monotonic() - flushed > FLUSH_S:
                        flushed = time.monotonic()
                        try:
                            manifest.add(waiting)
                            waiting = []
                        except UserError as error:  # a full disk, for the images too: the others may fit
                            logger.warning("%s; its rows wait", error)
                    yield row
        except UserError:
            if not any_made:  # such as a model that there is none of: the folder is not bound to it
                waiting = []
                manifest.forget()
            raise
        finally:
            manifest.add(waiting)
        manifest.end()

    def _made(self, pairs: Sequence[tuple[str, str]]) -> Generator[Row, None, None]:
        if self.cluster.address == "none":
            yield from self.upscale.rows([Item(row=new_row(path, target)) for path, target in pairs])
            return
        missing = {path: {"input": path, "path": path, "output": target} for path, target in pairs}
        yield from self.cluster.spread(missing, _Actor, self.upscale)
        for path, item in missing.items():
            yield {**new_row(path, item["output"]), "status": "failed", "error": f"{path}: {self.cluster.lost}"}

    def _renamed(self, name: str) -> str:
        stem, ending = posixpath.splitext(name)
        if self.file_format != "keep":
            return stem + FORMATS[self.file_format].endings[0]
        return name if ending.lower() in EXTENSIONS else stem + ".png"

    def _description(self) -> dict[str, Any]:
        """Everything that decides the outputs and their bytes."""
        hidden = ("prompt_embedding", "memory")
        options = {key: value for key, value in vars(self.upscale.options).items() if key not in hidden}
        source = split_query(self.source)[0]
        own = {
            "source": source.rstrip("/") if root_of(source) else os.path.abspath(source),
            "model": self.upscale.model,
            "dtype": self.upscale.dtype,
            "loading": self.upscale.loading,
            "options": options,
            "format": self.file_format,
            "strip_metadata": self.upscale.strip_metadata,
            "version": __version__,
        }
        return dict(json.loads(json.dumps(own)))


class _Actor:
    """An actor of Ray with one model."""

    def __init__(self, upscale: UpscaleImages) -> None:
        self.upscale = upscale
        _ = upscale.upscaler

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> Any:
        """Enlarge one task's images."""
        return self.upscale(batch)


class MeasureFiles:
    """An actor of Ray that measures images in files, for ``onestepsr evaluate --ray``."""

    def __init__(self, make_scorer: Callable[[], Scorer]) -> None:
        """``make_scorer`` loads the metrics."""
        self.scorer = make_scorer()

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> Any:
        """Measure one task's images: :class:`Case` in, :class:`Score` out, both pickled, which keeps every digit."""
        workers = max(1, torch.get_num_threads())  # Ray sets it to the cores of the actor
        scores = list(score_files([pickle.loads(case) for case in batch["case"]], self.scorer, workers))
        return pa.table({"input": [score.name for score in scores], "score": [pickle.dumps(score) for score in scores]})


def measure_files(
    cases: Sequence[Case], make_scorer: Callable[[], Scorer], cluster: Cluster
) -> Generator[Score, None, None]:
    """Scores of images in files that all machines of ``cluster`` can read, in the order in which they are done."""
    missing = {case.name: {"input": case.name, "case": pickle.dumps(case)} for case in cases}
    with closing(cluster.spread(missing, MeasureFiles, make_scorer)) as rows:
        for row in rows:
            yield pickle.loads(row["score"])
    for name in missing:
        yield Score(name=name, problems=[Problem(reason=f"{name}: {cluster.lost}")])


def _connect(address: str) -> bool:
    """Connect to Ray unless this process is connected already; True if it was not. UserError if that fails."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtra("onestepsr batch", "batch") from error
    if ray.is_initialized():
        return False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # Workers of Ray are nice by 15 for the sake of its own processes: beside anything else that computes, they starve.
    os.environ.setdefault("RAY_worker_niceness", "0")
    own: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        own |= {"include_dashboard": None, "object_store_memory": 200_000_000}
    try:
        ray.init(address=address, **own)
    except (ConnectionError, ValueError, OSError, RuntimeError) as error:
        raise UserError(f"--address {address}: Ray cannot be reached ({first_line(error)})") from error
    return True
