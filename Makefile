# Short names for dev.py, which works without make: see `python3 dev.py`.
.PHONY: setup train test test-all check bench wheel

setup:
	python3 dev.py setup
train:
	python3 dev.py train
test:
	python3 dev.py test
test-all:
	python3 dev.py test-all
check:
	python3 dev.py check
bench:
	python3 dev.py run python -m benchmarks.env_steps
wheel: setup
	python3 dev.py run python -m uv build
