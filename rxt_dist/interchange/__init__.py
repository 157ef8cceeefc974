"""Exchange of weights with the published Reactive Transformer checkpoints."""
