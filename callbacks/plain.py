"""Plain errors of the command line."""

import difflib
import inspect
import re
import sys
from importlib import import_module
from typing import Any, NoReturn

from pytorch_lightning.cli import LightningArgumentParser

from . import Sparsify
from . import __all__ as PUBLIC

OURS = (
    "congruent", "data", "distributions", "federated", "initial", "models", "oneshot", "redistribution", "schedules",
    "scores", "targets",
)  # fmt: skip
OTHERS = ("torch.optim", "torch.optim.lr_scheduler", "pytorch_lightning.callbacks")


class PlainParser(LightningArgumentParser):
    """A parser whose errors are three plain lines: what is wrong, what came, what would work."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Abbreviations would let a typo such as --trainer.max_epoch pass.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a parser of a part, whose caller explains
            super().error(message, ex)
        key = re.search(r'^Parser key "?([\w.]+)"?:', message)
        value = re.search(r"Given value: ([^\n(]+)$", message)
        print(f"error: {key[1] + ': ' if key else ''}{reason(message)}", file=sys.stderr)
        if value:
            print(f"got: {value[1]}", file=sys.stderr)
        print(f"try: {_advice(message, self.prog)}", file=sys.stderr)
        self.exit(2)


NOISE = re.compile(r"^$|Does not validate|Subtypes: |Errors:$|NoneType|Given value|Expected a path but")


def reason(message: str) -> str:
    """The lines of a parser's message that say what is wrong, in one."""
    lines = re.sub(r'^Parser key "?[\w.]+"?:', "", message).splitlines()
    text = " ".join(line.strip(" -") for line in lines if not NOISE.search(line.strip()))
    text = re.sub(r"Problem with given class_path '(?:\w+\.)*(\w+)':", r"\1:", text)
    return re.sub(r"Expected a dot import path string: (\w+)", r"no class is called '\1'", text)


def _advice(message: str, program: str) -> str:
    """What would work instead of an unknown method, an unknown option, an unknown class, or anything else."""
    if option := re.search(r"class_path '(.+)':\s+Option '(\w+)' is not accepted", message):
        accepted = _parameters(option[1])
        near = difflib.get_close_matches(option[2], accepted, n=1)
        return f"{near[0]}, one of: {', '.join(accepted)}" if near else f"one of: {', '.join(accepted)}"
    if re.search(r'key "sparsity"', message) and "Problem with given class_path" not in message:
        return f"one of: {', '.join(sorted(each.__name__ for each in _methods(Sparsify)))}, or null for dense"
    if unknown := re.search(r"Expected a dot import path string: (\w+)", message):
        near = difflib.get_close_matches(unknown[1], _classes(), n=3)
        return " or ".join(near) if near else f"{program} --help"
    return f"{program} --help"


def _classes() -> set[str]:
    """The names of classes that recipes are likely to mean."""
    parts = [import_module(f"sparsity.{own}") for own in OURS] + [import_module(other) for other in OTHERS]
    found = {
        name for part in parts for name, each in vars(part).items()
        if inspect.isclass(each) and not name.startswith("_") and each.__module__.startswith(part.__name__)
    }  # fmt: skip
    return found | set(PUBLIC)


def _parameters(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    return list(inspect.signature(getattr(import_module(module), name)).parameters)


def _methods(base: type) -> list[type]:
    children: list[type] = base.__subclasses__()
    found = [each for child in children for each in (child, *_methods(child))]
    return [each for each in found if each.__name__ in PUBLIC]
