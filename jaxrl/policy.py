"""A trained policy as one file: params, normaliser, config and spaces; no pickle, nothing executed.

The file is msgpack (flax.serialization): a dictionary of plain values and arrays.
"""

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import numpy as np

from jaxrl import agents, spaces
from jaxrl.normalize import RunningStats
from jaxrl.types import Policy

FORMAT = "jaxrl policy 1"


@dataclasses.dataclass(frozen=True)
class SavedPolicy:
    """A policy with all it takes to act, as read from a file."""

    agent: str  # name of the module in jaxrl.agents
    config: Any  # that module's Config
    action: spaces.ActionSpec
    obs_shape: tuple[int, ...]
    env: str  # id of the environment it was trained on
    env_kwargs: dict[str, Any]  # what `gymnax.make` was given beside the id
    seed: int
    policy: Policy

    def act_fn(self) -> Callable[..., jax.Array]:
        """Return the pure `act(policy, obs, key=None) -> action` of the agent's module."""
        return agent_module(self.agent).make_act(self.config, self.action, self.obs_shape)


def agent_module(name: str) -> Any:
    """Import `jaxrl.agents.<name>`.

    Raises:
        ValueError: there is no such agent.
    """
    if name not in agents.NAMES:
        raise ValueError(f"agent = {name!r} must be one of {', '.join(map(repr, agents.NAMES))}")
    return importlib.import_module(f"jaxrl.agents.{name}")


def save_policy(path: str | Path, saved: SavedPolicy) -> None:
    """Write `saved` to `path`.

    Raises:
        FileExistsError: `path` exists; nothing is overwritten.
        ValueError: params or statistics hold a number that is not finite.
    """
    path = Path(path)
    policy = jax.tree.map(np.asarray, saved.policy)
    check_finite(policy, f"policy of seed {saved.seed}")
    stats = policy.obs_stats
    content = {
        "format": FORMAT,
        "agent": saved.agent,
        "config": _plain(dataclasses.asdict(saved.config)),
        "action": {"kind": type(saved.action).__name__, **_plain(dataclasses.asdict(saved.action))},
        "obs_shape": list(saved.obs_shape),
        "env": saved.env,
        "env_kwargs": _plain(saved.env_kwargs),
        "seed": saved.seed,
        "params": policy.params,
        "obs_stats": None if stats is None else dataclasses.asdict(stats),
    }
    with path.open("xb") as file:
        file.write(flax.serialization.msgpack_serialize(content))


def read_policy(path: str | Path) -> SavedPolicy:
    """Read a policy file, or the policy of a run folder (`<folder>/policy.msgpack`).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no policy file, is damaged, or holds numbers that are not finite.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "policy.msgpack"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a run folder or a policy file")
    try:
        content: Any = flax.serialization.msgpack_restore(path.read_bytes())
        if content["format"] != FORMAT:
            raise ValueError(f"format is {content['format']!r}, not {FORMAT!r}")
        module = agent_module(content["agent"])
        config = module.Config(**_tuples(content["config"]))
        action = _tuples(content["action"])
        kinds = {"Discrete": spaces.Discrete, "Box": spaces.Box}
        stats = content["obs_stats"]
        saved = SavedPolicy(
            agent=content["agent"],
            config=config,
            action=kinds[action.pop("kind")](**action),
            obs_shape=tuple(content["obs_shape"]),
            env=content["env"],
            env_kwargs=content["env_kwargs"],
            seed=content["seed"],
            policy=Policy(content["params"], None if stats is None else RunningStats(**stats)),
        )
    except Exception as error:  # msgpack raises a dozen kinds for damaged bytes
        raise ValueError(f"{path} is not a policy file of this version: {error}") from error
    check_finite(saved.policy, str(path))
    return saved


def load_policy(path: str | Path) -> Callable[..., np.ndarray]:
    """Load a policy as `act(obs, seed=None) -> action`, for NumPy arrays; no training needed.

    `obs` (*batch, *obs_shape) raw, as the environment gives it; the action is in the environment's
    units, (*batch, *action_shape), the most likely one, or drawn where a `seed` is given. The
    normaliser that was saved with the policy is applied.

    Args:
        path: a run folder (its best seed) or a policy file.

    Raises:
        FileNotFoundError, ValueError: see `read_policy`; `act` raises ValueError for a wrong shape
            and for an observation that is not finite.
    """
    saved = read_policy(path)
    compiled, policy = jax.jit(saved.act_fn()), jax.device_put(saved.policy)

    def act(obs: Any, seed: int | None = None) -> np.ndarray:
        obs = np.asarray(obs)
        shape = saved.obs_shape
        if obs.shape[obs.ndim - len(shape) :] != shape:
            raise ValueError(
                f"obs has shape {obs.shape}, but the policy takes {shape}, or batches of it"
            )
        if not np.isfinite(obs).all():
            raise ValueError("obs holds numbers that are not finite")
        key = None if seed is None else jax.random.key(seed)
        return np.asarray(compiled(policy, obs, key))

    return act


def check_finite(tree: Any, what: str) -> None:
    """Raise ValueError, naming the array, if a number in the tree is not finite."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path)
        try:
            is_finite = np.isfinite(leaf).all()
        except TypeError:
            kind = type(leaf).__name__
            raise ValueError(f"{what}: {name} holds no numbers (a {kind})") from None
        if not is_finite:
            raise ValueError(f"{what}: {name} holds numbers that are not finite (NaN or infinity)")


def _plain(value: Any) -> Any:
    """Turn arrays of one number, tuples and NumPy scalars into what msgpack keeps."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return np.asarray(value).item()
    return value


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
