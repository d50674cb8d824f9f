"""``python -m metadist``: the command line, where its script is not on the path."""

from metadist.cli.app import main

if __name__ == "__main__":
    main()
