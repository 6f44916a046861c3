"""`python -m lightning_l2l`."""

from lightning_l2l.commands.main import main

if __name__ == "__main__":
    main()
