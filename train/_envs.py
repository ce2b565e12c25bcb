"""Environments by name, with what a script must know beside: unseen episodes, a picture."""

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnax
import jax
import numpy as np

import jaxrl.envs  # registers our environments
from jaxrl.envs._tracks import TrackBank, make_tracks
from jaxrl.envs.micro_racer import EnvParams, MicroRacer
from jaxrl.types import Env

MAX_DRAWN_STATES = 40  # of the Mars rover

Animate = Callable[[Callable[[jax.Array], jax.Array], int, int, Path], str]


@dataclass(frozen=True)
class EnvSetup:
    """An environment ready for training and evaluation."""

    id: str
    kwargs: dict[str, Any]  # what it was made with
    env: Env
    params: Any  # of training
    draw_params: Callable[[int, int], tuple[Any, Any]]
    """`draw_params(seed, num_episodes) -> (params, in_axes)`: for episodes never trained on."""
    episodes_are: str = "episodes"  # what an evaluation draws, in words
    endings: dict[int, str] = field(default_factory=dict)  # names of info["ending"]
    num_evaluations: int = 10  # while training, in a run, unless told otherwise
    animate: Animate | None = None
    """`animate(act, seed, num_episodes, path) -> what it shows`: a GIF of one drawn episode."""


def make_env(env_id: str, **kwargs: Any) -> EnvSetup:
    """Make an environment of ours or of gymnax.

    Raises:
        ValueError: there is no such environment, or it does not take these arguments.
    """
    check_env(env_id, kwargs)
    env, params = gymnax.make(env_id, **kwargs)
    if env_id == "MicroRacer-v0":
        return _micro_racer(env, params, kwargs)
    if env_id == "MarsRover-v0":
        return _mars_rover(env, params, kwargs)
    if env_id in ("LunarLander-v3", "LunarLanderContinuous-v3"):
        return _lunar_lander(env_id, env, params, kwargs)
    return EnvSetup(env_id, kwargs, env, params, lambda seed, num_episodes: (params, None))


def check_env(env_id: str, kwargs: dict[str, Any]) -> None:
    """Raise ValueError, in words, unless `make_env(env_id, **kwargs)` can be expected to work.

    Nothing is made: an environment may take seconds to build.
    """
    ids = list(gymnax.registered_envs)
    if env_id not in ids:
        lower = {name.lower(): name for name in ids}
        near = [lower[n] for n in difflib.get_close_matches(env_id.lower(), lower, n=3, cutoff=0.4)]
        guess = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"env = {env_id!r} is unknown: {guess}--list-envs shows all {len(ids)}")
    factory = jaxrl.envs.ENVIRONMENTS.get(env_id)
    if factory is None and kwargs:
        raise ValueError(
            f"env_kwargs = {kwargs} cannot be given to {env_id}: gymnax's own environments are "
            "taken as they are"
        )
    if factory is not None:
        known = list(inspect.signature(factory).parameters)
        for name in kwargs:
            if name not in known:
                raise ValueError(
                    f"env_kwargs: {name!r} is not an argument of {env_id}, which takes "
                    f"{', '.join(known)}"
                )


def probe(env_id: str, kwargs: dict[str, Any]) -> tuple[Env, Any]:
    """Return (env, params) good enough to look at its spaces, at once: without building any tracks.

    Raises:
        ValueError: see `make_env`.
    """
    check_env(env_id, kwargs)
    if env_id == "MicroRacer-v0":
        return MicroRacer(**kwargs), EnvParams(tracks=None)  # pyright: ignore[reportArgumentType]
    return gymnax.make(env_id, **kwargs)


