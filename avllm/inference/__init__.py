"""Chat and batch inference, without a user interface."""
