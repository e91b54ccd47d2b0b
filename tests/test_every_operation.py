"""Every registered operation, against PyTorch's own: a case each at least; other files go over the argument space."""

import builtins
import math
import operator
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_ops import call, check, draw, to_torch, torch_operation, whole

import interop.ops.registry as registry
from interop.program.nodes import DType
from interop.program.versions import release

X, Y, POSITIVE, UNIT = draw(3, 4), draw(3, 4, seed=1), draw(3, 4, low=0.2, high=3.0), draw(3, 4, low=-0.9, high=0.9)
MATRIX, SQUARE, CUBE, IMAGES = draw(3, 4), draw(2, 3, 3) + 3 * jnp.eye(3), draw(2, 3, 4), draw(2, 4, 6, 5)
I, J, BITS = whole(3, 4), whole(3, 4, seed=1, low=1), whole(3, 4, low=0, high=5)
FLAG, OTHER_FLAG = I > 0, J > 2
SPECIAL = jnp.asarray([[0.0, -0.0, 1.5], [jnp.nan, jnp.inf, -jnp.inf]])
FORWARD, NEAR = {"gradients": False}, {"gradients": False, "tolerance": 1e-9}
COMPLEX = jnp.asarray(X + 1j * Y)
INDEX = jnp.asarray([[0, 2, 1, 0], [1, 1, 0, 2]])
SORTED = jnp.asarray([0.0, 1.0, 2.5, 4.0])


def named(names, *args, **kwargs):
    """The same arguments for several operations; `.default` where no overload is named."""
    full = [name if "." in name else f"{name}.default" for name in names.split()]
    full = [name if name.count(".") == 2 else f"aten.{name}" for name in full]
    return [(name, args, kwargs) for name in full]


def images(n, size=5):
    return draw(2, 4, *[size, size + 1, size][:n])


