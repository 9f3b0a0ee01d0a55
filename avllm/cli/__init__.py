"""The avllm command, one file a group of commands."""
