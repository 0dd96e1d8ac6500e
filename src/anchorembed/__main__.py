"""``python -m anchorembed``: the command line."""

from anchorembed.cli.main import main

if __name__ == "__main__":
    main()
