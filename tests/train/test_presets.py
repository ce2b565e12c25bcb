"""Presets: each names settings that exist, fit its environment and run as they stand."""

import importlib

import pytest

from train import _cli, _envs, _presets

ALL = [(agent, env_id) for agent, presets in _presets.PRESETS.items() for env_id in presets]
SAME_LOOP = [(agent, "LunarLanderContinuous-v3") for agent in ("td3", "ddpg", "dsac")]


@pytest.mark.parametrize(("agent", "env_id"), ALL)
def test_every_preset_builds(agent, env_id):
    preset = _presets.find(agent, env_id)
    module = importlib.import_module(f"jaxrl.agents.{agent}")
    options, config = _cli.parse(module, ["--env", env_id])
    assert config == module.Config(**preset.config)
    env, params = _envs.probe(env_id, _cli.parse_pairs("env_kwargs", options.env_kwargs))
    module.check_config(config, env, params)
    # MicroRacer's tracks take seconds, and to trace the lander does: once for the shared loop
    if env_id != "MicroRacer-v0" and (agent, env_id) not in SAME_LOOP:
        train = module.make_train(config, env, params)  # warns, which fails, where it must round
        assert train.total_steps == config.total_steps


@pytest.mark.parametrize("agent", ["ppo", "dqn"])
def test_lunar_lander_is_tuned(agent):
    assert _presets.find(agent, "LunarLander-v3").config


@pytest.mark.parametrize("agent", ["ppo", "sac", "td3", "ddpg", "dsac"])
def test_lunar_lander_continuous_is_tuned(agent):
    assert _presets.find(agent, "LunarLanderContinuous-v3").config
