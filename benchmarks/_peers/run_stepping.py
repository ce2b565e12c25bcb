"""envpool or Gymnasium steps an environment: `python -m benchmarks._peers.run_stepping JSON`.

Random actions, drawn beforehand; automatic resets. Settings: library, env, num_envs (several),
seconds each, threads (envpool's). envpool runs asynchronously where a batch is given as
[num_envs, batch], e.g. [1024, 256]: it hands out the first environments that are done.
"""

# pyright: reportMissingImports=false

import json
import sys
import time
from typing import Any

import numpy as np

from benchmarks._peers import measure


def draw(space: Any, num: int) -> np.ndarray:
    """Draw 64 batches of actions from a single environment's space."""
    rng = np.random.default_rng(0)
    if hasattr(space, "n"):
        return rng.integers(0, space.n, (64, num)).astype(np.int32)
    return rng.uniform(space.low, space.high, (64, num, *space.shape)).astype(np.float32)


def envpool_rate(env_id: str, num_envs: int, batch: int, threads: int, seconds: float) -> float:
    """Steps per second of envpool."""
    import envpool

    env = envpool.make(
        env_id,
        env_type="gymnasium",
        num_envs=num_envs,
        batch_size=batch,
        num_threads=min(threads, num_envs),
        seed=0,
    )
    actions = draw(env.action_space, batch)
    env.async_reset()
    calls, begin = 0, 0.0
    warm_up = 50 * num_envs // batch  # out of the common start
    while True:
        info = env.recv()[-1]
        env.send(actions[calls % 64], info["env_id"])
        calls += 1
        now = time.perf_counter()
        if calls == warm_up:
            begin = now
        elif calls > warm_up and now - begin > seconds:
            env.close()
            return (calls - warm_up) * batch / (now - begin)


def gymnasium_rate(env_id: str, num_envs: int, seconds: float) -> float:
    """Steps per second of Gymnasium: one environment, or its vector in one process."""
    import gymnasium

    steps = 0
    if num_envs == 1:
        env = gymnasium.make(env_id)
        env.reset(seed=0)
        actions = draw(env.action_space, 1)[:, 0]
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds:
            for action in actions:
                _, _, terminated, truncated, _ = env.step(action)
                if terminated or truncated:
                    env.reset()
            steps += len(actions)
        return steps / (time.perf_counter() - begin)
    vector = gymnasium.make_vec(env_id, num_envs, vectorization_mode="sync")
    vector.reset(seed=0)
    actions = draw(vector.single_action_space, num_envs)
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        vector.step(actions[steps // num_envs % 64])
        steps += num_envs
    return steps / (time.perf_counter() - begin)


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Measure all numbers of environments."""
    rates, env_id, seconds = {}, settings["env"], settings["seconds"]
    for entry in settings["num_envs"]:
        if settings["library"] == "gymnasium":
            rates[str(entry)] = gymnasium_rate(env_id, entry, seconds)
            continue
        num, batch = entry if isinstance(entry, list) else (entry, entry)
        name = f"{num}" if num == batch else f"{num}, batches of {batch}"
        rates[name] = envpool_rate(env_id, num, batch, settings["threads"], seconds)
    return {
        "rates": rates,
        "peak_mb": measure.peak_mb(),
        "versions": measure.versions(settings["library"]),
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
