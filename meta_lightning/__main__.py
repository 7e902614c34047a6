"""``python -m meta_lightning`` and ``meta-lightning``."""

import sys

from meta_lightning.usage import answer


def main() -> None:
    """The command line: bare help at once, all else after the import of torch and Lightning, which takes seconds."""
    answer(sys.argv[1:])
    from meta_lightning.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