CASES = [
    *named("abs angle atan ceil cos cosh deg2rad digamma erf erfc exp exp2 expm1 fix floor frac neg", X),
    *named("positive rad2deg real reciprocal round sigmoid sign sin sinc sinh special_digamma special_erf", X),
    *named("special_expit square", X),
    *named("tan tanh trunc", X),
    *named("asinh lgamma log log10 log1p log2 rsqrt sqrt", POSITIVE),
    *named("acos asin atanh erfinv", UNIT),
    *named("acosh", POSITIVE + 1),
    *named("logit", POSITIVE / 4),
    *named("isfinite isinf isnan isneginf isposinf signbit sgn sign abs", SPECIAL, gradients=False),
    *named("angle conj _conj real imag resolve_conj resolve_neg", COMPLEX, gradients=False),
    *named("abs exp sgn neg reciprocal square", COMPLEX, gradients=False),
    *named("bitwise_not", I),
    *named("logical_not", FLAG),
    *named("round.decimals", X * 10, decimals=1),
    *named("nan_to_num", SPECIAL, 0.5, gradients=False),
    # activations
    *named("celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu log_sigmoid mish relu relu6", X),
    *named("selu silu softplus softshrink", X),
    *named("hardswish_ hardtanh_ relu_ silu_", X, gradients=False),
    *named("log_sigmoid_forward", X, gradients=False),
    *named("glu", X, -1),
    *named("threshold", X, 0.5, 7.0),
    *named("prelu", IMAGES, draw(4, seed=1)),
    *named("_prelu_kernel", IMAGES, draw(1, 4, 1, 1, seed=1)),
    *named("rrelu", X, 0.1, 0.3, False),
    # two operands
    *named("add.Tensor sub.Tensor rsub.Tensor mul.Tensor div.Tensor true_divide.Tensor atan2 maximum minimum", X, Y),
    *named("max.other min.other fmax fmin hypot logaddexp fmod.Tensor remainder.Tensor copysign.Tensor", X, Y),
    *named("fmax fmin maximum minimum", SPECIAL, SPECIAL[::-1], gradients=False),
    *named("heaviside", SPECIAL[:1], draw(1, 3), gradients=False),
    *named("add.Scalar sub.Scalar rsub.Scalar mul.Scalar div.Scalar fmod.Scalar", X, 1.5),
    *named("remainder.Scalar copysign.Scalar", X, 1.5),
    *named("div.Tensor_mode", X, Y, rounding_mode="floor", gradients=False),
    *named("div.Scalar_mode", X, 0.7, rounding_mode="trunc", gradients=False),
    *named("floor_divide", X, Y, gradients=False),
    *named("floor_divide fmod.Tensor remainder.Tensor", I, J),
    *named("floor_divide.Scalar", I, 3),
    *named("remainder.Scalar_Tensor", 7, J),
    *named("pow.Tensor_Tensor", POSITIVE, Y),
    *named("pow.Tensor_Scalar", X, 3),
    *named("pow.Scalar", 2.5, X),
    *named("float_power.Tensor_Scalar", I.astype(jnp.float32), 2, tolerance=1e-9),
    *named("float_power.Tensor_Tensor", POSITIVE, Y),
    *named("float_power.Scalar", 2.5, X),
    *named("xlogy.Tensor special_xlogy", X, POSITIVE),
    *named("xlogy.Scalar_Other", X, 2.5),
    *named("clamp clip", X, -0.5, 1.0),
    *named("clamp.Tensor clip.Tensor", X, Y - 1, Y + 0.5),
    *named("clamp_min clamp_max", X, 0.3),
    *named("clamp_min.Tensor clamp_max.Tensor", X, Y),
    *named("lerp.Scalar", X, Y, 0.3),
    *named("lerp.Tensor", X, Y, POSITIVE),
    *named("addcmul addcdiv", X, Y, POSITIVE, value=0.7),
    *named("eq.Tensor ne.Tensor lt.Tensor le.Tensor gt.Tensor ge.Tensor", I, J),
    *named("eq.Scalar ne.Scalar lt.Scalar le.Scalar gt.Scalar ge.Scalar", X, 0.5),
    *named("isclose", X, X + 1e-9, gradients=False),
    *named("logical_and logical_or logical_xor", FLAG, OTHER_FLAG),
    *named("bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor __and__.Tensor __or__.Tensor __xor__.Tensor", I, J),
    *named("bitwise_and.Scalar bitwise_or.Scalar bitwise_xor.Scalar", I, 6),
    *named("__and__.Scalar __or__.Scalar __xor__.Scalar", I, 6),
    *named("bitwise_left_shift.Tensor bitwise_right_shift.Tensor __lshift__.Tensor __rshift__.Tensor", I, BITS),
    *named("bitwise_left_shift.Tensor_Scalar bitwise_right_shift.Tensor_Scalar", I, 2),
    *named("__lshift__.Scalar __rshift__.Scalar", I, 2),
    *named("bitwise_and.Scalar_Tensor bitwise_or.Scalar_Tensor bitwise_xor.Scalar_Tensor", 6, I),
    *named("bitwise_left_shift.Scalar_Tensor bitwise_right_shift.Scalar_Tensor", 6, BITS),
    *named("where.self", FLAG, X, Y),
    *named("where.ScalarSelf", FLAG, 2.0, Y),
    *named("where.ScalarOther", FLAG, X, 2.0),
    *named("where.Scalar", FLAG, 1.5, 2.0),
    *named("masked_fill.Scalar", X, FLAG, 3),
    *named("masked_fill.Tensor", X, FLAG, jnp.asarray(2.5)),
    *named("complex polar", X, Y, gradients=False),
    # types and places
    *named("alias clone contiguous lift_fresh lift_fresh_copy detach", X, gradients=False),
    *named("lift detach_", X, gradients=False),
    *named("_to_copy", X, dtype=DType("float32"), gradients=False),
    *named("to.dtype", X, DType("float32"), gradients=False),
    *named("to.dtype_layout", X, dtype=DType("int32"), gradients=False),
    *named("to.other type_as", X, I, gradients=False),
    *named("prims.convert_element_type.default", X, DType("float32"), gradients=False),
    *named("view.dtype", X, DType("int64"), gradients=False),
    *named("copy", X, Y, gradients=False),
    # reductions
    *named("sum mean nansum amax amin max min std var median prod", X),
    *named("logsumexp sum.dim_IntList mean.dim amax amin", CUBE, [1, -1], True),
    *named("nansum", SPECIAL, [0], gradients=False),
    *named("aminmax", CUBE, dim=1),
    *named("max.dim min.dim median.dim argmax argmin", CUBE, 1, True),
    *named("all any _is_all_true _is_any_true", FLAG),
    *named("all.dim any.dim", FLAG, 1, True),
    *named("all.dims any.dims", FLAG, [0, 1]),
    *named("prod.dim_int", CUBE, 1),
    *named("count_nonzero", I),
    *named("count_nonzero.dim_IntList", I, [1]),
    *named("var.dim std.dim var_mean.dim std_mean.dim", CUBE, [0, 2], False, True),
    *named("var.correction std.correction var_mean.correction std_mean.correction", CUBE, [1], correction=2),
    *named("norm.Scalar", X, 3),
    *named("norm.ScalarOpt_dim", CUBE, 1, [1, 2], True),
    *named("frobenius_norm.dim", CUBE, [1, 2]),
    *named("linalg_vector_norm", CUBE, 3, [1], True),
    *named("linalg_norm", CUBE, None, [1, 2]),
    *named("linalg_norm", X, 1),
    *named("linalg_norm", SQUARE, 2, [1, 2], True, tolerance=1e-9),
    *named("linalg_norm.ord_str", SQUARE, "fro", [0, 2]),
    *named("linalg_norm", CUBE, 3, [1]),
    *named("linalg_norm", CUBE),
    *named("softmax.int log_softmax.int", CUBE, 1),
    *named("_softmax _log_softmax", CUBE, 1, False),
    *named("cumsum cumprod logcumsumexp", CUBE, 1),
    *named("sort argsort", CUBE, 1, True),
    *named("sort.stable argsort.stable", I, stable=True, dim=0, descending=False),
    *named("topk", CUBE, 2, 1, False),
    *named("diff", CUBE, 2, 1),
    *named("cosine_similarity", CUBE, draw(2, 3, 4, seed=1), 2),
    *named("_weight_norm", CUBE, draw(2, 1, 1, low=0.5), 0),
    *named("_weight_norm_interface", CUBE, draw(2, 1, 1, low=0.5), 0, gradients=False),
    # pooling, resizing, convolutions (their derivatives: test_ops), normalisation
    *[(f"aten.{name}_pool{n}d.default", (images(n), [2] * n), FORWARD) for n in (1, 2, 3) for name in ("avg", "max")],
    *[(f"aten.max_pool{n}d_with_indices.default", (images(n), [2] * n), FORWARD) for n in (1, 2, 3)],
    *[(f"aten.{name}{n}d.default", (images(n), [2, 3, 2][:n]), FORWARD)
      for n in (1, 2, 3) for name in ("adaptive_avg_pool", "adaptive_max_pool")],
    *[(f"aten._adaptive_avg_pool{n}d.default", (images(n), [2, 3, 2][:n]), FORWARD) for n in (2, 3)],
    *[(f"aten.{name}{n}d.default", (images(n), [3, 8, 4][:n], *[None] * n), FORWARD)
      for n in (1, 2, 3) for name in ("upsample_nearest", "_upsample_nearest_exact")],
    *[(f"aten.{name}{n}d.vec", (images(n), None, [1.5] * n), FORWARD)
      for n in (1, 2, 3) for name in ("upsample_nearest", "_upsample_nearest_exact")],
    *[(f"aten.upsample_{name}.default", (images(n), [3, 8, 4][:n], True), NEAR)
      for n, name in ((1, "linear1d"), (2, "bilinear2d"), (2, "bicubic2d"), (3, "trilinear3d"))],
    *[(f"aten.upsample_{name}.vec", (images(n), None, False, [1.6] * n), NEAR)
      for n, name in ((1, "linear1d"), (2, "bilinear2d"), (2, "bicubic2d"), (3, "trilinear3d"))],
    *named("_upsample_bilinear2d_aa _upsample_bicubic2d_aa", IMAGES, [3, 4], False, tolerance=1e-9, gradients=False),
    *named("_upsample_bilinear2d_aa.vec _upsample_bicubic2d_aa.vec", IMAGES, None, False, [0.5, 0.7], **NEAR),
    *[(f"aten.{name}_pad{n}d.default", (images(n), [1, 2, 2, 1, 1, 1][: 2 * n]), FORWARD)
      for n in (1, 2, 3) for name in ("reflection", "replication")],
    *[(f"aten.conv{n}d.default", (images(n), draw(3, 4, *[2] * n), draw(3)), NEAR) for n in (1, 2, 3)],
    *[(f"aten.conv{n}d.padding", (images(n), draw(3, 4, *[2] * n), draw(3), [1] * n, "same"), NEAR)
      for n in (1, 2, 3)],
    *[(f"aten.conv_transpose{n}d.{overload}", (images(n), draw(4, 3, *[2] * n), draw(3), [2] * n), NEAR)
      for n, overload in ((1, "default"), (2, "input"), (3, "input"))],
    *named("convolution", IMAGES, draw(4, 2, 3, 3), draw(4), [2, 1], [1, 0], [1, 1], False, [0, 0], 2, gradients=False),
    *named("_convolution", IMAGES, draw(4, 2, 3, 3), draw(4), [2, 2], [1, 0], [1, 1], True, [1, 0], 2, *[False] * 4,
           **FORWARD),
    *named("layer_norm", CUBE, [4], draw(4), draw(4), 1e-5),
    *named("native_layer_norm", CUBE, [3, 4], draw(3, 4), draw(3, 4), 1e-5, gradients=False),
    *named("group_norm", IMAGES, 2, draw(4), draw(4)),
    *named("native_group_norm", IMAGES, draw(4), draw(4), 2, 4, 30, 2, 1e-5, gradients=False),
    *named("instance_norm", IMAGES, draw(4), draw(4), None, None, True, 0.1, 1e-5, False),
    *named("rms_norm", CUBE, [4], draw(4), 1e-5),
    *named("_fused_rms_norm", CUBE, [4], draw(4), 1e-5, gradients=False),
    *named("batch_norm", IMAGES, draw(4), draw(4), draw(4), POSITIVE[0], False, 0.1, 1e-5, False, gradients=False),
    *named("native_batch_norm", IMAGES, draw(4), draw(4), draw(4), POSITIVE[0], True, 0.1, 1e-5, gradients=False),
    *named("_native_batch_norm_legit.no_stats", IMAGES, draw(4), draw(4), True, 0.1, 1e-5, gradients=False),
    *named("_native_batch_norm_legit_functional", IMAGES, draw(4), draw(4), draw(4), POSITIVE[0], True, 0.1, 1e-5,
           gradients=False),
    *named("_native_batch_norm_legit_no_training", IMAGES, draw(4), draw(4), draw(4), POSITIVE[0], 0.1, 1e-5,
           gradients=False),
    *named("channel_shuffle native_channel_shuffle", IMAGES, 2, gradients=False),
    *named("pixel_shuffle", IMAGES, 2),
    *named("pixel_unshuffle", draw(2, 3, 4, 6), 2),
    *named("im2col", IMAGES, [2, 2], [1, 1], [1, 0], [1, 2]),
    *named("col2im", draw(2, 16, 4), [3, 3], [2, 2], [1, 1], [0, 0], [1, 1]),
    *named("affine_grid_generator", draw(2, 2, 3), [2, 3, 4, 5], False),
    *named("affine_grid_generator", draw(2, 3, 4), [2, 3, 4, 5, 2], True),
    *named("grid_sampler", IMAGES, draw(2, 3, 3, 2, seed=1), 0, 0, False, **FORWARD),
    *named("grid_sampler_2d", IMAGES, draw(2, 3, 3, 2, seed=1), 0, 0, False, **FORWARD),
    *named("grid_sampler_3d", draw(2, 3, 4, 5, 3), draw(2, 2, 3, 3, 3, seed=1), 0, 0, False, **FORWARD),
    *named("rnn_relu.input", draw(2, 5, 4), draw(1, 2, 3), [draw(3, 4), draw(3, 3), draw(3), draw(3)], True, 1, 0.0,
           False, False, True, tolerance=1e-9),
    # linear algebra
    *named("linear", CUBE, draw(5, 4), draw(5)),
    *named("matmul mm", X, Y.T),
    *named("bmm", CUBE, draw(2, 4, 5)),
    *named("mv", X, draw(4)),
    *named("dot vdot", X[0], Y[0]),
    *named("vdot", COMPLEX[0], COMPLEX[1], gradients=False),
    *named("addmm", draw(3, 3), X, Y.T, beta=0.5, alpha=2),
    *named("addmv", draw(3), X, draw(4), beta=0.5, alpha=2),
    *named("baddbmm", draw(2, 3, 5), CUBE, draw(2, 4, 5), beta=0.5, alpha=2),
    *named("addbmm", draw(3, 5), CUBE, draw(2, 4, 5), beta=0.5, alpha=2),
    *named("outer ger", X[0], Y[1]),
    *named("einsum", "bij,bkj->bik", [CUBE, draw(2, 5, 4)]),
    *named("tensordot", CUBE, draw(4, 3, 5), [1, 2], [1, 0]),
    *named("bilinear", draw(2, 3), draw(2, 4), draw(5, 3, 4), draw(5)),
    *named("kron", X, draw(2, 2)),
    *named("linalg_inv inverse", SQUARE),
    *named("linalg_cross cross", CUBE, draw(2, 3, 4, seed=1), dim=1),
    *named("cross", CUBE, draw(2, 3, 4, seed=1)),
    *named("trace", SQUARE[0]),
    *named("cholesky", SQUARE @ SQUARE.mT),
    *named("_fft_c2c", COMPLEX, [1], 0, True, gradients=False),
    *named("_fft_r2c", X, [1], 0, True, gradients=False),
    *named("_fft_c2r", COMPLEX, [1], 0, 6, gradients=False),
    *named("cdist", CUBE, draw(2, 5, 4, seed=1), 3.0),
    *named("_cdist_forward", CUBE, draw(2, 5, 4, seed=1), 3.0, None, gradients=False),
    *named("scaled_dot_product_attention", *(draw(2, 3, 5, 4, seed=i) for i in range(3)), tolerance=1e-9),
    # shapes
    *named("permute", CUBE, [2, 0, -2]),
    *named("transpose.int swapaxes swapdims", CUBE, 0, -1),
    *named("t numpy_T mT adjoint matrix_H", X),
    *named("mT adjoint numpy_T", CUBE),
    *named("adjoint matrix_H", COMPLEX, gradients=False),
    *named("movedim.int", CUBE, 0, -1),
    *named("movedim.intlist", CUBE, [0, 1], [-1, 0]),
    *named("view _unsafe_view reshape", CUBE, [6, -1]),
    *named("view_as reshape_as", CUBE, draw(6, 4)),
    *named("flatten.using_ints", CUBE, 1, -1),
    *named("unflatten.int", CUBE, -1, [2, -1]),
    *named("squeeze", CUBE[:, :1]),
    *named("squeeze.dim", CUBE[:, :1], 1),
    *named("squeeze.dims", CUBE[:1, :1], [0, -2]),
    *named("unsqueeze", CUBE, -2),
    *named("expand", CUBE[:, :1], [5, -1, 3, 4]),
    *named("expand_as", CUBE[:, :1], CUBE),
    *named("broadcast_tensors", [X, Y[:1], draw(3, 1)]),
    *named("repeat", X, [2, 1, 3]),
    *named("tile", CUBE, [2, 3]),
    *named("repeat_interleave.self_int", X, 2),
    *named("cat concat concatenate", [X, Y[:1]], 0),
    *named("stack", [X, Y], 1),
    *named("hstack", [X, Y]),
    *named("slice.Tensor", CUBE, -1, 1, 100, 2),
    *named("narrow", CUBE, 1, -2, 2),
    *named("select.int", CUBE, 1, -1),
    *named("split.Tensor", CUBE, 3, 2),
    *named("split.sizes split_with_sizes", CUBE, [1, 3], -1),
    *named("chunk tensor_split.sections", CUBE, 3, -1),
    *named("unbind.int", CUBE, -1),
    *named("flip", CUBE, [0, -1]),
    *named("roll", CUBE, [1, -1], [0, 2]),
    *named("pad", IMAGES, [1, 2, 0, 1], "reflect"),
    *named("constant_pad_nd", IMAGES, [1, -1, 0, 2], 1.5),
    *named("meshgrid", [X[0], Y[:, 0]]),
    *named("meshgrid.indexing", [X[0], Y[:, 0]], indexing="xy"),
    *named("unfold", CUBE, -1, 2, 1),
    *named("as_strided", draw(12), [2, 3], [5, 2], 1),
    *named("view_as_real view_as_real_copy", COMPLEX, gradients=False),
    *named("view_as_complex", draw(3, 2), gradients=False),
    *named("atleast_1d", jnp.asarray(2.0)),
    *named("cartesian_prod", [X[0], Y[0]]),
    # indices
    *named("index.Tensor _unsafe_index.Tensor", CUBE, [None, jnp.asarray([2, 0]), jnp.asarray([-1, 1])]),
    *named("index_put _unsafe_index_put", X, [jnp.asarray([2, 0])], draw(2, 4, seed=3), True),
    *named("index_select", CUBE, 1, jnp.asarray([2, 0, 2])),
    *named("nonzero_static", I, size=7, fill_value=-2),
    *named("index_add", X, 0, jnp.asarray([2, 0, 2]), draw(3, 4, seed=3), alpha=0.5),
    *named("index_copy", X, 0, jnp.asarray([2, 0]), draw(2, 4, seed=3)),
    *named("index_fill.int_Scalar", X, 1, jnp.asarray([2, 0]), 1.5),
    *named("index_fill.int_Tensor", X, 1, jnp.asarray([2, 0]), jnp.asarray(1.5)),
    *named("gather", X, 0, INDEX),
    *named("take", X, jnp.asarray([3, -1, 7])),
    *named("take_along_dim", X, INDEX, 0),
    *named("scatter.src scatter_add", X, 0, jnp.asarray([[0, 2, 1, 0]]), Y, gradients=False),
    *named("scatter.value", X, 0, INDEX, 1.5),
    *named("scatter.reduce", X, 0, INDEX[:1], Y, reduce="multiply", gradients=False),
    *named("scatter.value_reduce", X, 0, INDEX, 1.5, reduce="add", gradients=False),
    *named("scatter_reduce.two", X, 0, INDEX, Y, "amax", include_self=False, gradients=False),
    *named("scatter_reduce.two", X, 0, INDEX, Y, "mean", gradients=False),
    *named("masked_scatter", X, FLAG, Y),
    *named("embedding", draw(6, 3), whole(2, 4, low=0, high=6), 2),
    *named("one_hot", whole(2, 4, low=0, high=6), 7),
    *named("slice_scatter", CUBE, draw(2, 3, 2), -1, 0, 4, 2),
    *named("select_scatter", CUBE, draw(2, 4), 1, -1),
    *named("diagonal_scatter", X, draw(3), 1),
    *named("tril triu", CUBE, 1),
    *named("diagonal", CUBE, 1, 2, 0),
    *named("linalg_diagonal", CUBE, offset=-1),
    *named("diag_embed", X, 1),
    *named("bucketize.Tensor", X, SORTED, right=True, gradients=False),
    *named("searchsorted.Tensor", SORTED, X, gradients=False),
    # tensors made of sizes
    *named("zeros ones", [2, 3]),
    *named("full", [2, 3], 7),
    *named("eye", 3),
    *named("eye.m", 3, 4),
    *named("scalar_tensor", 2.5, dtype=DType("float64")),
    *named("zeros_like ones_like zero", X, gradients=False),
    *named("full_like fill.Scalar", X, 2.5, gradients=False),
    *named("fill.Tensor", X, jnp.asarray(2.5), gradients=False),
    *named("new_zeros new_ones", X, [2], gradients=False),
    *named("new_full", X, [2], 3, gradients=False),
    *named("arange", 5),
    *named("arange.start", 2, 5.5),
    *named("arange.start_step", 5, 0, -2),
    *named("linspace", 0.0, 1.0, 5, dtype=DType("float64")),
    *named("logspace", 0.0, 2.0, 3, dtype=DType("float64")),
    *named("tril_indices triu_indices", 3, 4, 1),
    *named("hann_window", 6, dtype=DType("float64")),
]  # fmt: skip

