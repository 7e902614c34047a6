"""``python -m meta_lightning``."""

from meta_lightning.cli import main

if __name__ == "__main__":
    main()
