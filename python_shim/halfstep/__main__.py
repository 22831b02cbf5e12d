"""`python -m halfstep`: where things are and how they were built; what a policy file and torch's autocast say."""

from __future__ import annotations

import argparse
import json
import sys

from halfstep._library import build_info, cmake_prefix
from halfstep.errors import LibraryMismatchError


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line: one of two options, or the command `policy` with a file or --ops."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--cmake-prefix", action="store_true", help="for -DCMAKE_PREFIX_PATH")
    which.add_argument("--build-info", action="store_true", help="versions, CUDA architectures, compilers")
    policy = parser.add_subparsers(dest="command").add_parser("policy", help="check a policy file; list autocast's ops")
    what = policy.add_mutually_exclusive_group(required=True)
    what.add_argument("file", nargs="?", help="a policy as JSON: its rules as a table, or what is wrong")
    what.add_argument("--ops", action="store_true", help="what the running torch's autocast does with each op")
    policy.add_argument("--device", choices=("cpu", "cuda"), help="with --ops, this device alone; needs no GPU")
    arguments = parser.parse_args()
    if bool(arguments.command) + arguments.cmake_prefix + arguments.build_info != 1:
        parser.error("expected one of --cmake-prefix, --build-info and the command policy")
    if arguments.command and arguments.device and not arguments.ops:
        policy.error("--device goes with --ops")
    return arguments


def print_policy(path: str) -> None:
    """Print the rules of a policy file as a table."""
    from halfstep.policy import PrecisionPolicy

    policy = json.loads(PrecisionPolicy.load(path).to_json())
    columns = ("name", "type", "precision", "reason")
    rows = [
        [rule.get(column, "*" if column in ("name", "type") else "") for column in columns]
        for rule in policy.get("rules", [])
    ]
    rows = [list(columns), *rows, ["*", "*", policy["default"], "default"]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"policy {policy['name']}, the first rule that matches decides")
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main() -> int:
    """Run the command line."""
    arguments = parse(argparse.ArgumentParser(prog="python -m halfstep", description=__doc__))
    try:
        if arguments.cmake_prefix:
            print(";".join(map(str, cmake_prefix())))
        elif arguments.build_info:
            for key, value in build_info().items():
                print(f"{key:20} {value}")
        elif arguments.ops:
            from halfstep.autocast_ops import DEVICES, format_ops

            print(format_ops([arguments.device] if arguments.device else DEVICES), end="")
        else:
            print_policy(arguments.file)
    except (LibraryMismatchError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
