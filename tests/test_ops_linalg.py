"""Factorisations, Fourier transforms, special functions, order statistics, bags of embeddings: against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity_tools import assert_same_step, jax_eval, jax_step, normal, relative, to_jax, torch_step
from test_ops import call, check, draw, whole

import interop


def positive(n, seed=0):
    a = np.random.default_rng(seed).normal(size=(2, n, n))
    return jnp.asarray(a @ a.transpose(0, 2, 1) + n * np.eye(n))


@pytest.mark.parametrize("name", ["linalg_cholesky_ex", "linalg_inv_ex", "_linalg_eigh", "linalg_matrix_exp"])
def test_functions_of_a_matrix(name):
    check(f"aten.{name}.default", positive(4) / 4)


def test_determinants():
    a = draw(2, 4, 4)
    for name in ("_linalg_det", "_linalg_slogdet"):
        found, wanted = call(f"aten.{name}.default", a), getattr(torch.ops.aten, name)(torch.tensor(np.array(a)))
        assert len(found) == len(wanted)
        for x, y in zip(found[:-2], wanted[:-2], strict=True):  # the others are PyTorch's own, for its derivative
            np.testing.assert_allclose(x, y, rtol=1e-12)


@pytest.mark.parametrize("left, shape", [(True, (2, 4)), (True, (2, 4, 3)), (False, (2, 3, 4))])
def test_linear_systems(left, shape):
    a, b = positive(4), draw(*shape, seed=1)
    solved = torch.linalg.solve(torch.tensor(np.array(a)), torch.tensor(np.array(b)), left=left)
    found = call("aten._linalg_solve_ex.default", a, b, left=left)[0]
    np.testing.assert_allclose(found, solved, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("unitriangular", [True, False])
def test_triangular_systems(upper, left, unitriangular):
    a, b = positive(3), draw(3, 3)
    check("aten.linalg_solve_triangular.default", a, b, upper=upper, left=left, unitriangular=unitriangular)


def test_qr_and_svd_up_to_signs():
    a = draw(2, 5, 3)
    q, r = call("aten.linalg_qr.default", a, "reduced")
    np.testing.assert_allclose(q @ r, a, rtol=1e-12, atol=1e-12)
    check("aten.linalg_qr.default", a, "reduced", tolerance=1e-10)
    u, s, vh = call("aten._linalg_svd.default", a)
    np.testing.assert_allclose(u * s[:, None] @ vh, a, atol=1e-12)
    wanted = torch.linalg.svdvals(torch.tensor(np.array(a)))
    np.testing.assert_allclose(s, wanted, rtol=1e-12)
    np.testing.assert_allclose(call("aten._linalg_svd.default", a, False, False)[1], wanted, rtol=1e-12)


@pytest.mark.parametrize("name", ["i0", "special_i0e", "special_i1", "special_i1e", "special_ndtr", "special_log_ndtr"])
def test_special_functions(name):
    check(f"aten.{name}.default", draw(3, 4), tolerance=1e-10)


def test_special_functions_of_positive_numbers():
    x, y = draw(3, 4, low=0.1, high=3), draw(3, 4, seed=1, low=0.1, high=3)
    check("aten.special_entr.default", x)
    check("aten.special_ndtri.default", x / 4, tolerance=1e-10)
    check("aten.logaddexp2.default", x, y)
    for n in (0, 1, 2):
        check("aten.polygamma.default", n, x, tolerance=1e-9)
    for name in ("igamma", "igammac"):
        check(f"aten.{name}.default", x, y, gradients=False, tolerance=1e-10)
    check("aten.special_zeta.default", x + 1.5, y, gradients=False, tolerance=1e-10)
    check("aten.nextafter.default", x, y, gradients=False, tolerance=0)
    check("aten.ldexp.Tensor", x, whole(3, 4), gradients=False)
    check("aten.frexp.Tensor", draw(3, 4), gradients=False, tolerance=0)
    check("aten.gcd.default", whole(3, 4), whole(3, 4, seed=1))
    check("aten.lcm.default", whole(3, 4), whole(3, 4, seed=1))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_order_statistics_and_their_places(dim):
    x, few = draw(4, 5, 3), whole(4, 5, 3, low=0, high=3)
    for keepdim in (True, False):
        check("aten.kthvalue.default", x, 2, dim, keepdim)
        check("aten.mode.default", few, dim, keepdim)
    for name in ("cummax", "cummin"):
        check(f"aten.{name}.default", x, dim)
        check(f"aten.{name}.default", few, dim)
        check(f"aten.{name}.default", jnp.where(x > 1.5, jnp.nan, x), dim, gradients=False)


@pytest.mark.parametrize("values", [(3, 7), (1,), (0,)])
@pytest.mark.parametrize("span", [(), (0.0, 0.0), (-0.5, 1.25), (-9.0, -8.0)])
def test_histograms(values, span):
    x = draw(*values)
    check("aten.histc.default", x, 4, *span, gradients=False)
    check("aten.histc.default", jnp.round(2 * x) / 2, 5, *span, gradients=False)  # on the edges


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("padding_idx", [-1, 3])
@pytest.mark.parametrize("last", [True, False])
def test_bags_of_embeddings(mode, padding_idx, last):
    table, indices = draw(7, 4), whole(12, low=0, high=7)
    offsets = jnp.asarray([0, 4, 4, 9] + [12] * last)
    weights = draw(12, seed=2) if mode == 0 else None
    found = call("aten._embedding_bag.default", table, indices, offsets, False, mode, False, weights, last, padding_idx)
    wanted = torch.nn.functional.embedding_bag(
        torch.tensor(np.array(indices)),
        torch.tensor(np.array(table)),
        torch.tensor(np.array(offsets)),
        mode=["sum", "mean", "max"][mode],
        per_sample_weights=None if weights is None else torch.tensor(np.array(weights)),
        include_last_offset=last,
        padding_idx=None if padding_idx < 0 else padding_idx,
    )
    np.testing.assert_allclose(found[0], wanted, rtol=1e-12)


def test_the_first_of_equal_rows_of_a_bag_gets_the_gradient():
    table = jnp.round(draw(7, 4)).at[2].set(-jnp.inf)
    indices, offsets = jnp.asarray([0, 3, 5, 3, 1, 2, 2]), jnp.asarray([0, 4, 4, 5])
    weights = torch.linspace(-1, 2, 16, dtype=torch.float64).reshape(4, 4)
    theirs = torch.tensor(np.array(table), requires_grad=True)
    bags = torch.nn.functional.embedding_bag(*(torch.tensor(np.array(x)) for x in (indices,)), theirs,
                                             torch.tensor(np.array(offsets)), mode="max")  # fmt: skip
    torch.where(torch.isfinite(bags), bags * weights, 0).sum().backward()

    def total(table):
        bags = call("aten._embedding_bag.default", table, indices, offsets, False, 2)[0]
        return jnp.where(jnp.isfinite(bags), bags * weights.numpy(), 0).sum()

    np.testing.assert_allclose(jax.grad(total)(table), theirs.grad, rtol=1e-12)


def test_gradients_of_frequent_words_are_scaled():
    words = jnp.asarray([1, 3, 3, 1, 1, 5])
    check("aten.embedding.default", draw(7, 4), words, -1, True)
    check("aten.embedding.default", draw(7, 4), words, 3, True)


class Whole(torch.nn.Module):
    """Operations that PyTorch takes apart, and those that torch.export would lose."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 6, 3)
        self.norm = torch.nn.InstanceNorm2d(6, momentum=0.3, affine=True, track_running_stats=True)
        self.filter = torch.nn.Parameter(normal(6, 10, 5, seed=1))
        self.bag = torch.nn.EmbeddingBag(9, 6, mode="mean")
        layer = torch.nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x, words):
        x = self.norm(self.conv(x))
        y = torch.fft.irfft2(torch.fft.rfft2(x, norm="ortho") * self.filter, s=(10, 8), norm="ortho")
        z = torch.fft.fft(x, n=6, dim=2).abs()
        window = torch.hann_window(8, dtype=x.dtype)
        s = torch.stft(x.flatten(1), 8, 4, window=window, return_complex=True)
        mask = torch.nn.Transformer.generate_square_subsequent_mask(8, dtype=x.dtype)
        t = self.encoder(y.mean(2).transpose(1, 2), mask=mask)
        losses = torch.nn.functional.binary_cross_entropy_with_logits(x, x.sigmoid(), reduction="none")
        losses = losses + torch.nn.functional.smooth_l1_loss(x, y, reduction="none")
        b = self.bag(words)
        return y, z, s.real, s.imag, t, losses, torch.rot90(x, 1, (2, 3)).absolute().multiply(2), b