def with_train_params(params: Any, changes: dict[str, Any]) -> Any:
    """Return the environment's parameters with some of its numbers changed.

    Raises:
        ValueError: there is no such parameter, or it is not one number, or the value is none.
    """
    for name, value in changes.items():
        numbers = [
            f.name
            for f in dataclasses.fields(params)
            if np.ndim(getattr(params, f.name)) == 0
            and isinstance(getattr(params, f.name), int | float | np.ndarray | jax.Array)
        ]
        if name not in numbers:
            raise ValueError(
                f"train_params: {name!r} is not a number among this environment's parameters, "
                f"which are {', '.join(numbers)}"
            )
        if not isinstance(value, int | float) or not np.isfinite(value):
            raise ValueError(f"train_params: {name} = {value!r} must be a finite number")
    return dataclasses.replace(params, **changes)


def unseen_tracks(env: MicroRacer, seed: int, num_tracks: int) -> TrackBank:
    """Tracks of this environment's difficulties that are in no training bank."""
    stream = jax.random.key(0x7E57)  # apart from key(track_seed), the training bank's
    return make_tracks(
        jax.random.fold_in(stream, seed),
        num_tracks,
        obstacles=env.obstacles,
        chicanes=env.chicanes,
    )


def _micro_racer(env: Any, params: Any, kwargs: dict[str, Any]) -> EnvSetup:
    """Unseen episodes of MicroRacer: each on its own track, none of them in the training bank."""

    @functools.lru_cache(maxsize=1)  # the animation shows a track of the evaluation
    def draw_params(seed: int, num_episodes: int) -> tuple[Any, Any]:
        tracks = unseen_tracks(env, seed, num_episodes)
        banks_of_one = jax.tree.map(lambda x: x[:, None], tracks)
        axes = jax.tree.map(lambda _: None, params).replace(tracks=0)
        return params.replace(tracks=banks_of_one), axes

    def animate(
        act: Callable[[jax.Array], jax.Array], seed: int, num_episodes: int, path: Path
    ) -> str:
        from train import _animation

        evaluation, _ = draw_params(seed, num_episodes)
        first = jax.tree.map(lambda x: x[0], evaluation.tracks)
        key = jax.random.fold_in(jax.random.key(0xA11), seed)
        return _animation.micro_racer(act, env, params.replace(tracks=first), key, path)

    endings = {int(e): e.name.lower().replace("_", " ") for e in jaxrl.envs.Ending}
    return EnvSetup(
        "MicroRacer-v0", kwargs, env, params, draw_params, "unseen tracks", endings, animate=animate
    )


def _mars_rover(env: Any, params: Any, kwargs: dict[str, Any]) -> EnvSetup:
    """The Mars rover with its picture, where the line is short enough for one."""

    def animate(
        act: Callable[[jax.Array], jax.Array], seed: int, num_episodes: int, path: Path
    ) -> str:
        from train import _animation

        del num_episodes
        key = jax.random.fold_in(jax.random.key(0xA11), seed)
        return _animation.mars_rover(act, env, params, key, path)

    return EnvSetup(
        "MarsRover-v0",
        kwargs,
        env,
        params,
        lambda seed, num_episodes: (params, None),
        # a whole run of Q-learning takes a tenth of a second (benchmarks/eval_cost.py)
        num_evaluations=5,
        animate=animate if env.length <= MAX_DRAWN_STATES else None,
    )


def _lunar_lander(env_id: str, env: Any, params: Any, kwargs: dict[str, Any]) -> EnvSetup:
    """LunarLander, discrete or continuous, with its endings and its picture."""

    def animate(
        act: Callable[[jax.Array], jax.Array], seed: int, num_episodes: int, path: Path
    ) -> str:
        from train import _animation

        del num_episodes
        key = jax.random.fold_in(jax.random.key(0xA11), seed)
        return _animation.lunar_lander(act, env, params, key, path)

    endings = {int(e): e.name.lower().replace("_", " ") for e in jaxrl.envs.LanderEnding}
    return EnvSetup(
        env_id,
        kwargs,
        env,
        params,
        lambda seed, num_episodes: (params, None),
        endings=endings,
        # an evaluation may last 1000 steps of the dearest kind: ten cost a fifth of a run of PPO's
        # (benchmarks/eval_cost.py)
        num_evaluations=2,
        animate=animate,
    )
