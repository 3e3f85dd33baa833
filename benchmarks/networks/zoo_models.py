"""Networks that people really have, at full size with random weights: written here in torch, so that nothing is loaded.

Sources of the architectures: ResNet [He16], MobileNetV2 [San18], SqueezeNet 1.1 [Ian16], DenseNet [Hua17], Inception
[Sze15], U-Net [Ron15], text CNN [Kim14], transformer encoder [Vas17]; docs/references.md. Sizes follow the papers where
a name has no suffix "style".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


def _conv_norm(n_in: int, n_out: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    pad = kernel // 2
    return [nn.Conv2d(n_in, n_out, kernel, stride, pad, groups=groups, bias=False), nn.BatchNorm2d(n_out)]


class _Residual(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_conv_norm(n_in, n_out, 3, stride), nn.ReLU(), *_conv_norm(n_out, n_out, 3))
        same = stride == 1 and n_in == n_out
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv_norm(n_in, n_out, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet18(*, small: bool) -> nn.Module:
    """ResNet-18; `small` is the form for 32x32 images, without the stride and the pool at the start."""
    stem = [*_conv_norm(3, 64, 3), nn.ReLU()] if small else [*_conv_norm(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    blocks: list[nn.Module] = []
    n_in = 64
    for i, width in enumerate((64, 128, 256, 512)):
        for j in range(2):
            blocks.append(_Residual(n_in, width, 2 if i and not j else 1))
            n_in = width
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10 if small else 1000)]
    return nn.Sequential(*stem, *blocks, *head)


class _Inverted(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int, factor: int) -> None:
        super().__init__()
        wide = n_in * factor
        layers = [*_conv_norm(n_in, wide, 1), nn.ReLU6()] if factor > 1 else []
        layers += [*_conv_norm(wide, wide, 3, stride, wide), nn.ReLU6(), *_conv_norm(wide, n_out, 1)]
        self.body = nn.Sequential(*layers)
        self.same = stride == 1 and n_in == n_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.same else self.body(x)


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 of width 1, 1000 classes."""
    layers: list[nn.Module] = [*_conv_norm(3, 32, 3, 2), nn.ReLU6()]
    n_in = 32
    for factor, width, repeats, stride in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for i in range(repeats):
            layers.append(_Inverted(n_in, width, stride if i == 0 else 1, factor))
            n_in = width
    layers += [*_conv_norm(320, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)]
    return nn.Sequential(*layers)


class _Fire(nn.Module):
    def __init__(self, n_in: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(n_in, squeeze, 1)
        self.one, self.three = nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.squeeze(x))
        return torch.cat([torch.relu(self.one(x)), torch.relu(self.three(x))], 1)


