"""Make models and processors from settings: described or extended."""
