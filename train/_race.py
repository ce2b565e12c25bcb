"""Races of MicroRacer: drivers on the same tracks from the same start, and who has won.

Our policies drive all tracks in one compiled program, each with its own network, normaliser and
kind of observation. Functions of the host are asked step by step; their cars move by the same pure
environment, so that it makes no difference to a lap which way it was driven.
"""

import dataclasses
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl import policy, spaces
from jaxrl.envs import Ending, MicroRacer
from jaxrl.envs.micro_racer import EnvParams, EnvState
from train import _envs

ENV = "MicroRacer-v0"
ENDINGS = {  # in the order of the table
    Ending.CROSSING_BORDER: "crossing border",
    Ending.WRONG_DIRECTION: "wrong direction",
    Ending.TOO_SLOW: "too slow",
    Ending.NONE: "time limit",
}


class DriverError(ValueError):
    """A function cannot drive: it raised, or returned something else than two numbers."""


@dataclass(frozen=True)
class Driver:
    """Whoever can be entered for a race."""

    label: str
    source: str  # as given: a path, or module:function
    act: Callable[..., Any]
    """With a policy `act(policy, obs (*batch, n)) -> action (*batch, 2)`, pure; without one
    `act(obs (5,)) -> 2 numbers`, any Python function."""
    policy: Any = None  # jaxrl.types.Policy; None: a function of the host
    agent: str | None = None  # what it was trained by
    observation: str = "compact"


# drivers ------------------------------------------------------------------------------------------


def read_drivers(sources: Sequence[str], labels: Sequence[str]) -> list[Driver]:
    """Read run folders, policy files and functions `module:name`; give each a name of its own.

    Raises:
        ValueError, FileNotFoundError: one of them cannot drive here; the message is one sentence.
    """
    if not sources:
        raise ValueError("there is nobody to race: give run folders, policy files or module:name")
    if labels and len(labels) != len(sources):
        raise ValueError(
            f"labels: {len(labels)} for {len(sources)} drivers: give one for each, or none"
        )
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"labels: {twice[0]!r} stands for several drivers: give each its own")
    if not all(label.strip() for label in labels):
        raise ValueError("labels: an empty one was given, name every driver")
    names = list(labels) or distinct([default_label(source) for source in sources])
    return [read_driver(s, name) for s, name in zip(sources, names, strict=True)]


def is_function(source: str) -> bool:
    """Whether `source` is written as module:function and no file has that name."""
    return bool(re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", source)) and (
        not Path(source).exists()
    )


def default_label(source: str) -> str:
    """The name of the run, of the policy file with its run, or of the function."""
    if is_function(source):
        return source.partition(":")[2]
    path = Path(source)
    run = path.resolve()
    if path.suffix == ".msgpack":
        in_run = run.parent.name == "policies"
        run = run.parents[1] if in_run else run.parent
        stem = path.stem if in_run else ""
    else:
        stem = ""
    name = run.name.removeprefix(f"{ENV}__")
    return f"{name} {stem}".strip()


def distinct(labels: Sequence[str]) -> list[str]:
    """Number those that come again: a, b, a -> a, b, a (2)."""
    result: list[str] = []
    for label in labels:
        name, number = label, 2
        while name in result:
            name, number = f"{label} ({number})", number + 1
        result.append(name)
    return result


def read_driver(source: str, label: str) -> Driver:
    """Read one driver.

    Raises:
        ValueError, FileNotFoundError: see `read_drivers`.
    """
    if is_function(source):
        return Driver(label, source, import_function(source))
    saved = policy.read_policy(source)
    if saved.env != ENV:
        raise ValueError(f"{source} was trained on {saved.env}: only policies of {ENV} can race")
    observation = saved.env_kwargs.get("observation", "compact")
    if (saved.action, saved.obs_shape) != spaces.read(*_envs.probe(ENV, saved.env_kwargs)):
        raise ValueError(
            f"{source} takes observations of shape {saved.obs_shape}, which {ENV} with observation "
            f"= {observation!r} does not give: it cannot race"
        )
    return Driver(label, source, saved.act_fn(), saved.policy, saved.agent, observation)


