"""The core's policies and plans, through ctypes: no torch, and the same code that decides there.

Policy and Plan have the methods of `torch.classes.halfstep.PrecisionPolicy` and `PrecisionPlan`. Contract of each
function: `numpy_ops/include/halfstep/numpy.h`.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence

from halfstep import numpy_library


class _Text(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_int64))


class _Layer(ctypes.Structure):
    _fields_ = (("name", _Text), ("type", _Text), ("same_as", _Text))


def _text(text: str, kept: list[bytes]) -> _Text:
    """Describe a text, whose bytes must live as long as `kept`."""
    kept.append(text.encode())
    return _Text(ctypes.cast(ctypes.c_char_p(kept[-1]), ctypes.c_void_p), len(kept[-1]))


def _call(name: str, *arguments: object) -> str:
    """Return the text that a function writes; a str is handed in as a text, a list of tuples of str as layers."""
    kept: list[bytes] = []
    given: list[object] = []
    for argument in arguments:
        if isinstance(argument, str):
            given.append(ctypes.byref(_text(argument, kept)))
        elif isinstance(argument, list):
            layers = (_Layer * len(argument))()
            for layer, texts in zip(layers, argument, strict=True):
                layer.name, layer.type, layer.same_as = (_text(text, kept) for text in texts)
            given.append(layers)
        else:
            given.append(argument)
    out = _Text()
    code = getattr(numpy_library.library(), name)(*given, ctypes.byref(out))
    try:
        # Core messages quote what was given, cut where it is long, so perhaps within a character.
        text = ctypes.string_at(out.data, out.size).decode(errors="replace") if out.data else "out of memory"
    finally:
        numpy_library.library().halfstep_text_free(ctypes.byref(out))
    if code == 1:
        raise ValueError(text)
    if code != 0:
        raise RuntimeError(text)
    return text


class Plan:
    """A plan as JSON; ValueError names `source`, the line and the key of what is wrong."""

    def __init__(self, text: str, source: str = "plan") -> None:
        self._json = _call("halfstep_plan_read", text, source)

    @classmethod
    def _made(cls, text: str) -> Plan:
        """Wrap what the library has written."""
        plan = cls.__new__(cls)
        plan._json = text
        return plan

    @classmethod
    def of_answers(
        cls,
        name: str,
        half: str,
        names: Sequence[str],
        types: Sequence[str],
        same_as: Sequence[str],
        answers: Sequence[bool],
    ) -> Plan:
        """Return the plan of a policy as code that has said so of each layer."""
        layers = list(zip(names, types, same_as, strict=True))
        if len(answers) != len(layers):
            raise ValueError(f"got {len(answers)} answers for {len(layers)} layers")
        said = (ctypes.c_int32 * len(layers))(*answers)
        return cls._made(_call("halfstep_plan_answers", name, half, layers, said, ctypes.c_int64(len(layers))))

    def to_json(self) -> str:
        """Return the plan as JSON."""
        return self._json

    def policy(self) -> str:
        """Return the name of the policy that made it."""
        return json.loads(self._json)["policy"]

    def layers(self) -> list[tuple[str, str, str, str]]:
        """Return name, type, precision and reason of each layer."""
        keys = ("name", "type", "precision", "reason")
        return [tuple(layer[key] for key in keys) for layer in json.loads(self._json)["layers"]]

    def explain(self) -> str:
        """Return a table for people."""
        return _call("halfstep_plan_explain", self._json)

    def diff(self, other: Plan) -> str:
        """Return what `other` decides otherwise."""
        return _call("halfstep_plan_diff", self._json, other._json)


class Policy:
    """A policy as JSON; ValueError names `source`, the line and the key of what is wrong."""

    def __init__(self, text: str, source: str = "policy") -> None:
        self._json = _call("halfstep_policy_read", text, source)
        self._given = text  # of the size that the library takes, which written out it may exceed

    @classmethod
    def named(cls, name: str) -> Policy:
        """Return "mixed_float16", "mixed_bfloat16" or "float32"."""
        return cls(_call("halfstep_policy_named", name))

    def to_json(self) -> str:
        """Return the policy as JSON."""
        return self._json

    def name(self) -> str:
        """Return the policy's name."""
        return json.loads(self._json)["name"]

    def decide(self, name: str, type: str) -> tuple[str, str]:
        """Return the precision of one layer and the reason."""
        return self.plan([name], [type], [""]).layers()[0][2:]

    def plan(self, names: Sequence[str], types: Sequence[str], same_as: Sequence[str]) -> Plan:
        """Decide once per layer. same_as: the name under which the same layer came before, or ""."""
        layers = list(zip(names, types, same_as, strict=True))
        return Plan._made(_call("halfstep_policy_plan", self._given, layers, ctypes.c_int64(len(layers))))

    def match(self, names: Sequence[str], types: Sequence[str]) -> list[int]:
        """Return the number of the first rule that matches each layer, -1 for the default."""
        layers = [(name, kind, "") for name, kind in zip(names, types, strict=True)]
        rules = (ctypes.c_int64 * len(layers))()
        _call("halfstep_policy_match", self._given, layers, ctypes.c_int64(len(layers)), rules)
        return list(rules)
