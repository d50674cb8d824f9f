"""``python -m metadist``: the command line, where its script is not on the path."""

from metadist.cli import main

if __name__ == "__main__":
    main()
