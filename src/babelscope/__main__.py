"""`python -m babelscope`: the command `babelscope` if it is not installed."""

from babelscope.cli import main

if __name__ == "__main__":
    main()
