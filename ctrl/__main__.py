"""`python -m ctrl`."""

from ctrl.cli import entry

if __name__ == "__main__":
    entry()
