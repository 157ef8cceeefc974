"""The training run: engine, loop, evaluation, and what listens to them."""
