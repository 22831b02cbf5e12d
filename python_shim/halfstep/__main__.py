"""`python -m halfstep`: where things are and how they were built."""

from __future__ import annotations

import argparse
import sys

from halfstep._library import build_info, cmake_prefix
from halfstep.errors import LibraryMismatchError


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m halfstep", description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--cmake-prefix", action="store_true", help="for -DCMAKE_PREFIX_PATH")
    which.add_argument("--build-info", action="store_true", help="versions, CUDA architectures, compilers")
    arguments = parser.parse_args()
    try:
        if arguments.cmake_prefix:
            print(";".join(map(str, cmake_prefix())))
        else:
            for key, value in build_info().items():
                print(f"{key:20} {value}")
    except LibraryMismatchError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
