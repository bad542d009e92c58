"""Settings in YAML, and so in JSON, with the line of each value. It needs PyYAML, which every host brings."""

from __future__ import annotations

from typing import Any

from kl_plugins.settings.arguments import read_arguments
from kl_plugins.settings.values import Settings, scalar


def read_yaml(text: str, place: str) -> Settings:
    """Read a YAML document: a mapping, or a list of Hydra's overrides.

    Args:
        text: the document.
        place: the name of the file.

    Raises:
        ValueError: it is not YAML, or neither a mapping nor a list of overrides.
        ModuleNotFoundError: PyYAML is not installed.
    """
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"it is not YAML: {' '.join(str(error).split())}") from error
    found = Settings()
    if root is None:
        return found
    if isinstance(root, yaml.MappingNode):
        _flatten(found, "", root, place, yaml)
        return found
    if isinstance(root, yaml.SequenceNode) and all(isinstance(node, yaml.ScalarNode) for node in root.value):
        return read_arguments([(node.value, f"{place}:{node.start_mark.line + 1}") for node in root.value])
    raise ValueError("it is YAML, but neither a mapping of settings nor a list of overrides")


def _flatten(found: Settings, key: str, node: Any, place: str, yaml: Any) -> None:
    if isinstance(node, yaml.MappingNode) and node.value:
        for name, value in node.value:
            _flatten(found, f"{key}.{name.value}" if key else str(name.value), value, place, yaml)
    else:
        found.add(key, _value(node, yaml), f"{place}:{node.start_mark.line + 1}")


def _value(node: Any, yaml: Any) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_value(entry, yaml) for entry in node.value]
    if isinstance(node, yaml.MappingNode):
        return {str(name.value): _value(value, yaml) for name, value in node.value}
    if node.style in ("'", '"') and "$" not in node.value:
        return node.value
    return None if node.value == "" and node.style is None else scalar(node.value)
