"""Recipes of SparseML (1.9, withdrawn in 2025), in YAML or in the head of a Markdown file, as recipes of this project.

What is written is an overlay: the method under `sparsity:`, and the length of training where the recipe has one. Model,
data and optimizer come from a recipe of yours, to which it is added as a second `--config`. What has no counterpart is
named. Nothing of a file is ever evaluated: of `eval(...)` only a variable's name is understood.
"""

import math
import re
from collections.abc import Iterator
from itertools import islice
from reprlib import Repr
from typing import Any

import yaml

from sparsity.errors import InputError

Settings = dict[str, Any]
LARGEST, MOST = 1 << 18, 1000  # characters and modifiers of a recipe
EVERYTHING = ("__ALL__", "__ALL_PRUNABLE__")
WRITTEN = {"log_types", "__tag__"}  # of no matter here
SHORT = Repr()
SHORT.maxother = SHORT.maxstring = 60
RISING = {"cubic": "Cubic", "linear": "Linear"}
GRADUAL = ("GMPruningModifier", "MagnitudePruningModifier", "GlobalMagnitudePruningModifier")
ONESHOT = ("SparseGPTModifier", "WandaPruningModifier")


class Imported:
    """What became of a recipe: the overlay, and a remark for everything that did not go into it as it was."""

    def __init__(self, overlay: Settings, remarks: list[str]) -> None:
        self.overlay, self.remarks = overlay, remarks

    def text(self, source: str) -> str:
        """The YAML of the overlay, with the remarks as comments."""
        lines = [f"From the SparseML recipe {source}; add it to a recipe with a model and data:",
                 f"  python train.py {self.command()} --config <yours>.yaml --config <this file>"]  # fmt: skip
        if self.remarks:
            lines += ["What is different, or was not translated:", *(f"- {each}" for each in self.remarks)]
        comments = "".join(f"# {' '.join(line.split())}\n" for line in lines)
        return comments + yaml.safe_dump(self.overlay, sort_keys=False, width=100)

    def command(self) -> str:
        """The subcommand that runs it."""
        return "oneshot --ckpt_path=<checkpoint>" if self.overlay["sparsity"]["class_path"] == "OneShot" else "fit"


