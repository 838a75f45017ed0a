"""Artifact directories: a public format, its golden outputs, and artifact.json with hashes and lineage."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors.numpy import load_file, save_file

from raytx import __version__, storage
from raytx.components import ExportConfig
from raytx.errors import ArtifactError, ResourceError
from raytx.files import digest, disagreements, inventory, open_to_readers, read_json, sync_directory, write_json
from raytx.plan import check_plugins
from raytx.registry import registry
from raytx.tasks.base import Features, Request, Response, Runner, Task

MANIFEST = "artifact.json"
GOLDEN = "golden.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class Golden:
    """What the trained model answered to a batch of real samples, kept to hold every later form to it."""

    features: Features
    """The collated batch, numpy, with padding in it."""
    logits: np.ndarray
    """float32 logits of that batch."""

    def save(self, path: Path) -> None:
        save_file(self.arrays(), path)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what a file of golden outputs holds."""
        features = {f"features.{key}": np.ascontiguousarray(value) for key, value in self.features.items()}
        return features | {"logits": np.ascontiguousarray(self.logits)}

    @classmethod
    def load(cls, path: Path) -> Golden:
        arrays = load_file(path)
        logits = arrays.pop("logits")
        return cls({key.removeprefix("features."): value for key, value in arrays.items()}, logits)

    def difference(self, runner: Runner) -> float:
        """Return the largest absolute difference between a runner's logits and the golden ones."""
        logits = runner.logits(self.features)
        if logits.shape != self.logits.shape:
            raise ArtifactError(f"logits of shape {logits.shape} where the trained model gave {self.logits.shape}")
        return float(np.abs(self.real(logits) - self.real(self.logits)).max())

    def relative_error(self, runner: Runner) -> float:
        """Return ||runner - golden|| / ||golden|| over the logits."""
        golden = self.real(self.logits)
        return float(np.linalg.norm(self.real(runner.logits(self.features)) - golden) / np.linalg.norm(golden))

    def real(self, logits: np.ndarray) -> np.ndarray:
        """Leave out the logits of padding, where a form may answer anything."""
        return logits[self.features["attention_mask"] == 1] if logits.ndim == 3 else logits


@dataclass(frozen=True)
class Artifact:
    """What artifact.json says."""

    name: str
    task: str
    model: dict[str, Any]
    """The model component."""
    exporter: dict[str, Any]
    """The export component."""
    compression: list[dict[str, Any]]
    """The compression components applied, in order."""
    plugins: dict[str, str]
    metrics: dict[str, float]
    golden_difference: float
    """Largest absolute difference to the golden logits when it was published."""
    lineage: dict[str, Any]
    """Run, step, plan and data it came from."""
    files: dict[str, dict[str, Any]]
    """Every file with bytes and SHA-256."""
    serving: dict[str, Any] = field(default_factory=dict)
    """How its recipe wants it served."""
    format: int = FORMAT
    version: str = __version__
    labels: list[str] | None = None
    measured: dict[str, Any] = field(default_factory=dict)
    """What compression and export measured."""
    seal: str = ""
    """Digest of all the above, as nothing else would notice damage to this file; older artifacts have none."""


def publish(staging: Path, target: Path, artifact: Artifact) -> Path:
    """Complete a staged directory with its manifest and put it in place of the target, whole or not at all."""
    open_to_readers(staging)
    files = inventory(staging, exclude=frozenset({MANIFEST}))
    write_json(staging / MANIFEST, sealed(asdict(artifact) | {"files": files}))
    old = target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():  # killed between the two renames below
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    staging.rename(target)
    sync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)
    return target


def sealed(told: dict[str, Any]) -> dict[str, Any]:
    """Return what artifact.json says together with its digest."""
    return told | {"seal": digest({key: value for key, value in told.items() if key != "seal"})}