def squeezenet() -> nn.Module:
    """SqueezeNet 1.1, 1000 classes."""

    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    return nn.Sequential(
        *(nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool(), _Fire(64, 16, 64), _Fire(128, 16, 64), pool()),
        *(_Fire(128, 32, 128), _Fire(256, 32, 128), pool(), _Fire(256, 48, 192), _Fire(384, 48, 192)),
        *(_Fire(384, 64, 256), _Fire(512, 64, 256), nn.Dropout(), nn.Conv2d(512, 1000, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


class _Dense(nn.Module):
    def __init__(self, n_in: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.BatchNorm2d(n_in), nn.ReLU(), nn.Conv2d(n_in, 4 * growth, 1, bias=False)),
            *(nn.BatchNorm2d(4 * growth), nn.ReLU(), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


def densenet_style() -> nn.Module:
    """Three dense blocks of four layers, growth 12, for 32x32 images."""
    layers: list[nn.Module] = [nn.Conv2d(3, 24, 3, padding=1, bias=False)]
    width = 24
    for block in range(3):
        for _ in range(4):
            layers.append(_Dense(width, 12))
            width += 12
        if block < 2:
            layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)]
            width //= 2
    head = [nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    return nn.Sequential(*layers, *head)


class _Branches(nn.Module):
    def __init__(self, n_in: int, width: int) -> None:
        super().__init__()

        def unit(*parts: nn.Module) -> nn.Module:
            return nn.Sequential(*parts, nn.ReLU())

        self.one = unit(*_conv_norm(n_in, width, 1))
        self.three = nn.Sequential(unit(*_conv_norm(n_in, width, 1)), unit(*_conv_norm(width, width, 3)))
        self.five = nn.Sequential(unit(*_conv_norm(n_in, width, 1)), unit(*_conv_norm(width, width, 5)))
        self.pool = nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), unit(*_conv_norm(n_in, width, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


def inception_style() -> nn.Module:
    """A stem and three blocks of four branches, for 32x32 images."""
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), _Branches(32, 16), _Branches(64, 24)),
        *(nn.MaxPool2d(2), _Branches(96, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)),
    )


class UNetStyle(nn.Module):
    """Two levels down, two up by transposed convolution and by bilinear interpolation, skips joined."""

    def __init__(self) -> None:
        super().__init__()

        def double(n_in: int, n_out: int) -> nn.Module:
            return nn.Sequential(*_conv_norm(n_in, n_out, 3), nn.ReLU(), *_conv_norm(n_out, n_out, 3), nn.ReLU())

        self.top, self.middle, self.bottom = double(3, 16), double(16, 32), double(32, 64)
        self.up1, self.join1 = nn.ConvTranspose2d(64, 32, 2, 2), double(64, 32)
        self.up2 = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False), nn.Conv2d(32, 16, 1)
        )
        self.join2, self.head = double(32, 16), nn.Conv2d(16, 2, 1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """Return a mask's scores, (n, 2, 64, 64), of images (n, 3, 64, 64)."""
        a = self.top(x)
        b = self.middle(self.pool(a))
        c = self.join1(torch.cat([self.up1(self.bottom(self.pool(b))), b], 1))
        scores: Tensor = self.head(self.join2(torch.cat([self.up2(c), a], 1)))
        return scores


class TextCnn(nn.Module):
    """Embedded tokens, convolutions of width 3, 4 and 5, the maximum over time, a dense layer."""

    def __init__(self, *, tokens: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 64) if tokens else nn.Identity()
        self.convs = nn.ModuleList(nn.Conv1d(64, 100, width) for width in (3, 4, 5))
        self.head = nn.Linear(300, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores (n, 4) of vectors (n, 40, 64), or of tokens (n, 40)."""
        x = self.embedding(x).transpose(1, 2)
        scores: Tensor = self.head(torch.cat([torch.relu(conv(x)).amax(2) for conv in self.convs], 1))
        return scores


class Transformer(nn.Module):
    """Two encoder layers of torch, 64 wide, 4 heads, on 32 vectors; the mean of its results is classified."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores (n, 10) of vectors (n, 32, 64)."""
        scores: Tensor = self.head(self.encoder(x).mean(1))
        return scores


class Attention(nn.Module):
    """The same in plain operations: one attention, its norm, a Gelu block and its norm, twice."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "norm1": nn.LayerNorm(width),
                    "up": nn.Linear(width, 2 * width),
                    "down": nn.Linear(2 * width, width),
                    "norm2": nn.LayerNorm(width),
                }
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return vectors (n, 32, 64) of vectors of the same shape."""
        n, tokens, width = x.shape
        for block in self.blocks:
            q, k, v = block["qkv"](x).view(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
            weights = torch.softmax(q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5, -1)
            x = block["norm1"](x + block["out"]((weights @ v).transpose(1, 2).reshape(n, tokens, width)))
            x = block["norm2"](x + block["down"](nn.functional.gelu(block["up"](x))))
        return x


@dataclass(frozen=True)
class Entry:
    """A network of the zoo.

    Args:
        make: builds the module, its weights drawn by torch's global generator.
        shape: of one sample.
        tokens: 0 for float inputs, else the number of different tokens.
    """

    make: Callable[[], nn.Module]
    shape: Shape
    tokens: int = 0


ZOO: dict[str, Entry] = {
    "resnet18-cifar": Entry(lambda: resnet18(small=True), (3, 32, 32)),
    "resnet18": Entry(lambda: resnet18(small=False), (3, 224, 224)),
    "mobilenet-v2": Entry(mobilenet_v2, (3, 224, 224)),
    "squeezenet": Entry(squeezenet, (3, 224, 224)),
    "densenet-style": Entry(densenet_style, (3, 32, 32)),
    "inception-style": Entry(inception_style, (3, 32, 32)),
    "unet-style": Entry(UNetStyle, (3, 64, 64)),
    "text-cnn": Entry(lambda: TextCnn(tokens=False), (40, 64)),
    "text-cnn-tokens": Entry(lambda: TextCnn(tokens=True), (40,), 1000),
    "transformer": Entry(Transformer, (32, 64)),
    "attention": Entry(Attention, (32, 64)),
}
EXPORTERS = ("dynamo", "torchscript")


def build(name: str, seed: int = 0) -> nn.Module:
    """Return a network in evaluation mode, with weights and statistics drawn from a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = ZOO[name].make()
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.normal_(part.bias, std=0.1)
                part.running_mean = torch.randn(part.num_features) * 0.1
                part.running_var = torch.rand(part.num_features) + 0.5
    return module.eval()


def samples(name: str, n: int, seed: int = 0) -> Tensor:
    """Return n samples: normal numbers, or tokens."""
    generator = torch.Generator().manual_seed(seed)
    entry = ZOO[name]
    if entry.tokens:
        return torch.randint(0, entry.tokens, (n, *entry.shape), generator=generator)
    return torch.randn((n, *entry.shape), generator=generator)


def export(module: nn.Module, example: Tensor, exporter: str) -> bytes:
    """Return a module as ONNX with a free batch, by one of torch's exporters."""
    buffer = BytesIO()
    options: dict[str, Any] = {"input_names": ["x"], "output_names": ["scores"]}
    if exporter == "dynamo":
        batch = torch.export.Dim("batch", min=1, max=1024)
        program = torch.onnx.export(
            module, (example,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False, **options
        )
        assert program is not None  # noqa: S101
        program.save(buffer)
    else:
        torch.onnx.export(module, (example,), buffer, dynamo=False, dynamic_axes={"x": {0: "batch"}}, **options)
    return buffer.getvalue()


def names(wanted: Sequence[str]) -> list[str]:
    """Return the names in the zoo's order, all for none; raise ValueError for an unknown one."""
    unknown = [name for name in wanted if name not in ZOO]
    if unknown:
        raise ValueError(f"a network must be one of {', '.join(ZOO)}; got {', '.join(unknown)}")
    return [name for name in ZOO if not wanted or name in wanted]
