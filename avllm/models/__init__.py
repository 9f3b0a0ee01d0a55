"""The composed model, its processor and its checkpoints."""
