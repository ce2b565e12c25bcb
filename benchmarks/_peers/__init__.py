"""Other libraries, each in an environment of its own: what `benchmarks.peers` runs.

`install` makes the environments (`requirements/` has their exact versions), `tasks` says who runs
what, `process` starts one run in a process of its own, `measure` is what all of them share. Each
`run_*` is such a process: `python -m benchmarks._peers.run_rejax JSON` in the interpreter of that
library, started in the root of the repository; its last line is JSON. They import nothing of
jaxrl, which is not installed there (`run_jaxrl` is ours and does).
"""
