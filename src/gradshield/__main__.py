"""`python -m gradshield`, and what `accelerate launch -m gradshield` starts."""

from gradshield.cli.commands import main

if __name__ == "__main__":
    main()