def import_function(source: str) -> Callable[..., Any]:
    """Import `module:function`; the working directory is searched first, as `python -m` does.

    Raises:
        ValueError: there is no such module or function, or importing it fails.
    """
    module_name, _, name = source.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever the module does when it is imported
        raise ValueError(
            f"{source} cannot be imported ({type(error).__name__}: {error}): give module:function "
            "of a module in this folder or an installed one, or the path of a run"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{source}: module {module_name} has no {name}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{source} is not a function but {found!r}")
    return found


def ask(driver: Driver, obs: np.ndarray, when: str) -> np.ndarray:
    """Ask a function for its action: obs (5,) -> (2,).

    Raises:
        DriverError: it raised, or did not return two finite numbers.
    """
    try:
        answer = driver.act(obs.copy())  # a copy: it may write into it
    except Exception as error:
        raise DriverError(
            f"{driver.source} raised {type(error).__name__} {when}: {error}"
        ) from error
    try:
        action = np.asarray(answer, np.float32)
    except (TypeError, ValueError):
        action = np.array(None)
    if action.shape != (2,) or action.dtype != np.float32:
        raise DriverError(
            f"{driver.source} returned {answer!r} {when}: it must return two numbers, "
            "[acceleration, turn]"
        )
    if not np.isfinite(action).all():
        raise DriverError(f"{driver.source} returned {answer!r} {when}: both must be finite")
    return action


def check_function(driver: Driver) -> None:
    """Ask a function once, for a straight and empty road, before anything is driven.

    Raises:
        DriverError: see `ask`.
    """
    ask(driver, np.array([0.0, 0.2, 0.25, 0.2, 0.25], np.float32), "when asked before the race")


# driving ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Race:
    """What happened: all drivers on all tracks."""

    ending: np.ndarray  # (D, N) int, Ending; NONE is the time limit
    steps: np.ndarray  # (D, N) int
    shown: EnvState  # (T + 1, D, ...) states on the track to be drawn, ended cars at their last one


def line_up(
    env_kwargs: dict[str, Any], rules: dict[str, Any], tracks: int, seed: int
) -> tuple[EnvParams, EnvState]:
    """Return (params with a bank of `tracks` unseen tracks, start states (tracks,)).

    The tracks are those of `train.play --seed`; the initial speed is drawn once a track, by the
    environment's own law, of which `rules` changes some fields.
    """
    env = MicroRacer(**env_kwargs)
    bank = _envs.unseen_tracks(env, seed, tracks)
    params = EnvParams(tracks=bank, **rules)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0x5ACE), seed), tracks)
    axes = dataclasses.replace(jax.tree.map(lambda _: None, params), tracks=0)
    own = dataclasses.replace(params, tracks=jax.tree.map(lambda x: x[:, None], bank))
    states = jax.jit(jax.vmap(env.reset_env, in_axes=(0, axes)))(keys, own)[1]
    return params, dataclasses.replace(states, track=jnp.arange(tracks, dtype=jnp.int32))


def race(drivers: Sequence[Driver], params: EnvParams, start: EnvState, shown: int) -> Race:
    """Let every driver drive every track once; keep all states on track `shown`.

    Raises:
        DriverError: a function could not go on, see `ask`.
    """
    ours = [i for i, driver in enumerate(drivers) if driver.policy is not None]
    guests = [i for i, driver in enumerate(drivers) if driver.policy is None]
    parts = []
    if ours:
        some = [drivers[i] for i in ours]
        program = jax.jit(make_drive(some, int(params.max_steps_in_episode)))
        policies = [driver.policy for driver in some]
        last, record, num_steps = jax.device_get(program(policies, params, start, shown))
        parts.append((last, jax.tree.map(lambda x: x[: num_steps + 1], record)))
    if guests:
        parts.append(drive_on_host([drivers[i] for i in guests], params, start, shown))

    length = 1 + max(int(record.time.max()) for _, record in parts)  # until the last car here ended
    records = [jax.tree.map(lambda x: rest(x, length), record) for _, record in parts]
    order = np.argsort([*ours, *guests])  # back to how they were given
    last = jax.tree.map(lambda *x: np.concatenate(x)[order], *(last for last, _ in parts))
    record = jax.tree.map(lambda *x: np.concatenate(x, axis=1)[:, order], *records)
    return Race(last.ending, last.time, record)


def rest(x: np.ndarray, length: int) -> np.ndarray:
    """Cut (T, ...) to `length`, or let it rest on its last entry until then."""
    return x[np.minimum(np.arange(length), len(x) - 1)]


