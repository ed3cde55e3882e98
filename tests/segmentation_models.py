"""Independent PyTorch versions of the heads that segment, and the copying of their weights."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional


def conv_norm(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """Convolution, batch normalization, ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def bilinear(x, size):
    return functional.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class Pyramid(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        deconvolutions = [nn.ConvTranspose2d(width, width, 2, stride=2) for _ in range(3)]
        self.up4_first, self.up4_second, self.up2 = deconvolutions
        self.up4_norm = nn.BatchNorm2d(width)

    def forward(self, maps):
        a, b, c, d = maps
        a = self.up4_second(functional.gelu(self.up4_norm(self.up4_first(a))))
        return [a, self.up2(b), c, functional.max_pool2d(d, 2)]


class UPerNet(nn.Module):
    def __init__(self, width: int, channels: int, classes: int, scales=(1, 2, 3, 6)):
        super().__init__()
        self.scales = scales
        self.pool = nn.ModuleList(conv_norm(width, channels, 1) for _ in scales)
        self.bottleneck = conv_norm(width + len(scales) * channels, channels, 3)
        self.lateral = nn.ModuleList(conv_norm(width, channels, 1) for _ in range(3))
        self.level = nn.ModuleList(conv_norm(channels, channels, 3) for _ in range(3))
        self.fusion = conv_norm(4 * channels, channels, 3)
        self.classes = nn.Conv2d(channels, classes, 1)

    def forward(self, maps):
        top = maps[3]
        pooled = [top]
        for scale, conv in zip(self.scales, self.pool, strict=True):
            pooled.append(bilinear(conv(functional.adaptive_avg_pool2d(top, scale)), top.shape[2:]))
        top = self.bottleneck(torch.cat(pooled, 1))
        third = self.lateral[2](maps[2]) + bilinear(top, maps[2].shape[2:])
        second = self.lateral[1](maps[1]) + bilinear(third, maps[1].shape[2:])
        first = self.lateral[0](maps[0]) + bilinear(second, maps[0].shape[2:])
        levels = [conv(x) for conv, x in zip(self.level, (first, second, third), strict=True)]
        levels = [bilinear(x, first.shape[2:]) for x in (*levels, top)]
        return self.classes(self.fusion(torch.cat(levels, 1)))


class FCN(nn.Module):
    def __init__(self, width: int, channels: int, classes: int):
        super().__init__()
        self.conv = conv_norm(width, channels, 3)
        self.classes = nn.Conv2d(channels, classes, 1)

    def forward(self, x):
        return self.classes(self.conv(x))


class SETR(nn.Module):
    def __init__(self, width: int, channels: int, classes: int, convolutions, scale, kernel):
        super().__init__()
        self.norm, self.scale = nn.LayerNorm(width, eps=1e-6), scale
        widths = [width, *[channels] * convolutions]
        self.convs = nn.ModuleList(
            conv_norm(widths[i], channels, kernel) for i in range(convolutions)
        )
        self.classes = nn.Conv2d(channels, classes, 1)

    def forward(self, x):
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        for conv in self.convs:
            x = conv(x)
            x = bilinear(x, [self.scale * side for side in x.shape[2:]])
        return self.classes(x)


class Linear(nn.Module):
    def __init__(self, width: int, classes: int):
        super().__init__()
        self.norm, self.classes = nn.BatchNorm2d(width), nn.Conv2d(width, classes, 1)

    def forward(self, x):
        return self.classes(self.norm(x))


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in float64 with random weights and running statistics."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for name, x in module.state_dict().items():
            if x.dtype == torch.float64:
                noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
                x.copy_(0.5 + noise.abs() if name.endswith("running_var") else 0.3 * noise)
    return module


def flax_of(module: nn.Module) -> tuple[dict, dict]:
    """-> params and running statistics of one layer or of a `conv_norm`, as Flax names them."""

    def array(x):
        return x.detach().numpy()

    if isinstance(module, nn.Sequential):
        params, statistics = flax_of(module[1])
        return {"conv": flax_of(module[0])[0], "norm": params}, {"norm": statistics}
    if isinstance(module, nn.BatchNorm2d):
        params = {"scale": array(module.weight), "bias": array(module.bias)}
        statistics = {"mean": array(module.running_mean), "variance": array(module.running_var)}
        return params, {name: np.array(x) for name, x in statistics.items()}
    if isinstance(module, nn.LayerNorm):
        return {"scale": array(module.weight), "bias": array(module.bias)}, {}
    kernel = array(module.weight).transpose(2, 3, 1, 0)
    params = {"kernel": kernel}
    if module.bias is not None:
        params["bias"] = array(module.bias)
    return params, {}


def flax_variables(module: nn.Module, names: dict[str, str]) -> dict:
    """Variables of a Flax module; names {Flax name: PyTorch name}, `classes` a 1 x 1 kernel."""
    params, statistics = {}, {}
    for ours, theirs in names.items():
        layer = module.get_submodule(theirs)
        params[ours], running = flax_of(layer)
        if running:
            statistics[ours] = running
        if ours == "classes":
            params[ours]["kernel"] = params[ours]["kernel"][0, 0]
            params[ours] = {"conv": params[ours]}
    return {"params": params, "batch_statistics": statistics}


PYRAMID = {name: name for name in ("up4_first", "up4_norm", "up4_second", "up2")}
FCN_NAMES = {"conv": "conv", "classes": "classes"}


def upernet_names(scales=(1, 2, 3, 6)) -> dict[str, str]:
    """{Flax name: PyTorch name} of UPerNet."""
    names = {f"pool_{scale}": f"pool.{i}" for i, scale in enumerate(scales)}
    names |= {f"{part}_{i}": f"{part}.{i}" for part in ("lateral", "level") for i in range(3)}
    return names | {name: name for name in ("bottleneck", "fusion", "classes")}