# What newer versions of PyTorch have no more, and the first of these; programs of older ones go on.
GONE = {"aten.cholesky.default": "2.14"}


def gone(name):
    return name in GONE and release(torch.__version__) >= release(GONE[name])


CASES = [case for case in CASES if not gone(case[0])]

SIZED = {"empty.memory_format": ([2, 3],), "empty_like.default": (X,), "new_empty.default": (X, [2, 3]),
         "empty_permuted.default": ([2, 3], [1, 0]), "empty_strided.default": ([2, 3], [3, 1])}  # fmt: skip

# Arguments of each, and what is drawn from: the statistics of many draws are to be PyTorch's.
MANY = jnp.full((40_000,), 0.3)
RANDOM = {
    "bernoulli.default": (MANY,), "bernoulli.p": (MANY, 0.2), "bernoulli.Tensor": (MANY, MANY),
    "bernoulli_.float": (MANY, 0.2), "dropout.default": (MANY, 0.4, True), "native_dropout.default": (MANY, 0.4, True),
    "feature_dropout.default": (MANY.reshape(-1, 1, 1), 0.4, True), "alpha_dropout.default": (MANY, 0.4, True),
    "exponential.default": (MANY, 2.0), "normal_functional.default": (MANY, 1.0, 2.0),
    "normal_.default": (MANY, 1.0, 2.0), "normal.Tensor_Tensor": (MANY, 2 * MANY), "normal.Tensor_float": (MANY, 2.0),
    "normal.float_float": (1.0, 2.0, [40_000]), "rand.default": ([40_000],), "rand_like.default": (MANY,),
    "randn.default": ([40_000],), "randn_like.default": (MANY,), "randint.default": (7, [40_000]),
    "randint.low": (-3, 7, [40_000]), "randint_like.low_dtype": (MANY, -3, 7),
    "randint_like.default": (MANY, 7), "log_normal.default": (MANY, 0.2, 0.5), "poisson.default": (10 * MANY,),
    "randperm.default": (40_000,),
    "uniform.default": (MANY, -1.0, 3.0), "uniform_.default": (MANY, -1.0, 3.0),
    "multinomial.default": (jnp.asarray([0.1, 0.2, 0.7]), 40_000, True), "rrelu.default": (-MANY, 0.1, 0.4, True),
}  # fmt: skip


