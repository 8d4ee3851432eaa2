"""Named recipes for the first values of the weights: one per paper, each in one function.

| recipe              | matrices                  | embeddings                 | biases | norms       | used by      |
|---------------------|---------------------------|----------------------------|--------|-------------|--------------|
| init_fan_in         | N(0, 1/sqrt(d_in))        | N(0, 1/sqrt(d_model))      | 0      | gain 1      | the ladder   |
| init_gpt2           | N(0, 0.02), residual ones | N(0, 0.02)                 | 0      | gain 1      | GPT-2, GPT-3 |
|                     | N(0, 0.02/sqrt(2 layers)) |                            |        |             |              |
"""

import math

from torch import nn

from classiclm.nn.blocks import Block
from classiclm.nn.embedding import PositionEmbedding, TokenEmbedding

_EMBEDDINGS = (TokenEmbedding, PositionEmbedding)


def init_fan_in(model: nn.Module) -> None:
    """Keeps a signal's variance through each linear layer (LeCun et al. 1998, section 4.6): no depth is special."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
            _zero_bias(module)
        elif isinstance(module, _EMBEDDINGS):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.weight.shape[1]))


def init_gpt2(model: nn.Module, n_layers: int) -> None:
    """N(0, 0.02) (GPT-1, section 4.1), scaled by 1/sqrt(N) where a layer adds to the residual stream (GPT-2, 2.3).

    N counts residual layers: two per block, attention and MLP.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            _zero_bias(module)
        elif isinstance(module, _EMBEDDINGS):
            nn.init.normal_(module.weight, std=0.02)
    for module in model.modules():
        if isinstance(module, Block):
            for into_residual in (module.attn.o, module.mlp.down):
                nn.init.normal_(into_residual.weight, std=0.02 / math.sqrt(2 * n_layers))


def _zero_bias(module: nn.Linear) -> None:
    if module.bias is not None:
        nn.init.zeros_(module.bias)
