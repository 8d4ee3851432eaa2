"""classiclm: the road from back-propagation (1986) to GPT-3 (2020) as one package.

    model, tokenizer = classiclm.load("runs/a")

Names are imported when they are first used, so `import classiclm` is quick and does not need torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "load": "classiclm.registry",
    "load_tokenizer": "classiclm.data.tokenizers",
    "BERT": "classiclm.models.bert",
    "GPT1": "classiclm.models.gpt1",
    "GPT2": "classiclm.models.gpt2",
    "GPT3": "classiclm.models.gpt3",
    "Transformer2017": "classiclm.models.transformer2017",
}
__all__ = ["BERT", "GPT1", "GPT2", "GPT3", "Transformer2017", "__version__", "load", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'classiclm' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
