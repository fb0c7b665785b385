"""Train a target or a drafter, or several drafters at once (the target then runs once per step for all of them):

    python train.py configs/NAME.py [configs/OTHER.py ...] [--field value ...]

A config file holds one recipe; every field can be overridden, in all of them. Runs resume by themselves and stop
cleanly on Ctrl-C. `jaxspec train NAME` is the same where no checkout is at hand.
"""

import sys

from jaxspec import cli


def main() -> None:
    sys.exit(cli.main(["train", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
