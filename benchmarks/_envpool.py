"""envpool's steps per second, in an interpreter that has it; see lunar_lander_steps.py.

    python _envpool.py SECONDS THREADS

Prints JSON: [{"setting": ..., "steps_per_second": ...}, ...]. Random actions, drawn beforehand;
asynchronous where the batch is smaller than the number of environments.
"""

import importlib
import json
import sys
import time

import numpy as np

SETTINGS = ((1024, 1024), (4096, 4096), (64, 64), (256, 64), (1024, 256))  # environments, batch


def measure(num_envs: int, batch: int, threads: int, seconds: float) -> float:
    """Steps per second of one setting."""
    env = importlib.import_module("envpool").make(
        "LunarLander-v3",
        env_type="gymnasium",
        num_envs=num_envs,
        batch_size=batch,
        num_threads=threads,
        seed=0,
    )
    env.async_reset()
    actions = np.random.default_rng(0).integers(0, 4, (64, batch)).astype(np.int32)
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


if __name__ == "__main__":
    seconds, threads = float(sys.argv[1]), int(sys.argv[2])
    rows = [
        {
            "setting": f"{num_envs} environments, batches of {batch}, {threads} threads",
            "steps_per_second": measure(num_envs, batch, threads, seconds),
        }
        for num_envs, batch in SETTINGS
    ]
    print(json.dumps(rows))
