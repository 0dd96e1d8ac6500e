"""``python -m anchorembed`` and the installed command: the command line."""


def main() -> None:
    """Run the command line; stopped during its imports, which take a moment, it ends silently with exit code 130."""
    try:
        from anchorembed.cli.main import main as run  # noqa: PLC0415 - so that a stop during it is seen here

        run()
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
