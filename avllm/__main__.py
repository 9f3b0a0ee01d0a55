"""Run the command as a module: ``python -m avllm``."""

from avllm.cli.main import main

if __name__ == "__main__":
    main()
