"""Files as bytes: shards, remote stores, folders that are written whole or not at all."""
