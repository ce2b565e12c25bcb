"""The environments, pure functions on gymnax 1.0's interface. Import them as `jaxrl.envs`."""
