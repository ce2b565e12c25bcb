"""Every setting of every agent: a bad value is refused by its name, any good one makes a program.

What is good is said here once more, in `REALS` and `CHOICES`: not read from the code under test.
"""

import dataclasses
import importlib
import itertools
import math

import gymnax
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxrl.envs  # noqa: F401  (registers)
from jaxrl import agents
from jaxrl.networks import ACTIVATIONS

ENVS = {  # where an agent's spaces allow it, both kinds of action
    "ppo": ("CartPole-v1", "Pendulum-v1"),
    "reinforce": ("MarsRover-v0", "Pendulum-v1"),
    "sac": ("CartPole-v1", "Pendulum-v1"),
    "dqn": ("CartPole-v1",),
    "q_learning": ("MarsRover-v0",),
    "td3": ("Pendulum-v1",),
    "ddpg": ("Pendulum-v1",),
    "dsac": ("Pendulum-v1",),
}
FLOAT32_MAX = 2.0**128 - 2.0**104
PAST = math.inf  # a bound that is open
# field -> lowest, highest, whether the lowest itself is allowed
REALS = {
    **dict.fromkeys(
        [
            *("learning_rate", "value_learning_rate", "actor_rate_factor", "alpha_rate_factor"),
            *("clip_eps", "max_grad_norm", "adam_eps", "initial_alpha", "min_std", "td_bound"),
            "sigma_start",
        ],
        (0.0, PAST, False),
    ),
    **dict.fromkeys(
        ["vf_coef", "ent_coef", "exploration_noise", "target_noise", "target_noise_clip"],
        (0.0, PAST, True),
    ),
    **dict.fromkeys(
        [
            *("gamma", "gae_lambda", "epsilon_start", "epsilon_end", "priority_alpha"),
            *("priority_beta", "target_entropy_ratio", "ou_theta", "learning_rate_power"),
        ],
        (0.0, 1.0, True),
    ),
    "tau": (0.0, 1.0, False),
    "epsilon_fraction": (0.0, 1.0, False),
    "sigma_factor": (1.0, PAST, True),
    "initial_log_std": (-10.0, 2.0, True),
    "target_entropy": (-PAST, math.log(2.0), True),
    "initial_q": (-PAST, PAST, True),
    ("q_learning", "learning_rate"): (0.0, 1.0, False),
    ("q_learning", "epsilon_fraction"): (0.0, 1.0, True),
}
CHOICES = {
    "activation": tuple(ACTIVATIONS),
    "squash": ("tanh", "clip"),
    "loss": ("huber", "squared"),
    "epsilon_decay": ("linear", "exponential"),
    "noise": ("gaussian", "ou", "parameter"),
    "method": ("q_learning", "sarsa", "expected_sarsa"),
    "returns": ("rollouts", "episode"),
    "baseline": ("value", "mean", "none"),
}
# counts, small enough for many examples; what they depend on is met by most draws
COUNTS = {
    "total_steps": (1, 2_000),
    "num_envs": (1, 6),
    "num_steps": (1, 12),
    "num_epochs": (1, 3),
    "num_minibatches": (1, 3),
    "train_every": (1, 3),
    "num_gradient_steps": (1, 3),
    "batch_size": (1, 32),
    "buffer_size": (6, 100),
    "learning_starts": (0, 100),
    "target_every": (1, 3),
    "policy_delay": (1, 3),
    "n_step": (1, 4),
    "num_states": (1, 12),
    "num_rollouts": (1, 3),
    "max_rollout_steps": (1, 20),
    "num_value_steps": (1, 4),
}
NO_NUMBERS = ["0.1", None, True, (), [0.5], 1j, math.nan, np.float32("nan"), np.zeros(2)]
NO_COUNTS = [0, -1, -(2**40), 1.0, 2.5, math.nan, math.inf, "8", None, True, (8,), [8]]
NO_CHOICES = ["", "Tanh", "nonsense", 0, None, True, (), ["tanh"], {}]
NO_FLAGS = [0, 1, "False", None, 0.0, (), [True]]
NO_WIDTHS = [64, [64], "64", None, (0,), (64, -1), (64.0,), (True,), ("64",), ((64,),)]


def kind(name: str, field: dataclasses.Field) -> str:
    kinds = {bool: "flag", int: "count", float: "real", str: "choice", tuple: "widths"}
    return kinds[type(field.default)]


def bounds(agent: str, name: str) -> tuple[float, float, bool]:
    return REALS.get((agent, name)) or REALS[name]


def config_of(agent: str):
    return importlib.import_module(f"jaxrl.agents.{agent}").Config


CASES = [(a, f.name) for a in agents.NAMES for f in dataclasses.fields(config_of(a))]


