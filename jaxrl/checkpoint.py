"""A pytree as a checkpoint on disk, with orbax: asynchronous, atomic, checked when it is read.

    with Checkpoints("runs/x/checkpoints", keep=2) as checkpoints:
        checkpoints.save(step, state, {"seed": 3}, score=-120.0)  # the state may now be donated
    restored = restore("runs/x/checkpoints", jax.eval_shape(init, key))
    restored.step, restored.state, restored.metadata

A step is a folder `<step>/` of arrays in orbax's format (OCDBT) and a `manifest.json`: name, shape
and type of every leaf, the caller's metadata, and the SHA-256 of all files and of itself. It is
written beside its place and renamed when it is complete, so that a killed process leaves whole
checkpoints and leftovers that are swept away, never half of one. A file that was changed
afterwards is noticed before anything is made of its bytes. Nothing read is ever executed: arrays
are bytes, the rest is JSON, and the structure comes from the template.

Arrays come back bit for bit, typed PRNG keys as such, however many devices they were and are spread
over. Of several processes (`jax.distributed`) all make the same calls with the same folder: each
writes and reads what its devices hold, the first one the rest.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.options import AsyncOptions

from jaxrl.checks import check_count

FORMAT = "jaxrl checkpoint 1"
MANIFEST = "manifest.json"
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of what orbax has not finished
REMOVED = ".removed"  # of what is being deleted
DAMAGED = ".damaged"
WRITTEN_LATER = ("_CHECKPOINT_METADATA",)  # by orbax, after the checksums; reading does without


class DamagedError(ValueError):
    """A checkpoint is not what was written."""


@dataclass(frozen=True)
class Leaf:
    """One array of the tree."""

    name: str  # its path in the tree, as `jax.tree_util.keystr` writes it
    shape: tuple[int, ...]
    dtype: str  # "key<fry>" and so on for typed keys
    # of a typed key, the name of its generator; the dtype tells as much, but not to JAX
    impl: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class Snapshot:
    """A tree copied to the host: what it was copied from may be donated."""

    leaves: tuple[Leaf, ...]
    # by number of the leaf; keys as their data; none that is empty. Those that are spread over
    # several processes are arrays of JAX in the hosts' memory
    arrays: dict[str, np.ndarray | jax.Array]


@dataclass(frozen=True)
class Restored:
    """What `restore` found."""

    step: int
    state: Any
    metadata: dict[str, Any]
    score: float | None
    damaged: dict[int, str]  # newer steps that could not be used, and why


def to_host(state: Any) -> Snapshot:
    """Copy a pytree of arrays to the host, or to the hosts; waits until they are computed."""
    arrays: dict[str, np.ndarray | jax.Array] = {}
    leaves = _leaves(state)
    data = []
    for leaf, x in zip(leaves, jax.tree.leaves(state), strict=True):
        x = jax.random.key_data(x) if leaf.impl is not None else x
        if _is_spread(x):
            x = jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))
        elif isinstance(x, jax.Array):
            x.copy_to_host_async()  # all transfers at once
        data.append(x)
    for i, x in enumerate(data):
        if np.size(x):  # orbax takes no empty array
            # a copy: on CPU NumPy looks into the device's own memory, which is then not donated
            arrays[_number(i)] = x if _is_spread(x) else np.array(jnp.asarray(x))
    return Snapshot(leaves, jax.block_until_ready(arrays))


def _is_spread(x: Any) -> bool:
    """Whether no process has all of it."""
    return isinstance(x, jax.Array) and not x.is_fully_addressable


class Checkpoints:
    """Checkpoints of one run: the last `keep` and, where scores are given, the best.

    A context manager; leaving it waits for what is still being written. One more than is kept may
    lie on disk until the next `save` or `wait`.

    Args:
        folder: where to; made if it is not there. It must be no one else's.
        keep: how many of the last to keep; at least 2 to survive a damaged one.
        keep_best: keep the one with the highest score as well.

    Raises:
        ValueError: `keep` is not a count.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path, keep: int = 2, keep_best: bool = True):
        check_count("keep", keep)
        self.folder = Path(folder).absolute()
        self.keep, self.keep_best = keep, keep_best
        self._writing: int | None = None
        self._scores: dict[int, float | None] = {}
        self._is_first = jax.process_index() == 0
        if self._is_first:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                _sweep(self.folder)
                probe = self.folder / f"probe{REMOVED}"
                probe.mkdir()
                probe.rmdir()
            except OSError as error:
                raise OSError(f"{folder} cannot be written ({error.strerror})") from error
            self._scores = {step: _score(self.folder, step) for step in steps(self.folder)}
        self._checkpointer = ocp.AsyncCheckpointer(
            _Handler(),
            # else what cannot be made is waited for
            async_options=AsyncOptions(create_directories_asynchronously=False),
        )
        self._filter = _Raised()
        logging.getLogger("absl").addFilter(self._filter)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.wait()
        except OSError:
            if kind is None:  # else the first error is the one to hear of
                raise
        finally:
            self._checkpointer.close()
            logging.getLogger("absl").removeFilter(self._filter)

    def save(
        self,
        step: int,
        state: Any,
        metadata: Mapping[str, Any] | None = None,
        score: float | None = None,
    ) -> None:
        """Begin to write a checkpoint; when this returns, the state may be changed or donated.

        Args:
            step: a number that no checkpoint here has yet.
            state: a pytree of arrays, or what `to_host` made of one.
            metadata: anything that JSON takes; comes back with the state.
            score: how good the state is, the higher the better; NaN and None: not known.

        Raises:
            ValueError: the step exists.
            OSError: this or the checkpoint before could not be written; the earlier ones are kept.
        """
        check_count("step", step, minimum=0)
        self.wait()
        if step in self._scores:
            raise ValueError(f"step = {step} is already in {self.folder}")
        snapshot = state if isinstance(state, Snapshot) else to_host(state)
        score = None if score is None or not math.isfinite(score) else float(score)
        content = {
            "format": FORMAT,
            "step": step,
            "score": score,
            "leaves": [dataclasses.asdict(leaf) for leaf in snapshot.leaves],
            "metadata": dict(metadata or {}),
        }
        json.dumps(content, allow_nan=False)  # what cannot be written is said here
        self._writing = step
        with self._failures():
            self._checkpointer.save(self.folder / str(step), args=_Save(snapshot.arrays, content))
        self._pending_score = score

    def check(self) -> None:
        """Raise OSError if what is being written has failed already; does not wait."""
        if self._writing is not None:
            with self._failures():
                self._checkpointer.check_for_errors()

    def wait(self) -> None:
        """Wait until the last `save` is on disk, then delete what need not be kept.

        Raises:
            OSError: it could not be written; the earlier ones are kept.
        """
        if self._writing is None:
            return
        with self._failures():
            self._checkpointer.wait_until_finished()
        step, self._writing = self._writing, None
        if not self._is_first:
            return
        self._scores[step] = self._pending_score
        for step in self._scores.keys() - self.kept():
            remove(self.folder, step)
            del self._scores[step]

    def kept(self) -> set[int]:
        """The steps that are kept of those that are there."""
        last = set(sorted(self._scores)[-self.keep :])
        scored = [(score, step) for step, score in self._scores.items() if score is not None]
        return last | ({max(scored)[1]} if scored and self.keep_best else set())

    @property
    def best_step(self) -> int | None:
        """The step with the highest score, the latest of equals; None where none has one."""
        scored = [(score, step) for step, score in self._scores.items() if score is not None]
        return max(scored)[1] if scored else None

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn whatever orbax and TensorStore raise into one OSError, and sweep up."""
        try:
            yield
        except Exception as error:  # TensorStore raises a ValueError for a full disk
            step, self._writing = self._writing, None
            with contextlib.suppress(OSError):
                if self._is_first:
                    _sweep(self.folder)
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self.folder} "
                f"({_reason(error)}); the earlier ones are kept"
            ) from error


def steps(folder: str | Path) -> list[int]:
    """The steps of which there is a checkpoint, in order; damaged ones are among them."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if re.fullmatch("[0-9]+", p.name))


