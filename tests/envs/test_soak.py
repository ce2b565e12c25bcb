"""Ten million steps of each environment, with what must hold checked after every one of them.

Half of the drivers act at random, half know how to: so that episodes end early, late, in every way
and by the time limit. Everything is checked inside one compiled scan, which counts violations.
"""

from functools import partial
from typing import Any, NamedTuple

import gymnax
import jax
import jax.numpy as jnp
import pytest

from benchmarks.env_steps import pilot
from benchmarks.lunar_lander_parity import controller
from jaxrl.envs import Ending, LanderEnding

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

NUM_ENVS = 1024
NUM_STEPS = 10_000_000
EVERY = 64  # steps between two looks at the final observation, which need another step
KEY = jax.random.key(0)


class Case(NamedTuple):
    """An environment, who drives half of it, and what its specification says of one step."""

    env_id: str
    arguments: dict[str, Any]
    limit: int
    act: Any  # observation -> action
    rules: Any  # (state before, Step) -> {name: () bool}
    endings: int  # kinds of info["ending"], all of which must be seen
    allowed: dict[str, int]  # violations, of all steps


class Step(NamedTuple):
    """What one step returned."""

    final: jax.Array  # observation before an automatic reset
    reward: jax.Array
    terminated: jax.Array
    info: dict[str, jax.Array]
    params: Any


def racer_rules(before, step):
    failed = step.info["ending"] > Ending.COMPLETED
    paid = step.params.dt * step.info["speed"]
    return {
        "terminated": step.terminated == (step.info["ending"] != Ending.NONE),
        "success": step.info["success"] == (step.info["ending"] == Ending.COMPLETED),
        "reward of a failure": ~failed | (step.reward == step.params.failure_reward),
        "reward of a step": failed | (jnp.abs(step.reward - paid) <= 1e-6),
        "speed": jnp.abs(step.info["speed"]) <= 0.5 + 0.004 * (before.time + 2),
        "zeros after a failure": ~failed | (step.final == 0).all(),
        "progress": (step.info["progress"] >= 0) & (step.info["progress"] <= 1),
    }


def rover_rules(before, step):
    paid = step.params.rewards[before.position]
    return {
        "reward": step.reward == paid,
        "terminated": step.terminated == ((before.position == 0) | (before.position == 29)),
        "one state": (step.final.sum() == 1) & (step.final.max() == 1),
    }


def lander_rules(before, step):
    ending, done = step.info["ending"], step.terminated
    x = jnp.abs(step.final[0])
    # of the change of shaping, less at most 0.3 and 0.03 for the engines
    shaping = (
        -100.0 * jnp.hypot(step.final[0], step.final[1])
        - 100.0 * jnp.hypot(step.final[2], step.final[3])
        - 100.0 * jnp.abs(step.final[4])
        + 10.0 * (step.final[6] + step.final[7])
    )
    fuel = (shaping - before.shaping) - step.reward
    at_end = jnp.where(ending == LanderEnding.LANDED, 100.0, -100.0)
    return {
        "terminated": done == (ending != LanderEnding.NONE),
        "success": step.info["success"] == (ending == LanderEnding.LANDED),
        "reward at the end": ~done | (step.reward == at_end),
        "reward of a step": done | ((fuel >= -2e-3) & (fuel <= 0.332)),
        "out of view": (ending != LanderEnding.OUT_OF_VIEW) | (x >= 1),
        "legs": ((step.final[6:] == 0) | (step.final[6:] == 1)).all(),
        "x": x <= 2.5,
        "in view": (ending != LanderEnding.NONE) | (x < 1),
    }


