"""`python -m lightning_l2l`."""

from lightning_l2l.commands.cli import main

if __name__ == "__main__":
    main()