def best_step(folder: str | Path) -> int | None:
    """The step with the highest score, the latest of equals; None where none has one."""
    scores = {step: _score(Path(folder), step) for step in steps(folder)}
    scored = [(score, step) for step, score in scores.items() if score is not None]
    return max(scored)[1] if scored else None


def restore(folder: str | Path, template: Any, step: int | None = None) -> Restored:
    """Read a checkpoint: the newest that is whole, or that of `step`.

    Args:
        folder: what `Checkpoints` was given.
        template: a pytree of the state's structure, arrays or `jax.ShapeDtypeStruct`, e.g. of
            `jax.eval_shape`. Where a leaf has a sharding, the array gets it.
        step: this one and no other.

    Raises:
        FileNotFoundError: there is none.
        DamagedError: there is none that is whole, or `step` is not; says why.
        ValueError: the checkpoint holds another tree; names the leaf and both shapes.
    """
    found, damaged = find(folder, step)
    directory = Path(folder).absolute() / str(found["step"])
    wanted = _leaves(template)
    leaves = tuple(
        Leaf(x["name"], tuple(x["shape"]), x["dtype"], x["impl"]) for x in found["leaves"]
    )
    _check_same(leaves, wanted, directory)
    likes = jax.tree.leaves(template)
    names = [_number(i) for i, leaf in enumerate(leaves) if math.prod(leaf.shape)]
    spread = {}
    for i, like in enumerate(likes):
        sharding = getattr(like, "sharding", None)
        if sharding is not None and not sharding.is_fully_addressable:
            spread[_number(i)] = sharding
    arrays = _read_arrays(directory, names, spread) if names else {}
    values = []
    for i, (leaf, like) in enumerate(zip(leaves, likes, strict=True)):
        if _number(i) in arrays:
            x = arrays[_number(i)]
            x = x if _is_spread(x) else jnp.array(x)  # a copy that JAX owns: it may be donated
            x = x if leaf.impl is None else jax.random.wrap_key_data(x, impl=leaf.impl)
        elif leaf.impl is not None:
            x = jax.random.split(jax.random.key(0, impl=leaf.impl), leaf.shape)
        else:
            x = jnp.zeros(leaf.shape, leaf.dtype)  # it is empty
        if Leaf(leaf.name, x.shape, str(x.dtype)) != leaf:
            raise DamagedError(f"{directory}: {leaf.name} is {x.dtype}{list(x.shape)}, not {leaf}")
        sharding = getattr(like, "sharding", None)
        values.append(x if sharding is None else jax.device_put(x, sharding))
    state = jax.tree.unflatten(jax.tree.structure(template), values)
    return Restored(found["step"], state, found["metadata"], found["score"], damaged)


