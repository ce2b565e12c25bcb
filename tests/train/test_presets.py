"""Presets: each names settings that exist, fit its environment and run as they stand."""

import importlib

import pytest

from train import _cli, _envs, _presets

ALL = [(agent, env_id) for agent, presets in _presets.PRESETS.items() for env_id in presets]


@pytest.mark.parametrize(("agent", "env_id"), ALL)
def test_every_preset_builds(agent, env_id):
    preset = _presets.find(agent, env_id)
    module = importlib.import_module(f"jaxrl.agents.{agent}")
    options, config = _cli.parse(module, ["--env", env_id])
    assert config == module.Config(**preset.config)
    env, params = _envs.probe(env_id, _cli.parse_pairs("env_kwargs", options.env_kwargs))
    module.check_config(config, env, params)
    if env_id != "MicroRacer-v0":  # whose tracks take seconds
        train = module.make_train(config, env, params)  # warns, which fails, where it must round
        assert train.total_steps == config.total_steps


@pytest.mark.parametrize(
    ("agent", "env_id"),
    [
        ("ppo", "LunarLander-v3"),
        ("dqn", "LunarLander-v3"),
        ("ppo", "LunarLanderContinuous-v3"),
        ("sac", "LunarLanderContinuous-v3"),
        ("td3", "LunarLanderContinuous-v3"),
        ("ddpg", "LunarLanderContinuous-v3"),
    ],
)
def test_lunar_lander_is_tuned(agent, env_id):
    assert _presets.find(agent, env_id).config
