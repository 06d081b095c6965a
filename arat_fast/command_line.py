"""Options of the command line as typed values: tyro reads and explains them.

What needs torch, a second to import, is imported where it is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import io
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

import tyro
from tyro.constructors import (
    MISSING,
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from arat_fast.settings import meanings, shown

if TYPE_CHECKING:
    from arat_fast.config import Config

Options = TypeVar("Options")

_RULES = ConstructorRegistry()


class UsageError(ValueError):
    """The command line cannot be understood."""


def typed(*words: str) -> str:
    """``arat-fast`` with these words, as a shell in the current folder takes it: by its path where
    the environment is not activated."""
    script = Path(sys.executable).with_name("arat-fast")
    by_path = script.exists() and shutil.which("arat-fast") != str(script)
    return shlex.join([os.path.relpath(script) if by_path else "arat-fast", *words])


@dataclass(frozen=True)
class NetworkName:
    """The network of a saved run, where it is one's own."""

    name: str | None = None
    """Of a run whose network is one's own, package.module:callable. Its module is imported, which a
    name in a file does not do."""

    def __post_init__(self) -> None:
        if self.name is not None:
            from arat_fast.models.registry import import_model

            import_model(self.name)


def parse(
    options: type[Options],
    arguments: Sequence[str],
    program: str,
    default: Options | None = None,
    purpose: str | None = None,
) -> Options:
    """tyro's parser; takes fractions such as 8/255, and complains in one line.

    Args:
        options: dataclass of the options.
        arguments: what was typed after ``program``.
        program: for the help and the complaint.
        default: values of what is not given; None for those of the dataclass.
        purpose: the help's first lines; None for the docstring of the dataclass.

    Raises:
        UsageError: an option is unknown, or a value does not fit.
    """
    complaint = io.StringIO()
    # None undoes what a recipe has set; without one it is what is not given.
    keywords: dict[str, Any] = (
        {"config": (tyro.conf.DisallowNone,)} if default is None else {"default": default}
    )
    # tyro does not fill its description, and joins lines but those that are indented.
    fill = partial(textwrap.fill, width=shutil.get_terminal_size().columns, subsequent_indent=" ")
    paragraphs = (purpose or purpose_of(options)).split("\n\n")
    try:
        with contextlib.redirect_stderr(complaint):
            parsed: Options = tyro.cli(
                options,
                prog=program,
                description="\n\n".join(map(fill, paragraphs)),
                args=arguments,
                registry=_RULES,
                **keywords,
            )
            return parsed
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(f"{_one_line(complaint.getvalue())}; see {program} --help") from None


def purpose_of(options: type) -> str:
    """The docstring of a dataclass in one line."""
    return " ".join((inspect.getdoc(options) or "").split())


def choose(
    program: str, arguments: Sequence[str], known: Mapping[str, str], kind: str
) -> tuple[str, list[str]]:
    """The sub-command that comes first, and what follows it; ``--help`` lists them, each with the
    first sentence of what it is for, and exits.

    Args:
        program: what was typed before ``arguments``.
        arguments: the sub-command and its arguments.
        known: what each sub-command is for.
        kind: what they are, for the help.

    Raises:
        UsageError: there is none, or an unknown one.
    """
    name = arguments[0] if arguments else "nothing"
    if name in ("-h", "--help"):
        # tyro's list of them begins with all their names in a line, which no terminal holds.
        print(
            f"usage: {program} {kind} ...\n\n{program} {kind} --help tells more. {kind} is one of\n"
        )
        columns, margin = shutil.get_terminal_size().columns, 4 + max(map(len, known))
        for command, purpose in known.items():
            text = re.split(r"(?<=[.]) ", purpose)[0]
            start = f"  {command:{margin - 2}}"
            print(
                textwrap.fill(text, columns, initial_indent=start, subsequent_indent=" " * margin)
            )
        raise SystemExit(0)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(f"{program} expects one of {', '.join(known)}, got {name}{hint}")
    return name, list(arguments[1:])


def base_config(name: str, arguments: Sequence[str]) -> Config:
    """The configuration that the arguments override.

    Args:
        name: of the recipe.
        arguments: what was typed after it; ``--compat``, ``--objective.name`` and ``--model.name``
            decide which settings there are and what they are by default.

    Raises:
        ValueError: unknown recipe, compat, objective or model.
    """
    from arat_fast.recipes import recipe

    compat: Any = _value_of("--compat", arguments) or "paper"
    typed = (_value_of(option, arguments) for option in ("--objective.name", "--model.name"))
    return recipe(name, compat, *typed)


def apply_overrides(config: Config, arguments: Sequence[str]) -> Config:
    """The configuration with overrides put in, as ``arat-fast train`` takes them.

    Raises:
        UsageError: an override names no setting, or its value does not fit.
    """
    program = f"arat-fast train {config.recipe}"
    if any(argument in ("-h", "--help") for argument in arguments):
        raise UsageError(f"settings are expected, got --help; see {program} --help")
    objective = _value_of("--objective.name", arguments)
    config = config if objective is None else config.with_objective(objective)
    model = _value_of("--model.name", arguments)
    config = config if model is None else config.with_model(model)
    return parse(type(config), arguments, program, config)