@pytest.fixture(scope="module")
def made():
    return {env: gymnax.make(env) for env in set(itertools.chain(*ENVS.values()))}


def bad_values(agent: str, field: dataclasses.Field) -> list:
    name = field.name
    match kind(name, field):
        case "real":
            low, high, closed = bounds(agent, name)
            beyond = [math.inf, -math.inf, 1e39, -1e39, 10**400, np.float64(-1e300)]
            if low != -PAST:
                beyond += [np.nextafter(low, low - 1), low - 1.0, low - 1e6, np.float32(low - 0.5)]
            if not closed:
                beyond += [low, -0.0 if low == 0.0 else low]
            if high != PAST:
                beyond += [np.nextafter(high, high + 1), high + 0.5, 1e6, jax.numpy.float32(9.0)]
            return [*NO_NUMBERS, *beyond]
        case "count":
            return [v for v in NO_COUNTS if not (name == "learning_starts" and v == 0)]
        case "choice":
            return [v for v in NO_CHOICES if v not in CHOICES[name]]
        case "flag":
            return NO_FLAGS
    return NO_WIDTHS


@pytest.mark.parametrize(("agent", "name"), CASES, ids=[f"{a}-{n}" for a, n in CASES])
def test_a_bad_value_is_refused_with_its_name(agent, name, made):
    """Of each field there is, so that none is without a check."""
    module = importlib.import_module(f"jaxrl.agents.{agent}")
    (field,) = (f for f in dataclasses.fields(module.Config) if f.name == name)
    env, params = made[ENVS[agent][-1]]
    for value in bad_values(agent, field):
        config = dataclasses.replace(module.Config(), **{name: value})
        with pytest.raises(ValueError, match=rf"\b{name} = ") as refused:
            module.make_train(config, env, params)
        assert f"{name} = {value!r} must " in str(refused.value)


@pytest.mark.parametrize(("agent", "name"), [c for c in CASES if c[1] in REALS])
@given(data=st.data())
def test_any_real_is_accepted_inside_its_bounds_and_refused_outside(agent, name, made, data):
    module = importlib.import_module(f"jaxrl.agents.{agent}")
    low, high, closed = bounds(agent, name)
    value = data.draw(st.floats())
    fits = (low <= value if closed else low < value) and value <= high and abs(value) <= FLOAT32_MAX
    config = dataclasses.replace(module.Config(), **{name: value})
    if fits:
        module.check_config(config, *made[ENVS[agent][-1]])
        return
    with pytest.raises(ValueError, match=rf"\b{name} = ") as refused:
        module.check_config(config, *made[ENVS[agent][-1]])
    assert repr(value) in str(refused.value)


def a_value(agent: str, field: dataclasses.Field):
    name = field.name
    match kind(name, field):
        case "flag":
            return st.booleans()
        case "choice":
            return st.sampled_from(CHOICES[name])
        case "count":
            return st.integers(*COUNTS[name])
        case "widths":
            return st.lists(st.integers(1, 9), max_size=3).map(tuple)
    low, high, closed = bounds(agent, name)
    low, high = max(low, -1e6), min(high, 1e6)
    return st.floats(low, high, exclude_min=not closed)


def a_config(agent: str):
    fields = dataclasses.fields(config_of(agent))
    return st.fixed_dictionaries({f.name: a_value(agent, f) for f in fields})


# one of each kind of learner: each example takes half a second to trace
QUICK = [
    *(("ppo", "CartPole-v1"), ("dqn", "CartPole-v1"), ("sac", "Pendulum-v1")),
    *(("q_learning", "MarsRover-v0"), ("reinforce", "MarsRover-v0")),
]


@pytest.mark.filterwarnings("ignore:total_steps = ")
@pytest.mark.parametrize(
    ("agent", "env_id"),
    [
        pytest.param(a, e, marks=[] if (a, e) in QUICK else pytest.mark.slow)
        for a in agents.NAMES
        for e in ENVS[a]
    ],
)
@given(data=st.data())
def test_a_config_makes_a_program_or_is_refused_by_name(agent, env_id, made, data):
    """What settings of its own ranges cannot do together is said with a field's name and value."""
    module = importlib.import_module(f"jaxrl.agents.{agent}")
    settings = data.draw(a_config(agent), label="config")
    try:
        train = module.make_train(module.Config(**settings), *made[env_id])
    except ValueError as refused:
        words = str(refused)
        named = [
            n for n, v in settings.items() if f"{n} = {v!r}" in words or f'{n} = "{v}"' in words
        ]
        assert named, words
        return
    state, metrics = jax.eval_shape(train, jax.random.key(0))
    assert state.num_updates.shape == ()
    assert all(m.shape[0] == train.num_updates for m in metrics.values())
