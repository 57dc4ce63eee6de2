"""GPT and ViT: their sizes, what a position sees, and attention by its definition."""

import math

import pytest
import torch
from torch import nn

from sparsity import Targets
from sparsity.models import GPT, ViT
from sparsity.models.transformer import Attention


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_sizes() -> None:
    w = 128
    block = 4 * w + (3 * w * w + 3 * w) + (w * w + w) + (4 * w * w + 4 * w) + (4 * w * w + w)
    assert size(GPT()) == 256 * w + 128 * w + 4 * block + 2 * w == 842_496
    assert size(GPT(tied=False)) == size(GPT()) + 256 * w
    assert size(ViT()) == 5_362_378


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_its_definition(causal: bool) -> None:
    torch.manual_seed(0)
    layer, x = Attention(12, 3, causal).double(), torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = layer.qkv(x).chunk(3, -1)
    heads = []
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        weights = q[..., part] @ k[..., part].mT / math.sqrt(4)
        if causal:
            weights = weights.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
        heads.append(weights.softmax(-1) @ v[..., part])
    torch.testing.assert_close(layer(x), layer.proj(torch.cat(heads, -1)))


def test_a_position_of_gpt_sees_no_later_one() -> None:
    torch.manual_seed(0)
    model, text = GPT(context=16, width=32, depth=2).eval(), torch.randint(256, (2, 16))
    later = text.clone()
    later[:, 9:] = torch.randint(256, (2, 7))
    one, other = model(text), model(later)
    assert one.shape == (2, 16, 256)
    torch.testing.assert_close(one[:, :9], other[:, :9])
    assert not torch.allclose(one[:, 9:], other[:, 9:])


def test_targets_are_the_matrices_of_the_blocks() -> None:
    names = [
        f"blocks.{i}.{part}.weight"
        for i in range(4)
        for part in ("attention.qkv", "attention.proj", "mlp.fc", "mlp.proj")
    ]
    assert list(Targets().select(GPT())) == names
    assert list(Targets().select(GPT(tied=False))) == [*names, "head.weight"]


def test_vit_gives_logits_and_wants_patches_that_tile() -> None:
    model = ViT(width=24, depth=1, heads=2, classes=7)
    assert model(torch.randn(3, 3, 32, 32)).shape == (3, 7)
    with pytest.raises(ValueError, match="patches of 5 do not tile an image of 32"):
        ViT(patch=5)


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="width must be a multiple of heads"):
        GPT(width=10, heads=4)
    with pytest.raises(ValueError, match="the text is 9 bytes long, the network's context only 8"):
        GPT(context=8, width=8, depth=1)(torch.zeros(1, 9, dtype=torch.int64))