def _id(case):
    return case if isinstance(case, str) else ""


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, of what it deprecates
@pytest.mark.parametrize(("name", "args", "options"), CASES, ids=_id)
def test_an_operation_is_pytorchs(name, args, options):
    check(name, *args, **options)


@pytest.mark.parametrize("name", SIZED)
def test_memory_left_as_it_is_has_pytorchs_shape_and_type(name):
    found = call(f"aten.{name}", *SIZED[name])
    expected = torch_operation(f"aten.{name}")(*map(to_torch, SIZED[name]))
    assert found.shape == tuple(expected.shape)
    assert found.dtype.name == str(expected.dtype).removeprefix("torch.")


@pytest.mark.parametrize("name", RANDOM)
def test_draws_have_pytorchs_distribution(name):
    found = call(f"aten.{name}", *RANDOM[name])
    torch.manual_seed(0)
    expected = torch_operation(f"aten.{name}")(*map(to_torch, RANDOM[name]))
    found, expected = (x[0] if isinstance(x, (tuple, list)) else x for x in (found, expected))
    assert found.shape == tuple(expected.shape)
    assert found.dtype.name == str(expected.dtype).removeprefix("torch.")
    found, expected = np.asarray(found, np.float64), expected.double().numpy()
    spread = max(expected.std(), 1e-9)
    assert abs(found.mean() - expected.mean()) < 0.04 * spread  # 5.7 deviations of the difference of two such means
    np.testing.assert_allclose(found.std(), expected.std(), rtol=0.05)
    points = np.union1d(found, expected)  # the largest difference between the two distribution functions
    below = [np.searchsorted(np.sort(x, axis=None), points, "right") / x.size for x in (found, expected)]
    assert np.abs(below[0] - below[1]).max() < 0.015


