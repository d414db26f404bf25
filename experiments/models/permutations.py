"""Which units of each network may be permuted: a `glue_jax.merging.PermutationSpec` of its variables."""

from collections.abc import Callable, Mapping
from typing import Any

from experiments.models.mobilenet import STAGES
from glue_jax.merging.permutation_specs import Axis, PermutationSpec

_Spec = dict[str, tuple[Axis, ...]]


def convnet() -> PermutationSpec:
    """Returns what may be permuted in `ConvNet`: the channels of both convolutions."""
    return {
        **_conv("conv1", None, "conv1"),
        **_batch_norm("norm1", "conv1"),
        **_conv("conv2", "conv1", "conv2"),
        **_batch_norm("norm2", "conv2"),
        **_linear("head", "conv2", None),
    }


def resnet20() -> PermutationSpec:
    """Returns what may be permuted in `ResNet20`: the channels within each block, and those of each stage's stream.

    The shortcut from one stage to the next adds zero channels, half of them on either side. So the middle channels of a
    stream are the stream of the stage before. Only the channels on either side belong to the stage itself.
    """
    streams: list[Axis] = ["stream1"]
    for stage, features in ((2, 32), (3, 64)):
        own, before = f"stream{stage}", streams[-1]
        middle = ((before, 0, features // 2),) if isinstance(before, str) else before or ()
        streams.append(((own, 0, features // 4), *middle, (own, features // 4, features // 2)))
    spec = {**_conv("conv", None, "stream1"), **_batch_norm("norm", "stream1")}
    before = streams[0]
    for index in range(9):
        block, inner, after = f"blocks/{index}", f"block{index}", streams[index // 3]
        spec |= {
            **_conv(f"{block}/conv1", before, inner),
            **_batch_norm(f"{block}/norm1", inner),
            **_conv(f"{block}/conv2", inner, after),
            **_batch_norm(f"{block}/norm2", after),
        }
        before = after
    return {**spec, **_linear("head", before, None)}


def mobilenetv2(**_: Any) -> PermutationSpec:
    """Returns what may be permuted in `MobileNetV2`: the channels within each block, and those between the blocks."""
    spec = {**_conv("conv", None, "stem"), **_batch_norm("norm1", "stem")}
    before, index = "stem", 0
    for stage, (expansion, _channels, count, _stride) in enumerate(STAGES):
        for _number in range(count):
            block, inner, after = f"blocks/{index}", f"block{index}", f"stage{stage}"
            if expansion > 1:
                spec |= {**_conv(f"{block}/expand", before, inner), **_batch_norm(f"{block}/norm1", inner)}
            else:
                inner = before
            spec |= {
                f"params/{block}/depthwise/kernel": (None, None, None, inner),
                **_batch_norm(f"{block}/norm2", inner),
                **_conv(f"{block}/project", inner, after),
                **_batch_norm(f"{block}/norm3", after),
            }
            before, index = after, index + 1
    return {
        **spec,
        **_conv("last_conv", before, "last"),
        **_batch_norm("norm2", "last"),
        **_linear("head", "last", None),
    }


def vit(*, depth: int, positions: str, pooling: str, **_: Any) -> PermutationSpec:
    """Returns what may be permuted in `ViT`: the heads and units of each block, and the features of the stream.

    Fixed positions are the same in every expert. So with fixed positions, the features of the stream stay in their
    places.
    """
    stream = "stream" if positions == "learned" else None
    spec: _Spec = {"params/patches/kernel": (None, None, None, stream), "params/patches/bias": (stream,)}
    if positions == "learned":
        spec["params/positions"] = (None, None, stream)
    if pooling == "token":
        spec["params/token"] = (None, None, stream)
    for index in range(depth):
        block, heads, units = f"params/blocks/{index}", f"heads{index}", f"mlp{index}"
        for name in ("query", "key", "value"):
            spec[f"{block}/attention/{name}/kernel"] = (stream, heads, None)
            spec[f"{block}/attention/{name}/bias"] = (heads, None)
        spec |= {
            f"{block}/attention/out/kernel": (heads, None, stream),
            f"{block}/attention/out/bias": (stream,),
            **_linear(f"blocks/{index}/linear1", stream, units),
            **_linear(f"blocks/{index}/linear2", units, stream),
            **{f"{block}/{norm}/{leaf}": (stream,) for norm in ("norm1", "norm2") for leaf in ("scale", "bias")},
        }
    return {
        **spec,
        **{f"params/norm/{leaf}": (stream,) for leaf in ("scale", "bias")},
        **_linear("head", stream, None),
    }


SPECS: Mapping[str, Callable[..., PermutationSpec]] = {
    "convnet": convnet,
    "resnet20": resnet20,
    "mobilenetv2": mobilenetv2,
    "vit": vit,
}
"""By the network's name, called with its options."""


def _conv(path: str, before: Axis, after: Axis) -> _Spec:
    """A convolution without a bias."""
    return {f"params/{path}/kernel": (None, None, before, after)}


def _linear(path: str, before: Axis, after: Axis) -> _Spec:
    """A dense layer."""
    return {f"params/{path}/kernel": (before, after), f"params/{path}/bias": (after,)}


def _batch_norm(path: str, axis: Axis) -> _Spec:
    """A BatchNorm, with its statistics."""
    leaves = {"params": ("scale", "bias"), "batch_stats": ("mean", "var")}
    return {f"{collection}/{path}/{leaf}": (axis,) for collection, names in leaves.items() for leaf in names}
