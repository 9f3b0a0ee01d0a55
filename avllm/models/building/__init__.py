"""Models and processors made out of settings: described, extended."""