def test_operations_that_pytorch_takes_apart_and_statistics_that_export_loses():
    module = Whole().double()
    inputs = normal(4, 3, 12, 10), torch.arange(12).reshape(4, 3) % 5
    model = interop.from_torch(module, *inputs)
    converted = [to_jax(x) for x in inputs]
    assert_same_step(jax_step(model, *converted), torch_step(module, *inputs), 1e-9)
    module(*inputs)
    model(*converted)
    assert relative(model.norm.running_var[...], module.norm.running_var) < 1e-12
    module.eval(), model.eval()
    for found, wanted in zip(jax_eval(model, *converted), module(*inputs), strict=True):
        assert relative(found, wanted.detach()) < 1e-12


@pytest.mark.parametrize("shape", [(6, 4), (4, 4), (3, 5, 2)])
def test_householder_product(shape):
    a = torch.from_numpy(np.random.default_rng(0).normal(size=shape))
    x, tau = torch.geqrf(a)
    check("aten.linalg_householder_product.default", jnp.asarray(x.numpy()), jnp.asarray(tau.numpy()), tolerance=1e-10)
    check(
        "aten.linalg_householder_product.default",
        jnp.asarray(x.numpy()),
        jnp.asarray(tau[..., :1].numpy()),
        tolerance=1e-10,
    )


def test_the_largest_rows_of_bags_without_any():
    found = call("aten._embedding_bag.default", jnp.ones((3, 2)), jnp.zeros(0, int), jnp.zeros(2, int), False, 2)[0]
    np.testing.assert_array_equal(found, np.zeros((2, 2)))