def find(folder: str | Path, step: int | None = None) -> tuple[dict[str, Any], dict[int, str]]:
    """Return the manifest of the newest whole checkpoint, or of `step`, with newer damaged ones.

    The manifest has "step", "score", "metadata" and "leaves"; every file was compared with its
    checksum.

    Raises:
        FileNotFoundError: there is no checkpoint, or not this one.
        DamagedError: none is whole.
    """
    folder = Path(folder)
    candidates = steps(folder)[::-1] if step is None else [step]
    if not candidates or not (folder / str(candidates[0])).exists():
        raise FileNotFoundError(
            f"there is no checkpoint in {folder}"
            if step is None
            else f"there is no checkpoint of step {step} in {folder}"
        )
    damaged = {}
    for candidate in candidates:
        try:
            return verify(folder, candidate), damaged
        except DamagedError as error:
            damaged[candidate] = str(error)
    raise DamagedError(f"no checkpoint in {folder} is whole: {'; '.join(damaged.values())}")


def verify(folder: str | Path, step: int) -> dict[str, Any]:
    """Return the manifest of a checkpoint after comparing every file with its checksum.

    Raises:
        DamagedError: names the file and what is wrong with it.
    """
    directory = Path(folder) / str(step)
    content = _read_manifest(directory)
    if content["format"] != FORMAT or content["step"] != step:
        raise DamagedError(
            f"{directory} is {content['format']!r} of step {content['step']}, "
            f"not {FORMAT!r} of step {step}"
        )
    for name, (size, digest) in content["files"].items():
        path = directory / name
        try:
            found = path.stat().st_size
            if found != size:
                raise DamagedError(f"{path} has {found} bytes, but {size} were written")
            if _sha256(path) != digest:
                raise DamagedError(f"{path} has another checksum than when it was written")
        except OSError as error:
            raise DamagedError(f"{path} cannot be read ({error.strerror})") from error
    return content


def set_aside(folder: str | Path, step: int) -> Path:
    """Rename a damaged checkpoint, so that its step can be written again; return the new place."""
    folder = Path(folder)
    place = folder / f"{step}{DAMAGED}"
    if place.exists():  # of the same step, the time before
        shutil.rmtree(place)
    return (folder / str(step)).rename(place)


def remove(folder: str | Path, step: int) -> None:
    """Delete a checkpoint; a process killed meanwhile leaves what the next one sweeps away."""
    gone = (Path(folder) / str(step)).rename(Path(folder) / f"{step}{REMOVED}")
    shutil.rmtree(gone, ignore_errors=True)


# how it is written --------------------------------------------------------------------------------


