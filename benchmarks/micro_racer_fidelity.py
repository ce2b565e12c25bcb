"""Do the original's published agents drive here as they drive there?

    python -m benchmarks.micro_racer_fidelity --reference DIR \
        --json benchmarks/results/micro_racer_fidelity.json

DIR holds `micro_racer_published_actors.npz`: the six networks that come with
github.com/asperti/MicroRacer (MIT), as arrays. They and a hand-written pilot each drive once on
every one of several thousand fresh tracks (default flags, deterministic actions, at most 1,000
steps), all in one compiled program. Beside it stand the figures of the original environment: one
lap on each of 400 tracks, the same for all drivers.

Wanted: completion within 4 points and steps per completed lap within 3 % for DDPG, PPO, TD3, DSAC
and the pilot. Both sides are samples: `+-` is one standard error, of the difference for the
differences.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxrl.envs import Ending, MicroRacer, make_tracks
from jaxrl.envs.micro_racer import EnvParams, start
from train._run import machine

# In the original: share completed, mean return, discounted return, steps per completed lap,
# border / wrong way / slow / cap, of 400.
ORIGINAL = {
    "ddpg": (0.920, 6.18, 0.88, 730, (31, 1, 0, 0)),
    "ppo": (0.838, 5.37, 0.61, 804, (65, 0, 0, 0)),
    "td3": (0.730, 5.30, 0.67, 898, (77, 1, 0, 30)),
    "dsac": (0.422, 3.05, 0.65, 564, (229, 1, 1, 0)),
    "sac": (0.168, 3.82, 0.59, 619, (137, 1, 0, 195)),
    "ddpg2": (0.025, -0.18, 0.21, 437, (390, 0, 0, 0)),
    "pilot": (0.948, 6.26, 0.94, 675, (17, 4, 0, 0)),
}
ORIGINAL_LAPS = 400
BARRED = ("ddpg", "ppo", "td3", "dsac", "pilot")
MOST_POINTS, MOST_PERCENT = 4.0, 3.0


@dataclass
class Options:
    """Command line."""

    reference: Path
    """Folder with micro_racer_published_actors.npz."""
    num_tracks: int = 4096
    """Fresh tracks, one lap of each driver on each."""
    tracks_at_once: int = 512
    """Size of a bank; bounds the memory."""
    seed: int = 1
    """Of the tracks and of the initial speeds."""
    json: Path | None = None
    """Where to write the numbers."""


def make_drivers(path: Path) -> dict:
    """The published actors and the pilot, by name: compact obs (5,) -> action (2,)."""
    with np.load(path) as z:
        arrays = {name: jnp.asarray(z[name]) for name in z.files}

    def dense(name, x):
        return x @ arrays[f"{name}.W"] + arrays[f"{name}.b"]

    def norm(name, x):
        x = (x - x.mean()) / jnp.sqrt(x.var() + 1e-3)
        return x * arrays[f"{name}.gamma"] + arrays[f"{name}.beta"]

    def network(agent, activation, head):
        def act(obs):
            x = activation(dense(f"{agent}.d1", obs))
            return jnp.tanh(dense(f"{agent}.{head}", activation(dense(f"{agent}.d2", x))))

        return act

    def ddpg(obs):
        def tower(name):
            x = jax.nn.relu(dense(f"ddpg.{name}.d2", jax.nn.relu(dense(f"ddpg.{name}.d1", obs))))
            return jnp.tanh(dense(f"ddpg.{name}.out", x))[0]

        return jnp.stack([tower("acc"), tower("turn")])

    def ddpg2(obs):
        x = norm("ddpg2.ln1", jax.nn.relu(dense("ddpg2.d1", obs)))
        x = norm("ddpg2.ln2", jax.nn.relu(dense("ddpg2.d2", x)))
        return jnp.tanh(dense("ddpg2.out", x))

    return {
        "ddpg": ddpg,
        "ppo": network("ppo", jnp.tanh, "mu"),
        "td3": network("td3", jax.nn.relu, "out"),
        "dsac": network("dsac", jax.nn.relu, "mu"),
        "sac": network("sac", jax.nn.relu, "mu"),
        "ddpg2": ddpg2,
        "pilot": pilot,
    }


def pilot(obs: jax.Array) -> jax.Array:
    """Steer to the longest ray at speed clip(2 * longest, 0.12, 0.25)."""
    direction, longest, speed = obs[0], obs[2], obs[4]
    change = (jnp.clip(2 * longest, 0.12, 0.25) - speed) / 0.004
    after = jnp.maximum(speed + 0.004 * jnp.clip(change, -1, 1), 1e-3)
    most = jnp.minimum(np.pi / 6, 1.741 * 0.04 / after)
    return jnp.clip(jnp.stack([change, -direction / most]), -1, 1)


def make_drive(drivers: dict):
    """Return drive(params, speed (N,)): a lap of each driver on each of N tracks, (D, N)."""
    env = MicroRacer()

    def drive(params, speed):
        tracks = jnp.arange(len(speed), dtype=jnp.int32)
        state = jax.vmap(start, in_axes=(None, 0, 0))(params.tracks, tracks, speed)
        state = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(drivers)), state)
        axes = (None, 0, None, None)
        observe = jax.vmap(jax.vmap(env.observe, axes), axes)
        axes = (None, 0, 0, None)
        step_env = jax.vmap(jax.vmap(env.step_env, axes), axes)
        key = jax.random.key(0)  # steps are deterministic

        def step(carry, t):
            state, obs, running, total, discounted, length = carry
            actions = [jax.vmap(act)(o) for act, o in zip(drivers.values(), obs, strict=True)]
            obs, new, reward, *_ = step_env(key, state, jnp.stack(actions), params)
            reward = jnp.where(running, reward, 0.0)
            total, discounted = total + reward, discounted + 0.99**t * reward
            length = length + running
            state = jax.tree.map(
                lambda a, b: jnp.where(running.reshape(running.shape + (1,) * (a.ndim - 2)), a, b),
                new,
                state,
            )
            running = running & (state.ending == Ending.NONE)
            return (state, obs, running, total, discounted, length), None

        zeros = jnp.zeros((len(drivers), len(speed)))
        obs = observe(key, state, None, params)
        carry = (state, obs, zeros == 0, zeros, zeros, zeros.astype(jnp.int32))
        steps = jnp.arange(1000, dtype=jnp.float32)
        state, _, _, total, discounted, length = jax.lax.scan(step, carry, steps)[0]
        return state.ending, total, discounted, length

    return jax.jit(drive)


def main(options: Options) -> list[dict]:
    """Drive, print a Markdown table, write JSON if asked."""
    drivers = make_drivers(options.reference / "micro_racer_published_actors.npz")
    drive = make_drive(drivers)
    results = []
    for i in range(-(-options.num_tracks // options.tracks_at_once)):
        key = jax.random.fold_in(jax.random.key(options.seed), i)
        key_tracks, key_speed = jax.random.split(key)
        params = EnvParams(tracks=make_tracks(key_tracks, options.tracks_at_once))
        u = jax.random.uniform(key_speed, (options.tracks_at_once,))
        results.append(jax.device_get(drive(params, jnp.maximum(u / 2, 0.07))))
    ending, total, discounted, length = (
        np.concatenate(r, axis=1) for r in zip(*results, strict=True)
    )

    num_laps = ending.shape[1]
    print(f"{num_laps} tracks here, {ORIGINAL_LAPS} in the original\n")
    columns = ["driver", "completed here", "original", "difference in points"]
    columns += ["steps per lap here", "original", "difference", "return here", "original"]
    columns += ["discounted here", "original", "border / wrong way / slow / cap in %"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    rows = []
    for d, name in enumerate(drivers):
        share, mean_return, mean_discounted, steps, endings = ORIGINAL[name]
        done = ending[d] == Ending.COMPLETED
        ours = done.mean()
        error = np.sqrt(ours * (1 - ours) / num_laps)
        points = 100 * (ours - share)
        points_error = 100 * np.sqrt(error**2 + share * (1 - share) / ORIGINAL_LAPS)
        laps = length[d][done]
        percent = 100 * (laps.mean() / steps - 1)
        # the original's spread from lap to lap is taken to be ours
        spread = laps.std() * np.sqrt(1 / len(laps) + 1 / max(share * ORIGINAL_LAPS, 1))
        percent_error = 100 * spread / steps
        failures = [100 * float(np.mean(ending[d] == e)) for e in (2, 3, 4, 0)]
        is_met = abs(points) <= MOST_POINTS and abs(percent) <= MOST_PERCENT
        rows.append(
            {
                "driver": name,
                "completed": float(ours),
                "completed_error": float(error),
                "completed_original": share,
                "points": float(points),
                "points_error": float(points_error),
                "steps": float(laps.mean()),
                "steps_original": steps,
                "steps_percent": float(percent),
                "steps_percent_error": float(percent_error),
                "return": float(total[d].mean()),
                "return_original": mean_return,
                "discounted": float(discounted[d].mean()),
                "discounted_original": mean_discounted,
                "failures_percent": failures,
                "failures_percent_original": [100 * e / ORIGINAL_LAPS for e in endings],
                "has_bar": name in BARRED,
                "is_met": bool(is_met),
            }
        )
        verdict = "" if name not in BARRED else " (met)" if is_met else " (MISSED)"
        shares = " / ".join(f"{f:.1f}" for f in failures)
        print(
            f"| {name}{verdict} | {100 * ours:.1f} % +- {100 * error:.1f} | {100 * share:.1f} % |"
            f" {points:+.1f} +- {points_error:.1f} | {laps.mean():.0f} | {steps} |"
            f" {percent:+.1f} % +- {percent_error:.1f} | {total[d].mean():.2f} | {mean_return} |"
            f" {discounted[d].mean():.2f} | {mean_discounted} | {shares} |"
        )
    if options.json:
        result = {
            "machine": machine(),
            "num_tracks": num_laps,
            "num_laps_original": ORIGINAL_LAPS,
            "seed": options.seed,
            "rows": rows,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
