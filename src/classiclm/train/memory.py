"""How much memory a training step takes, counted and not measured: bytes by part, from the sizes alone.

    weights      4 N            always fp32; N = parameters
    gradients    4 N            from the backward pass to the update
    moments      8 N            Adam's two running means, fp32; Muon keeps one, of the matrices in blocks
    casts        2 N_matrix     under autocast: the matrices once more, in the precision of the products
    activations  per token      what autograd keeps of the forward pass until the backward pass has used it
    logits       12 V           a target: log-softmax (kept), its gradient and that of the logits, all fp32

On a CPU the process itself counts, too: `Host` says what the text and the libraries take, by rules fitted to
measurements, as nobody can count those from sizes.

They are not all there at once. `moments_of_a_step` adds up those that are, at each instant that can be the peak.
Activations are counted as the blocks of nn/ run without torch.compile, which keeps less. Below, w is the width of a
number in matrix products: 4 bytes in fp32, 2 in bf16 and fp16.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from classiclm.nn.attention import MultiHeadAttention
from classiclm.nn.blocks import Block
from classiclm.nn.embedding import TokenEmbedding
from classiclm.nn.mlp import ACTIVATIONS
from classiclm.nn.norm import LayerNorm

FP32 = 4  # bytes
_NORM_STATISTICS = 8  # mean and 1 / deviation of each vector, fp32

Strategy = Literal["none", "ddp", "fsdp"]


@dataclass(frozen=True)
class Layer:
    """What the memory of one block depends on."""

    d_model: int
    d_query: int  # H K: width of all heads' queries
    d_value: int
    n_heads: int
    d_ff: int
    n_params: int
    n_norms: int = 2
    n_attentions: int = 1  # 2 = the second one reads the encoder's output
    keeps_of_act: int = 2  # F-wide tensors: input and output of GELU; ReLU needs its output only
    dropout: bool = False
    attn_dropout: bool = False
    window: int | None = None  # keys that a banded layer sees


@dataclass(frozen=True)
class Network:
    """A model as numbers."""

    layers: tuple[Layer, ...]
    n_params: int
    n_matrix: int  # parameters that enter matrix products, which autocast copies
    n_matrices_2d: int  # parameters with two dimensions: the optimizer's first group
    n_in_blocks: int  # those of them inside blocks, which Muon moves
    largest_in_blocks: int  # parameters of the largest of those
    d_model: int
    vocab_size: int
    n_norms: int  # outside the blocks
    n_sides: int  # 2 = an encoder and a decoder, each with embeddings of its own tokens
    embedding_dropout: bool


@dataclass(frozen=True)
class Micro:
    """One micro-batch: how many tokens pass through each block, in sequences of `n_ctx`, and how many have logits."""

    tokens: int
    n_ctx: int
    n_targets: int
    rows: int | None = None  # how many have them at the same time (`objectives.InPieces`); None = all


@dataclass(frozen=True)
class Way:
    """How a step computes: bytes of a number in products, the attention path, the device, what is recomputed."""

    width: int = FP32
    fused: bool = False
    cpu: bool = True
    joined: bool = True  # autocast's copies of queries', keys' and values' matrices are one; not so under FSDP
    checkpointing: bool = False  # keep only each block's input, and run its forward pass again in the backward pass

    @property
    def dropout_width(self) -> int:
        """Bytes of an element of a dropout mask: numbers on a CPU (nn/dropout.py), booleans in torch's GPU kernel."""
        return self.width if self.cpu else 1


