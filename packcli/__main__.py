"""`python -m packcli`: the same as the console script; what torchrun and a cluster job start."""

from packcli.cli import main

if __name__ == "__main__":
    main()
