"""Scripts that train and show agents: the one place where environments and learners meet."""

import jaxrl  # noqa: F401  (before gymnax: it sets a flag for XLA)
