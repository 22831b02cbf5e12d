"""`python -m halfstep policy`: a policy file as a table, torch's autocast lists; what is wrong ends with 1 or 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from halfstep import PrecisionPolicy
from halfstep.autocast_ops import autocast_ops, format_ops, parse_ops

NOTHING_TO_DO = "expected one of --cmake-prefix, --library, --build-info and the commands policy and shrink"


def test_the_lists_of_ops(run) -> None:
    assert run("policy", "--ops") == (0, format_ops(), "")
    code, out, _ = run("policy", "--ops", "--device", "cuda")
    assert (code, parse_ops(out)) == (0, {"cuda": autocast_ops("cuda")})
    assert f"\ncuda {'aten::linear':44} lower_precision\n" in out
    command = [sys.executable, "-m", "halfstep", "policy", "--ops", "--device", "cpu"]
    shell = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert parse_ops(shell) == {"cpu": autocast_ops("cpu")}


def test_a_policy_file(run, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    rules = [
        {"name": "head.*", "precision": "float32", "reason": "logits"},
        {"type": "*Norm*", "precision": "bfloat16"},
    ]
    path.write_text(PrecisionPolicy("careful", "float16", rules).to_json())
    assert run("policy", path) == (
        0,
        "policy careful, the first rule that matches decides\n"
        "name    type    precision  reason\n"
        "head.*  *       float32    logits\n"
        "*       *Norm*  bfloat16\n"
        "*       *       float16    default\n",
        "",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"name": "x",\n "defualt": "float16"}',
            "{path}, line 2: unknown key 'defualt', expected name, default, rules",
        ),
        (b'{"name": "x"}', "{path}, line 1: the key 'default' is missing"),
        (b"\xff\xfe", "{path}: is no UTF-8 text"),
        (b" " * (2**20 + 1), "{path}: has 1048577 bytes, expected at most 1048576"),
        (None, "No such file or directory: '{path}'"),
    ],
)
def test_what_is_wrong_with_a_file(run, tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "policy.json"
    if content is not None:
        path.write_bytes(content)
    code, out, err = run("policy", path)
    assert (code, out) == (1, "")
    assert message.format(path=path) in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", NOTHING_TO_DO),
        ("--build-info policy --ops", NOTHING_TO_DO),
        ("--build-info --cmake-prefix", "not allowed with argument"),
        ("policy", "one of the arguments file --ops is required"),
        ("policy x.json --ops", "not allowed with argument"),
        ("policy x.json --device cpu", "--device goes with --ops"),
        ("policy --ops --device mps", "invalid choice: 'mps'"),
    ],
)
def test_what_is_wrong_with_the_line(run, line: str, message: str) -> None:
    code, out, err = run(*line.split())
    assert (code, out) == (2, "")
    assert message in err