def read(model: nn.Module, vocab_size: int, windows: Sequence[int | None] = ()) -> Network:
    """The numbers of a model, which may be on the meta device. windows: the band of each block, none if left out."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    inside = {id(module) for block in blocks for module in block.modules()}
    in_blocks = [p.numel() for block in blocks for p in block.parameters() if p.ndim == 2]
    bands = list(windows) or [None] * len(blocks)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    embedding = next(module for module in model.modules() if isinstance(module, TokenEmbedding))
    tied = embedding.weight.numel()  # the output layer, too
    norms = [m for m in model.modules() if isinstance(m, LayerNorm) and id(m) not in inside]
    return Network(
        layers=tuple(_layer(block, band) for block, band in zip(blocks, bands, strict=True)),
        n_params=_count(model),
        n_matrix=sum(_count(module) for module in linear) + tied,
        n_matrices_2d=sum(p.numel() for p in model.parameters() if p.ndim >= 2),
        n_in_blocks=sum(in_blocks),
        largest_in_blocks=max(in_blocks, default=0),
        d_model=embedding.weight.shape[1],
        vocab_size=vocab_size,
        n_norms=len(norms),
        n_sides=2 if any(len(block.attentions) > 1 for block in blocks) else 1,
        embedding_dropout=getattr(getattr(model, "drop", None), "p", 0.0) > 0,
    )


def _layer(block: Block, window: int | None) -> Layer:
    attn: MultiHeadAttention = block.attn
    return Layer(
        d_model=attn.q.in_features,
        d_query=attn.q.out_features,
        d_value=attn.v.out_features,
        n_heads=attn.n_heads,
        d_ff=block.mlp.up.out_features,
        n_params=_count(block),
        n_norms=block.n_norms,
        n_attentions=len(block.attentions),
        keeps_of_act=1 if block.mlp.act is ACTIVATIONS["relu"] else 2,
        dropout=block.drop.p > 0,
        attn_dropout=attn.dropout.p > 0,
        window=window,
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def keys(layer: Layer, n_ctx: int) -> int:
    """How many scores each query has: all of the sequence, or two blocks of `window` (`attend_banded`)."""
    banded = layer.window is not None and 2 * layer.window <= n_ctx
    return 2 * layer.window if banded and layer.window else n_ctx


def attention_bytes(layer: Layer, n_ctx: int, way: Way) -> int:
    """Kept per token by a self-attention: what q, k and v are made of, themselves, the scores, and what `o` reads."""
    w, S = way.width, keys(layer, n_ctx)
    repeated = 2 if n_ctx > S else 1  # a band's keys and values lie in two blocks
    v = FP32 if way.fused and _without_kernel(layer, n_ctx, way) else w  # of q, k, v and the scores
    # fp32 products read one tensor; otherwise autocast makes a copy for each product.
    copies = w * layer.d_model * (1 if way.joined or w == FP32 else 3)
    products = v * (layer.d_query * (1 + repeated) + layer.d_value * repeated)
    return copies + products + _score_bytes(layer, n_ctx, way, v) + w * layer.d_value


def _without_kernel(layer: Layer, n_ctx: int, way: Way) -> bool:
    """Whether the scores are written out, on the fused path too: torch's CPU kernel leaves dropout, and the mask of a
    band, to plain products in fp32."""
    return not way.fused or (way.cpu and (layer.attn_dropout or keys(layer, n_ctx) != n_ctx))


def _score_bytes(layer: Layer, n_ctx: int, way: Way, v: int) -> int:
    """Kept per token of the T x S matrices: one without dropout; softmax, mask and product with it."""
    S = keys(layer, n_ctx)
    if not _without_kernel(layer, n_ctx, way):
        return FP32 * layer.n_heads  # the kernel keeps the logarithm of each row's sum only
    if way.cpu:
        return layer.n_heads * S * v * (3 if layer.attn_dropout else 1)
    # A GPU's autocast takes the softmax in fp32, and what meets V is cast.
    cast = v if v != FP32 or layer.attn_dropout else 0
    return layer.n_heads * S * (FP32 + cast + layer.attn_dropout)


def block_bytes(layer: Layer, n_ctx: int, way: Way) -> int:
    """Kept per token by one block."""
    n_sublayers = layer.n_attentions + 1
    attention = layer.n_attentions * attention_bytes(layer, n_ctx, way)
    if layer.n_attentions > 1 and way.joined and way.width != FP32:  # attention to a memory is never joined
        attention += 2 * way.width * layer.d_model
    mlp = way.width * (layer.d_model + layer.keeps_of_act * layer.d_ff)
    norms = layer.n_norms * (FP32 * layer.d_model + _NORM_STATISTICS)
    masks = n_sublayers * layer.d_model * way.dropout_width if layer.dropout else 0
    return attention + mlp + norms + masks


def blocks_bytes(network: Network, micro: Micro, way: Way) -> int:
    """Kept by all blocks of one micro-batch; with checkpointing their inputs and the inside of one."""
    each = [block_bytes(layer, micro.n_ctx, way) for layer in network.layers]
    if not way.checkpointing:
        return micro.tokens * sum(each)
    inputs = sum(FP32 * layer.d_model for layer in network.layers)
    return micro.tokens * (inputs + max(each, default=0))


def ends_bytes(network: Network, micro: Micro, way: Way) -> int:
    """Kept outside the blocks, without logits: embeddings' dropout, norms, what the output layer and memory read."""
    dropout = FP32 if way.cpu else 1
    masks = network.n_sides * network.d_model * dropout if network.embedding_dropout else 0
    norms = network.n_norms * (FP32 * network.d_model + _NORM_STATISTICS)
    memory = (network.n_sides - 1) * FP32 * network.d_model
    return micro.tokens * (masks + norms + memory) + micro.n_targets * way.width * network.d_model


def kept_logits_bytes(network: Network, micro: Micro) -> int:
    """The log-softmax of the logits, which the loss keeps; made in pieces, each is made again instead."""
    return 0 if micro.rows else micro.n_targets * network.vocab_size * FP32


def casts_bytes(network: Network, way: Way) -> int:
    """Autocast's copies of the matrices, kept from the forward to the backward pass."""
    return 0 if way.width == FP32 else way.width * network.n_matrix