def advance(state: EnvState, action: jax.Array, params: EnvParams, max_steps: int) -> EnvState:
    """Move all cars, leaves (D, N, ...), by actions (D, N, 2); ended ones stay as they are."""
    env = MicroRacer()
    key = jax.random.key(0)  # steps are deterministic
    step = jax.vmap(jax.vmap(env.step_env, (None, 0, 0, None)), (None, 0, 0, None))
    _, after, *_ = step(key, state, action, params)
    running = is_running(state, max_steps)

    def keep(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(running.reshape(running.shape + (1,) * (new.ndim - 2)), new, old)

    return jax.tree.map(keep, after, state)


def is_running(state: EnvState, max_steps: int) -> Any:
    """Which cars (D, N) have neither ended nor met the time limit."""
    return (state.ending == Ending.NONE) & (state.time < max_steps)


def observe(state: EnvState, params: EnvParams, observation: Any) -> jax.Array:
    """What all cars, leaves (D, N, ...), see: (D, N, n)."""
    look = MicroRacer(observation=observation).observe
    axes = (None, 0, None, None)
    return jax.vmap(jax.vmap(look, axes), axes)(jax.random.key(0), state, None, params)


def make_drive(drivers: Sequence[Driver], max_steps: int) -> Callable[..., Any]:
    """Return the pure `drive(policies, params, start (N,), shown)` of our policies.

    It returns the last states (D, N, ...), the states on track `shown` after each step, leaves
    (max_steps + 1, D, ...), and how many steps were made until the last car ended.
    """

    kinds = sorted({driver.observation for driver in drivers})

    def drive(policies: Sequence[Any], params: EnvParams, start: EnvState, shown: jax.Array):
        state = jax.tree.map(lambda x: jnp.stack([x] * len(drivers)), start)

        def act(state: EnvState) -> jax.Array:
            seen = {kind: observe(state, params, kind) for kind in kinds}
            actions = [
                driver.act(policy, seen[driver.observation][i])
                for i, (driver, policy) in enumerate(zip(drivers, policies, strict=True))
            ]
            return jnp.stack(actions)

        def step(carry):
            t, state, record = carry
            state = advance(state, act(state), params, max_steps)
            record = jax.tree.map(lambda all, x: all.at[t + 1].set(x[:, shown]), record, state)
            return t + 1, state, record

        record = jax.tree.map(
            lambda x: jnp.zeros((max_steps + 1, *x[:, 0].shape), x.dtype).at[0].set(x[:, shown]),
            state,
        )
        carry = (jnp.zeros((), jnp.int32), state, record)
        t, state, record = jax.lax.while_loop(
            lambda carry: is_running(carry[1], max_steps).any(), step, carry
        )
        return state, record, t

    return drive


def drive_on_host(
    drivers: Sequence[Driver], params: EnvParams, start: EnvState, shown: int
) -> tuple[EnvState, EnvState]:
    """Drive functions of the host in lock-step: (last states (D, N, ...), record (T + 1, D, ...)).

    Raises:
        DriverError: see `ask`.
    """
    max_steps = int(params.max_steps_in_episode)
    see = jax.jit(lambda state, params: observe(state, params, "compact"))
    move = jax.jit(lambda state, action, params: advance(state, action, params, max_steps))
    state = jax.tree.map(lambda x: jnp.stack([x] * len(drivers)), start)
    on_track = [jax.device_get(jax.tree.map(lambda x: x[:, shown], state))]
    for t in range(max_steps):
        running = np.asarray(is_running(state, max_steps))
        if not running.any():
            break
        obs = np.asarray(see(state, params))
        action = np.zeros((*running.shape, 2), np.float32)
        for d, n in np.argwhere(running):
            action[d, n] = ask(drivers[d], obs[d, n], f"on track {n} after {t} steps")
        state = move(state, action, params)
        on_track.append(jax.device_get(jax.tree.map(lambda x: x[:, shown], state)))
    record = jax.tree.map(lambda *leaves: np.stack(leaves), *on_track)
    return jax.device_get(state), record


# the table ----------------------------------------------------------------------------------------


def standings(
    labels: Sequence[str], ending: np.ndarray, steps: np.ndarray, dt: float
) -> list[dict[str, Any]]:
    """Championship table, best first, from ending and steps (D, N) of all laps.

    The fewest steps of those who complete the lap win a track. Steps are whole, so that laps can
    be equal: then all of them have won, and it is counted how often a win was shared. Order: wins,
    completed laps, mean lap; who is equal in all three shares the place.
    """
    finished = ending == Ending.COMPLETED
    lap = np.where(finished, steps, np.inf)
    won = finished & (lap == lap.min(axis=0))
    shared = won & (won.sum(axis=0) > 1)
    place = 1 + (lap[None, :, :] < lap[:, None, :]).sum(axis=1)  # [d, n]: 1 + how many were faster
    common = finished.all(axis=0)
    rows = []
    for d, label in enumerate(labels):
        laps = steps[d, finished[d]]
        mean = float(laps.mean()) if laps.size else None
        places = [int((place[d] == p + 1)[finished[d]].sum()) for p in range(len(labels))]
        rows.append(
            {
                "driver": label,
                "wins": int(won[d].sum()),
                "shared_wins": int(shared[d].sum()),
                "completed": int(finished[d].sum()),
                "lap_steps_mean": mean,
                "lap_time_mean": None if mean is None else mean * dt,
                "lap_steps_best": int(laps.min()) if laps.size else None,
                "common_lap_steps_mean": float(steps[d, common].mean()) if common.any() else None,
                "places": places,
                "endings": {name: int((ending[d] == e).sum()) for e, name in ENDINGS.items()},
            }
        )

    def order(row: dict[str, Any]) -> tuple[float, ...]:
        mean = row["lap_steps_mean"]
        return -row["wins"], -row["completed"], float("inf") if mean is None else mean

    rows.sort(key=order)
    for i, row in enumerate(rows):
        equal = i > 0 and order(row) == order(rows[i - 1])
        rows[i] = {"place": rows[i - 1]["place"] if equal else i + 1, **row}
    return rows
