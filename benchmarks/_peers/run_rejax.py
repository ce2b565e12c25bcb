"""rejax trains: `python -m benchmarks._peers.run_rejax JSON`, in rejax's environment.

Its evaluations during training are replaced by nothing, as ours has none there; its own evaluation
(128 episodes, actions drawn as it does) comes after, not timed.
"""

# pyright: reportMissingImports=false

import json
import sys
from typing import Any

import jax
import rejax
import rejax.buffers
from flax import linen as nn
from rejax import networks

from benchmarks._peers import measure


def mend() -> None:
    """Replace the draw of a batch without replacement over the whole buffer by drawn indices."""

    def sample(self: Any, num: int, rng: jax.Array) -> Any:
        index = jax.random.randint(rng, (num,), 0, self.num_entries)
        return jax.tree.map(lambda x: x[index], self.data)

    rejax.buffers.ReplayBuffer.sample = sample


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Train as `settings` say: algorithm, config, num_seeds, num_runs, first_seed, mended, hidden.

    `hidden` (widths) replaces DQN's network, whose widths cannot be set otherwise, by a plain one.
    """
    if settings.get("mended"):
        mend()
    algorithm = getattr(rejax, settings["algorithm"]).create(**settings["config"])
    if settings.get("hidden"):
        q_net = networks.EpsilonGreedyPolicy(networks.DiscreteQNetwork)(
            hidden_layer_sizes=tuple(settings["hidden"]),
            activation=nn.relu,
            action_dim=algorithm.action_dim,
        )
        algorithm = algorithm.replace(agent=q_net)
    evaluate = algorithm.eval_callback
    algorithm = algorithm.replace(
        eval_callback=lambda *_: (),
        skip_initial_evaluation=True,
        eval_freq=algorithm.total_timesteps,
    )

    def train(key: jax.Array) -> Any:
        return algorithm.train(key)[0]

    def score(state: Any, key: jax.Array) -> jax.Array:
        return evaluate(algorithm, state, key)[1].mean()

    names = ("num_seeds", "num_runs", "first_seed")
    result = measure.train_jax(
        train, score, jax.random.PRNGKey, *(settings[name] for name in names)
    )
    return {**result, "versions": measure.versions("rejax", "gymnax", "jax", "flax", "optax")}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