NUMBERS = {"floor": 2.5, "ceil": 2.5, "trunc": -2.5, "sqrt": 2.0, "log": 2.0, "log2": 8.0, "exp": 0.5, "max": (3, 5),
           "min": (3, 5), "int": 2.7, "float": 3, "not": False, "round": 2.7}  # fmt: skip


def test_arithmetic_on_sizes_is_pythons():
    for name in registry.names():
        library, _, base = name.partition(".")
        if library == "operator":
            arguments = ([4, 5], 1) if base == "getitem" else (7,) if base in _ONE else (7, 2)
            assert call(name, *arguments) == getattr(operator, base)(*arguments), name
        elif library in ("math", "builtins") or (
            library == "torch" and base.removeprefix("_") not in ("sym_ite", "sym_sum")
        ):
            base = base.removeprefix("_").removeprefix("sym_")
            value = NUMBERS[base]
            function = operator.not_ if base == "not" else getattr(math, base, None) or getattr(builtins, base)
            assert call(name, *(value if isinstance(value, tuple) else (value,))) == function(
                *(value if isinstance(value, tuple) else (value,))
            ), name
    assert call("torch.sym_ite", True, 1, 2) == 1
    assert call("torch.sym_sum", [1, 2, 3]) == 6
    assert call("aten.sym_size.int", CUBE, -1) == 4
    assert call("aten.sym_numel.default", CUBE) == call("aten.numel.default", CUBE) == 24
    np.testing.assert_array_equal(call("aten.to.device", X, None), X)


_ONE = ("neg", "pos", "abs", "not_", "index")
RECURRENT = {  # test_recurrent.py
    *("aten.lstm.input", "aten.gru.input", "aten.rnn_tanh.input"),
    *(f"aten.{kind}_cell.default" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")),
}


def test_every_operation_has_a_case_and_exists_in_pytorch():
    written = "".join(path.read_text() for path in pathlib.Path(__file__).parent.glob("test_ops*.py"))
    here = {name for name, _, _ in CASES} | {f"aten.{name}" for name in (*SIZED, *RANDOM)} | RECURRENT
    here |= {"aten.sym_size.int", "aten.sym_numel.default", "aten.numel.default", "aten.to.device"}
    untested, unknown = [], []
    for name in registry.names():
        library, base, *_ = name.split(".")
        if library not in ("aten", "prims"):
            continue
        if name not in here and not gone(name) and not re.search(rf"\b{base}\b", written):
            untested.append(name)
        if not gone(name) and not hasattr(getattr(getattr(torch.ops, library), base, None), name.split(".")[2]):
            unknown.append(name)
    assert not untested
    assert not unknown
