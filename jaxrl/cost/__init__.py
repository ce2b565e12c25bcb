"""What a program costs: operations (`flops`), the alpha-FLOPs index (`alpha_flops`), `energy`.

The three know functions, shapes and arrays; no agent, no environment, no network access.
"""
