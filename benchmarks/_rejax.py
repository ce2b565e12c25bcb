"""Runs rejax's DQN in an environment of its own; started by `benchmarks.dqn_speed`, prints JSON.

Nothing of jaxrl is imported here: the other library's environment does not have it.
"""

import importlib
import json
import sys
import time

import jax


def mend(buffers) -> None:
    """Replace the draw without replacement over the whole buffer by drawn indices."""

    def sample(self, num, rng):
        index = jax.random.randint(rng, (num,), 0, self.num_entries)
        return jax.tree.map(lambda x: x[index], self.data)

    buffers.ReplayBuffer.sample = sample


def main(settings: dict, num_runs: int, mended: bool) -> None:
    """Compile once, train `num_runs` times with the seeds 0, 1, ..."""
    if mended:
        mend(importlib.import_module("rejax.buffers"))
    algorithm = importlib.import_module("rejax").DQN.create(**settings)
    started = time.perf_counter()
    train = jax.jit(lambda key: algorithm.train(key)).lower(jax.random.PRNGKey(0)).compile()
    compile_s = time.perf_counter() - started
    run_s, returns = [], []
    for seed in range(num_runs):
        started = time.perf_counter()
        _, (_, episode_returns) = jax.block_until_ready(train(jax.random.PRNGKey(seed)))
        run_s.append(time.perf_counter() - started)
        returns.append(float(episode_returns[-1].mean()))
    print(json.dumps({"compile_s": compile_s, "run_s": run_s, "returns": returns}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
