"""Models as users bring them: of transformers, from random weights, and with the names of timm."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from callbacks import ConstantMask, OneShot
from sparsity import Targets, export, masks
from sparsity.distributions import LayerAdaptive
from sparsity.oneshot import SparseGPT, Wanda
from sparsity.patterns import NM
from tests.nets import trainer

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed: the extra `hf`"
)
WORDS, LENGTH = 64, 16


def gpt2() -> Any:
    """Tied embedding and head, and Conv1D, whose weights are [in, out]."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=WORDS, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )


def llama() -> Any:
    """Untied, with fewer heads for keys than for queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": LENGTH}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, num_attention_heads=4, num_key_value_heads=2, **sizes))


class Finetuned(pl.LightningModule):
    """A model of transformers in training: the whole of what a user writes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> Any:
        return self.model(**batch)

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = self(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(0, WORDS, (8, LENGTH), generator=generator) for _ in range(count)]
    return [{"input_ids": tokens, "labels": tokens} for tokens in drawn]


def finetune(model: nn.Module, first: OneShot) -> masks.Masks:
    """Prunes at once, and trains on with the zeros as they are; the masks of the pruning."""
    module = Finetuned(model)
    first.prune(module, batches)
    pl.seed_everything(0, verbose=False)
    loader: DataLoader[Any] = DataLoader(batches(), batch_size=None)  # type: ignore[arg-type]  # a list will do
    trainer(ConstantMask(), epochs=2).fit(module, loader)
    return {name.removeprefix("model."): mask for name, mask in first.sparsifier.masks.items()}


GPT2 = [f"transformer.h.{block}.{layer}.weight" for block in (0, 1)
        for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]  # fmt: skip
PROJECTIONS = [f"self_attn.{each}_proj" for each in "qkvo"] + [f"mlp.{each}_proj" for each in ("gate", "up", "down")]
LLAMA = [f"model.layers.{block}.{layer}.weight" for block in (0, 1) for layer in PROJECTIONS]


@needs_transformers
def test_the_projections_of_transformers_are_targets() -> None:
    assert list(Targets().select(gpt2())) == GPT2, "the head is tied to the embedding"
    assert list(Targets().select(llama())) == [*LLAMA, "lm_head.weight"]
    assert list(Targets(include=["*.q_proj.*"]).select(llama())) == LLAMA[::7]


METHODS = {
    "wanda": lambda: OneShot(0.5, score=Wanda()),
    "lamp": lambda: OneShot(0.8, distribution=LayerAdaptive()),
    "sparsegpt": lambda: OneShot(0.5, score=SparseGPT(), pattern="2:4"),
}


@needs_transformers
@pytest.mark.parametrize("make", [gpt2, llama], ids=["gpt2", "llama"])
@pytest.mark.parametrize("method", METHODS)
def test_pruned_trained_exported_and_reloaded(make: Any, method: str, tmp_path: Path) -> None:
    first, model, dense = METHODS[method](), make(), make()
    found = finetune(model, first)
    assert 1 - masks.density(found) == pytest.approx(first.sparsifier.sparsity, abs=1e-3)
    for name, mask in found.items():
        weight = model.get_parameter(name)
        assert torch.equal(weight != 0, mask)
        assert not torch.equal(weight, dense.get_parameter(name) * mask), "it has trained"

    path = tmp_path / "model.safetensors"
    result = export.save(model, path, "compressed")
    assert result["bytes"]["written"] < result["bytes"]["dense"]
    again = export.load(path, make())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    tokens = batches(1)[0]["input_ids"]
    assert torch.equal(again.eval()(tokens).logits, model.eval()(tokens).logits)


@needs_transformers
def test_two_of_four_goes_along_the_inputs_of_conv1d(tmp_path: Path) -> None:
    model = gpt2()
    finetune(model, OneShot(0.5, score=SparseGPT(), pattern="2:4"))
    weight = model.transformer.h[0].mlp.c_fc.weight
    assert weight.shape == (32, 128)
    assert bool((weight.T.reshape(-1, 4).count_nonzero(dim=1) <= 2).all())
    assert not bool((weight.reshape(-1, 4).count_nonzero(dim=1) <= 2).all()), "not along the outputs"
    sizes = {each: export.save(model, tmp_path / each, each)["bytes"]["written"] for each in ("nm", "compressed")}
    assert sizes["nm"] < sizes["compressed"]
    again: Any = export.load(tmp_path / "nm", gpt2())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert again.lm_head.weight is again.transformer.wte.weight


@needs_transformers
@pytest.mark.parametrize("make", [gpt2, llama], ids=["gpt2", "llama"])
def test_dense_files_go_to_transformers_and_come_from_it(make: Any, tmp_path: Path) -> None:
    model = make()
    OneShot(0.5).prune(model)
    model.config.save_pretrained(tmp_path / "ours")
    export.save(model, tmp_path / "ours" / "model.safetensors", "dense")
    theirs = type(model).from_pretrained(tmp_path / "ours")
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in model.state_dict().items())

    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    ours = export.load(tmp_path / "theirs", make())
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in model.state_dict().items())


class Attention(nn.Module):
    """Named as in timm: one matrix for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm = nn.LayerNorm(width // heads)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(self.q_norm(q), k, v)
        projected: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return projected


class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(width), Attention(width, 2), Scale(width)
        self.norm2, self.ls2 = nn.LayerNorm(width), Scale(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        hidden: Tensor = x + self.ls2(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))
        return hidden


class VisionTransformer(nn.Module):
    """A small look-alike of timm's: its names, its loose parameters, its order."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 4, 4)})
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        logits: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return logits


TIMM = [
    f"blocks.{block}.{layer}.weight" for block in (0, 1) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
]


def test_the_names_of_timm_are_targets() -> None:
    model = VisionTransformer()
    assert list(Targets().select(model)) == ["patch_embed.proj.weight", *TIMM, "head.weight"]
    assert list(Targets(include=["*attn.qkv*"]).select(model)) == TIMM[::4]
    assert list(Targets(exclude=["patch_embed*", "head*"]).select(model)) == TIMM


@pytest.mark.parametrize(("score", "pattern"), [(Wanda(), "2:4"), (SparseGPT(), "2:4"), (Wanda(), None)])
def test_a_vision_transformer_is_pruned_block_by_block_and_exported(
    score: Any, pattern: str | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, images = VisionTransformer(), torch.randn(4, 8, 3, 16, 16)
    method = OneShot(0.5, score=score, pattern=pattern, targets=Targets(exclude=["*patch_embed*"]))
    module = Images(model)
    method.prune(module, lambda: iter(images))
    assert method.sparsifier.density() == 0.5
    for weight in (each.get_parameter("attn.qkv.weight") for each in model.blocks):
        if isinstance(method.sparsifier.pattern, NM):
            assert bool((weight.reshape(-1, 4).count_nonzero(dim=1) <= 2).all())
        assert int(weight.count_nonzero()) == weight.numel() // 2
    form = "nm" if pattern else "compressed"
    export.save(model, tmp_path / form, form)
    again = export.load(tmp_path / form, VisionTransformer())
    assert torch.equal(again.eval()(images[0]), model.eval()(images[0]))


class Images(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return self.net(x)
