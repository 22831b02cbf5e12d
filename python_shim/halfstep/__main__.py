"""`python -m halfstep`: where builds are; what a policy file and torch's autocast say; data in smaller dtypes."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from halfstep._library import build_info, cmake_prefix, library_path
from halfstep.errors import LibraryMismatchError


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line: one of three options, or one of the commands `policy` and `shrink`."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--cmake-prefix", action="store_true", help="for -DCMAKE_PREFIX_PATH")
    which.add_argument("--library", action="store_true", help="for torch.ops.load_library where the package is not")
    which.add_argument("--build-info", action="store_true", help="versions, CUDA architectures, compilers")
    commands = parser.add_subparsers(dest="command")
    policy = commands.add_parser("policy", help="check a policy file; list autocast's ops")
    what = policy.add_mutually_exclusive_group(required=True)
    what.add_argument("file", nargs="?", help="a policy as JSON: its rules as a table, or what is wrong")
    what.add_argument("--ops", action="store_true", help="what the running torch's autocast does with each op")
    policy.add_argument("--device", choices=("cpu", "cuda"), help="with --ops, this device alone; needs no GPU")
    shrink = commands.add_parser("shrink", help="write data in smaller dtypes, and what became of each column")
    shrink.add_argument("source", help="a .npy, .csv or .parquet file; csv and parquet need pandas")
    shrink.add_argument("-o", "--output", help="default: <name>-small.<npy or parquet>, beside it")
    shrink.add_argument("--mode", choices=("exact", "rtol", "force"), default="rtol", help="default: %(default)s")
    shrink.add_argument(
        "--exclude", action="append", default=[], metavar="COLUMN", help="leave it as it is; repeatable"
    )
    shrink.add_argument("--dry-run", action="store_true", help="print the report, write nothing")
    shrink.add_argument("--force", action="store_true", help="replace an existing output")
    arguments = parser.parse_args()
    if bool(arguments.command) + arguments.cmake_prefix + arguments.library + arguments.build_info != 1:
        parser.error("expected one of --cmake-prefix, --library, --build-info and the commands policy and shrink")
    if arguments.command == "policy" and arguments.device and not arguments.ops:
        policy.error("--device goes with --ops")
    return arguments


def print_build_info() -> None:
    """Print what was built for the torch that is here, or else for TensorFlow; ImportError if neither is."""
    try:
        info = build_info()
    except ModuleNotFoundError as error:
        found = sorted(Path(__file__).parent.glob("tensorflow-*/build_info.json"))
        if error.name != "torch" or not found:
            raise
        info = json.loads(found[-1].read_text())
    for key, value in info.items():
        print(f"{key:20} {value}")


def print_policy(path: str) -> None:
    """Print the rules of a policy file as a table."""
    from halfstep.policies import read_file
    from halfstep.policy_library import Policy

    policy = json.loads(Policy(read_file(path), path).to_json())
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


def shrink(arguments: argparse.Namespace) -> None:
    """Write a file in smaller dtypes and print the report."""
    from halfstep.shrink_files import read, shrink_file
    from halfstep.sklearn_optimizer import SklearnPrecisionOptimizer

    exclude = arguments.exclude
    if exclude and arguments.source.endswith(".npy") and read(arguments.source).dtype.names is None:
        exclude = [int(name) if name.isdigit() else name for name in exclude]
    # What exceeds the memory goes to files beside the result.
    folder = Path(arguments.output or arguments.source).resolve().parent
    optimizer = SklearnPrecisionOptimizer(
        mode=arguments.mode, exclude=exclude, memmap_dir=folder if folder.is_dir() else None
    )
    if arguments.dry_run:
        print(optimizer.plan(read(arguments.source)))
        return
    report, path = shrink_file(arguments.source, arguments.output, optimizer, arguments.force)
    print(report)
    print(f"written to {path}")


def main() -> int:
    """Run the command line."""
    arguments = parse(argparse.ArgumentParser(prog="python -m halfstep", description=__doc__))
    try:
        if arguments.cmake_prefix:
            print(";".join(map(str, cmake_prefix())))
        elif arguments.library:
            print(library_path())
        elif arguments.build_info:
            print_build_info()
        elif arguments.command == "shrink":
            shrink(arguments)
        elif arguments.ops:
            from halfstep.autocast_ops import DEVICES, format_ops

            print(format_ops([arguments.device] if arguments.device else DEVICES), end="")
        else:
            print_policy(arguments.file)
    except ModuleNotFoundError as error:
        needs = "torch, and halfstep built for it" if error.name == "torch" else error.name
        print(f"this command needs {needs}: {error}", file=sys.stderr)
        return 1
    except (ImportError, LibraryMismatchError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