# The final observation is compared with that of another program: rounded otherwise, a ray that
# grazes the road's edge ends elsewhere, one in 10,000 of them at the most.
GRAZING = {"final observation": NUM_STEPS // EVERY // 10_000}
CASES = {
    "MicroRacer": Case(
        "MicroRacer-v0", {"num_tracks": 64}, 450, pilot, racer_rules, len(Ending), GRAZING
    ),
    "MarsRover": Case(
        "MarsRover-v0",
        {"length": 30, "start": "uniform", "misstep_prob": 0.1},
        60,
        lambda obs: jnp.int32(obs[:15].sum() == 0),
        rover_rules,
        0,
        {},
    ),
    "LunarLander": Case(
        "LunarLander-v3",
        {},
        400,
        partial(controller, continuous=False),
        lander_rules,
        len(LanderEnding),
        GRAZING,
    ),
    "LunarLanderContinuous": Case(
        "LunarLanderContinuous-v3",
        {},
        400,
        partial(controller, continuous=True),
        lander_rules,
        len(LanderEnding),
        GRAZING,
    ),
}


class Carry(NamedTuple):
    """Of all environments: (NUM_ENVS, ...) or counts."""

    state: Any
    obs: jax.Array
    age: jax.Array  # steps since the last end, counted here
    num_ended: jax.Array
    violations: dict[str, jax.Array]
    endings: jax.Array  # (kinds,) how often each was seen
    num_truncated: jax.Array


def finite(tree):
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()


def one_step(case, env, params, reckless, key, state, obs, age):
    """One step of one environment: what goes on, and which rules held."""
    key_act, key_env = jax.random.split(key)
    random = env.action_space(params).sample(key_act)
    action = jnp.where(reckless, random, case.act(obs))
    obs, after, reward, terminated, truncated, info = env.step(key_env, state, action, params)
    final, done = info["final_observation"], terminated | truncated
    space = env.observation_space(params)
    held = case.rules(state, Step(final, reward, terminated, info, params)) | {
        "finite": finite((obs, after, reward, info)),
        "in the space": space.contains(obs) & space.contains(final),
        "truncated at the limit alone": truncated == (state.time + 1 >= case.limit),
        "clock": after.time == jnp.where(done, 0, state.time + 1),
        "every episode ends": age + 1 <= case.limit,
        "final observation where nothing ended": done | (obs == final).all(),
        "observation of the state": jnp.allclose(obs, env.observe(key, after, action, params)),
    }
    return after, obs, jnp.where(done, 0, age + 1), terminated, truncated, info, held


def soak(case, num_steps):
    """Violations by rule, episodes of each environment, endings seen, episodes cut."""
    env, params = gymnax.make(case.env_id, **case.arguments)
    params = params.replace(max_steps_in_episode=case.limit)
    reckless = jnp.arange(NUM_ENVS) % 2 == 0

    def final_by_hand(inputs):
        """The final observation of a step, without automatic reset; for each environment."""
        keys, state, obs = inputs

        def one(key, state, obs, reckless):
            key_act, key_env = jax.random.split(key)
            random = env.action_space(params).sample(key_act)
            action = jnp.where(reckless, random, case.act(obs))
            return env.step_env(jax.random.split(key_env)[0], state, action, params)[0]

        return jax.vmap(one)(keys, state, obs, reckless)

    def step(carry, i):
        keys = jax.random.split(jax.random.fold_in(KEY, i), NUM_ENVS)
        state, obs, age, terminated, truncated, info, held = jax.vmap(
            partial(one_step, case, env, params)
        )(reckless, keys, carry.state, carry.obs, carry.age)
        final = info["final_observation"]
        by_hand = jax.lax.cond(
            i % EVERY == 0, final_by_hand, lambda _: final, (keys, carry.state, carry.obs)
        )
        held["final observation"] = jnp.abs(by_hand - final).max(axis=-1) <= 1e-4
        ending = info.get("ending", jnp.zeros(NUM_ENVS, jnp.int32))
        return Carry(
            state,
            obs,
            age,
            carry.num_ended + (terminated | truncated),
            {name: carry.violations[name] + jnp.sum(~held[name]) for name in held},
            carry.endings + jnp.bincount(ending, length=max(case.endings, 1)),
            carry.num_truncated + jnp.sum(truncated & ~terminated),
        )

    @jax.jit
    def run():
        keys = jax.random.split(jax.random.fold_in(KEY, 2**31), NUM_ENVS)
        obs, state = jax.vmap(env.reset, in_axes=(0, None))(keys, params)
        zeros = jnp.zeros(NUM_ENVS, jnp.int32)
        none = jnp.zeros((), jnp.int32)
        inputs = (KEY, *jax.tree.map(lambda x: x[0], (state, obs)), none)
        held = jax.eval_shape(partial(one_step, case, env, params, True), *inputs)[-1]
        violations = dict.fromkeys([*held, "final observation"], none)
        endings = jnp.zeros(max(case.endings, 1), jnp.int32)
        carry = Carry(state, obs, zeros, zeros, violations, endings, none)
        return jax.lax.scan(
            lambda carry, i: (step(carry, i), None), carry, jnp.arange(-(-num_steps // NUM_ENVS))
        )[0]

    return jax.device_get(run())


@pytest.mark.parametrize("name", CASES)
def test_ten_million_steps_break_no_rule(name):
    case = CASES[name]
    end = soak(case, NUM_STEPS)
    broken = {rule: int(n) for rule, n in end.violations.items() if n > case.allowed.get(rule, 0)}
    assert not broken, broken
    assert (end.num_ended >= NUM_STEPS // NUM_ENVS // case.limit).all()
    assert end.num_truncated > 0
    assert not case.endings or (end.endings > 0).all(), end.endings