class Modifier:
    """One modifier of a recipe, whose settings are taken one by one; what is left over has no counterpart."""

    def __init__(self, name: str, settings: Settings, variables: Settings) -> None:
        self.name, self.variables = name, variables
        self.left = {key: value for key, value in settings.items() if key not in WRITTEN}
        self.remarks: list[str] = []

    def take(self, key: str, default: Any = None) -> Any:
        """A setting, once; of `eval(name)` the variable of that name."""
        value = self.left.pop(key, default)
        if isinstance(value, str) and (match := re.fullmatch(r"eval\(\s*(\w+)\s*\)", value)):
            value = self.variables.get(match[1], value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A setting that is a number; raises `InputError` where it is none."""
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(
                f"{self.name} has {key}={SHORT.repr(value)}, and a number was expected: expressions are never "
                "evaluated, so write the number there"
            )
        return float(value)

    def remark(self, text: str) -> None:
        self.remarks.append(f"{self.name}: {text}")

    def close(self) -> list[str]:
        """All remarks, with one for each setting that nothing has taken."""
        rest = [f"{self.name}: {key}={SHORT.repr(value)} has no counterpart" for key, value in self.left.items()]
        return [*self.remarks, *rest]


class _Loader(yaml.SafeLoader):
    """Safe, and takes SparseML's tags for names of plain mappings."""


def _tagged(loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> Settings:
    settings = loader.construct_mapping(node, deep=True) if isinstance(node, yaml.MappingNode) else {}
    return {"__tag__": tag} | {str(key): value for key, value in settings.items()}


_Loader.add_multi_constructor("!", _tagged)


def translate(text: str, prefix: str = "net.") -> Imported:
    """The recipe as an overlay. `prefix` is put before names of layers: the network's own name in its LightningModule.

    Raises `InputError` for what is no recipe, has no pruning modifier, or asks for something that would be wrong here.
    """
    recipe = _parsed(text)
    modifiers = [Modifier(name, settings, recipe) for name, settings in islice(_modifiers(recipe), MOST)]
    overlay: Settings = {}
    remarks: list[str] = []
    epochs = [each for each in modifiers if each.name == "EpochRangeModifier"]
    pruning = [each for each in modifiers if each.name in (*GRADUAL, *ONESHOT)]
    constant = [each for each in modifiers if each.name == "ConstantPruningModifier"]
    if not pruning and not constant:
        names = ", ".join(dict.fromkeys(each.name for each in modifiers)) or "none"
        known = ", ".join((*GRADUAL, "ConstantPruningModifier", *ONESHOT))
        raise InputError(f"the recipe has no modifier that can be translated, which are {known}: it has {names:.300}")
    if pruning:
        alike = [each for each in pruning if each.name == pruning[0].name]
        overlay["sparsity"] = (_gradual if pruning[0].name in GRADUAL else _oneshot)(alike, prefix)
        used = alike
    else:
        overlay["sparsity"] = _constant(constant, prefix)
        used = constant
    if epochs:
        overlay["trainer"] = {"max_epochs": round(max(each.number("end_epoch", 0) for each in epochs))}
    for each in modifiers:
        if each in used:
            remarks += each.close()
        elif each in constant:
            remarks.append(f"{each.name}: left out, because {pruning[0].name}'s masks stay for good here")
        elif each not in epochs:
            remarks.append(f"{each.name}: not translated")
    return Imported(overlay, list(dict.fromkeys(remarks)))


def _parsed(text: str) -> Settings:
    if len(text) > LARGEST:
        raise InputError(f"a recipe has at most {LARGEST:,} characters, got {len(text):,}")
    head = re.match(r"(?:\s*<!--.*?-->)?\s*---[ \t]*\n(.*?)\n---[ \t]*(?:\n|$)", text, re.DOTALL)
    try:
        found = yaml.load(head[1] if head else text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        raise InputError(f"the recipe is no YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(found, dict):
        raise InputError(f"a recipe is a mapping, got a {type(found).__name__}")
    return found


def _modifiers(thing: Any, depth: int = 0, seen: set[int] | None = None) -> Iterator[tuple[str, Settings]]:
    """The modifiers by name, in the order of the recipe: tagged ones, and keys that are called so.

    What an alias names again is looked at once: a file of a few lines could else be a tree without end.
    """
    seen = set() if seen is None else seen
    if depth > 8 or (isinstance(thing, dict | list) and id(thing) in seen):
        return
    seen.add(id(thing))
    if isinstance(thing, dict):
        if str(thing.get("__tag__", "")).endswith("Modifier"):
            yield thing["__tag__"], thing
            return
        for key, value in thing.items():
            if str(key).endswith("Modifier"):
                yield str(key), value if isinstance(value, dict) else {}
            else:
                yield from _modifiers(value, depth + 1, seen)
    elif isinstance(thing, list):
        for each in thing:
            yield from _modifiers(each, depth + 1, seen)


def _gradual(modifiers: list[Modifier], prefix: str) -> Settings:
    """GMP, or GlobalMP; by layer where the sparsities differ."""
    first = modifiers[0]
    shares = [_share(each, prefix) for each in modifiers]
    schedules = [_schedule(each) for each in modifiers]
    patterns = [_pattern(each, each.take("mask_type", each.take("mask_structure"))) for each in modifiers]
    compared = [each.take("apply_globally", False) or each.take("global_sparsity", False) for each in modifiers]
    if any(each != schedules[0] for each in schedules) or any(each != patterns[0] for each in patterns):
        first.remark("the schedules or patterns of several differ; those of the first are taken for all layers")
    for each in modifiers:
        if each.take("leave_enabled", True) is False:
            each.remark("leave_enabled=False: masks stay until training ends here")
    is_global = first.name == "GlobalMagnitudePruningModifier" or bool(compared[0])
    parts = [part for share in shares for part in share]
    globs = None if any(each is None for _, each in parts) else [glob for _, each in parts for glob in each or []]
    sparsities = {sparsity for sparsity, _ in parts}
    # Everything is said, because what an overlay leaves out stays as the recipe below it has it.
    found: Settings = {"sparsity": max(sparsities), **({"minimum": 0.0} if is_global else {"distribution": None})}
    if len(sparsities) > 1:
        if is_global or globs is None or any(each.startswith("type:") for each in globs):
            raise InputError(f"{first.name}: several sparsities {sorted(sparsities)} are of parameters by their names")
        layers = {glob: sparsity for sparsity, each in parts for glob in each or []}
        found["distribution"] = {"class_path": "PerLayer", "init_args": {"sparsities": layers}}
        first.remark(
            f"sparsity={max(sparsities)} is the highest of the layers: put what the map comes to over all of its "
            "weights, which the first run says"
        )
    found |= {"schedule": schedules[0], "pattern": patterns[0], "targets": _targets(globs)}
    return {"class_path": "GlobalMP" if is_global else "GMP", "init_args": found}


def _share(modifier: Modifier, prefix: str) -> list[tuple[float, list[str] | None]]:
    """Each sparsity with the globs that it is of, None for all parameters."""
    params = modifier.take("params", modifier.take("targets", "__ALL_PRUNABLE__"))
    asked = modifier.take("final_sparsity")
    if isinstance(asked, dict):
        return [(_fraction(modifier, key), _globs(modifier, names, prefix)) for key, names in asked.items()]
    return [(_fraction(modifier, asked), _globs(modifier, params, prefix))]


def _fraction(modifier: Modifier, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise InputError(f"{modifier.name}: a sparsity lies in (0, 1), got {SHORT.repr(value)}")
    return float(value)


def _schedule(modifier: Modifier) -> Settings:
    shape = str(modifier.take("inter_func", modifier.take("update_scheduler", "cubic")))
    if shape not in RISING:
        modifier.remark(f"the curve {shape!r:.60} is not there; Cubic is taken")
    start = modifier.number("start_epoch", modifier.left.pop("start", 0.0))
    end = modifier.number("end_epoch", modifier.left.pop("end", -1.0))
    every = modifier.number("update_frequency", modifier.left.pop("update", -1.0))
    initial = modifier.take("init_sparsity", 0.0)
    found: Settings = {"start": f"{max(0.0, start):g}ep", "end": f"{end:g}ep", "every": f"{every:g}ep"}
    if end < 0:
        found["end"] = 1.0
        modifier.remark("it has no end: the end of training is taken")
    if every <= 0:
        found["every"] = 1
        modifier.remark("it updates masks at every step, and so does this")
    if isinstance(initial, int | float) and 0 <= initial < 1:
        found["initial"] = float(initial)
    else:
        modifier.remark(f"init_sparsity={SHORT.repr(initial)}: the ramp begins at 0")
    return {"class_path": RISING.get(shape, "Cubic"), "init_args": found}


def _oneshot(modifiers: list[Modifier], prefix: str) -> Settings:
    """OneShot with SparseGPT or Wanda."""
    first = modifiers[0]
    if len(modifiers) > 1:
        first.remark(f"{len(modifiers)} of them: only the first is translated, a recipe has one method")
    found: Settings = {"sparsity": _fraction(first, first.take("sparsity")), "at": 0, "distribution": None}
    structure = str(first.take("mask_structure", "0:0"))
    if first.name == "SparseGPTModifier":
        names = {"damping": "dampening_frac", "block": "block_size"}
        given = {ours: first.number(theirs) for ours, theirs in names.items() if first.left.get(theirs) is not None}
        given |= {"block": int(given["block"])} if "block" in given else {}
        found["score"] = {"class_path": "SparseGPT", **({"init_args": given} if given else {})}
    else:
        found["score"] = {"class_path": "Wanda"}
    found |= {"pattern": None if structure in ("0:0", "unstructured") else _pattern(first, structure)}
    if str(first.take("sparsity_profile", "")).lower() == "owl":
        names = {"threshold": "owl_m", "spread": "owl_lmbda"}
        given = {ours: first.number(theirs) for ours, theirs in names.items() if first.left.get(theirs) is not None}
        found["distribution"] = {"class_path": "OWL", **({"init_args": given} if given else {})}
    if first.take("sequential_update", True) is False:
        first.remark("sequential_update=False: blocks are pruned one after the other here, always")
    for key in ("target_ids", "layer_prefix"):
        if first.take(key) is not None:
            first.remark(f"{key}: not needed, blocks are found by their names")
    if first.take("quantize", False):
        first.remark("quantize: nothing is quantized here")
    found |= {"calibration": None, "targets": _targets(_globs(first, first.take("targets", "__ALL__"), prefix))}
    return {"class_path": "OneShot", "init_args": found}


def _constant(modifiers: list[Modifier], prefix: str) -> Settings:
    """ConstantMask."""
    globs: list[str] | None = []
    for each in modifiers:
        params = _globs(each, each.take("params", each.take("targets", "__ALL_PRUNABLE__")), prefix)
        globs = None if params is None or globs is None else globs + params
        for key in ("start_epoch", "end_epoch", "start", "end", "update_frequency"):
            value = each.take(key, -1)
            if value not in (-1, 0):
                each.remark(f"{key}={SHORT.repr(value)}: masks hold from the first step to the last here")
    return {"class_path": "ConstantMask", "init_args": {"file": None, "sparsity": None, "targets": _targets(globs)}}


def _pattern(modifier: Modifier, asked: Any) -> str:
    if isinstance(asked, list) and all(type(each) is int for each in asked) and len(asked) == 2:
        return f"{asked[0]}x{asked[1]}"
    text = str(asked)
    if text in ("None", "unstructured", "0:0"):
        return "unstructured"
    if text in ("block", "block4", "4-block"):
        modifier.remark("blocks of four go along [in * kernel] of a weight here, along the inputs in SparseML: 1x4")
        return "1x4"
    if text in ("filter", "channel"):
        modifier.remark(f"mask_type={text}: whole outputs (axis 0) are pruned")
        return "channel"
    if isinstance(asked, str) and re.fullmatch(r"\d{1,4}:\d{1,4}", text):
        return text
    quoted = f" (quote N:M: YAML reads {asked // 60}:{asked % 60} so)" if type(asked) is int else ""
    raise InputError(f"{modifier.name}: no pattern is like {SHORT.repr(asked)}{quoted}")


def _targets(globs: list[str] | None) -> Settings | None:
    if globs is None:
        return None
    types = [each.removeprefix("type:") for each in globs if each.startswith("type:")]
    names = [each for each in globs if not each.startswith("type:")]
    found: Settings = {"class_path": "Targets", "init_args": {}}
    if names:
        found["init_args"]["include"] = names
    if types:
        found["init_args"]["types"] = types
    return found


def _globs(modifier: Modifier, params: Any, prefix: str) -> list[str] | None:
    """Names, regular expressions and classes of layers as globs, classes as `type:...`; None for all parameters."""
    asked = [params] if isinstance(params, str) else params
    if not isinstance(asked, list) or not asked or not all(isinstance(each, str) for each in asked):
        raise InputError(f"{modifier.name}: parameters are named in a list of texts, got {SHORT.repr(params)}")
    if any(each in EVERYTHING for each in asked):
        modifier.remark("all parameters: here those of linear layers and convolutions, no biases, norms or embeddings")
        return None
    return [_glob(modifier, each, prefix) for each in asked]


def _glob(modifier: Modifier, name: str, prefix: str) -> str:
    if not name.startswith("re:"):
        if re.fullmatch(r"[A-Z]\w*", name):
            return f"type:{name}"
        return prefix + (name if re.search(r"\.(weight|bias)\w*$", name) else f"{name}.weight")
    # SparseML matches from the start of a name, so what follows is open unless it ends in `$`.
    pattern, tail = name[3:].removeprefix("^"), "*"
    if pattern.endswith("$"):
        pattern, tail = pattern[:-1], "" if re.search(r"(weight|bias)\$$", name) else ".*"
    found = ""
    for token in re.findall(r"\.\*|\.\+|\\d\+|\\d|\\.|\[[\w-]+\]|.", pattern):
        if token in GLOBS:
            found += GLOBS[token]
        elif re.fullmatch(r"\\[^\w]", token):
            found += token[1]
        elif re.fullmatch(r"[\w-]|\[[\w-]+\]", token):
            found += token
        else:
            raise InputError(
                f"{modifier.name}: the expression {name!r:.80} has {token!r}, which globs do not: name the parameters "
                "or take .* there"
            )
    if "[0-9]*" in found.removesuffix("[0-9]*"):
        modifier.remark(f"{name!r:.80}: \\d+ became [0-9]*, which also matches what follows the first digit")
    found = re.sub(r"\*+", "*", found + tail)
    return found if found.startswith("*") else prefix + found


GLOBS = {".*": "*", ".+": "?*", r"\d+": "[0-9]*", r"\d": "[0-9]", ".": "?"}
