"""The pre-norm transformer block, and the two small networks made of it: a GPT for text and a ViT for images."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al., arXiv 1706.03762), through torch's fused kernel.

    Args:
        width: features per position, a multiple of ``heads``.
        heads: attention heads.
        causal: whether a position sees itself and earlier ones only.
    """

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, width]`` to the same shape."""
        q, k, v = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.heads)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        result: Tensor = self.proj(rearrange(seen, "b h t d -> b t (h d)"))
        return result


class MLP(nn.Module):
    """Two linear layers with a GELU between them, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, 4 * width)
        self.proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` to the same shape."""
        result: Tensor = self.proj(F.gelu(self.fc(x)))
        return result


class Block(nn.Module):
    """Attention and MLP, each after a layer norm and beside a residual path (Xiong et al., arXiv 2002.04745)."""

    def __init__(self, width: int, heads: int, causal: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, width]`` to the same shape."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        result: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return result


class GPT(nn.Module):
    """A decoder-only language model over bytes: 0.8 million parameters by default, and its positions are learned.

    The head is tied to the embedding if asked, as is usual, and a tied head is no target of pruning.

    Args:
        context: the longest sequence.
        width: features per position.
        depth: blocks.
        heads: attention heads; they divide ``width``.
        dropout: share of a block's outputs that training drops, in [0, 1).
        tied: whether the head's weight is the embedding's.
    """

    vocabulary = 256

    def __init__(
        self,
        context: int = 128,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
        tied: bool = True,
    ) -> None:
        super().__init__()
        _check(width, depth, heads)
        self.context = context
        self.embedding = nn.Embedding(self.vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.ModuleList(Block(width, heads, causal=True, dropout=dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, self.vocabulary, bias=False)
        _initialise(self, depth)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, text: Tensor) -> Tensor:
        """Logits ``[B, T, 256]`` of the next byte at each position of text ``[B, T]``, int64."""
        length = text.shape[1]
        if length > self.context:
            raise ValueError(f"the text is {length} bytes long, the network's context only {self.context}")
        x = self.embedding(text) + self.positions[:length]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class ViT(nn.Module):
    """A vision transformer (Dosovitskiy et al., arXiv 2010.11929); ViT-Tiny's 192 x 12 with 3 heads by default.

    5.4 million parameters for CIFAR-10. Means over positions take the place of a class token.

    Args:
        image: height and width of the images, a multiple of ``patch``.
        patch: height and width of a patch.
        width: features per position.
        depth: blocks.
        heads: attention heads; they divide ``width``.
        classes: number of labels.
    """

    def __init__(
        self, image: int = 32, patch: int = 4, width: int = 192, depth: int = 12, heads: int = 3, classes: int = 10
    ) -> None:
        super().__init__()
        _check(width, depth, heads)
        if image % patch:
            raise ValueError(f"patches of {patch} do not tile an image of {image}: choose one that divides it")
        self.patches = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.positions = nn.Parameter(torch.zeros((image // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        _initialise(self, depth)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, 3, image, image]``."""
        x = rearrange(self.patches(images), "b d h w -> b (h w) d") + self.positions
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


def _check(width: int, depth: int, heads: int) -> None:
    if min(width, depth, heads) < 1 or width % heads:
        raise ValueError(f"width must be a multiple of heads, and all at least 1, got {width=}, {depth=}, {heads=}")


def _initialise(net: nn.Module, depth: int) -> None:
    """Normal weights of deviation 0.02, smaller where they end on the residual path (GPT-2)."""
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * depth) if name.endswith("proj") else 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for name, parameter in net.named_parameters():
        if name == "positions":
            nn.init.normal_(parameter, std=0.02)