def located(place: str | Path) -> Path:
    """Return an artifact's directory on this node; one that a URI names is fetched first, where it is not here already.

    Raises ArtifactError when the store has none there, ResourceError when the store fails.
    """
    if not storage.is_uri(str(place)):
        return Path(place).expanduser()
    storage_path, name = storage.split(str(place))
    store = storage.Store(storage_path)
    try:
        if (manifest := storage.persistently(lambda: store.read(f"{name}/{MANIFEST}"))) is None:
            raise ArtifactError(f"{place}: no artifact there (no {MANIFEST})")
        directory = storage.directory(str(place)) / digest(manifest.decode(errors="replace"))
        if not directory.is_dir():
            _fetch(store, name, directory, called=str(place))
        return directory
    except storage.StoreError as error:
        raise ResourceError(f"{place} cannot be read: {error}. Repair the storage, or the way to it") from error


def _fetch(store: storage.Store, name: str, directory: Path, *, called: str) -> None:
    """Bring an artifact to a directory, whole and checked or not at all; several processes may do so at once."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetched-", dir=directory.parent) as staging:
        fetched = Path(staging) / "artifact"
        if not store.get_directory(name, fetched, last=MANIFEST):
            raise ArtifactError(f"{called}: was removed while it was fetched")
        _read(fetched, called=called)
        with contextlib.suppress(OSError):  # somebody else was faster
            fetched.rename(directory)


def read(directory: str | Path, *, verify: bool = True) -> Artifact:
    """Read an artifact directory; raise ArtifactError when it is none, of another format, or was tampered with."""
    directory = located(directory)
    return _read(directory, called=str(directory), verify=verify)


def _read(directory: Path, *, called: str, verify: bool = True) -> Artifact:
    path = directory / MANIFEST
    if not path.is_file():
        raise ArtifactError(_not_an_artifact(directory))
    try:
        told = read_json(path)
        artifact = Artifact(**told)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{called}/{MANIFEST}: not a valid manifest: {error}") from None
    if artifact.format != FORMAT:
        raise ArtifactError(f"{called}/{MANIFEST}: format {artifact.format}, this raytx reads {FORMAT}")
    if artifact.seal and told != sealed(told):
        raise ArtifactError(f"{called}/{MANIFEST}: not what was published: its own digest differs")
    if verify and (wrong := disagreements(directory, artifact.files, manifest=MANIFEST)):
        raise ArtifactError(f"{called}: not what was published. " + "; ".join(wrong))
    return artifact


def _not_an_artifact(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory}: no such directory"
    inside = sorted(path.parent for path in directory.glob(f"artifacts/*/{MANIFEST}"))
    hint = f" Did you mean {inside[0]}?" if inside else ""
    return f"{directory}: not an artifact directory (no {MANIFEST}).{hint}"


def replay(golden: Golden, runner: Runner, exporter: ExportConfig, directory: Path) -> float:
    """Hold a saved form to its golden outputs; return the largest absolute difference.

    Raises ArtifactError when the exporter's own judgement refuses it.
    """
    difference, relative = golden.difference(runner), golden.relative_error(runner)
    if (refusal := exporter.judge(difference=difference, relative_error=relative)) is not None:
        raise ArtifactError(f"{directory}: {exporter.type} form refused: {refusal}")
    return difference


@dataclass(frozen=True)
class Predictor:
    """A loaded artifact: requests in, responses out."""

    artifact: Artifact
    task: Task
    runner: Runner

    def predict(self, requests: Sequence[Request]) -> list[Response]:
        return self.task.predict(self.runner, requests)

    def stream(self, request: Request) -> Iterator[Response]:
        return self.task.stream(self.runner, request)


def open_artifact(directory: str | Path) -> Predictor:
    """Verify an artifact's hashes, load it and replay its golden outputs; raise ArtifactError when it disagrees."""
    directory = located(directory)
    artifact = read(directory)
    check_plugins(artifact.plugins)
    model = registry().parse("model", artifact.model).build()
    compressors = [registry().parse("compression", step).build() for step in artifact.compression]
    exporter = cast(ExportConfig, registry().parse("export", artifact.exporter))
    runner = exporter.build().load(directory, model, compressors)
    replay(Golden.load(directory / GOLDEN), runner, exporter, directory)
    return Predictor(artifact, model.task(directory), runner)
