"""GPT-2 against Hugging Face's GPT2LMHeadModel with the same random weights.

The weights are large (std 0.2, so logits of std 1 and more): near the usual start, small errors hide.
"""

import json

import pytest
import torch

from classiclm.models.gpt2 import DEVIATIONS, GPT2, PAPER_PARAMS, PRESETS, RECIPES, Config
from classiclm.nn.attention import set_attention_path

transformers = pytest.importorskip("transformers")

# (n_layers, d_model, n_heads, n_ctx, vocab_size, batch, time): odd on purpose
SIZES = [
    (1, 39, 3, 11, 29, 3, 11),
    (2, 42, 7, 17, 101, 2, 13),
    (3, 55, 11, 9, 67, 1, 9),
    (5, 50, 5, 31, 257, 4, 30),
    (4, 64, 1, 23, 33, 2, 7),
]


def pair(n_layers, d_model, n_heads, n_ctx, vocab_size):
    """Our model and theirs with equal weights."""
    torch.manual_seed(n_layers)
    config = transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=n_ctx, n_embd=d_model, n_layer=n_layers, n_head=n_heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).eval()
    ours = GPT2(Config(n_layers, d_model, n_heads, n_ctx=n_ctx, vocab_size=vocab_size)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(1.0 if ".ln_" in name and "weight" in name else 0.0, 0.2)
    ours.load_state_dict(from_theirs(theirs.transformer.state_dict(), n_layers))
    return ours, theirs


def from_theirs(t, n_layers):
    """Their names and layouts (Conv1D keeps [in, out], q k v in one) -> ours."""
    ours = {"tok_emb.weight": t["wte.weight"], "pos_emb.weight": t["wpe.weight"]}
    ours |= {f"ln_f.{part}": t[f"ln_f.{part}"] for part in ("weight", "bias")}
    for i in range(n_layers):
        for part in ("weight", "bias"):
            for name, piece in zip("qkv", t[f"h.{i}.attn.c_attn.{part}"].chunk(3, dim=-1), strict=True):
                ours[f"blocks.{i}.attn.{name}.{part}"] = transposed(piece)
            names = {"attn.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
            ours |= {f"blocks.{i}.{a}.{part}": transposed(t[f"h.{i}.{b}.{part}"]) for a, b in names.items()}
            ours |= {f"blocks.{i}.ln{n}.{part}": t[f"h.{i}.ln_{n}.{part}"] for n in (1, 2)}
    return ours


def transposed(tensor):
    return tensor.T if tensor.ndim == 2 else tensor


@pytest.mark.parametrize("path", ["written", "fused"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_logits_and_gradients_equal_those_of_transformers(size, path):
    *sizes, batch, time = size
    ours, theirs = pair(*sizes)
    set_attention_path(ours, path)
    tokens = torch.randint(sizes[-1], (batch, time))
    a, b = ours(tokens), theirs(tokens).logits
    assert b.std() >= 1
    assert ((a - b).abs().max() / b.std()).item() <= 1e-5
    upstream = torch.randn_like(b)
    a.backward(upstream)
    b.backward(upstream)
    gradients = {name: parameter.grad for name, parameter in theirs.transformer.named_parameters()}
    expected = from_theirs(gradients, sizes[0])
    # Some gradients are 0 but for rounding (a key's bias shifts all scores alike): hold those against the rest.
    typical = torch.stack([gradient.norm() for gradient in expected.values()]).median()
    for name, parameter in ours.named_parameters():
        scale = max(expected[name].norm(), 0.01 * typical)
        assert ((parameter.grad - expected[name]).norm() / scale).item() <= 1e-4, name


def test_greedy_text_equals_that_of_transformers():
    ours, theirs = pair(3, 32, 4, 40, 61)
    prompt = torch.randint(61, (2, 5))
    expected = theirs.generate(prompt, max_new_tokens=35, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(ours.generate(prompt, max_new_tokens=35, temperature=0), expected)


# openai/gpt-2's README, nanoGPT's count, and papers' headlines.
TRUE_COUNTS = {
    "gpt2-124m": (124_439_808, "117M"),
    "gpt2-355m": (354_823_168, "345M"),
    "gpt2-774m": (774_030_080, "762M"),
    "gpt2-1558m": (1_557_611_200, "1542M"),
}


def test_models_json_has_the_true_counts_beside_the_papers(cli):
    code, out, _ = cli("models", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    for name, (params, paper) in TRUE_COUNTS.items():
        assert (rows[name]["params"], rows[name]["paper_params"]) == (params, paper)
        assert rows[name]["family"] == "gpt2"
    assert rows["gpt2-shakespeare"]["params"] == 10_745_088  # nanoGPT prints 10.65M without positions


@pytest.mark.parametrize(("name", "headline"), [(name, paper) for name, (_, paper) in TRUE_COUNTS.items()])
def test_the_papers_counts_come_from_gpt1s_vocabulary(name, headline):
    """Erratum: with 40,478 tokens in place of 50,257 the count is the headline."""
    config = PRESETS[name]
    with torch.device("meta"):
        model = GPT2(Config(config.n_layers, config.d_model, config.n_heads, vocab_size=40_478))
    assert f"{round(model.count_parameters() / 1e6)}M" == headline


def test_every_preset_has_a_recipe_and_the_deviations_are_whole():
    assert set(RECIPES) == set(PRESETS) >= set(PAPER_PARAMS)
    for deviation in DEVIATIONS:
        assert all((deviation.what, deviation.why, deviation.effect))
        assert deviation.follows in ("paper", "official code", "neither")


def test_from_preset_takes_the_name_with_or_without_the_family():
    a = GPT2.from_preset("gpt2-shakespeare-cpu")
    b = GPT2.from_preset("shakespeare-cpu", n_layers=2)
    assert (len(a.blocks), len(b.blocks)) == (4, 2)
    with pytest.raises(Exception, match="did you mean 'gpt2-124m'"):
        GPT2.from_preset("gpt2-125m")
