"""Entry point of `python -m gradshield` and `accelerate launch -m gradshield`."""

from gradshield.cli.commands import main

if __name__ == "__main__":
    main()