def unknown_name(arguments: Sequence[str]) -> str | None:
    """The objective or the network of one's own that overrides name and nobody has imported."""
    from arat_fast.models.registry import is_known
    from arat_fast.objectives import known_objective

    objective = _value_of("--objective.name", arguments) or ""
    if ":" in objective and known_objective(objective) is None:
        return objective
    model = _value_of("--model.name", arguments) or ""
    return model if ":" in model and not is_known(model) else None


def overrides_of(config: Config) -> list[str]:
    """The overrides that make the recipe into this configuration; the seed always.

    Inverse of :func:`apply_overrides` on the recipe.

    Raises:
        ValueError: it names an objective or a network of one's own that nobody has imported.
    """
    from arat_fast.config import ForeignModel, config_to_dict
    from arat_fast.objectives import ForeignSettings
    from arat_fast.recipes import recipe

    for part in (config.objective, config.model):
        if isinstance(part, (ForeignSettings, ForeignModel)):
            raise ValueError(
                f"{part.name} is not imported on a file's word alone: start from the recipe, and "
                "name it on the command line"
            )
    arguments = ["--compat", config.compat] if config.compat != "paper" else []
    objective = config.objective.name
    if objective != recipe(config.recipe).objective.name:
        arguments += ["--objective.name", objective]
    if config.model.name != recipe(config.recipe).model.name:
        arguments += ["--model.name", config.model.name]
    defaults = config_to_dict(recipe(config.recipe, config.compat, objective, config.model.name))
    for section, values in config_to_dict(config).items():
        if isinstance(values, dict):
            for name, value in values.items():
                if value != defaults[section][name]:
                    arguments += _override(f"{section}.{name}", value)
        elif section.startswith("init") and values != defaults[section]:
            arguments += [f"--{section.replace('_', '-')}", str(values)]
    return [*arguments, "--seed", str(config.seed)]


def _override(path: str, value: Any) -> list[str]:
    section, _, name = path.replace("_", "-").partition(".")
    if isinstance(value, bool):
        return [f"--{section}.{name}" if value else f"--{section}.no-{name}"]
    values = value if isinstance(value, list) else [value]
    return [f"--{section}.{name}", *(shown(v) if isinstance(v, float) else str(v) for v in values)]


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    """What an option is set to, the last time that it is."""
    value = None
    for argument, following in zip(arguments, [*arguments[1:], None], strict=False):
        if argument == option:
            value = following
        elif argument.startswith(f"{option}="):
            value = argument.partition("=")[2]
    return value


@_RULES.struct_rule
def _settings_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Dataclasses as tyro takes them, but that the docstring of a field is filled as a paragraph:
    tyro keeps the line breaks of the source."""
    if not dataclasses.is_dataclass(info.type):
        return None
    hints = get_type_hints(info.type, include_extras=True)
    fields = []
    for field in dataclasses.fields(info.type):
        default = MISSING if field.default is dataclasses.MISSING else field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        default = getattr(info.default, field.name, default)
        text = partial(_meaning, info.type, field.name)
        fields.append(StructFieldSpec(field.name, hints[field.name], default, helptext=text))
    return StructConstructorSpec(info.type, tuple(fields))


def _meaning(options: type, name: str) -> str | None:
    return meanings(options).get(name)


@_RULES.primitive_rule
def _number_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    if info.type not in (int, float):
        return None
    kind = info.type
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=kind.__name__.upper(),
        instance_from_str=lambda typed: number(typed[0]) if kind is float else _whole(typed[0]),
        is_instance=lambda value: isinstance(value, (int, kind)) and not isinstance(value, bool),
        str_from_instance=lambda value: [shown(value)],
    )


def number(typed: str) -> float:
    """A decimal number, or a fraction of two such as 8/255."""
    top, _, bottom = typed.partition("/")
    try:
        return float(top) / float(bottom or 1)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"a number is expected, got {typed!r}") from None


def _whole(typed: str) -> int:
    try:
        return int(typed)
    except ValueError:
        raise ValueError(f"a whole number is expected, got {typed!r}") from None


def _one_line(complaint: str) -> str:
    """The sentence inside a box that tyro draws: between the title and the hints."""
    lines = [line.strip(" │╭╮╰╯─|+\t") for line in complaint.splitlines()[1:]]
    lines = [line for line in lines if line.strip("-")]
    text = re.split(r" (?:Argument help|For full help|Perhaps you)", " ".join(lines))
    # Of an optional number, tyro tells what became of every alternative.
    sentence = re.sub(r"no type matching .*'(?:int|float)'>: ", "", text[0].rstrip(". "))
    # A setting that the configuration refuses is named by what it says.
    sentence = re.sub(r"^Error parsing (?!-)\S+: ", "", sentence).removeprefix("Error parsing ")
    if "Perhaps you meant:" not in lines:
        return sentence
    meant = [line.split()[0] for line in lines if line.startswith("--")]
    return f"{sentence}; did you mean {', '.join(meant)}?"