class _Handler(ocp.PyTreeCheckpointHandler):
    """Orbax's writer of trees, which adds the manifest just before the folder gets its name."""

    content: dict[str, Any]

    async def async_save(self, directory: Any, *args: Any, **kwargs: Any) -> Any:
        save: _Save = kwargs["args"]
        self.content = save.content
        plain = ocp.args.PyTreeSave(save.item or {"nothing": np.zeros(1)})
        return await super().async_save(directory, args=plain)

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        folder = Path(directory)
        files = {
            str(path.relative_to(folder)): [path.stat().st_size, _sha256(path)]
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in WRITTEN_LATER
        }
        content = {**self.content, "files": files}
        with (folder / MANIFEST).open("x") as file:
            json.dump({"content": content, "sha256": _digest(content)}, file, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())


@ocp.args.register_with_handler(_Handler, for_save=True)
@dataclass
class _Save(ocp.args.CheckpointArgs):
    """What is saved: arrays by number, and the manifest so far."""

    item: Mapping[str, np.ndarray | jax.Array]
    content: dict[str, Any]


@ocp.args.register_with_handler(_Handler, for_restore=True)
@dataclass
class _Restore(ocp.args.CheckpointArgs):
    """Orbax asks for the pair."""


def _leaves(tree: Any) -> tuple[Leaf, ...]:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    shapes = jax.tree.leaves(jax.eval_shape(lambda t: t, tree))
    return tuple(
        Leaf(jax.tree_util.keystr(path), x.shape, str(x.dtype), _impl(original))
        for (path, original), x in zip(paths, shapes, strict=True)
    )


def _impl(x: Any) -> str | None:
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return str(jax.random.key_impl(x))
    return None


def _number(i: int) -> str:
    return f"{i:05d}"


def _check_same(saved: tuple[Leaf, ...], wanted: tuple[Leaf, ...], directory: Path) -> None:
    """Raise ValueError, naming the first leaf that differs, unless the trees are the same."""
    there, here = ({leaf.name: leaf for leaf in leaves} for leaves in (saved, wanted))
    for name, leaf in here.items():
        if name not in there:
            raise ValueError(f"{directory} has no {name}, which is {leaf} here")
        if there[name] != leaf:
            raise ValueError(f"{directory}: {name} is {there[name]} there and {leaf} here")
    for name, leaf in there.items():
        if name not in here:
            raise ValueError(f"{directory} holds {name}, {leaf}, which is not here")


def _read_arrays(
    directory: Path, names: list[str], spread: Mapping[str, jax.sharding.Sharding] | None = None
) -> dict[str, Any]:
    """Read arrays by name: those in `spread` as JAX's, each process its part, else as NumPy's."""
    # the handler alone: what a Checkpointer reads besides has no checksum
    handler = ocp.PyTreeCheckpointHandler()
    place: Any = directory  # orbax declares a class of its own
    how: dict[str, Any] = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    for name, sharding in (spread or {}).items():
        if name in how:
            how[name] = ocp.ArrayRestoreArgs(sharding=sharding)
    try:
        return handler.restore(
            place, args=ocp.args.PyTreeRestore(item=dict.fromkeys(names, 0), restore_args=how)
        )
    except Exception as error:  # whatever TensorStore thinks of it: the checksums were right
        raise DamagedError(f"{directory} cannot be read: {_reason(error)}") from error
    finally:
        handler.close()


def _digest(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        written = json.loads(path.read_bytes())
        content, digest = written["content"], written["sha256"]
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged: it cannot be read as what was written") from error
    if not isinstance(content, dict) or _digest(content) != digest:
        raise DamagedError(f"{path} has another checksum than when it was written")
    return content


def _score(folder: Path, step: int) -> float | None:
    try:
        return _read_manifest(folder / str(step)).get("score")
    except DamagedError:
        return None


def _sweep(folder: Path) -> None:
    """Delete what a killed process has left of writing or deleting."""
    for path in folder.iterdir():
        if UNFINISHED in path.name or path.name.endswith(REMOVED):
            shutil.rmtree(path)


def _reason(error: BaseException) -> str:
    """What went wrong in a few words: TensorStore's messages take ten lines."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno:
            return os.strerror(chain.errno)
        chain = chain.__cause__ or chain.__context__
    text = " ".join(str(error).split())
    for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES):
        if os.strerror(number) in text:
            return os.strerror(number)
    return text


class _Raised(logging.Filter):
    """Drops the tracebacks that orbax's threads log: `_failures` raises the error in words."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR or "orbax" not in Path(record.pathname).parts
