"""Scripts that train and show agents: the one place where environments and learners meet."""
