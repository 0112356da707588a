"""`python -m service` is the same as `llm2vec-service`."""

import sys

from service.device.torch_environment import start_again_with_huge_pages


def run() -> None:
    """The program."""
    start_again_with_huge_pages()

    from service.cli import main

    sys.exit(main())


if __name__ == "__main__":
    run()
