"""Checkpoints of a training run: what is in one, and what must be the same to go on from it.

A checkpoint holds the train state of all seeds (jaxrl.checkpoint) and as metadata the run's
identity, the sizes of its growing files, and what the summary adds up: time and energy so far.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

import jaxrl
from jaxrl.cost.energy import Energy, Reading
from jaxrl.sinks import Chunk, episode_mean
from train import _folder

if TYPE_CHECKING:
    from train._envs import EnvSetup

# whose version decides what a program computes
PACKAGES = ("jax", "jaxlib", "flax", "optax", "gymnax")


@dataclass(frozen=True)
class Start:
    """Where a run begins: at 0, or at a checkpoint."""

    step: int | None = None  # of the checkpoint: environment steps of a seed
    num_updates: int = 0
    wall_s: float = 0.0
    compile_s: float = 0.0
    compile_energy: Energy | None = None
    run_energy: Energy | None = None
    energy_points: tuple[tuple[int, float | None], ...] = ()
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    resumed_at: tuple[int, ...] = ()  # environment steps at which the run went on
    notes: tuple[str, ...] = ()
    damaged: tuple[int, ...] = ()


def identity(
    agent: str, env: str, setup: "EnvSetup", seeds: Sequence[int], config: Any
) -> dict[str, Any]:
    """Everything that decides the numbers of a run, flat, as JSON gives it back."""
    flat: dict[str, Any] = {"agent": agent, "env": env, "seeds": list(seeds)}
    flat |= {f"env_kwargs.{name}": value for name, value in setup.kwargs.items()}
    # the numbers themselves: drawn tracks, and parameters changed for training
    for path, leaf in jax.tree_util.tree_leaves_with_path(setup.params):
        x = np.asarray(leaf)
        name = f"env parameter {jax.tree_util.keystr(path)}"
        flat[name] = (
            x.item() if x.ndim == 0 else f"sha256:{hashlib.sha256(x.tobytes()).hexdigest()}"
        )
    flat |= {f"config.{name}": value for name, value in dataclasses.asdict(config).items()}
    flat["jax_enable_x64"] = bool(jax.config.read("jax_enable_x64"))
    flat["version of jaxrl"] = jaxrl.__version__
    flat |= {f"version of {name}": importlib.metadata.version(name) for name in PACKAGES}
    # JSON has no infinity
    flat = {
        k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in flat.items()
    }
    return json.loads(json.dumps(flat))


def check_identity(there: dict[str, Any], here: dict[str, Any], what: str) -> None:
    """Raise ValueError, naming the first field that differs and both values."""
    for name in [*here, *(n for n in there if n not in here)]:
        a, b = (repr(x[name]) if name in x else "not there" for x in (there, here))
        if a != b:
            raise ValueError(
                f"{what} is of another run: {name} is {a} in the checkpoint and {b} here"
            )


def find(
    folder: Path, run_identity: dict[str, Any], arithmetic: dict[str, int]
) -> dict[str, Any] | None:
    """Return what `read` needs of the checkpoint from which the run in `folder` goes on, as JSON.

    None where it was killed before its first one: it goes on from the beginning.

    Raises:
        ValueError: no checkpoint is whole, it is of another run, or files have lost rows.
    """
    from jaxrl import checkpoint  # orbax: half a second

    checkpoints = folder / "checkpoints"
    if not checkpoint.steps(checkpoints):
        return None
    found, damaged = checkpoint.find(checkpoints)
    metadata, step = found["metadata"], found["step"]
    what = f"{checkpoints / str(step)}"
    if "identity" not in metadata:
        raise ValueError(f"{what} was not written by a training script")
    check_identity(metadata["identity"], run_identity, what)
    _folder.check_sizes(folder, metadata["sizes"])
    notes = [f"damaged, the one before is used: {why}" for why in damaged.values()]
    if metadata["backend"] != jax.default_backend():
        notes.append(
            f"the checkpoint was written on {metadata['backend']}, this is "
            f"{jax.default_backend()}: the result is not bit for bit that of one piece"
        )
    notes += [
        f"the checkpoint was written with {there} {what} and this is with {arithmetic[what]}: the "
        "result is that of one piece to rounding, not bit for bit"
        for what, there in metadata.get("arithmetic", {}).items()
        if there != arithmetic[what]
    ]
    return {"step": step, "metadata": metadata, "notes": notes, "damaged": list(damaged)}


def read(folder: Path, found: dict[str, Any] | None, template: Any) -> tuple[Start, Any]:
    """Return where the run goes on, and the state there, shaped and spread as `template` is."""
    if found is None:
        note = "no checkpoint was written before the run ended: from the beginning"
        return Start(notes=(note,)), None
    from jaxrl import checkpoint

    metadata, step = found["metadata"], found["step"]
    state = checkpoint.restore(folder / "checkpoints", template, step).state
    start = Start(
        step=step,
        num_updates=metadata["num_updates"],
        wall_s=metadata["wall_s"],
        compile_s=metadata["compile_s"],
        compile_energy=_energy(metadata["compile_energy"]),
        run_energy=_energy(metadata["run_energy"]),
        energy_points=tuple((u, J) for u, J in metadata["energy_points"]),
        sizes=metadata["sizes"],
        resumed_at=(*metadata["resumed_at"], step),
        notes=tuple(found["notes"]),
        damaged=tuple(found["damaged"]),
    )
    return start, state


def to_host(state: Any) -> Any:
    """Copy the state, so that it can be saved after the next chunk has taken it."""
    from jaxrl import checkpoint

    return checkpoint.to_host(state)


def metadata_of(
    *,
    run_identity: dict[str, Any],
    sizes: dict[str, int],
    num_updates: int,
    wall_s: float,
    compile_s: float,
    compile_energy: Energy,
    run_energy: Energy,
    energy_points: Sequence[tuple[int, float | None]],
    resumed_at: Sequence[int],
    arithmetic: dict[str, int],
) -> dict[str, Any]:
    """What goes with the state; `find` and `read` take it."""
    return {
        "identity": run_identity,
        "backend": jax.default_backend(),
        "arithmetic": arithmetic,
        "sizes": sizes,
        "num_updates": num_updates,
        "wall_s": wall_s,
        "compile_s": compile_s,
        "compile_energy": dataclasses.asdict(compile_energy),
        "run_energy": dataclasses.asdict(run_energy),
        "energy_points": [list(point) for point in energy_points],
        "resumed_at": list(resumed_at),
    }


def _energy(written: dict[str, Any]) -> Energy:
    readings = tuple(Reading(**reading) for reading in written["readings"])
    return Energy(written["seconds"], readings, tuple(written["notes"]))


def score(chunks: Sequence[Chunk]) -> float | None:
    """How good a state is: mean return, over seeds, of the episodes that ended in these chunks.

    None where a seed has ended none.
    """
    if not chunks or "episode_return" not in chunks[0].metrics:
        return None
    names = ("episode_return", "num_episodes")
    both = {n: np.concatenate([c.metrics[n] for c in chunks], axis=1) for n in names}
    value = float(episode_mean(both, "episode_return").mean())
    return value if np.isfinite(value) else None