def working_bytes(network: Network, micro: Micro, way: Way) -> int:
    """What the first operations of the backward pass hold besides what was kept: two gradients as large as the logits
    (in pieces: those of a piece, and the piece), or, in the last block, those of scores and MLP, whichever is more."""
    at_once = 3 * micro.rows if micro.rows else 2 * micro.n_targets
    logits = at_once * network.vocab_size * FP32
    inside = (_gradients_inside(layer, micro.n_ctx, way) for layer in network.layers)
    return max(logits, micro.tokens * max(inside, default=0))


def _gradients_inside(layer: Layer, n_ctx: int, way: Way) -> int:
    written = _without_kernel(layer, n_ctx, way)
    scores = 2 * way.width * layer.n_heads * keys(layer, n_ctx) if written else 0
    return max(scores, 2 * way.width * layer.d_ff)


@dataclass(frozen=True)
class State:
    """What lies on one device whatever the batch: bytes."""

    weights: int
    gradients: int
    moments: int
    casts: int
    gathered: int  # fsdp: weights on loan from other devices, and a block's gradients before they are shared out
    buckets: int  # ddp: gradients once more, in the pieces that are sent
    parts: int = 1  # fsdp: how many devices share one set of weights


def state(
    network: Network, way: Way, strategy: Strategy = "none", n_devices: int = 1, optimizer: str = "adamw"
) -> State:
    """The parts that depend on parameters, per device.

    ddp keeps all on each device. fsdp keeps a share of each, gathers one block while the one before still runs, in the
    precision of the products (which replaces autocast's copies), and the embeddings throughout.
    """
    n, casts = network.n_params, casts_bytes(network, way)
    moments = 8 * n - (4 * network.n_in_blocks if optimizer == "muon" else 0)
    if strategy != "fsdp":
        return State(4 * n, 4 * n, moments, casts, 0, 4 * n if strategy == "ddp" else 0)
    share = -(-n // n_devices)
    largest = max((layer.n_params for layer in network.layers), default=0)
    outside = n - sum(layer.n_params for layer in network.layers)
    gathered = way.width * (2 * largest + outside) + way.width * largest
    return State(4 * share, 4 * share, -(-moments // n_devices), 0, gathered, 0, n_devices)


def update_bytes(network: Network, optimizer: str) -> int:
    """What the update itself needs: nothing in torch's fused AdamW; two passing tensors per matrix in `PaperAdam`; in
    Muon, which takes one matrix after the other, its update in fp32 and three of bf16 in its iteration."""
    if optimizer == "muon":
        return (FP32 + 3 * 2) * network.largest_in_blocks
    return 0 if optimizer == "adamw" else 2 * FP32 * network.n_matrices_2d


Vocabulary = Literal["characters", "published", "learnt"]


@dataclass(frozen=True)
class Host:
    """What else a process on a CPU holds, beyond its imports: bytes."""

    text: int  # tokens and tokenizer, throughout
    reading: int  # the most while the text is read and cut into tokens
    libraries: int  # what torch's operations set up when they first run


def host(n_bytes: int, vocabulary: Vocabulary, mapped: bool, way: Way) -> Host:
    """The share of the text, of `n_bytes` (not compressed), and of the libraries.

    Measured with Shakespeare's plays, 0.2 to 18 MB of them. A vocabulary that is learnt leaves the tokenizers library's
    words behind, up to a bound. mapped: prepared data, of which only the tokenizer is held.
    """
    libraries = (20 if way.width == FP32 else 40) * 10**6  # oneDNN makes kernels for bf16
    if vocabulary == "characters":
        return Host(int(2.2 * n_bytes), 11 * n_bytes, libraries)
    published = 43 * 10**6
    if mapped:
        return Host(published, published, libraries)
    if vocabulary == "published":
        return Host(published + int(0.6 * n_bytes), published + int(4.4 * n_bytes), libraries)
    words = min(10**7 + 60 * n_bytes, 140 * 10**6)
    return Host(words, words + 12 * n_bytes, libraries)


def moments_of_a_step(
    network: Network, micro: Micro, way: Way, held: State, optimizer: str, accumulating: bool, around: Host | None
) -> dict[str, int]:
    """Bytes on one device at each instant that can be the peak, by name.

    accumulating: gradients of earlier micro-batches are there already. around: on a CPU, what else the process holds.
    Writing a checkpoint adds nothing: it is a stream of the tensors as they lie.
    """
    always = held.weights + held.moments + held.buckets + held.gathered
    if around:
        always += around.text + around.libraries
    before = held.gradients if accumulating else 0
    kept = blocks_bytes(network, micro, way) + ends_bytes(network, micro, way) + kept_logits_bytes(network, micro)
    # The tied matrix has two gradients until they are added: the output layer's and the embedding's.
    tied = FP32 * network.vocab_size * network.d_model
    instants = {
        "backward begins": always + held.casts + kept + working_bytes(network, micro, way) + before,
        "backward ends": always + held.gradients + tied * (2 if accumulating else 1),
        "update": always + held.gradients + update_bytes(network, optimizer) // held.parts,
    }
    if around:
        instants["reading the text"] = around.reading
    return instants
