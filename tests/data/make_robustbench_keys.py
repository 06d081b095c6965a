"""Names and shapes of RobustBench's networks: writes robustbench_keys.json.

pip install --no-deps robustbench==1.1.1
python tests/data/make_robustbench_keys.py
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import torch


def architecture(name: str) -> ModuleType:
    """A module of RobustBench's architectures, without the package's other requirements."""
    package = importlib.util.find_spec("robustbench")
    if package is None or package.origin is None:
        raise ImportError("robustbench is not installed: pip install --no-deps robustbench==1.1.1")
    file = Path(package.origin).parent / "model_zoo" / "architectures" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"robustbench_{name}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> int:
    with torch.device("meta"):
        networks = {
            "resnet18": architecture("resnet").ResNet18(),
            "wrn34-10": architecture("wide_resnet").WideResNet(depth=34, widen_factor=10),
        }
    tables = {
        name: {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
        for name, network in networks.items()
    }
    path = Path(__file__).with_name("robustbench_keys.json")
    path.write_text(json.dumps(tables, separators=(",", ":")).replace('],"', '],\n"') + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
