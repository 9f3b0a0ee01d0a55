"""The frame of recipes: programs that turn a dataset into manifests."""
