"""A configuration comes back from the files of a run as it was."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import get_args, get_type_hints

from arat_fast.config import Config, config_from_dict, config_to_dict
from arat_fast.recipes import recipe


def with_every_path_set(config: Config) -> tuple[Config, list[str]]:
    """The configuration with a path in each field that can hold one, and their names."""
    names = []
    for section in dataclasses.fields(Config):
        part = getattr(config, section.name)
        if not dataclasses.is_dataclass(part) or isinstance(part, type):
            continue
        paths = {
            name: Path("some") / name
            for name, kind in get_type_hints(type(part)).items()
            if Path in (kind, *get_args(kind))
        }
        names += [f"{section.name}.{name}" for name in paths]
        config = dataclasses.replace(config, **{section.name: dataclasses.replace(part, **paths)})
    return config, names


def test_every_path_comes_back_as_a_path() -> None:
    config, names = with_every_path_set(recipe("digits", objective="arrest"))
    assert {"data.root", "data.unsup", "objective.teacher"} <= set(names)
    again = config_from_dict(json.loads(json.dumps(config_to_dict(config))))
    assert again == config
    for name in names:
        section, field = name.split(".")
        assert isinstance(getattr(getattr(again, section), field), Path), name
