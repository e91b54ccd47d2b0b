"""The programs of docs/recipes.md run, and do what the same loops do in PyTorch."""

import jax
import numpy as np
import pytest
import torch
from page_reader import programs
from torch import nn

import interop

IMPORTS, *BLOCKS = programs("docs/recipes.md")


@pytest.fixture(scope="module")
def names():
    """The recipes' names, all but the last line of each run; `names[title]()` runs that line."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)  # the suite has JAX's 64 bits
    names = {}
    IMPORTS.run(names)
    names["a"], names["b"] = jax.random.normal(jax.random.key(2), (5, 6)), jax.random.normal(jax.random.key(3), (5, 6))
    yield names
    torch.set_default_dtype(torch.float32)


def run(names, number):
    """Runs a recipe up to its last line, and gives a function that runs this."""
    *head, last = BLOCKS[number].text.rstrip().splitlines()
    BLOCKS[number]._replace(text="\n".join(head)).run(names)
    return lambda: BLOCKS[number]._replace(text=last, line=BLOCKS[number].line + len(head)).run(names)


def twin(module, model):
    """PyTorch's module with the model's weights."""
    module.load_state_dict({k: torch.tensor(np.array(v)) for k, v in interop.state_dict(model).items()}, strict=True)
    return module.train()


def agree(model, module):
    expected = module.state_dict()
    for name, value in interop.state_dict(model).items():
        np.testing.assert_allclose(value, expected[name].numpy(), rtol=1e-10, atol=1e-12, err_msg=name)


def tensor(array):
    return torch.tensor(np.asarray(array))


def test_every_recipe_is_tried():
    assert len(BLOCKS) == 6


def test_a_gan(names):
    last = run(names, 0)
    generator = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))
    critic = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    generator, critic = twin(generator, names["generator"]), twin(critic, names["critic"])
    generator_step, critic_step = (torch.optim.SGD(m.parameters(), 0.1) for m in (generator, critic))
    softplus = torch.nn.functional.softplus
    fake = generator(tensor(names["noise"]))
    loss = softplus(-critic(tensor(names["real"]))).mean() + softplus(critic(fake.detach())).mean()
    loss.backward()
    critic_step.step()
    wanted = softplus(-critic(fake)).mean()
    wanted.backward()
    generator_step.step()
    last()
    np.testing.assert_allclose(names["losses"], [loss.item(), wanted.item()], rtol=1e-10)
    agree(names["generator"], generator)
    agree(names["critic"], critic)


def test_a_network_that_follows_another(names):
    last = run(names, 1)
    module = twin(names["Byol"](), names["byol"])
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.1)
    mine, other = module(tensor(names["a"]), tensor(names["b"]))
    ((mine - other) ** 2).mean().backward()
    optimizer.step()
    with torch.no_grad():
        for target, online in zip(module.target.parameters(), module.online.parameters(), strict=True):
            target.lerp_(online, 1 - 0.9)
    last()
    agree(names["byol"], module)


def test_distillation(names):
    last = run(names, 2)
    before = interop.state_dict(names["teacher"])
    student = nn.Sequential(nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 3))
    student = twin(student, names["student"])
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    teacher = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    teacher = twin(teacher, names["teacher"]).eval()
    x = tensor(names["a"])
    wanted = teacher(x).softmax(-1).detach()
    loss = torch.nn.functional.kl_div(student(x).log_softmax(-1), wanted, reduction="batchmean")
    loss.backward()
    optimizer.step()
    last()
    np.testing.assert_allclose(names["metrics"]["loss"], loss.item(), rtol=1e-10)
    agree(names["state"].model(), student)
    for name, value in interop.state_dict(names["teacher"]).items():
        np.testing.assert_array_equal(value, before[name])


def test_many_sizes(names):
    run(names, 3)()
    assert names["shapes"] == [(2, 2)] * 3


def test_two_graphs_with_one_set_of_weights(names):
    last = run(names, 4)
    module = names["domains"].train()
    loss = (module(tensor(names["a"]), 0) ** 2).mean() + (module(tensor(names["b"]), 1) ** 2).mean()
    loss.backward()
    last()
    np.testing.assert_allclose(names["loss"], loss.item(), rtol=1e-10)
    model = names["nnx"].merge(names["graphs"][0], names["shared"])
    agree(model, module)
    found = names["grads"]["stem"]["weight"][...]
    np.testing.assert_allclose(found, module.stem.weight.grad.numpy(), rtol=1e-10)


def test_outputs_that_exist_in_training_alone(names):
    run(names, 5)()
    assert names["metrics"]["aux"] > 0
    assert names["logits"].shape == (5, 2)
