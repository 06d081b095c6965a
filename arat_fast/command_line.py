"""Options of the command line as typed values."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import tyro

from arat_fast.config import Config, config_to_dict
from arat_fast.recipes import recipe

Options = TypeVar("Options")


class UsageError(ValueError):
    """The command line cannot be understood."""


@dataclass(frozen=True)
class _Overrides:
    config: Annotated[Config, tyro.conf.arg(name="")]


def parse(
    options: type[Options], arguments: Sequence[str], program: str, default: Options | None = None
) -> Options:
    """tyro's parser; takes fractions such as 8/255, and complains in one line.

    Args:
        options: dataclass of the options.
        arguments: what was typed after ``program``.
        program: for the help and the complaint.
        default: values of what is not given; None for those of the dataclass.

    Raises:
        UsageError: an option is unknown, or a value does not fit.
    """
    decimals = [decimal(argument) for argument in arguments]
    complaint = io.StringIO()
    keywords: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(complaint):
            parsed: Options = tyro.cli(options, prog=program, args=decimals, **keywords)
            return parsed
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        message = _one_line(complaint.getvalue())
        for number, typed in zip(decimals, arguments, strict=True):
            if number != typed:
                message = message.replace(number, typed)
        raise UsageError(f"{message}; see {program} --help") from None


def apply_overrides(config: Config, arguments: Sequence[str]) -> Config:
    """The configuration with overrides put in, as ``arat-fast train`` takes them.

    Raises:
        UsageError: an override names no setting, or its value does not fit.
    """
    program = f"arat-fast train {config.recipe}"
    if any(argument in ("-h", "--help") for argument in arguments):
        raise UsageError(f"settings are expected, got --help; see {program} --help")
    objective = value_of(arguments, "--objective.name")
    config = config if objective is None else config.with_objective(objective)
    return parse(_Overrides, arguments, program, _Overrides(config)).config


def overrides_of(config: Config) -> list[str]:
    """The overrides that make the recipe into this configuration; the seed always.

    Inverse of :func:`apply_overrides` on the recipe.
    """
    arguments = ["--compat", config.compat] if config.compat != "paper" else []
    defaults = config_to_dict(recipe(config.recipe, config.compat, config.objective.name))
    if recipe(config.recipe).objective.name != config.objective.name:
        arguments += ["--objective.name", config.objective.name]
    for section, values in config_to_dict(config).items():
        if isinstance(values, dict):
            for name, value in values.items():
                if value != defaults[section][name]:
                    arguments += _override(f"{section}.{name}", value)
    return [*arguments, "--seed", str(config.seed)]


def value_of(arguments: Sequence[str], option: str) -> str | None:
    """What is given for an option that decides the defaults of others; None where it is not."""
    for position, argument in enumerate(arguments):
        if argument == option and position + 1 < len(arguments):
            return arguments[position + 1]
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
    return None


def _override(path: str, value: Any) -> list[str]:
    section, _, name = path.replace("_", "-").partition(".")
    if isinstance(value, bool):
        return [f"--{section}.{name}" if value else f"--{section}.no-{name}"]
    values = value if isinstance(value, list) else [value]
    return [f"--{section}.{name}", *(v if isinstance(v, str) else repr(v) for v in values)]


def decimal(argument: str) -> str:
    """A fraction of numbers as a decimal number, anything else unchanged."""
    fraction = re.fullmatch(r"(\d+(?:\.\d+)?)/(\d+(?:\.\d+)?)", argument)
    if fraction is None or float(fraction[2]) == 0:
        return argument
    return repr(float(fraction[1]) / float(fraction[2]))


def _one_line(complaint: str) -> str:
    """The sentence inside a box that tyro draws: between the title and the hints."""
    lines = [line.strip(" │╭╮╰╯─\t") for line in complaint.splitlines()]
    lines = [line for line in lines if line.strip("-")]
    text = " ".join(lines[1:])
    text = re.split(r"\s*(?:Argument helptext:|For full helptext|Default:)", text)[0].rstrip(". ")
    number = re.fullmatch(
        r"Error parsing (\S+): .*(int\(\) with base 10|string to float): ('.*')", text
    )
    if number is None:
        return text
    kind = "a number" if "float" in number[2] else "a whole number"
    return f"{number[1]} expects {kind}, got {number[3]}"
